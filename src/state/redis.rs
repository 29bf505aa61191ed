//! The exchange with siblings over one Redis stream, in one background task.
//!
//! Requests put events into the outbox and read local memory; the task publishes the events, at most once an
//! `interval`, and applies the messages of siblings. A request waits for Redis only in `lookup`, for a
//! bounded time. Redis may be gone, slow, full or empty at any time: no request fails because of that.
//!
//! ```text
//! stream    urgent and small: gauges, bindings, marks, requests    XADD MAXLEN ~, XREAD BLOCK
//! chains    the prompts that upstreams were sent                   the same; chains:N for several streams
//! s: and r: bindings by key: upstream and number                   SET EX, GET
//! stored    the keys of these bindings, oldest first               XADD, XRANGE, UNLINK
//! members   upstreams that were changed at run time                HSET, HLEN, HSCAN
//! mark      changes with every change of members                   SET, GET
//! file:     the entries of each balancer's file                    SET EX, GET
//! ```
//!
//! Sessions are published in the stream only: no request waits for one, and a balancer that starts reads the
//! tail of the stream. Keys are for requests that only one upstream can answer.
//!
//! All keys share a hash tag, so that a cluster stores them on one node. There are three connections, one for
//! commands and one for the blocking reads of each kind of stream; after a loss all are opened again, with
//! pauses of up to half a second.

mod chain_publisher;
mod chain_subscriber;
mod clock;
mod connect;
mod failure;
mod file_entries;
pub(crate) mod inspect;
mod members;
mod publisher;
mod repair;
mod reply;
mod served;
pub mod stored_binding;
mod stream_sizes;
mod streams;
mod subscriber;
mod tail;
mod taken_events;
mod tls;
mod trimming;
mod work_slice;

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, watch};

use super::exchange::served::name_hash;
use super::exchange::{
    Binding, ChainRequests, ExchangeMemory, FingerprintFilter, Outbox, RecentMessages, SiblingRow,
    SiblingTable,
};
use super::members::Members;
use crate::config::types::{RedisOptions, RedisUrl};
use crate::observe::Observer;
use chain_publisher::ChainPublisher;
use chain_subscriber::ChainSubscriber;
use clock::RedisClock;
use connect::{COMMAND_TIMEOUT, RedisLink};
use failure::{FailureLog, RedisFailure, RedisFailureKind};
use file_entries::StoredEntries;
use members::ListAccess;
use publisher::Publisher;
use repair::AwaitedTurn;
use served::ServedUpstreams;
use stored_binding::StoredBinding;
use streams::ExchangeStreams;
use subscriber::Subscriber;

/// The shortest pause between two attempts to connect.
const MIN_CONNECT_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause between two attempts to connect.
const MAX_CONNECT_PAUSE: Duration = Duration::from_millis(500);

/// After a connection that lasted this long, the next attempt comes after the shortest pause.
const STABLE_CONNECTION_TIME: Duration = Duration::from_secs(1);

/// The time limit of the one lookup that a request waits for.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(50);

/// The longest time that a blocking read waits in Redis.
const READ_BLOCK_TIME: Duration = Duration::from_secs(1);

/// The interval between two checks for expired siblings.
const SIBLING_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The time limit of the last message.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(200);

/// The settings of the exchange: the Redis, and the name of this balancer.
#[derive(Clone, Debug)]
pub struct ExchangeSettings {
    pub url: RedisUrl,
    pub options: RedisOptions,
    /// The time to live of bindings that are stored by key.
    pub bindings: Duration,
    /// The name and the address of this balancer, for display.
    pub name: String,
    pub address: String,
    /// How this balancer cuts and hashes prompts: see `exchange::fingerprint`.
    pub fingerprint: u64,
    /// The name of this balancer that it has after a restart too, if there is one.
    pub identity: Option<String>,
}

/// The names of the keys in Redis.
#[derive(Clone, Debug)]
struct RedisKeys {
    members: String,
    mark: String,
    session: String,
    response: String,
    /// The list of the bindings' keys.
    stored: String,
    /// Exists while a balancer repairs keys.
    repair: String,
    /// The entries of this balancer's file; `None`: a restarted process would not find them.
    file: Option<String>,
}

