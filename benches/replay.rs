//! The beginning of a trace, played in real time through the running product over simulated engines, beside
//! the same on the virtual clock of `vllm-lb simulate`: do both give the same picture? `benches/replay.sh`
//! runs this.
//!
//! Engines and clients are this process, the balancer is one of its own. Time runs faster than it did: what
//! is measured is told in seconds of the trace. So whatever the product and this program take for themselves
//! counts as many times as time is faster, and the figures are worth something only while there are cores to
//! spare: the table tells how busy they were.
//!
//! A block of the trace is a text of 512 words of its own, each a token; what is left of a prompt is a text
//! that no other has. Prompts go out as completions, which add nothing to them.

#[path = "../tests/common/mod.rs"]
mod common;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use common::dice::Dice;
use common::process::{Process, Setup};
use common::wire::{Wire, get, post};
use common::{Engine, Options, Timing, direct, eventually};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use vllm_lb::config::types::Preset;
use vllm_lb::sim::replay::load::{Load, Session};
use vllm_lb::sim::replay::policy::Policy;
use vllm_lb::sim::replay::report::{Life, Row};
use vllm_lb::sim::replay::{self, trace};

const UPSTREAMS: usize = 8;

/// Tokens of each engine's cache: what `vllm-lb simulate` takes.
const CACHE_TOKENS: usize = 2_000 * trace::BLOCK;

/// Runs on the virtual clock, which differ by the draws among equals alone.
const SEEDS: u64 = 5;

/// Requests that are sent before time begins, so that connections are there and code is warm.
const WARM: u64 = 16;

const COMPLETIONS: &str = "/v1/completions";

/// A request as it goes out.
struct Ask {
    start: f64,
    prompt: usize,
    output: usize,
    body: String,
}

/// So many tokens of text.
fn words(seed: u64, tokens: usize, text: &mut String) {
    let mut dice = Dice::new(seed, 17);
    for _ in 0..tokens {
        let mut drawn = dice.next();
        text.push(' ');
        for _ in 0..3 {
            text.push(char::from(b'a' + (drawn % 26) as u8));
            drawn /= 26;
        }
    }
}

fn body(prompt: &str, output: usize) -> String {
    json!({
        "model": "sim", "prompt": prompt, "max_tokens": output, "stream": true,
        "stream_options": {"include_usage": true},
    })
    .to_string()
}

fn ask(number: usize, session: &Session, block: usize) -> Ask {
    let turn = session.turns[0];
    let mut prompt = String::with_capacity(4 * turn.prompt);
    session.chain.iter().for_each(|hash| words(*hash, block, &mut prompt));
    words(number as u64, turn.prompt - session.chain.len() * block, &mut prompt);
    Ask { start: session.start, prompt: turn.prompt, output: turn.output, body: body(&prompt, turn.output) }
}

/// Sends a request, and tells how it went in seconds of the trace.
async fn live(address: Arc<str>, names: Arc<[String]>, ask: Ask, due: Instant, speed: f64) -> Life {
    sleep_until(due).await;
    let begun = Instant::now();
    let mut client = Wire::connect(&address).await;
    client.patience = Duration::from_secs(600);
    client.send(post(COMPLETIONS, &ask.body)).await;
    let head = client.head().await;
    let name = head.headers.get("x-vllm-lb-upstream").and_then(|name| name.to_str().ok()).unwrap_or_default();
    let upstream = names.iter().position(|known| known == name).expect("the upstream is told");
    let mut framing = head.framing;
    let mut first = None;
    let mut last = Vec::new();
    while let Some(piece) = client.piece(&mut framing).await.expect("the answer comes whole") {
        first.get_or_insert_with(|| begun.elapsed());
        // The counts stand in the last event but one, which may come in two pieces.
        last.extend_from_slice(&piece);
        let more = last.len().saturating_sub(4_096);
        last.drain(..more);
    }
    assert_eq!(head.status, 200, "{}", String::from_utf8_lossy(&last));
    let (first, end) =
        (first.unwrap_or_default().as_secs_f64() * speed, begun.elapsed().as_secs_f64() * speed);
    let usage = usage(&last).expect("the counts of tokens come at the end");
    assert_eq!(usage["prompt_tokens"], Value::from(ask.prompt), "a word is a token");
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0) as usize;
    let between = (ask.output > 1).then(|| (end - first) / (ask.output - 1) as f64);
    Life { upstream, prompt: ask.prompt, cached, first, between, end }
}

/// The counts of tokens in the last events.
fn usage(last: &[u8]) -> Option<Value> {
    let text = String::from_utf8_lossy(last);
    let events = text.rsplit("data: ").filter_map(|event| serde_json::from_str::<Value>(event.trim()).ok());
    events.map(|mut event| event["usage"].take()).find(Value::is_object)
}

/// Seconds that a process has computed; `self` is this one.
fn computed(process: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    // Linux counts hundredths, whatever the kernel's own clock does.
    ticks / 100.0
}

async fn engines(speed: f64) -> Vec<Engine> {
    let mut engines = Vec::new();
    for seed in 0..UPSTREAMS as u64 {
        let options = Options {
            seed,
            timing: Timing::faster(speed),
            cache_tokens: CACHE_TOKENS,
            block_size: trace::BLOCK,
            max_model_len: CACHE_TOKENS,
            ..Options::default()
        };
        engines.push(Engine::start(options).await.expect("a free port is there"));
    }
    engines
}

