//! The retry rule: whether another attempt may follow one that failed, and after which pause.
//!
//! An attempt may follow only while nothing of an answer has gone to the client, every byte that was read of
//! the request is still held, and the request is not bound to one upstream. Failures that cost no engine
//! any work (a refused connection, a pooled connection that had ended, an engine that shuts down) are retried
//! up to `MAX_ATTEMPTS`, or `retry.attempts` if that is more; the others within `retry.attempts` and the
//! retry budget.
//!
//! Pure: no clock, no counts, no budget. The caller records the attempts and pays for retries.

use std::time::Duration;

use crate::config::types::{Retry, RetryOn};

/// The number of attempts of one request while its failures cost nothing; `retry.attempts` may allow more.
pub(crate) const MAX_ATTEMPTS: u32 = 8;

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttemptFailure {
    /// There is no connection to the upstream.
    Connect(ConnectFault),
    /// A pooled connection had ended before the request was sent on it.
    Stale,
    /// The connection ended before the answer began, or the answer is not HTTP.
    Reset,
    /// An answer with this status.
    Status(u16),
    /// The engine is shutting down.
    Leaving,
    /// The engine aborted the request without a token, which it does while it shuts down.
    Aborted,
    /// The answer begins with an error of the engine.
    EngineError,
    /// The answer reports that the engine behind the API server has died.
    EngineDead,
    /// The balancer ended the attempt.
    Ended(EndReason),
}

/// Why there is no connection to an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectFault {
    /// No process listens on the port.
    Refused,
    Unreached,
    /// The balancer's machine has no socket, port or memory for it, which no upstream is to blame for.
    NoSocket,
}

/// Why the balancer ends an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// `timeouts.first_byte` has passed.
    FirstByte,
    /// `timeouts.idle` has passed.
    Idle,
    /// `timeouts.total` has passed.
    Total,
    /// The client of a background job has disconnected, and the upstream stays silent.
    Abandoned,
    /// The upstream is silent, and its probes show that it is gone.
    Gone,
    /// The upstream does not read what is sent to it.
    Unread,
    /// The client sends its body too slowly.
    SlowUpload,
    /// The balancer rejects the rest of the body: it is larger than `peek.max_body`, or names a second model.
    /// Or `peek.memory` has no room for an answer that is edited as a whole.
    Refused,
}

/// The decision about another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetryDecision {
    Stop,
    /// Retry without cost.
    Free,
    /// Retry at the cost of the retry budget.
    Paid,
    /// Retry at the cost of the retry budget, but only on an untried upstream: the present answer is as
    /// useful to the client as a second one of the same upstream.
    PaidElsewhere,
}

/// The facts of a request for the rule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetryFacts {
    /// Attempts made, the failed one included.
    pub attempts: u32,
    /// Every byte that was read of the request is held.
    pub replayable: bool,
    /// The request may go to one upstream only.
    pub pinned: bool,
}

// === impl AttemptFailure ===

impl AttemptFailure {
    /// The value of the metrics' `cause` label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            AttemptFailure::Connect(_) => "connect",
            AttemptFailure::Stale => "stale",
            AttemptFailure::Reset => "reset",
            AttemptFailure::Status(429) => "429",
            AttemptFailure::Status(502) => "502",
            AttemptFailure::Status(503) => "503",
            AttemptFailure::Status(504) => "504",
            AttemptFailure::Status(_) => "status",
            AttemptFailure::Leaving => "leaving",
            AttemptFailure::Aborted => "aborted",
            AttemptFailure::EngineError => "failed",
            AttemptFailure::EngineDead => "engine_dead",
            AttemptFailure::Ended(EndReason::Gone) => "gone",
            AttemptFailure::Ended(_) => "ended",
        }
    }

    /// Whether the failure cost no engine any work.
    fn is_free(self) -> bool {
        self == AttemptFailure::Stale || self.declines()
    }

    /// Whether a second attempt on the same upstream would fail alike, so that waiting for another one is
    /// better.
    pub(crate) fn declines(self) -> bool {
        matches!(
            self,
            AttemptFailure::Connect(_)
                | AttemptFailure::Leaving
                | AttemptFailure::Aborted
                | AttemptFailure::EngineDead
        )
    }

    /// Whether an engine may have read the prompt.
    pub(crate) fn may_have_read(self) -> bool {
        match self {
            AttemptFailure::Connect(_)
            | AttemptFailure::Stale
            | AttemptFailure::Leaving
            | AttemptFailure::Aborted => false,
            AttemptFailure::Status(status) => !is_refusal(status),
            AttemptFailure::Reset
            | AttemptFailure::EngineError
            | AttemptFailure::EngineDead
            | AttemptFailure::Ended(_) => true,
        }
    }

    fn is_on(self, on: &RetryOn) -> bool {
        match self {
            AttemptFailure::Connect(_) => on.connect,
            // After SIGTERM an engine's connections stay open without data.
            AttemptFailure::Stale | AttemptFailure::Reset | AttemptFailure::Ended(EndReason::Gone) => {
                on.reset
            }
            AttemptFailure::Status(502) => on.bad_gateway,
            AttemptFailure::Status(503) => on.unavailable,
            AttemptFailure::Status(504) => on.gateway_timeout,
            AttemptFailure::Leaving
            | AttemptFailure::Aborted
            | AttemptFailure::EngineError
            | AttemptFailure::EngineDead => on.abort,
            AttemptFailure::Status(_) | AttemptFailure::Ended(_) => false,
        }
    }
}

