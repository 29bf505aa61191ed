//! Recorded calls of the running balancer, beside the engine's own log and answers that are not recorded.

mod calls;

use std::collections::HashMap;
use std::time::Duration;

use crate::common::body::{events, normal, stream};
use crate::common::wire::{self, Answer, JSON};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, admin, config, direct, engine, engines, eventually,
    names, paced, upstreams,
};
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::types::{CaptureScope, Config, TraceStore};
use vllm_lb::engine::http::{RecordedGeneration, logprob};

use calls::{Call, seeded};

const SESSION: &str = "/sessions/s-1";

async fn over(engines: &[EngineServer]) -> Balancer {
    Balancer::over(engines).await
}

fn post(path: &str, body: &Value) -> Vec<u8> {
    wire::post(path, body.to_string())
}

/// Everything that is stored of a session.
async fn traces(balancer: &Balancer, session: &str) -> Vec<Value> {
    balancer.admin(wire::post("/admin/flush", "")).await.expect(200);
    let answer = balancer.admin(wire::get(&format!("/sessions/{session}/traces"))).await.expect(200);
    answer.json().as_array().expect("a list of traces").clone()
}

fn numbers(value: &Value) -> Vec<u32> {
    let numbers = value.as_array().map_or(&[][..], Vec::as_slice).iter();
    numbers.map(|id| u32::try_from(id.as_u64().expect("an id")).expect("a small one")).collect()
}

/// The log-probabilities of a choice equal those of the engine's log, bit for bit.
#[track_caller]
fn assert_logprobs(choice: &Value, ids: &[u32]) {
    let told: Vec<u64> = choice["logprobs"]
        .as_array()
        .map_or(&[][..], Vec::as_slice)
        .iter()
        .map(|value| value.as_f64().expect("a number").to_bits())
        .collect();
    assert_eq!(told, ids.iter().map(|id| logprob(*id).to_bits()).collect::<Vec<_>>(), "{choice}");
}

// === what the client sees ===

