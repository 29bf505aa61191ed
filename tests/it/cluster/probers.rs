//! One prober for each upstream: three balancer processes over six engines and a real Redis.

use std::time::{Duration, Instant};

use crate::common::body::stream;
use crate::common::process::{Process, Setup};
use crate::common::redis::Redis;
use crate::common::wire::{Wire, post};
use crate::common::{EngineServer, InjectedFault, direct, eventually, paced};
use serde_json::Value;
use tokio::time::sleep;

const CHAT: &str = "/v1/chat/completions";

const INTERVAL: Duration = Duration::from_millis(500);

/// After this long without a message a sibling is gone.
const GAUGE_TTL: Duration = Duration::from_secs(1);

/// So slow that a stream never ends while its test runs.
const TOKEN_TIME: Duration = Duration::from_millis(50);

/// How late a machine with other work may be; without reports a balancer would notice in up to 30 s.
const SLACK: Duration = Duration::from_secs(6);

struct Circle {
    redis: Redis,
    engines: Vec<EngineServer>,
    balancers: Vec<Process>,
    _setups: Vec<Setup>,
}

impl Circle {
    async fn start() -> Self {
        let (redis, mut engines) = (Redis::start(&[]).await, Vec::new());
        for _ in 0..6 {
            engines.push(paced(TOKEN_TIME).await);
        }
        let more = format!(
            "redis: {}\nredis_options: {{gauge_ttl: {}ms}}\nhealth: {{interval: {}ms}}",
            redis.url(),
            GAUGE_TTL.as_millis(),
            INTERVAL.as_millis()
        );
        let (mut setups, mut balancers) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let setup = Setup::over(&engines, &more);
            balancers.push(setup.start().await);
            setups.push(setup);
        }
        let circle = Circle { redis, engines, balancers, _setups: setups };
        circle.until_siblings(2).await;
        for engine in &circle.engines {
            circle.until_state(engine, "ready").await;
        }
        circle
    }

    async fn until_siblings(&self, count: usize) {
        for balancer in &self.balancers {
            eventually(&format!("{count} siblings are there"), async || {
                let page = balancer.admin("/admin/siblings").await.expect(200).json();
                (page["siblings"].as_array().is_some_and(|all| all.len() == count)).then_some(())
            })
            .await;
        }
    }

    /// Waits until all balancers show this state of the engine's upstream.
    async fn until_state(&self, engine: &EngineServer, wanted: &str) {
        for balancer in &self.balancers {
            eventually(&format!("{} is {wanted}", engine.address()), async || {
                (state(balancer, engine).await == wanted).then_some(())
            })
            .await;
        }
    }

    /// The probes of each engine in a time, by balancer.
    async fn probes(&self, time: Duration) -> Vec<Vec<u64>> {
        let all = async || {
            let mut all = Vec::new();
            for engine in &self.engines {
                let mut counts = Vec::new();
                for balancer in &self.balancers {
                    counts.push(probes(balancer, engine).await);
                }
                all.push(counts);
            }
            all
        };
        let before = all().await;
        sleep(time).await;
        let after = all().await;
        let more = |(before, after): (&Vec<u64>, &Vec<u64>)| {
            before.iter().zip(after).map(|(before, after)| after - before).collect()
        };
        before.iter().zip(&after).map(more).collect()
    }

    /// Waits until each engine has one prober, and the others hardly probe.
    async fn until_one_prober(&self) {
        let window = 6 * INTERVAL;
        let mut last = Vec::new();
        for _ in 0..8 {
            last = self.probes(window).await;
            let is_one = |counts: &Vec<u64>| {
                let (busy, idle): (Vec<u64>, Vec<u64>) = counts.iter().partition(|count| **count >= 4);
                busy.len() == 1 && idle.iter().sum::<u64>() <= 2 && busy[0] <= 9
            };
            if last.iter().all(is_one) {
                return;
            }
        }
        panic!("each engine should have one prober: probes by balancer in {window:?}: {last:?}");
    }
}

async fn state(balancer: &Process, engine: &EngineServer) -> String {
    let page = balancer.admin(&format!("/admin/upstreams/{}", engine.address())).await;
    let row: Value = page.json();
    row["state"].as_str().unwrap_or("none").to_string()
}

