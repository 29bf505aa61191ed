//! What upstreams tell in their own metrics: load of other clients, restarts, the size of the cache; and how
//! little it matters when they tell nothing.

use std::time::Duration;

use crate::common::body::{chat, stream};
use crate::common::clients::{Clients, none};
use crate::common::wire::{Wire, get, post};
use crate::common::{
    Balancer, EngineServer, NoMetrics, Options, config, direct, engine, engines, eventually, paced, upstreams,
};
use serde_json::Value;

const CHAT: &str = "/v1/chat/completions";

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

/// The rows of `GET /admin/upstreams`.
async fn rows(balancer: &Balancer) -> Vec<Value> {
    let rows = balancer.admin(get("/admin/upstreams")).await.expect(200).json();
    rows.as_array().expect("it is a list").clone()
}

/// Waits until the first upstream's row has this.
async fn until(balancer: &Balancer, key: &str, wanted: impl Into<Value>) {
    let wanted = wanted.into();
    eventually(&format!("{key} is {wanted}"), async || {
        (rows(balancer).await[0][key] == wanted).then_some(())
    })
    .await;
}

fn polls(engine: &EngineServer, path: &str) -> usize {
    engine.polls().iter().filter(|poll| poll.path == path).count()
}

async fn until_polled(engine: &EngineServer, path: &str, more: usize) {
    let before = polls(engine, path);
    eventually(&format!("{path} was asked for {more} more times"), async || {
        (polls(engine, path) >= before + more).then_some(())
    })
    .await;
}

/// Streams that never end.
async fn streams(address: &str, count: usize) -> Vec<Wire> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let mut client = Wire::connect(address).await;
        client.send(post(CHAT, stream("sim", 10_000))).await;
        clients.push(client);
    }
    clients
}

