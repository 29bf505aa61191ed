//! Faults of the engines: each engine has its own, one after another, from the seed. The number of engines
//! with a fault at one time is limited, so that one engine is always well.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use vllm_lb::fleet::{Fleet, Snapshot, SnapshotEntry};

use crate::common::dice::Dice;
use crate::common::wire::{JSON, Wire, request};
use crate::common::{EngineServer, InjectedFault, NoMetrics, PATIENCE, logs};

/// How often it is looked whether all is over.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The process dies, and comes back with an empty cache.
    Kill,
    /// It takes requests, says nothing, and is restarted.
    Wedge,
    /// Streams stand still.
    Stall,
    /// Streams end without their end.
    Cut,
    /// Connections end before an answer.
    CutHeaders,
    CloseAfterAccept,
    CloseIdle,
    /// 503, as a full engine says it.
    Busy,
    /// 502 and 504, as something between says them.
    Gateway,
    /// A stream's first event is an error.
    ErrorEvent,
    ShuttingDown,
    AbortEmpty,
    /// What SIGTERM leaves behind.
    Silent,
    Slow,
    /// It answers, and says that it is not well.
    Unwell,
    /// It says nothing of its load.
    NoMetrics,
    Drain,
    Weight,
    /// Taken out of the fleet, and put in again.
    Remove,
}

pub const KINDS: [Kind; 19] = [
    Kind::Kill,
    Kind::Wedge,
    Kind::Stall,
    Kind::Cut,
    Kind::CutHeaders,
    Kind::CloseAfterAccept,
    Kind::CloseIdle,
    Kind::Busy,
    Kind::Gateway,
    Kind::ErrorEvent,
    Kind::ShuttingDown,
    Kind::AbortEmpty,
    Kind::Silent,
    Kind::Slow,
    Kind::Unwell,
    Kind::NoMetrics,
    Kind::Drain,
    Kind::Weight,
    Kind::Remove,
];

impl Kind {
    /// The switches of `POST /sim/fault` that it throws. Trouble by the balancer's own admin API has none.
    pub fn switches(self) -> &'static [&'static str] {
        match self {
            Kind::Kill => &["refuse", "restart"],
            Kind::Wedge => &["stall_headers"],
            Kind::Stall => &["stall_stream"],
            Kind::Cut => &["cut_stream"],
            Kind::CutHeaders => &["cut_headers"],
            Kind::CloseAfterAccept => &["close_after_accept"],
            Kind::CloseIdle => &["close_idle"],
            Kind::Busy | Kind::Gateway => &["status"],
            Kind::ErrorEvent => &["error_event"],
            Kind::ShuttingDown => &["shutting_down"],
            Kind::AbortEmpty => &["abort_empty"],
            Kind::Silent => &["silent"],
            Kind::Slow => &["slow"],
            Kind::Unwell => &["health"],
            Kind::NoMetrics => &["metrics"],
            Kind::Drain | Kind::Weight | Kind::Remove => &[],
        }
    }

    /// Whether a stream that has begun may end by it.
    fn breaks_streams(self) -> bool {
        matches!(
            self,
            Kind::Kill
                | Kind::Wedge
                | Kind::Stall
                | Kind::Cut
                | Kind::ShuttingDown
                | Kind::AbortEmpty
                | Kind::Silent
        )
    }
}

/// One trouble of one engine.
#[derive(Clone, Debug)]
pub struct Event {
    pub engine: usize,
    pub kind: Kind,
    pub begun: Instant,
    /// `None` while it lasts.
    pub ended: Option<Instant>,
}

/// All that has happened.
#[derive(Default)]
pub struct Chronicle(Mutex<Vec<Event>>);

impl Chronicle {
    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn begin(&self, engine: usize, kind: Kind) -> usize {
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(Event { engine, kind, begun: Instant::now(), ended: None });
        events.len() - 1
    }

    fn end(&self, number: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[number].ended = Some(Instant::now());
    }

