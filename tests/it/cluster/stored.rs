//! Responses that live in the memory of the engine that made them: a request for one, through any balancer,
//! is answered by that engine, and work in the background needs no client that waits for it.

mod lookup_obstacles;
mod named;

use std::collections::HashMap;
use std::time::Duration;

use crate::common::body::events;
use crate::common::h2::{self, H2};
use crate::common::redis::Redis;
use crate::common::wire::{Answer, CHUNKED, JSON, Wire, chunk, get, head, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, config, engine, engines, eventually, paced, upstreams,
};
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::redis;
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::{Config, Preset};
use vllm_lb::fleet::FleetChange;

const RESPONSES: &str = "/v1/responses";

/// New conversations take turns; answers name their upstream.
fn settings(engines: &[EngineServer]) -> Config {
    let mut config = config(upstreams(engines));
    config.balance = Preset::RoundRobin.balance();
    config.expose = true;
    config
}

fn upstream_of(answer: &Answer) -> String {
    answer.header("x-vllm-lb-upstream").to_string()
}

fn id_of(answer: &Answer) -> String {
    let text = answer.text();
    // A stream's first event has it, too.
    let first = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or(text);
    let read: Value = serde_json::from_str(first).expect("JSON");
    let response = if read["response"].is_object() { &read["response"] } else { &read };
    response["id"].as_str().expect("a response has an id").to_string()
}

async fn make(balancer: &Balancer, body: Value) -> Answer {
    balancer.ask(post(RESPONSES, body.to_string())).await.expect(200)
}

async fn status_of(balancer: &Balancer, id: &str) -> Value {
    balancer.ask(get(&format!("{RESPONSES}/{id}"))).await.json()["status"].clone()
}

/// How often engines were asked whether they have a response, or for one.
fn asked_for(engines: &[EngineServer]) -> usize {
    let all = engines.iter().flat_map(EngineServer::requests);
    all.filter(|one| one.method == "GET" && one.path.starts_with("/v1/responses/")).count()
}

/// How often Redis was too late with its answer for a request to wait, which then searches the engines: on a
/// busy machine that is no defect.
async fn too_late(balancer: &Balancer) -> usize {
    balancer.metric("vllm_lb_exchange_lost_total{what=\"lookup\"}").await as usize
}

/// The answer to a request for which Redis was in time: sent again when it was too late.
async fn in_time(balancer: &Balancer, request: impl AsRef<[u8]>) -> Answer {
    eventually("Redis is in time", async || {
        let before = too_late(balancer).await;
        let answer = balancer.ask(&request).await;
        (too_late(balancer).await == before).then_some(answer)
    })
    .await
}

/// One conversation: where it is, and its last response.
struct Conversation {
    number: usize,
    upstream: String,
    last: String,
}

