//! What the messages of many siblings take from a balancer: `benches/exchange_scale.sh` runs this.
//!
//! One balancer is a real process, with a real Redis and a light load of its own. Its siblings exist on the
//! stream only (`exchange_scale/siblings.rs`): they publish what balancers under load publish. Quiet and loud
//! stretches of time follow each other; processor time is that of each process, or of the threads that play
//! one part in this one.

#[path = "../tests/it/common/mod.rs"]
mod common;
#[path = "exchange_scale/meter.rs"]
mod meter;
#[path = "exchange_scale/siblings.rs"]
mod siblings;
#[path = "exchange_scale/stage.rs"]
mod stage;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use meter::CpuSeconds;
use siblings::{Published, SiblingTraffic};
use stage::{Latencies, Probe, Stage, load, redis_info, runtime};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Requests a second of the balancer's own.
const OWN_RATE: u32 = 100;

/// Before a stretch is measured: siblings publish whole chains at first, and expire at last.
const SETTLE: Duration = Duration::from_secs(5);

/// A writer that reaches less of its rate was not measured at that rate.
const REACHED: f64 = 0.97;

/// Probes after the loud stretches.
const PROBES: usize = 10;

/// What is measured.
struct Scenario {
    name: &'static str,
    upstreams: usize,
    traffic: SiblingTraffic,
    /// Balancers that only read, beside the measured one, in the last stretch.
    readers: u64,
}

const SCENARIOS: [Scenario; 3] = [
    Scenario {
        name: "16 x 1,000/s, 64 upstreams, chains to 256 blocks",
        upstreams: 64,
        traffic: SiblingTraffic { siblings: 16, rate: 1000, last_blocks: 256, conversations: 150 },
        readers: 15,
    },
    Scenario {
        name: "16 x 1,000/s, 64 upstreams, chains to 800 blocks",
        upstreams: 64,
        traffic: SiblingTraffic { siblings: 16, rate: 1000, last_blocks: 800, conversations: 60 },
        readers: 15,
    },
    Scenario {
        name: "100 x 100/s, 1,000 upstreams, chains to 256 blocks",
        upstreams: 1000,
        traffic: SiblingTraffic { siblings: 100, rate: 100, last_blocks: 256, conversations: 100 },
        readers: 9,
    },
];

/// One runtime for each part of this process; the meter reads the processor time of each.
struct Runtimes {
    engines: Runtime,
    siblings: Runtime,
    readers: Runtime,
}

/// What Redis has moved, in bytes since its start, and how much it computed.
#[derive(Clone, Copy)]
struct RedisCounts {
    commands: f64,
    bytes_in: f64,
    bytes_out: f64,
}

/// One stretch of time.
struct Stretch {
    cpu: CpuSeconds,
    own: Latencies,
    /// Per second: requests and messages of siblings, messages that the balancer heard.
    requests: f64,
    messages: f64,
    heard: f64,
    /// Of each message.
    message_bytes: f64,
    oldest: f64,
    redis: RedisCounts,
}

// === impl RedisCounts ===

impl RedisCounts {
    async fn read(stage: &Stage) -> Self {
        RedisCounts {
            commands: redis_info(&stage.redis, "total_commands_processed").await,
            bytes_in: redis_info(&stage.redis, "total_net_input_bytes").await,
            bytes_out: redis_info(&stage.redis, "total_net_output_bytes").await,
        }
    }

    fn since(&self, before: &Self, seconds: f64) -> Self {
        RedisCounts {
            commands: (self.commands - before.commands) / seconds,
            bytes_in: (self.bytes_in - before.bytes_in) / seconds,
            bytes_out: (self.bytes_out - before.bytes_out) / seconds,
        }
    }
}

// === impl Stretch ===

