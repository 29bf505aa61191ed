//! The clients of benches/table.sh's comparison of routing: they play traffic in real time, faster than it
//! was, through a balancer over simulated engines, and print one row of numbers.
//!
//! ```text
//! player play conversation --target 127.0.0.1:8000 --engines 8101,8102 --trace FILE --speed 20 ...
//! player clock rag --upstreams 8 --minutes 4       the same on the virtual clock of `vllm-lb simulate`
//! ```
//!
//! A row: requests, failed requests, mean, median, 90th and 99th percentile of the time to the first token,
//! share of prompt tokens that the engines had cached, time to the end, requests on the engine with the
//! most of them as a multiple of an even share; then, of a real run, cores that the balancer, engines and
//! clients, and other processes used. Times are seconds of the traffic. Each is counted from when the
//! request was due, so that a client that falls behind counts against nothing but the figures.

#[path = "../proxies/meter.rs"]
#[allow(dead_code, reason = "the other programs read memory, too")]
mod meter;
mod traffic_plan;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use meter::{Meter, Sample};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use traffic_plan::{PlannedSession, TrafficKind};
use vllm_lb::config::types::Preset;
use vllm_lb::simulate;
use vllm_lb::simulate::policy::ReplayPolicy;
use vllm_lb::simulate::report::{Life, ReportRow};

/// Requests before time begins, so that connections are open and code is warm.
const WARM_REQUESTS: u64 = 16;

/// Turns that wait for answers begin within so many times the minutes of the traffic: behind an engine with
/// an endless queue the last of them would come hours later.
const LATEST_TURN: f64 = 2.0;

/// A request without an answer after so many times the minutes of the traffic has failed.
const LATEST_ANSWER: f64 = 3.0;

/// Until the first request is due.
const LEAD: Duration = Duration::from_millis(200);

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Play the traffic through a balancer
    Play {
        #[command(flatten)]
        traffic: Traffic,
        /// Address of the balancer
        #[arg(long)]
        target: String,
        /// Ports of the engines
        #[arg(long, value_delimiter = ',')]
        engines: Vec<u16>,
        /// How many times faster than it was
        #[arg(long)]
        speed: f64,
        /// Process of the balancer
        #[arg(long)]
        balancer: u32,
        /// Process of the engines
        #[arg(long)]
        engine: u32,
        /// The cores of the machine
        #[arg(long, value_delimiter = ',', default_value = "0,1")]
        cores: Vec<u32>,
    },
    /// Replay it on the virtual clock with the policy of the product
    Clock {
        #[command(flatten)]
        traffic: Traffic,
        #[arg(long)]
        upstreams: usize,
    },
    /// Print the tokens that a cache of the traffic's engines holds
    Cache {
        #[command(flatten)]
        traffic: Traffic,
    },
}

#[derive(Args)]
struct Traffic {
    kind: TrafficKind,
    /// A trace of Mooncake's form, of which conversations are made
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Minutes of it
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// How many times faster the requests arrive, engines as they are
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
}

/// What one request took, in seconds of the traffic.
struct PlayedRequest {
    prompt: usize,
    cached: usize,
    first: f64,
    end: f64,
}

/// Where requests go, and the beginning, end and pace of time.
struct Stage {
    target: String,
    begun: Instant,
    /// In seconds of the traffic.
    latest_answer: f64,
    speed: f64,
}

// === impl Stage ===

impl Stage {
    fn at(&self, seconds: f64) -> Instant {
        self.begun + Duration::from_secs_f64(seconds / self.speed)
    }

    fn seconds(&self, time: Instant) -> f64 {
        time.saturating_duration_since(self.begun).as_secs_f64() * self.speed
    }

    /// Sends a turn when it is due.
    async fn turn(&self, session: &PlannedSession, turn: usize, due: f64) -> Result<PlayedRequest, String> {
        sleep_until(self.at(due)).await;
        let body = session.body(turn);
        let answer = timeout_at(self.at(self.latest_answer), wire::exchange(&self.target, &body));
        let answer =
            answer.await.map_err(|_| format!("no answer after {:.0} s", self.latest_answer - due))??;
        let prompt = session.turns[turn].prompt;
        if answer.prompt_tokens != prompt {
            return Err(format!("a prompt of {prompt} tokens was counted as {}", answer.prompt_tokens));
        }
        Ok(PlayedRequest {
            prompt,
            cached: answer.cached_tokens,
            first: self.seconds(answer.first) - due,
            end: self.seconds(answer.end) - due,
        })
    }
}

/// Plays a session: each turn by the clock, or each when the answer before it has come, up to a latest time.
async fn play_session(
    stage: Arc<Stage>,
    session: Arc<PlannedSession>,
    closed_until: Option<f64>,
) -> Vec<Result<PlayedRequest, String>> {
    let mut due = session.start;
    if let Some(latest) = closed_until {
        let mut played = Vec::new();
        for turn in 0..session.turns.len() {
            due += session.turns[turn].wait;
            if due > latest {
                break;
            }
            let answer = stage.turn(&session, turn, due).await;
            due = answer.as_ref().map_or(stage.seconds(Instant::now()), |answer| due + answer.end);
            played.push(answer);
        }
        return played;
    }
    let mut tasks = JoinSet::new();
    for turn in 0..session.turns.len() {
        due += session.turns[turn].wait;
        let (stage, session) = (stage.clone(), session.clone());
        tasks.spawn(async move { stage.turn(&session, turn, due).await });
    }
    tasks.join_all().await
}

