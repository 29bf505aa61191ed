//! A balancer as its siblings see it: a memory without requests, and its exchange.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use vllm_lb::config::{redis, types::RedisOptions};
use vllm_lb::observe::Observer;
use vllm_lb::state::exchange::{
    Binding, BindingUpdate, ChainUpdate, ExchangeMemory, Outbox, OutboxEvent, SiblingLoad, TakeBack,
    fingerprint,
};
use vllm_lb::state::prefix_index::{ChainTail, Hits, Index, Slot};
use vllm_lb::state::redis::{ExchangeSettings, SiblingExchange};

use crate::common::eventually;

pub struct Board {
    pub memory: Arc<Mind>,
    pub exchange: Arc<SiblingExchange>,
    outbox: Arc<Outbox>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

pub struct Mind {
    index: Index,
    slots: Mutex<HashMap<String, Slot>>,
    gauges: Mutex<HashMap<String, SiblingLoad>>,
    others: Mutex<(HashMap<String, SiblingLoad>, f64)>,
    bound: Mutex<Vec<(String, String)>>,
    members: Mutex<HashMap<String, String>>,
    /// How long it takes to apply one binding or chain of a sibling.
    effort: Mutex<Duration>,
}

pub fn gauges(active: u64) -> SiblingLoad {
    SiblingLoad { active, backlog: 1000 * active, context: 2000 * active }
}

/// Quick enough for tests, slow enough for a busy machine.
pub fn options() -> RedisOptions {
    RedisOptions { gauge_ttl: Duration::from_millis(1500), ..RedisOptions::default() }
}

pub fn settings(url: &str, name: &str) -> ExchangeSettings {
    ExchangeSettings {
        url: redis::url(url).expect("tests write valid URLs"),
        options: options(),
        bindings: Duration::from_secs(60),
        name: name.into(),
        address: format!("{name}:8000"),
        fingerprint: fingerprint(1, 512),
        identity: None,
    }
}

// === impl Board ===

impl Board {
    pub fn start(url: &str, name: &str) -> Self {
        Self::with(settings(url, name))
    }

    pub fn with(settings: ExchangeSettings) -> Self {
        crate::common::logs::remember();
        let memory = Arc::new(Mind {
            index: Index::new(1 << 20, 1),
            slots: Mutex::default(),
            gauges: Mutex::default(),
            others: Mutex::default(),
            bound: Mutex::default(),
            members: Mutex::default(),
            effort: Mutex::default(),
        });
        let outbox = Arc::<Outbox>::default();
        let exchange = SiblingExchange::new(settings, memory.clone(), outbox.clone(), Observer::default());
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(exchange.clone().run(stopped));
        Board { memory, exchange, outbox, stop, task }
    }

    /// Starts, and waits until it has heard what there is.
    pub async fn begun(url: &str, name: &str) -> Self {
        let board = Self::start(url, name);
        board.exchange.wait_caught_up(crate::common::PATIENCE).await;
        board
    }

    /// Requests in flight on an upstream, from now on.
    pub fn set(&self, upstream: &str, active: u64) {
        self.memory.gauges.lock().expect("no panic").insert(upstream.into(), gauges(active));
    }

    /// A request with this chain goes to the upstream.
    pub fn send(&self, upstream: &str, chain: &[u64]) {
        let receipt = self.memory.index.learn(chain, None, self.memory.slot(upstream));
        let ChainTail { parent, depth, hashes, end } = receipt.new_part(chain);
        let event = OutboxEvent::chain(upstream, parent, depth, &hashes, end);
        self.outbox.put(event.with_opening(chain[0]));
    }

    /// A request with this chain, which was new, did not reach the upstream.
    pub fn take_back(&self, upstream: &str, chain: &[u64]) {
        self.memory.index.release(chain, None, self.memory.slot(upstream));
        self.outbox.put(OutboxEvent::take_back(upstream, None, chain, None));
    }

    /// A session, or a response, is at this upstream.
    pub fn bind(&self, kind: Binding, key: &str, upstream: &str) {
        let (key, upstream) = (key.into(), upstream.into());
        self.outbox.put(OutboxEvent::Bound { kind, key, upstream, number: 7, keep: true });
    }

    /// An upstream was changed at run time.
    pub fn put_member(&self, name: &str, text: &str) {
        assert!(self.exchange.member_list().put(name, text.into()), "there is room");
    }

