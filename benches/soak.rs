//! A million requests of mixed shapes through one process, over simulated engines that take no time: does
//! its memory stay what it was after the first hundred thousand? `benches/soak.sh` runs this.
//!
//! All that costs memory somewhere takes part: streams and whole answers of all interfaces, bodies of all
//! sizes, HTTP/2, connections kept and thrown away, clients that leave, refusals, failing engines, and
//! upstreams and configurations that change.

#[path = "../tests/it/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::body::padded;
use common::dice::Dice;
use common::h2::{self, H2};
use common::process::{Process, Setup};
use common::wire::{CHUNKED, JSON, Wire, chunk, get, head, post, request, with_host};
use common::{EngineServer, InjectedFault, engines};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const ENGINES: usize = 4;
const CLIENTS: u64 = 32;

/// Requests between two looks at the memory, and those after which it has to stay.
const LOOK: u64 = 50_000;
const SETTLED: u64 = 100_000;

/// Beyond this share of what it took before, it grows.
const FLAT: f64 = 1.1;

const PATHS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"];

/// What all clients share.
struct World {
    address: String,
    /// Requests to begin.
    left: AtomicU64,
    done: AtomicU64,
    refused: AtomicU64,
    broken: AtomicU64,
}

impl World {
    fn take(&self) -> bool {
        self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn count(&self, answer: &common::wire::Answer) {
        let broken =
            !answer.whole || answer.header("content-type").contains("event-stream") && is_cut(answer);
        self.broken.fetch_add(u64::from(broken), Relaxed);
        self.refused.fetch_add(u64::from(answer.status >= 400), Relaxed);
        self.done.fetch_add(1, Relaxed);
    }
}

fn is_cut(answer: &common::wire::Answer) -> bool {
    memchr::memmem::find(&answer.body, b"\"error\":{").is_some()
}

/// A request of any interface and shape.
fn body(path: &str, dice: &mut Dice) -> String {
    let tokens = if dice.once_in(50) { 200 } else { dice.between(1, 12) };
    let words = if dice.once_in(10) { dice.between(100, 2000) } else { dice.between(1, 50) };
    let prompt: String = (0..words).map(|_| format!("w{} ", dice.between(0, 9999))).collect();
    let model = if dice.once_in(100) { "unknown" } else { "sim" };
    let mut body = json!({"model": model, "stream": dice.once_in(2)});
    let (input, limit) = match path {
        "/v1/completions" => ("prompt", "max_tokens"),
        "/v1/responses" => ("input", "max_output_tokens"),
        _ => ("messages", "max_tokens"),
    };
    body[limit] = tokens.into();
    body[input] = match input {
        "messages" => json!([{"role": "user", "content": prompt}]),
        _ => Value::from(prompt),
    };
    body.to_string()
}

async fn client(world: Arc<World>, mut dice: Dice) {
    let mut wire = Wire::connect(&world.address).await;
    let mut http2 = H2::connect(&world.address).await;
    while world.take() {
        let path = *dice.one_of(&PATHS);
        let text = body(path, &mut dice);
        let answer = match dice.between(0, 99) {
            0..=64 => wire.ask(post(path, text)).await,
            65..=79 => http2.ask(h2::post(path), &[Bytes::from(text)]).await,
            80..=84 => {
                http2 = H2::connect(&world.address).await;
                Wire::connect(&world.address).await.ask(post(path, text)).await
            }
            85..=89 => {
                wire.send(head("POST", path, &[JSON, CHUNKED])).await;
                for piece in text.as_bytes().chunks(500) {
                    wire.send(chunk(piece)).await;
                }
                wire.ask(chunk(b"")).await
            }
            90 if dice.once_in(3) => {
                let size = dice.between(100 << 10, 3 << 20) as usize;
                wire.ask(post(PATHS[0], padded(size, "sim", common::body::Place::First))).await
            }
            90..=92 => wire.ask(get("/v1/models")).await,
            93 => wire.ask(get("/nowhere")).await,
            _ => {
                leave(&world.address, post(path, text), &mut dice).await;
                world.done.fetch_add(1, Relaxed);
                continue;
            }
        };
        world.count(&answer);
        if answer.header("connection") == "close" || is_cut(&answer) {
            wire = Wire::connect(&world.address).await;
        }
    }
}

/// Leaves within its request, before the answer, or within it.
async fn leave(address: &str, request: Vec<u8>, dice: &mut Dice) {
    let mut wire = Wire::connect(address).await;
    let length = if dice.once_in(3) { request.len() / 2 } else { request.len() };
    wire.send(&request[..length]).await;
    if length == request.len() && dice.once_in(2) {
        let Some(head) = wire.any_head().await else { return };
        let mut framing = head.framing;
        drop(wire.piece(&mut framing).await);
    }
}

/// Something happens to the engines and to the balancer, and passes.
async fn trouble(process: &Process, engines: &[EngineServer], dice: &mut Dice) {
    let engine = dice.one_of(engines);
    // Too few to trip a breaker: refusals are quick, and would be most of a million requests.
    let few = 4;
    match dice.between(0, 4) {
        0 => engine.set_fault_for(few, InjectedFault::CutHeaders { reset: true }).await,
        1 => engine.set_fault_for(few, InjectedFault::CutStream { events: 4, reset: false }).await,
        2 => {
            engine.set_fault(InjectedFault::Refuse).await;
            engine.restart().await;
            engine.clear_fault().await;
        }
        3 => {
            let path = format!("/admin/upstreams/{}", engine.address());
            admin(process, request("DELETE", &path, &[], b"")).await;
            let config = json!({"url": engine.url()}).to_string();
            admin(process, post("/admin/upstreams?wait=10s", config)).await;
        }
        _ => admin(process, request("POST", "/admin/reload", &[], b"")).await,
    }
}

async fn admin(process: &Process, request: Vec<u8>) {
    let answer = Wire::connect(&process.admin).await.ask(with_host(&request, &process.admin)).await;
    assert!(answer.status < 400, "{answer:?}");
}

/// Kilobytes of a process that are in memory.
fn resident(process: &Process) -> u64 {
    let path = format!("/proc/{}/status", process.pid());
    let status = std::fs::read_to_string(path).expect("the process is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).expect("a process has memory")
}

/// What the process had in memory while so many requests went through, in kilobytes: looked at all the time,
/// since single looks differ by the large bodies that happen to be on their way.
#[derive(Default)]
struct Look {
    looks: u64,
    sum: u64,
    most: u64,
}

impl Look {
    fn take(&mut self, memory: u64) {
        self.looks += 1;
        self.sum += memory;
        self.most = self.most.max(memory);
    }

    fn mean(&self) -> f64 {
        self.sum as f64 / self.looks.max(1) as f64
    }
}

/// Looks at the memory until all requests are done; the mean of each so many.
async fn watch(world: &World, process: &Process, engines: &[EngineServer], requests: u64) -> Vec<f64> {
    let (begun, mut dice, mut means) = (Instant::now(), Dice::new(2, 2), Vec::new());
    println!("| requests | resident, mean MiB | most MiB | requests a second | refused | broken |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    let (mut next, mut troubled, mut look) = (LOOK, 0, Look::default());
    while next <= requests {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let done = world.done.load(Relaxed);
        if done / 5_000 > troubled {
            troubled = done / 5_000;
            trouble(process, engines, &mut dice).await;
        }
        look.take(resident(process));
        if done >= next {
            let pace = done as f64 / begun.elapsed().as_secs_f64();
            let (mean, most) = (look.mean() / 1024.0, look.most as f64 / 1024.0);
            let (refused, broken) = (world.refused.load(Relaxed), world.broken.load(Relaxed));
            println!("| {next} | {mean:.1} | {most:.1} | {pace:.0} | {refused} | {broken} |");
            means.push(mean);
            (next, look) = (next + LOOK, Look::default());
        }
    }
    means
}

/// The second half of the time after it has settled, as a share of the first.
fn growth(means: &[f64]) -> f64 {
    let settled = &means[means.len().min((SETTLED / LOOK) as usize)..];
    let (first, second) = settled.split_at(settled.len() / 2);
    let mean = |means: &[f64]| means.iter().sum::<f64>() / means.len().max(1) as f64;
    mean(second) / mean(first)
}

#[tokio::main]
async fn main() {
    let requests = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    let engines = engines(ENGINES).await;
    let setup = Setup::over(&engines, "");
    let process = setup.start().await;
    let world = Arc::new(World {
        address: process.addresses[0].clone(),
        left: AtomicU64::new(requests),
        done: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        broken: AtomicU64::new(0),
    });
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        clients.spawn(client(world.clone(), Dice::new(1, number)));
    }
    let means = watch(&world, &process, &engines, requests).await;
    while let Some(ended) = clients.join_next().await {
        ended.expect("a client does not panic");
    }
    let growth = growth(&means);
    println!("\nFrom {SETTLED} requests on, the second half has {growth:.3} of the mean of the first.");
    assert!(growth <= FLAT, "memory grows: {means:?}");
}