impl Conversation {
    fn turn(&self, turn: usize) -> Value {
        let mut body = json!({"model": "sim", "input": format!("turn {turn}"), "max_output_tokens": 2});
        body["stream"] = json!((self.number + turn).is_multiple_of(2));
        if turn > 0 {
            body["previous_response_id"] = json!(self.last);
        }
        body
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_conversations_stay_where_they_are_through_two_balancers_and_restarts() {
    let engines = engines(3).await;
    let begin = async || Balancer::ready(settings(&engines)).await;
    let mut balancers = [begin().await, begin().await];
    let mut all: Vec<Conversation> = Vec::new();
    for number in 0..200 {
        let mut one = Conversation { number, upstream: String::new(), last: String::new() };
        let answer = make(&balancers[number % 2], one.turn(0)).await;
        (one.upstream, one.last) = (upstream_of(&answer), id_of(&answer));
        all.push(one);
    }
    let mut spread: HashMap<String, usize> = HashMap::new();
    all.iter().for_each(|one| *spread.entry(one.upstream.clone()).or_default() += 1);
    assert!(spread.len() == 3 && spread.values().all(|count| *count > 50), "{spread:?}");
    for turn in 1..4 {
        // One balancer after the other begins anew, and knows nothing of what was.
        let [one, other] = balancers;
        one.stop().await;
        balancers = [other, begin().await];
        for one in &mut all {
            let answer = make(&balancers[(one.number + turn) % 2], one.turn(turn)).await;
            assert_eq!(upstream_of(&answer), one.upstream, "conversation {} turn {turn}", one.number);
            one.last = id_of(&answer);
        }
    }
    assert_eq!(asked_for(&engines), 0, "nobody had to be asked");

    // An engine begins anew, and only its responses are gone.
    engines[0].restart().await;
    let lost = crate::common::direct(&engines[0]);
    let mut gone = 0;
    for one in &all {
        let balancer = &balancers[one.number % 2];
        let was = one.upstream == lost;
        let next = balancer.ask(post(RESPONSES, one.turn(9).to_string())).await;
        let found = balancer.ask(get(&format!("{RESPONSES}/{}", one.last))).await;
        let wanted = if was { 404 } else { 200 };
        assert_eq!((next.status, found.status), (wanted, wanted), "conversation {}", one.number);
        if was {
            gone += 1;
            let message = format!("Response with id '{}' not found.", one.last);
            assert_eq!(next.json()["error"]["message"], message.as_str());
            assert_eq!(next.json()["error"]["param"], "response_id");
            assert_eq!(found.json(), next.json());
        }
    }
    assert_eq!(gone, spread[lost.as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_gets_the_body_as_it_was_and_an_id_before_it() {
    let engine = [engine(Options::default()).await];
    let balancer = Balancer::ready(settings(&engine)).await;
    let last = || String::from_utf8(engine[0].requests().pop().unwrap().body.to_vec()).unwrap();
    let body = "\n {  \"model\":\"sim\",\"input\" : \"h\\u00e9\", \"max_output_tokens\":1}\n";
    let answer = balancer.ask(post(RESPONSES, body)).await.expect(200);
    let id = id_of(&answer);
    assert_eq!(last(), body.replacen('{', &format!("{{\"request_id\":\"{id}\","), 1));

    // Chunked, and cut right behind the brace.
    let (first, rest) = body.as_bytes().split_at(3);
    let mut client = balancer.client().await;
    client.send(head("POST", RESPONSES, &[JSON, CHUNKED])).await;
    client.send([chunk(first), chunk(rest), chunk(b"")].concat()).await;
    let other = id_of(&client.answer().await.expect(200));
    assert_ne!(other, id);
    assert_eq!(last(), body.replacen('{', &format!("{{\"request_id\":\"{other}\","), 1));

    let mut h2 = H2::connect(balancer.address()).await;
    let third = h2.ask(h2::post(RESPONSES), &[body.into()]).await.expect(200);
    let third: Value = serde_json::from_slice(&third.body).unwrap();
    let field = format!("{{\"request_id\":\"{}\",", third["id"].as_str().unwrap());
    assert_eq!(last(), body.replacen('{', &field, 1));

    for untouched in [
        r#"{"model":"sim","input":"a","store":false}"#,
        r#"{"model":"sim","input":"a","request_id":"mine"}"#,
        r#"{"model":"sim","input":"a","request_id":null}"#,
        r#"{"model":"sim","input":"a","request_id":"resp_0123456789abcdef0123456789abcdef"}"#,
    ] {
        balancer.ask(post(RESPONSES, untouched)).await.expect(200);
        assert_eq!(last(), untouched);
    }
    // A refusal counts the id, too.
    let refused = balancer.ask(post(RESPONSES, r#"{"model":"sim","stream":false}"#)).await.expect(400);
    assert!(refused.text().contains("<dict of 3 items>"), "{}", refused.text());
    for odd in ["{}", "{", "[]", "null", "", "{\"model\":\"sim\"", "{,}"] {
        let answer = balancer.ask(post(RESPONSES, odd)).await;
        assert!((400..500).contains(&answer.status), "{odd}: {}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_id_names_the_answering_engine_after_retries() {
    let engines = engines(2).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    engines[0].set_fault(InjectedFault::Status { status: 503, body: "{}".into() }).await;
    for _ in 0..4 {
        let answer = make(&balancer, json!({"model": "sim", "input": "a"})).await;
        assert_eq!(upstream_of(&answer), crate::common::direct(&engines[1]));
        balancer.ask(get(&format!("{RESPONSES}/{}", id_of(&answer)))).await.expect(200);
    }
    assert!(balancer.metric("vllm_lb_retries_total").await > 0.0, "none was tried again");
    assert_eq!(asked_for(&engines), 4, "each was found at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_own_ids_are_learnt_and_shared() {
    let (redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let mut config = settings(&engines);
    config.redis = Some(redis::url(&redis.url()).unwrap());
    let one = Balancer::ready(config.clone()).await;
    let other = Balancer::ready(config.clone()).await;
    let mut places = Vec::new();
    for number in 0..6 {
        let id = format!("mine-{number}");
        let body = json!({"model": "sim", "input": "a", "request_id": id, "stream": number % 2 == 0});
        places.push(upstream_of(&make(&one, body).await));
    }
    // A balancer that begins later knows nothing, and finds it in Redis.
    eventually("Redis has the last", async || {
        let count = redis.count(&["EXISTS", "vllm-lb:{lb}:r:mine-5"]).await;
        (count == 1).then_some(())
    })
    .await;
    redis.ask(&["DEL", "vllm-lb:{lb}:stream"]).await;
    let third = Balancer::ready(config).await;
    for balancer in [&one, &other, &third] {
        for (number, place) in places.iter().enumerate() {
            let previous = format!("mine-{number}");
            let body = json!({"model": "sim", "input": "b", "previous_response_id": previous});
            assert_eq!(&upstream_of(&make(balancer, body).await), place);
        }
    }
    let (mut late, mut found) = (0, 0);
    for balancer in [&one, &other, &third] {
        late += too_late(balancer).await;
        found += balancer.metric("vllm_lb_responses_found_total{by=\"redis\"}").await as usize;
    }
    let asked = asked_for(&engines);
    assert!(asked <= 3 * late, "{asked} were asked, and Redis was too late {late} times");
    assert!(found + late >= 6, "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_engine_answers_for_its_stored_responses_until_removed() {
    let engines = engines(2).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    let first = make(&balancer, json!({"model": "sim", "input": "a"})).await;
    let (name, id) = (upstream_of(&first), id_of(&first));
    let fleet = &balancer.running.fleet;
    fleet.apply(vec![FleetChange::Drain { name: name.clone(), drain: true }]).await.unwrap();
    for _ in 0..3 {
        let new = make(&balancer, json!({"model": "sim", "input": "a"})).await;
        assert_ne!(upstream_of(&new), name);
        let next = make(&balancer, json!({"model": "sim", "input": "b", "previous_response_id": id})).await;
        assert_eq!(upstream_of(&next), name);
    }
    let path = format!("{RESPONSES}/{id}");
    balancer.ask(get(&path)).await.expect(200);
    fleet.apply(vec![FleetChange::Remove { name, force: false }]).await.unwrap();
    balancer.ask(get(&path)).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_engine_has_lost_its_stored_responses() {
    let engines = engines(2).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    let first = make(&balancer, json!({"model": "sim", "input": "a"})).await;
    let (name, id) = (upstream_of(&first), id_of(&first));
    let engine = engines.iter().find(|engine| crate::common::direct(engine) == name).unwrap();
    let path = format!("{RESPONSES}/{id}");
    let next = post(RESPONSES, json!({"model": "sim", "input": "b", "previous_response_id": id}).to_string());
    // The engine reports bad health: no other engine can answer, and this one may recover.
    engine.set_health(Some(503));
    balancer.until_ready(1).await;
    eventually("it is given up", async || (balancer.ask(get(&path)).await.status == 503).then_some(())).await;
    let other = engines.iter().find(|other| other.address() != engine.address()).unwrap();
    let before = other.stats().received;
    let answer = balancer.ask(&next).await.expect(503);
    assert!(answer.json()["error"]["message"].is_string());
    engine.set_health(None);
    balancer.until_ready(2).await;
    balancer.ask(get(&path)).await.expect(200);
    engine.set_fault(InjectedFault::Refuse).await;
    eventually("it is lost", async || (balancer.ask(get(&path)).await.status == 404).then_some(())).await;
    balancer.ask(&next).await.expect(404);
    assert_eq!(other.stats().received, before, "nobody else was asked to go on");
}

// === background ===

#[tokio::test(flavor = "multi_thread")]
async fn a_background_response_completes_without_its_client() {
    let engines = [paced(Duration::from_millis(20)).await];
    let mut config = settings(&engines);
    config.upstreams[0].max_active = Some(1);
    let balancer = Balancer::ready(config).await;
    let busy = json!({"model": "sim", "input": "a", "max_output_tokens": 60, "store": false, "stream": true});
    let mut first = balancer.client().await;
    first.send(post(RESPONSES, busy.to_string())).await;
    first.head().await;
    // Both wait for room, and leave.
    for (waiting, id, background) in [(1, "waits", true), (2, "leaves", false)] {
        let body = json!({"model": "sim", "input": id, "request_id": id, "background": background});
        let mut client = balancer.client().await;
        client.send(post(RESPONSES, body.to_string())).await;
        eventually("it waits", async || (balancer.running.fleet.queue().len() == waiting).then_some(()))
            .await;
    }
    drop(first);
    eventually("it is done", async || {
        let found = balancer.ask(get(&format!("{RESPONSES}/waits"))).await;
        (found.status == 200 && found.json()["status"] == "completed").then_some(())
    })
    .await;
    balancer.until_idle().await;
    balancer.ask(get(&format!("{RESPONSES}/leaves"))).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_in_the_background_goes_on_when_its_client_leaves() {
    let engines = [paced(Duration::from_millis(5)).await];
    let balancer = Balancer::ready(settings(&engines)).await;
    for background in [true, false] {
        let mut body = json!({"model": "sim", "input": "a", "stream": true, "max_output_tokens": 100});
        body["request_id"] = json!(format!("job-{background}"));
        body["background"] = json!(background);
        let mut client = balancer.client().await;
        client.send(post(RESPONSES, body.to_string())).await;
        let head = client.head().await;
        assert_eq!(head.status, 200);
    }
    balancer.until_idle().await;
    assert_eq!(status_of(&balancer, "job-true").await, "incomplete", "all its tokens are there");
    balancer.ask(get(&format!("{RESPONSES}/job-false"))).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_background_stream_is_resumed_through_another_balancer() {
    let engines = [paced(Duration::from_millis(5)).await, paced(Duration::from_millis(5)).await];
    let [one, other] = [Balancer::ready(settings(&engines)).await, Balancer::ready(settings(&engines)).await];
    for number in 0..4 {
        let body = json!({
            "model": "sim", "input": format!("{number}"), "background": true, "stream": true,
            "max_output_tokens": 20,
        });
        let whole = make(&one, body).await;
        let id = id_of(&whole);
        let events = events(&whole.body);
        assert!(events.len() > 20, "{events:?}");
        // All of it, and what came behind an event.
        for (query, from) in [("stream=true", 0), ("stream=true&starting_after=7", 8)] {
            let again = other.ask(get(&format!("{RESPONSES}/{id}?{query}"))).await.expect(200);
            assert!(again.header("content-type").starts_with("text/event-stream"));
            assert_eq!(crate::common::body::events(&again.body), events[from..]);
        }
    }
    // One that goes on is heard to its end.
    let body = json!({
        "model": "sim", "input": "long", "background": true, "stream": true, "max_output_tokens": 100,
        "request_id": "long",
    });
    let mut client = one.client().await;
    client.send(post(RESPONSES, body.to_string())).await;
    client.head().await;
    drop(client);
    let again = other.ask(get(&format!("{RESPONSES}/long?stream=true"))).await.expect(200);
    assert!(again.text().contains("event: response.completed"), "{}", again.text());
    let plain = make(&one, json!({"model": "sim", "input": "a"})).await;
    let path = format!("{RESPONSES}/{}?stream=true", id_of(&plain));
    assert_eq!(other.ask(get(&path)).await.expect(400).json()["error"]["message"], "Unknown response_id");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_can_be_followed_and_cancelled_through_any_balancer() {
    let engines = [paced(Duration::from_millis(20)).await, paced(Duration::from_millis(20)).await];
    let [one, other] = [Balancer::ready(settings(&engines)).await, Balancer::ready(settings(&engines)).await];
    let job = json!({"model": "sim", "input": "a", "background": true, "max_output_tokens": 1000});
    let made = make(&one, job).await;
    let id = id_of(&made);
    assert_eq!(status_of(&other, &id).await, "queued");
    let cancelled = other.ask(post(&format!("{RESPONSES}/{id}/cancel"), "")).await.expect(200);
    assert_eq!(cancelled.json()["status"], "cancelled");
    assert_eq!(status_of(&one, &id).await, "cancelled");
}

// === routes ===

fn routed(engines: &[EngineServer], routes: &str) -> Config {
    let text = format!("upstreams: [http://one, http://two]\nroutes:\n{routes}");
    let checked = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let mut config = settings(engines);
    for (upstream, name) in config.upstreams.iter_mut().zip(["one:80", "two:80"]) {
        upstream.name = name.into();
    }
    config.routes = checked.routes;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_response_keeps_its_virtual_model() {
    let locked = Options { api_key: Some("inner".into()), ..Options::default() };
    let engines = [engine(locked.clone()).await, engine(Options { seed: 1, ..locked }).await];
    let routes = "
  - {model: fast, to: sim, upstreams: ['two:80'], api_key: inner, response_headers: {set: {x-face: fast}}}
  - {model: 'slow-*', to: sim, api_key: inner}
  - {api_key: inner}
";
    let mut config = routed(&engines, routes);
    config.upstreams.iter_mut().for_each(|upstream| upstream.models = Some(vec!["sim".into()]));
    let [one, other] = [Balancer::ready(config.clone()).await, Balancer::ready(config).await];
    for _ in 0..3 {
        let made = make(&one, json!({"model": "fast", "input": "a"})).await;
        assert_eq!((made.json()["model"].as_str(), upstream_of(&made)), (Some("fast"), "two:80".to_string()));
        let found = other.ask(get(&format!("{RESPONSES}/{}", id_of(&made)))).await.expect(200);
        assert_eq!((found.json()["model"].as_str(), found.header("x-face")), (Some("fast"), "fast"));
        assert_eq!(found.json(), made.json());
    }
    // Of a name with a star nothing can be told from the id but the upstream.
    let made = make(&one, json!({"model": "slow-7", "input": "a"})).await;
    assert_eq!(made.json()["model"], "slow-7");
    let found = other.ask(get(&format!("{RESPONSES}/{}", id_of(&made)))).await.expect(200);
    assert_eq!(found.json()["model"], "sim");
    assert_eq!(asked_for(&engines), 4, "each was found at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_takes_the_route_of_its_query() {
    let engines = [engine(Options { api_key: Some("inner".into()), ..Options::default() }).await];
    let routes = "
  - {model: ears, to: sim, api_key: inner, headers: {set: {x-stage: prod}}}
";
    let mut config = routed(&engines, routes);
    config.upstreams[0].models = Some(vec!["sim".into()]);
    let balancer = Balancer::ready(config).await;
    let upgrade = |model: &str| {
        let headers = [
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        request("GET", &format!("/v1/realtime?a=1&model={model}&b=2"), &headers, b"")
    };
    let mut client: Wire = balancer.client().await;
    client.send(upgrade("ears")).await;
    assert_eq!(client.any_head().await.expect("an answer comes").status, 101);
    let got = engines[0].requests().pop().unwrap();
    assert_eq!(got.path, "/v1/realtime?model=sim&a=1&b=2");
    assert_eq!((got.header("authorization"), got.header("x-stage")), (Some("Bearer inner"), Some("prod")));
    balancer.ask(upgrade("nobody")).await.expect(404);
}
