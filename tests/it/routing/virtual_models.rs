//! Virtual models through the running balancer: what the engine gets, and what the client gets back.
//!
//! What exactly is edited, and how, is held by `tests/conformance.rs`; here it is held that requests and
//! answers really go through it, with every framing, at every attempt.

mod names;
mod second_model;

use crate::common::body::{chat, form};
use crate::common::h2::{self, H2};
use crate::common::wire::{CHUNKED, JSON, Wire, chunk, get, head, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, Recorded, config, direct, engine, engines, eventually,
    serving, upstreams,
};
use bytes::Bytes;
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::Config;

const CHAT: &str = "/v1/chat/completions";

/// A configuration over these engines, called `one`, `two` and so on, with these routes.
fn routed(engines: &[EngineServer], routes: &str) -> Config {
    let text = format!("upstreams: [http://one, http://two, http://three]\nroutes:\n{routes}");
    let checked = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let mut config = config(upstreams(engines));
    for (upstream, name) in config.upstreams.iter_mut().zip(["one:80", "two:80", "three:80"]) {
        upstream.name = name.into();
    }
    config.routes = checked.routes;
    config
}

const FAST: &str = "
  - model: fast
    to: sim
    headers: {set: {x-stage: prod}, remove: [x-debug]}
    response_headers: {set: {x-face: fast}}
    api_key: other
    body:
      defaults: {max_tokens: 3, temperature: 0.5}
      overrides: {seed: 7}
      remove: [logit_bias]
      roles: {developer: system}
";

fn last(engine: &EngineServer) -> Recorded {
    engine.requests().pop().expect("it got a request")
}

