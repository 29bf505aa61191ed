//! Several balancers over the same engines and one real Redis: they choose as one, and lose nothing by it.

use std::time::{Duration, Instant};

use crate::common::body::stream;
use crate::common::certs::Certs;
use crate::common::clients::{Clients, none};
use crate::common::ports::reserved_port;
use crate::common::process::{Process, Setup};
use crate::common::redis::Redis;
use crate::common::wire::{self, Wire, post};
use crate::common::{Balancer, EngineServer, admin, config, engine, engines, eventually, paced, upstreams};
use serde_json::{Value, json};
use vllm_lb::config::redis;
use vllm_lb::config::types::Config;
use vllm_lb::fleet::upstream::UpstreamLoad;

const CHAT: &str = "/v1/chat/completions";

fn settings(engines: &[EngineServer], redis: &Redis) -> Config {
    let mut config = config(upstreams(engines));
    config.redis = Some(redis::url(&redis.url()).expect("is a URL"));
    config.redis_options.gauge_ttl = Duration::from_millis(1500);
    config.expose = true;
    config
}

async fn pair(engines: &[EngineServer], redis: &Redis) -> [Balancer; 2] {
    let one = Balancer::ready(settings(engines, redis)).await;
    let other = Balancer::ready(settings(engines, redis)).await;
    eventually("they know of each other", async || {
        (siblings(&one).await.len() == 1 && siblings(&other).await.len() == 1).then_some(())
    })
    .await;
    [one, other]
}

async fn siblings(balancer: &Balancer) -> Vec<Value> {
    let page = balancer.admin(wire::get("/admin/siblings")).await.expect(200).json();
    page["siblings"].as_array().expect("is a list").clone()
}

async fn state(balancer: &Balancer, name: &str) -> String {
    let answer = admin(balancer, "GET", &format!("/admin/upstreams/{name}"), Value::Null).await;
    let row = answer.json();
    row["state"].as_str().unwrap_or("none").to_string()
}

async fn until_state(balancer: &Balancer, name: &str, wanted: &str) {
    eventually(&format!("{name} is {wanted}"), async || {
        (state(balancer, name).await == wanted).then_some(())
    })
    .await;
}

/// A turn of a conversation whose first message is long.
fn turn(conversation: &str, turns: usize) -> String {
    let long = |turn: usize| format!("{conversation} {turn} ").repeat(600);
    let messages: Vec<Value> =
        (0..turns).map(|turn| json!({"role": "user", "content": long(turn)})).collect();
    json!({"model": "sim", "messages": messages, "max_tokens": 2}).to_string()
}