async fn probes(balancer: &Process, engine: &EngineServer) -> u64 {
    let page = balancer.admin("/metrics").await.expect(200);
    let start = format!("vllm_lb_probes_total{{upstream=\"{}\"}} ", engine.address());
    let count = page.text().lines().find_map(|line| line.strip_prefix(&start)?.parse().ok());
    count.unwrap_or(0)
}

/// The value of a key for an upstream at all balancers.
async fn shown(circle: &Circle, engine: &EngineServer, key: &str) -> Vec<Value> {
    let mut all = Vec::new();
    for balancer in &circle.balancers {
        let row: Value = balancer.admin(&format!("/admin/upstreams/{}", engine.address())).await.json();
        all.push(row[key].clone());
    }
    all
}

fn polled(engines: &[EngineServer]) -> Vec<u64> {
    engines.iter().map(|engine| engine.stats().polled).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_balancer_probes_an_upstream_until_it_is_killed() {
    let mut circle = Circle::start().await;
    circle.until_one_prober().await;
    // The metrics of an engine are read by its prober, and all have them.
    for balancer in &circle.balancers {
        // A start that differs from the prober's would count as a restart.
        assert!(!balancer.has_said("upstream has an empty cache"));
        for engine in &circle.engines {
            eventually("the size of the cache is known", async || {
                let page = balancer.admin(&format!("/admin/upstreams/{}", engine.address())).await;
                page.json()["cache_tokens"].is_u64().then_some(())
            })
            .await;
        }
    }
    // A request through one balancer is foreign to none of them; that of another client is to all.
    let (address, request) = (&circle.balancers[0].addresses[0], post(CHAT, stream("sim", 10_000)));
    let mut client = Wire::connect(address).await;
    client.send(&request).await;
    client.head().await;
    for _ in 0..6 {
        sleep(INTERVAL).await;
        for engine in &circle.engines {
            let foreign = shown(&circle, engine, "foreign").await;
            // Unknown where the machine is too slow for a reading an interval.
            assert!(foreign.iter().all(|foreign| foreign.is_null() || *foreign == 0), "{foreign:?}");
        }
    }
    drop(client);
    let mut client = Wire::connect(&direct(&circle.engines[0])).await;
    client.send(&request).await;
    eventually("all balancers count it", async || {
        let foreign = shown(&circle, &circle.engines[0], "foreign").await;
        foreign.iter().all(|foreign| *foreign == 1).then_some(())
    })
    .await;
    drop(client);
    let counts = circle.probes(4 * INTERVAL).await;
    let own = |at: usize| counts.iter().filter(|counts| counts[at] >= 2).count();
    let busiest = (0..3).max_by_key(|at| own(*at)).expect("there are three");
    assert!(own(busiest) >= 2, "{counts:?}");
    let mut killed = circle.balancers.remove(busiest);
    killed.signal(rustix::process::Signal::KILL);
    let (start, before) = (Instant::now(), polled(&circle.engines));
    killed.ended().await;
    // The survivors notice missing reports, or that the sibling has expired, and another one probes.
    let bound = GAUGE_TTL.max(3 * INTERVAL) + INTERVAL + SLACK;
    for (engine, before) in circle.engines.iter().zip(before) {
        eventually("the engine is probed", async || (engine.stats().polled > before + 1).then_some(())).await;
    }
    assert!(start.elapsed() < bound, "{:?}", start.elapsed());
    circle.until_siblings(1).await;
    circle.until_one_prober().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_balancers_learn_of_an_engines_death_and_probe_alone_without_redis() {
    let mut circle = Circle::start().await;
    circle.until_one_prober().await;
    let start = Instant::now();
    circle.engines[0].set_fault(InjectedFault::Refuse).await;
    circle.until_state(&circle.engines[0], "down").await;
    assert!(start.elapsed() < INTERVAL + SLACK, "{:?}", start.elapsed());
    let start = Instant::now();
    circle.engines[0].clear_fault().await;
    circle.until_state(&circle.engines[0], "ready").await;
    assert!(start.elapsed() < INTERVAL + SLACK, "{:?}", start.elapsed());
    circle.until_one_prober().await;
    circle.redis.kill();
    circle.until_siblings(0).await;
    let counts = circle.probes(6 * INTERVAL).await;
    assert!(counts.iter().flatten().all(|count| *count >= 3), "each balancer probes each engine: {counts:?}");
    circle.redis.again().await;
    circle.until_siblings(2).await;
    circle.until_one_prober().await;
}
