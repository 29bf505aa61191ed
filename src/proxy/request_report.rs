//! The facts of a request for its record, and the report of a failed attempt to the fleet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::placement::Placement;
use super::request::RequestScope;
use crate::fleet::{Blame, FailureKind, Outcome, Upstream, UpstreamSignal};
use crate::reply::usage::Usage;
use crate::retry::{AttemptFailure, ConnectFault, EndReason};

/// The facts of a request for its record.
#[derive(Default)]
pub(super) struct RequestReport {
    /// The upstream of the last attempt.
    pub upstream: Option<Arc<Upstream>>,
    pub attempts: u32,
    pub status: u16,
    /// The outcome of the last attempt.
    pub outcome: Option<Outcome>,
    /// The label of the rejection that was sent.
    pub refused: Option<&'static str>,
    /// The forecast of the time from the last choice to the first token.
    pub forecast: Option<Duration>,
    pub usage: Option<Usage>,
    pub bytes_received: u64,
    pub bytes_sent: u64,
}

/// Reports a failed attempt.
pub(super) fn report_attempt(
    scope: &RequestScope<'_>,
    placement: &Placement,
    failure: AttemptFailure,
    report: &mut RequestReport,
) {
    report.outcome = Some(outcome_of(failure));
    scope.shared.observer.attempt_failed(
        scope.id,
        placement.upstream().name(),
        failure.label(),
        report.attempts,
    );
}

/// Reports an answer that failed after its beginning, also to the fleet: no attempt can follow.
pub(super) fn report_failure(
    scope: &RequestScope<'_>,
    placement: &Placement,
    failure: AttemptFailure,
    report: &mut RequestReport,
) {
    report_attempt(scope, placement, failure, report);
    match fault_of(failure, placement.lease.since()) {
        UpstreamFault::Signal(signal) => scope.shared.fleet.report(placement.upstream(), signal),
        UpstreamFault::Failed(_) => {
            let signal = UpstreamSignal::Failed { placed: placement.lease.since() };
            scope.shared.fleet.report(placement.upstream(), signal)
        }
        UpstreamFault::None => {}
    }
}

/// The evidence of an attempt's failure against its upstream.
enum UpstreamFault {
    None,
    /// The upstream reported it, or could not be reached.
    Signal(UpstreamSignal),
    /// The upstream failed with the request, which may itself be the cause.
    Failed(FailureKind),
}

fn outcome_of(failure: AttemptFailure) -> Outcome {
    match failure {
        AttemptFailure::Connect(_) => Outcome::Unreached,
        AttemptFailure::Status(status) => Outcome::Answered(status),
        AttemptFailure::Leaving | AttemptFailure::EngineError | AttemptFailure::EngineDead => {
            Outcome::Answered(500)
        }
        AttemptFailure::Stale
        | AttemptFailure::Reset
        | AttemptFailure::Aborted
        | AttemptFailure::Ended(_) => Outcome::Broken,
    }
}

/// `placed`: when the request was placed on the upstream.
fn fault_of(failure: AttemptFailure, placed: Instant) -> UpstreamFault {
    match failure {
        AttemptFailure::Connect(ConnectFault::NoSocket) => UpstreamFault::None,
        AttemptFailure::Connect(fault) => {
            let refused = fault == ConnectFault::Refused;
            UpstreamFault::Signal(UpstreamSignal::Unreached { refused, placed })
        }
        AttemptFailure::EngineDead => UpstreamFault::Signal(UpstreamSignal::EngineDead),
        AttemptFailure::Leaving => UpstreamFault::Signal(UpstreamSignal::ShuttingDown),
        AttemptFailure::Aborted => UpstreamFault::Signal(UpstreamSignal::GaveUp),
        AttemptFailure::Reset => UpstreamFault::Failed(FailureKind::Reset),
        AttemptFailure::EngineError => UpstreamFault::Failed(FailureKind::ErrorEvent(500)),
        AttemptFailure::Status(status @ (500 | 502 | 504..)) => {
            UpstreamFault::Failed(FailureKind::Status(status))
        }
        // A long answer is not the upstream's fault, nor is a job that still waits in the engine.
        AttemptFailure::Ended(
            EndReason::Total | EndReason::Abandoned | EndReason::SlowUpload | EndReason::Refused,
        ) => UpstreamFault::None,
        // A hanging engine still answers probes: only requests detect it.
        AttemptFailure::Ended(
            EndReason::FirstByte | EndReason::Idle | EndReason::Gone | EndReason::Unread,
        ) => UpstreamFault::Failed(FailureKind::Silence),
        // A full upstream was reported with its head; a pooled connection may end at any time.
        AttemptFailure::Status(_) | AttemptFailure::Stale => UpstreamFault::None,
    }
}

/// Reports an attempt's failure to the fleet.
pub(super) fn report_fault(
    scope: &RequestScope<'_>,
    blame: &mut Blame<'_>,
    placement: &Placement,
    failure: AttemptFailure,
) {
    match fault_of(failure, placement.lease.since()) {
        UpstreamFault::None => {}
        UpstreamFault::Signal(signal) => scope.shared.fleet.report(placement.upstream(), signal),
        UpstreamFault::Failed(kind) => blame.failed(&placement.lease, kind),
    }
}
