//! Several upstreams are one vLLM that serves every model: names are learnt and joined, a request goes
//! where its model is, and an upstream that is not there yet is waited for.

use std::collections::BTreeMap;

use crate::common::body::{self, Place, chat, padded, stream};
use crate::common::h2::{self, H2};
use crate::common::wire::{JSON, Wire, get, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, config, engine, engines, eventually, names, serving,
    upstreams,
};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::Preset;

const CHAT: &str = "/v1/chat/completions";

// === coming and going ===

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_upstreams_that_are_starting() {
    let engine = engine(Options::default()).await;
    engine.set_fault(InjectedFault::Refuse).await;
    let balancer = Balancer::start(config(upstreams([&engine]))).await;
    for ask in [post(CHAT, chat("sim")), post(CHAT, chat("other")), get("/v1/models"), get("/version")] {
        let refused = balancer.ask(ask).await.expect(503);
        assert_eq!(refused.header("retry-after"), "1");
        let error = &refused.json()["error"];
        assert_eq!((&error["type"], &error["code"]), (&json!("ServiceUnavailableError"), &json!(503)));
    }
    let anthropic = balancer.ask(post("/v1/messages", chat("sim"))).await.expect(503);
    assert_eq!(anthropic.json()["error"]["type"], "overloaded_error");
    engine.clear_fault().await;
    balancer.until_ready(1).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    balancer.ask(post(CHAT, chat("other"))).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_goes_and_comes_back_is_left_out_meanwhile() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.health.fall = 1;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::Refuse).await;
    balancer.until_ready(1).await;
    for _ in 0..10 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!((engines[0].stats().received, engines[1].stats().received), (0, 10));
    engines[0].clear_fault().await;
    balancer.until_ready(2).await;
    engines[1].set_fault(InjectedFault::Refuse).await;
    balancer.until_ready(1).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    assert_eq!((engines[0].stats().received, engines[1].stats().received), (1, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_whose_health_fails_is_left_out() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.health.fall = 2;
    let balancer = Balancer::ready(config).await;
    engines[1].set_health(Some(503));
    balancer.until_ready(1).await;
    for _ in 0..5 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!((engines[0].stats().received, engines[1].stats().received), (5, 0));
}

/// Another process on the same address, as after a restart with other flags.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_added_later_is_learnt() {
    let first = serving(&["old"]).await;
    let address = first.address();
    let balancer = Balancer::over([&first]).await;
    balancer.ask(post(CHAT, chat("new"))).await.expect(404);
    first.stop().await;
    let listener = eventually("the port is free", async || TcpListener::bind(address).await.ok()).await;
    let options = Options { models: names(&["old"]), loras: names(&["new"]), ..Options::default() };
    let _second = EngineServer::start_on(listener, options).expect("the listener works");
    let fleet = &balancer.running.fleet;
    eventually("the new model is known", async || fleet.snapshot().serves_model("new").then_some(())).await;
    balancer.until_ready(1).await;
    balancer.ask(post(CHAT, chat("new"))).await.expect(200);
    balancer.ask(post(CHAT, chat("old"))).await.expect(200);
    assert_eq!(listed(&balancer).await, ["old", "new"]);
}

// === names ===

async fn list(balancer: &Balancer) -> Vec<Value> {
    let page = balancer.ask(get("/v1/models")).await.expect(200).json();
    assert_eq!(page["object"], "list");
    page["data"].as_array().expect("the list is one").clone()
}

async fn listed(balancer: &Balancer) -> Vec<String> {
    list(balancer).await.iter().map(|card| card["id"].as_str().unwrap_or_default().to_string()).collect()
}