#[tokio::test(flavor = "multi_thread")]
async fn a_captured_answer_has_the_bytes_of_one_that_is_not() {
    let models = Options { models: names(&["sim", "sim-reasoning"]), ..Options::default() };
    // Two engines of one kind, so that the cache of each has seen the same.
    let (engine, other) = (engine(models.clone()).await, engine(models).await);
    let balancer = over(std::slice::from_ref(&engine)).await;
    for call in seeded(1, 120) {
        let (path, body) = (call.path, call.body.to_string());
        let ask = async |address: &str, path: &str| {
            let mut client = wire::Wire::connect(address).await;
            client.ask(wire::post(path, &body)).await
        };
        let plain = ask(&direct(&other), path).await;
        let captured = ask(balancer.address(), &format!("{SESSION}{path}")).await;
        assert_eq!(captured.status, plain.status, "{body}");
        let events = |answer: &Answer| {
            let text = normal(&answer.body);
            let mut events = events(text.as_bytes());
            // The engine mixes the events of several choices as it computes them.
            if call.body["n"] == 2 || call.body["prompt"].is_array() {
                events.sort();
            }
            events
        };
        assert_eq!(events(&captured), events(&plain), "{body}");
    }
    assert_eq!(traces(&balancer, "s-1").await.len(), 120);
    balancer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_requests_token_ids_itself_gets_them() {
    let engines = engines(1).await;
    let balancer = over(&engines).await;
    for stream in [false, true] {
        let mut body = Call::chat("hi", 4).body;
        body["stream"] = stream.into();
        for (field, value) in [("return_token_ids", json!(true)), ("logprobs", json!(true))] {
            body[field] = value;
        }
        let answer = balancer.ask(post(&format!("{SESSION}/v1/chat/completions"), &body)).await.expect(200);
        assert!(answer.text().contains(r#""token_ids":["#), "{}", answer.text());
        assert!(answer.text().contains(r#""logprob":"#), "{}", answer.text());
    }
}

// === what the trace says ===

/// The choices of one call in the engine's log.
fn logged<'a>(log: &'a HashMap<String, Vec<RecordedGeneration>>, id: &str) -> &'a [RecordedGeneration] {
    log.get(id).map_or(&[], Vec::as_slice)
}

fn log_of(engine: &EngineServer) -> HashMap<String, Vec<RecordedGeneration>> {
    let mut log: HashMap<String, Vec<RecordedGeneration>> = HashMap::new();
    for generation in engine.generations() {
        log.entry(generation.request_id.clone()).or_default().push(generation);
    }
    log
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_equal_the_engines_log_bit_for_bit() {
    let models = Options { models: names(&["sim", "sim-reasoning"]), ..Options::default() };
    let engine = engine(models).await;
    let balancer = over(std::slice::from_ref(&engine)).await;
    let calls = seeded(2, 500);
    for (at, call) in calls.iter().enumerate() {
        if call.cuts {
            engine.set_fault_for(1, InjectedFault::CutStream { events: 3, reset: false }).await;
        }
        let id = format!("call-{at}");
        let headers = [JSON, ("x-request-id", id.as_str())];
        let path = format!("{SESSION}{}", call.path);
        let mut client = balancer.client().await;
        client.send(wire::request("POST", &path, &headers, call.body.to_string().as_bytes())).await;
        let head = client.head().await;
        let mut framing = head.framing;
        // A cut answer is an error here, which is no matter.
        while let Ok(Some(_)) = client.piece(&mut framing).await {}
        engine.clear_fault().await;
    }
    let (log, stored) = (log_of(&engine), traces(&balancer, "s-1").await);
    assert_eq!(stored.len(), calls.len());
    let mut compared = 0;
    for (at, (call, trace)) in calls.iter().zip(&stored).enumerate() {
        let id = format!("call-{at}");
        assert_eq!(trace["request_id"], json!(id));
        compared += usize::from(compare(call, trace, logged(&log, &id)));
    }
    assert!(compared > 250, "{compared} calls had token ids to compare");
    balancer.stop().await;
}

/// Compares a trace with the engine's log. False: the interface has no token ids.
fn compare(call: &Call, trace: &Value, logged: &[RecordedGeneration]) -> bool {
    assert_eq!(trace["api"], json!(call.api), "{trace}");
    assert_eq!(trace["stream"], json!(call.streams), "{trace}");
    assert_eq!(trace["partial"], json!(call.cuts), "{call:?} {trace}");
    if call.fails {
        assert_eq!((&trace["status"], &trace["error"]), (&json!(400), &json!("client_error")), "{trace}");
        return false;
    }
    assert_eq!(trace["status"], 200);
    assert_eq!(trace["error"], if call.cuts { json!("incomplete") } else { Value::Null });
    let choices = trace["choices"].as_array().expect("choices");
    if !matches!(call.api, "chat" | "completions") {
        assert_eq!(choices.len(), 1);
        return false;
    }
    assert_eq!(numbers(&trace["prompt_token_ids"]), logged[0].prompt, "{call:?}");
    let all: Vec<&Vec<u32>> = logged.iter().flat_map(|generation| &generation.choices).collect();
    assert!(call.cuts || choices.len() == all.len(), "{call:?} {trace}");
    for choice in choices {
        let whole = all[usize::try_from(choice["index"].as_u64().expect("an index")).expect("small")];
        let ids = numbers(&choice["completion_token_ids"]);
        if call.cuts {
            // A short answer may be cut behind its last token.
            assert!(whole.starts_with(&ids), "{call:?} {trace}");
        } else {
            assert_eq!(&ids, whole, "{call:?}");
        }
        assert_logprobs(choice, &ids);
    }
    if let Some(first) = choices.first().filter(|first| first["index"] == 0) {
        assert_eq!(trace["completion_token_ids"], first["completion_token_ids"]);
        assert_eq!(trace["logprobs"], first["logprobs"]);
    }
    true
}

// === ends ===

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_leaves_a_partial_trace() {
    let engine = paced(Duration::from_millis(20)).await;
    let balancer = over(std::slice::from_ref(&engine)).await;
    let mut client = balancer.client().await;
    client.send(wire::post(&format!("{SESSION}/v1/chat/completions"), stream("sim", 2_000))).await;
    let mut framing = client.head().await.framing;
    let mut seen = 0;
    while seen < 5 {
        let piece = client.piece(&mut framing).await.expect("the stream goes on").expect("and has not ended");
        seen += events(&piece).len();
    }
    drop(client);
    let trace = eventually("the trace is stored", async || traces(&balancer, "s-1").await.pop()).await;
    assert_eq!((&trace["partial"], &trace["error"]), (&json!(true), &json!("client_gone")));
    let ids = numbers(&trace["completion_token_ids"]);
    assert!(ids.len() >= 3 && engine.generations()[0].choices[0].starts_with(&ids), "{ids:?}");
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_no_upstream_answers_are_recorded() {
    let engines = engines(1).await;
    let balancer = over(&engines).await;
    let chat = format!("{SESSION}/v1/chat/completions");
    let unknown = json!({"model": "nowhere", "messages": []});
    balancer.ask(post(&chat, &unknown)).await.expect(404);
    engines[0].set_fault(InjectedFault::CutHeaders { reset: true }).await;
    let failed = balancer.ask(post(&chat, &Call::chat("hi", 3).body)).await;
    let stored = traces(&balancer, "s-1").await;
    assert_eq!((&stored[0]["status"], &stored[0]["error"]), (&json!(404), &json!("not_found")));
    assert_eq!((&stored[1]["status"], &stored[1]["error"]), (&json!(failed.status), &json!("connection")));
    // A connection that had ended in the pool is one attempt more.
    assert!(stored[1]["attempts"].as_u64().is_some_and(|attempts| (3..=4).contains(&attempts)));
}

// === what is captured ===

#[tokio::test(flavor = "multi_thread")]
async fn only_calls_of_sessions_are_captured_unless_all_are() {
    let engines = engines(1).await;
    for (scope, stored) in [
        (CaptureScope::Sessions, [0, 1]),
        (CaptureScope::Share(0.0), [0, 1]),
        (CaptureScope::All, [1, 1]),
        (CaptureScope::Share(1.0), [1, 1]),
    ] {
        let mut config = config(upstreams(&engines));
        config.traces.capture = scope;
        let balancer = Balancer::ready(config).await;
        let body = Call::chat("hi", 3).body;
        balancer.ask(post("/v1/chat/completions", &body)).await.expect(200);
        balancer.ask(post(&format!("{SESSION}/v1/chat/completions"), &body)).await.expect(200);
        let counts = [traces(&balancer, "unnamed").await.len(), traces(&balancer, "s-1").await.len()];
        assert_eq!(counts, stored, "{scope:?}");
        balancer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_store_nothing_is_captured() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.traces.store = TraceStore::None;
    let balancer = Balancer::ready(config).await;
    let body = Call::chat("hi", 3).body;
    balancer.ask(post(&format!("{SESSION}/v1/chat/completions"), &body)).await.expect(200);
    assert_eq!(engines[0].requests()[0].json(), body, "nothing was added for a trace");
    // No list: an empty one would look like one of a store that has recorded nothing yet.
    for (method, path) in [
        ("GET", "/sessions"),
        ("POST", "/sessions"),
        ("GET", "/sessions/s-1"),
        ("GET", "/sessions/s-1/traces"),
        ("GET", "/traces/x"),
    ] {
        let answer = admin(&balancer, method, path, json!({})).await;
        let error = answer.json()["error"].as_str().map(String::from).unwrap_or_default();
        assert!(answer.status == 501 && error.contains("traces.store is none"), "{path}: {answer:?}");
    }
    let query = admin(&balancer, "POST", "/traces/query", json!({"session_ids": ["s-1"]})).await;
    assert_eq!(query.status, 501);
    // What a training loop calls besides: its sessions end, and there is nothing to wait for.
    let deleted = admin(&balancer, "DELETE", "/sessions/s-1", Value::Null).await.expect(200).json();
    assert_eq!(deleted, json!({"deleted": 0}));
    admin(&balancer, "POST", "/admin/flush", Value::Null).await.expect(200);
    admin(&balancer, "POST", "/admin/weight_version", json!({"weight_version": 3})).await.expect(200);
}

/// Engines may stand behind a server that compresses.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_captured_call_is_not_compressed() {
    let engines = engines(1).await;
    let balancer = over(&engines).await;
    let body = Call::chat("hi", 3).body.to_string();
    for (path, sent) in [("/v1/chat/completions", true), ("/sessions/s-1/v1/chat/completions", false)] {
        let headers = [JSON, ("accept-encoding", "gzip")];
        balancer.ask(wire::request("POST", path, &headers, body.as_bytes())).await.expect(200);
        let request = engines[0].requests().pop().expect("it got a request");
        assert_eq!(request.headers.contains_key("accept-encoding"), sent, "{path}");
    }
}

/// A session that is named behind what is peeked of a body is found all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_body_names_its_session_anywhere() {
    let engines = engines(1).await;
    for scope in [CaptureScope::Sessions, CaptureScope::All] {
        let mut config = config(upstreams(&engines));
        (config.peek.bytes, config.traces.capture) = (1024, scope);
        let balancer = Balancer::ready(config).await;
        let settings = json!({"session_id": "made", "sampling_params": {"max_tokens": 2}});
        balancer.admin(post("/sessions", &settings)).await.expect(200);
        let body = format!(
            r#"{{"model":"sim","messages":[{{"role":"user","content":"{}"}}],"prompt_cache_key":"made"}}"#,
            "word ".repeat(4_000)
        );
        let answer = balancer.ask(wire::post("/v1/chat/completions", body)).await.expect(200).json();
        assert_eq!(answer["usage"]["completion_tokens"], 2, "{scope:?}");
        let counts = [traces(&balancer, "unnamed").await.len(), traces(&balancer, "made").await.len()];
        assert_eq!(counts, [0, 1], "{scope:?}");
        balancer.stop().await;
    }
}

/// A session that the API made is captured also where only a header names it, and its settings win.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_a_session_override_the_clients() {
    let engine = engine(Options { models: names(&["sim", "other"]), ..Options::default() }).await;
    let balancer = over(std::slice::from_ref(&engine)).await;
    let settings = json!({"session_id": "made", "sampling_params": {"temperature": 0.25, "max_tokens": 2},
        "model": "other"});
    balancer.admin(post("/sessions", &settings)).await.expect(200);
    balancer.admin(post("/admin/weight_version", &json!({"weight_version": 7}))).await.expect(200);
    let body = json!({"model": "sim", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0});
    let headers = [JSON, ("x-session-id", "made")];
    let request = wire::request("POST", "/v1/chat/completions", &headers, body.to_string().as_bytes());
    let answer: Answer = balancer.ask(request).await.expect(200);
    let (answer, sent) = (answer.json(), engine.requests()[0].json());
    assert_eq!(sent["model"], "other");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    assert_eq!((&sent["temperature"], &sent["max_tokens"]), (&json!(0.25), &json!(2)));
    let trace = &traces(&balancer, "made").await[0];
    assert_eq!((&trace["model"], &trace["weight_version"]), (&json!("other"), &json!(7)));
    // It was the model of the session.
    assert_eq!(trace["client_model"], "sim");
    assert_eq!(trace["raw_request"]["temperature"], 0.25);
    assert_eq!(trace["messages"], body["messages"]);
}

/// The trace had the upstream's 400, and nothing of the answer that the client got.
#[tokio::test(flavor = "multi_thread")]
async fn the_trace_of_an_overflow_has_the_answer_of_the_client() {
    let engines = [engine(Options { max_model_len: 64, ..Options::default() }).await];
    let text = "upstreams: [http://a]\nroutes: [{model: long, to: sim, overflow: length}]";
    let routes = check(text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes;
    let balancer = Balancer::ready(Config { routes, ..config(upstreams(&engines)) }).await;
    let messages = json!([{"role": "user", "content": "word ".repeat(2000)}]);
    for (session, stream) in [("whole", false), ("stream", true)] {
        let body = json!({"model": "long", "stream": stream, "messages": messages, "n": 2});
        balancer.ask(post(&format!("/sessions/{session}/v1/chat/completions"), &body)).await.expect(200);
        let trace = &traces(&balancer, session).await[0];
        assert_eq!((&trace["status"], &trace["error"]), (&json!(200), &json!("overflow")), "{trace}");
        assert_eq!((&trace["finish_reason"], &trace["partial"]), (&json!("length"), &json!(false)));
        assert_eq!((&trace["stream"], &trace["client_model"]), (&json!(stream), &json!("long")));
        assert_eq!(trace["choices"].as_array().map(Vec::len), Some(2), "{trace}");
        let error = &trace["raw_response"]["error"];
        assert!(error["code"] == 400 && error["message"].is_string(), "the upstream's: {trace}");
    }
}

/// A failure of an engine is short: it came in chunks, because it may have fields to be put back.
#[tokio::test(flavor = "multi_thread")]
async fn a_captured_failure_keeps_its_length() {
    let engines = engines(1).await;
    let balancer = over(&engines).await;
    let fault = InjectedFault::Status { status: 500, body: r#"{"error":{"message":"m","code":500}}"#.into() };
    engines[0].set_fault(fault).await;
    let body = Call::chat("hi", 3).body;
    let plain = balancer.ask(post("/v1/chat/completions", &body)).await.expect(500);
    let captured = balancer.ask(post(&format!("{SESSION}/v1/chat/completions"), &body)).await.expect(500);
    let length = |answer: &Answer| answer.headers.get("content-length").cloned();
    assert_eq!((length(&captured), captured.text()), (length(&plain), plain.text()));
    assert!(length(&captured).is_some());
}
