//! Which route a request takes, however its client writes what routes go by: the path, the host, the model
//! where it stands outside of the body, and no model at all.
//!
//! Which route is the first that matches is held by `route::virtual_models`; here it is held that the running
//! balancer reads a request as an engine does before it asks there.

use crate::common::body::{chat, form};
use crate::common::h2::{self, H2};
use crate::common::wire::{JSON, post, request, upgrade};
use crate::common::{
    Balancer, EngineServer, Options, Recorded, config, engine, engines, names, serving, upstreams,
};
use bytes::Bytes;
use serde_json::{Value, json};
use vllm_lb::config::check::check;

const CHAT: &str = "/v1/chat/completions";

/// Over engines that are called `one` and `two`, with these routes.
async fn routed(engines: &[EngineServer], routes: &str) -> Balancer {
    let text =
        format!("upstreams: [{{url: http://a, name: one}}, {{url: http://b, name: two}}]\nroutes:\n{routes}");
    let checked = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let mut config = config(upstreams(engines));
    for (upstream, name) in config.upstreams.iter_mut().zip(["one", "two"]) {
        upstream.name = name.into();
    }
    config.routes = checked.routes;
    Balancer::ready(config).await
}

fn last(engine: &EngineServer) -> Recorded {
    engine.requests().pop().expect("it got a request")
}

fn last_body(engine: &EngineServer) -> Value {
    serde_json::from_slice(&last(engine).body).expect("JSON")
}

/// The engine unescapes a path before it looks where it leads.
#[tokio::test(flavor = "multi_thread")]
async fn escaped_paths_match_the_same_route() {
    let engines = engines(1).await;
    let routes = "
  - {path: /v1/chat/completions, body: {overrides: {max_tokens: 7}}}
  - {path: /v1/realtime, to: sim}";
    let balancer = routed(&engines, routes).await;
    for path in [CHAT, "/v1/%63hat/completions", "/sessions/s/v1/%63hat%2Fcompletions?x=%63"] {
        // The simulated engine finds nothing at an escaped path: what counts is what it gets.
        balancer.ask(post(path, chat("sim"))).await;
        let got = last(&engines[0]);
        assert_eq!(got.path, path.trim_start_matches("/sessions/s"), "it goes on as it was written");
        assert_eq!(last_body(&engines[0])["max_tokens"], 7, "{path}");
    }
    balancer.ask(upgrade("/v1/%72ealtime?model=fast")).await;
    assert_eq!(last(&engines[0]).path, "/v1/%72ealtime?model=sim");
}

/// A chat was sent to where the engine takes responses.
#[tokio::test(flavor = "multi_thread")]
async fn a_translated_response_matches_routes_by_chat() {
    let engines = engines(1).await;
    let balancer = routed(&engines, "  - {model: fast, to: sim, responses: chat}").await;
    let body = json!({"model": "fast", "input": "hi"}).to_string();
    for (path, to) in [
        ("/v1/responses?a=b%20c", "/v1/chat/completions?a=b%20c"),
        ("/v1/%72esponses", CHAT),
        ("/sessions/s/v1/respons%65s", CHAT),
    ] {
        let answer = balancer.ask(post(path, &body)).await.expect(200).json();
        assert_eq!((&answer["object"], &answer["model"]), (&json!("response"), &json!("fast")), "{path}");
        assert_eq!(last(&engines[0]).path, to, "{path}");
    }
}