/// Waits until the balancer knows how large the caches are, and has connections.
async fn warm_up(process: &Process) {
    eventually("the engines' caches are known", async || {
        let rows = process.admin("/admin/upstreams").await.json();
        let known = |row: &Value| row["cache_tokens"] == Value::from(CACHE_TOKENS);
        rows.as_array().is_some_and(|rows| rows.iter().all(known)).then_some(())
    })
    .await;
    for number in 0..WARM {
        let mut prompt = String::new();
        words(u64::MAX - number, 4, &mut prompt);
        let mut client = Wire::connect(&process.addresses[0]).await;
        client.ask(post(COMPLETIONS, body(&prompt, 2))).await.expect(200);
    }
    Wire::connect(&process.admin).await.ask(get("/ready")).await.expect(200);
}

/// Plays all, and tells how it went, and what share of all cores the balancer and this process took.
async fn play(load: &Load, speed: f64) -> (Row, f64, f64) {
    let asks: Vec<Ask> =
        load.sessions.iter().enumerate().map(|(number, session)| ask(number, session, load.block)).collect();
    let engines = engines(speed).await;
    let process = Setup::over(&engines, "expose: true").start().await;
    warm_up(&process).await;
    let pid = process.pid().to_string();
    let (ours, theirs) = (computed("self"), computed(&pid));
    let names: Arc<[String]> = engines.iter().map(direct).collect();
    let address: Arc<str> = process.addresses[0].as_str().into();
    let begun = Instant::now() + Duration::from_millis(100);
    let mut playing = JoinSet::new();
    for ask in asks {
        let due = begun + Duration::from_secs_f64(ask.start / speed);
        playing.spawn(live(address.clone(), names.clone(), ask, due, speed));
    }
    let mut lives = Vec::new();
    while let Some(life) = playing.join_next().await {
        lives.push(life.expect("every request is answered"));
    }
    let time = begun.elapsed().as_secs_f64();
    let share = |process: &str, before: f64| (computed(process) - before) / time;
    (Row::new("product", UPSTREAMS, &lives, 0), share(&pid, theirs), share("self", ours))
}

/// The same on the virtual clock, once for each seed.
fn simulate(load: &Load) -> Vec<Row> {
    let setup = |seed| replay::Setup {
        upstreams: UPSTREAMS,
        balancers: 1,
        open: false,
        interval: Some(0.02),
        cache_tokens: CACHE_TOKENS,
        speed: 1.0,
        seed,
    };
    let run = |seed| replay::run(load, setup(seed), Policy::Preset(Preset::Work));
    (1..=SEEDS).filter_map(run).collect()
}

fn line(name: &str, row: &Row) {
    println!(
        "| {name} | {:.3} | {:.3} | {:.3} | {:.1} % | {:.2} | {:.2} |",
        row.ttft_mean,
        row.ttft_p50,
        row.ttft_p90,
        100.0 * row.hits,
        row.end_to_end,
        row.imbalance
    );
}

/// The mean of the rows.
fn mean(rows: &[Row]) -> Row {
    let mean = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>() / rows.len().max(1) as f64;
    Row {
        hits: mean(|row| row.hits),
        ttft_mean: mean(|row| row.ttft_mean),
        ttft_p50: mean(|row| row.ttft_p50),
        ttft_p90: mean(|row| row.ttft_p90),
        end_to_end: mean(|row| row.end_to_end),
        imbalance: mean(|row| row.imbalance),
        ..Row::default()
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let number =
        |at: usize, usual: f64| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (Some(path), minutes, speed) = (arguments.first(), number(1, 5.0), number(2, 5.0)) else {
        eprintln!("replay FILE [MINUTES] [SPEED]");
        return ExitCode::FAILURE;
    };
    let text = std::fs::read_to_string(path).expect("the trace can be read");
    let mut load = trace::parse(&text, 1).expect("it is a trace");
    load.sessions.retain(|session| session.start < minutes * 60.0);
    let virtual_rows = simulate(&load);
    let (product, balancer, rest) = play(&load, speed).await;
    println!("| | mean | p50 | p90 | from caches | to the end | most |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (seed, row) in (1..).zip(&virtual_rows) {
        line(&format!("virtual clock, seed {seed}"), row);
    }
    let expected = mean(&virtual_rows);
    line("virtual clock, mean", &expected);
    line(&format!("product, {speed} times faster"), &product);
    let off = |of: fn(&Row) -> f64| 100.0 * (of(&product) / of(&expected) - 1.0);
    println!(
        "\nThe product against the virtual clock: mean {:+.1} %, median {:+.1} %, 90th percentile {:+.1} %.\n\
         {} requests; of one core, the balancer took {:.0} % and engines and clients {:.0} %.",
        off(|row| row.ttft_mean),
        off(|row| row.ttft_p50),
        off(|row| row.ttft_p90),
        product.requests,
        100.0 * balancer,
        100.0 * rest,
    );
    ExitCode::SUCCESS
}