/// Waits until each has heard of a moment that is now.
async fn until_told(balancers: &[Balancer; 2]) {
    let heard = async || balancers[0].metric("vllm_lb_exchange_messages_total").await;
    let before = heard().await;
    // Both are counted by the same process: what one says the other hears, and something is said by each
    // within a third of `gauge_ttl`.
    eventually("both have said something, and heard it", async || {
        (heard().await >= before + 6.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_keeps_its_upstream_through_any_balancer() {
    let (redis, engines) = (Redis::start(&[]).await, engines(4).await);
    let mut config = settings(&engines, &redis);
    config.redis_options.gauge_ttl = Duration::from_millis(600);
    let balancers = [Balancer::ready(config.clone()).await, Balancer::ready(config).await];
    for number in 0..6 {
        let conversation = format!("conversation {number}");
        let mut place: Option<String> = None;
        for turns in 1..5 {
            let balancer = &balancers[turns % 2];
            let answer = balancer.ask(post(CHAT, turn(&conversation, turns))).await.expect(200);
            let upstream = answer.header("x-vllm-lb-upstream").to_string();
            assert_eq!(*place.get_or_insert(upstream.clone()), upstream, "{conversation}, turn {turns}");
            until_told(&balancers).await;
        }
    }
}

/// No prompt is remembered here: only the session says where it was.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_survive_their_balancers() {
    let (redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let mut config = settings(&engines, &redis);
    config.redis_options.gauge_ttl = Duration::from_millis(600);
    config.index.blocks = Some(0);
    let ask = async |balancer: &Balancer, number: usize| {
        let session = format!("session {number}");
        let headers = [wire::JSON, ("x-session-id", session.as_str())];
        let body = turn("the same", 1);
        balancer.until_idle().await;
        let answer = balancer.ask(wire::request("POST", CHAT, &headers, body.as_bytes())).await.expect(200);
        answer.header("x-vllm-lb-upstream").to_string()
    };
    let first = [Balancer::ready(config.clone()).await, Balancer::ready(config.clone()).await];
    let mut before = Vec::new();
    for number in 0..8 {
        before.push(ask(&first[number % 2], number).await);
    }
    until_told(&first).await;
    for balancer in first {
        balancer.stop().await;
    }
    let next = Balancer::ready(config).await;
    for (number, before) in before.iter().enumerate() {
        assert_eq!(ask(&next, number).await, *before, "session {number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_flight_of_one_balancer_count_for_all() {
    let redis = Redis::start(&[]).await;
    let engines = [paced(Duration::from_millis(20)).await];
    let [one, other] = pair(&engines, &redis).await;
    let name = engines[0].address().to_string();
    let seen = |balancer: &Balancer| {
        let snapshot = balancer.running.fleet.snapshot();
        snapshot.by_name(&name).expect("is there").upstream.siblings()
    };
    let mut client = one.client().await;
    client.send(post(CHAT, stream("sim", 2000))).await;
    eventually("the other knows", async || (seen(&other).active == 1).then_some(())).await;
    assert!(seen(&other).context > 0);
    let rows = siblings(&other).await;
    assert_eq!(rows[0]["active"], 1);
    assert!(rows[0]["age_seconds"].as_f64().is_some_and(|age| age < 1.0), "{rows:?}");
    assert_eq!(other.loads(), [UpstreamLoad::default()], "its own are its own");
    let row = admin(&other, "GET", &format!("/admin/upstreams/{name}"), Value::Null).await.json();
    assert_eq!((&row["active"], &row["siblings_active"]), (&json!(0), &json!(1)));
    drop(client);
    eventually("the other knows", async || (seen(&other) == UpstreamLoad::default()).then_some(())).await;
    one.stop().await;
    eventually("it is alone", async || siblings(&other).await.is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_flight_count_for_an_upstream_that_is_added_later() {
    let redis = Redis::start(&[]).await;
    let [first, second] = [paced(Duration::from_millis(20)).await, paced(Duration::from_millis(20)).await];
    let name = first.address().to_string();
    let one = Balancer::ready(settings(std::slice::from_ref(&first), &redis)).await;
    let other = Balancer::ready(settings(std::slice::from_ref(&second), &redis)).await;
    let mut client = one.client().await;
    client.send(post(CHAT, stream("sim", 2000))).await;
    eventually("the other has heard of the request", async || {
        let rows = siblings(&other).await;
        (rows.len() == 1 && rows[0]["active"] == 1).then_some(())
    })
    .await;
    assert!(other.running.fleet.snapshot().by_name(&name).is_none());
    let added = json!({"url": first.url(), "name": name});
    admin(&other, "POST", "/admin/upstreams?wait=20s", added).await.expect(201);
    eventually("the request counts for the new upstream", async || {
        let snapshot = other.running.fleet.snapshot();
        snapshot.by_name(&name).filter(|entry| entry.upstream.siblings().active == 1).map(drop)
    })
    .await;
    drop(client);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_change_reaches_all_balancers_and_survives_restarts() {
    let (redis, engines) = (Redis::start(&[]).await, engines(2).await);
    let more = engine(crate::common::Options::default()).await;
    let [one, other] = pair(&engines, &redis).await;
    let names = [engines[0].address().to_string(), engines[1].address().to_string()];
    let added = json!({"url": more.url(), "name": "more", "weight": 2});
    admin(&one, "POST", "/admin/upstreams?wait=20s", added).await.expect(201);
    until_state(&other, "more", "ready").await;
    let path = |name: &str| format!("/admin/upstreams/{name}");
    admin(&other, "PATCH", &path(&names[0]), json!({"state": "drain"})).await.expect(200);
    admin(&other, "PATCH", &path("more"), json!({"weight": 7})).await.expect(200);
    until_state(&one, &names[0], "draining").await;
    admin(&one, "DELETE", &path(&names[1]), Value::Null).await;
    until_state(&other, &names[1], "none").await;
    let weight = async |balancer: &Balancer| {
        admin(balancer, "GET", &path("more"), Value::Null).await.json()["weight"].as_f64()
    };
    eventually("the weight is known", async || (weight(&one).await == Some(7.0)).then_some(())).await;
    one.stop().await;
    other.stop().await;
    // It starts with the list, before it serves.
    let next = Balancer::start(settings(&engines, &redis)).await;
    assert_eq!(state(&next, &names[0]).await, "draining");
    // One that is being removed is shown until the keeper has seen that no request is on it.
    assert!(["draining", "none"].contains(&state(&next, &names[1]).await.as_str()));
    until_state(&next, &names[1], "none").await;
    until_state(&next, "more", "ready").await;
    assert_eq!(weight(&next).await, Some(7.0));
    admin(&next, "PATCH", &path(&names[0]), json!({"state": "ready"})).await.expect(200);
    until_state(&next, &names[0], "ready").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_when_redis_fails() {
    let (mut redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let [one, other] = pair(&engines, &redis).await;
    let clients = [Clients::start(&one, 4), Clients::start(&other, 4)];
    let more = async || {
        for clients in &clients {
            clients.until_more(50).await;
        }
    };
    more().await;
    redis.kill();
    more().await;
    redis.again().await;
    more().await;
    redis.freeze();
    more().await;
    one.until_metric("vllm_lb_redis_up", 0.0).await;
    more().await;
    redis.thaw();
    redis.ask(&["FLUSHALL"]).await;
    redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
    more().await;
    redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
    redis.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    more().await;
    let [first, second] = clients;
    assert_eq!((first.end().await, second.end().await), (none(), none()));
    one.until_idle().await;
    other.until_idle().await;
    for balancer in [&one, &other] {
        eventually("each is there, and has nothing in flight", async || {
            let rows = siblings(balancer).await;
            (rows.len() == 1 && rows[0]["active"] == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_redis_it_starts_within_a_second_and_serves() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.redis = Some(redis::url("redis://127.0.0.1:1").expect("is a URL"));
    let start = Instant::now();
    let balancer = Balancer::start(config).await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    balancer.until_ready(1).await;
    balancer.ask(post(CHAT, turn("a", 1))).await.expect(200);
    let page = balancer.admin(wire::get("/admin/siblings")).await.expect(200).json();
    assert_eq!((&page["works"], &page["redis"]), (&json!(false), &json!("redis://127.0.0.1:1/0")));
    balancer.until_metric("vllm_lb_siblings", 0.0).await;
}

async fn row(process: &Process, key: &str) -> Value {
    let page = process.admin("/admin/siblings").await.expect(200).json();
    page["siblings"][0][key].clone()
}

/// As processes, over TLS with an authority of our own; one of them is killed in mid-stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_that_is_killed_leaves_nothing_behind() {
    let certs = Certs::new();
    let files = certs.listen();
    let path = |path: &std::path::Path| path.display().to_string();
    let (certificate, key, ca) = (path(&files.certificate), path(&files.key), path(&certs.authority()));
    let port = reserved_port().to_string();
    let tls = ["--tls-port", &port, "--tls-cert-file", &certificate, "--tls-key-file", &key];
    let client = ["--tls-ca-cert-file", &ca, "--tls-auth-clients", "no"];
    let _redis = Redis::start(&[&tls[..], &client[..]].concat()).await;
    let engine = paced(Duration::from_millis(20)).await;
    let more = format!("redis: rediss://localhost:{port}/0\nredis_options: {{gauge_ttl: 1s}}\nexpose: true");
    let mut setups = [Setup::over([&engine], &more), Setup::over([&engine], &more)];
    setups.iter_mut().for_each(|setup| setup.variable("SSL_CERT_FILE", &ca));
    let (mut one, other) = (setups[0].start().await, setups[1].start().await);
    let mut client = Wire::connect(&one.addresses[0]).await;
    client.send(post(CHAT, stream("sim", 2000))).await;
    client.head().await;
    eventually("the other knows", async || (row(&other, "active").await == 1).then_some(())).await;
    one.signal(rustix::process::Signal::KILL);
    let start = Instant::now();
    one.ended().await;
    eventually("it is gone", async || row(&other, "active").await.is_null().then_some(())).await;
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    client.rest().await;
    let mut client = Wire::connect(&other.addresses[0]).await;
    client.ask(post(CHAT, stream("sim", 2))).await.expect(200);
}