    /// Whether something happened to an engine between two moments that breaks streams.
    pub fn explains(&self, engine: usize, from: Instant, to: Instant) -> bool {
        let touches = |event: &Event| {
            let over = event.ended.is_some_and(|ended| ended < from);
            event.engine == engine && event.kind.breaks_streams() && event.begun < to && !over
        };
        self.events().iter().any(touches)
    }
}

/// One engine, and what troubles it.
pub struct Trouble {
    pub number: usize,
    pub engine: Arc<EngineServer>,
    pub fleet: Arc<Fleet>,
    /// Where the admin listener is.
    pub admin: String,
    /// Permits to be in trouble.
    pub at_once: Arc<Semaphore>,
    pub chronicle: Arc<Chronicle>,
    pub over: Arc<AtomicBool>,
    pub dice: Dice,
}

// === impl Trouble ===

impl Trouble {
    /// Troubles its engine until it is over, and leaves it well.
    pub async fn run(mut self) {
        while !self.over.load(Relaxed) {
            self.pause(50, 800).await;
            let _permit = self.at_once.clone().acquire_owned().await.expect("nobody closes it");
            let kind = *self.dice.one_of(&KINDS);
            let number = self.chronicle.begin(self.number, kind);
            self.happen(kind).await;
            self.engine.clear_fault().await;
            self.chronicle.end(number);
            self.until_ready(kind).await;
        }
    }

    async fn pause(&mut self, least: u64, most: u64) {
        sleep(Duration::from_millis(self.dice.between(least, most))).await;
    }

    /// Waits while there are requests: one that is tripped is ready again only by one that it answers.
    async fn until_ready(&self, after: Kind) {
        let (name, end) = (self.name(), Instant::now() + PATIENCE);
        let so = |fleet: &Snapshot| fleet.by_name(&name).is_some_and(SnapshotEntry::is_ready);
        while !self.over.load(Relaxed) && !self.fleet.wait_until(LOOK, so).await {
            if Instant::now() < end {
                continue;
            }
            let state = self.fleet.snapshot().by_name(&name).map(|entry| (entry.status, entry.removing));
            let about = |line: &String| line.contains(&name) && !line.starts_with("DEBUG");
            let log: Vec<String> = logs::of_all_runtimes().into_iter().filter(about).collect();
            panic!("{name} does not come back after {after:?}: {state:?}\n{}", log.join("\n"));
        }
    }

