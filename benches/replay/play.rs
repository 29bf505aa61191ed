//! A load, played in real time and faster through balancers of their own processes over simulated engines of
//! this one: what benches/replay.rs and benches/siblings.rs share. Only loads whose sessions have one turn.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use vllm_lb::config::types::Preset;
use vllm_lb::simulate::load::{ReplayConversation, Workload};
use vllm_lb::simulate::policy::ReplayPolicy;
use vllm_lb::simulate::report::{Life, ReportRow};
use vllm_lb::simulate::{self, trace};

use crate::common::dice::Dice;
use crate::common::process::{Process, Setup};
use crate::common::wire::{Wire, get, post};
use crate::common::{EngineServer, Options, Timing, direct, eventually};

pub const UPSTREAMS: usize = 8;

/// Seconds between two words of a balancer to its siblings, when time goes as it does.
pub const INTERVAL: f64 = 0.02;

/// Tokens of each engine's cache: what `vllm-lb simulate` takes.
const CACHE_TOKENS: usize = 2_000 * trace::BLOCK_TOKENS;

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

fn ask(number: usize, session: &ReplayConversation, block: usize) -> Ask {
    let turn = session.turns[0];
    let mut prompt = String::with_capacity(4 * turn.prompt);
    let chain = session.prompt(0, block);
    chain.iter().for_each(|hash| words(*hash, block, &mut prompt));
    words(number as u64, turn.prompt - chain.len() * block, &mut prompt);
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
    Life { upstream, prompt: ask.prompt, cached, first, between, end, forecast_error: 0.0 }
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

async fn engines(speed: f64) -> Vec<EngineServer> {
    let mut engines = Vec::new();
    for seed in 0..UPSTREAMS as u64 {
        let options = Options {
            seed,
            timing: Timing::faster(speed),
            cache_tokens: CACHE_TOKENS,
            block_size: trace::BLOCK_TOKENS,
            max_model_len: CACHE_TOKENS,
            ..Options::default()
        };
        engines.push(EngineServer::start(options).await.expect("a free port is there"));
    }
    engines
}

/// Waits until the balancer knows how large the caches are, and has connections.
async fn warm_up(process: &Process) {
    eventually("the engines' caches are known", async || {
        let rows = process.admin("/admin/upstreams").await.json();
        let known = |row: &Value| row["cache_tokens"] == CACHE_TOKENS;
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

/// The balancers that receive the requests, in turn.
pub struct Cast<'a> {
    pub speed: f64,
    pub balancers: usize,
    /// Where they meet.
    pub redis: Option<&'a str>,
}

/// How it went, and what share of a core the balancers together and this process took.
pub struct Played {
    pub row: ReportRow,
    pub balancers: f64,
    pub rest: f64,
}

/// Starts the balancers, and waits until each knows the engines and its siblings.
async fn balancers(engines: &[EngineServer], cast: &Cast<'_>) -> Vec<Process> {
    let mut more = "expose: true\n".to_owned();
    if let Some(url) = cast.redis {
        // As much of the trace's time as the usual interval is of real time.
        let interval = (INTERVAL * 1e3 / cast.speed).round().max(1.0);
        more += &format!("redis: {url}\nredis_options: {{interval: {interval}ms}}\n");
    }
    let mut processes = Vec::new();
    for _ in 0..cast.balancers {
        processes.push(Setup::over(engines, &more).start().await);
    }
    let siblings = if cast.redis.is_some() { cast.balancers - 1 } else { 0 };
    for process in &processes {
        warm_up(process).await;
        eventually("all know of each other", async || {
            let page = process.admin("/admin/siblings").await.json();
            let known = page["siblings"].as_array().map_or(0, Vec::len);
            (known == siblings).then_some(())
        })
        .await;
    }
    processes
}

/// Plays all, in order of time and round robin over the balancers.
pub async fn play(load: &Workload, cast: &Cast<'_>) -> Played {
    let asks: Vec<Ask> =
        load.sessions.iter().enumerate().map(|(number, session)| ask(number, session, load.block)).collect();
    let engines = engines(cast.speed).await;
    let processes = balancers(&engines, cast).await;
    let theirs = || processes.iter().map(|process| computed(&process.pid().to_string())).sum::<f64>();
    let before = (theirs(), computed("self"));
    let names: Arc<[String]> = engines.iter().map(direct).collect();
    let addresses: Vec<Arc<str>> =
        processes.iter().map(|process| process.addresses[0].as_str().into()).collect();
    let begun = Instant::now() + Duration::from_millis(100);
    let mut playing = JoinSet::new();
    for (number, ask) in asks.into_iter().enumerate() {
        let due = begun + Duration::from_secs_f64(ask.start / cast.speed);
        let address = addresses[number % addresses.len()].clone();
        playing.spawn(live(address, names.clone(), ask, due, cast.speed));
    }
    let mut lives = Vec::new();
    while let Some(life) = playing.join_next().await {
        lives.push(life.expect("every request is answered"));
    }
    let time = begun.elapsed().as_secs_f64();
    Played {
        row: ReportRow::new("product", UPSTREAMS, &lives, 0),
        balancers: (theirs() - before.0) / time,
        rest: (computed("self") - before.1) / time,
    }
}

/// The same on the virtual clock, once for each seed; without an interval they say nothing to each other.
pub fn simulate(load: &Workload, balancers: usize, interval: Option<f64>) -> Vec<ReportRow> {
    let setup = |seed| simulate::Setup {
        upstreams: UPSTREAMS,
        balancers,
        open: false,
        interval,
        cache_tokens: CACHE_TOKENS,
        speed: 1.0,
        seed,
    };
    let run = |seed| simulate::run(load, setup(seed), ReplayPolicy::Preset(Preset::Work));
    (1..=SEEDS).filter_map(run).collect()
}

/// The heads of the columns of all tables.
pub fn heads() {
    println!("| | mean | p50 | p90 | from caches | to the end | most |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
}

pub fn line(name: &str, row: &ReportRow) {
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
pub fn mean(rows: &[ReportRow]) -> ReportRow {
    let mean = |of: fn(&ReportRow) -> f64| rows.iter().map(of).sum::<f64>() / rows.len().max(1) as f64;
    ReportRow {
        hits: mean(|row| row.hits),
        ttft_mean: mean(|row| row.ttft_mean),
        ttft_p50: mean(|row| row.ttft_p50),
        ttft_p90: mean(|row| row.ttft_p90),
        end_to_end: mean(|row| row.end_to_end),
        imbalance: mean(|row| row.imbalance),
        ..ReportRow::default()
    }
}

/// The first minutes of a trace, or of a shape of load that is made up, in order of time.
pub fn beginning(mut load: Workload, minutes: f64) -> Workload {
    load.sessions.retain(|session| session.start < minutes * 60.0);
    load.sessions.sort_by(|one, other| one.start.total_cmp(&other.start));
    assert!(load.sessions.iter().all(|session| session.turns.len() == 1), "no turn waits for another");
    load
}
