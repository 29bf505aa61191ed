//! Balancers that exist on the stream only: they publish what a balancer under load publishes, in the
//! product's own encoding, and read nothing.

use std::borrow::Cow;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at};
use vllm_lb::prompt::canon::FORM_VERSION;
use vllm_lb::prompt::chain::BlockLayout;
use vllm_lb::prompt::chain::thinning::{last_stored, stored_count, stored_depth};
use vllm_lb::state::exchange::served::name_hash;
use vllm_lb::state::exchange::{
    BalancerInfo, Binding, BindingUpdate, ChainUpdate, GaugeUpdate, Message, SiblingLoad, fingerprint,
};

/// What balancers do by default: a message every 20 ms, all gauges every second, 20,000 entries.
pub const INTERVAL: Duration = Duration::from_millis(20);
const TICKS_A_SECOND: u64 = 50;
const STREAM_LENGTH: u64 = 20_000;

/// The streams of a fleet with the default prefix.
const STREAM: &str = "vllm-lb:{lb}:stream";
const CHAIN_STREAM: &str = "vllm-lb:{lb}:chains";

/// Ticks between two lists of the upstreams that a balancer serves.
const SERVED_TICKS: u64 = 250;

/// New blocks of each request.
const NEW_BLOCKS: u64 = 16;

/// Tokens of a block.
const BLOCK_TOKENS: u64 = 128;

/// How long a request prefills, and how long it lasts, in ticks.
const PREFILL_TICKS: u64 = 10;
const REQUEST_TICKS: u64 = 200;

/// One request of so many has a session that is new, or moves.
const REQUESTS_A_BINDING: u64 = 8;

/// Connections that the siblings share.
const CONNECTIONS: usize = 4;

/// The load of all siblings.
#[derive(Clone, Copy, Debug)]
pub struct SiblingTraffic {
    pub siblings: u64,
    /// Requests a second of each.
    pub rate: u64,
    /// The blocks of a conversation when it ends; it began with none.
    pub last_blocks: u64,
    /// Conversations of each sibling that go on in turn.
    pub conversations: u64,
}

/// What the siblings have published.
#[derive(Debug, Default)]
pub struct Published {
    pub requests: AtomicU64,
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
    pub stop: AtomicBool,
}

/// The chain of a prompt at one upstream, for `publish`.
pub struct PublishedChain {
    pub upstream: usize,
    pub parent: Option<u64>,
    /// The blocks up to and including the parent.
    pub depth: u64,
    pub hashes: Vec<u64>,
}

/// What one sibling publishes at one tick.
#[derive(Default)]
pub struct SiblingNews {
    /// All gauges are in `gauges`.
    pub whole: bool,
    /// The upstreams that it serves are named.
    pub served: bool,
    pub gauges: Vec<(usize, SiblingLoad)>,
    pub chains: Vec<PublishedChain>,
    /// Sessions, and the upstream of each.
    pub sessions: Vec<(String, usize)>,
}

/// The sender of messages.
pub struct SiblingSender {
    pub balancer: u64,
    pub sequence: u64,
    pub name: String,
}

struct Conversation {
    number: u64,
    upstream: usize,
    blocks: u64,
}

/// A request in flight.
struct Flight {
    started: u64,
    upstream: usize,
    context: u64,
}

struct FakeSibling {
    sender: SiblingSender,
    traffic: SiblingTraffic,
    conversations: Vec<Conversation>,
    next: usize,
    begun: u64,
    tick: u64,
    loads: Vec<SiblingLoad>,
    prefilling: VecDeque<Flight>,
    running: VecDeque<Flight>,
    changed: BTreeSet<usize>,
    asked: u64,
}

/// Encodes and publishes the messages of one tick, as a balancer does: what is urgent, and chains on a
/// stream of their own. Returns their number and their bytes. What the exchange sends, and to which stream,
/// is here only.
pub async fn publish(
    link: &mut MultiplexedConnection,
    sender: &mut SiblingSender,
    news: &SiblingNews,
    upstreams: &[String],
) -> redis::RedisResult<(u64, u64)> {
    sender.sequence += 1;
    let mut message = Message::new(sender.balancer, sender.sequence);
    message.who = news.whole.then_some(BalancerInfo { name: &sender.name, address: "127.0.0.1:8000" });
    let rows = news.gauges.iter().map(|(upstream, load)| (upstreams[*upstream].as_str(), *load)).collect();
    message.gauges = Some(GaugeUpdate { whole: news.whole, rows });
    if news.served {
        message.served = upstreams.iter().map(|name| name_hash(name)).collect();
    }
    message.bound.extend(news.sessions.iter().map(|(key, upstream)| BindingUpdate {
        kind: Binding::Session,
        key,
        upstream: &upstreams[*upstream],
        number: 2000,
    }));
    let urgent = message.encode();
    let mut adds = redis::pipe();
    let mut add = |key: &str, bytes: &[u8]| {
        adds.cmd("XADD").arg(key).arg("MAXLEN").arg("~").arg(STREAM_LENGTH).arg("*").arg("d").arg(bytes);
    };
    add(STREAM, &urgent);
    let (mut messages, mut bytes) = (1, urgent.len());
    if !news.chains.is_empty() {
        sender.sequence += 1;
        let mut message = Message::new(sender.balancer, sender.sequence);
        message.fingerprint = Some(fingerprint(FORM_VERSION, BlockLayout::default().bytes));
        message.chains.extend(news.chains.iter().map(|chain| ChainUpdate {
            upstream: &upstreams[chain.upstream],
            parent: chain.parent,
            depth: chain.depth,
            hashes: Cow::Borrowed(&chain.hashes),
            end: None,
        }));
        let chains = message.encode();
        add(CHAIN_STREAM, &chains);
        (messages, bytes) = (2, bytes + chains.len());
    }
    adds.exec_async(link).await?;
    Ok((messages, bytes as u64))
}

