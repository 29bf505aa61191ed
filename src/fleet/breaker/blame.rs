//! Which failed attempts of one request count against their upstreams.
//!
//! A request that fails alike on two upstreams is taken for the cause itself: neither failure counts. What
//! one failed attempt means is therefore open until the next attempt has ended:
//!
//! ```text
//! the next fails alike, elsewhere    neither counts, nor does any later failure of that kind
//! the next fails otherwise           the first counts, the next is open
//! the next is answered               the first counts
//! no attempt follows                 the first counts
//! ```
//!
//! A failure of the request alone on every upstream that it is sent to, without a further attempt, cannot be
//! told from a failure of the upstream: it counts, and `breaker.max_ejected` limits what follows from it.

/// How an attempt failed after the upstream got the request. Attempts that did not reach their upstream, or
/// that it gave up, are never the request's doing, and do not come here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The connection ended before the answer.
    Reset,
    /// Nothing came in time.
    Silence,
    /// An answer with this status.
    Status(u16),
    /// The first event of the answer was an error with this code.
    ErrorEvent(u16),
}

/// The failed attempts of one request; upstreams stand here by their ids.
#[derive(Debug, Default)]
pub struct BlameLedger {
    last: Option<(usize, FailureKind)>,
    /// `last` waits for the next attempt.
    open: bool,
    /// The kind that the request itself is the cause of.
    excused: Option<FailureKind>,
}

impl BlameLedger {
    /// An attempt failed on an upstream. Returns the upstream whose failure before this one counts.
    #[must_use]
    pub fn failed(&mut self, upstream: usize, kind: FailureKind) -> Option<usize> {
        let before = self.last.replace((upstream, kind));
        let was_open = std::mem::replace(&mut self.open, true);
        let is_alike = before.is_some_and(|(other, other_kind)| other != upstream && other_kind == kind);
        if is_alike {
            self.excused = Some(kind);
        }
        self.open = self.excused != Some(kind);
        before.filter(|_| was_open && !is_alike).map(|(other, _)| other)
    }

    /// What is open counts: returns its upstream.
    #[must_use]
    pub fn conclude(&mut self) -> Option<usize> {
        let was_open = std::mem::replace(&mut self.open, false);
        self.last.filter(|_| was_open).map(|(upstream, _)| upstream)
    }

    /// Whether a failure waits for the next attempt.
    pub fn is_open(&self) -> bool {
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::FailureKind::{ErrorEvent, Reset, Silence, Status};
    use super::*;

    /// `None` settles: an attempt was answered, or none follows.
    type BlameStep = Option<(usize, FailureKind)>;

    #[test]
    fn counts_what_another_upstream_does_not_confirm() {
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
            // What fails between two that are alike.
            (&[Some((1, Reset)), Some((2, Silence)), Some((3, Silence)), None], &[1]),
            (&[Some((1, Reset)), Some((2, Reset)), Some((3, Silence)), None], &[3]),
            (&[Some((1, Reset)), Some((2, Reset)), Some((3, Silence)), Some((4, Reset)), None], &[3]),
            // One upstream confirms nothing about another.
            (&[Some((1, Reset)), Some((1, Reset)), None], &[1, 1]),
            (&[Some((1, Reset)), Some((1, Reset)), Some((2, Reset)), None], &[1]),
            // Counted too early, since the next attempt took too long: the other does not count all the same.
            (&[Some((1, Reset)), None, Some((2, Reset)), None], &[1]),
            (&[Some((1, Reset)), None, Some((2, Silence)), None], &[1, 2]),
        ];
        for (steps, wanted) in table {
            let mut ledger = BlameLedger::default();
            let mut counted = Vec::new();
            for step in *steps {
                counted.extend(match step {
                    Some((upstream, kind)) => ledger.failed(*upstream, *kind),
                    None => ledger.conclude(),
                });
            }
            assert_eq!(counted, *wanted, "{steps:?}");
            assert!(!ledger.is_open(), "{steps:?}");
        }
    }
}
