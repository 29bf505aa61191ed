//! Everything at once: engines that die, stall, cut, drain, come and go, and clients that are slow or
//! leave, for a while and from a seed. Every client that stays gets a whole and right answer, or, where
//! its stream had begun when its engine failed, an honest end; and when all is over, nothing is left.
//!
//! `VLLM_LB_CHAOS_SECONDS` says how long, and `VLLM_LB_CHAOS_SEED` has a run again as far as time allows.
//! `./dev bench chaos` lets it run for ten minutes. A run of five minutes or more also checks that every
//! trouble has happened and that memory does not grow.

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod memory;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clients::{Client, Tally, World};
use common::dice::Dice;
use common::shapes::Shape;
use common::{
    Balancer, EngineServer, InjectedFault, Options, Timing, config, engine, eventually, logs, upstreams,
};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;
use trouble::{Chronicle, KINDS, Trouble};
use vllm_lb::app::{self, LoadConfig};
use vllm_lb::config::types::{Config, Retry};

/// The product's, or freed memory would not leave the process.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const ENGINES: u64 = 8;
const CLIENTS: u64 = 32;

/// From here on a run is long enough for every trouble, and to tell whether memory grows.
const LONG: Duration = Duration::from_secs(300);

/// So many engines are in trouble at once at most.
const AT_ONCE: usize = 5;

/// Three engines that are well have no room for all clients, so that some have to wait.
pub const MAX_ACTIVE: u32 = 8;

#[allow(clippy::disallowed_methods, reason = "how a test runs is no setting of the product")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// So paced that every phase of a request takes a while.
fn options(seed: u64) -> Options {
    let timing = Timing { per_step: 0.004, per_prefill_token: 0.000_05, ..Timing::instant() };
    Options { seed, timing, prompt_tokens_details: false, ..Options::default() }
}

fn settings(engines: &[Arc<EngineServer>]) -> Config {
    let mut config = config(upstreams(engines.iter().map(Arc::as_ref)));
    for upstream in &mut config.upstreams {
        upstream.max_active = Some(MAX_ACTIVE);
    }
    config.expose = true;
    config.timeouts.idle = Some(Duration::from_secs(3));
    // More than a deployment allows: up to five engines of eight fail at once and the others are full, so
    // that a slow machine needs more than eight attempts now and then, and no request may fail here.
    config.retry = Retry {
        attempts: 30,
        budget: 10.0,
        backoff: Duration::from_millis(5),
        max_backoff: Duration::from_millis(50),
        ..Retry::default()
    };
    config.breaker.open = Duration::from_millis(300);
    config.breaker.max_open = Duration::from_secs(1);
    config
}

/// Each reload finds other settings than the one before.
fn altering(config: &Config) -> LoadConfig {
    let (config, loads) = (config.clone(), AtomicU32::new(0));
    Arc::new(move || {
        let odd = loads.fetch_add(1, Relaxed) % 2;
        let mut config = config.clone();
        config.retry.attempts += odd;
        config.health.fall += odd;
        config.queue.size += odd as usize;
        for upstream in &mut config.upstreams {
            upstream.weight += f64::from(odd) * 0.5;
            upstream.max_active = Some(MAX_ACTIVE + odd);
        }
        Ok((config, Vec::new()))
    })
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().expect("threads can be had")
}

#[test]
fn no_request_is_lost_in_chaos() {
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    let seed = setting("VLLM_LB_CHAOS_SEED").unwrap_or_else(clock);
    let time = Duration::from_secs(setting("VLLM_LB_CHAOS_SECONDS").unwrap_or(40));
    println!("VLLM_LB_CHAOS_SEED={seed} for {time:?}");
    // The balancer has a runtime of its own, so that its tasks can be counted.
    let (ours, its) = (runtime(), runtime());
    ours.block_on(async {
        let mut engines = Vec::new();
        for number in 0..ENGINES {
            let engine = EngineServer::start(options(number)).await.expect("a free port is there");
            engines.push(Arc::new(engine));
        }
        logs::remember();
        let config = settings(&engines);
        let load = altering(&config);
        let started = its.spawn(app::start_with(config, load));
        let running = started.await.expect("it does not panic").expect("the balancer starts");
        let balancer = Balancer { running };
        balancer.until_ready(engines.len()).await;

        let (world, chronicle, samples) = live(&balancer, &engines, seed, time).await;
        tell(&balancer, &world.tally, &chronicle);
        let wrong = world.tally.wrong();
        assert!(wrong.is_empty(), "seed {seed}, {} wrong:\n{}", wrong.len(), wrong.join("\n\n"));
        assert!(world.tally.whole.load(Relaxed) > 100, "next to nothing was answered");
        let happened: BTreeSet<_> = chronicle.events().iter().map(|event| event.kind).collect();
        let missed: Vec<_> = KINDS.iter().filter(|kind| !happened.contains(kind)).collect();
        if time >= LONG {
            assert!(missed.is_empty(), "seed {seed}: {missed:?} never happened");
            memory::has_stayed(&samples);
        }
        nothing_is_left(balancer, &engines, &its).await;
    });
    its.shutdown_timeout(Duration::from_secs(1));
}