/// Publishes until `published.stop`, each sibling at its own moments.
pub async fn run(
    url: String,
    traffic: SiblingTraffic,
    upstreams: Arc<Vec<String>>,
    published: Arc<Published>,
) {
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    for group in 0..CONNECTIONS {
        let members = (0..traffic.siblings).filter(|number| *number as usize % CONNECTIONS == group);
        let members: Vec<FakeSibling> =
            members.map(|number| FakeSibling::new(number, traffic, upstreams.len())).collect();
        if members.is_empty() {
            continue;
        }
        let link = connect(&url).await;
        let offset = INTERVAL * group as u32 / CONNECTIONS as u32 / members.len() as u32;
        tasks.spawn(run_group(link, members, start + offset, upstreams.clone(), published.clone()));
    }
    tasks.join_all().await;
}

async fn run_group(
    mut link: MultiplexedConnection,
    mut members: Vec<FakeSibling>,
    start: Instant,
    upstreams: Arc<Vec<String>>,
    published: Arc<Published>,
) {
    let mut tick = interval_at(start, INTERVAL / members.len() as u32);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut turn = 0;
    while !published.stop.load(Relaxed) {
        tick.tick().await;
        let count = members.len();
        let sibling = &mut members[turn % count];
        turn += 1;
        let news = sibling.advance();
        let published_now = publish(&mut link, &mut sibling.sender, &news, &upstreams).await;
        let (messages, bytes) = published_now.expect("redis accepts it");
        published.requests.fetch_add(news.chains.len() as u64, Relaxed);
        published.messages.fetch_add(messages, Relaxed);
        published.bytes.fetch_add(bytes, Relaxed);
    }
}

pub async fn connect(url: &str) -> MultiplexedConnection {
    let client = redis::Client::open(url).expect("the URL is valid");
    // A loaded machine is slower than the client expects.
    let patient = AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(20)));
    client.get_multiplexed_async_connection_with_config(&patient).await.expect("redis answers")
}

/// Reads both streams as a balancer does, and drops it: Redis has the work of one balancer more.
pub async fn read(url: String, published: Arc<Published>) {
    let mut link = connect(&url).await;
    let (mut last, mut last_chain) = ("$".to_string(), "$".to_string());
    let mut tick = interval(Duration::from_millis(4));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !published.stop.load(Relaxed) {
        tick.tick().await;
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(100).arg("BLOCK").arg(100).arg("STREAMS");
        read.arg(STREAM).arg(CHAIN_STREAM).arg(&last).arg(&last_chain);
        // Redis ends before this process.
        let Ok(reply) = read.query_async::<redis::Value>(&mut link).await else { break };
        last = newest_id(&reply, STREAM).unwrap_or(last);
        last_chain = newest_id(&reply, CHAIN_STREAM).unwrap_or(last_chain);
    }
}

/// The id of the last entry of a stream in an answer to `XREAD`.
fn newest_id(reply: &redis::Value, key: &str) -> Option<String> {
    let list = |value: &redis::Value| match value {
        redis::Value::Array(list) => list.clone(),
        _ => Vec::new(),
    };
    let text = |value: &redis::Value| match value {
        redis::Value::BulkString(text) => String::from_utf8(text.clone()).ok(),
        _ => None,
    };
    let streams = list(reply);
    let is_wanted = |stream: &Vec<redis::Value>| stream.first().and_then(text).as_deref() == Some(key);
    let stream = streams.iter().map(list).find(is_wanted)?;
    let entry = list(list(stream.get(1)?).last()?);
    text(entry.first()?)
}

