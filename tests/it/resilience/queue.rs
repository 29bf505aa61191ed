//! More requests than the fleet can have at once: they wait, first come, first served, and requests beyond
//! the queue get a Retry-After.

use std::time::Duration;

use crate::common::body::{chat, stream};
use crate::common::clients::{Clients, none};
use crate::common::wire::{JSON, Wire, post, request};
use crate::common::{Balancer, EngineServer, InjectedFault, config, engine, eventually, paced, upstreams};
use vllm_lb::config::types::{Config, RouteConfig};

const CHAT: &str = "/v1/chat/completions";

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

/// One request at a time on each.
fn narrow<'a>(engines: impl IntoIterator<Item = &'a EngineServer>, most: u32) -> Config {
    let mut config = config(upstreams(engines));
    config.upstreams.iter_mut().for_each(|upstream| upstream.max_active = Some(most));
    config
}

async fn queued(balancer: &Balancer, count: usize) {
    eventually(&format!("{count} wait"), async || {
        (balancer.running.fleet.queue().len() == count).then_some(())
    })
    .await;
}

/// The `max_tokens` of a request.
fn tokens_of(body: &[u8]) -> u64 {
    let body: serde_json::Value = serde_json::from_slice(body).expect("is JSON");
    body["max_tokens"].as_u64().expect("is asked for")
}

