//! The upstreams: their settings, their health, and their requests in flight.
//!
//! One keeper task is the only writer of the snapshot; requests load it once and read it without a
//! lock. `Snapshot::candidates` is the one place that filters. Requests in flight (`lease`) and places in the
//! queue are counted by guards.

mod authorities;
mod awaited_token;
mod blame;
pub(crate) mod breaker;
mod cached_reports;
pub(crate) mod change;
pub(crate) mod client;
pub mod discover;
mod engine_load;
mod forecast;
mod identity;
pub(crate) mod inspect;
mod keeper;
mod keeper_message;
pub(crate) mod lease;
mod metrics_reader;
mod pace;
mod probe;
mod probe_connection;
mod probe_duty;
mod prober;
mod query;
pub(crate) mod queue;
pub(crate) mod regular_file;
mod shared_probes;
pub mod sight;
pub(crate) mod snapshot;
mod snapshot_entry;
pub(crate) mod tls;
pub mod upstream;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::types::Config;
use crate::observe::Observer;
use authorities::ReadAuthorities;
pub(crate) use authorities::authority_problems;
pub use awaited_token::AwaitedToken;
pub use blame::Blame;
use breaker::BreakerRules;
pub use breaker::blame::FailureKind;
pub use breaker::{UpstreamSignal, UpstreamState};
pub use change::{FleetChange, FleetChangeError};
use client::UpstreamClient;
use discover::{DiscoveryPlan, PlannedSource};
pub use engine_load::{ForeignLoad, GaugeReport};
pub use keeper::Keeper;
use keeper_message::KeeperMessage;
pub use lease::{Lease, Outcome, RequestWork};
pub use query::UpstreamQuery;
use queue::QueueKey;
pub use queue::{MissedLook, Queue, QueueRefusal, QueueTurn, StartDelay};
use shared_probes::SharedProbes;
pub use snapshot::{FilterResult, Snapshot};
pub use snapshot_entry::SnapshotEntry;
pub use upstream::Upstream;

/// The capacity of the keeper's inbox; the keeper takes messages out within microseconds.
const MAX_KEEPER_MESSAGES: usize = 1024;

/// The shared handle: readers load snapshots, the keeper publishes them.
pub struct Fleet {
    snapshot: ArcSwap<Snapshot>,
    /// Incremented with every published snapshot, for tasks that wait for a change.
    published: watch::Sender<u64>,
    /// The counter of `next_turn`.
    turn: AtomicU64,
    client: UpstreamClient,
    queue: Arc<Queue>,
    rules: ArcSwap<BreakerRules>,
    /// The discovery sources that are polled for upstreams.
    plan: watch::Sender<Arc<DiscoveryPlan>>,
    keeper: mpsc::Sender<KeeperMessage>,
    /// The probes that balancers make for each other.
    shared: SharedProbes,
    /// The source of random numbers, and the number of those that were drawn.
    random: RandomState,
    draws: AtomicU64,
    observer: Observer,
}

/// The zero of `millis`. A while before the first use, since the clock of a test may stand still from before.
static CLOCK_ZERO: LazyLock<Instant> = LazyLock::new(|| {
    let now = now();
    now.checked_sub(Duration::from_secs(3600)).unwrap_or(now)
});

/// Returns an instant as a number of milliseconds, so that atomics can hold it and a choice among many
/// upstreams converts its own instant once. Never 0 or the largest number.
fn millis(at: Instant) -> u64 {
    let millis = at.saturating_duration_since(*CLOCK_ZERO).as_millis();
    u64::try_from(millis).unwrap_or(u64::MAX).clamp(1, u64::MAX - 1)
}

/// Returns the instant of `millis`.
fn instant(millis: u64) -> Instant {
    *CLOCK_ZERO + Duration::from_millis(millis)
}