/// What this balancer has published and received, beyond the present connection.
struct ExchangeProgress {
    publisher: Publisher,
    chain_publisher: ChainPublisher,
    subscriber: Subscriber,
    chain_subscriber: ChainSubscriber,
    stored_entries: StoredEntries,
    /// The turn of another balancer to repair keys.
    awaited_turn: Option<AwaitedTurn>,
    /// The latest connection has failed for a key that is to be repaired.
    has_unusable_key: bool,
}

/// The exchange with siblings over Redis.
pub struct SiblingExchange {
    id: u64,
    settings: ExchangeSettings,
    keys: RedisKeys,
    streams: ExchangeStreams,
    clock: Mutex<RedisClock>,
    memory: Arc<dyn ExchangeMemory>,
    outbox: Arc<Outbox>,
    /// The events for the urgent stream.
    urgent_events: Outbox,
    /// Chains wait to be published.
    chains_waiting: Notify,
    chain_requests: Mutex<ChainRequests>,
    /// When this balancer last made room in Redis.
    relieved_at: Mutex<Option<Instant>>,
    observer: Observer,
    siblings: Mutex<SiblingTable>,
    fingerprints: Mutex<FingerprintFilter>,
    /// The messages of chains that were applied.
    chain_messages: Mutex<RecentMessages>,
    members: Arc<Members>,
    served: Mutex<ServedUpstreams>,
    list_access: Mutex<ListAccess>,
    /// A sibling has changed the list of members.
    members_dirty: AtomicBool,
    failures: FailureLog,
    /// The present connection has caught up with the stream.
    receiving: AtomicBool,
    /// The connection for commands, while there is one.
    link: ArcSwapOption<RedisLink>,
    /// The first attempt to catch up with the stream has ended, with or without success.
    caught_up: watch::Sender<bool>,
}

// === impl RedisKeys ===

impl RedisKeys {
    fn new(prefix: &str, identity: Option<&str>) -> Self {
        let key = |name: &str| Self::key(prefix, name);
        RedisKeys {
            members: key("members"),
            mark: key("mark"),
            session: key("s:"),
            response: key("r:"),
            stored: key("stored"),
            repair: key("repair"),
            file: identity.map(|identity| key(&format!("file:{identity}"))),
        }
    }

    fn key(prefix: &str, name: &str) -> String {
        format!("{prefix}{{lb}}:{name}")
    }

    fn is_binding(&self, key: &[u8]) -> bool {
        [&self.session, &self.response].into_iter().any(|start| key.starts_with(start.as_bytes()))
    }

    fn binding(&self, kind: Binding, key: &str) -> String {
        let start = match kind {
            Binding::Session => &self.session,
            Binding::Response => &self.response,
        };
        format!("{start}{key}")
    }
}

// === impl SiblingExchange: for requests and the admin API ===

impl SiblingExchange {
    /// Builds the exchange; `outbox` receives the events of requests.
    pub fn new(
        settings: ExchangeSettings,
        memory: Arc<dyn ExchangeMemory>,
        outbox: Arc<Outbox>,
        observer: Observer,
    ) -> Arc<Self> {
        let id = RandomState::new().hash_one(0u64);
        let prefix = &settings.options.prefix;
        Arc::new(SiblingExchange {
            id,
            keys: RedisKeys::new(prefix, settings.identity.as_deref()),
            streams: ExchangeStreams::new(&settings.options, |name| RedisKeys::key(prefix, name)),
            clock: Mutex::default(),
            memory,
            outbox,
            urgent_events: Outbox::default(),
            chains_waiting: Notify::new(),
            chain_requests: Mutex::default(),
            relieved_at: Mutex::default(),
            siblings: Mutex::new(SiblingTable::new(id, settings.options.gauge_ttl)),
            fingerprints: Mutex::new(FingerprintFilter::new(settings.fingerprint)),
            chain_messages: Mutex::default(),
            members: Arc::default(),
            served: Mutex::default(),
            list_access: Mutex::default(),
            members_dirty: AtomicBool::new(false),
            failures: FailureLog::new(observer.clone()),
            receiving: AtomicBool::new(false),
            link: ArcSwapOption::empty(),
            caught_up: watch::Sender::new(false),
            observer,
            settings,
        })
    }