/// A client whose request waits, as the last of so many.
async fn waiting(balancer: &Balancer, place: usize, body: String) -> Wire {
    let mut client = balancer.client().await;
    client.send(post(CHAT, body)).await;
    queued(balancer, place).await;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_fifo_and_a_disconnect_frees_its_slot() {
    let engine = paced(ENDLESS).await;
    let balancer = Balancer::ready(narrow([&engine], 1)).await;
    let mut running = balancer.client().await;
    running.send(post(CHAT, stream("sim", 10))).await;
    engine.wait_until("it runs", |stats| stats.running == 1).await;
    let mut first = waiting(&balancer, 1, stream("sim", 2)).await;
    let second = waiting(&balancer, 2, stream("sim", 3)).await;
    let mut third = waiting(&balancer, 3, stream("sim", 4)).await;
    assert_eq!(engine.requests().len(), 1);
    drop(second);
    queued(&balancer, 2).await;
    running.answer().await.expect(200);
    first.answer().await.expect(200);
    third.answer().await.expect(200);
    let tokens: Vec<u64> = engine.requests().iter().map(|request| tokens_of(&request.body)).collect();
    assert_eq!(tokens, [10, 2, 4]);
    queued(&balancer, 0).await;
    balancer.until_idle().await;
    assert_eq!(balancer.metric("vllm_lb_queued").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_and_a_long_wait_get_429_with_a_time() {
    let engine = paced(ENDLESS).await;
    let mut config = narrow([&engine], 1);
    config.queue.size = 1;
    config.queue.wait = Duration::from_millis(200);
    let balancer = Balancer::ready(config).await;
    let mut running = balancer.client().await;
    running.send(post(CHAT, stream("sim", 1000))).await;
    balancer.until_active(1).await;
    let mut late = waiting(&balancer, 1, chat("sim")).await;
    for refused in [balancer.ask(post(CHAT, chat("sim"))).await, late.answer().await] {
        let refused = refused.expect(429);
        let seconds: u64 = refused.header("retry-after").parse().expect("whole seconds");
        assert!((1..=60).contains(&seconds), "{seconds}");
        assert_eq!(refused.json()["error"]["type"], "RateLimitError");
    }
    queued(&balancer, 0).await;
    drop(running);
    balancer.until_idle().await;
    balancer.ask(post(CHAT, stream("sim", 1))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_leaves_the_queue_at_once() {
    let engine = paced(ENDLESS).await;
    let balancer = Balancer::ready(narrow([&engine], 1)).await;
    let mut running = balancer.client().await;
    running.send(post(CHAT, stream("sim", 1000))).await;
    balancer.until_active(1).await;
    let mut clients = Vec::new();
    for place in 1..=5 {
        clients.push(waiting(&balancer, place, chat("sim")).await);
    }
    for left in (0..5).rev() {
        drop(clients.swap_remove(0));
        queued(&balancer, left).await;
    }
    drop(running);
    balancer.until_idle().await;
    assert_eq!(engine.requests().len(), 1, "nobody who had left was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn queued_requests_go_to_added_and_recovered_upstreams() {
    let engines = [paced(ENDLESS).await, engine(Default::default()).await];
    let balancer = Balancer::ready(narrow([&engines[0]], 1)).await;
    let mut running = balancer.client().await;
    running.send(post(CHAT, stream("sim", 1000))).await;
    balancer.until_active(1).await;
    let mut first = waiting(&balancer, 1, chat("sim")).await;
    let mut second = waiting(&balancer, 2, chat("sim")).await;
    let added = serde_json::json!({"url": engines[1].url(), "max_active": 1}).to_string();
    balancer.admin(post("/admin/upstreams", added)).await.expect(201);
    first.answer().await.expect(200);
    second.answer().await.expect(200);
    assert_eq!(engines[1].requests().len(), 2);
    // One that said that it is full is asked again when its time is over.
    let busy = InjectedFault::Status { status: 503, body: "{}".into() };
    engines[1].set_fault_for(1, busy).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    drop(running);
    balancer.until_idle().await;
}

/// Each had waited for the upstreams that its route's names stood for when it came.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_joins_a_route_serves_older_requests_first() {
    let engines = [paced(ENDLESS).await, paced(ENDLESS).await];
    let mut config = narrow([&engines[0]], 1);
    let names = vec![config.upstreams[0].name.clone(), "late".to_string()];
    let route = RouteConfig::new(config.timeouts, config.retry);
    config.routes = vec![RouteConfig { upstreams: Some(names), ..route }];
    config.queue.wait = Duration::from_secs(20);
    let balancer = Balancer::ready(config).await;
    let mut running = balancer.client().await;
    running.send(post(CHAT, stream("sim", 10_000))).await;
    balancer.until_active(1).await;
    let mut first = waiting(&balancer, 1, stream("sim", 2)).await;
    let mut second = waiting(&balancer, 2, stream("sim", 3)).await;
    let added = serde_json::json!({"url": engines[1].url(), "name": "late", "max_active": 1}).to_string();
    balancer.admin(post("/admin/upstreams?wait=20s", added)).await.expect(201);
    let late = balancer.ask(post(CHAT, stream("sim", 4))).await.expect(200);
    assert!(late.text().contains("[DONE]"));
    first.answer().await.expect(200);
    second.answer().await.expect(200);
    assert_eq!(engines[1].requests().len(), 3);
    let asked = engines[1].requests().iter().map(|request| tokens_of(&request.body)).collect::<Vec<_>>();
    assert_eq!(asked, [2, 3, 4]);
    drop(running);
    balancer.until_idle().await;
}

/// The stream in flight goes on, so that no place becomes free.
#[tokio::test(flavor = "multi_thread")]
async fn queued_requests_fail_at_once_when_no_upstream_is_left() {
    let drain = r#"{"state":"drain"}"#;
    let table = [("", "", ""), ("PATCH", "", drain), ("DELETE", "", ""), ("DELETE", "?force", "")];
    for (method, query, body) in table {
        let engine = paced(ENDLESS).await;
        let mut config = narrow([&engine], 1);
        config.queue.wait = Duration::from_secs(3600);
        let balancer = Balancer::ready(config).await;
        let mut running = balancer.client().await;
        running.send(post(CHAT, stream("sim", 1000))).await;
        engine.wait_until("it runs", |stats| stats.running == 1).await;
        let mut first = waiting(&balancer, 1, chat("sim")).await;
        let mut second = waiting(&balancer, 2, stream("sim", 3)).await;
        if method.is_empty() {
            engine.set_health(Some(503));
        } else {
            let path = format!("/admin/upstreams/{}{query}", engine.address());
            balancer.admin(request(method, &path, &[JSON], body.as_bytes())).await;
        }
        for client in [&mut first, &mut second] {
            client.answer().await.expect(503);
        }
        queued(&balancer, 0).await;
        assert_eq!(engine.stats().running, 1, "{method} {query}: the stream goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn queued_requests_wait_while_one_upstream_is_left() {
    let engines = [paced(ENDLESS).await, paced(ENDLESS).await];
    let mut config = narrow(&engines, 1);
    config.upstreams[0].weight = 1000.0;
    let balancer = Balancer::ready(config).await;
    let mut running = Vec::new();
    for engine in &engines {
        let mut client = balancer.client().await;
        client.send(post(CHAT, stream("sim", 1000))).await;
        engine.wait_until("it runs", |stats| stats.running == 1).await;
        running.push(client);
    }
    let mut first = waiting(&balancer, 1, stream("sim", 1)).await;
    engines[0].set_health(Some(503));
    balancer.until_ready(1).await;
    drop(running.pop());
    first.answer().await.expect(200);
    assert_eq!(engines.map(|engine| engine.requests().len()), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn five_times_the_load_is_served_at_the_fleets_pace_and_within_its_limits() {
    let engines = [paced(Duration::from_millis(1)).await, paced(Duration::from_millis(1)).await];
    let balancer = Balancer::ready(narrow(&engines, 3)).await;
    let load = Clients::start(&balancer, 30);
    let mut most = 0;
    for _ in 0..20 {
        load.until_more(10).await;
        most = most.max(balancer.loads().iter().map(|load| load.active).max().unwrap_or(0));
    }
    assert_eq!(load.end().await, none());
    assert_eq!(most, 3, "full, and never more than that");
    queued(&balancer, 0).await;
    balancer.until_idle().await;
    for name in ["vllm_lb_queued", "vllm_lb_in_flight"] {
        balancer.until_metric(name, 0.0).await;
    }
}
