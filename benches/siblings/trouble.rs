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
use crate::common::sentinel::SentinelSet;
use crate::common::slow_link::SlowLink;
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

/// How long answers of a slow Redis take.
const SLOW: Duration = Duration::from_millis(200);

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
    Returned,
    ReadOnly,
    Slow,
    FailedOver,
}

/// Where balancers find their Redis.
#[derive(Clone, Copy)]
enum RedisSite {
    Direct,
    /// Behind a proxy that can delay answers.
    SlowLink,
    Sentinel,
}

/// A Redis as balancers find it.
#[allow(clippy::large_enum_variant, reason = "one for each stage")]
enum SharedRedis {
    Direct(Redis),
    SlowLink(Redis, SlowLink),
    Sentinel(SentinelSet),
}

/// One request: when it was due, how long until the first byte of the body, and whether it went well.
struct Sample {
    phase: usize,
    first: Duration,
    well: bool,
}

/// Balancers, what is between them, and streams through the first that last.
struct Stage {
    redis: SharedRedis,
    processes: [Process; 2],
    slow: EngineServer,
    held: Vec<Wire>,
}

// === impl RedisSite ===

impl RedisSite {
    const ALL: [RedisSite; 3] = [RedisSite::Direct, RedisSite::SlowLink, RedisSite::Sentinel];

    fn troubles(self) -> &'static [Trouble] {
        match self {
            RedisSite::Direct => &Trouble::DIRECT,
            RedisSite::SlowLink => &[Trouble::Slow],
            RedisSite::Sentinel => &[Trouble::FailedOver],
        }
    }

    async fn start(self) -> SharedRedis {
        match self {
            RedisSite::Direct => SharedRedis::Direct(Redis::start(&[]).await),
            RedisSite::SlowLink => {
                let redis = Redis::start(&[]).await;
                let link = SlowLink::to(redis.port).await;
                SharedRedis::SlowLink(redis, link)
            }
            RedisSite::Sentinel => SharedRedis::Sentinel(SentinelSet::start().await),
        }
    }
}

// === impl SharedRedis ===

impl SharedRedis {
    fn url(&self) -> String {
        match self {
            SharedRedis::Direct(redis) => redis.url(),
            SharedRedis::SlowLink(_, link) => format!("redis://127.0.0.1:{}", link.port),
            SharedRedis::Sentinel(set) => set.url(),
        }
    }

    fn redis(&mut self) -> &mut Redis {
        match self {
            SharedRedis::Direct(redis) | SharedRedis::SlowLink(redis, _) => redis,
            SharedRedis::Sentinel(set) => &mut set.master,
        }
    }

    fn set_delay(&self, delay: Duration) {
        if let SharedRedis::SlowLink(_, link) = self {
            link.set_delay(delay);
        }
    }
}

// === impl Trouble ===

impl Trouble {
    /// Those of a Redis that balancers reach directly.
    const DIRECT: [Trouble; 9] = [
        Trouble::Nothing,
        Trouble::Killed,
        Trouble::Restarted,
        Trouble::Stopped,
        Trouble::Flushed,
        Trouble::Full,
        Trouble::Cut,
        Trouble::Returned,
        Trouble::ReadOnly,
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
            Trouble::Returned => "kill -9 and one with an old snapshot, every 2 s",
            Trouble::ReadOnly => "read-only, a replica without its master",
            Trouble::Slow => "answers take 200 ms",
            Trouble::FailedOver => "kill -9 of the master, Sentinel names the replica",
        }
    }

    async fn blow(self, shared: &mut SharedRedis) {
        let redis = shared.redis();
        match self {
            Trouble::Restarted => {
                redis.kill();
                redis.again().await;
            }
            Trouble::Returned => redis.return_to_snapshot().await,
            Trouble::Flushed => drop(redis.ask(&["FLUSHALL"]).await),
            Trouble::Cut => {
                // One kind is one command, and there are readers of other kinds.
                for kind in ["normal", "pubsub"] {
                    redis.ask(&["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"]).await;
                }
            }
            _ => {}
        }
    }

    async fn begin(self, shared: &mut SharedRedis) {
        match self {
            Trouble::Killed => shared.redis().kill(),
            Trouble::Stopped => shared.redis().freeze(),
            Trouble::Full => drop(shared.redis().ask(&["CONFIG", "SET", "maxmemory", "1"]).await),
            Trouble::ReadOnly => shared.redis().set_read_only().await,
            Trouble::Slow => shared.set_delay(SLOW),
            other => other.blow(shared).await,
        }
    }

    /// The last blow, after which something changes that is to be told.
    async fn last(self, shared: &mut SharedRedis) {
        match self {
            Trouble::Restarted => shared.redis().kill(),
            other => other.blow(shared).await,
        }
    }

    /// Makes Redis whole again.
    async fn end(self, shared: &mut SharedRedis) {
        match self {
            Trouble::Killed | Trouble::Restarted => shared.redis().again().await,
            Trouble::Stopped => shared.redis().thaw(),
            Trouble::Full => drop(shared.redis().ask(&["CONFIG", "SET", "maxmemory", "0"]).await),
            Trouble::ReadOnly => shared.redis().set_writable().await,
            Trouble::Slow => shared.set_delay(Duration::ZERO),
            Trouble::FailedOver => {
                if let SharedRedis::Sentinel(set) = shared {
                    set.fail_over().await;
                }
            }
            Trouble::Nothing | Trouble::Flushed | Trouble::Cut | Trouble::Returned => {}
        }
    }
}

// === impl Stage ===

impl Stage {
    async fn new(engines: &[EngineServer], site: RedisSite) -> Self {
        let redis = site.start().await;
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
        if matches!(trouble, Trouble::FailedOver) {
            // It happens once, and takes its own time.
            self.hold().await;
            trouble.end(&mut self.redis).await;
            let took = self.agrees().await;
            sleep_until(end).await;
            return took;
        }
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
    println!("| | requests | failed | p50 before | p50 | p99 before | p99 | right again after |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let (mut requests, mut failed) = (0, 0);
    for site in RedisSite::ALL {
        let samples = suffer_all(Stage::new(&engines, site).await, site.troubles(), time).await;
        requests += samples.len();
        failed += samples.iter().filter(|sample| !sample.well).count();
    }
    println!("\n{requests} requests in all, {failed} of them failed.");
}

/// Lets the troubles happen one after another under a steady load, and prints their rows.
async fn suffer_all(mut stage: Stage, troubles: &[Trouble], time: Duration) -> Vec<Sample> {
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
    for trouble in troubles {
        next();
        if matches!(trouble, Trouble::Returned) {
            stage.redis.redis().take_snapshot().await;
        }
        sleep(time).await;
        next();
        again.push(stage.suffer(*trouble, time).await);
    }
    next();
    let mut samples = Vec::new();
    receiver.close();
    while let Some(sample) = receiver.recv().await {
        samples.push(sample);
    }
    clients.join_all().await;
    rows(&samples, troubles, &again);
    samples
}

fn rows(samples: &[Sample], troubles: &[Trouble], again: &[Duration]) {
    for (at, (trouble, again)) in troubles.iter().zip(again).enumerate() {
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
}
