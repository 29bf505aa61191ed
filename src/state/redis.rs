//! The exchange with siblings over one Redis stream, in one background task.
//!
//! Requests put what they have to say into a box and read local memory; the task says it, at most every
//! `interval`, and lays over what siblings say. The one thing that a request may wait for is `lookup`, and
//! not for long. Redis may be gone, slow, full or empty at any time: nothing here fails because of it.
//!
//! ```text
//! stream    one entry a message, about `stream_length` of them     XADD MAXLEN ~, XREAD BLOCK
//! s: and r: bindings that are to be found by key, with upstream, number  SET EX, GET
//! members   upstreams that were changed at run time                 HSET, HGETALL
//! mark      another after every change of members                   SET, GET
//! ```
//!
//! Sessions are published in the stream and have no key: no request may wait for one, and a balancer that
//! starts reads the stream's tail. Keys are for what only one upstream can answer.
//!
//! All keys have one hash tag, so that a cluster keeps them together. There are two connections, one to talk
//! and one that waits for news; both are made anew together after a loss, with pauses of up to half a second.

mod connect;
mod members;
mod publisher;
mod reply;
pub mod stored_binding;
mod subscriber;
mod trouble;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use super::exchange::{Binding, ExchangeMemory, Outbox, SiblingRow, SiblingTable};
use crate::config::types::{RedisOptions, RedisUrl};
use crate::observe::Observer;
use connect::{COMMAND_TIMEOUT, RedisLink};
use members::Members;
use publisher::Publisher;
use stored_binding::StoredBinding;
use subscriber::Subscriber;
use trouble::{Trouble, Troubles};

/// The shortest and the longest pause between two attempts to connect.
const MIN_CONNECT_PAUSE: Duration = Duration::from_millis(50);
const MAX_CONNECT_PAUSE: Duration = Duration::from_millis(500);

/// A connection that lasted this long was a good one: the next attempt comes at once.
const STABLE_CONNECTION_TIME: Duration = Duration::from_secs(1);

/// The time limit of the one lookup that a request waits for.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(50);

/// How long a blocking read may wait in Redis.
const READ_BLOCK_TIME: Duration = Duration::from_secs(1);

/// The interval between two checks for expired siblings.
const SIBLING_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The time limit of the last message.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(200);

/// The settings of the exchange: the Redis, and the name of this balancer.
#[derive(Clone, Debug)]
pub struct ExchangeSettings {
    pub url: RedisUrl,
    pub options: RedisOptions,
    /// How long bindings are kept for lookup.
    pub bindings: Duration,
    /// For people.
    pub name: String,
    pub address: String,
}

/// The names of our keys.
#[derive(Clone, Debug)]
struct RedisKeys {
    stream: String,
    members: String,
    mark: String,
    session: String,
    response: String,
}

pub struct SiblingExchange {
    id: u64,
    settings: ExchangeSettings,
    keys: RedisKeys,
    memory: Arc<dyn ExchangeMemory>,
    outbox: Arc<Outbox>,
    observer: Observer,
    siblings: Mutex<SiblingTable>,
    members: Members,
    /// A sibling has changed the list of members.
    members_news: AtomicBool,
    troubles: Troubles,
    /// The present connection has brought news, or could have.
    hearing: AtomicBool,
    /// To talk over, while there is a connection.
    link: ArcSwapOption<RedisLink>,
    /// The first attempt to learn what is where is over, well or badly.
    begun: watch::Sender<bool>,
}

// === impl Keys ===

impl RedisKeys {
    fn new(prefix: &str) -> Self {
        let key = |name: &str| format!("{prefix}{{lb}}:{name}");
        RedisKeys {
            stream: key("stream"),
            members: key("members"),
            mark: key("mark"),
            session: key("s:"),
            response: key("r:"),
        }
    }

    fn binding(&self, kind: Binding, key: &str) -> String {
        let start = match kind {
            Binding::Session => &self.session,
            Binding::Response => &self.response,
        };
        format!("{start}{key}")
    }
}

// === impl Exchange: for requests, and for the admin interface ===

impl SiblingExchange {
    /// `outbox` is where requests put what they have to say.
    pub fn new(
        settings: ExchangeSettings,
        memory: Arc<dyn ExchangeMemory>,
        outbox: Arc<Outbox>,
        observer: Observer,
    ) -> Arc<Self> {
        let id = RandomState::new().hash_one(0u64);
        Arc::new(SiblingExchange {
            id,
            keys: RedisKeys::new(&settings.options.prefix),
            memory,
            outbox,
            siblings: Mutex::new(SiblingTable::new(id, settings.options.gauge_ttl)),
            members: Members::default(),
            members_news: AtomicBool::new(false),
            troubles: Troubles::new(observer.clone()),
            hearing: AtomicBool::new(false),
            link: ArcSwapOption::empty(),
            begun: watch::Sender::new(false),
            observer,
            settings,
        })
    }