fn last_body(engine: &EngineServer) -> Value {
    serde_json::from_slice(&last(engine).body).expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_receives_the_edits_and_the_client_its_model_name() {
    let engines = engines(1).await;
    let balancer = Balancer::ready(routed(&engines, FAST)).await;
    let body = json!({
        "model": "fast", "temperature": 0.1, "logit_bias": {"1": 1}, "seed": 1,
        "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
    });
    let headers = [JSON, ("authorization", "Bearer mine"), ("x-debug", "1")];
    let answer = balancer.ask(request("POST", CHAT, &headers, body.to_string().as_bytes())).await.expect(200);
    let answered: Value = answer.json();
    assert_eq!(answered["model"], "fast");
    assert_eq!(answered["usage"]["completion_tokens"], 3);
    assert_eq!(answer.headers["x-face"], "fast");
    let got = last_body(&engines[0]);
    let expected = json!({
        "model": "sim", "temperature": 0.1, "seed": 7, "max_tokens": 3,
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    });
    assert_eq!(got, expected);
    let head = last(&engines[0]).headers;
    assert!(head["authorization"] == "Bearer other" && head["x-stage"] == "prod");
    assert!(!head.contains_key("x-debug"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_has_the_clients_model_name_and_only_requested_usage() {
    let engines = engines(1).await;
    let balancer = Balancer::ready(routed(&engines, FAST)).await;
    let mut body = json!({"model": "fast", "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    for asks in [false, true] {
        if asks {
            body["stream_options"] = json!({"include_usage": true});
        }
        let answer = balancer.ask(post(CHAT, body.to_string())).await.expect(200);
        let events: Vec<&str> =
            answer.text().lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.last(), Some(&"[DONE]"));
        let chunks: Vec<Value> = events[..events.len() - 1]
            .iter()
            .map(|event| serde_json::from_str(event).expect("JSON"))
            .collect();
        assert!(chunks.iter().all(|chunk| chunk["model"] == "fast"), "{chunks:?}");
        assert_eq!(chunks.iter().any(|chunk| chunk["usage"].is_object()), asks, "{chunks:?}");
        assert!(asks || chunks.iter().all(|chunk| chunk["choices"] != json!([])), "{chunks:?}");
    }
    assert_eq!(last_body(&engines[0])["stream_options"]["include_usage"], true);
    // Both are counted, also the one whose client did not ask, when they have ended.
    eventually("both are counted", async || {
        let page = balancer.admin(get("/metrics")).await.expect(200);
        let counted = page.text().lines().find(|line| line.contains(r#"kind="output",model="sim""#))?;
        (counted.rsplit(' ').next()?.parse::<u64>().ok()? >= 6).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edited_body_is_the_same_at_every_attempt_and_in_every_framing() {
    let options = || Options { max_model_len: 1_000_000, ..Options::default() };
    let engines = [engine(options()).await, engine(options()).await];
    let balancer = Balancer::ready(routed(&engines, FAST)).await;
    let text = "long ".repeat(60_000);
    let body = json!({"model": "fast", "messages": [{"role": "user", "content": text}]}).to_string();
    for engine in &engines {
        engine.set_fault_for(1, InjectedFault::CutHeaders { reset: true }).await;
    }
    let mut client = balancer.client().await;
    client.ask(post(CHAT, &body)).await.expect(200);
    client.send(head("POST", CHAT, &[JSON, CHUNKED])).await;
    for piece in body.as_bytes().chunks(50_000).chain([&b""[..]]) {
        client.send(chunk(piece)).await;
    }
    client.answer().await.expect(200);
    let mut h2 = H2::connect(balancer.address()).await;
    h2.ask(h2::post(CHAT), &[Bytes::from(body.clone())]).await.expect(200);
    let mut hashes = Vec::new();
    for engine in &engines {
        hashes.extend(engine.requests().iter().map(|one| (one.body_length, one.body_hash)));
    }
    assert!(hashes.len() >= 4, "{hashes:?}");
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_uses_only_its_upstreams() {
    let engines = engines(3).await;
    let routes = "
  - {model: small, to: sim, upstreams: ['two:80']}
  - {model: none, to: nobody}";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    for _ in 0..12 {
        balancer.ask(post(CHAT, chat("small"))).await.expect(200);
    }
    let received = |index: usize| engines[index].requests().len();
    assert_eq!((received(0), received(1), received(2)), (0, 12, 0));
    let refused = balancer.ask(post(CHAT, chat("none"))).await.expect(404);
    assert!(refused.text().contains("The model `none` does not exist"), "{}", refused.text());
    assert!(refused.text().contains("small"), "the aliases: {}", refused.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_has_its_own_retry_budget() {
    let engines = engines(2).await;
    let routes = "
  - {model: once, to: sim, retry: {budget: 0}}
  - {model: again, to: sim}";
    let mut config = routed(&engines, routes);
    config.health.fall = 1000;
    config.breaker.failures = 1000;
    let balancer = Balancer::ready(config).await;
    for engine in &engines {
        engine.set_fault(InjectedFault::Status { status: 502, body: "{}".into() }).await;
    }
    let attempts = || engines.iter().map(|engine| engine.stats().received).sum::<u64>();
    balancer.ask(post(CHAT, chat("once"))).await.expect(502);
    assert_eq!(attempts(), 1);
    balancer.ask(post(CHAT, chat("again"))).await.expect(502);
    assert_eq!(attempts(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn route_edits_do_not_count_against_the_body_limit() {
    let engines = engines(1).await;
    let routes = "
  - {model: fast, to: sim, body: {defaults: {max_tokens: 1, temperature: 0.5, user: somebody}}}";
    let mut config = routed(&engines, routes);
    let body = json!({"model": "fast", "messages": [{"role": "user", "content": "a ".repeat(2_000)}]});
    let body = body.to_string();
    config.peek.max_body = body.len() as u64;
    config.peek.bytes = 1024;
    let balancer = Balancer::ready(config).await;
    balancer.ask(post(CHAT, body.clone())).await.expect(200);
    assert!(last(&engines[0]).body.len() > body.len());
    balancer.ask(post(CHAT, body.replace("a a", "a a a"))).await.expect(413);
}

#[tokio::test(flavor = "multi_thread")]
async fn virtual_models_are_listed() {
    let engines = engines(1).await;
    let routes = "
  - {model: fast, to: sim}
  - {model: 'any-*', to: sim}
  - {model: ghost, to: nobody}";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let list: Value = balancer.ask(get("/v1/models")).await.expect(200).json();
    let ids: Vec<&str> =
        list["data"].as_array().expect("a list").iter().filter_map(|card| card["id"].as_str()).collect();
    assert_eq!(ids, ["fast", "sim"]);
    assert_eq!(list["data"][0]["max_model_len"], list["data"][1]["max_model_len"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_overflow_is_answered_with_finish_reason_length() {
    let engine = engine(Options { max_model_len: 64, ..Options::default() }).await;
    let routes = "
  - {model: long, to: sim, overflow: length}";
    let engines = [engine];
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let text = "word ".repeat(2000);
    let ask = |model: &str, stream: bool| {
        json!({"model": model, "stream": stream, "messages": [{"role": "user", "content": text}]}).to_string()
    };
    balancer.ask(post(CHAT, ask("sim", false))).await.expect(400);
    for _ in 0..3 {
        let answer = balancer.ask(post(CHAT, ask("long", false))).await.expect(200);
        let answered: Value = answer.json();
        assert_eq!(answered["choices"][0]["finish_reason"], "length");
        assert_eq!(
            (&answered["model"], &answered["choices"][0]["message"]["content"]),
            (&json!("long"), &json!(""))
        );
    }
    let stream = balancer.ask(post(CHAT, ask("long", true))).await.expect(200);
    assert!(stream.text().ends_with("data: [DONE]\n\n"), "{}", stream.text());
    let two = json!({"model": "long", "n": 2, "messages": [{"role": "user", "content": text}]}).to_string();
    let answered: Value = balancer.ask(post(CHAT, two)).await.expect(200).json();
    assert_eq!(answered["choices"].as_array().map(Vec::len), Some(2), "{answered}");
    balancer.until_idle().await;
    let wrong = json!({"model": "long", "messages": "none"}).to_string();
    balancer.ask(post(CHAT, wrong)).await.expect(400);
}

/// It was a failure to pingora, which closed its connection, and nothing of ours was on it.
#[tokio::test(flavor = "multi_thread")]
async fn an_overflow_keeps_the_connection_and_names_its_upstream() {
    let engines = [engine(Options { max_model_len: 64, ..Options::default() }).await];
    let routes = "
  - {model: long, to: sim, overflow: length}";
    let mut config = routed(&engines, routes);
    config.expose = true;
    let balancer = Balancer::ready(config).await;
    let ask = |model: &str, stream: bool| {
        let messages = json!([{"role": "user", "content": "word ".repeat(2000)}]);
        json!({"model": model, "stream": stream, "messages": messages}).to_string()
    };
    let mut wire = balancer.client().await;
    let mut client = H2::connect(balancer.address()).await;
    for (stream, kind) in [(false, "application/json"), (true, "text/event-stream; charset=utf-8")] {
        let refused = wire.ask(post(CHAT, ask("sim", stream))).await.expect(400);
        let by_http1 = wire.ask(post(CHAT, ask("long", stream))).await.expect(200);
        let by_http2 = client.ask(h2::post(CHAT), &[Bytes::from(ask("long", stream))]).await.expect(200);
        for answer in [&by_http1, &by_http2] {
            let text = answer.text();
            assert!(answer.whole && text.contains(r#""finish_reason":"length""#), "{text}");
            assert_eq!(answer.headers["content-type"], kind);
            assert_eq!(answer.headers["content-length"], answer.body.len().to_string());
            let fields = refused.headers.keys().filter(|name| name.as_str().starts_with("x-"));
            for name in fields {
                assert!(answer.headers.contains_key(name), "{name}: {:?}", answer.headers);
            }
            assert_eq!(answer.headers["x-vllm-lb-upstream"], "one:80");
            assert_eq!(answer.headers["x-vllm-lb-attempts"], "1");
        }
    }
    balancer.until_recorded().await;
    let page = balancer.admin(get("/metrics")).await.expect(200);
    let ok = page.text().lines().find(|line| line.contains(r#"outcome="ok""#)).map(str::to_string);
    assert!(ok.as_ref().is_some_and(|line| line.ends_with(" 4")), "{ok:?}");
}

/// Only what an upstream had answered had them.
#[tokio::test(flavor = "multi_thread")]
async fn own_answers_on_a_route_have_the_routes_headers() {
    let engines = [engine(Options { max_model_len: 64, ..Options::default() }).await];
    let routes = "
  - model: long
    to: sim
    overflow: length
    response_headers: {set: {x-face: long}, remove: [server]}
  - {model: ghost, to: nobody, response_headers: {set: {x-face: none, server: mine}}}";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let ask = |model: &str| {
        let messages = json!([{"role": "user", "content": "word ".repeat(2000)}]);
        json!({"model": model, "messages": messages}).to_string()
    };
    let overflow = balancer.ask(post(CHAT, ask("long"))).await.expect(200);
    assert!(overflow.headers["x-face"] == "long" && !overflow.headers.contains_key("server"));
    let refused = balancer.ask(post(CHAT, ask("ghost"))).await.expect(404);
    assert!(refused.headers["x-face"] == "none" && refused.headers["server"] == "mine");
    let refused = balancer.ask(post(CHAT, ask("sim"))).await.expect(400);
    assert!(!refused.headers.contains_key("x-face"));
}

/// The upstream's own key, and a route's, went with the client's.
#[tokio::test(flavor = "multi_thread")]
async fn remove_applies_to_the_clients_keys_only() {
    let engines = [engine(Options { api_key: Some("right".into()), ..Options::default() }).await];
    let routes = "
  - {model: own, to: sim, headers: {remove: [authorization]}}
  - {model: routed, to: sim, api_key: right, headers: {remove: [Authorization]}}";
    for (model, key) in [("own", Some("right")), ("routed", None), ("own", None)] {
        let mut config = routed(&engines, routes);
        config.upstreams[0].models = Some(vec!["sim".into()]);
        config.upstreams[0].api_key = key.map(Secret::new);
        let balancer = Balancer::ready(config).await;
        let client = ("authorization", "Bearer right");
        let body = chat(model);
        let answer = balancer.ask(request("POST", CHAT, &[JSON, client], body.as_bytes())).await;
        let wanted = if model == "own" && key.is_none() { 401 } else { 200 };
        assert_eq!(answer.status, wanted, "{model} {key:?}");
    }
}

/// They had gone by all routes: "a route with nothing to match matches every request".
#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_body_takes_a_route_that_needs_no_model() {
    let engines = engines(2).await;
    let routes = "
  - {model: fast, to: sim, headers: {set: {x-stage: wrong}}}
  - {upstreams: ['one:80'], headers: {set: {x-stage: prod}}, response_headers: {set: {x-face: any}}}";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let kept = json!({"input": "hi", "store": true}).to_string();
    for engine in &engines {
        // One that the route would not have led there is at home where it is.
        let mut own = Wire::connect(&direct(engine)).await;
        let made: Value = own.ask(post("/v1/responses", &kept)).await.expect(200).json();
        let path = format!("/v1/responses/{}", made["id"].as_str().expect("an id"));
        let answer = balancer.ask(get(&path)).await.expect(200);
        assert!(answer.json()["id"] == made["id"] && answer.headers["x-face"] == "any");
        let got = last(engine);
        assert!(got.path == path && got.headers["x-stage"] == "prod", "{} {:?}", got.path, got.headers);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_route_is_not_edited() {
    let engines = [serving(&["sim", "other"]).await];
    let balancer = Balancer::ready(routed(&engines, FAST)).await;
    let body = concat!(
        r#"{"messages" : [{"role":"user","content":"\u00e9"}],  "#,
        r#""model":"other", "seed":1, "seed":2}"#,
    );
    balancer.ask(post(CHAT, body)).await.expect(200);
    assert_eq!(last(&engines[0]).body, body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_names_the_served_model() {
    let engines = [serving(&["whisper"]).await, serving(&["other"]).await];
    let routes = "
  - {model: ears, to: whisper}";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let kind = ("content-type", "multipart/form-data; boundary=cut");
    let path = "/v1/audio/transcriptions";
    let direct = form("cut", &[("model", "whisper"), ("file", "RIFF")]);
    let expected = balancer.ask(request("POST", path, &[kind], &direct)).await;
    let body = form("cut", &[("model", "ears"), ("file", "RIFF")]);
    let answer = balancer.ask(request("POST", path, &[kind], &body)).await.expect(expected.status);
    assert_eq!(answer.status, expected.status);
    assert_eq!(last(&engines[0]).body, direct);
    assert!(engines[1].requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_description_of_embedded_bytes_has_the_clients_model_name() {
    let engines = engines(1).await;
    let balancer = Balancer::ready(routed(&engines, FAST)).await;
    let ask = |model: &str| {
        post("/v1/embeddings", json!({"model": model, "input": "hi", "encoding_format": "bytes"}).to_string())
    };
    let served = balancer.ask(ask("sim")).await.expect(200);
    let answer = balancer.ask(ask("fast")).await.expect(200);
    assert_eq!(answer.body, served.body);
    let described = |answer: &crate::common::wire::Answer| -> Value {
        serde_json::from_str(answer.header("metadata")).expect("JSON")
    };
    assert_eq!(described(&served)["model"], "sim");
    assert_eq!(described(&answer)["model"], "fast");
    assert_eq!(described(&answer)["data"], described(&served)["data"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_cannot_be_edited_is_refused() {
    let engines = engines(1).await;
    let routes = "
  - {header: {x-team: guard}, body: {overrides: {max_tokens: 7}}}";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let wide = |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_le_bytes).collect() };
    for body in [wide(&chat("sim")), wide(&format!("\u{feff}{}", chat("sim")))] {
        let ask = |headers: &[(&str, &str)]| request("POST", CHAT, headers, &body);
        let answer = balancer.ask(ask(&[JSON, ("x-team", "guard")])).await.expect(400);
        let error = &answer.json()["error"];
        assert_eq!(
            *error,
            json!({
                "message": "The body must be JSON in UTF-8.",
                "type": "invalid_request_error", "param": "body", "code": 400,
            })
        );
        assert!(engines[0].requests().is_empty());
    }
    let answer =
        balancer.ask(request("POST", CHAT, &[JSON, ("x-team", "guard")], chat("sim").as_bytes())).await;
    answer.expect(200);
    assert_eq!(last_body(&engines[0])["max_tokens"], 7);
}

/// The example of the manual: one engine, two faces.
#[tokio::test(flavor = "multi_thread")]
async fn two_virtual_models_share_engines_with_and_without_thinking() {
    let example = include_str!("../../../conf/examples/reasoning.yaml");
    let checked = check(example, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.routes = checked.routes;
    let balancer = Balancer::ready(config).await;
    let body = |model: &str| {
        let thinks = json!({"enable_thinking": true, "budget": 7});
        let messages = json!([{"role": "user", "content": "hi"}]);
        json!({"model": model, "messages": messages, "chat_template_kwargs": thinks}).to_string()
    };
    for (model, thinks, temperature) in [("thinker", true, 1.0), ("instant", false, 0.6)] {
        let answer = balancer.ask(post(CHAT, body(model))).await.expect(200).json();
        assert_eq!(answer["model"], model);
        let asked =
            |engine: &EngineServer| engine.requests().into_iter().map(|one| one.body).collect::<Vec<_>>();
        let all: Vec<Value> = engines
            .iter()
            .flat_map(asked)
            .map(|body| serde_json::from_slice(&body).expect("JSON"))
            .filter(|body: &Value| body["temperature"] == temperature)
            .collect();
        let [got] = &all[..] else { panic!("one request: {all:?}") };
        assert_eq!(got["chat_template_kwargs"], json!({"enable_thinking": thinks, "budget": 7}));
        assert_eq!(got["model"], "sim");
    }
    let list = balancer.ask(get("/v1/models")).await.expect(200).json();
    let ids =
        list["data"].as_array().map(|cards| cards.iter().map(|card| card["id"].clone()).collect::<Vec<_>>());
    assert_eq!(ids, Some(vec![json!("thinker"), json!("instant"), json!("sim")]));
}
