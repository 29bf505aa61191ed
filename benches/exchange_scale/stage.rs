//! A balancer as a process, over engines that answer at once, with a Redis of its own and a light load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use serde_json::json;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use vllm_lb::prompt::canon::{PromptDialect, PromptReader, PromptSource};
use vllm_lb::prompt::chain::BlockLayout;
use vllm_lb::prompt::chain::thinning::stored;
use vllm_lb::prompt::scan::Scanner;
use vllm_lb::state::exchange::SiblingLoad;

use crate::common::body::stream;
use crate::common::process::{Process, Setup};
use crate::common::redis::Redis;
use crate::common::wire::{JSON, Wire, get, post, request, with_host};
use crate::common::{EngineServer, Options, engine, eventually};
use crate::meter::CpuSeconds;
use crate::siblings::{self, PublishedChain, SiblingNews, SiblingSender};

const CHAT: &str = "/v1/chat/completions";

/// Clients, each with a connection that stays.
const CLIENTS: u32 = 20;

/// A balancer that knows a gauge later than this does not keep up, and is not looked at more often than so.
const PROBE_TIME: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(2);

/// Prompts of one probe, which the balancer is asked for at growing distances up to some 20 s, and the bytes
/// of each: 32 blocks. All are fewer than an engine keeps.
const PROBE_PROMPTS: i32 = 100;
const PROBE_START: f64 = 0.004;
const PROBE_GROWTH: f64 = 1.09;
const PROBE_BYTES: usize = 32 * 512;

/// Tokens that each engine keeps.
const CACHE_TOKENS: usize = 4 << 20;

/// Builds a runtime with a name for its threads, by which the meter finds them.
pub fn runtime(name: &str, threads: usize) -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(threads).thread_name(name).enable_all().build().expect("a runtime")
}

pub struct Stage {
    pub redis: Redis,
    pub redis_process: u32,
    pub balancer: Process,
    /// The names of all upstreams. The siblings send nothing to the last one, which the probes use.
    pub upstreams: Vec<String>,
    prober: SiblingSender,
    probes: u64,
    _engines: Vec<EngineServer>,
    _setup: Setup,
}

/// The latencies of one stretch of time, to the first byte of the body, in milliseconds, sorted.
pub struct Latencies {
    pub times: Vec<f64>,
    pub failed: usize,
}

/// How long until the balancer knew, in milliseconds; `None` is longer than was waited.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    pub gauges: Option<f64>,
    pub chain: Option<f64>,
}

// === impl Stage ===

impl Stage {
    pub async fn new(upstreams: usize, engines: &Runtime) -> Self {
        let redis = Redis::start(&[]).await;
        let redis_process = redis_info(&redis, "process_id").await as u32;
        let engines = engines
            .spawn(async move {
                let mut all = Vec::new();
                for seed in 0..upstreams as u64 {
                    let options = Options { seed, cache_tokens: CACHE_TOKENS, ..Options::default() };
                    all.push(engine(options).await);
                }
                all
            })
            .await
            .expect("engines start");
        let setup = Setup::over(&engines, "");
        let urls: Vec<String> = engines.iter().map(|engine| format!("{:?}", engine.url())).collect();
        // Probes of upstreams are no part of what is measured.
        let config = format!(
            "listen: ['127.0.0.1:0']\nadmin: {{address: '127.0.0.1:0'}}\nupstreams: [{}]\n\
             health: {{interval: 1h}}\nthreads: 2\nexpose: true\nredis: {}\n",
            urls.join(", "),
            redis.url()
        );
        std::fs::write(setup.path("lb.yaml"), config).expect("the folder can be written");
        let balancer = setup.start().await;
        eventually("all upstreams are ready", async || {
            let rows = balancer.admin("/admin/upstreams").await.json();
            rows.as_array()?.iter().all(|row| row["state"] == "ready").then_some(())
        })
        .await;
        let upstreams = engines.iter().map(|engine| engine.address().to_string()).collect();
        let prober = SiblingSender::new(1 << 20);
        let (_engines, _setup) = (engines, setup);
        Stage { redis, redis_process, balancer, upstreams, prober, probes: 0, _engines, _setup }
    }

    pub fn cpu(&self) -> CpuSeconds {
        CpuSeconds::read(self.balancer.pid(), self.redis_process)
    }