    /// Reads the binding of a session or a response that any balancer has stored; waits at most 50 ms.
    pub async fn lookup(&self, kind: Binding, key: &str) -> Option<StoredBinding> {
        let mut link = RedisLink::clone(&*self.link.load_full()?);
        let found = link.call(redis::cmd("GET").arg(self.keys.binding(kind, key)), LOOKUP_TIMEOUT).await;
        // The task detects and reports a lost connection.
        found
            .map_err(|_| self.observer.lookup_failed())
            .ok()
            .as_ref()
            .and_then(reply::text)
            .map(StoredBinding::read)
    }

    /// Returns the records of all upstreams that any balancer has changed at run time.
    pub fn members(&self) -> HashMap<String, String> {
        self.members.all()
    }

    /// Returns the list of these records.
    pub fn member_list(&self) -> Arc<Members> {
        self.members.clone()
    }

    /// Whether changes of upstreams at run time reach the siblings.
    pub fn shares_members(&self) -> bool {
        self.works() && self.list_access().is_granted()
    }

    fn list_access(&self) -> MutexGuard<'_, ListAccess> {
        self.list_access.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a sibling serves an upstream of this name.
    pub fn sibling_serves(&self, name: &str) -> bool {
        self.served().is_served(name_hash(name))
    }

    /// Whether a sibling shares an upstream with this balancer; `None` while that is unknown.
    pub fn shares_upstreams(&self, balancer: u64) -> Option<bool> {
        self.served().shares(balancer)
    }

    fn served(&self) -> MutexGuard<'_, ServedUpstreams> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the siblings, for display.
    pub fn rows(&self) -> Vec<SiblingRow> {
        self.siblings().rows(now())
    }

    /// Returns the random id of this balancer's process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the URL of Redis without the password.
    pub fn place(&self) -> String {
        self.settings.url.to_string()
    }

    /// Whether Redis has accepted the latest message.
    pub fn works(&self) -> bool {
        self.link.load().is_some() && !self.failures.is_failing()
    }

    /// Waits for at most `limit` until the tail of the stream was applied, or the first attempt to read it
    /// failed.
    pub async fn wait_caught_up(&self, limit: Duration) {
        let mut caught_up = self.caught_up.subscribe();
        // After the limit the balancer starts with the messages that it has received so far.
        drop(tokio::time::timeout(limit, caught_up.wait_for(|caught_up| *caught_up)).await);
    }

    fn siblings(&self) -> MutexGuard<'_, SiblingTable> {
        self.siblings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clock(&self) -> MutexGuard<'_, RedisClock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn chain_requests(&self) -> MutexGuard<'_, ChainRequests> {
        self.chain_requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn relieved_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.relieved_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl SiblingExchange: the task ===

impl SiblingExchange {
    /// Exchanges messages until `stop`, then publishes the last message.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut progress = ExchangeProgress {
            publisher: Publisher::new(),
            chain_publisher: ChainPublisher::default(),
            subscriber: Subscriber::default(),
            chain_subscriber: ChainSubscriber::default(),
            stored_entries: StoredEntries::default(),
            awaited_turn: None,
            has_unusable_key: false,
        };
        tokio::select! {
            () = self.connect_forever(&mut progress) => {}
            () = self.expire_siblings_forever() => {}
            _ = stop.wait_for(|stopping| *stopping) => {}
        }
        if let Some(link) = self.link.swap(None) {
            let mut link = RedisLink::clone(&*link);
            let last = self.publish_shutdown(&mut progress.publisher, &mut link);
            // Without the last message siblings expire this balancer after `gauge_ttl`.
            drop(tokio::time::timeout(SHUTDOWN_TIMEOUT, last).await);
        }
    }

