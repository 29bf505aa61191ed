//! What the tests of the running balancer share: engines, a balancer over them, and clients that show
//! what is on the wire.
//!
//! Everything listens on a free port, is started by the test that uses it, and ends with it. Waiting is
//! for a condition, with a limit after which the test fails; nothing sleeps and hopes.

#![allow(dead_code, unused_imports, reason = "each test file uses its part of it")]

pub mod api_server;
pub mod body;
pub mod certs;
pub mod clients;
pub mod dice;
pub mod dns;
pub mod doctor;
pub mod h2;
pub mod logs;
pub mod model_server;
pub mod own_process;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod raw;
pub mod redis;
pub mod sentinel;
pub mod shapes;
pub mod slow_link;
pub mod staged;
pub mod wire;

use std::time::Duration;

use tokio::time::{Instant, sleep};
use vllm_lb::app::{self, RunningBalancer};
use vllm_lb::config::types::{
    Config, Health, Listen, ListenAddress, TrustedProxies, TrustedProxy, UpstreamConfig,
};
use vllm_lb::config::url;
pub use vllm_lb::engine::batch::Timing;
pub use vllm_lb::engine::http::{EngineServer, InjectedFault, NoMetrics, Options, Recorded};
use vllm_lb::fleet::upstream::UpstreamLoad;
pub use vllm_lb::observe::ExpositionFormat;

use wire::Wire;

/// After this long, what a test waits for will not come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// Waits until `so` gives a value.
pub async fn eventually<T>(what: &str, mut so: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = so().await {
            return value;
        }
        if Instant::now() > end {
            panic!("waited {PATIENCE:?} in vain until {what}; the log:\n{}", logs::all().join("\n"));
        }
        sleep(LOOK).await;
    }
}

// === engines ===

/// An engine that answers at once.
pub async fn engine(options: Options) -> EngineServer {
    EngineServer::start(Options { timing: Timing::instant(), ..options }).await.expect("a free port is there")
}

/// Engines of one kind.
pub async fn engines(count: usize) -> Vec<EngineServer> {
    let mut engines = Vec::new();
    for seed in 0..count as u64 {
        engines.push(engine(Options { seed, ..Options::default() }).await);
    }
    engines
}

/// An engine that serves these names and nothing else.
pub async fn serving(models: &[&str]) -> EngineServer {
    engine(Options { models: names(models), ..Options::default() }).await
}

/// An engine with so long between two tokens.
pub async fn paced(step: Duration) -> EngineServer {
    let timing = Timing { per_step: step.as_secs_f64(), ..Timing::instant() };
    EngineServer::start(Options { timing, ..Options::default() }).await.expect("a free port is there")
}

pub fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

/// `host:port` of an engine, for a client that goes there directly.
pub fn direct(engine: &EngineServer) -> String {
    engine.address().to_string()
}

// === balancers ===

pub struct Balancer {
    pub running: RunningBalancer,
}

/// On free ports, asking upstreams often.
pub fn config(upstreams: Vec<UpstreamConfig>) -> Config {
    let mut config = Config {
        listen: vec![listen("127.0.0.1:0")],
        upstreams,
        threads: 2,
        health: Health { interval: Duration::from_millis(100), ..Health::default() },
        ..Config::default()
    };
    config.admin.address = ListenAddress::Tcp("127.0.0.1:0".into());
    config
}

/// Believes what clients on this machine say of where a request came from.
pub fn loopback() -> TrustedProxies {
    TrustedProxies::new([TrustedProxy::parse("127.0.0.0/8").expect("it is a network")])
}

pub fn listen(address: &str) -> Listen {
    Listen { address: ListenAddress::Tcp(address.into()), tls: None }
}

/// Upstreams with default settings, in the order of the engines.
pub fn upstreams<'a>(engines: impl IntoIterator<Item = &'a EngineServer>) -> Vec<UpstreamConfig> {
    engines.into_iter().map(|engine| upstream(&engine.url())).collect()
}

