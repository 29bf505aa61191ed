//! Usage through the running balancer: every answer is counted by model, route and session, and a client
//! whose stream was asked for its usage cannot tell.

use std::time::Duration;

use crate::common::body::{assert_arrived, events, normal};
use crate::common::h2::{self, H2};
use crate::common::wire::{CHUNKED, JSON, Wire, chunk, get, head, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, Recorded, config, direct, engine, engines, eventually,
    logs, paced,
};
use bytes::Bytes;
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::Config;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

/// What a body that asks for a stream gets.
const QUESTION: &str = r#","stream_options":{"include_usage":true}"#;

/// An engine that caches no prompt: answers tell what was cached, which differs from one to the next.
async fn forgetful() -> EngineServer {
    engine(Options { block_size: 4_096, max_model_len: 1_000_000, ..Options::default() }).await
}

/// A configuration over these engines with these routes.
fn routed(engines: &[EngineServer], routes: &str) -> Config {
    let text = format!("upstreams: [http://one]\nroutes: {routes}\n");
    let checked = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    Config { routes: checked.routes, ..config(crate::common::upstreams(engines)) }
}

fn chat(stream: bool) -> Value {
    let messages = json!([{"role": "user", "content": "hi"}]);
    json!({"model": "sim", "messages": messages, "max_tokens": 5, "stream": stream})
}

fn completion(stream: bool) -> Value {
    json!({"model": "sim", "prompt": "hi there", "max_tokens": 5, "stream": stream})
}

fn last(engine: &EngineServer) -> Recorded {
    engine.requests().pop().expect("it got a request")
}

async fn totals(balancer: &Balancer, query: &str) -> Value {
    balancer.until_idle().await;
    balancer.admin(get(&format!("/admin/usage{query}"))).await.expect(200).json()
}

/// Waits until so many answers are in the totals, and gives them.
async fn totals_of(balancer: &Balancer, requests: u64) -> Value {
    eventually(&format!("{requests} requests are counted"), async || {
        let totals = totals(balancer, "").await;
        let models = totals["models"].as_array().expect("a list");
        let counted: u64 = models.iter().filter_map(|row| row["requests"].as_u64()).sum();
        (counted == requests).then_some(totals)
    })
    .await
}