    async fn happen(&mut self, kind: Kind) {
        let reset = self.dice.once_in(2);
        let events = self.dice.between(0, 8) as usize;
        let status = |status, message: &str| InjectedFault::Status {
            status,
            body: format!(r#"{{"error":{{"message":"{message}","type":"x","param":null,"code":{status}}}}}"#),
        };
        match kind {
            Kind::Kill => self.die().await,
            Kind::Wedge => self.last_words(InjectedFault::StallHeaders).await,
            Kind::ShuttingDown => self.last_words(InjectedFault::ShuttingDown).await,
            Kind::AbortEmpty => self.last_words(InjectedFault::AbortEmpty).await,
            Kind::Silent => {
                self.engine.set_fault(InjectedFault::Silent).await;
                self.pause(100, 4000).await;
                self.die().await;
            }
            // A stream that has not begun, with whatever comes before its first token, would wait for ever.
            Kind::Stall => self.strike(InjectedFault::StallStream { events: events + 3 }).await,
            Kind::Cut => self.strike(InjectedFault::CutStream { events, reset }).await,
            Kind::CutHeaders => self.strike(InjectedFault::CutHeaders { reset }).await,
            Kind::Busy => self.strike(status(503, "the engine is busy")).await,
            Kind::Gateway if reset => self.strike(status(502, "bad gateway")).await,
            Kind::Gateway => self.strike(status(504, "gateway timeout")).await,
            Kind::ErrorEvent => self.strike(InjectedFault::ErrorEvent { status: 500 }).await,
            Kind::CloseAfterAccept => self.hold(InjectedFault::CloseAfterAccept).await,
            Kind::CloseIdle => self.hold(InjectedFault::CloseIdle).await,
            Kind::Slow => {
                let factor = self.dice.between(2, 20) as f64;
                self.hold(InjectedFault::Slow { factor }).await;
            }
            Kind::Unwell => {
                self.engine.set_health(Some(503));
                self.pause(50, 800).await;
                self.engine.set_health(None);
            }
            Kind::NoMetrics => {
                let instead = if reset { NoMetrics::Stall } else { NoMetrics::Status(404) };
                self.engine.set_metrics(Some(instead));
                self.pause(50, 800).await;
                self.engine.set_metrics(None);
            }
            Kind::Drain => self.drain().await,
            Kind::Weight => self.weigh().await,
            Kind::Remove => self.remove().await,
        }
    }

    /// A fault for a while.
    async fn hold(&mut self, fault: InjectedFault) {
        self.engine.set_fault(fault).await;
        self.pause(50, 800).await;
    }

    /// A fault for a few requests, or for as many as come in a while.
    async fn strike(&mut self, fault: InjectedFault) {
        let requests = self.dice.between(1, 20);
        self.engine.set_fault_for(requests, fault).await;
        self.pause(50, 800).await;
    }

    /// A fault that ends with the process.
    async fn last_words(&mut self, fault: InjectedFault) {
        self.engine.set_fault(fault).await;
        self.pause(50, 800).await;
        self.die().await;
    }

    async fn die(&mut self) {
        self.engine.set_fault(InjectedFault::Refuse).await;
        self.engine.restart().await;
        self.pause(0, 800).await;
    }

    fn name(&self) -> String {
        self.engine.address().to_string()
    }

    /// Calls the admin listener about the engine's upstream, and expects one of these statuses.
    async fn call(&self, method: &str, path: &str, body: Value, statuses: &[u16]) {
        let mut wire = Wire::connect(&self.admin).await;
        let head = [JSON, ("host", self.admin.as_str())];
        let answer = wire.ask(request(method, path, &head, body.to_string().as_bytes())).await;
        assert!(statuses.contains(&answer.status), "{method} {path} {body}: {answer:?}");
    }

    async fn patch(&self, body: Value) {
        self.call("PATCH", &format!("/admin/upstreams/{}", self.name()), body, &[200]).await;
    }

    async fn drain(&mut self) {
        self.patch(json!({"state": "drain"})).await;
        self.pause(50, 800).await;
        self.patch(json!({"state": "ready"})).await;
    }

    async fn weigh(&mut self) {
        let weight = self.dice.between(1, 40) as f64 / 10.0;
        self.patch(json!({ "weight": weight })).await;
    }

    async fn remove(&mut self) {
        let query = *self.dice.one_of(&["", "?force", "?wait=1s"]);
        let path = format!("/admin/upstreams/{}{query}", self.name());
        // Streams may last longer than it waits.
        self.call("DELETE", &path, Value::Null, &[200, 202, 504]).await;
        self.pause(0, 800).await;
        let config = json!({"url": self.engine.url(), "max_active": crate::MAX_ACTIVE});
        // A reload may have put it there meanwhile, with other settings.
        self.call("POST", "/admin/upstreams?wait=10s", config, &[200, 201, 409]).await;
    }
}

/// Reloads the configuration again and again until it is over; how often it did.
pub async fn reload(admin: String, over: Arc<AtomicBool>, mut dice: Dice) -> u64 {
    let mut reloads = 0;
    while !over.load(Relaxed) {
        sleep(Duration::from_millis(dice.between(100, 2500))).await;
        let reloaded =
            Wire::connect(&admin).await.ask(request("POST", "/admin/reload", &[("host", &admin)], b"")).await;
        reloaded.expect(200);
        reloads += 1;
    }
    reloads
}
