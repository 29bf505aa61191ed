//! Changes of the fleet at run time, from the admin API, from reloads and from discovery.

use std::time::Instant;

use thiserror::Error;

use super::breaker::BreakerRules;
use crate::config::types::{DiscoverySource, UpstreamConfig};

/// One change of the fleet, which the keeper applies.
#[derive(Clone, Debug)]
pub enum FleetChange {
    /// Adds an upstream, or replaces the settings of the upstream with this name and cancels its removal.
    /// A discovered upstream never replaces one that an operator has named.
    Upsert(UpstreamConfig),
    /// Removes an upstream: it gets no new requests and leaves the fleet when its last request has ended.
    /// With `force` the upstream leaves at once, and its requests end on their own.
    Remove {
        name: String,
        force: bool,
    },
    /// Removes an upstream that discovery no longer lists, unless an operator has named it meanwhile.
    Release {
        name: String,
    },
    /// Starts or ends an operator's drain; it lasts until the next such change.
    Drain {
        name: String,
        drain: bool,
    },
    Weight {
        name: String,
        weight: f64,
    },
    /// Replaces the settings of `health` and `breaker`.
    Rules(BreakerRules),
    /// Hands an upstream that was removed from the file to discovery, which releases it once discovered
    /// upstreams have replaced it.
    HandToDiscovery {
        name: String,
    },
    /// Replaces the discovery sources.
    Sources(Vec<DiscoverySource>),
    /// Sets until when a source that has not answered yet may list upstreams; `None`: all have answered.
    AwaitSources(Option<Instant>),
    /// Sets the number of requests that may wait in the queue.
    QueueSize(usize),
}

/// Why a change could not be applied.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FleetChangeError {
    #[error("no upstream is named {0:?}")]
    Unknown(String),
    #[error("{0}")]
    Unusable(String),
    #[error("the balancer is stopping")]
    Stopping,
}