/// Streams of clients that do not request usage: the answer is as without the balancer's request, and the
/// body differs by that request only.
#[tokio::test(flavor = "multi_thread")]
async fn requested_usage_is_hidden_from_the_client() {
    let engines = [forgetful().await];
    let plain = Balancer::over(&engines).await;
    let beside = Balancer::ready(routed(&engines, "[{model: other, to: sim}]")).await;
    let through = Balancer::ready(routed(&engines, "[{model: '*'}]")).await;
    let bodies = [
        (CHAT, chat(true)),
        (COMPLETIONS, completion(true)),
        (CHAT, {
            let mut thinking = chat(true);
            thinking["chat_template_kwargs"] = json!({"enable_thinking": true});
            thinking
        }),
    ];
    for (path, body) in bodies {
        let body = body.to_string();
        let there = Wire::connect(&direct(&engines[0])).await.ask(post(path, &body)).await.expect(200);
        assert!(!there.text().contains("\"usage\"") && there.text().contains("system_fingerprint"));
        for balancer in [&plain, &beside, &through] {
            let accepts = [JSON, ("accept-encoding", "gzip")];
            let here = balancer.ask(request("POST", path, &accepts, body.as_bytes())).await.expect(200);
            assert_eq!(normal(&here.body), normal(&there.body));
            let asked = format!("{}{QUESTION}}}", &body[..body.len() - 1]);
            assert_arrived(&last(&engines[0]), asked.as_bytes());
            assert!(!last(&engines[0]).headers.contains_key("accept-encoding"));
        }
    }
    for balancer in [&plain, &beside, &through] {
        balancer.until_idle().await;
    }
    for balancer in [&plain, &beside, &through] {
        let totals = totals_of(balancer, 3).await;
        let model = &totals["models"][0];
        assert_eq!(
            (&model["model"], &model["output"], &model["unknown"]),
            (&json!("sim"), &json!(15), &json!(0))
        );
    }
    let totals = totals_of(&through, 3).await;
    assert_eq!((&totals["routes"][0]["route"], &totals["routes"][0]["requests"]), (&json!("*"), &json!(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_requests_usage_receives_it() {
    let engines = [forgetful().await];
    let balancer = Balancer::over(&engines).await;
    for (path, body) in [(CHAT, chat(true)), (COMPLETIONS, completion(true))] {
        for options in [
            json!({"include_usage": true}),
            json!({"include_usage": true, "continuous_usage_stats": true}),
            json!({"include_usage": false}),
        ] {
            let mut body = body.clone();
            body["stream_options"] = options.clone();
            let body = body.to_string();
            let there = Wire::connect(&direct(&engines[0])).await.ask(post(path, &body)).await.expect(200);
            let accepts = [JSON, ("accept-encoding", "gzip")];
            let here = balancer.ask(request("POST", path, &accepts, body.as_bytes())).await.expect(200);
            assert_eq!(normal(&here.body), normal(&there.body));
            assert_eq!(here.text().contains("\"usage\":{"), options["include_usage"] == true);
            assert_arrived(&last(&engines[0]), body.as_bytes());
            assert_eq!(last(&engines[0]).headers["accept-encoding"], "gzip");
        }
    }
    // One that says that it wants none is not asked for.
    assert_eq!(totals_of(&balancer, 6).await["models"][0]["unknown"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_counted_by_model_route_and_session() {
    let engines = engines(2).await;
    let balancer = Balancer::ready(routed(&engines, "[{model: fast, to: sim}, {path: /v1/messages}]")).await;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let mut told = (0, 0);
    for (path, body) in [
        (CHAT, chat(false)),
        (COMPLETIONS, completion(false)),
        (RESPONSES, json!({"model": "sim", "input": "hi", "max_output_tokens": 5})),
        (MESSAGES, json!({"model": "sim", "messages": messages, "max_tokens": 5})),
        ("/v1/embeddings", json!({"model": "sim", "input": ["hi", "there"]})),
    ] {
        for (model, session, stream) in [("sim", "a", false), ("fast", "b", false), ("fast", "b", true)] {
            if stream && path == "/v1/embeddings" {
                continue;
            }
            let mut body = body.clone();
            (body["model"], body["stream"]) = (model.into(), stream.into());
            let headers = [JSON, ("x-session-id", session)];
            let answer =
                balancer.ask(request("POST", path, &headers, body.to_string().as_bytes())).await.expect(200);
            if stream {
                continue;
            }
            let usage = &answer.json()["usage"];
            let number = |names: [&str; 2]| names.iter().find_map(|name| usage[*name].as_u64()).unwrap_or(0);
            let times = if model == "fast" && path != "/v1/embeddings" { 2 } else { 1 };
            told.0 += times * number(["prompt_tokens", "input_tokens"]);
            told.1 += times * number(["completion_tokens", "output_tokens"]);
        }
    }
    let totals = totals_of(&balancer, 14).await;
    let model = &totals["models"][0];
    assert_eq!((&model["model"], &model["unknown"]), (&json!("sim"), &json!(0)), "{totals}");
    assert_eq!(model["output"], told.1, "{totals}");
    let sum = |kind: &str, rows: &Value| -> u64 {
        rows.as_array().expect("a list").iter().filter_map(|row| row[kind].as_u64()).sum()
    };
    assert_eq!(sum("output", &totals["sessions"]), told.1);
    assert!(model["input"].as_u64() >= Some(told.0), "what was cached is part of what came in: {totals}");
    assert_eq!(sum("input", &totals["sessions"]), sum("input", &totals["models"]));
    // In the order of their names: which of two that end together is told first is chance.
    let requests = |rows: &Value, key: &str| -> Vec<(String, u64)> {
        let pair =
            |row: &Value| (row[key].as_str().unwrap_or("").into(), row["requests"].as_u64().unwrap_or(0));
        let mut pairs: Vec<_> = rows.as_array().expect("a list").iter().map(pair).collect();
        pairs.sort();
        pairs
    };
    let routes = requests(&totals["routes"], "route");
    assert_eq!(routes, [("/v1/messages".to_string(), 1), ("fast".to_string(), 9)]);
    assert_eq!(requests(&totals["sessions"], "session"), [("a".to_string(), 5), ("b".to_string(), 9)]);
    assert!(totals["sessions"][0]["last"].as_u64() > Some(1_700_000_000));
    assert_eq!(balancer.metric("vllm_lb_tokens_total{kind=\"output\",model=\"sim\",route=\"\"}").await, 15.0);
    let page = balancer.admin(get("/metrics")).await.expect(200);
    assert!(page.text().contains("vllm_lb_tokens_total{kind=\"output\",model=\"sim\",route=\"fast\"}"));
    let one = self::totals(&balancer, "?session=a").await;
    assert_eq!(requests(&one["sessions"], "session"), [("a".to_string(), 5)]);
    assert_eq!(self::totals(&balancer, "?session=c").await["sessions"], json!([]));
    assert_eq!(self::totals(&balancer, "?limit=1").await["sessions"].as_array().map(Vec::len), Some(1));
    balancer.admin(get("/admin/usage?limit=0")).await.expect(400);
    balancer.admin(post("/admin/usage", "{}")).await.expect(405);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreported_counts_are_absent() {
    let engines = [forgetful().await];
    let mut config = config(crate::common::upstreams(&engines));
    config.peek.bytes = 4_096;
    let balancer = Balancer::ready(config).await;
    let session = [JSON, ("x-session-id", "quiet")];
    let mut several = chat(true);
    several["n"] = json!(2);
    let mut large = chat(true);
    large["messages"][0]["content"] = "long ".repeat(60_000).into();
    for body in [several, large] {
        let body = body.to_string();
        let there = Wire::connect(&direct(&engines[0])).await.ask(post(CHAT, &body)).await.expect(200);
        let here = balancer.ask(request("POST", CHAT, &session, body.as_bytes())).await.expect(200);
        assert_eq!(normal(&here.body), normal(&there.body));
        assert_arrived(&last(&engines[0]), body.as_bytes());
    }
    // No work, and no answer.
    balancer.ask(post("/tokenize", r#"{"model":"sim","prompt":"hi"}"#)).await.expect(200);
    balancer.ask(post(CHAT, r#"{"model":"sim"}"#)).await.expect(400);
    let totals = totals_of(&balancer, 2).await;
    assert_eq!(totals["models"], json!([{"model": "sim", "requests": 2, "unknown": 2}]));
    let records = logs::all();
    let done: Vec<&String> = records.iter().filter(|record| record.contains("request done")).collect();
    assert!(done.iter().any(|record| record.contains("session=quiet")), "{records:?}");
    assert!(
        !done.iter().any(|record| record.contains("_tokens=") || record.contains("route=")),
        "{records:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_request_is_logged_with_route_session_and_tokens() {
    let engines = [forgetful().await];
    let balancer = Balancer::ready(routed(&engines, "[{model: sim}]")).await;
    let headers = [JSON, ("cookie", "vllm_lb_session=one")];
    balancer.ask(request("POST", CHAT, &headers, chat(true).to_string().as_bytes())).await.expect(200);
    totals_of(&balancer, 1).await;
    let records = logs::all();
    let done = records.iter().find(|record| record.contains("request done") && record.contains(CHAT));
    let done = done.expect("the request has ended");
    for field in ["route=sim", "session=one", "output_tokens=5", "input_tokens=", "cached_tokens=0"] {
        assert!(done.contains(field), "{field} in {done}");
    }
    assert!(!done.contains("reasoning_tokens"), "{done}");
}

/// The question is the same in every framing and at every attempt.
#[tokio::test(flavor = "multi_thread")]
async fn prompt_length_is_counted_in_every_framing() {
    let engines = engines(2).await;
    let balancer = Balancer::over(&engines).await;
    let body = chat(true).to_string();
    let asked = format!("{}{QUESTION}}}", &body[..body.len() - 1]);
    for engine in &engines {
        engine.set_fault_for(1, InjectedFault::CutHeaders { reset: true }).await;
    }
    let mut client = balancer.client().await;
    client.ask(post(CHAT, &body)).await.expect(200);
    client.send(head("POST", CHAT, &[JSON, CHUNKED])).await;
    for piece in body.as_bytes().chunks(50).chain([&b""[..]]) {
        client.send(chunk(piece)).await;
    }
    client.answer().await.expect(200);
    let mut client = H2::connect(balancer.address()).await;
    let answer = client.ask(h2::post(CHAT), &[Bytes::from(body)]).await.expect(200);
    assert!(answer.whole && !answer.text().contains("usage"));
    let received: Vec<Recorded> = engines.iter().flat_map(|engine| engine.requests()).collect();
    assert!(received.len() >= 4, "{received:?}");
    received.iter().for_each(|one| assert_arrived(one, asked.as_bytes()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_counts_the_usage_reported_so_far() {
    let engines = engines(1).await;
    let balancer = Balancer::over(&engines).await;
    engines[0].set_fault(InjectedFault::StallStream { events: 3 }).await;
    for (path, body) in [(CHAT, chat(true)), (MESSAGES, chat(true))] {
        let mut client = balancer.client().await;
        client.send(post(path, body.to_string())).await;
        let mut framing = client.head().await.framing;
        client.piece(&mut framing).await.expect("a piece comes");
    }
    let totals = totals_of(&balancer, 2).await;
    let row = &totals["models"][0];
    assert_eq!((&row["requests"], &row["unknown"]), (&json!(2), &json!(1)), "{totals}");
    assert!(row["input"].as_u64() > Some(0), "a message begins with its prompt's tokens: {totals}");
}

/// The chunk that ends the choice is held for the usage, which never comes: without it, what the
/// engine would have sent to a client that did not request usage is unknown.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_streams_beginning_reaches_the_client() {
    let engine = paced(Duration::from_millis(2)).await;
    let balancer = Balancer::over([&engine]).await;
    let body = chat(true).to_string();
    let whole = Wire::connect(&direct(&engine)).await.ask(post(CHAT, &body)).await.expect(200);
    let whole = events(normal(&whole.body).as_bytes());
    // A role, and as many tokens as are wanted.
    for (sent, told) in [(4, 4), (6, 5)] {
        engine.set_fault(InjectedFault::CutStream { events: sent, reset: false }).await;
        let answer = balancer.ask(post(CHAT, &body)).await.expect(200);
        let events = events(normal(&answer.body).as_bytes());
        assert_eq!(events[..told], whole[..told]);
        assert!(events.len() == told + 2 && events[told].contains("\"error\""), "{events:?}");
    }
    assert_eq!(totals_of(&balancer, 2).await["models"][0]["unknown"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_totals_need_the_admin_token() {
    let mut config = config(vec![]);
    config.admin.token = Some(Secret::new("secret"));
    let balancer = Balancer::start(config).await;
    balancer.admin(get("/admin/usage")).await.expect(401);
    let key = [("authorization", "Bearer secret")];
    let totals: Value = balancer.admin(head("GET", "/admin/usage", &key)).await.expect(200).json();
    assert_eq!(totals, json!({"models": [], "routes": [], "sessions": []}));
}