/// HTTP/2 has it in a field of another name.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_match_in_every_http_version() {
    let engines = engines(1).await;
    let routes = "
  - {header: {host: balancer.test}, headers: {set: {x-stage: tenant}}}";
    let balancer = routed(&engines, routes).await;
    let plain = [JSON, ("host", "balancer.test")];
    balancer.ask(request("POST", CHAT, &plain, chat("sim").as_bytes())).await.expect(200);
    assert_eq!(last(&engines[0]).headers["x-stage"], "tenant");
    let mut client = H2::connect(balancer.address()).await;
    for path in [CHAT, "/sessions/s/v1/chat/completions"] {
        client.ask(h2::post(path), &[Bytes::from(chat("sim"))]).await.expect(200);
        let got = last(&engines[0]).headers;
        assert!(got["x-stage"] == "tenant" && got["x-forwarded-host"] == "balancer.test", "{path} {got:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_in_a_query_is_percent_decoded() {
    let engines = [serving(&["a b/c:1"]).await, serving(&["other"]).await];
    let balancer = routed(&engines, "  - {model: 'rt:1+é', to: 'a b/c:1'}").await;
    for asked in ["rt%3A1%2B%C3%A9", "a+b/c:1", "a%20b%2fc%3A1"] {
        let mut client = balancer.client().await;
        client.send(upgrade(&format!("/v1/realtime?language=%65n&model={asked}"))).await;
        assert_eq!(client.head().await.status, 101, "{asked}");
    }
    let paths: Vec<String> = engines[0].requests().into_iter().map(|one| one.path).collect();
    let renamed = "/v1/realtime?model=a%20b%2Fc%3A1&language=%65n";
    assert_eq!(paths[0], renamed);
    assert_eq!(paths[1], "/v1/realtime?language=%65n&model=a+b/c:1", "it goes on as it was written");
    let refused = balancer.ask(upgrade("/v1/realtime?model=rt%3")).await.expect(404);
    assert!(refused.text().contains("The model `rt%3` does not exist"), "{}", refused.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_without_a_model_gets_that_of_its_route() {
    let engines = [serving(&["whisper"]).await, serving(&["other"]).await];
    let path = "/v1/audio/transcriptions";
    let balancer = routed(&engines, "  - {path: /v1/audio/transcriptions, to: whisper}").await;
    let kind = ("content-type", "multipart/form-data; boundary=cut");
    let named = form("cut", &[("file", "RIFF"), ("model", "whisper")]);
    let expected = balancer.ask(request("POST", path, &[kind], &named)).await;
    let body = form("cut", &[("file", "RIFF")]);
    balancer.ask(request("POST", path, &[kind], &body)).await.expect(expected.status);
    assert!(engines[0].requests().len() == 2 && engines[1].requests().is_empty());
    let got = String::from_utf8(last(&engines[0]).body.to_vec()).expect("a text");
    assert_eq!(got.to_ascii_lowercase(), String::from_utf8(named).expect("a text").to_ascii_lowercase());
}

/// It was refused because others, whom the route does not allow, serve something else.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_model_takes_that_of_its_routes_upstreams() {
    let engines = [serving(&["big"]).await, serving(&["small"]).await];
    let balancer = routed(&engines, "  - {header: {x-team: one}, upstreams: [two]}").await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).to_string();
    let refused = balancer.ask(post(CHAT, &body)).await.expect(404);
    assert!(refused.text().contains("The model `` does not exist"), "{}", refused.text());
    let of_team = request("POST", CHAT, &[JSON, ("x-team", "one")], body.as_bytes());
    let answer = balancer.ask(of_team).await.expect(200).json();
    assert_eq!(answer["model"], "small");
    assert_eq!((engines[0].requests().len(), last(&engines[1]).body), (0, Bytes::from(body)));
}

/// vLLM puts it into the body, in place of the one there.
#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_in_a_header_is_the_model_for_matching() {
    const ADAPTER: &str = "x-amzn-sagemaker-adapter-identifier";
    let tuned = Options { loras: names(&["tuned", "raw"]), ..Options::default() };
    let engines = [engine(tuned).await, serving(&["other"]).await];
    let routes = "
  - {model: virtual, to: tuned, body: {overrides: {seed: 7}}}
  - {model: raw, body: {overrides: {seed: 8}}}
  - {model: other, body: {overrides: {seed: 9}}}";
    let balancer = routed(&engines, routes).await;
    let ask = async |path: &str, adapter: &str, body: &Value| {
        let head = [JSON, (ADAPTER, adapter)];
        balancer.ask(request("POST", path, &head, body.to_string().as_bytes())).await.expect(200).json()
    };
    let messages = json!([{"role": "user", "content": "hi"}]);
    for model in [json!(null), json!("other"), json!("virtual"), json!("tuned")] {
        let answer = ask("/invocations", "virtual", &json!({"model": model, "messages": messages})).await;
        assert_eq!(answer["model"], "virtual", "{model}");
        let (got, body) = (last(&engines[0]).headers, last_body(&engines[0]));
        assert_eq!((&body["model"], &body["seed"]), (&json!("tuned"), &json!(7)), "{model}");
        assert!(got.get(ADAPTER).is_none_or(|name| name == "tuned"), "the engine would take {got:?}");
    }
    // What is not renamed goes on where it stands.
    ask("/invocations", "raw", &json!({"model": "sim", "messages": messages})).await;
    let (got, body) = (last(&engines[0]).headers, last_body(&engines[0]));
    assert!(body["model"] == "sim" && body["seed"] == 8 && got[ADAPTER] == "raw", "{body} {got:?}");
    // Elsewhere vLLM does not look at it.
    ask(CHAT, "virtual", &json!({"model": "other", "messages": messages})).await;
    let (got, body) = (last(&engines[1]).headers, last_body(&engines[1]));
    assert!(body["seed"] == 9 && got[ADAPTER] == "virtual");
    assert_eq!((engines[0].requests().len(), engines[1].requests().len()), (5, 1));
}

// === past no route ===

const SEEDED: &str = "  - {model: sim, body: {overrides: {seed: 7}, remove: [logit_bias]}}";