fn incarnations(balancer: &Balancer) -> Vec<u64> {
    balancer.running.fleet.snapshot().entries.iter().map(|entry| entry.incarnation).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_requests_on_an_upstream_count_as_work() {
    let engines = [paced(ENDLESS).await, engine(Options::default()).await];
    let balancer = Balancer::over(&engines).await;
    until(&balancer, "foreign", 0).await;
    let others = streams(&direct(&engines[0]), 8).await;
    until(&balancer, "foreign", 8).await;
    assert_eq!(rows(&balancer).await[0]["active"], 0, "a place is what our own requests take");
    assert_eq!(balancer.metric("vllm_lb_upstream_foreign_requests").await, 8.0);
    let before = engines[0].stats().received;
    for _ in 0..10 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!((engines[0].stats().received - before, engines[1].stats().received), (0, 10));
    drop(others);
    until(&balancer, "foreign", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn own_requests_do_not_count_as_foreign() {
    let engines = [paced(ENDLESS).await];
    let balancer = Balancer::over(&engines).await;
    let ours = streams(balancer.address(), 6).await;
    until(&balancer, "running", 6).await;
    let mut others = streams(&direct(&engines[0]), 2).await;
    until(&balancer, "running", 8).await;
    until(&balancer, "foreign", 2).await;
    others.clear();
    until(&balancer, "running", 6).await;
    until(&balancer, "foreign", 0).await;
    // Requests come and go, and some of their clients leave in the middle of an answer.
    let load = Clients::start(&balancer, 4);
    for _ in 0..8 {
        drop(streams(balancer.address(), 2).await);
        until_polled(&engines[0], "/metrics", 1).await;
        assert_eq!(rows(&balancer).await[0]["foreign"], 0);
    }
    assert_eq!(load.end().await, none());
    drop(ours);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_counted_once_and_unchanged_metrics_are_ignored() {
    let engines = engines(2).await;
    let balancer = Balancer::over(&engines).await;
    let (fleet, size) = (&balancer.running.fleet, Options::default().cache_tokens);
    until(&balancer, "cache_tokens", size).await;
    assert_eq!(rows(&balancer).await[0]["kv_usage"], 0.0);
    until_polled(&engines[1], "/metrics", 3).await;
    let changes = fleet.changes();
    let load = Clients::start(&balancer, 4);
    for engine in &engines {
        until_polled(engine, "/metrics", 5).await;
    }
    assert_eq!(load.end().await, none());
    assert!(!changes.has_changed().expect("the fleet lives"), "load alone is no new snapshot");
    assert_eq!(incarnations(&balancer), [0, 0]);
    engines[0].restart().await;
    eventually("it is taken for a new one", async || (incarnations(&balancer) == [1, 0]).then_some(())).await;
    until_polled(&engines[0], "/metrics", 5).await;
    assert_eq!(incarnations(&balancer), [1, 0]);
    let page = balancer.admin(get("/metrics")).await.expect(200);
    let incarnation = format!("vllm_lb_upstream_incarnation{{upstream=\"{}\"}} 1", direct(&engines[0]));
    assert!(page.text().contains(&incarnation), "{}", page.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_upstream_returns_with_an_empty_cache_and_a_drained_one_keeps_it() {
    let engines = engines(1).await;
    for metrics in [true, false] {
        let mut config = config(upstreams(&engines));
        config.health.metrics = metrics;
        let balancer = Balancer::ready(config).await;
        let fleet = &balancer.running.fleet;
        let state = async |wanted: &str| until(&balancer, "state", wanted).await;
        let drain = |drain| vllm_lb::fleet::FleetChange::Drain { name: direct(&engines[0]), drain };
        fleet.apply(vec![drain(true)]).await.expect("it is there");
        state("draining").await;
        fleet.apply(vec![drain(false)]).await.expect("it is there");
        state("ready").await;
        assert_eq!(incarnations(&balancer), [0]);
        engines[0].set_health(Some(503));
        state("down").await;
        assert_eq!(incarnations(&balancer), [0], "a model of its cache is of no use, and of no harm");
        engines[0].set_health(None);
        state("ready").await;
        assert_eq!(incarnations(&balancer), [1]);
        until_polled(&engines[0], "/health", 5).await;
        assert_eq!(incarnations(&balancer), [1]);
        let known = rows(&balancer).await[0].get("cache_tokens").is_some();
        assert_eq!(known, metrics);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_without_metrics_is_chosen_equally_and_scraped_rarely() {
    let engines = engines(2).await;
    engines[0].set_metrics(Some(NoMetrics::Status(404)));
    let balancer = Balancer::over(&engines).await;
    let load = Clients::start(&balancer, 4);
    until_polled(&engines[0], "/health", 30).await;
    assert_eq!(load.end().await, none());
    let asked = polls(&engines[0], "/metrics");
    assert!((1..=6).contains(&asked), "{asked} times");
    let row = &rows(&balancer).await[0];
    for key in ["running", "waiting", "foreign", "kv_usage", "cache_tokens"] {
        assert!(row.get(key).is_none(), "{row}");
    }
    assert_eq!(row["state"], "ready");
    assert!(engines.iter().all(|engine| engine.stats().received > 0));
    let page = balancer.admin(get("/metrics")).await.expect(200);
    let usage = format!("kv_usage{{upstream=\"{}\"", direct(&engines[0]));
    assert!(!page.text().contains(&usage), "{}", page.text());
    engines[0].set_metrics(None);
    until(&balancer, "running", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_metrics_delay_no_probe() {
    let engines = engines(1).await;
    engines[0].set_metrics(Some(NoMetrics::Stall));
    let mut config = config(upstreams(&engines));
    config.health.timeout = Duration::from_secs(60);
    let balancer = Balancer::ready(config).await;
    until_polled(&engines[0], "/health", 20).await;
    assert_eq!(polls(&engines[0], "/metrics"), 1, "it is still being waited for");
    engines[0].set_health(Some(503));
    until(&balancer, "state", "down").await;
    engines[0].set_health(None);
    until(&balancer, "state", "ready").await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    assert_eq!(polls(&engines[0], "/metrics"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_not_scraped_when_disabled() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.health.metrics = false;
    let balancer = Balancer::ready(config).await;
    until_polled(&engines[0], "/health", 10).await;
    assert_eq!(polls(&engines[0], "/metrics"), 0);
    assert!(rows(&balancer).await[0].get("running").is_none());
}