async fn with_adapters(models: &[&str], loras: &[&str], max_model_len: usize) -> EngineServer {
    engine(Options { models: names(models), loras: names(loras), max_model_len, ..Options::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_models_is_the_union() {
    let engines = [
        with_adapters(&["llama", "llama-alias"], &["sql"], 1_000).await,
        with_adapters(&["llama"], &["sql", "poems"], 500).await,
        with_adapters(&["qwen"], &[], 2_000).await,
    ];
    let balancer = Balancer::over(&engines).await;
    assert_eq!(listed(&balancer).await, ["llama", "llama-alias", "sql", "poems", "qwen"]);
    let cards: BTreeMap<String, Value> = list(&balancer)
        .await
        .into_iter()
        .map(|card| (card["id"].as_str().unwrap_or_default().to_string(), card))
        .collect();
    assert_eq!(cards["llama"]["max_model_len"], 500, "what every replica can do");
    assert_eq!(cards["llama-alias"]["max_model_len"], 1_000);
    assert_eq!(cards["qwen"]["max_model_len"], 2_000);
    assert_eq!((&cards["sql"]["parent"], &cards["llama"]["parent"]), (&json!("llama"), &Value::Null));
    assert_eq!(cards["sql"]["permission"][0]["object"], "model_permission");
}

/// Which of two engines got the request of this path.
fn went_to(engines: &[EngineServer], path: &str) -> Option<usize> {
    engines.iter().position(|engine| engine.requests().iter().any(|recorded| recorded.path == path))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_routed_to_its_model() {
    let engines =
        [with_adapters(&["one"], &["sql"], 9_000).await, with_adapters(&["two"], &["poems"], 9_000).await];
    let balancer = Balancer::over(&engines).await;
    let messages = r#""messages":[{"role":"user","content":"\"model\": \"one\" {"}],"max_tokens":2"#;
    let large = |model: &str, place| String::from_utf8_lossy(&padded(5 << 20, model, place)).into_owned();
    let cases: Vec<(String, usize)> = vec![
        (chat("one"), 0),
        (chat("two"), 1),
        (chat("sql"), 0),
        (chat("poems"), 1),
        (format!(r#"{{"model":"two",{messages}}}"#), 1),
        (format!(r#"{{{messages},"model":"two"}}"#), 1),
        (format!(" \n{{ {messages} , \"model\" : \"two\" }}\n"), 1),
        (format!(r#"{{"model":"one",{messages},"model":"two"}}"#), 1),
        (format!(r#"{{"model":"two",{messages},"model":"one"}}"#), 0),
        (format!(r#"{{{messages},"\u006dodel":"t\u0077o"}}"#), 1),
        (format!(r#"{{"metadata":{{"model":"one"}},{messages},"model":"two"}}"#), 1),
        (format!(r#"{{"model":"two",{messages},"metadata":{{"model":"one"}}}}"#), 1),
        (large("one", Place::First), 0),
        (large("two", Place::First), 1),
        (large("one", Place::Last), 0),
        (large("two", Place::Last), 1),
    ];
    for (case, (body, to)) in cases.into_iter().enumerate() {
        let path = format!("{CHAT}?case={case}");
        balancer.ask(post(&path, &body)).await.expect(200);
        assert_eq!(went_to(&engines, &path), Some(to), "{}", &body[..body.len().min(200)]);
        let path = format!("{CHAT}?h2={case}");
        let mut client = H2::connect(balancer.address()).await;
        client.ask(h2::post(&path), &[Bytes::from(body)]).await.expect(200);
        assert_eq!(went_to(&engines, &path), Some(to));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_is_routed_to_its_model_even_when_the_file_precedes_it() {
    let engines = [serving(&["one"]).await, serving(&["two"]).await];
    let balancer = Balancer::over(&engines).await;
    let small = "RIFF--not really--".to_string();
    let large = "0123456789abcdef".repeat((3 << 20) / 16);
    for (case, file) in [small, large].iter().enumerate() {
        for (model, to) in [("one", 0), ("two", 1)] {
            for last in [false, true] {
                let mut parts = vec![("file", file.as_str()), ("language", "en")];
                parts.insert(if last { 2 } else { 0 }, ("model", model));
                let body = body::form("a-boundary", &parts);
                let path = format!("/v1/audio/transcriptions?case={case}-{model}-{last}");
                let kind = ("content-type", "multipart/form-data; boundary=a-boundary");
                balancer.ask(request("POST", &path, &[kind], &body)).await.expect(200);
                assert_eq!(went_to(&engines, &path), Some(to), "{path}");
                let recorded = engines[to].requests();
                let recorded = recorded.iter().find(|recorded| recorded.path == path);
                body::assert_arrived(recorded.expect("it went there"), &body);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_is_rejected_with_the_known_ones() {
    let engines = [with_adapters(&["one"], &["sql"], 9_000).await, serving(&["two"]).await];
    let balancer = Balancer::over(&engines).await;
    let refused = balancer.ask(post(CHAT, chat("nope"))).await.expect(404);
    assert_eq!(
        refused.text(),
        r#"{"error":{"message":"The model `nope` does not exist. Valid aliases: one, sql, two.","#
            .to_string()
            + r#""type":"NotFoundError","param":"model","code":404}}"#
    );
    let anthropic = balancer.ask(post("/v1/messages", chat("nope"))).await.expect(404);
    assert_eq!(anthropic.json()["error"]["type"], "NotFoundError", "as vLLM says it");
    assert_eq!(engines.iter().map(|engine| engine.stats().received).sum::<u64>(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_model_uses_the_only_base_model() {
    let bodies = [
        chat("x").replace("\"model\":\"x\",", ""),
        chat("x").replace("\"x\"", "null"),
        chat("x").replace("\"x\"", "\"\""),
    ];
    let alike = [with_adapters(&["one"], &["sql"], 9_000).await, with_adapters(&["one"], &[], 9_000).await];
    let balancer = Balancer::over(&alike).await;
    for body in &bodies {
        let answer = balancer.ask(post(CHAT, body)).await.expect(200);
        assert_eq!(answer.json()["model"], "one");
    }
    let different = [serving(&["one"]).await, serving(&["two"]).await];
    let balancer = Balancer::over(&different).await;
    for body in &bodies {
        let refused = balancer.ask(post(CHAT, body)).await.expect(404);
        assert_eq!(refused.json()["error"]["param"], "model", "{body}");
    }
}

/// What an upstream would refuse as no request at all needs no model to be refused.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_are_answered_by_an_upstream() {
    let engines = [serving(&["one"]).await, serving(&["two"]).await];
    let balancer = Balancer::over(&engines).await;
    for body in ["", "{", "[]", "nonsense", r#"{"model":5,"messages":[]}"#, r#"{"model":"one""#] {
        let there = Wire::connect(&crate::common::direct(&engines[0])).await.ask(post(CHAT, body)).await;
        let here = balancer.ask(post(CHAT, body)).await;
        assert_eq!((here.status, here.text()), (there.status, there.text()), "{body}");
        assert_eq!(here.status, 400);
    }
}

// === per upstream ===

#[tokio::test(flavor = "multi_thread")]
async fn an_upstreams_key_replaces_the_clients() {
    let options = |key: &str| Options { api_key: Some(key.into()), ..Options::default() };
    let engines = [engine(options("first key")).await, engine(options("second key")).await];
    let mut upstreams = upstreams(&engines);
    upstreams[0].api_key = Some(Secret::new("first key"));
    upstreams[1].api_key = Some(Secret::new("second key"));
    let balancer = Balancer::ready(config(upstreams)).await;
    for _ in 0..10 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
        let own = ("authorization", "Bearer the client's own");
        balancer.ask(request("POST", CHAT, &[JSON, own], chat("sim").as_bytes())).await.expect(200);
    }
    for (engine, key) in engines.iter().zip(["Bearer first key", "Bearer second key"]) {
        let requests = engine.requests();
        assert!(!requests.is_empty());
        for recorded in requests {
            let sent: Vec<_> = recorded.headers.get_all("authorization").iter().collect();
            assert_eq!(sent, [key]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_name_their_upstream_when_exposed() {
    let engines = [serving(&["one"]).await, serving(&["two"]).await];
    let mut upstreams = upstreams(&engines);
    upstreams[0].name = "gpu-one".into();
    upstreams[1].name = "gpu-two".into();
    let mut exposing = config(upstreams);
    let hiding = Balancer::ready(exposing.clone()).await;
    exposing.expose = true;
    let exposing = Balancer::ready(exposing).await;
    for (model, name) in [("one", "gpu-one"), ("two", "gpu-two")] {
        for body in [chat(model), stream(model, 3)] {
            let told = exposing.ask(post(CHAT, &body)).await.expect(200);
            let headers = ["upstream", "attempts", "reason", "hit"]
                .map(|name| told.header(&format!("x-vllm-lb-{name}")));
            assert_eq!(headers, [name, "1", "only", "0/0"]);
            let silent = hiding.ask(post(CHAT, &body)).await.expect(200);
            assert!(!silent.headers.keys().any(|name| name.as_str().starts_with("x-vllm-lb")));
        }
    }
}

// === state ===

async fn stored(balancer: &Balancer, input: &str) -> String {
    let body = json!({"model": "sim", "input": input, "max_output_tokens": 3}).to_string();
    let answer = balancer.ask(post("/v1/responses", body)).await.expect(200);
    answer.json()["id"].as_str().expect("a response has an id").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_responses_are_found_on_any_upstream() {
    let engines = engines(3).await;
    let mut config = config(upstreams(&engines));
    config.balance = Preset::RoundRobin.balance();
    let balancer = Balancer::ready(config).await;
    let mut ids = Vec::new();
    for input in ["one", "two", "three"] {
        ids.push(stored(&balancer, input).await);
    }
    assert!(engines.iter().all(|engine| engine.stats().received == 1), "each holds one");
    for _ in 0..3 {
        for id in &ids {
            let found = balancer.ask(get(&format!("/v1/responses/{id}"))).await.expect(200);
            assert_eq!(found.json()["id"], id.as_str());
            let body = json!({"model": "sim", "input": "more", "previous_response_id": id}).to_string();
            let next = balancer.ask(post("/v1/responses", body)).await.expect(200);
            assert_eq!(next.json()["previous_response_id"], id.as_str());
            let cancel = balancer.ask(post(&format!("/v1/responses/{id}/cancel"), "")).await;
            assert_eq!(cancel.status, 400, "it has ended: {}", cancel.text());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_response_id_is_vllms_404() {
    let engines = engines(2).await;
    let balancer = Balancer::over(&engines).await;
    let unknown = "/v1/responses/resp_0123456789abcdef0123456789abcdef";
    let mut there = Wire::connect(&crate::common::direct(&engines[0])).await;
    for ask in [
        get(unknown),
        post(&format!("{unknown}/cancel"), ""),
        post("/v1/responses", r#"{"model":"sim","input":"x","previous_response_id":"resp_nobody"}"#),
    ] {
        let there = there.ask(&ask).await.expect(404);
        let here = balancer.ask(&ask).await.expect(404);
        assert_eq!(here.text(), there.text());
    }
}
