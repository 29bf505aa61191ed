//! Changes of the fleet at run time, from the admin interface, from reloads and from what is discovered.

use std::time::Instant;

use thiserror::Error;

use super::breaker::BreakerRules;
use crate::config::types::{DiscoverySource, UpstreamConfig};

#[derive(Clone, Debug)]
pub enum Change {
    /// Adds an upstream, or gives the one of its name other settings. One that is being removed stays. What
    /// is discovered leaves alone what an operator has named.
    Upsert(UpstreamConfig),
    /// Takes an upstream out: no new requests from now on, and it goes when its last one has ended; with
    /// `force` it goes at once, and its requests end on their own.
    Remove {
        name: String,
        force: bool,
    },
    /// No source names it any more: as `Remove`, unless an operator does by now.
    Release {
        name: String,
    },
    /// Stops new requests, or lets them come again; it stands until the next such word.
    Drain {
        name: String,
        drain: bool,
    },
    Weight {
        name: String,
        weight: f64,
    },
    /// Goes by other settings of `health` and `breaker` from now on.
    Rules(BreakerRules),
    /// The file names it no more, and has sources that may: it goes once what they name is there.
    Leave {
        name: String,
    },
    /// Asks these for upstreams from now on, and no others.
    Sources(Vec<DiscoverySource>),
    /// Sources that have not answered may name upstreams until then; `None`: all have.
    Awaits(Option<Instant>),
    /// Lets so many wait.
    QueueSize(usize),
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ChangeError {
    #[error("no upstream is named {0:?}")]
    Unknown(String),
    #[error("{0}")]
    Unusable(String),
    #[error("the balancer is stopping")]
    Stopping,
}