/// The switches are those that the engine names when it does not know one.
#[test]
fn every_switch_of_the_engine_is_thrown() {
    let words = InjectedFault::parse(&serde_json::json!({"kind": "?"})).expect_err("there is no such switch");
    let (_, names) = words.split_once("use ").expect("it names them");
    let names: BTreeSet<&str> =
        names.split([',', ' ']).filter(|name| !["", "or", "none"].contains(name)).collect();
    let thrown: BTreeSet<&str> = KINDS.iter().flat_map(|kind| kind.switches()).copied().collect();
    assert_eq!(thrown, names);
}

/// Clients and troubles until the time is over, and then until each has come to its end.
async fn live(
    balancer: &Balancer,
    engines: &[Arc<EngineServer>],
    seed: u64,
    time: Duration,
) -> (Arc<World>, Arc<Chronicle>, Vec<memory::Sample>) {
    let reference = engine(Options { timing: Timing::instant(), ..options(99) }).await;
    let chronicle = Arc::new(Chronicle::default());
    let over = Arc::new(AtomicBool::new(false));
    let numbers = (0..).zip(engines).map(|(number, engine)| (engine.address().to_string(), number));
    let world = Arc::new(World {
        address: balancer.address().to_string(),
        shapes: Shape::all(&reference, &mut Dice::new(seed, 1)).await,
        engines: numbers.collect(),
        chronicle: chronicle.clone(),
        over: over.clone(),
        tally: Tally::default(),
    });
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for number in 0..CLIENTS {
        tasks.spawn(Client::new(world.clone(), number, Dice::new(seed, 1000 + number)).run());
    }
    for (number, engine) in engines.iter().enumerate() {
        let trouble = Trouble {
            number,
            engine: engine.clone(),
            fleet: balancer.running.fleet.clone(),
            admin: balancer.running.admin.clone(),
            at_once: at_once.clone(),
            chronicle: chronicle.clone(),
            over: over.clone(),
            dice: Dice::new(seed, 2000 + number as u64),
        };
        tasks.spawn(trouble.run());
    }
    let reloads = trouble::reload(balancer.running.admin.clone(), over.clone(), Dice::new(seed, 3000));
    let reloads = tokio::spawn(reloads);
    let watch = tokio::spawn(memory::watch(engines.to_vec(), over.clone()));
    sleep(time).await;
    over.store(true, Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    println!("{} reloads", reloads.await.expect("every reload is taken"));
    let samples = watch.await.expect("memory can be read");
    (world, chronicle, samples)
}

/// Prints what happened, for the output of the test.
fn tell(balancer: &Balancer, tally: &Tally, chronicle: &Chronicle) {
    let mut kinds = BTreeMap::new();
    for event in chronicle.events() {
        *kinds.entry(event.kind).or_insert(0) += 1;
    }
    println!("whole {:?} broken {:?} left {:?}", tally.whole, tally.broken, tally.left);
    println!("{kinds:?}");
    let page = balancer.metrics();
    for name in ["vllm_lb_retries_total", "vllm_lb_queue_total", "vllm_lb_rejects_total"] {
        page.lines().filter(|line| line.starts_with(name)).for_each(|line| println!("{line}"));
    }
}

/// No lease, no place in the queue, no memory, no connection and no task, here and in the engines.
async fn nothing_is_left(balancer: Balancer, engines: &[Arc<EngineServer>], its: &Runtime) {
    balancer.until_idle().await;
    let gauges = [
        ("in flight", "vllm_lb_in_flight"),
        ("queued", "vllm_lb_queued"),
        ("peeked", "vllm_lb_peeked_bytes"),
        ("connections", "vllm_lb_connections"),
    ];
    for (what, gauge) in gauges {
        eventually(&format!("{what} is 0"), async || (balancer.gauge(gauge) == 0).then_some(())).await;
    }
    for engine in engines {
        engine.wait_until("nothing runs", |stats| stats.running + stats.waiting == 0).await;
    }
    let stopped = its.spawn(balancer.running.stop(common::PATIENCE));
    assert_eq!(stopped.await.expect("it does not panic"), 0, "connections were cut");
    // Watchers of idle connections end with these, which is when their peers close them.
    eventually("no task is left", async || (its.metrics().num_alive_tasks() == 0).then_some(())).await;
    for engine in engines {
        engine.wait_until("no connection is left", |stats| stats.connections == 0).await;
    }
}