impl Stretch {
    /// Measures for so long, with the balancer's own load.
    async fn measure(stage: &Stage, published: &Published, time: Duration) -> Self {
        let heard = async || stage.metric("vllm_lb_exchange_messages_total", "heard").await;
        let count = || [&published.requests, &published.messages, &published.bytes].map(|n| n.load(Relaxed));
        let (redis, heard_before, said_before) = (RedisCounts::read(stage).await, heard().await, count());
        let (start, cpu) = (Instant::now(), stage.cpu());
        let (own, oldest) =
            tokio::join!(load(&stage.balancer.addresses[0], OWN_RATE, time), stage.oldest(time));
        let (seconds, cpu) =
            (start.elapsed().as_secs_f64(), stage.cpu().since(&cpu, start.elapsed().as_secs_f64()));
        let said = count();
        let rate = |at: usize| (said[at] - said_before[at]) as f64 / seconds;
        Stretch {
            cpu,
            own,
            requests: rate(0),
            messages: rate(1),
            heard: (heard().await - heard_before) / seconds,
            message_bytes: rate(2) / rate(1).max(1.0),
            oldest,
            redis: RedisCounts::read(stage).await.since(&redis, seconds),
        }
    }
}

// === the stretches of one scenario ===

/// The results of a scenario.
struct Measured {
    quiet: Vec<Stretch>,
    loud: Vec<Stretch>,
    all_read: Stretch,
    probes: Vec<Probe>,
    lost: f64,
    resident: f64,
}

fn start_siblings(
    runtimes: &Runtimes,
    stage: &Stage,
    scenario: &Scenario,
) -> (Arc<Published>, JoinHandle<()>) {
    let published = Arc::<Published>::default();
    // The last upstream is for probes.
    let upstreams = stage.upstreams[..stage.upstreams.len() - 1].to_vec();
    let task = siblings::run(stage.redis.url(), scenario.traffic, Arc::new(upstreams), published.clone());
    (published, runtimes.siblings.spawn(task))
}

async fn measure(scenario: &Scenario, rounds: usize, time: Duration, runtimes: &Runtimes) -> Measured {
    let mut stage = Stage::new(scenario.upstreams, &runtimes.engines).await;
    let (mut quiet, mut loud) = (Vec::new(), Vec::new());
    let mut rest = None;
    for round in 1..=rounds {
        quiet.push(Stretch::measure(&stage, &Published::default(), time).await);
        let (published, task) = start_siblings(runtimes, &stage, scenario);
        sleep(SETTLE).await;
        loud.push(Stretch::measure(&stage, &published, time).await);
        if round == rounds {
            rest = Some((published, task));
            break;
        }
        published.stop.store(true, Relaxed);
        task.await.expect("siblings do not panic");
        sleep(SETTLE).await;
    }
    let (published, task) = rest.expect("there is a round");
    let mut probes = Vec::new();
    for _ in 0..PROBES {
        let probe = stage.probe().await;
        let keeps_up = probe.gauges.is_some();
        probes.push(probe);
        if !keeps_up {
            break;
        }
    }
    let lost = stage.metric("vllm_lb_exchange_lost_total", "").await;
    let resident = meter::resident_bytes(stage.balancer.pid());
    for _ in 0..scenario.readers {
        runtimes.readers.spawn(siblings::read(stage.redis.url(), published.clone()));
    }
    sleep(Duration::from_secs(1)).await;
    let all_read = Stretch::measure(&stage, &published, time).await;
    published.stop.store(true, Relaxed);
    task.await.expect("siblings do not panic");
    Measured { quiet, loud, all_read, probes, lost, resident }
}

// === the tables ===

fn mean(stretches: &[Stretch], of: impl Fn(&Stretch) -> f64) -> f64 {
    stretches.iter().map(of).sum::<f64>() / stretches.len() as f64
}

fn cpu(stretches: &[Stretch]) -> CpuSeconds {
    CpuSeconds::mean(&stretches.iter().map(|stretch| stretch.cpu).collect::<Vec<_>>())
}