/// Whether an answer with this status means that the prompt was not read: the request is invalid, the engine
/// is too busy or shuts down, or a gateway did not find it. After a timeout this is unknown.
pub(crate) fn is_refusal(status: u16) -> bool {
    matches!(status, 400..500 | 502 | 503)
}

/// Decides whether to retry after a failed attempt.
pub(crate) fn decide(failure: AttemptFailure, facts: RetryFacts, retry: &Retry) -> RetryDecision {
    if retry.attempts == 0 || !facts.replayable || facts.pinned || !failure.is_on(&retry.on) {
        return RetryDecision::Stop;
    }
    if failure.is_free() {
        let most = MAX_ATTEMPTS.max(retry.attempts.saturating_add(1));
        return if facts.attempts < most { RetryDecision::Free } else { RetryDecision::Stop };
    }
    match failure {
        _ if facts.attempts > retry.attempts => RetryDecision::Stop,
        AttemptFailure::Status(_) => RetryDecision::PaidElsewhere,
        _ => RetryDecision::Paid,
    }
}

/// Returns the pause before an attempt; the first has number 1. The second starts at once, on another
/// upstream. From then on the pauses double, each drawn between its half and its whole by `random`.
pub(crate) fn pause(retry: &Retry, attempt: u32, random: u64) -> Duration {
    let Some(doublings) = attempt.checked_sub(3) else { return Duration::ZERO };
    let whole = retry.backoff.saturating_mul(1 << doublings.min(16)).min(retry.max_backoff);
    whole.mul_f64(0.5 + 0.5 * (random >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: RetryFacts = RetryFacts { attempts: 1, replayable: true, pinned: false };

    const FAILURES: [AttemptFailure; 17] = [
        AttemptFailure::Connect(ConnectFault::Refused),
        AttemptFailure::Connect(ConnectFault::Unreached),
        AttemptFailure::Stale,
        AttemptFailure::Reset,
        AttemptFailure::Status(502),
        AttemptFailure::Status(503),
        AttemptFailure::Status(504),
        AttemptFailure::Status(429),
        AttemptFailure::Status(500),
        AttemptFailure::Leaving,
        AttemptFailure::Aborted,
        AttemptFailure::EngineError,
        AttemptFailure::EngineDead,
        AttemptFailure::Ended(EndReason::Gone),
        AttemptFailure::Ended(EndReason::FirstByte),
        AttemptFailure::Ended(EndReason::Total),
        AttemptFailure::Ended(EndReason::SlowUpload),
    ];

    #[test]
    fn decides_by_failure() {
        use RetryDecision::{Free, Paid, PaidElsewhere, Stop};
        let expected = [
            Free,
            Free,
            Free,
            Paid,
            PaidElsewhere,
            PaidElsewhere,
            PaidElsewhere,
            Stop,
            Stop,
            Free,
            Free,
            Paid,
            Free,
            Paid,
            Stop,
            Stop,
            Stop,
        ];
        for (failure, decision) in FAILURES.into_iter().zip(expected) {
            assert_eq!(decide(failure, FACTS, &Retry::default()), decision, "{failure:?}");
        }
    }

    #[test]
    fn never_retries_a_request_that_cannot_be_repeated() {
        let retry = Retry::default();
        let off = Retry { attempts: 0, ..retry };
        let nothing = Retry { on: RetryOn::NOTHING, ..retry };
        for failure in FAILURES {
            for (facts, retry) in [
                (RetryFacts { replayable: false, ..FACTS }, &retry),
                (RetryFacts { pinned: true, ..FACTS }, &retry),
                (RetryFacts { attempts: MAX_ATTEMPTS, ..FACTS }, &retry),
                (FACTS, &off),
                (FACTS, &nothing),
            ] {
                assert_eq!(decide(failure, facts, retry), RetryDecision::Stop, "{failure:?} {facts:?}");
            }
        }
    }

    #[test]
    fn limits_paid_retries_by_the_configured_attempts_and_free_ones_by_the_maximum() {
        let retry = Retry { attempts: 2, ..Retry::default() };
        for (attempts, paid) in [(1, true), (2, true), (3, false), (7, false)] {
            let facts = RetryFacts { attempts, ..FACTS };
            let reset = decide(AttemptFailure::Reset, facts, &retry);
            assert_eq!(reset == RetryDecision::Paid, paid, "after {attempts}");
            let refused = decide(AttemptFailure::Connect(ConnectFault::Refused), facts, &retry);
            assert_eq!(refused, RetryDecision::Free, "after {attempts}");
        }
        let many = Retry { attempts: 2 * MAX_ATTEMPTS, ..Retry::default() };
        for (attempts, free) in
            [(MAX_ATTEMPTS, true), (2 * MAX_ATTEMPTS, true), (2 * MAX_ATTEMPTS + 1, false)]
        {
            let facts = RetryFacts { attempts, ..FACTS };
            let refused = decide(AttemptFailure::Connect(ConnectFault::Refused), facts, &many);
            assert_eq!(refused == RetryDecision::Free, free, "after {attempts}");
        }
    }

    #[test]
    fn starts_the_second_attempt_at_once_and_doubles_later_pauses() {
        let backoff = Duration::from_millis(50);
        let retry = Retry { backoff, max_backoff: backoff * 3, ..Retry::default() };
        for (attempt, times) in [(2, 0), (3, 1), (4, 2), (5, 3), (8, 3)] {
            let (least, most) = (pause(&retry, attempt, 0), pause(&retry, attempt, u64::MAX));
            assert_eq!(least, backoff * times / 2, "attempt {attempt}");
            assert!(most > backoff * times * 99 / 100 || times == 0, "attempt {attempt}");
            assert!(most <= backoff * times, "attempt {attempt}");
        }
    }
}