/// The clock of the fleet: the runtime's, so that tests can move it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Fleet {
    /// Builds the fleet and its keeper; probing starts when the keeper runs. Fails when the `tls.ca` of an
    /// upstream or of a source cannot be read.
    pub fn new(config: &Config, observer: Observer) -> Result<(Arc<Self>, Keeper), String> {
        let (sender, inbox) = mpsc::channel(MAX_KEEPER_MESSAGES);
        let rules = BreakerRules { health: config.health.clone(), breaker: config.breaker };
        let fleet = Arc::new(Fleet {
            snapshot: ArcSwap::from_pointee(Snapshot::new(Vec::new(), Vec::new(), None)),
            published: watch::Sender::new(0),
            turn: AtomicU64::new(0),
            client: UpstreamClient,
            queue: Queue::new(config.queue.size, observer.clone()),
            rules: ArcSwap::from_pointee(rules),
            plan: watch::Sender::default(),
            keeper: sender,
            shared: SharedProbes::default(),
            random: RandomState::new(),
            draws: AtomicU64::new(0),
            observer,
        });
        let keeper = Keeper::new(fleet.clone(), inbox, config)?;
        Ok((fleet, keeper))
    }

    /// Returns the current snapshot; the caller holds it for one decision at most.
    pub fn snapshot(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// Returns the current snapshot, to be held across awaits.
    pub fn snapshot_owned(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Returns a number that increases by one with every call, for round-robin policies.
    pub fn next_turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns a random number in 0..1.
    fn draw(&self) -> f64 {
        let bits = self.random.hash_one(self.draws.fetch_add(1, Ordering::Relaxed));
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns the client for the balancer's own requests to upstreams. It shares no connections with the
    /// proxy.
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

    // === reports of requests ===

    /// Records that an answer of an upstream began: it is alive, whatever the answer turns out to be.
    pub fn answer_began(&self, upstream: &Upstream) {
        upstream.live.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Reports what a request observed of an upstream, without waiting. Good answers are only counted, unless
    /// the breaker waits for one.
    pub fn report(&self, upstream: &Upstream, signal: UpstreamSignal) {
        let live = &upstream.live;
        if matches!(signal, UpstreamSignal::Answered { .. }) {
            live.good_answers.fetch_add(1, Ordering::Relaxed);
            if !live.reports_answers.load(Ordering::Relaxed) {
                return;
            }
        }
        if matches!(signal, UpstreamSignal::Unreached { .. } | UpstreamSignal::GaveUp) {
            upstream.probe_soon();
        }
        if self.keeper.try_send(KeeperMessage::Signal { id: upstream.id, signal }).is_err() {
            // The inbox is full of reports like this one, which the keeper still reads.
            self.observer.sign_lost();
        }
    }

    /// Returns the guard that holds back the failures of one request's attempts until it is clear whether
    /// they count against their upstreams.
    pub fn blame(&self) -> Blame<'_> {
        Blame::new(self)
    }

    /// Keeps new requests away from an upstream whose engine reported that it is full: for `retry_after`, at
    /// most 60 s, or for one second without it.
    pub fn mark_busy(&self, upstream: &Upstream, retry_after: Option<Duration>) {
        self.observer.upstream_busy(upstream.name());
        let until = Upstream::busy_end(retry_after, now());
        upstream.mark_busy_until(until);
        self.shared.put_busy(upstream, until);
    }

    // === waiting for room ===

    /// Whether other requests with the same key wait. A new request then has to `wait` even if an upstream
    /// has room.
    pub fn must_wait(&self, query: &UpstreamQuery<'_>) -> bool {
        !self.queue.is_empty() && self.queue.is_waiting(&self.key(query))
    }

    /// Whether a request that `must_wait`, but has a limit of the time to the first token, may be sent before
    /// the others: each of them is too late for what is left. `missed`: what the request found.
    pub fn may_pass(&self, query: &UpstreamQuery<'_>, missed: &MissedLook) -> bool {
        self.queue.lets_pass(&self.key(query), missed)
    }

    /// Waits until `deadline` for the turn to look for room again, after a look in vain.
    pub async fn wait(
        &self,
        query: &UpstreamQuery<'_>,
        missed: MissedLook,
        deadline: Instant,
    ) -> Result<QueueTurn, QueueRefusal> {
        let key = self.key(query);
        self.queue.wait(key, missed, deadline).await
    }

    /// Returns the queue of requests that wait for room.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Builds the queue key of a query. Requests for a model that no upstream serves wait for any place,
    /// since any upstream may start to serve it.
    fn key(&self, query: &UpstreamQuery<'_>) -> QueueKey {
        let snapshot = self.snapshot();
        QueueKey::new(&UpstreamQuery {
            model: query.model.filter(|model| snapshot.serves_model(model)),
            ..*query
        })
    }

    // === changes at run time ===

    /// Applies all changes, or none and returns the reason. Reads the files that they name first.
    pub async fn apply(&self, changes: Vec<FleetChange>) -> Result<(), FleetChangeError> {
        let sources = changes.iter().flat_map(|change| match change {
            FleetChange::Sources(sources) => sources.as_slice(),
            _ => &[],
        });
        let servers: Vec<_> = sources.filter_map(PlannedSource::server).collect();
        let upstreams = changes.iter().filter_map(|change| match change {
            FleetChange::Upsert(config) => Some(config),
            _ => None,
        });
        let read = ReadAuthorities::read(authorities::files(upstreams.chain(&servers))).await;
        let (answer, answered) = oneshot::channel();
        let sent = self.keeper.send(KeeperMessage::Apply { changes, read, answer }).await;
        sent.map_err(|_| FleetChangeError::Stopping)?;
        answered.await.map_err(|_| FleetChangeError::Stopping)?
    }

    /// Waits until the snapshot satisfies `condition`; returns false when that takes longer than `limit`.
    pub async fn wait_until(&self, limit: Duration, condition: impl Fn(&Snapshot) -> bool) -> bool {
        let mut changes = self.changes();
        let waiting = async {
            while !condition(&self.snapshot()) {
                if changes.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(limit, waiting).await.unwrap_or(false)
    }
}
