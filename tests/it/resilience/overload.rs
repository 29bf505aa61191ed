//! Five times the load that the fleet can bear: it works at its own pace as before, the queue and its memory
//! stay bounded, requests beyond the queue get a Retry-After, and as soon as the load is over, all is as
//! before. Everything is compared with the same fleet within its limits, in the same run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::common::body::{Place, padded};
use crate::common::wire::{Answer, Wire, post};
use crate::common::{Balancer, config, eventually, gauge_of, paced, upstreams};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const CHAT: &str = "/v1/chat/completions";

/// What the fleet can have at once, and how many wait at the most.
const ENGINES: usize = 2;
const MAX_ACTIVE: u32 = 6;
const FLEET: usize = ENGINES * MAX_ACTIVE as usize;
const QUEUE: usize = 16;

/// Bodies of one size, so that what is held can be told from how many hold it.
const BODY: usize = 100 << 10;

/// The time over which answers are counted, after the load has settled.
const WINDOW: Duration = Duration::from_secs(4);

/// So many looks at the load come between two pages of metrics.
const LOOKS_PER_PAGE: u32 = 5;

/// What the clients of one load have seen.
#[derive(Default)]
struct Seen {
    over: AtomicBool,
    answered: AtomicU64,
    refused: AtomicU64,
}

/// The most that was ever seen of the gauges.
#[derive(Debug, Default)]
struct Most {
    queued: i64,
    held: i64,
    active: u64,
}

/// An answer of 10 tokens, with 20 ms a token.
fn body() -> Vec<u8> {
    let padded = padded(BODY, "sim", Place::First);
    let mut body: serde_json::Value = serde_json::from_slice(&padded).expect("is JSON");
    body["max_tokens"] = json!(10);
    post(CHAT, body.to_string())
}

fn check(answer: &Answer, seen: &Seen) {
    match answer.status {
        200 => {
            assert!(answer.whole && answer.json()["usage"]["completion_tokens"] == 10, "{answer:?}");
            seen.answered.fetch_add(1, Relaxed);
        }
        429 => {
            let seconds: u64 = answer.header("retry-after").parse().expect("a number of seconds");
            assert!((1..=60).contains(&seconds), "{answer:?}");
            assert_eq!(answer.json()["error"]["type"], "RateLimitError");
            seen.refused.fetch_add(1, Relaxed);
        }
        _ => panic!("{answer:?}"),
    }
}

/// Clients that ask one thing after another, and come again long before they are told to.
fn load(balancer: &Balancer, clients: usize) -> (JoinSet<()>, Arc<Seen>) {
    let (mut tasks, seen) = (JoinSet::new(), Arc::new(Seen::default()));
    for _ in 0..clients {
        let (seen, address) = (seen.clone(), balancer.address().to_string());
        tasks.spawn(async move {
            let request = body();
            let mut wire = Wire::connect(&address).await;
            while !seen.over.load(Relaxed) {
                let answer = wire.ask(&request).await;
                check(&answer, &seen);
                if answer.status == 429 {
                    sleep(Duration::from_millis(100)).await;
                }
                if answer.header("connection") == "close" {
                    wire = Wire::connect(&address).await;
                }
            }
        });
    }
    (tasks, seen)
}

/// Answers in the window under a load of so many clients, and the most that was seen meanwhile.
async fn measure(balancer: &Balancer, clients: usize) -> (u64, u64, Most, JoinSet<()>) {
    let (mut tasks, seen) = load(balancer, clients);
    let settled = async || (seen.answered.load(Relaxed) as usize > 2 * FLEET).then_some(());
    eventually("the load has settled", settled).await;
    let (mut most, mut looks) = (Most::default(), 0_u32);
    let (begun, before) = (Instant::now(), seen.answered.load(Relaxed));
    while begun.elapsed() < WINDOW {
        let active = balancer.loads().iter().map(|load| load.active).max().unwrap_or(0);
        most.active = most.active.max(active);
        // A page takes more of the machine than a look at the leases.
        if looks % LOOKS_PER_PAGE == 0 {
            let page = balancer.metrics();
            most.queued = most.queued.max(gauge_of(&page, "vllm_lb_queued"));
            most.held = most.held.max(gauge_of(&page, "vllm_lb_peeked_bytes"));
        }
        looks += 1;
        while let Some(ended) = tasks.try_join_next() {
            ended.expect("a client goes on");
        }
        sleep(Duration::from_millis(2)).await;
    }
    let answered = seen.answered.load(Relaxed) - before;
    (answered, seen.refused.load(Relaxed), most, tasks)
}

/// How long one request takes when there is nothing else.
async fn alone(balancer: &Balancer) -> Duration {
    let begun = Instant::now();
    balancer.ask(body()).await.expect(200);
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn at_five_times_its_load_the_fleet_works_as_before() {
    let step = Duration::from_millis(20);
    let engines = [paced(step).await, paced(step).await];
    let mut config = config(upstreams(&engines));
    for upstream in &mut config.upstreams {
        upstream.max_active = Some(MAX_ACTIVE);
    }
    config.queue.size = QUEUE;
    let balancer = Balancer::ready(config).await;

    // Other processes take more of the machine in one window than in another: a fleet that did worse
    // under load would do so every time.
    let mut seen = Vec::new();
    for _ in 0..4 {
        let before = alone(&balancer).await;
        let (bearable, none_refused, within, mut tasks) = measure(&balancer, FLEET).await;
        tasks.shutdown().await;
        balancer.until_idle().await;
        let (overloaded, refused, most, mut tasks) = measure(&balancer, 5 * FLEET).await;
        // All clients disconnect at once, and another connects.
        tasks.shutdown().await;
        let after = alone(&balancer).await;
        assert_eq!(none_refused, 0, "{within:?}");
        assert!(refused > 0, "nobody was refused");
        assert_eq!(most.active, u64::from(MAX_ACTIVE), "full, and never more than that");
        assert_eq!(most.queued, QUEUE as i64, "full, and never more than that");
        // Refused requests hold their bodies until their answer is written.
        assert!(most.held <= (5 * FLEET * (BODY + (64 << 10))) as i64, "{most:?}");
        balancer.until_idle().await;
        let works = overloaded as f64 >= 0.9 * bearable as f64 && after <= 3 * before;
        seen.push(format!("{overloaded} answers, {bearable} before; alone {after:.1?}, {before:.1?} before"));
        if works {
            seen.clear();
            break;
        }
    }
    assert!(seen.is_empty(), "worse under load every time: {seen:?}");
    for gauge in ["vllm_lb_queued", "vllm_lb_peeked_bytes", "vllm_lb_in_flight"] {
        eventually("nothing is left", async || (balancer.gauge(gauge) == 0).then_some(())).await;
    }
}