/// Scatters numbers over 64 bits, as hashes are.
fn scatter(number: u64) -> u64 {
    let mixed = (number ^ (number >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 27)
}

// === impl SiblingSender ===

impl SiblingSender {
    pub fn new(number: u64) -> Self {
        SiblingSender { balancer: scatter(number + 1), sequence: 0, name: format!("sibling-{number}") }
    }
}

// === impl Conversation ===

impl Conversation {
    fn hash(&self, block: u64) -> u64 {
        scatter(self.number << 16 | block)
    }

    /// The stored blocks from one to another; the stored hash before them is the parent.
    fn chain(&self, from: u64, to: u64) -> PublishedChain {
        let (from, to) = (from as usize, to as usize);
        let (depth, numbers) = (last_stored(from), stored_count(from) + 1..=stored_count(to));
        PublishedChain {
            upstream: self.upstream,
            parent: (depth > 0).then(|| self.hash(depth as u64 - 1)),
            depth: depth as u64,
            hashes: numbers.map(|number| self.hash(stored_depth(number) as u64 - 1)).collect(),
        }
    }
}

// === impl FakeSibling ===

impl FakeSibling {
    fn new(number: u64, traffic: SiblingTraffic, upstreams: usize) -> Self {
        let mut sibling = FakeSibling {
            sender: SiblingSender::new(number),
            traffic,
            conversations: Vec::new(),
            next: 0,
            begun: (number + 1) << 24,
            tick: number,
            loads: vec![SiblingLoad::default(); upstreams],
            prefilling: VecDeque::new(),
            running: VecDeque::new(),
            changed: BTreeSet::new(),
            asked: 0,
        };
        let turns = traffic.last_blocks / NEW_BLOCKS;
        for turn in 0..traffic.conversations {
            let mut conversation = sibling.open();
            // All depths are there from the start; the first message of each has its whole chain.
            conversation.blocks = turn % turns * NEW_BLOCKS;
            sibling.conversations.push(conversation);
        }
        sibling
    }

    fn open(&mut self) -> Conversation {
        self.begun += 1;
        let upstream = scatter(self.begun) as usize % self.loads.len();
        Conversation { number: self.begun, upstream, blocks: 0 }
    }

    /// One tick: requests begin, prefill and end.
    fn advance(&mut self) -> SiblingNews {
        self.tick += 1;
        let mut news = SiblingNews {
            whole: self.tick.is_multiple_of(TICKS_A_SECOND),
            served: self.tick.is_multiple_of(SERVED_TICKS),
            ..SiblingNews::default()
        };
        self.end_requests();
        let due = self.tick * self.traffic.rate / TICKS_A_SECOND
            - (self.tick - 1) * self.traffic.rate / TICKS_A_SECOND;
        for _ in 0..due {
            self.request(&mut news);
        }
        let all = self.loads.iter().enumerate().filter(|(_, load)| **load != SiblingLoad::default());
        news.gauges = match news.whole {
            true => all.map(|(upstream, load)| (upstream, *load)).collect(),
            false => self.changed.iter().map(|upstream| (*upstream, self.loads[*upstream])).collect(),
        };
        self.changed.clear();
        news
    }

    fn request(&mut self, news: &mut SiblingNews) {
        let at = self.next % self.conversations.len();
        self.next += 1;
        let is_first_round = self.next <= self.conversations.len();
        if self.conversations[at].blocks >= self.traffic.last_blocks {
            self.conversations[at] = self.open();
        }
        let conversation = &mut self.conversations[at];
        let known = if is_first_round { 0 } else { conversation.blocks };
        conversation.blocks += NEW_BLOCKS;
        let (upstream, blocks) = (conversation.upstream, conversation.blocks);
        news.chains.push(conversation.chain(known, blocks));
        self.asked += 1;
        if self.asked.is_multiple_of(REQUESTS_A_BINDING) {
            news.sessions.push((format!("{:016x}", scatter(conversation.number)), upstream));
        }
        let context = blocks * BLOCK_TOKENS;
        let load = &mut self.loads[upstream];
        (load.active, load.context) = (load.active + 1, load.context + context);
        load.backlog += NEW_BLOCKS * BLOCK_TOKENS;
        self.prefilling.push_back(Flight { started: self.tick, upstream, context });
        self.changed.insert(upstream);
    }

    fn end_requests(&mut self) {
        let now = self.tick;
        while self.prefilling.front().is_some_and(|flight| flight.started + PREFILL_TICKS <= now) {
            let flight = self.prefilling.pop_front().expect("there is one");
            self.loads[flight.upstream].backlog -= NEW_BLOCKS * BLOCK_TOKENS;
            self.changed.insert(flight.upstream);
            self.running.push_back(flight);
        }
        while self.running.front().is_some_and(|flight| flight.started + REQUEST_TICKS <= now) {
            let flight = self.running.pop_front().expect("there is one");
            let load = &mut self.loads[flight.upstream];
            (load.active, load.context) = (load.active - 1, load.context - flight.context);
            self.changed.insert(flight.upstream);
        }
    }
}
