//! The upstreams: what they are, how they are, and what is in flight on them.
//!
//! One keeper task is the only writer of the snapshot; requests load it once and read it without a
//! lock. `Snapshot::candidates` is the one place that filters. Counts of requests in flight are guards
//! (`lease`), never numbers kept by hand, and so are places in the queue.

mod blame;
pub mod breaker;
pub mod change;
pub mod client;
pub mod discover;
mod keeper;
pub mod lease;
mod pace;
mod probe;
pub mod queue;
pub mod snapshot;
pub mod tls;
mod told;
pub mod upstream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::types::Config;
use crate::observe;
pub use blame::Blame;
use breaker::Rules;
pub use breaker::blame::FailureKind;
pub use breaker::{Sign, State};
pub use change::{Change, Refusal};
use client::Client;
use discover::Plan;
pub use keeper::Keeper;
use keeper::Word;
pub use lease::{Lease, Outcome, Work};
use queue::Key;
pub use queue::{Queue, Refused, Turn};
pub use snapshot::{Entry, Query, Routing, Snapshot};
pub use told::{Foreign, Telling};
pub use upstream::Upstream;

/// Words on their way to the keeper, which takes them in within microseconds.
const INBOX: usize = 1024;

/// The shared handle: readers load snapshots, the keeper publishes them.
pub struct Fleet {
    snapshot: ArcSwap<Snapshot>,
    /// Moves with every published snapshot, for those who wait for a change.
    published: watch::Sender<u64>,
    turn: AtomicU64,
    client: Client,
    queue: Arc<Queue>,
    rules: ArcSwap<Rules>,
    /// Who is asked for upstreams.
    plan: watch::Sender<Arc<Plan>>,
    keeper: mpsc::Sender<Word>,
}

/// The clock of the fleet: the runtime's, so that tests can move it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Fleet {
    /// Builds the fleet, and the keeper that is to be run for it; nothing is asked before. Fails when the
    /// `tls.ca` of an upstream, or of a source, cannot be used.
    pub fn new(config: &Config) -> Result<(Arc<Self>, Keeper), String> {
        let (sender, inbox) = mpsc::channel(INBOX);
        let rules = Rules { health: config.health.clone(), breaker: config.breaker };
        let fleet = Arc::new(Fleet {
            snapshot: ArcSwap::from_pointee(Snapshot::new(Vec::new(), Vec::new())),
            published: watch::Sender::new(0),
            turn: AtomicU64::new(0),
            client: Client,
            queue: Queue::new(config.queue.size),
            rules: ArcSwap::from_pointee(rules),
            plan: watch::Sender::default(),
            keeper: sender,
        });
        let keeper = Keeper::new(fleet.clone(), inbox, config)?;
        Ok((fleet, keeper))
    }

    /// The present view; hold it no longer than one decision takes.
    pub fn snapshot(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// The present view, to keep across awaits.
    pub fn snapshot_owned(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// A number that moves by one with every call, for policies that take turns.
    pub fn next_turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks upstreams; the connections are its own, never the proxy's.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Told whenever a new snapshot is published.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    fn publish(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
        self.published.send_modify(|count| *count += 1);
    }

    // === what requests tell ===

    /// What a request saw of an upstream. Never waits; answers are only counted while they are no news.
    pub fn report(&self, upstream: &Upstream, sign: Sign) {
        let live = &upstream.live;
        if sign == Sign::Answered {
            live.answers.fetch_add(1, Ordering::Relaxed);
            if !live.wants_answers.load(Ordering::Relaxed) {
                return;
            }
        }
        if matches!(sign, Sign::Unreached { .. } | Sign::GaveUp) {
            upstream.doubt();
        }
        if self.keeper.try_send(Word::Seen { id: upstream.id, sign }).is_err() {
            // More than a thousand others say the same; the keeper will have seen enough of them.
            observe::sign_lost();
        }
    }

    /// Holds back the failures of one request's attempts until it is clear whether they count.
    pub fn blame(&self) -> Blame<'_> {
        Blame::new(self)
    }

    /// An engine said that it is full: it is avoided for so long (60 s at most), or for a second.
    pub fn busy(&self, upstream: &Upstream, retry_after: Option<Duration>) {
        observe::upstream_busy(upstream.name());
        upstream.busy(retry_after, now());
    }

    // === waiting for room ===

    /// Whether others wait for the same: then a request must `wait` even when it sees room.
    pub fn must_wait(&self, query: &Query<'_>) -> bool {
        !self.queue.is_empty() && self.queue.is_waiting(&self.key(query))
    }

    /// Waits for the turn to look for room again, until `deadline`. `until` is what `Routing::Full` said.
    pub async fn wait(
        &self,
        query: &Query<'_>,
        until: Option<Instant>,
        deadline: Instant,
    ) -> Result<Turn, Refused> {
        let key = self.key(query);
        self.queue.wait(key, until, deadline).await
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// A model that nobody serves can be anybody's: its requests wait for any place.
    fn key(&self, query: &Query<'_>) -> Key {
        let snapshot = self.snapshot();
        Key::new(&Query { model: query.model.filter(|model| snapshot.knows(model)), ..*query })
    }

    // === changes at run time ===

    /// Carries out all changes, or none: then the refusal says why.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<(), Refusal> {
        let (answer, answered) = oneshot::channel();
        let sent = self.keeper.send(Word::Apply { changes, answer }).await;
        sent.map_err(|_| Refusal::Stopping)?;
        answered.await.map_err(|_| Refusal::Stopping)?
    }

    /// Waits until the snapshot is as wanted; false when it is not by then.
    pub async fn wait_until(&self, limit: Duration, so: impl Fn(&Snapshot) -> bool) -> bool {
        let mut changes = self.changes();
        let waiting = async {
            while !so(&self.snapshot()) {
                if changes.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(limit, waiting).await.unwrap_or(false)
    }
}