/// What names no model went past the routes for the one it got.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_model_takes_the_route_of_the_one_it_gets() {
    let engines = engines(2).await;
    let balancer = routed(&engines, SEEDED).await;
    for model in ["", r#""model":null,"#, r#""model":"","#, r#""mod\u0065l":null,"#] {
        let body = format!(r#"{{{model}"messages":[{{"role":"user","content":"hi"}}],"logit_bias":{{}}}}"#);
        let answer = balancer.ask(post(CHAT, &body)).await.expect(200).json();
        assert_eq!(answer["model"], "sim", "{body}");
    }
    let bodies = engines.iter().flat_map(EngineServer::requests).map(|got| got.body);
    let bodies: Vec<Value> = bodies.map(|body| serde_json::from_slice(&body).expect("JSON")).collect();
    assert_eq!(bodies.len(), 4);
    assert!(bodies.iter().all(|body| body["seed"] == 7 && body.get("logit_bias").is_none()), "{bodies:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_or_a_form_without_a_model_takes_the_route_of_the_one_it_gets() {
    let engines = engines(1).await;
    let routes = "  - {model: sim, headers: {set: {x-stage: seen}}}";
    let balancer = routed(&engines, routes).await;
    let mut client = balancer.client().await;
    client.send(upgrade("/v1/realtime")).await;
    client.head().await;
    assert_eq!(last(&engines[0]).headers["x-stage"], "seen");
    let kind = ("content-type", "multipart/form-data; boundary=cut");
    let body = form("cut", &[("file", "RIFF")]);
    balancer.ask(request("POST", "/v1/audio/transcriptions", &[kind], &body)).await;
    let got = last(&engines[0]);
    assert_eq!(
        (got.path.as_str(), &got.headers["x-stage"]),
        ("/v1/audio/transcriptions", &"seen".parse().unwrap())
    );
}

/// Where upstreams have several, those of the route that such requests take say which it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_model_matches_routes_in_order() {
    let engines = [serving(&["big"]).await, serving(&["small"]).await];
    let routes = "
  - {model: small, body: {overrides: {seed: 7}}}
  - {header: {x-team: one}, upstreams: [two]}";
    let balancer = routed(&engines, routes).await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).to_string();
    balancer.ask(post(CHAT, &body)).await.expect(404);
    let of_team = request("POST", CHAT, &[JSON, ("x-team", "one")], body.as_bytes());
    balancer.ask(of_team).await.expect(200);
    let got = last_body(&engines[1]);
    assert_eq!((&got["seed"], &got["model"]), (&json!(7), &json!("small")));
    assert!(engines[0].requests().is_empty());
}

/// Python reads these as it reads UTF-8; here no route was found for them.
#[tokio::test(flavor = "multi_thread")]
async fn json_in_utf_16_or_32_bypasses_no_route() {
    let engines = engines(1).await;
    let balancer = routed(&engines, SEEDED).await;
    let text = chat("sim");
    let narrow = || text.encode_utf16();
    let marked = || std::iter::once(0xfeff).chain(narrow());
    let wide = || text.chars().map(u32::from);
    let marked_wide = || std::iter::once(0xfeff).chain(wide());
    let bodies: [Vec<u8>; 8] = [
        narrow().flat_map(u16::to_le_bytes).collect(),
        narrow().flat_map(u16::to_be_bytes).collect(),
        marked().flat_map(u16::to_le_bytes).collect(),
        marked().flat_map(u16::to_be_bytes).collect(),
        wide().flat_map(u32::to_le_bytes).collect(),
        wide().flat_map(u32::to_be_bytes).collect(),
        marked_wide().flat_map(u32::to_le_bytes).collect(),
        marked_wide().flat_map(u32::to_be_bytes).collect(),
    ];
    for (index, body) in bodies.iter().enumerate() {
        let refused = balancer.ask(post(CHAT, body)).await.expect(400);
        assert!(refused.text().contains("UTF-8"), "{index}: {}", refused.text());
    }
    assert!(engines[0].requests().is_empty());
    balancer.ask(post(CHAT, format!("\u{feff}{text}"))).await;
    assert!(last(&engines[0]).body.windows(8).any(|part| part == b"\"seed\":7"));
}

#[tokio::test(flavor = "multi_thread")]
async fn model_names_have_a_length_limit() {
    let engines = engines(1).await;
    for routes in ["  - {model: '*', to: sim}", "  - {path: /nowhere}"] {
        let balancer = routed(&engines, routes).await;
        let refused = balancer.ask(post(CHAT, chat(&"m".repeat(4097)))).await.expect(400);
        assert!(refused.text().contains("longer than 4096 bytes") && refused.text().len() < 500);
    }
    assert!(engines[0].requests().is_empty());
}
