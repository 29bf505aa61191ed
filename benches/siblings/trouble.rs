//! A steady load of short streams through two balancers, while things happen to the Redis that they share:
//! what requests feel of it, and when the balancers know again what each has in flight.
//!
//! Requests are due at fixed moments and timed from these, so that a pause of anything counts for all that it
//! delays. Engines answer at once: what is left is what balancers, this program and the machine take.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::common::body::stream;
use crate::common::process::{Process, Setup};
use crate::common::redis::Redis;
use crate::common::wire::{Wire, post};
use crate::common::{EngineServer, Options, Timing, direct, engine, eventually, names};

const CHAT: &str = "/v1/chat/completions";

/// Clients, half of them at each balancer, and how long one waits between two requests.
const CLIENTS: u32 = 40;
const PAUSE: Duration = Duration::from_millis(200);

/// Between two blows of what is done again and again.
const BLOW: Duration = Duration::from_secs(2);

/// Engines that answer at once.
const ENGINES: u64 = 2;

/// What happens to Redis.
#[derive(Clone, Copy)]
enum Trouble {
    Nothing,
    Killed,
    Restarted,
    Stopped,
    Flushed,
    Full,
    Cut,
}

/// One request: when it was due, how long until the first byte of the body, and whether it went well.
struct Sample {
    phase: usize,
    first: Duration,
    well: bool,
}

/// Balancers, what is between them, and streams through the first that last.
struct Stage {
    redis: Redis,
    processes: [Process; 2],
    slow: EngineServer,
    held: Vec<Wire>,
}

// === impl Trouble ===

impl Trouble {
    const ALL: [Trouble; 7] = [
        Trouble::Nothing,
        Trouble::Killed,
        Trouble::Restarted,
        Trouble::Stopped,
        Trouble::Flushed,
        Trouble::Full,
        Trouble::Cut,
    ];

    fn name(self) -> &'static str {
        match self {
            Trouble::Nothing => "nothing",
            Trouble::Killed => "kill -9, then gone",
            Trouble::Restarted => "kill -9 and an empty one at once, every 2 s",
            Trouble::Stopped => "SIGSTOP",
            Trouble::Flushed => "FLUSHALL every 2 s",
            Trouble::Full => "maxmemory 1",
            Trouble::Cut => "CLIENT KILL of all, every 2 s",
        }
    }

    async fn blow(self, redis: &mut Redis) {
        match self {
            Trouble::Restarted => {
                redis.kill();
                redis.again().await;
            }
            Trouble::Flushed => drop(redis.ask(&["FLUSHALL"]).await),
            Trouble::Cut => {
                // One kind is one command, and there are readers of other kinds.
                for kind in ["normal", "pubsub"] {
                    redis.ask(&["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"]).await;
                }
            }
            Trouble::Nothing | Trouble::Killed | Trouble::Stopped | Trouble::Full => {}
        }
    }

    async fn begin(self, redis: &mut Redis) {
        match self {
            Trouble::Killed => redis.kill(),
            Trouble::Stopped => redis.freeze(),
            Trouble::Full => drop(redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await),
            other => other.blow(redis).await,
        }
    }

    /// The last blow, after which something changes that is to be told.
    async fn last(self, redis: &mut Redis) {
        match self {
            Trouble::Restarted => redis.kill(),
            other => other.blow(redis).await,
        }
    }

    /// Makes Redis whole again.
    async fn end(self, redis: &mut Redis) {
        match self {
            Trouble::Killed | Trouble::Restarted => redis.again().await,
            Trouble::Stopped => redis.thaw(),
            Trouble::Full => drop(redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await),
            Trouble::Nothing | Trouble::Flushed | Trouble::Cut => {}
        }
    }
}

// === impl Stage ===

impl Stage {
    async fn new(engines: &[EngineServer]) -> Self {
        let redis = Redis::start(&[]).await;
        let timing = Timing { per_step: 0.2, ..Timing::instant() };
        let options = Options { models: names(&["slow"]), timing, ..Options::default() };
        let slow = EngineServer::start(options).await.expect("a free port is there");
        let more = format!("redis: {}", redis.url());
        let setup = || Setup::over(engines.iter().chain([&slow]), &more);
        let processes = [setup().start().await, setup().start().await];
        let mut stage = Stage { redis, processes, slow, held: Vec::new() };
        for process in &stage.processes {
            eventually("all upstreams are ready", async || {
                let rows = process.admin("/admin/upstreams").await.json();
                rows.as_array()?.iter().all(|row| row["state"] == "ready").then_some(())
            })
            .await;
        }
        stage.hold().await;
        stage.agrees().await;
        stage
    }

    /// One more stream through the first, of which the other has to hear.
    async fn hold(&mut self) {
        let mut client = Wire::connect(&self.processes[0].addresses[0]).await;
        client.send(post(CHAT, stream("slow", 4000))).await;
        // Its answer is not awaited: the other can hear of it from now on, and the clock runs.
        self.held.push(client);
    }