pub fn upstream(written: &str) -> UpstreamConfig {
    UpstreamConfig::new(url::upstream(written).expect("engines have valid addresses"))
}

/// The value of a metric without labels, from a page of metrics.
pub fn gauge_of(page: &str, name: &str) -> i64 {
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name} is not in {page}"))
}

// === impl Balancer ===

impl Balancer {
    /// Starts, and waits for no upstream.
    pub async fn start(config: Config) -> Self {
        logs::remember();
        Balancer { running: app::start(config).await.expect("the balancer starts") }
    }

    /// Starts, and waits until all upstreams are ready.
    pub async fn ready(config: Config) -> Self {
        let count = config.upstreams.len();
        let balancer = Self::start(config).await;
        balancer.until_ready(count).await;
        balancer
    }

    /// Over these engines, with default settings.
    pub async fn over<'a>(engines: impl IntoIterator<Item = &'a EngineServer>) -> Self {
        Self::ready(config(upstreams(engines))).await
    }

    pub fn address(&self) -> &str {
        &self.running.addresses[0]
    }

    pub async fn client(&self) -> Wire {
        Wire::connect(self.address()).await
    }

    /// One request on a connection of its own.
    pub async fn ask(&self, request: impl AsRef<[u8]>) -> wire::Answer {
        self.client().await.ask(request).await
    }

    /// One request to the admin listener, by its address.
    pub async fn admin(&self, request: impl AsRef<[u8]>) -> wire::Answer {
        let request = wire::with_host(request.as_ref(), &self.running.admin);
        Wire::connect(&self.running.admin).await.ask(request).await
    }

    pub async fn until_ready(&self, count: usize) {
        let fleet = &self.running.fleet;
        eventually(&format!("{count} upstreams are ready"), async || {
            (fleet.snapshot().ready().count() == count).then_some(())
        })
        .await;
    }

    /// What is in flight on each upstream.
    pub fn loads(&self) -> Vec<UpstreamLoad> {
        self.running.fleet.snapshot().entries.iter().map(|entry| entry.upstream.load()).collect()
    }

    /// The page of the balancer's own metrics, without the request that a scrape is.
    pub fn metrics(&self) -> String {
        let page = self.running.observer.render(ExpositionFormat::Text, &[]);
        String::from_utf8(page).expect("metrics are text")
    }

    /// The value of a metric without labels.
    pub fn gauge(&self, name: &str) -> i64 {
        gauge_of(&self.metrics(), name)
    }

    /// Waits until no upstream has anything in flight.
    pub async fn until_idle(&self) {
        eventually("nothing is in flight", async || {
            self.loads().iter().all(|load| *load == UpstreamLoad::default()).then_some(())
        })
        .await;
    }

    /// Waits until all requests have ended in all respects. The lease of a request ends before its record is
    /// written, and that before it is no longer in flight.
    pub async fn until_recorded(&self) {
        self.until_idle().await;
        self.until_metric("vllm_lb_in_flight", 0.0).await;
    }

    pub async fn until_active(&self, count: u64) {
        eventually(&format!("{count} requests are in flight"), async || {
            (self.loads().iter().map(|load| load.active).sum::<u64>() == count).then_some(())
        })
        .await;
    }

    /// The sum over the samples of a metric on the admin listener.
    pub async fn metric(&self, name: &str) -> f64 {
        let page = self.admin(wire::get("/metrics")).await.expect(200);
        let samples = page
            .text()
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    pub async fn until_metric(&self, name: &str, wanted: f64) {
        eventually(&format!("{name} is {wanted}"), async || {
            (self.metric(name).await == wanted).then_some(())
        })
        .await;
    }

    /// Ends it, which must not take longer than what is in flight.
    pub async fn stop(self) {
        self.running.stop(PATIENCE).await;
    }
}

/// One call to the admin listener; null is no body.
pub async fn admin(balancer: &Balancer, method: &str, path: &str, body: serde_json::Value) -> wire::Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    balancer.admin(wire::request(method, path, &[wire::JSON], body.as_bytes())).await
}
