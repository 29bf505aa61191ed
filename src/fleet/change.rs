//! Changes of the fleet at run time, from the admin interface and from reloads.

use thiserror::Error;

use super::breaker::Rules;
use crate::config::types::UpstreamConfig;

#[derive(Clone, Debug)]
pub enum Change {
    /// Adds an upstream, or gives the one of its name other settings. One that is being removed stays.
    Upsert(UpstreamConfig),
    /// Takes an upstream out: no new requests from now on, and it goes when its last one has ended; with
    /// `force` it goes at once, and its requests end on their own.
    Remove {
        name: String,
        force: bool,
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
    Rules(Rules),
    /// Lets so many wait.
    QueueSize(usize),
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    #[error("no upstream is named {0:?}")]
    Unknown(String),
    #[error("{0}")]
    Unusable(String),
    #[error("the balancer is stopping")]
    Stopping,
}
