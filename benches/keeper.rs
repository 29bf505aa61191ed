//! The cost of changes in a fleet of many upstreams: `cargo bench --bench keeper` (or with
//! `--profile quick`).
//!
//! All upstreams are paths of one small server in this process, so that no probe is refused. Probes are an
//! hour apart, so that only the changes take time.

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use vllm_lb::config::types::{Breaker, Config, DiscoveryMethod, DiscoverySource, Health, UpstreamConfig};
use vllm_lb::config::url;
use vllm_lb::fleet::{Fleet, FleetChange, UpstreamSignal, discover};
use vllm_lb::observe::Observer;

const UPSTREAMS: usize = 1000;

/// Changes that `cost_of_a_second` spreads over a second.
const CHANGES: usize = 10;

/// Answers every request on a connection: the list of engines where the path asks for it, else an empty
/// object.
async fn answer(mut stream: TcpStream, list: String) {
    let mut read = Vec::new();
    loop {
        while !read.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let asked = String::from_utf8_lossy(&read);
        let (status, body) = match () {
            () if asked.contains("/get_inner_vllm_config") => ("200 OK", list.as_str()),
            // Then the upstream serves the model that its source names.
            () if asked.contains("/v1/models") => ("404 Not Found", "{}"),
            () => ("200 OK", "{}"),
        };
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
        if stream.write_all((head + body).as_bytes()).await.is_err() || asked.contains("close") {
            return;
        }
        read.clear();
    }
}

/// Starts the server and returns its address.
async fn serve() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
    let address = listener.local_addr().expect("it is bound").to_string();
    let urls: Vec<String> = (0..UPSTREAMS).map(|at| format!("{:?}", url_of(&address, at))).collect();
    let list = format!("{{\"base_url\":[{}],\"model\":\"sim\"}}", urls.join(","));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, list.clone()));
        }
    });
    address
}

fn url_of(address: &str, at: usize) -> String {
    format!("http://{address}/u{at}")
}

fn config(address: &str, discovered: bool) -> Config {
    let upstream = |at| {
        let url = url::upstream(&url_of(address, at)).expect("is a URL");
        let models = Some(vec!["sim".into()]);
        UpstreamConfig { models, name: format!("u{at}"), ..UpstreamConfig::new(url) }
    };
    let hour = Duration::from_secs(3600);
    // Failures of requests are forgotten at once, so that no upstream trips.
    let breaker = Breaker { window: Duration::from_millis(10), failures: 1000, ..Breaker::default() };
    let mut config = Config {
        breaker,
        health: Health { interval: hour, metrics: false, ..Health::default() },
        ..Config::default()
    };
    if discovered {
        let url = url::upstream(&format!("http://{address}")).expect("is a URL");
        config.sources = vec![DiscoverySource::new(DiscoveryMethod::Gym(url))];
    } else {
        config.upstreams = (0..UPSTREAMS).map(upstream).collect();
    }
    config
}

/// The processor time of this process.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A fleet of ready upstreams, and the sender that stops its keeper.
fn fleet(runtime: &Runtime, discovered: bool) -> (std::sync::Arc<Fleet>, watch::Sender<bool>) {
    runtime.block_on(async {
        let config = config(&serve().await, discovered);
        let (stop, stopped) = watch::channel(false);
        let (start, used) = (Instant::now(), cpu());
        let (fleet, keeper) = Fleet::new(&config, Observer::default()).expect("it needs no file");
        tokio::spawn(keeper.run(stopped.clone()));
        tokio::spawn(discover::run(fleet.clone(), stopped));
        let ready = |snapshot: &vllm_lb::fleet::Snapshot| snapshot.ready().count() == UPSTREAMS;
        assert!(fleet.wait_until(Duration::from_secs(60), ready).await, "all upstreams become ready");
        let kind = if discovered { "discovered" } else { "configured" };
        eprintln!(
            "{UPSTREAMS} {kind} upstreams ready after {:?}, {:?} of processor time",
            start.elapsed(),
            cpu() - used
        );
        (fleet, stop)
    })
}

/// Prints the processor time of a second with `CHANGES` changes of single upstreams.
fn cost_of_a_second(runtime: &Runtime, fleet: &Fleet, kind: &str) {
    runtime.block_on(async {
        let name = fleet.snapshot().entries[UPSTREAMS / 2].upstream.name().to_string();
        let (used, mut longest) = (cpu(), Duration::ZERO);
        for number in 0..CHANGES {
            let start = Instant::now();
            let change = FleetChange::Weight { name: name.clone(), weight: 1.0 + number as f64 };
            fleet.apply(vec![change]).await.expect("the upstream is there");
            longest = longest.max(start.elapsed());
            tokio::time::sleep(Duration::from_secs(1) / CHANGES as u32).await;
        }
        let used = cpu() - used;
        eprintln!("{kind}: {CHANGES} changes in a second take {used:?}, the longest {longest:?}");
    });
}

fn keeper(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("the runtime starts");
    let (discovered, stop) = fleet(&runtime, true);
    cost_of_a_second(&runtime, &discovered, "discovered");
    stop.send_replace(true);
    let (fleet, stop) = fleet(&runtime, false);
    cost_of_a_second(&runtime, &fleet, "configured");
    let mut group = criterion.benchmark_group("keeper");
    group.measurement_time(Duration::from_secs(4)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    let mut weight = 1.0;
    group.bench_function("one change", |bencher| {
        bencher.iter(|| {
            weight += 1.0;
            let change = FleetChange::Weight { name: "u500".into(), weight };
            runtime.block_on(fleet.apply(vec![change])).expect("the upstream is there");
        });
    });
    let upstreams: Vec<_> = fleet.snapshot().entries.iter().map(|entry| entry.upstream.clone()).collect();
    let all = || upstreams.iter().map(|upstream| FleetChange::Upsert(upstream.config.clone())).collect();
    group.bench_function("reload without a change", |bencher| {
        bencher.iter(|| runtime.block_on(fleet.apply(all())).expect("the upstreams are there"));
    });
    group.bench_function("a failed request on each upstream", |bencher| {
        bencher.iter(|| {
            for upstream in &upstreams {
                fleet.report(upstream, UpstreamSignal::Failed { placed: Instant::now() });
            }
            // Applied after the signals.
            let change = FleetChange::Weight { name: "u500".into(), weight: 2.0 };
            runtime.block_on(fleet.apply(vec![change])).expect("the upstream is there");
        });
    });
    group.finish();
    stop.send_replace(true);
}

criterion_group!(benches, keeper);
criterion_main!(benches);
