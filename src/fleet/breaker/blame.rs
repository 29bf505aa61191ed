//! Decides which failed attempts of one request count against their upstreams.
//!
//! When a request fails alike on two upstreams, the request is taken to be the cause and neither failure
//! counts. A failure is therefore undecided until the next attempt has ended:
//!
//! ```text
//! the next fails alike, elsewhere    neither counts, nor does any later failure of that kind
//! the next fails otherwise           the first counts, the next is undecided
//! the next is answered               the first counts
//! no attempt follows                 the first counts
//! ```
//!
//! Without a second attempt, a failure that the request causes cannot be distinguished from a failure of the
//! upstream. It counts, and `breaker.max_ejected` limits how many upstreams such requests eject.

use std::time::Instant;

/// How an attempt failed after the upstream received the request. Attempts that did not reach their upstream,
/// or that the upstream gave up, are never caused by the request and are not recorded here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The connection ended before the answer.
    Reset,
    /// No answer within the time limit.
    Silence,
    /// An answer with this status.
    Status(u16),
    /// The first event of the answer was an error with this code.
    ErrorEvent(u16),
}

/// A failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlamedAttempt {
    pub upstream: usize,
    /// When the request was placed there.
    pub placed: Instant,
}

/// The failed attempts of one request.
#[derive(Debug, Default)]
pub(crate) struct BlameLedger {
    last: Option<(BlamedAttempt, FailureKind)>,
    /// `last` is undecided until the next attempt ends.
    open: bool,
    /// The kind of failure that the request itself causes.
    excused: Option<FailureKind>,
}

impl BlameLedger {
    /// Records a failed attempt. Returns the one before it, if that one counts.
    #[must_use]
    pub(crate) fn failed(&mut self, attempt: BlamedAttempt, kind: FailureKind) -> Option<BlamedAttempt> {
        let before = self.last.replace((attempt, kind));
        let was_open = std::mem::replace(&mut self.open, true);
        let is_elsewhere = |other: BlamedAttempt| other.upstream != attempt.upstream;
        let is_alike = before.is_some_and(|(other, other_kind)| is_elsewhere(other) && other_kind == kind);
        if is_alike {
            self.excused = Some(kind);
        }
        self.open = self.excused != Some(kind);
        before.filter(|_| was_open && !is_alike).map(|(other, _)| other)
    }

    /// Decides that an undecided failure counts, and returns its attempt.
    #[must_use]
    pub(crate) fn conclude(&mut self) -> Option<BlamedAttempt> {
        let was_open = std::mem::replace(&mut self.open, false);
        self.last.filter(|_| was_open).map(|(attempt, _)| attempt)
    }

    /// Whether a failure is undecided.
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::FailureKind::{ErrorEvent, Reset, Silence, Status};
    use super::*;

    /// `None` concludes: an attempt was answered, or no attempt follows.
    type BlameStep = Option<(usize, FailureKind)>;

    #[test]
    fn counts_a_failure_unless_another_upstream_fails_alike() {
        let table: &[(&[BlameStep], &[usize])] = &[
            (&[None], &[]),
            (&[Some((1, Reset)), None], &[1]),
            (&[Some((1, Reset)), None, None], &[1]),
            // Alike on two: neither counts.
            (&[Some((1, Reset)), Some((2, Reset)), None], &[]),
            (&[Some((1, Status(500))), Some((2, Status(500))), None], &[]),
            (
                &[Some((1, ErrorEvent(500))), Some((2, ErrorEvent(500))), Some((3, ErrorEvent(500))), None],
                &[],
            ),
            // Of another kind, or with another status.
            (&[Some((1, Reset)), Some((2, Silence)), None], &[1, 2]),
            (&[Some((1, Status(502))), Some((2, Status(504))), None], &[1, 2]),
            (&[Some((1, Status(500))), Some((2, ErrorEvent(500))), None], &[1, 2]),
            // A different failure before or between two that are alike.
            (&[Some((1, Reset)), Some((2, Silence)), Some((3, Silence)), None], &[1]),
            (&[Some((1, Reset)), Some((2, Reset)), Some((3, Silence)), None], &[3]),
            (&[Some((1, Reset)), Some((2, Reset)), Some((3, Silence)), Some((4, Reset)), None], &[3]),
            // Two failures on the same upstream do not excuse it.
            (&[Some((1, Reset)), Some((1, Reset)), None], &[1, 1]),
            (&[Some((1, Reset)), Some((1, Reset)), Some((2, Reset)), None], &[1]),
            // The first failure was counted early because the next attempt took long; the second is still
            // excused.
            (&[Some((1, Reset)), None, Some((2, Reset)), None], &[1]),
            (&[Some((1, Reset)), None, Some((2, Silence)), None], &[1, 2]),
        ];
        for (steps, wanted) in table {
            let placed = Instant::now();
            let mut ledger = BlameLedger::default();
            let mut counted = Vec::new();
            for step in *steps {
                counted.extend(match *step {
                    Some((upstream, kind)) => ledger.failed(BlamedAttempt { upstream, placed }, kind),
                    None => ledger.conclude(),
                });
            }
            let counted: Vec<usize> = counted.iter().map(|attempt| attempt.upstream).collect();
            assert_eq!(counted, *wanted, "{steps:?}");
            assert!(!ledger.is_open(), "{steps:?}");
        }
    }
}
