//! How long a process takes to hand its prefix index over to the next one: `benches/handover.sh` runs this.
//!
//! A balancer learns the chains of a sibling that exists on the stream only. Then processes take over from
//! each other, without a Redis, while a client sends requests one after the other.

#[path = "../tests/it/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::body::chat;
use common::process::{Process, Setup};
use common::redis::Redis;
use common::wire::{Wire, post};
use common::{EngineServer, engine, eventually};
use vllm_lb::engine::http::Options;
use vllm_lb::prompt::canon::FORM_VERSION;
use vllm_lb::prompt::chain::BlockLayout;
use vllm_lb::prompt::chain::thinning::{stored_count, stored_depth};
use vllm_lb::state::exchange::{ChainUpdate, Message, fingerprint};

const ENGINES: usize = 8;

/// The blocks of each conversation, as agents have them.
const CHAIN_BLOCKS: usize = 800;

/// At least the tokens of one block of 512 bytes.
const BLOCK_TOKENS: usize = 512;

/// The conversations in one message, of 8 KiB.
const CHAINS_A_MESSAGE: usize = 8;

const STREAM: &str = "vllm-lb:{lb}:chains";

/// The requests that a client sends during a hand-over.
#[derive(Default)]
struct Requests {
    sent: usize,
    failed: usize,
    longest: Duration,
}

/// Scatters numbers over 64 bits, as hashes are.
fn scatter(number: u64) -> u64 {
    let mixed = (number ^ (number >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 27)
}

/// Publishes whole chains with so many blocks together.
async fn publish(redis: &Redis, names: &[String], blocks: usize) {
    let stored = stored_count(CHAIN_BLOCKS);
    let chains = (0..blocks.div_ceil(CHAIN_BLOCKS)).collect::<Vec<_>>();
    for (sequence, numbers) in (1..).zip(chains.chunks(CHAINS_A_MESSAGE)) {
        let chain = |number: &usize| {
            let hash = |one| scatter((*number as u64 + 1) << 16 | stored_depth(one) as u64);
            let (upstream, hashes) = (names[number % names.len()].as_str(), (1..=stored).map(hash));
            let hashes = hashes.collect::<Vec<u64>>().into();
            ChainUpdate { upstream, parent: None, depth: 0, hashes, end: None }
        };
        let mut message = Message::new(42, sequence);
        message.fingerprint = Some(fingerprint(FORM_VERSION, BlockLayout::default().bytes));
        message.chains = numbers.iter().map(chain).collect();
        redis.add(STREAM, &message.encode()).await;
    }
}

async fn pairs(process: &Process) -> usize {
    let page = process.admin("/metrics").await;
    let value = page.text().lines().find_map(|line| line.strip_prefix("vllm_lb_index_pairs "));
    value.and_then(|value| value.parse::<f64>().ok()).unwrap_or(0.0) as usize
}

/// Sends one request after the other until `stop`, each on a connection of its own.
async fn send_requests(address: String, stop: Arc<AtomicBool>) -> Requests {
    let mut requests = Requests::default();
    while !stop.load(Relaxed) {
        let start = Instant::now();
        let answer = Wire::connect(&address).await.ask(post("/v1/chat/completions", chat("sim"))).await;
        requests.sent += 1;
        requests.failed += usize::from(answer.status != 200);
        requests.longest = requests.longest.max(start.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    requests
}

/// Starts a process that takes over, and prints a row of the table.
async fn hand_over(setup: &Setup, running: Process) -> Process {
    let before = pairs(&running).await;
    let stop = Arc::<AtomicBool>::default();
    let client = tokio::spawn(send_requests(running.addresses[0].clone(), stop.clone()));
    let start = Instant::now();
    let next = setup.upgrade().await;
    let took = start.elapsed();
    let record = next.says("took the prefix index over").await;
    stop.store(true, Relaxed);
    let requests = client.await.expect("the client does not panic");
    println!(
        "| {before} | {} | {:.2} s | {} | {:.2} s | {} | {} | {:.0} ms |",
        record["blocks"],
        record["seconds"].as_f64().unwrap_or(f64::NAN),
        record["whole"],
        took.as_secs_f64(),
        requests.sent,
        requests.failed,
        requests.longest.as_secs_f64() * 1e3
    );
    next
}

async fn measure(blocks: usize, rounds: usize) {
    let redis = Redis::start(&[]).await;
    // The balancer holds no more blocks of an engine than the engine's cache has room for.
    let cache =
        Options { cache_tokens: blocks * BLOCK_TOKENS, block_size: BLOCK_TOKENS, ..Options::default() };
    let mut engines: Vec<EngineServer> = Vec::new();
    for seed in 0..ENGINES as u64 {
        engines.push(engine(Options { seed, ..cache.clone() }).await);
    }
    let limit = format!("balance: {{index_blocks: {}}}", blocks + blocks / 2);
    let setup = Setup::over(&engines, &format!("{limit}\nredis: {}", redis.url()));
    let mut running = setup.start().await;
    let names: Vec<String> = engines.iter().map(|engine| engine.address().to_string()).collect();
    publish(&redis, &names, blocks).await;
    eventually("the chains are learned", async || (pairs(&running).await >= blocks).then_some(())).await;
    let urls: Vec<String> = engines.iter().map(|engine| format!("{:?}", engine.url())).collect();
    setup.write(&urls.join(", "), &limit);
    println!(
        "| blocks | taken over | learned in | whole | process ready after | requests | failed | longest |\n\
         | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    );
    for _ in 0..rounds {
        running = hand_over(&setup, running).await;
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let number =
        |at: usize, usual: usize| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(measure(number(0, 4_000_000), number(1, 3)));
}