    /// Waits until the other knows what the first has in flight, and tells how long that took.
    async fn agrees(&self) -> Duration {
        let start = Instant::now();
        let path = format!("/admin/upstreams/{}", direct(&self.slow));
        eventually("the gauges are right", async || {
            let row = self.processes[1].admin(&path).await.json();
            (row["siblings_active"] == self.held.len()).then_some(())
        })
        .await;
        start.elapsed()
    }

    /// Lets one trouble last so long, and tells when all was known again after it.
    async fn suffer(&mut self, trouble: Trouble, time: Duration) -> Duration {
        let end = Instant::now() + time;
        trouble.begin(&mut self.redis).await;
        while end > Instant::now() + BLOW {
            sleep(BLOW).await;
            trouble.blow(&mut self.redis).await;
        }
        sleep_until(end).await;
        trouble.last(&mut self.redis).await;
        self.hold().await;
        trouble.end(&mut self.redis).await;
        self.agrees().await
    }
}

/// Sends requests until the connection is refused.
async fn client(address: String, number: u32, phase: Arc<AtomicUsize>, samples: mpsc::Sender<Sample>) {
    let mut due = Instant::now() + PAUSE * number / CLIENTS;
    let request = post(CHAT, stream("sim", 5));
    let mut wire = Wire::connect(&address).await;
    loop {
        sleep_until(due).await;
        let phase = phase.load(Ordering::Relaxed);
        wire.send(&request).await;
        let head = wire.head().await;
        let (status, mut framing) = (head.status, head.framing);
        let mut first = None;
        let mut last = None;
        while let Ok(Some(piece)) = wire.piece(&mut framing).await {
            first.get_or_insert_with(|| due.elapsed());
            last = Some(piece);
        }
        let well = status == 200 && last.is_some_and(|piece| piece.ends_with(b"data: [DONE]\n\n"));
        let sample = Sample { phase, first: first.unwrap_or_default(), well };
        if samples.send(sample).await.is_err() {
            return;
        }
        due += PAUSE;
    }
}

/// The time in milliseconds that so many in a hundred of a phase do not exceed.
fn percentile(samples: &[Sample], phase: usize, hundredths: usize) -> f64 {
    let of_phase = samples.iter().filter(|sample| sample.phase == phase);
    let mut times: Vec<Duration> = of_phase.map(|sample| sample.first).collect();
    times.sort();
    let rank = (times.len() * hundredths).div_ceil(100).max(1);
    times.get(rank - 1).copied().unwrap_or_default().as_secs_f64() * 1e3
}

/// Prints a row for each trouble, beside the quiet time before it.
pub async fn table(seconds: f64) {
    let time = Duration::from_secs_f64(seconds);
    let mut engines = Vec::new();
    for seed in 0..ENGINES {
        engines.push(engine(Options { seed, ..Options::default() }).await);
    }
    let mut stage = Stage::new(&engines).await;
    let phase = Arc::new(AtomicUsize::new(0));
    let (sender, mut receiver) = mpsc::channel(100_000);
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let address = stage.processes[number as usize % 2].addresses[0].clone();
        clients.spawn(client(address, number, phase.clone(), sender.clone()));
    }
    let next = || phase.fetch_add(1, Ordering::Relaxed);
    let mut again = Vec::new();
    // What is before the first phase warms up.
    sleep(Duration::from_secs(2)).await;
    for trouble in Trouble::ALL {
        next();
        sleep(time).await;
        next();
        again.push(stage.suffer(trouble, time).await);
    }
    next();
    let mut samples = Vec::new();
    receiver.close();
    while let Some(sample) = receiver.recv().await {
        samples.push(sample);
    }
    clients.join_all().await;
    rows(&samples, &again);
}

fn rows(samples: &[Sample], again: &[Duration]) {
    println!("| | requests | failed | p50 before | p50 | p99 before | p99 | right again after |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (at, (trouble, again)) in Trouble::ALL.iter().zip(again).enumerate() {
        let (quiet, loud) = (2 * at + 1, 2 * at + 2);
        let requests = samples.iter().filter(|sample| sample.phase == loud).count();
        let failed = samples.iter().filter(|sample| sample.phase == loud && !sample.well).count();
        let of = |phase, hundredths| percentile(samples, phase, hundredths);
        println!(
            "| {} | {requests} | {failed} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} ms |",
            trouble.name(),
            of(quiet, 50),
            of(loud, 50),
            of(quiet, 99),
            of(loud, 99),
            again.as_secs_f64() * 1e3,
        );
    }
    let failed = samples.iter().filter(|sample| !sample.well).count();
    println!("\n{} requests in all, {failed} of them failed.", samples.len());
}
