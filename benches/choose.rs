//! What one choice among many upstreams costs: `cargo bench --bench choose` (or with `--profile quick`).
//!
//! A choice is all that a request does between its prompt and its lease: the upstreams of its route, the
//! filter, the lookup of its chain, the formula, the lease. The upstreams are one simulated server at as
//! many loopback addresses, which the keeper probes before the measurement. Every upstream has a few
//! requests in flight; each conversation has 64 blocks, and one to three upstreams hold them. With a "common
//! beginning" the first eight blocks are those of all conversations, and every upstream holds them. With "a
//! limit of the first token" each candidate's forecast is compared with `x-slo-ttft-ms`.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use http::HeaderMap;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use vllm_lb::config::types::{
    Balance, Config, Health, PrefixIndex, Retry, RouteConfig, Timeouts, UpstreamConfig,
};
use vllm_lb::config::url;
use vllm_lb::engine::batch::Timing;
use vllm_lb::engine::http::{EngineServer, Options};
use vllm_lb::fleet::{FilterResult, Fleet, Lease, RequestWork, UpstreamQuery};
use vllm_lb::observe::Observer;
use vllm_lb::pick::forecast::{forecast, keep_within};
use vllm_lb::pick::shortlist::shortlist;
use vllm_lb::pick::{self, Candidate, DrawSeed};
use vllm_lb::route::resolve;
use vllm_lb::route::virtual_models::{RoutePlan, RouteTable};
use vllm_lb::state::prefix_index::Hits;
use vllm_lb::state::{PromptLookup, State};

const CONVERSATIONS: u64 = 4000;
const BLOCKS: u64 = 64;
const COMMON_BLOCKS: u64 = 8;
/// Bytes of a block, as by default.
const BLOCK_BYTES: u64 = 512;
/// The requests in flight of an upstream, on average.
const IN_FLIGHT: usize = 4;

/// The limit of the time to the first token, which all forecasts meet: nothing is in the backlogs.
const LIMIT: Duration = Duration::from_secs(60);

