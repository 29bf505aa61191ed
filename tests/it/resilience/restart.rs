//! Every engine is restarted under load, one after another, with a drain and without: not one request
//! fails.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::common::dice::Dice;
use crate::common::shapes::{Got, Shape};
use crate::common::wire::{JSON, Wire, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, Timing, config, engine, eventually, upstreams,
};
use serde_json::json;
use tokio::task::JoinSet;
use vllm_lb::config::types::Retry;

const ENGINES: u64 = 4;
const CLIENTS: u64 = 12;

/// So paced that requests are in every phase whenever something happens.
fn options(seed: u64) -> Options {
    let timing = Timing { per_step: 0.003, per_prefill_token: 0.000_05, ..Timing::instant() };
    Options { seed, timing, prompt_tokens_details: false, ..Options::default() }
}

async fn paced() -> Vec<EngineServer> {
    let mut engines = Vec::new();
    for seed in 0..ENGINES {
        engines.push(EngineServer::start(options(seed)).await.expect("a free port is there"));
    }
    engines
}

async fn balancer(engines: &[EngineServer]) -> Balancer {
    let mut config = config(upstreams(engines));
    config.retry = Retry { attempts: 4, budget: 10.0, ..Retry::default() };
    Balancer::ready(config).await
}

/// Clients that ask until they are told that it is over.
struct Load {
    tasks: JoinSet<()>,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    over: AtomicBool,
    whole: AtomicU64,
    failed: Mutex<Vec<String>>,
}

// === impl Load ===

impl Load {
    /// `streams`: of streams too.
    async fn start(balancer: &Balancer, streams: bool) -> Self {
        let reference = engine(Options { timing: Timing::instant(), ..options(99) }).await;
        let mut shapes = Shape::all(&reference, &mut Dice::new(1, 1)).await;
        shapes.retain(|shape| streams || !shape.stream);
        let (shapes, seen) = (Arc::new(shapes), Arc::new(Seen::default()));
        let mut tasks = JoinSet::new();
        for number in 0..CLIENTS {
            let (shapes, seen) = (shapes.clone(), seen.clone());
            let address = balancer.address().to_string();
            tasks.spawn(client(address, shapes, seen, Dice::new(1, number)));
        }
        Load { tasks, seen }
    }

    /// Waits until so many more requests were answered.
    async fn goes_on(&self, requests: u64) {
        let enough = self.seen.whole.load(Relaxed) + requests;
        let so = async || (self.seen.whole.load(Relaxed) >= enough).then_some(());
        eventually("the load goes on", so).await;
    }

    /// Lets every request end, and expects that each had the one right answer.
    async fn none_failed(mut self) {
        self.seen.over.store(true, Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("a client ends without a panic");
        }
        let failed = self.seen.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = self.seen.whole.load(Relaxed);
        assert!(failed.is_empty(), "{} failed, {whole} did not:\n{}", failed.len(), failed.join("\n"));
    }
}

async fn client(address: String, shapes: Arc<Vec<Shape>>, seen: Arc<Seen>, mut dice: Dice) {
    let mut kept = None;
    while !seen.over.load(Relaxed) {
        let shape = dice.one_of(&shapes);
        let mut wire = match kept.take() {
            Some(wire) => wire,
            None => Wire::connect(&address).await,
        };
        let answer = wire.ask(post(shape.path, &shape.body)).await;
        match shape.judge(&answer) {
            Got::Whole => drop(seen.whole.fetch_add(1, Relaxed)),
            got => {
                let mut failed = seen.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.push(format!("{} stream {}: {got:?} {:?}", shape.path, shape.stream, answer.headers));
            }
        }
        kept = (answer.header("connection") != "close").then_some(wire);
    }
}

async fn patch(balancer: &Balancer, engine: &EngineServer, state: &str) {
    let path = format!("/admin/upstreams/{}", engine.address());
    let body = json!({ "state": state }).to_string();
    balancer.admin(request("PATCH", &path, &[JSON], body.as_bytes())).await.expect(200);
}

/// As the admin interface tells it.
async fn active(balancer: &Balancer, engine: &EngineServer) -> u64 {
    let path = format!("/admin/upstreams/{}", engine.address());
    let row = balancer.admin(crate::common::wire::get(&path)).await.expect(200).json();
    row["active"].as_u64().expect("a number of requests")
}

/// Waits until the balancer has found the port closed.
async fn until_down(balancer: &Balancer) {
    balancer.until_ready(ENGINES as usize - 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_with_drains_costs_no_request() {
    let engines = paced().await;
    let balancer = balancer(&engines).await;
    let load = Load::start(&balancer, true).await;
    for engine in &engines {
        load.goes_on(20).await;
        patch(&balancer, engine, "drain").await;
        eventually("it has nothing more to do", async || {
            (active(&balancer, engine).await == 0).then_some(())
        })
        .await;
        let received = engine.stats().received;
        engine.set_fault(InjectedFault::Refuse).await;
        engine.restart().await;
        load.goes_on(20).await;
        assert_eq!(engine.stats().received, received, "a drained engine got a request");
        engine.clear_fault().await;
        patch(&balancer, engine, "ready").await;
        balancer.until_ready(engines.len()).await;
    }
    load.goes_on(20).await;
    load.none_failed().await;
    assert!(engines.iter().all(|engine| engine.stats().restarts == 1));
    balancer.until_idle().await;
}

/// Without a drain. Requests without a begun answer are answered by another engine: after vLLM's own error
/// that it shuts down, after its silence, and after the end of its connections.
#[tokio::test(flavor = "multi_thread")]
async fn stopping_engines_fails_only_requests_with_begun_answers() {
    let engines = paced().await;
    let balancer = balancer(&engines).await;
    let load = Load::start(&balancer, false).await;
    let words = [
        None,
        Some(InjectedFault::ShuttingDown),
        Some(InjectedFault::AbortEmpty),
        Some(InjectedFault::StallHeaders),
    ];
    for (engine, word) in engines.iter().zip(words) {
        load.goes_on(20).await;
        if let Some(word) = word {
            let received = engine.stats().received;
            engine.set_fault(word).await;
            engine.wait_until("it was asked", |stats| stats.received > received).await;
        }
        engine.set_fault(InjectedFault::Silent).await;
        until_down(&balancer).await;
        load.goes_on(20).await;
        engine.restart().await;
        engine.clear_fault().await;
        balancer.until_ready(engines.len()).await;
    }
    load.goes_on(20).await;
    load.none_failed().await;
    balancer.until_idle().await;
}