    /// Blocks of the chain that an upstream is believed to hold.
    pub fn held(&self, upstream: &str, chain: &[u64]) -> usize {
        let mut hits = Hits::default();
        self.memory.index.lookup(chain, &mut hits);
        hits.held(self.memory.slot(upstream))
    }

    /// In flight through all others.
    pub fn others(&self, upstream: &str) -> SiblingLoad {
        self.memory.others.lock().expect("no panic").0.get(upstream).copied().unwrap_or_default()
    }

    /// Makes each binding and chain of siblings take so long, without giving way to other tasks.
    pub fn slow_down(&self, effort: Duration) {
        *self.memory.effort.lock().expect("no panic") = effort;
    }

    /// The age of the oldest sibling's report, in seconds.
    pub fn age(&self) -> f64 {
        self.memory.others.lock().expect("no panic").1
    }

    pub async fn until_others(&self, upstream: &str, active: u64) {
        let what = format!("siblings have {active} on {upstream}");
        eventually(&what, async || (self.others(upstream) == gauges(active)).then_some(())).await;
    }

    pub async fn until_held(&self, upstream: &str, chain: &[u64], blocks: usize) {
        let what = format!("{upstream} holds {blocks} blocks");
        eventually(&what, async || (self.held(upstream, chain) == blocks).then_some(())).await;
    }

    pub async fn until_siblings(&self, count: usize) {
        let what = format!("there are {count} siblings");
        eventually(&what, async || (self.exchange.rows().len() == count).then_some(())).await;
    }

    pub async fn until_member(&self, name: &str, text: Option<&str>) {
        let member = || self.memory.members.lock().expect("no panic").get(name).cloned();
        let what = format!("{name} is {text:?}");
        eventually(&what, async || (member().as_deref() == text).then_some(())).await;
    }

    pub fn bound(&self) -> Vec<(String, String)> {
        self.memory.bound.lock().expect("no panic").clone()
    }

    /// Ends as a process that is asked to.
    pub async fn leave(self) {
        self.stop.send_replace(true);
        self.task.await.expect("the task does not panic");
    }

    /// Ends as a process that is killed.
    pub async fn crash(self) {
        self.task.abort();
        drop(self.task.await);
    }
}

// === impl Memory for Mind ===

impl Mind {
    fn work(&self) {
        let (effort, start) = (*self.effort.lock().expect("no panic"), Instant::now());
        while let Some(left) = effort.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
            std::thread::park_timeout(left);
        }
    }

    fn slot(&self, upstream: &str) -> Slot {
        let mut slots = self.slots.lock().expect("no panic");
        *slots.entry(upstream.into()).or_insert_with(|| self.index.enter().expect("there is a slot"))
    }
}

impl ExchangeMemory for Mind {
    fn gauges(&self, tell: &mut dyn FnMut(&str, SiblingLoad)) {
        self.gauges.lock().expect("no panic").iter().for_each(|(name, gauges)| tell(name, *gauges));
    }

    fn siblings(&self, changed: &[(Arc<str>, SiblingLoad)], age: f64) {
        let mut others = self.others.lock().expect("no panic");
        others.0.extend(changed.iter().map(|(name, gauges)| (name.to_string(), *gauges)));
        others.1 = age;
    }

    fn learn(&self, chain: &ChainUpdate<'_>) -> bool {
        self.work();
        let (slot, hashes) = (self.slot(chain.upstream), &chain.hashes);
        match chain.parent {
            Some(parent) => self.index.learn_after(parent, hashes, chain.end, slot).is_some(),
            None => {
                self.index.learn_stored(hashes, chain.end, slot);
                true
            }
        }
    }

    fn take_back(&self, chain: &TakeBack<'_>) {
        self.index.release(&chain.hashes, chain.end, self.slot(chain.upstream));
    }

    fn chain_to(&self, upstream: &str, hash: u64) -> Option<Vec<u64>> {
        self.index.chain_to(hash, self.slot(upstream))
    }

    fn bound(&self, bound: &BindingUpdate<'_>) {
        self.work();
        // As `bind` publishes it; the upstreams of recorded messages have ports.
        assert!(bound.number == 7 || bound.upstream.contains(':'), "{bound:?}");
        self.bound.lock().expect("no panic").push((bound.key.into(), bound.upstream.into()));
    }

    fn members(&self, all: &HashMap<String, String>) {
        self.members.lock().expect("no panic").clone_from(all);
    }
}