    /// Returns the sum over the samples of a metric that have `label` among their labels.
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        let page = self.balancer.admin("/metrics").await;
        let of = |line: &&str| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']) && rest.contains(label))
        };
        let samples = page.text().lines().filter(of);
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// The longest age that the balancer reports of its siblings' gauges in this time, in seconds.
    pub async fn oldest(&self, time: Duration) -> f64 {
        let end = Instant::now() + time;
        let mut oldest: f64 = 0.0;
        while Instant::now() < end {
            oldest = oldest.max(self.metric("vllm_lb_siblings_age_seconds", "").await);
            sleep(Duration::from_millis(500).min(end - Instant::now())).await;
        }
        oldest
    }

    /// Publishes a gauge and chains as one sibling more, and looks until the balancer knows them.
    pub async fn probe(&mut self) -> Probe {
        let mut link = siblings::connect(&self.redis.url()).await;
        let reserved = self.upstreams.len() - 1;
        self.probes += 1;
        let active = self.probes;
        let bodies: Vec<String> =
            (0..PROBE_PROMPTS as u64).map(|number| prompt(self.probes << 16 | number)).collect();
        let chains = bodies.iter().map(|body| PublishedChain {
            upstream: reserved,
            parent: None,
            depth: 0,
            hashes: chain(body),
        });
        let load = SiblingLoad { active, backlog: 0, context: 0 };
        let news = SiblingNews {
            whole: true,
            served: false,
            gauges: vec![(reserved, load)],
            chains: chains.collect(),
            sessions: Vec::new(),
        };
        let start = Instant::now();
        let sent = siblings::publish(&mut link, &mut self.prober, &news, &self.upstreams).await;
        sent.expect("redis accepts it");
        let gauges = self.until_gauge(reserved, active);
        let chain = self.until_chain(&bodies, start);
        let (gauges, chain) = tokio::join!(gauges, chain);
        Probe { gauges: gauges.map(|at| (at - start).as_secs_f64() * 1e3), chain }
    }

    async fn until_gauge(&self, upstream: usize, active: u64) -> Option<Instant> {
        let path = get(&format!("/admin/upstreams/{}", self.upstreams[upstream]));
        let request = with_host(&path, &self.balancer.admin);
        let mut wire = Wire::connect(&self.balancer.admin).await;
        let end = Instant::now() + PROBE_TIME;
        while Instant::now() < end {
            if wire.ask(&request).await.json()["siblings_active"] == active {
                return Some(Instant::now());
            }
            sleep(LOOK).await;
        }
        None
    }

    /// Each prompt is asked for once, since the balancer then knows it by itself.
    async fn until_chain(&self, bodies: &[String], start: Instant) -> Option<f64> {
        let mut wire = Wire::connect(&self.balancer.addresses[0]).await;
        for (number, body) in (0..).zip(bodies) {
            let after = PROBE_START * f64::from(number).max(PROBE_GROWTH.powi(number));
            sleep_until(start + Duration::from_secs_f64(after)).await;
            let asked = Instant::now();
            let answer = wire.ask(request("POST", CHAT, &[JSON], body.as_bytes())).await.expect(200);
            let hit = answer.header("x-vllm-lb-hit").split(['/', ' ']).next().map(str::to_string);
            if hit.and_then(|hit| hit.parse::<f64>().ok()).is_some_and(|blocks| blocks > 0.0) {
                return Some((asked - start).as_secs_f64() * 1e3);
            }
        }
        None
    }
}

/// A prompt of its own, from its first block on.
fn prompt(number: u64) -> String {
    let text = format!("probe {number:016x} ").repeat(PROBE_BYTES / 23);
    json!({"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 1}).to_string()
}

/// The stored blocks of the chain that the balancer makes of this body.
fn chain(body: &str) -> Vec<u64> {
    let mut scanner = Scanner::new();
    scanner.scan(body.as_bytes());
    let (dialect, body) = (PromptDialect::Chat, body.as_bytes());
    let source = PromptSource { dialect, model: "sim", body, scanner: &scanner };
    stored(&PromptReader::default().read(&source, BlockLayout::default()).blocks).collect()
}

/// A number that Redis reports of itself.
pub async fn redis_info(redis: &Redis, name: &str) -> f64 {
    let redis::Value::BulkString(text) = redis.ask(&["INFO", "all"]).await else { return 0.0 };
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0.0)
}

// === impl Latencies ===

impl Latencies {
    pub fn percentile(&self, hundredths: usize) -> f64 {
        let rank = (self.times.len() * hundredths).div_ceil(100).max(1);
        self.times.get(rank - 1).copied().unwrap_or_default()
    }

    pub fn add(&mut self, other: Self) {
        self.times.extend(other.times);
        self.times.sort_by(f64::total_cmp);
        self.failed += other.failed;
    }
}

/// Sends so many streams a second for `time`, each at a fixed moment from which it is timed.
pub async fn load(address: &str, rate: u32, time: Duration) -> Latencies {
    let (sender, mut receiver) = mpsc::channel(100_000);
    let stop = Arc::new(AtomicBool::new(false));
    let pause = Duration::from_secs(1) * CLIENTS / rate;
    for number in 0..CLIENTS {
        let first = Instant::now() + pause * number / CLIENTS;
        tokio::spawn(client(address.to_string(), first, pause, stop.clone(), sender.clone()));
    }
    drop(sender);
    sleep(time).await;
    stop.store(true, Relaxed);
    let mut all = Latencies { times: Vec::new(), failed: 0 };
    while let Some((first, well)) = receiver.recv().await {
        all.times.push(first);
        all.failed += usize::from(!well);
    }
    all.times.sort_by(f64::total_cmp);
    all
}

async fn client(
    address: String,
    mut due: Instant,
    pause: Duration,
    stop: Arc<AtomicBool>,
    samples: mpsc::Sender<(f64, bool)>,
) {
    let request = post(CHAT, stream("sim", 5));
    let mut wire = Wire::connect(&address).await;
    while !stop.load(Relaxed) {
        sleep_until(due).await;
        wire.send(&request).await;
        let head = wire.head().await;
        let (status, mut framing) = (head.status, head.framing);
        let (mut first, mut last) = (None, None);
        while let Ok(Some(piece)) = wire.piece(&mut framing).await {
            first.get_or_insert_with(|| due.elapsed());
            last = Some(piece);
        }
        let well = status == 200 && last.is_some_and(|piece| piece.ends_with(b"data: [DONE]\n\n"));
        let milliseconds = first.unwrap_or_default().as_secs_f64() * 1e3;
        if samples.send((milliseconds, well)).await.is_err() {
            return;
        }
        due += pause;
    }
}
