//! Changes at run time: they reach all balancers, last as long as they should, and end with the file.

mod restarts;

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::common::process::{Process, Setup};
use crate::common::redis::Redis;
use crate::common::wire::{self, Wire};
use crate::common::{
    Balancer, EngineServer, Options, admin, config, engine, engines, eventually, logs, upstreams,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use vllm_lb::app::{self, LoadConfig};
use vllm_lb::config::redis;
use vllm_lb::config::types::Config;

const MEMBERS: &str = "vllm-lb:{lb}:members";
const MARK: &str = "vllm-lb:{lb}:mark";
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A balancer with its file.
struct Configured {
    balancer: Balancer,
    file: Arc<Mutex<Config>>,
}

impl Configured {
    async fn start(config: Config) -> Self {
        logs::remember();
        let file = Arc::new(Mutex::new(config.clone()));
        let read = file.clone();
        let load: LoadConfig = Arc::new(move || Ok((read.lock().expect("no panic").clone(), Vec::new())));
        let running = app::start_with(config, load).await.expect("the balancer starts");
        Configured { balancer: Balancer { running }, file }
    }

    async fn reload(&self, config: Config) {
        *self.file.lock().expect("no panic") = config;
        admin(&self.balancer, "POST", "/admin/reload", Value::Null).await.expect(200);
    }

    async fn change(&self, method: &str, name: &str, body: Value) -> wire::Answer {
        admin(&self.balancer, method, &format!("/admin/upstreams/{name}"), body).await
    }

    /// The state and the weight of an upstream.
    async fn row(&self, name: &str) -> (String, f64) {
        let row = self.change("GET", name, Value::Null).await.json();
        (row["state"].as_str().unwrap_or("none").to_string(), row["weight"].as_f64().unwrap_or(0.0))
    }

    async fn until(&self, name: &str, state: &str, weight: f64) {
        let wanted = (state.to_string(), weight);
        eventually(&format!("{name} is {wanted:?}"), async || (self.row(name).await == wanted).then_some(()))
            .await;
    }

    async fn until_siblings(&self, count: usize) {
        eventually(&format!("there are {count} siblings"), async || {
            let page = self.balancer.admin(wire::get("/admin/siblings")).await.expect(200).json();
            (page["siblings"].as_array().map(Vec::len) == Some(count)).then_some(())
        })
        .await;
    }
}

fn settings(engines: &[EngineServer], redis: &Redis) -> Config {
    let mut config = config(upstreams(engines));
    config.redis = Some(redis::url(&redis.url()).expect("is a URL"));
    config.redis_options.gauge_ttl = Duration::from_millis(1500);
    config
}

fn names(engines: &[EngineServer]) -> Vec<String> {
    engines.iter().map(|engine| engine.address().to_string()).collect()
}

/// Two balancers with the same file, which know each other.
async fn pair(config: &Config) -> [Configured; 2] {
    let both = [Configured::start(config.clone()).await, Configured::start(config.clone()).await];
    for one in &both {
        one.balancer.until_ready(config.upstreams.len()).await;
        one.until_siblings(1).await;
    }
    both
}

fn said(message: &str) -> usize {
    logs::all().iter().filter(|line| line.contains(message)).count()
}

/// A record as it was written so long ago.
fn record(age: Duration, text: &str) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("the clock is set");
    format!("{} {text}", (now - age).as_millis())
}

async fn write(redis: &Redis, records: &[(&str, String)]) {
    let mut words = vec!["HSET", MEMBERS];
    words.extend(records.iter().flat_map(|(name, text)| [*name, text.as_str()]));
    redis.ask(&words).await;
    // A balancer reads the list when its mark has changed.
    redis.ask(&["SET", MARK, &format!("of {} records", records.len())]).await;
}