    /// Where a session or a response is, as any balancer has said; waits for no longer than 50 ms.
    pub async fn lookup(&self, kind: Binding, key: &str) -> Option<StoredBinding> {
        let mut link = RedisLink::clone(&*self.link.load_full()?);
        let found = link.call(redis::cmd("GET").arg(self.keys.binding(kind, key)), LOOKUP_TIMEOUT).await;
        // A connection that is lost is noticed, and told, by the task.
        found
            .map_err(|_| self.observer.lookup_failed())
            .ok()
            .as_ref()
            .and_then(reply::text)
            .map(StoredBinding::read)
    }

    /// An upstream was changed here at run time; `text` is all there is to know of it.
    pub fn put_member(&self, name: &str, text: String) {
        self.members.put(name, text);
    }

    /// All that were changed at run time, by any balancer.
    pub fn members(&self) -> HashMap<String, String> {
        self.members.all()
    }

    /// The siblings, for display.
    pub fn rows(&self) -> Vec<SiblingRow> {
        self.siblings().rows(now())
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where siblings meet, without the password.
    pub fn place(&self) -> String {
        self.settings.url.to_string()
    }

    /// Whether Redis took in what was said last.
    pub fn works(&self) -> bool {
        self.link.load().is_some() && !self.troubles.are_there()
    }

    /// Waits until what the stream holds is known, or cannot be, for so long at the most.
    pub async fn begun(&self, limit: Duration) {
        let mut begun = self.begun.subscribe();
        // When the limit is over, the balancer starts with what it has received so far.
        drop(tokio::time::timeout(limit, begun.wait_for(|begun| *begun)).await);
    }

    fn siblings(&self) -> MutexGuard<'_, SiblingTable> {
        self.siblings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Exchange: the task ===

impl SiblingExchange {
    /// Exchanges until `stop`, and says goodbye.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let (mut publisher, mut subscriber) = (Publisher::new(), Subscriber::default());
        tokio::select! {
            () = self.sessions(&mut publisher, &mut subscriber) => {}
            () = self.look_around() => {}
            _ = stop.wait_for(|stopping| *stopping) => {}
        }
        if let Some(link) = self.link.swap(None) {
            let mut link = RedisLink::clone(&*link);
            // Without it the others notice a little later.
            drop(tokio::time::timeout(LEAVE_TIMEOUT, self.leave(&mut publisher, &mut link)).await);
        }
    }

    /// One connection after another.
    async fn sessions(&self, publisher: &mut Publisher, subscriber: &mut Subscriber) {
        let mut pause = MIN_CONNECT_PAUSE;
        loop {
            let start = now();
            let Err(trouble) = self.session(publisher, subscriber).await;
            self.link.store(None);
            self.begun.send_replace(true);
            self.troubles.met(&trouble, now());
            if now().saturating_duration_since(start) >= STABLE_CONNECTION_TIME {
                pause = MIN_CONNECT_PAUSE;
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(MAX_CONNECT_PAUSE);
        }
    }

    /// Talks and listens until something goes wrong.
    async fn session(
        &self,
        publisher: &mut Publisher,
        subscriber: &mut Subscriber,
    ) -> Result<std::convert::Infallible, Trouble> {
        let url = &self.settings.url;
        let (mut talk, mut listen) = tokio::try_join!(
            RedisLink::connect(url, COMMAND_TIMEOUT),
            RedisLink::connect(url, READ_BLOCK_TIME + COMMAND_TIMEOUT)
        )?;
        self.link.store(Some(Arc::new(talk.clone())));
        publisher.begin();
        self.hearing.store(false, Relaxed);
        match self.sync_members(publisher, &mut talk).await {
            Err(trouble) if !trouble.full => return Err(trouble),
            _ => {}
        }
        let hearing = async {
            self.catch_up(subscriber, &mut listen).await?;
            self.hearing.store(true, Relaxed);
            self.begun.send_replace(true);
            self.subscribe(subscriber, &mut listen).await
        };
        let (never, _) = tokio::try_join!(self.publish_forever(publisher, &mut talk), hearing)?;
        Ok(never)
    }

    /// Removes expired siblings, whether Redis is reachable or not.
    async fn look_around(&self) {
        loop {
            tokio::time::sleep(SIBLING_CHECK_INTERVAL).await;
            self.apply_sibling_loads();
        }
    }

    /// Tells memory what siblings have in flight.
    fn apply_sibling_loads(&self) {
        let now = now();
        let mut siblings = self.siblings();
        siblings.expire(now);
        let age = siblings.age(now).as_secs_f64();
        self.observer.siblings(siblings.len(), age);
        self.memory.siblings(&siblings.sums(), age);
    }

    /// Tells memory what the list of members is.
    fn take_members(&self) {
        self.memory.members(&self.members.all());
    }

    fn members_changed(&self) -> bool {
        self.members_news.swap(false, Relaxed)
    }
}

/// The runtime's clock, so that tests can move it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
