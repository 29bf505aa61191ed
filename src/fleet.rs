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
mod engine_load;
mod keeper;
pub mod lease;
mod pace;
mod probe;
pub mod queue;
pub mod snapshot;
pub mod tls;
pub mod upstream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::types::Config;
use crate::observe::Observer;
pub use blame::Blame;
use breaker::BreakerRules;
pub use breaker::blame::FailureKind;
pub use breaker::{Sign, UpstreamState};
pub use change::{Change, ChangeError};
use client::UpstreamClient;
use discover::DiscoveryPlan;
pub use engine_load::{ForeignLoad, GaugeReport};
pub use keeper::Keeper;
use keeper::KeeperMessage;
pub use lease::{Lease, Outcome, Work};
use queue::QueueKey;
pub use queue::{Queue, QueueRefusal, QueueTurn};
pub use snapshot::{Query, Routing, Snapshot, SnapshotEntry};
pub use upstream::Upstream;

/// The capacity of the keeper's inbox; the keeper takes messages out within microseconds.
const MAX_KEEPER_MESSAGES: usize = 1024;

/// The shared handle: readers load snapshots, the keeper publishes them.
pub struct Fleet {
    snapshot: ArcSwap<Snapshot>,
    /// Incremented with every published snapshot, for tasks that wait for a change.
    published: watch::Sender<u64>,
    turn: AtomicU64,
    client: UpstreamClient,
    queue: Arc<Queue>,
    rules: ArcSwap<BreakerRules>,
    /// The discovery sources that are polled for upstreams.
    plan: watch::Sender<Arc<DiscoveryPlan>>,
    keeper: mpsc::Sender<KeeperMessage>,
    observer: Observer,
}

/// The clock of the fleet: the runtime's, so that tests can move it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Fleet {
    /// Builds the fleet, and the keeper that is to be run for it; no upstream is probed before that. Fails
    /// when the `tls.ca` of an upstream, or of a source, cannot be used.
    pub fn new(config: &Config, observer: Observer) -> Result<(Arc<Self>, Keeper), String> {
        let (sender, inbox) = mpsc::channel(MAX_KEEPER_MESSAGES);
        let rules = BreakerRules { health: config.health.clone(), breaker: config.breaker };
        let fleet = Arc::new(Fleet {
            snapshot: ArcSwap::from_pointee(Snapshot::new(Vec::new(), Vec::new())),
            published: watch::Sender::new(0),
            turn: AtomicU64::new(0),
            client: UpstreamClient,
            queue: Queue::new(config.queue.size, observer.clone()),
            rules: ArcSwap::from_pointee(rules),
            plan: watch::Sender::default(),
            keeper: sender,
            observer,
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

    /// The client for the balancer's own requests to upstreams. It shares no connections with the proxy.
    pub fn client(&self) -> &UpstreamClient {
        &self.client
    }

    /// Returns a receiver that is notified of every new snapshot.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    fn publish(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
        self.published.send_modify(|count| *count += 1);
    }

    // === what requests tell ===

    /// Reports what a request saw of an upstream. Never waits. Successful answers are only counted unless
    /// the breaker waits for one.
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
        if self.keeper.try_send(KeeperMessage::Seen { id: upstream.id, sign }).is_err() {
            // The inbox holds more than a thousand messages that report the same; the keeper will have seen
            // enough of them.
            self.observer.sign_lost();
        }
    }

    /// Holds back the failures of one request's attempts until it is clear whether they count.
    pub fn blame(&self) -> Blame<'_> {
        Blame::new(self)
    }

    /// An engine reported that it is full: new requests avoid it for `retry_after` (at most 60 s), or for a
    /// second.
    pub fn busy(&self, upstream: &Upstream, retry_after: Option<Duration>) {
        self.observer.upstream_busy(upstream.name());
        upstream.busy(retry_after, now());
    }

    // === waiting for room ===

    /// Whether other requests wait with the same key: then a request must `wait` even when it finds room.
    pub fn must_wait(&self, query: &Query<'_>) -> bool {
        !self.queue.is_empty() && self.queue.is_waiting(&self.key(query))
    }

    /// Waits for the turn to look for room again, until `deadline`. `until` comes from `Routing::Full`.
    pub async fn wait(
        &self,
        query: &Query<'_>,
        until: Option<Instant>,
        deadline: Instant,
    ) -> Result<QueueTurn, QueueRefusal> {
        let key = self.key(query);
        self.queue.wait(key, until, deadline).await
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Builds the key of a query. A model that no upstream serves may turn up on any upstream, so its
    /// requests wait for any place.
    fn key(&self, query: &Query<'_>) -> QueueKey {
        let snapshot = self.snapshot();
        QueueKey::new(&Query { model: query.model.filter(|model| snapshot.serves_model(model)), ..*query })
    }

    // === changes at run time ===

    /// Applies all changes, or none: then the error gives the reason.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<(), ChangeError> {
        let (answer, answered) = oneshot::channel();
        let sent = self.keeper.send(KeeperMessage::Apply { changes, answer }).await;
        sent.map_err(|_| ChangeError::Stopping)?;
        answered.await.map_err(|_| ChangeError::Stopping)?
    }

    /// Waits until the snapshot satisfies the condition; returns false when it does not within `limit`.
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