// === the file ===

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_entry_of_the_file_ends_runtime_changes_at_all_balancers() {
    let (redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let (before, names) = (settings(&engines, &redis), names(&engines));
    let [one, other] = pair(&before).await;
    one.change("PATCH", &names[0], json!({"drain": true})).await.expect(200);
    one.change("PATCH", &names[1], json!({"weight": 7})).await.expect(200);
    one.change("DELETE", &names[2], Value::Null).await;
    other.until(&names[0], "draining", 1.0).await;
    other.until(&names[1], "ready", 7.0).await;
    other.until(&names[2], "none", 0.0).await;
    let mut after = before.clone();
    after.upstreams.iter_mut().for_each(|upstream| upstream.max_active = Some(9));
    after.upstreams[1].weight = 3.0;
    one.reload(after.clone()).await;
    let restarted = Configured::start(after).await;
    for balancer in [&one, &restarted] {
        balancer.until(&names[0], "ready", 1.0).await;
        balancer.until(&names[1], "ready", 3.0).await;
        balancer.until(&names[2], "ready", 1.0).await;
    }
    // Its file has not changed: all is as it has it.
    for name in &names {
        other.until(name, "ready", 1.0).await;
    }
    // What is changed from now on counts, also for a balancer that takes the same file over later.
    one.change("PATCH", &names[0], json!({"drain": true})).await.expect(200);
    other.until(&names[0], "draining", 1.0).await;
}

/// As with a reload; the process before knows the file before.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_entry_ends_runtime_changes_with_an_upgrade() {
    let (redis, engines) = (Redis::start(&[]).await, engines(2).await);
    let setup = Setup::over(&engines, &format!("redis: {}", redis.url()));
    let running = setup.start().await;
    let names = names(&engines);
    let body = json!({"drain": true}).to_string();
    for name in &names {
        let patch =
            wire::request("PATCH", &format!("/admin/upstreams/{name}"), &[wire::JSON], body.as_bytes());
        let patch = wire::with_host(&patch, &running.admin);
        Wire::connect(&running.admin).await.ask(patch).await.expect(200);
        eventually("it is written", async || {
            (redis.count(&["HEXISTS", MEMBERS, name]).await == 1).then_some(())
        })
        .await;
    }
    let changed = format!("{}, {{url: '{}', max_active: 9}}", engines[0].url(), engines[1].url());
    setup.write(&changed, &format!("redis: {}", redis.url()));
    let next = setup.upgrade().await;
    let state = async |name: &str| {
        let row = next.admin(&format!("/admin/upstreams/{name}")).await.expect(200).json();
        row["state"].as_str().unwrap_or_default().to_string()
    };
    eventually("the changed one is ready", async || (state(&names[1]).await == "ready").then_some(())).await;
    assert_eq!(state(&names[0]).await, "draining");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_the_file_names_again_is_not_drained_or_removed() {
    let (redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let (with, names) = (settings(&engines, &redis), names(&engines));
    let one = Configured::start(with.clone()).await;
    one.balancer.until_ready(3).await;
    one.change("PATCH", &names[1], json!({"drain": true})).await.expect(200);
    one.change("DELETE", &names[2], Value::Null).await;
    let mut without = with.clone();
    without.upstreams.truncate(1);
    one.reload(without).await;
    one.until(&names[1], "none", 0.0).await;
    one.reload(with.clone()).await;
    let restarted = Configured::start(with).await;
    for balancer in [&one, &restarted] {
        balancer.until(&names[1], "ready", 1.0).await;
        balancer.until(&names[2], "ready", 1.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_is_drained_elsewhere_starts_drained() {
    let (redis, engines) = (Redis::start(&[]).await, engines(2).await);
    let (both, names) = (settings(&engines, &redis), names(&engines));
    let mut first_alone = both.clone();
    first_alone.upstreams.truncate(1);
    let (one, other) = (Configured::start(both.clone()).await, Configured::start(first_alone).await);
    one.balancer.until_ready(2).await;
    one.until_siblings(1).await;
    other.until_siblings(1).await;
    one.change("PATCH", &names[1], json!({"drain": true})).await.expect(200);
    eventually("the drain is written", async || {
        (redis.count(&["HEXISTS", MEMBERS, &names[1]]).await == 1).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    other.reload(both).await;
    other.until(&names[1], "draining", 1.0).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(
        (one.row(&names[1]).await.0, other.row(&names[1]).await.0),
        ("draining".into(), "draining".into())
    );
    one.change("PATCH", &names[1], json!({"drain": false})).await.expect(200);
    other.until(&names[1], "ready", 1.0).await;
}

/// A new server is drained at the first balancer whose file names it, before the others read theirs.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_just_after_the_reload_of_another_balancer_lasts() {
    let (redis, engines) = (Redis::start(&[]).await, engines(5).await);
    let (all, names) = (settings(&engines, &redis), names(&engines));
    let first = |count: usize| {
        let mut config = all.clone();
        config.upstreams.truncate(count);
        config
    };
    let [one, other] = pair(&first(1)).await;
    for (at, name) in names.iter().enumerate().skip(1) {
        one.reload(first(at + 1)).await;
        one.until(name, "ready", 1.0).await;
        one.change("PATCH", name, json!({"drain": true})).await.expect(200);
        eventually("the drain is written", async || {
            (redis.count(&["HEXISTS", MEMBERS, name]).await == 1).then_some(())
        })
        .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        other.reload(first(at + 1)).await;
        other.until(name, "draining", 1.0).await;
        assert_eq!(one.row(name).await.0, "draining");
    }
}

/// Without siblings a reload agrees with a restart, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_entry_ends_a_drain_without_a_redis() {
    let engines = engines(1).await;
    let (before, names) = (config(upstreams(&engines)), names(&engines));
    let one = Configured::start(before.clone()).await;
    one.balancer.until_ready(1).await;
    one.change("PATCH", &names[0], json!({"drain": true})).await.expect(200);
    one.reload(before.clone()).await;
    assert_eq!(one.row(&names[0]).await.0, "draining", "the file has nothing new");
    let mut after = before;
    after.upstreams[0].weight = 2.0;
    one.reload(after).await;
    one.until(&names[0], "ready", 2.0).await;
}

// === records ===

#[tokio::test(flavor = "multi_thread")]
async fn removals_expire_after_seven_days_and_other_changes_do_not() {
    let (redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let (config, names) = (settings(&engines, &redis), names(&engines));
    let removed = json!({"removed": true}).to_string();
    let drained = json!({"drain": true}).to_string();
    let records = [
        (names[0].as_str(), record(8 * DAY, &removed)),
        (names[1].as_str(), record(6 * DAY, &removed)),
        (names[2].as_str(), record(80 * DAY, &drained)),
    ];
    write(&redis, &records).await;
    let one = Configured::start(config).await;
    one.until(&names[0], "ready", 1.0).await;
    one.until(&names[1], "none", 0.0).await;
    one.until(&names[2], "draining", 1.0).await;
    eventually("the expired record is deleted", async || {
        (redis.count(&["HEXISTS", MEMBERS, &names[0]]).await == 0).then_some(())
    })
    .await;
    // The file names it: the removal that is old is written again.
    eventually("the removal that counts is renewed", async || {
        let stored = format!("{:?}", redis.ask(&["HGET", MEMBERS, &names[1]]).await);
        (!stored.contains(records[1].1.as_str())).then_some(())
    })
    .await;
    // An older state of Redis, such as a snapshot, does not bring it back.
    write(&redis, &records[..1]).await;
    redis.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    eventually("it is deleted again", async || {
        (redis.count(&["HEXISTS", MEMBERS, &names[0]]).await == 0).then_some(())
    })
    .await;
    assert_eq!(one.row(&names[0]).await.0, "ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_beyond_ten_thousand_names_is_rejected() {
    let (redis, engines) = (Redis::start(&[]).await, engines(2).await);
    let (config, names) = (settings(&engines, &redis), names(&engines));
    let drained = record(DAY, &json!({"drain": true}).to_string());
    let others = (1..10_000).map(|number| format!("gpu-{number}"));
    let known: Vec<String> = others.chain([names[1].clone()]).collect();
    let records: Vec<(&str, String)> = known.iter().map(|name| (name.as_str(), drained.clone())).collect();
    write(&redis, &records).await;
    let one = Configured::start(config).await;
    one.until(&names[0], "ready", 1.0).await;
    // The list is read, which may take longer than the start waits for it.
    one.until(&names[1], "draining", 1.0).await;
    let answer = one.change("PATCH", &names[0], json!({"drain": true})).await.expect(507).json();
    assert!(answer["error"].as_str().is_some_and(|error| error.contains("10000 names")), "{answer}");
    assert_eq!(one.row(&names[0]).await.0, "ready", "nothing has changed");
    assert_eq!(said("rejected a change, the list of changed upstreams is full"), 1);
    // A longer list, of another program.
    assert_eq!(said("the list of changed upstreams is full, further names are ignored"), 0);
    write(&redis, &[("one more", drained)]).await;
    redis.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    eventually("it is reported", async || {
        (said("the list of changed upstreams is full, further names are ignored") == 1).then_some(())
    })
    .await;
}

// === trust ===

#[tokio::test(flavor = "multi_thread")]
async fn a_sibling_cannot_name_a_socket_or_another_name() {
    let (redis, engines) = (Redis::start(&[]).await, engines(1).await);
    let upstream = |url: &str, name: &str| json!({"upstream": {"url": url, "name": name}}).to_string();
    let records = [
        ("socket", record(DAY, &upstream("unix:/run/docker.sock", "socket"))),
        ("other", record(DAY, &upstream("http://127.0.0.1:9", "another"))),
        (
            "heavy",
            record(DAY, r#"{"upstream": {"url": "http://127.0.0.1:9", "weight": 0, "name": "heavy"}}"#),
        ),
        ("key", record(DAY, r#"{"upstream": {"url": "http://h:9", "api_key_env": "HOME", "name": "key"}}"#)),
        ("good", record(DAY, &upstream("http://127.0.0.1:9", "good"))),
    ];
    write(&redis, &records).await;
    let one = Configured::start(settings(&engines, &redis)).await;
    let rows = admin(&one.balancer, "GET", "/admin/upstreams", Value::Null).await.expect(200).json();
    let rows: Vec<&str> =
        rows.as_array().into_iter().flatten().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert!(rows.contains(&"good"));
    assert_eq!(said("cannot apply a sibling's change of an upstream"), 4);
    // Nor is one shared.
    let socket = json!({"url": "unix:/run/vllm.sock", "name": "mine"});
    let error = admin(&one.balancer, "POST", "/admin/upstreams", socket).await.expect(400).json();
    assert!(error["error"].as_str().is_some_and(|error| error.contains("unix sockets")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_does_not_stand_in_redis() {
    let (redis, engines) = (Redis::start(&[]).await, engines(2).await);
    let one = Configured::start(settings(&engines[..1], &redis)).await;
    one.balancer.until_ready(1).await;
    let added = json!({"url": engines[1].url(), "name": "more", "api_key": "hunter2"});
    let error = admin(&one.balancer, "POST", "/admin/upstreams", added.clone()).await.expect(400).json();
    assert!(error["error"].as_str().is_some_and(|error| error.contains("api_key_env")), "{error}");
    let unset = json!({"url": engines[1].url(), "name": "more", "api_key_env": "VLLM_LB_KEY_UNSET"});
    let error = admin(&one.balancer, "POST", "/admin/upstreams", unset).await.expect(400).json();
    assert!(error["error"].as_str().is_some_and(|error| error.contains("is not set")), "{error}");
    let stored = format!("{:?}", redis.ask(&["HGETALL", MEMBERS]).await);
    assert!(!stored.contains("hunter2"), "{stored}");
    // Without a Redis the key stays in this process.
    let alone = Configured::start(config(upstreams(&engines[..1]))).await;
    admin(&alone.balancer, "POST", "/admin/upstreams", added).await.expect(201);
}

/// The name of the key is shared, and every balancer has the key itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_named_key_reaches_all_balancers_and_survives_a_restart() {
    let redis = Redis::start(&[]).await;
    let open = engine(Options::default()).await;
    let locked = engine(Options { api_key: Some("hunter2".into()), ..Options::default() }).await;
    let more = format!("redis: {}\nredis_options: {{gauge_ttl: 1500ms}}", redis.url());
    let setup = || {
        let mut setup = Setup::over([&open], &more);
        setup.variable("VLLM_LB_KEY_GPU", "hunter2");
        setup
    };
    let setups = [setup(), setup()];
    let (one, mut other) = (setups[0].start().await, setups[1].start().await);
    let body = json!({"url": locked.url(), "name": "locked", "api_key_env": "VLLM_LB_KEY_GPU"}).to_string();
    let request = wire::request("POST", "/admin/upstreams?wait=20s", &[wire::JSON], body.as_bytes());
    let added = Wire::connect(&one.admin).await.ask(wire::with_host(&request, &one.admin)).await;
    assert!(!added.expect(201).text().contains("hunter2"));
    let until_ready = async |process: &Process| {
        eventually("the upstream is ready", async || {
            let row = process.admin("/admin/upstreams/locked").await.json();
            (row["state"] == "ready" && row["models"] == json!(["sim"])).then_some(())
        })
        .await;
    };
    until_ready(&one).await;
    until_ready(&other).await;
    other.signal(Signal::TERM);
    other.ended().await;
    until_ready(&setups[1].start().await).await;
    let stored = format!("{:?}", redis.ask(&["HGETALL", MEMBERS]).await);
    assert!(stored.contains("VLLM_LB_KEY_GPU") && !stored.contains("hunter2"), "{stored}");
}

/// A mistake in a deployment: both fleets have the default prefix.
#[tokio::test(flavor = "multi_thread")]
async fn two_fleets_on_one_prefix_are_reported() {
    let (redis, engines) = (Redis::start(&[]).await, engines(2).await);
    let one = Configured::start(settings(&engines[..1], &redis)).await;
    let other = Configured::start(settings(&engines[1..], &redis)).await;
    let warning = "a sibling serves none of these upstreams, give each fleet a prefix of its own";
    eventually("both report it", async || (said(warning) == 2).then_some(())).await;
    let shares = async |balancer: &Configured| {
        let page = balancer.balancer.admin(wire::get("/admin/siblings")).await.expect(200).json();
        page["siblings"][0]["shares_upstreams"].clone()
    };
    assert_eq!(shares(&one).await, json!(false));
    other.reload(settings(&engines, &redis)).await;
    for balancer in [&one, &other] {
        eventually("they share one", async || (shares(balancer).await == json!(true)).then_some(())).await;
    }
    assert_eq!(said(warning), 2, "once each");
}