    /// Runs one connection after another.
    async fn connect_forever(&self, progress: &mut ExchangeProgress) {
        let mut pause = MIN_CONNECT_PAUSE;
        loop {
            let start = now();
            let Err(failure) = self.run_connection(progress).await;
            self.link.store(None);
            self.caught_up.send_replace(true);
            self.failures.report(&failure, now());
            progress.has_unusable_key = failure.kind == RedisFailureKind::UnusableKey;
            if now().saturating_duration_since(start) >= STABLE_CONNECTION_TIME {
                pause = MIN_CONNECT_PAUSE;
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(MAX_CONNECT_PAUSE);
        }
    }

    /// Connects, catches up, then publishes and subscribes until a failure.
    async fn run_connection(&self, progress: &mut ExchangeProgress) -> Result<Infallible, RedisFailure> {
        let ExchangeProgress { publisher, chain_publisher, subscriber, chain_subscriber, .. } = progress;
        let ExchangeSettings { url, options, .. } = &self.settings;
        let read_time = READ_BLOCK_TIME + COMMAND_TIMEOUT;
        let (mut commands, mut reads, mut chain_reads) = tokio::try_join!(
            RedisLink::connect(url, options, COMMAND_TIMEOUT),
            RedisLink::connect(url, options, read_time),
            RedisLink::connect(url, options, read_time)
        )?;
        if std::mem::take(&mut progress.has_unusable_key) {
            self.repair_keys(&mut progress.awaited_turn, &mut commands).await?;
        }
        self.link.store(Some(Arc::new(commands.clone())));
        let (mut chain_commands, mut clock_reads) = (commands.clone(), commands.clone());
        let (mut trims, mut entry_writes) = (commands.clone(), commands.clone());
        publisher.republish_all();
        self.served().republish();
        self.receiving.store(false, Relaxed);
        match self.sync_members(publisher, &mut commands).await {
            // Read and compared later.
            Err(failure) if failure.is_full() => {}
            synced => synced?,
        }
        self.compare_entries(&mut progress.stored_entries, &mut commands).await?;
        self.read_clock(&mut clock_reads).await?;
        let receive = async {
            self.catch_up(subscriber, &mut reads).await?;
            self.receiving.store(true, Relaxed);
            let chains = async {
                self.catch_up_chains(chain_subscriber, &mut chain_reads).await?;
                self.caught_up.send_replace(true);
                self.subscribe_chains(chain_subscriber, &mut chain_reads).await
            };
            tokio::try_join!(self.subscribe(subscriber, &mut reads), chains)
        };
        let (never, ..) = tokio::try_join!(
            self.publish_forever(publisher, &mut commands),
            self.publish_chains_forever(chain_publisher, &mut chain_commands),
            receive,
            self.read_clock_forever(&mut clock_reads),
            self.trim_forever(&mut trims),
            self.store_entries_forever(&mut progress.stored_entries, &mut entry_writes)
        )?;
        Ok(never)
    }

    /// Removes expired siblings, also while Redis is unreachable.
    async fn expire_siblings_forever(&self) {
        loop {
            tokio::time::sleep(SIBLING_CHECK_INTERVAL).await;
            self.apply_sibling_loads();
        }
    }

    /// Sets the siblings' load in the memory.
    fn apply_sibling_loads(&self) {
        let now = now();
        let mut siblings = self.siblings();
        siblings.expire(now);
        let age = siblings.age(now).as_secs_f64();
        self.observer.siblings(siblings.len(), age);
        self.memory.siblings(&siblings.take_changes(), age);
        // Without Redis no sibling receives what this balancer finds, and nothing comes from them.
        let ids = if self.works() && self.receiving.load(Relaxed) { siblings.ids() } else { Vec::new() };
        drop(siblings);
        self.memory.balancers(self.id, &ids);
    }

    /// Returns the upstreams to publish with a complete message, and reports siblings of another fleet.
    fn served_upstreams(&self) -> Vec<u32> {
        let mut own = HashSet::new();
        self.memory.gauges(&mut |name, _| {
            own.insert(name_hash(name));
        });
        let now = now();
        let siblings = self.siblings();
        let mut served = self.served();
        let foreign = served.check(|balancer| siblings.contains(balancer), now);
        if let Some(foreign) = foreign {
            let name = siblings.name(foreign);
            self.observer.foreign_sibling(&name, &self.settings.options.prefix);
        }
        served.publish(own, now)
    }

    /// Sets the list of members in the memory.
    fn apply_members(&self) {
        self.memory.members(&self.members.all());
    }

    fn members_changed(&self) -> bool {
        self.members_dirty.swap(false, Relaxed)
    }
}

/// The runtime's clock, so that tests can move it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
