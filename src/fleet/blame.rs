//! Reports the failed attempts of one request that count against their upstreams (`breaker::blame`).
//!
//! An exchange holds one `Blame` beside its loop of attempts:
//!
//! ```text
//! let mut blame = fleet.blame();
//! loop {
//!     lease   = choose(..).await?
//!     attempt = blame.during(attempt(&lease, ..)).await
//!     an answer is accepted (its first event was judged): blame.settle(), and relay
//!     reset, silence, a 5xx or an error event:  blame.failed(upstream id, FailureKind), whether or not
//!                                               another attempt follows
//!     not reached, leaving, given up, dead:     fleet.report(upstream, sign) at once, as before
//!     no further attempt:                       blame.settle()
//! }
//! ```
//!
//! Dropping it settles it, so that a sign is never lost: also when the client disconnects. A failure after
//! the answer began is reported with `fleet.report` as before: no attempt can follow it.

use std::future::Future;
use std::time::Duration;

use super::Fleet;
use super::breaker::Sign;
use super::breaker::blame::{BlameLedger, FailureKind};

/// A failed attempt waits no longer for the next one to end: the breaker must hear of an upstream that fails
/// every request while the other upstreams take long to answer.
const MAX_OPEN: Duration = Duration::from_secs(1);

pub struct Blame<'f> {
    fleet: &'f Fleet,
    ledger: BlameLedger,
}

impl<'f> Blame<'f> {
    pub(super) fn new(fleet: &'f Fleet) -> Self {
        Blame { fleet, ledger: BlameLedger::default() }
    }

    /// An attempt failed on an upstream that had got the request.
    pub fn failed(&mut self, upstream: usize, kind: FailureKind) {
        let counts = self.ledger.failed(upstream, kind);
        self.report(counts);
    }

    /// An attempt was answered, or none follows.
    pub fn conclude(&mut self) {
        let counts = self.ledger.conclude();
        self.report(counts);
    }

    /// Whether a failed attempt waits for the next one.
    pub fn is_open(&self) -> bool {
        self.ledger.is_open()
    }

    /// Waits for the next attempt; settles when that takes long.
    pub async fn during<T>(&mut self, mut attempt: impl Future<Output = T> + Unpin) -> T {
        if !self.ledger.is_open() {
            return attempt.await;
        }
        tokio::select! {
            biased;
            ended = &mut attempt => return ended,
            () = tokio::time::sleep(MAX_OPEN) => self.conclude(),
        }
        attempt.await
    }

    fn report(&self, counts: Option<usize>) {
        let Some(id) = counts else { return };
        // An upstream that has left the fleet is judged no more.
        if let Some(entry) = self.fleet.snapshot().watched(id) {
            self.fleet.report(&entry.upstream, Sign::Failed);
        }
    }
}

impl Drop for Blame<'_> {
    fn drop(&mut self) {
        self.conclude();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Keeper;
    use super::*;
    use crate::config::types::{Config, UpstreamConfig};
    use crate::config::url;
    use crate::observe::Observer;
    use std::sync::Arc;

    /// Two upstreams that nothing is sent to.
    fn fleet() -> (Arc<Fleet>, Keeper) {
        let upstream = |name: &str| UpstreamConfig::new(url::upstream(name).expect("is a URL"));
        let config = Config {
            upstreams: vec![upstream("http://127.0.0.1:1"), upstream("http://127.0.0.1:2")],
            ..Config::default()
        };
        Fleet::new(&config, Observer::default()).expect("it needs no file")
    }

    /// The signs that reach the keeper: it never runs, so that they stay in its inbox.
    fn signs(keeper: &mut Keeper) -> Vec<usize> {
        std::iter::from_fn(|| keeper.next_sign()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn reports_once_whatever_ends_the_request() {
        let (fleet, mut keeper) = fleet();
        let mut blame = fleet.blame();
        blame.failed(0, FailureKind::Reset);
        assert_eq!(signs(&mut keeper), Vec::<usize>::new(), "another attempt may fail alike");
        blame.conclude();
        blame.conclude();
        drop(blame);
        assert_eq!(signs(&mut keeper), [0]);
        let mut dropped = fleet.blame();
        dropped.failed(1, FailureKind::Reset);
        drop(dropped);
        assert_eq!(signs(&mut keeper), [1], "the client disconnected");
        let mut alike = fleet.blame();
        alike.failed(0, FailureKind::Status(502));
        alike.failed(1, FailureKind::Status(502));
        drop(alike);
        let mut gone = fleet.blame();
        gone.failed(9, FailureKind::Reset);
        drop(gone);
        assert_eq!(signs(&mut keeper), Vec::<usize>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_attempt_does_not_keep_the_sign_of_the_one_before() {
        let (fleet, mut keeper) = fleet();
        let mut blame = fleet.blame();
        blame.failed(0, FailureKind::Reset);
        blame.during(Box::pin(tokio::time::sleep(MAX_OPEN / 2))).await;
        assert_eq!(signs(&mut keeper), Vec::<usize>::new());
        blame.during(Box::pin(tokio::time::sleep(MAX_OPEN * 2))).await;
        assert_eq!(signs(&mut keeper), [0]);
        blame.failed(1, FailureKind::Reset);
        drop(blame);
        assert_eq!(signs(&mut keeper), Vec::<usize>::new(), "it fails alike");
    }
}