async fn warm_up(target: &str) -> Result<(), String> {
    for number in 0..WARM_REQUESTS {
        wire::exchange(target, &traffic_plan::short_request(number)).await?;
    }
    Ok(())
}

/// Requests that each engine has finished, by its metrics.
async fn finished(engines: &[u16]) -> Result<Vec<f64>, String> {
    let mut finished = Vec::new();
    for port in engines {
        let page = wire::get(&format!("127.0.0.1:{port}"), "/metrics").await?;
        let counts = page.lines().filter(|line| line.starts_with("vllm:request_success_total{"));
        finished.push(counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum());
    }
    Ok(finished)
}

/// The largest share of requests on one engine, as a multiple of an even share.
fn imbalance(before: &[f64], after: &[f64]) -> f64 {
    let requests: Vec<f64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    let (sum, most) = (requests.iter().sum::<f64>(), requests.iter().copied().fold(0.0, f64::max));
    most * requests.len() as f64 / sum.max(1.0)
}

fn row_of(played: &[PlayedRequest]) -> ReportRow {
    // The engine of each request is counted by the engines' metrics.
    let life = |one: &PlayedRequest| Life {
        upstream: 0,
        prompt: one.prompt,
        cached: one.cached,
        first: one.first,
        forecast_error: 0.0,
        between: None,
        end: one.end,
    };
    let lives: Vec<Life> = played.iter().map(life).collect();
    ReportRow::new("played", 1, &lives, 0)
}

fn numbers(row: &ReportRow, failed: usize, imbalance: f64) -> String {
    let ReportRow { requests, ttft_mean, ttft_p50, ttft_p90, ttft_p99, hits, end_to_end, .. } = row;
    format!(
        "{requests} {failed} {ttft_mean:.4} {ttft_p50:.4} {ttft_p90:.4} {ttft_p99:.4} {hits:.4} \
         {end_to_end:.3} {imbalance:.3}"
    )
}

async fn play(
    traffic: &Traffic,
    stage: (String, f64),
    engines: &[u16],
    meter: Meter,
) -> Result<String, String> {
    let load = traffic_plan::load(traffic.kind, traffic.trace.as_deref(), traffic.minutes, traffic.rate)?;
    let sessions: Vec<_> = traffic_plan::sessions(&load).into_iter().map(Arc::new).collect();
    let (target, speed) = stage;
    warm_up(&target).await?;
    let counted = finished(engines).await?;
    let latest_answer = traffic.minutes * 60.0 * LATEST_ANSWER;
    let stage = Arc::new(Stage { target, begun: Instant::now() + LEAD, latest_answer, speed });
    let before = meter.read()?;
    let mut playing = JoinSet::new();
    let closed_until = traffic.kind.is_closed().then_some(traffic.minutes * 60.0 * LATEST_TURN);
    for session in sessions {
        playing.spawn(play_session(stage.clone(), session, closed_until));
    }
    let (mut played, mut failed) = (Vec::new(), 0);
    while let Some(session) = playing.join_next().await {
        for request in session.map_err(|error| error.to_string())? {
            match request {
                Ok(request) => played.push(request),
                Err(error) => {
                    if failed == 0 {
                        eprintln!("player: {error}");
                    }
                    failed += 1;
                }
            }
        }
    }
    let Sample { busy, ends, foreign, .. } = meter.sample(&before, played.len().max(1))?;
    let imbalance = imbalance(&counted, &finished(engines).await?);
    Ok(format!("{} {busy:.2} {ends:.2} {foreign:.2}", numbers(&row_of(&played), failed, imbalance)))
}

fn clock(traffic: &Traffic, upstreams: usize) -> Result<String, String> {
    let load = traffic_plan::load(traffic.kind, traffic.trace.as_deref(), traffic.minutes, traffic.rate)?;
    let setup = simulate::Setup {
        upstreams,
        balancers: 1,
        open: !traffic.kind.is_closed(),
        interval: None,
        cache_tokens: traffic.kind.cache_tokens(),
        speed: 1.0,
        seed: 1,
    };
    let row = simulate::run(&load, setup, ReplayPolicy::Preset(Preset::Work)).ok_or("too many upstreams")?;
    Ok(numbers(&row, row.refused, row.imbalance))
}

#[tokio::main]
async fn main() -> ExitCode {
    let printed = match Arguments::parse().command {
        Command::Play { traffic, target, engines, speed, balancer, engine, cores } => {
            let meter = Meter::new(Some(balancer), vec![engine, std::process::id()], &cores);
            play(&traffic, (target, speed), &engines, meter).await
        }
        Command::Clock { traffic, upstreams } => clock(&traffic, upstreams),
        Command::Cache { traffic } => Ok(traffic.kind.cache_tokens().to_string()),
    };
    match printed {
        Ok(row) => {
            println!("{row}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("player: {error}");
            ExitCode::FAILURE
        }
    }
}