/// All latencies of the stretches together.
fn own(stretches: Vec<Stretch>) -> Latencies {
    let mut all = Latencies { times: Vec::new(), failed: 0 };
    stretches.into_iter().for_each(|stretch| all.add(stretch.own));
    all
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

fn tables(scenario: &Scenario, measured: Measured) {
    let traffic = scenario.traffic;
    let Measured { quiet, loud, all_read, probes, lost, resident } = measured;
    let (asked, reached) =
        ((traffic.siblings * traffic.rate) as f64, mean(&loud, |stretch| stretch.requests));
    println!("### {}\n", scenario.name);
    if reached < asked * REACHED {
        println!(
            "**The writer reached {reached:.0} of {asked:.0} requests a second: \
             the figures are for that rate.**\n"
        );
    }
    let (before, after) = (cpu(&quiet), cpu(&loud));
    let (messages, heard) = (mean(&loud, |stretch| stretch.messages), mean(&loud, |stretch| stretch.heard));
    let bytes = mean(&loud, |stretch| stretch.message_bytes);
    let oldest = loud.iter().map(|stretch| stretch.oldest).fold(0.0, f64::max);
    println!("| | quiet | loud | difference |\n| --- | ---: | ---: | ---: |");
    let row = |what: &str, quiet: f64, loud: f64, unit: &str| {
        println!("| {what} | {quiet:.1}{unit} | {loud:.1}{unit} | {:+.1}{unit} |", loud - quiet);
    };
    row("balancer, of a core", before.balancer, after.balancer, " %");
    row("Redis, of a core", before.redis, after.redis, " %");
    for (at, name) in meter::OWN_THREADS.iter().enumerate() {
        row(&format!("{name}, of a core"), before.own[at], after.own[at], " %");
    }
    let (quiet, loud) = (own(quiet), own(loud));
    row("own requests, p50", quiet.percentile(50), loud.percentile(50), " ms");
    row("own requests, p99", quiet.percentile(99), loud.percentile(99), " ms");
    println!("\n| | |\n| --- | ---: |");
    println!("| own requests, quiet and loud | {} and {} |", quiet.times.len(), loud.times.len());
    println!("| own requests that failed | {} |", quiet.failed + loud.failed);
    println!("| siblings' requests a second | {reached:.0} of {asked:.0} |");
    println!("| siblings' messages a second | {messages:.0} of {bytes:.0} bytes |");
    println!("| messages that the balancer heard, a second | {heard:.0} |");
    println!("| it fell behind, in each second by | {:.2} s |", (1.0 - heard / messages).max(0.0));
    println!("| greatest age of gauges that it reported | {oldest:.2} s |");
    let gauges: Vec<f64> = probes.iter().map(|probe| probe.gauges.unwrap_or(f64::INFINITY)).collect();
    let chains: Vec<f64> = probes.iter().map(|probe| probe.chain.unwrap_or(f64::INFINITY)).collect();
    let most = |numbers: &[f64]| numbers.iter().copied().fold(0.0, f64::max);
    println!(
        "| a gauge known after, median and most (inf: over 20 s) | {:.0} and {:.0} ms |",
        median(gauges.clone()),
        most(&gauges)
    );
    println!(
        "| a chain known after, median and most | {:.0} and {:.0} ms |",
        median(chains.clone()),
        most(&chains)
    );
    println!("| counted as lost | {lost:.0} |");
    println!("| memory of the balancer | {:.0} MB |", resident / 1e6);
    redis_table(scenario, &all_read);
}

/// What Redis moves: measured with some readers, and computed for all balancers.
fn redis_table(scenario: &Scenario, all_read: &Stretch) {
    let readers = scenario.readers + 1;
    let all = scenario.traffic.siblings;
    let out = all_read.redis.bytes_out / 1e6;
    println!("\n| readers | commands/s | MB/s in | MB/s out | of a core of Redis |");
    println!("| ---: | ---: | ---: | ---: | ---: |");
    println!(
        "| {readers} | {:.0} | {:.2} | {out:.1} | {:.0} % |",
        all_read.redis.commands,
        all_read.redis.bytes_in / 1e6,
        all_read.cpu.redis
    );
    if readers < all {
        println!(
            "| {all}, computed | | {:.2} | {:.1} | |",
            all_read.redis.bytes_in / 1e6,
            out * all as f64 / readers as f64
        );
    }
    println!();
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let number =
        |at: usize, usual: u64| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (seconds, rounds) = (number(0, 15), number(1, 2));
    let only = arguments.get(2).and_then(|text| text.parse::<usize>().ok());
    let clients = runtime("clients", 1);
    let runtimes = Runtimes {
        engines: runtime("engines", 1),
        siblings: runtime("siblings", 1),
        readers: runtime("readers", 1),
    };
    for (at, scenario) in SCENARIOS.iter().enumerate() {
        if only.is_some_and(|only| only != at + 1) {
            continue;
        }
        let task = measure(scenario, rounds as usize, Duration::from_secs(seconds), &runtimes);
        let measured = clients.block_on(task);
        tables(scenario, measured);
    }
    ExitCode::SUCCESS
}