/// Scatters numbers over 64 bits, as hashes are.
fn scatter(number: u64) -> u64 {
    let mixed = (number ^ (number >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 27)
}

/// A fleet of ready upstreams, and the memory of the prompts that each was sent.
struct World {
    fleet: Arc<Fleet>,
    state: Arc<State>,
    /// A route that names all upstreams.
    route: Arc<RoutePlan>,
    prompts: Vec<PromptLookup>,
    knobs: Balance,
    in_flight: VecDeque<Lease>,
    hits: Hits,
    candidates: Vec<Candidate>,
    count: u64,
    _runtime: Runtime,
    _stop: watch::Sender<bool>,
}

// === impl World ===

impl World {
    fn new(upstreams: usize, common: bool) -> Self {
        let runtime = Runtime::new().expect("threads can be started");
        let (stop, stopped) = watch::channel(false);
        let fleet = runtime.block_on(fleet(upstreams, stopped));
        let index = PrefixIndex::default();
        let state = State::new(index, Duration::from_secs(3600), 0x5EED, None, Observer::default());
        let snapshot = fleet.snapshot_owned();
        let ids: Vec<usize> = snapshot.entries.iter().map(|entry| entry.upstream.id).collect();
        let names = snapshot.entries.iter().map(|entry| entry.upstream.name().to_string()).collect();
        let prompts: Vec<PromptLookup> = (0..CONVERSATIONS).map(|number| prompt(number, common)).collect();
        for (number, prompt) in (0u64..).zip(&prompts) {
            for copy in 0..1 + scatter(number) % 3 {
                let id = ids[(scatter(number + (copy << 32)) % ids.len() as u64) as usize];
                state.learn(prompt, id, Instant::now());
            }
        }
        for id in ids.iter().filter(|_| common) {
            let chain = prompts[0].chain[..COMMON_BLOCKS as usize].to_vec();
            state.learn(&PromptLookup { chain, ..PromptLookup::default() }, *id, Instant::now());
        }
        let mut route = RouteConfig::new(Timeouts::default(), Retry::default());
        route.upstreams = Some(names);
        let table = RouteTable::new(&[route]);
        let route = table.plan(Some("sim"), "/", &HeaderMap::new()).expect("it is for any model");
        let mut world = World {
            fleet,
            state,
            route,
            prompts,
            knobs: Balance::default(),
            in_flight: VecDeque::new(),
            hits: Hits::default(),
            candidates: Vec::new(),
            count: 0,
            _runtime: runtime,
            _stop: stop,
        };
        for _ in 0..upstreams * IN_FLIGHT {
            let lease = world.choose(false, None);
            world.in_flight.push_back(lease);
        }
        world
    }

    /// Makes the forecasts count: a first token has come from each upstream of late.
    fn confirm_forecasts(&self) {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        for entry in &self.fleet.snapshot().entries {
            entry.upstream.correct_forecast(8_000, second, second, now);
        }
    }

    /// Chooses an upstream for the next conversation. `limit`: of the time to the first token.
    fn choose(&mut self, routed: bool, limit: Option<Duration>) -> Lease {
        self.count += 1;
        let prompt = &self.prompts[(scatter(self.count) % CONVERSATIONS) as usize];
        let snapshot = self.fleet.snapshot_owned();
        let among = if routed { resolve::upstreams(&self.route, &*snapshot) } else { None };
        let tokens = self.state.prompt(prompt).tokens;
        let query =
            UpstreamQuery { model: Some("sim"), tokens, among: among.as_deref(), ..UpstreamQuery::default() };
        let now = Instant::now();
        let candidates = &mut self.candidates;
        let found = snapshot.candidates(&query, now, candidates);
        assert_eq!(found, FilterResult::Candidates);
        let id = |candidate: &Candidate| snapshot.id_at(candidate.index);
        self.state.weigh(prompt, self.knobs.share, &mut self.hits, candidates, id);
        let last = self.state.add_session_penalty(prompt, 1.0, now, candidates, id);
        if let Some(limit) = limit {
            let trust = |index: usize| snapshot.entries[index].upstream.forecast_trust(now);
            assert_eq!(keep_within(candidates, limit, trust), None, "an upstream meets the limit");
        }
        let seed = DrawSeed { random: scatter(self.count), turn: self.count, jitter: 0.0 };
        shortlist(candidates, &self.knobs, seed, last);
        let choice = pick::pick(candidates, &self.knobs, seed).expect("there are candidates");
        let chosen = candidates.iter().find(|candidate| candidate.index == choice.index);
        let uncached = chosen.map_or(tokens, |chosen| chosen.uncached);
        black_box(chosen.map(forecast));
        let work = RequestWork { tokens, uncached, streams: true };
        snapshot.take(&query, choice.index, work, now).expect("there is room")
    }

    /// Ends the request that has been in flight longest, and chooses for another.
    fn turn(&mut self, routed: bool, limit: Option<Duration>) {
        self.in_flight.pop_front();
        let mut lease = self.choose(routed, limit);
        lease.end_prefill();
        self.in_flight.push_back(black_box(lease));
    }
}

/// Starts a keeper over so many upstreams, and waits until all are ready.
async fn fleet(upstreams: usize, stopped: watch::Receiver<bool>) -> Arc<Fleet> {
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("a free port is there");
    let options = Options { timing: Timing::instant(), ..Options::default() };
    let engine = EngineServer::start_on(listener, options).expect("a socket can be served");
    let port = engine.address().port();
    let upstream = |number: usize| {
        let address = format!("http://127.1.{}.{}:{port}", number / 250, number % 250 + 1);
        UpstreamConfig::new(url::upstream(&address).expect("is a URL"))
    };
    // No probe runs during the measurement.
    let interval = Duration::from_secs(600);
    let config = Config {
        upstreams: (0..upstreams).map(upstream).collect(),
        health: Health { interval, timeout: Duration::from_secs(60), ..Health::default() },
        ..Config::default()
    };
    let (fleet, keeper) = Fleet::new(&config, Observer::default()).expect("no file is read");
    tokio::spawn(keeper.run(stopped));
    let all_ready = fleet.wait_until(Duration::from_secs(120), |now| now.ready().count() == upstreams).await;
    assert!(all_ready, "the upstreams answer probes");
    let read = |fleet: &Fleet| {
        let (snapshot, now) = (fleet.snapshot(), Instant::now());
        snapshot.entries.iter().filter(|entry| entry.upstream.gauge_report(now).is_some()).count()
    };
    while read(&fleet) < upstreams {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    engine.stop().await;
    fleet
}

/// The time that this thread had a processor meanwhile: other work of the machine does not count.
fn processor_time(work: impl FnOnce()) -> Duration {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
    };
    let begin = now();
    work();
    now().saturating_sub(begin)
}

fn prompt(conversation: u64, common: bool) -> PromptLookup {
    let own = |block| {
        if common && block <= COMMON_BLOCKS { block } else { (conversation + 1) << 16 | block }
    };
    let chain: Vec<u64> = (1..=BLOCKS).map(|block| scatter(own(block))).collect();
    PromptLookup { chain, seen: BLOCKS * BLOCK_BYTES + 200, model: Some("sim".into()), ..Default::default() }
}

fn choose(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("choose");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(30);
    for upstreams in [8, 64, 600, 1000] {
        for common in [false, true] {
            let mut world = World::new(upstreams, common);
            let what = if common { ", common beginning" } else { "" };
            for routed in [false, true] {
                let route = if routed { ", route to all" } else { "" };
                group.bench_function(format!("{upstreams} upstreams{what}{route}"), |bencher| {
                    bencher.iter_custom(|turns| {
                        processor_time(|| (0..turns).for_each(|_| world.turn(routed, None)))
                    });
                });
            }
            if !common {
                group.bench_function(
                    format!("{upstreams} upstreams, a limit of the first token"),
                    |bencher| {
                        bencher.iter_custom(|turns| {
                            world.confirm_forecasts();
                            processor_time(|| (0..turns).for_each(|_| world.turn(false, Some(LIMIT))))
                        });
                    },
                );
            }
        }
    }
    let world = World::new(8, false);
    let snapshot = world.fleet.snapshot_owned();
    let (upstream, mut count) = (&snapshot.entries[0].upstream, 0);
    group.bench_function("correction of a forecast by a first token", |bencher| {
        bencher.iter(|| {
            count += 1;
            let actual = Duration::from_micros(scatter(count) % 1_000_000);
            upstream.correct_forecast(
                scatter(count) % 8_000,
                Duration::from_millis(500),
                actual,
                Instant::now(),
            );
        });
    });
    group.finish();
}

criterion_group!(benches, choose);
criterion_main!(benches);
