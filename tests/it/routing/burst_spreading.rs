//! Which of several upstreams gets a request: by turn, by what is in flight, by work, by room; and which
//! requests wait, or are refused, when there is no room.

use std::time::Duration;

use crate::common::body::{chat, stream};
use crate::common::wire::{Wire, post};
use crate::common::{Balancer, EngineServer, InjectedFault, config, engines, eventually, upstreams};
use vllm_lb::config::types::{Preset, QueueConfig};

const CHAT: &str = "/v1/chat/completions";

// === presets ===

async fn balanced(engines: &[EngineServer], preset: Preset) -> Balancer {
    let mut config = config(upstreams(engines));
    config.balance = preset.balance();
    Balancer::ready(config).await
}

fn received(engines: &[EngineServer]) -> Vec<u64> {
    engines.iter().map(|engine| engine.stats().received).collect()
}

/// Starts requests that are never answered, one after the other, each when the last is in flight.
async fn pile_up(balancer: &Balancer, engines: &[EngineServer], bodies: &[String]) -> Vec<Wire> {
    let mut clients = Vec::new();
    for body in bodies {
        let before = received(engines).iter().sum::<u64>();
        let mut client = balancer.client().await;
        client.send(post(CHAT, body)).await;
        eventually("the request is there", async || {
            (received(engines).iter().sum::<u64>() == before + 1).then_some(())
        })
        .await;
        clients.push(client);
    }
    clients
}

async fn stalled(count: usize) -> Vec<EngineServer> {
    let engines = engines(count).await;
    for engine in &engines {
        engine.set_fault(InjectedFault::StallHeaders).await;
    }
    engines
}

#[tokio::test(flavor = "multi_thread")]
async fn round_robin_takes_turns() {
    let engines = engines(3).await;
    let balancer = balanced(&engines, Preset::RoundRobin).await;
    for _ in 0..12 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!(received(&engines), [4, 4, 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn least_requests_evens_out_what_is_in_flight() {
    let engines = stalled(3).await;
    let balancer = balanced(&engines, Preset::LeastRequests).await;
    let mut clients = pile_up(&balancer, &engines, &vec![chat("sim"); 12]).await;
    assert_eq!(received(&engines), [4, 4, 4]);
    assert_eq!(balancer.loads().iter().map(|load| load.active).collect::<Vec<_>>(), [4, 4, 4]);
    clients.clear();
    balancer.until_idle().await;
}

/// One upstream has a long prompt to read: short ones go to the other, until that has as much to do.
#[tokio::test(flavor = "multi_thread")]
async fn work_counts_tokens_rather_than_requests() {
    let engines = stalled(2).await;
    let balancer = balanced(&engines, Preset::Work).await;
    let long = chat("sim").replace("hi", &"a long story ".repeat(4_000));
    let mut bodies = vec![long];
    bodies.extend(vec![chat("sim"); 10]);
    let _clients = pile_up(&balancer, &engines, &bodies).await;
    let mut received = received(&engines);
    received.sort_unstable();
    assert_eq!(received, [1, 10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_upstreams_share_by_chance_and_by_weight() {
    let engines = engines(2).await;
    let mut upstreams = upstreams(&engines);
    upstreams[1].weight = 3.0;
    let mut even = config(crate::common::upstreams(&engines));
    let balancer = Balancer::ready(even.clone()).await;
    let mut client = balancer.client().await;
    for _ in 0..60 {
        client.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    // Less than a tenth of all on one side would be one case in a thousand million.
    assert!(received(&engines).iter().all(|count| *count >= 6), "{:?}", received(&engines));
    even.upstreams = upstreams;
    even.balance = Preset::RoundRobin.balance();
    let before = received(&engines);
    let balancer = Balancer::ready(even).await;
    for _ in 0..20 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!((received(&engines)[0] - before[0], received(&engines)[1] - before[1]), (5, 15));
}

// === no room ===

/// Two upstreams with room for two requests each, which have as many that never end.
async fn full(engines: &[EngineServer], queue: QueueConfig) -> (Balancer, Vec<Wire>) {
    let mut upstreams = upstreams(engines);
    upstreams.iter_mut().for_each(|upstream| upstream.max_active = Some(2));
    let mut config = config(upstreams);
    config.queue = queue;
    let balancer = Balancer::ready(config).await;
    for engine in engines {
        engine.set_fault(InjectedFault::StallHeaders).await;
    }
    let mut clients = Vec::new();
    for count in 1..=4 {
        let mut client = balancer.client().await;
        client.send(post(CHAT, stream("sim", 5))).await;
        balancer.until_active(count).await;
        clients.push(client);
    }
    assert!(balancer.loads().iter().all(|load| load.active == 2));
    for engine in engines {
        engine.wait_until("its requests are there", |stats| stats.received == 2).await;
        engine.clear_fault().await;
    }
    (balancer, clients)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limit_get_429() {
    let none = QueueConfig { size: 0, ..QueueConfig::default() };
    let brief = QueueConfig { wait: Duration::from_millis(100), ..QueueConfig::default() };
    for queue in [none, brief] {
        let engines = engines(2).await;
        let (balancer, mut running) = full(&engines, queue).await;
        let mut client = balancer.client().await;
        let refused = client.ask(post(CHAT, chat("sim"))).await.expect(429);
        assert!(refused.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds >= 1));
        assert_eq!(refused.json()["error"]["type"], "RateLimitError");
        let anthropic = client.ask(post("/v1/messages", chat("sim"))).await.expect(429);
        assert_eq!(anthropic.json()["error"]["type"], "rate_limit_error");
        running.pop();
        balancer.until_active(3).await;
        client.ask(post(CHAT, chat("sim"))).await.expect(200);
        running.clear();
        balancer.until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_for_room_and_is_answered() {
    let engines = engines(2).await;
    let (balancer, mut running) = full(&engines, QueueConfig::default()).await;
    let received = || engines.iter().map(|engine| engine.stats().received).sum::<u64>();
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut client = balancer.client().await;
        client.send(post(CHAT, chat("sim"))).await;
        waiting.push(client);
    }
    let mut leaving = balancer.client().await;
    leaving.send(post(CHAT, chat("sim"))).await;
    balancer.until_metric("vllm_lb_in_flight", 8.0).await;
    drop(leaving);
    balancer.until_metric("vllm_lb_in_flight", 7.0).await;
    assert_eq!(received(), 4, "nothing is sent while all are full");
    running.pop();
    for mut client in waiting {
        client.answer().await.expect(200);
    }
    assert_eq!(received(), 7, "who left was not sent");
    running.clear();
    balancer.until_idle().await;
}
