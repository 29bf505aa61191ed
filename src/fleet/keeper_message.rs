//! The messages of the keeper's inbox.

use tokio::sync::oneshot;

use super::breaker::UpstreamSignal;
use super::change::{FleetChange, FleetChangeError};
use super::probe::{ProbeFailure, ProbeReport};
use crate::aggregate::EngineMetrics;

/// A message to the keeper.
pub(super) enum KeeperMessage {
    /// The result of a probe.
    Probed { id: usize, found: Result<ProbeReport, ProbeFailure> },
    /// A page of metrics.
    Metrics { id: usize, metrics: EngineMetrics },
    /// A signal of a request.
    Signal { id: usize, signal: UpstreamSignal },
    /// An upstream that is being removed, or has departed, became idle.
    Idle { id: usize },
    /// Changes to apply, all or none.
    Apply { changes: Vec<FleetChange>, answer: oneshot::Sender<Result<(), FleetChangeError>> },
}
