//! The messages of the keeper's inbox.

use std::time::Instant;

use tokio::sync::oneshot;

use super::authorities::ReadAuthorities;
use super::breaker::UpstreamSignal;
use super::change::{FleetChange, FleetChangeError};
use super::probe::{ProbeFailure, ProbeReport};
use crate::aggregate::{EngineMetrics, ModelCard};

/// What a sibling found about an upstream, as far as the keeper applies it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct SiblingFacts {
    pub models: Option<Vec<ModelCard>>,
    pub version: Option<String>,
    pub metrics: Option<EngineMetrics>,
    /// Until when the sibling's breaker keeps requests away.
    pub tripped_until: Option<Instant>,
}

/// A message to the keeper.
pub(super) enum KeeperMessage {
    /// The result of a probe.
    Probed { id: usize, found: Result<ProbeReport, ProbeFailure> },
    /// A page of metrics.
    Metrics { id: usize, metrics: EngineMetrics },
    /// What siblings found about upstreams.
    Reported { facts: Vec<(usize, SiblingFacts)> },
    /// A signal of a request.
    Signal { id: usize, signal: UpstreamSignal },
    /// An upstream that is being removed, or has departed, became idle.
    Idle { id: usize },
    /// Changes to apply, all or none.
    Apply {
        changes: Vec<FleetChange>,
        /// The files that the changes name: the keeper reads none.
        read: ReadAuthorities,
        answer: oneshot::Sender<Result<(), FleetChangeError>>,
    },
}
