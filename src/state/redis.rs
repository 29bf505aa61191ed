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
//! Sessions are said in the stream and have no key: nobody may wait for one, and whoever starts reads the
//! stream's tail. Keys are for what only one upstream can answer.
//!
//! All keys have one hash tag, so that a cluster keeps them together. There are two connections, one to talk
//! and one that waits for news; both are made anew together after a loss, with pauses of up to half a second.

mod connect;
mod hear;
pub mod kept;
mod members;
mod reply;
mod speak;
mod trouble;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use super::exchange::{Binding, Memory, Outbox, Row, Siblings};
use crate::config::types::{RedisOptions, RedisUrl};
use crate::observe;
use connect::{Link, PATIENCE};
use hear::Ear;
use kept::Kept;
use members::Members;
use speak::Mouth;
use trouble::{Trouble, Troubles};

/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A connection that has lasted so long was a good one: the next attempt comes at once.
const LASTING: Duration = Duration::from_secs(1);

/// For the one answer that a request waits for.
const LOOKUP: Duration = Duration::from_millis(50);

/// How long the news to wait for may be kept back by Redis.
const BLOCK: Duration = Duration::from_secs(1);

/// Between two looks at who is still there.
const LOOK: Duration = Duration::from_millis(100);

/// For the last word.
const FAREWELL: Duration = Duration::from_millis(200);

/// Where and how to meet, and as who.
#[derive(Clone, Debug)]
pub struct Settings {
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
struct Keys {
    stream: String,
    members: String,
    mark: String,
    session: String,
    response: String,
}

pub struct Exchange {
    id: u64,
    settings: Settings,
    keys: Keys,
    memory: Arc<dyn Memory>,
    outbox: Arc<Outbox>,
    siblings: Mutex<Siblings>,
    members: Members,
    /// A sibling has changed the list of members.
    members_news: AtomicBool,
    troubles: Troubles,
    /// The present connection has brought news, or could have.
    hearing: AtomicBool,
    /// To talk over, while there is a connection.
    link: ArcSwapOption<Link>,
    /// The first attempt to learn what is where is over, well or badly.
    begun: watch::Sender<bool>,
}

// === impl Keys ===

impl Keys {
    fn new(prefix: &str) -> Self {
        let key = |name: &str| format!("{prefix}{{lb}}:{name}");
        Keys {
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

impl Exchange {
    /// `outbox` is where requests put what they have to say.
    pub fn new(settings: Settings, memory: Arc<dyn Memory>, outbox: Arc<Outbox>) -> Arc<Self> {
        let id = RandomState::new().hash_one(0u64);
        Arc::new(Exchange {
            id,
            keys: Keys::new(&settings.options.prefix),
            memory,
            outbox,
            siblings: Mutex::new(Siblings::new(id, settings.options.gauge_ttl)),
            members: Members::default(),
            members_news: AtomicBool::new(false),
            troubles: Troubles::default(),
            hearing: AtomicBool::new(false),
            link: ArcSwapOption::empty(),
            begun: watch::Sender::new(false),
            settings,
        })
    }

    /// Where a session or a response is, as any balancer has said; waits for no longer than 50 ms.
    pub async fn lookup(&self, kind: Binding, key: &str) -> Option<Kept> {
        let mut link = Link::clone(&*self.link.load_full()?);
        let found = link.ask(redis::cmd("GET").arg(self.keys.binding(kind, key)), LOOKUP).await;
        // A connection that is lost is noticed, and told, by the task.
        found.map_err(|_| observe::lookup_failed()).ok().as_ref().and_then(reply::text).map(Kept::read)
    }

    /// An upstream was changed here at run time; `text` is all there is to know of it.
    pub fn put_member(&self, name: &str, text: String) {
        self.members.put(name, text);
    }

    /// All that were changed at run time, by any balancer.
    pub fn members(&self) -> HashMap<String, String> {
        self.members.all()
    }

    /// Who else is there.
    pub fn rows(&self) -> Vec<Row> {
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
        // Whoever is late knows what it knows.
        drop(tokio::time::timeout(limit, begun.wait_for(|begun| *begun)).await);
    }

    fn siblings(&self) -> MutexGuard<'_, Siblings> {
        self.siblings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Exchange: the task ===

impl Exchange {
    /// Exchanges until `stop`, and says goodbye.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let (mut mouth, mut ear) = (Mouth::new(), Ear::default());
        tokio::select! {
            () = self.sessions(&mut mouth, &mut ear) => {}
            () = self.look_around() => {}
            _ = stop.wait_for(|stopping| *stopping) => {}
        }
        if let Some(link) = self.link.swap(None) {
            let mut link = Link::clone(&*link);
            // Without it the others notice a little later.
            drop(tokio::time::timeout(FAREWELL, self.leave(&mut mouth, &mut link)).await);
        }
    }

    /// One connection after another.
    async fn sessions(&self, mouth: &mut Mouth, ear: &mut Ear) {
        let mut pause = PAUSE;
        loop {
            let start = now();
            let Err(trouble) = self.session(mouth, ear).await;
            self.link.store(None);
            self.begun.send_replace(true);
            self.troubles.met(&trouble, now());
            if now().saturating_duration_since(start) >= LASTING {
                pause = PAUSE;
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    /// Talks and listens until something goes wrong.
    async fn session(&self, mouth: &mut Mouth, ear: &mut Ear) -> Result<std::convert::Infallible, Trouble> {
        let url = &self.settings.url;
        let (mut talk, mut listen) =
            tokio::try_join!(Link::connect(url, PATIENCE), Link::connect(url, BLOCK + PATIENCE))?;
        self.link.store(Some(Arc::new(talk.clone())));
        mouth.begin();
        self.hearing.store(false, Relaxed);
        match self.sync_members(mouth, &mut talk).await {
            Err(trouble) if !trouble.full => return Err(trouble),
            _ => {}
        }
        let hearing = async {
            self.catch_up(ear, &mut listen).await?;
            self.hearing.store(true, Relaxed);
            self.begun.send_replace(true);
            self.hear(ear, &mut listen).await
        };
        let (never, _) = tokio::try_join!(self.speak(mouth, &mut talk), hearing)?;
        Ok(never)
    }

    /// Forgets who is not heard any more, whether Redis is there or not.
    async fn look_around(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.publish();
        }
    }

    /// Tells memory what siblings have in flight.
    fn publish(&self) {
        let now = now();
        let mut siblings = self.siblings();
        siblings.expire(now);
        let age = siblings.age(now).as_secs_f64();
        observe::siblings(siblings.len(), age);
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
