//! What the exchange over Redis takes: how long until a sibling knows, and what Redis has to do for it.
//! `benches/exchange.sh` runs this.

#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/it/cluster/exchange/board.rs"]
mod board;
#[path = "../tests/it/common/mod.rs"]
mod common;

use std::time::Duration;

use board::Board;
use common::redis::Redis;
use redis::Value;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use vllm_lb::state::exchange::Binding;

/// Chains that are sent through one balancer, and awaited at the other.
const TRIES: u64 = 1000;

/// Between two looks.
const LOOK: Duration = Duration::from_micros(200);

/// Balancers, and requests a second of each: all run in this process, which has to learn what each of them
/// hears of all others.
const LOADS: [(u64, u64); 4] = [(1, 1000), (4, 1000), (4, 100), (16, 100)];

/// New blocks of each request, upstreams, and for how long.
const BLOCKS: u64 = 16;
const UPSTREAMS: u64 = 8;
const TIME: Duration = Duration::from_secs(5);

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        converge().await;
        println!();
        println!(
            "| balancers | requests/s of each | commands/s | bytes/s in | bytes/s out | of a core of Redis \
             | in a message |"
        );
        println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
        for (balancers, rate) in LOADS {
            cost(balancers, rate).await;
        }
    });
}

/// How long until what one balancer was sent is known to the other.
async fn converge() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await);
    let mut times = Vec::new();
    for number in 1..=TRIES {
        let chain: Vec<u64> = (0..BLOCKS).map(|block| number << 32 | block).collect();
        let start = Instant::now();
        a.send("u1", &chain);
        while b.held("u1", &chain) < chain.len() {
            sleep(LOOK).await;
        }
        times.push(start.elapsed());
        // Not in step with the ticks of either.
        sleep(Duration::from_micros(number * 7919 % 20_000)).await;
    }
    times.sort();
    println!("| p1 | p10 | p50 | p90 | p99 | most |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    let cells: Vec<String> =
        [0.01, 0.1, 0.5, 0.9, 0.99, 1.0].iter().map(|share| format!("{:.1} ms", at(*share))).collect();
    println!("| {} |", cells.join(" | "));
}

/// What Redis has done since it was started, or last asked.
async fn info(redis: &Redis, name: &str) -> f64 {
    let Value::BulkString(text) = redis.ask(&["INFO", "all"]).await else { return 0.0 };
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0.0)
}

async fn cost(balancers: u64, rate: u64) {
    let redis = Redis::start(&[]).await;
    let mut boards = Vec::new();
    for number in 0..balancers {
        boards.push(Board::begun(&redis.url(), &format!("lb-{number}")).await);
    }
    const NAMES: [&str; 5] = [
        "total_commands_processed",
        "total_net_input_bytes",
        "total_net_output_bytes",
        "used_cpu_user",
        "used_cpu_sys",
    ];
    let mut before = Vec::new();
    for name in NAMES {
        before.push(info(&redis, name).await);
    }
    let start = Instant::now();
    let all = boards.iter().enumerate().map(|(number, board)| load(number as u64, board, rate, start));
    futures_util::future::join_all(all).await;
    let seconds = start.elapsed().as_secs_f64();
    let mut did = Vec::new();
    for (name, before) in NAMES.iter().zip(before) {
        did.push((info(&redis, name).await - before) / seconds);
    }
    let messages = redis.count(&["XLEN", "vllm-lb:{lb}:stream"]).await as f64 / seconds;
    println!(
        "| {balancers} | {rate} | {:.0} | {:.0} | {:.0} | {:.0} % | {:.0} bytes |",
        did[0],
        did[1],
        did[2],
        (did[3] + did[4]) * 100.0,
        did[1] / messages,
    );
}

/// So many requests a second through one balancer: each is a turn with some new blocks, of a session.
async fn load(number: u64, board: &Board, rate: u64, start: Instant) {
    let mut tick = interval(Duration::from_secs(1) / rate as u32);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut sent = 0;
    while start.elapsed() < TIME {
        tick.tick().await;
        sent += 1;
        let upstream = format!("10.0.0.{}:8000", sent % UPSTREAMS);
        let conversation = ((number << 20) | (sent % 500)) << 32;
        let turn = sent / 500 % 4 + 1;
        let chain: Vec<u64> = (0..turn * BLOCKS).map(|block| conversation | block).collect();
        board.set(&upstream, sent % 50);
        board.send(&upstream, &chain);
        board.bind(Binding::Session, &format!("{conversation:x}"), &upstream);
    }
}
