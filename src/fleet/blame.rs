//! Reports the failed attempts of one request that count against their upstreams (`breaker::blame`).
//!
//! An exchange holds one `Blame` beside its loop of attempts:
//!
//! ```text
//! let mut blame = fleet.blame();
//! loop {
//!     lease   = choose(..).await?
//!     attempt = blame.during(attempt(&lease, ..)).await
//!     the answer is accepted (its first event was judged): blame.conclude(), and relay
//!     reset, silence, a 5xx or an error event:  blame.failed(&lease, FailureKind), whether or not
//!                                               another attempt follows
//!     unreached, shutting down, given up, dead: fleet.report(upstream, signal) at once
//!     no further attempt:                       blame.conclude()
//! }
//! ```
//!
//! Dropping a `Blame` concludes it, so that no failure is lost when the client disconnects. A failure after
//! the answer began is reported with `fleet.report`: no attempt can follow it.

use std::future::Future;
use std::time::Duration;

use super::Fleet;
use super::breaker::UpstreamSignal;
use super::breaker::blame::{BlameLedger, BlamedAttempt, FailureKind};
use super::lease::Lease;

/// The longest time that a failure is held back while the next attempt runs: the breaker must receive the
/// failures of an upstream even while the other upstreams take long to answer.
const MAX_HELD_TIME: Duration = Duration::from_secs(1);

/// Decides which failures of one request's attempts are reported to the breaker.
pub struct Blame<'f> {
    fleet: &'f Fleet,
    ledger: BlameLedger,
}

impl<'f> Blame<'f> {
    pub(super) fn new(fleet: &'f Fleet) -> Self {
        Blame { fleet, ledger: BlameLedger::default() }
    }

    /// Records the failure of an attempt on an upstream that had received the request.
    pub fn failed(&mut self, lease: &Lease, kind: FailureKind) {
        self.record(BlamedAttempt { upstream: lease.upstream().id, placed: lease.since() }, kind);
    }

    /// Reports a held failure: an attempt was answered, or no attempt follows.
    pub fn conclude(&mut self) {
        let counts = self.ledger.conclude();
        self.report(counts);
    }

    /// Whether a failure is held back until the next attempt ends.
    pub fn is_open(&self) -> bool {
        self.ledger.is_open()
    }

    /// Runs the next attempt; reports a held failure when the attempt takes longer than `MAX_HELD_TIME`.
    pub async fn during<T>(&mut self, mut attempt: impl Future<Output = T> + Unpin) -> T {
        if !self.ledger.is_open() {
            return attempt.await;
        }
        tokio::select! {
            biased;
            ended = &mut attempt => return ended,
            () = tokio::time::sleep(MAX_HELD_TIME) => self.conclude(),
        }
        attempt.await
    }

    fn record(&mut self, attempt: BlamedAttempt, kind: FailureKind) {
        let counts = self.ledger.failed(attempt, kind);
        self.report(counts);
    }

    fn report(&self, counts: Option<BlamedAttempt>) {
        let Some(BlamedAttempt { upstream, placed }) = counts else { return };
        // An upstream that has left the fleet has no breaker any more.
        if let Some(entry) = self.fleet.snapshot().watched(upstream) {
            self.fleet.report(&entry.upstream, UpstreamSignal::Failed { placed });
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

    /// A fleet of two upstreams that receive no requests.
    fn fleet() -> (Arc<Fleet>, Keeper) {
        let upstream = |name: &str| UpstreamConfig::new(url::upstream(name).expect("is a URL"));
        let config = Config {
            upstreams: vec![upstream("http://127.0.0.1:1"), upstream("http://127.0.0.1:2")],
            ..Config::default()
        };
        Fleet::new(&config, Observer::default()).expect("it needs no file")
    }

    /// An attempt on this upstream.
    fn on(upstream: usize) -> BlamedAttempt {
        BlamedAttempt { upstream, placed: crate::fleet::now() }
    }

    /// The upstreams whose failures reached the keeper's inbox; the keeper never runs.
    fn reported(keeper: &mut Keeper) -> Vec<usize> {
        std::iter::from_fn(|| keeper.next_signal()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn reports_a_failure_once_whatever_ends_the_request() {
        let (fleet, mut keeper) = fleet();
        let mut blame = fleet.blame();
        blame.record(on(0), FailureKind::Reset);
        assert_eq!(reported(&mut keeper), Vec::<usize>::new(), "another attempt may fail alike");
        blame.conclude();
        blame.conclude();
        drop(blame);
        assert_eq!(reported(&mut keeper), [0]);
        let mut dropped = fleet.blame();
        dropped.record(on(1), FailureKind::Reset);
        drop(dropped);
        assert_eq!(reported(&mut keeper), [1], "the client disconnected");
        let mut alike = fleet.blame();
        alike.record(on(0), FailureKind::Status(502));
        alike.record(on(1), FailureKind::Status(502));
        drop(alike);
        let mut gone = fleet.blame();
        gone.record(on(9), FailureKind::Reset);
        drop(gone);
        assert_eq!(reported(&mut keeper), Vec::<usize>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn reports_a_held_failure_while_a_long_attempt_runs() {
        let (fleet, mut keeper) = fleet();
        let mut blame = fleet.blame();
        blame.record(on(0), FailureKind::Reset);
        blame.during(Box::pin(tokio::time::sleep(MAX_HELD_TIME / 2))).await;
        assert_eq!(reported(&mut keeper), Vec::<usize>::new());
        blame.during(Box::pin(tokio::time::sleep(MAX_HELD_TIME * 2))).await;
        assert_eq!(reported(&mut keeper), [0]);
        blame.record(on(1), FailureKind::Reset);
        drop(blame);
        assert_eq!(reported(&mut keeper), Vec::<usize>::new(), "the second upstream fails alike");
    }
}
