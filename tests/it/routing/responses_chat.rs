//! Responses over engines that have only chats (`responses: chat`), held against an engine that has them.
//!
//! What exactly a request and an answer become is held by `tests/conformance.rs`; here it is held that they
//! become what an engine's own Responses are, and that everything else of a request goes on as for any other.

use crate::common::raw::Raw;
use crate::common::wire::{Answer, Wire, post};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, Timing, config, direct, engine, engines, eventually,
    upstream, upstreams,
};
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::types::{Config, RouteConfig, UpstreamConfig};
use vllm_lb::fleet::SnapshotEntry;

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const UNREADABLE: &str = "The upstream's stream cannot be read as a chat.";

fn routes(written: &str) -> Vec<RouteConfig> {
    let text = format!("upstreams: [http://a]\nroutes: [{written}]");
    check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes
}

fn translating(upstreams: Vec<UpstreamConfig>) -> Config {
    Config { routes: routes("{model: fast, to: sim, responses: chat}"), ..config(upstreams) }
}

/// An engine that has only chats.
async fn only_chats(seed: u64) -> EngineServer {
    engine(Options { seed, responses: false, ..Options::default() }).await
}

/// Two of them, of which the first is asked first.
async fn two() -> (Vec<EngineServer>, Config) {
    let engines = vec![only_chats(1).await, only_chats(2).await];
    let mut config = translating(upstreams(&engines));
    config.upstreams[0].weight = 1000.0;
    config.upstreams[1].weight = 0.001;
    config.health.fall = 1000;
    (engines, config)
}

fn events(answer: &Answer) -> Vec<Value> {
    let data = answer.text().lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

/// What two engines must say alike: without ids and times, what only one of them knows, and the echo, which
/// is fuller where defaults are known. A translated answer has the reasoning in its summary, too.
fn alike(mut value: Value) -> Value {
    const VARY: [&str; 4] = ["id", "item_id", "call_id", "created_at"];
    const SAID: [&str; 8] =
        ["incomplete_details", "instructions", "object", "output", "status", "text", "tools", "usage"];
    match &mut value {
        Value::Array(items) => items.iter_mut().for_each(|item| *item = alike(item.take())),
        Value::Object(fields) => {
            let is_response = fields.get("object").is_some_and(|object| object == "response");
            fields.retain(|key, _| !VARY.contains(&&**key) && (!is_response || SAID.contains(&&**key)));
            if fields.get("type").is_some_and(|kind| kind == "reasoning") {
                fields.shift_remove("summary");
            }
            if fields.contains_key("input_tokens") {
                fields.retain(|key, _| !key.ends_with("_details"));
            }
            fields.values_mut().for_each(|field| *field = alike(field.take()));
        }
        _ => {}
    }
    value
}

/// Requests of all kinds that a chat can answer.
fn requests() -> Vec<Value> {
    let schema = json!({"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}});
    let tool = json!({"type": "function", "name": "weather", "description": "d", "parameters": schema});
    let thinking = json!({"enable_thinking": true});
    let format = json!({"type": "json_schema", "name": "w", "schema": schema, "strict": true});
    let thought = json!({"type": "reasoning_text", "text": "hm"});
    let turns = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "what now"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [thought]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"city\":\"x\"}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "it shines"}]},
        {"role": "developer", "content": "be brief"},
    ]);
    vec![
        json!({"input": "hi"}),
        json!({"input": "hi", "instructions": "be brief", "max_output_tokens": 5}),
        json!({"input": turns, "tools": [tool]}),
        json!({"input": "hi", "chat_template_kwargs": thinking, "max_output_tokens": 9}),
        json!({"input": "hi", "tools": [tool], "tool_choice": "required"}),
        json!({
            "input": "hi", "tools": [tool], "tool_choice": {"type": "function", "name": "weather"},
            "chat_template_kwargs": thinking,
        }),
        json!({"input": "hi", "tools": [tool], "tool_choice": "required", "max_output_tokens": 3}),
        json!({"input": "hi", "text": {"format": format}}),
        json!({"input": "hi", "text": {"format": {"type": "json_object"}}}),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_translated_response_equals_the_engines_own() {
    let native = engine(Options::default()).await;
    let engines = [only_chats(7).await];
    let balancer = Balancer::ready(translating(upstreams(&engines))).await;
    let mut client = Wire::connect(&direct(&native)).await;
    let requests = requests();
    for request in &requests {
        for stream in [false, true] {
            let ask = |model: &str| {
                let mut request = request.clone();
                request["model"] = json!(model);
                request["stream"] = json!(stream);
                post(RESPONSES, request.to_string())
            };
            let expected = client.ask(ask("sim")).await.expect(200);
            let answer = balancer.ask(ask("fast")).await.expect(200);
            assert_eq!(answer.header("content-type"), expected.header("content-type"));
            assert!(answer.whole);
            if !stream {
                let (answer, expected) = (answer.json(), expected.json());
                assert_eq!(answer["model"], "fast");
                assert_eq!(alike(answer), alike(expected), "{request}");
                continue;
            }
            let (told, expected) = (events(&answer), events(&expected));
            let ids = |event: &Value| event["response"]["id"].as_str().map(str::to_owned);
            let mut ids: Vec<String> = told.iter().filter_map(ids).collect();
            ids.dedup();
            assert!(matches!(&ids[..], [id] if id.len() == 37 && id.starts_with("resp_")), "{ids:?}");
            for (told, expected) in told.iter().zip(&expected) {
                assert_eq!(alike(told.clone()), alike(expected.clone()), "{request}");
            }
            assert_eq!(told.len(), expected.len(), "{request}");
            assert_eq!(told.last().map(|event| &event["type"]), Some(&json!("response.completed")));
        }
    }
    let asked = engines[0].requests();
    assert_eq!(asked.len(), 2 * requests.len());
    assert!(asked.iter().all(|one| one.path == CHAT));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chat_request_keeps_the_upstreams_prefix_and_the_query() {
    let answer =
        r#"{"model":"sim","choices":[{"index":0,"message":{"content":"wo"},"finish_reason":"stop"}]}"#;
    let json = "HTTP/1.1 200 OK\r\ncontent-type: application/json";
    let raw = Raw::start(&format!("{json}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len())).await;
    let balancer = Balancer::ready(translating(vec![raw.upstream_below("/team")])).await;
    let ask = post("/v1/responses?x=1", r#"{"model":"fast","input":"hi"}"#);
    let told = balancer.ask(ask).await.expect(200).json();
    assert_eq!(told["output"][0]["content"][0]["text"], "wo");
    let head = raw.posts().pop().expect("it was asked");
    assert!(head.starts_with("POST /team/v1/chat/completions?x=1 HTTP/1.1\r\n"), "{head}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untranslatable_request_is_rejected_without_an_attempt() {
    let engines = [only_chats(1).await];
    let balancer = Balancer::ready(translating(upstreams(&engines))).await;
    for (field, value, status, param) in [
        ("previous_response_id", json!("resp_1"), 404, "response_id"),
        ("background", json!(true), 400, "background"),
        ("tools", json!([{"type": "web_search"}]), 400, "tools[0].type"),
        ("input", json!([{"type": "item_reference", "id": "x"}]), 400, "input[0].type"),
    ] {
        let mut body = json!({"model": "fast", "input": "hi"});
        body[field] = value;
        let mut client = balancer.client().await;
        let refused = client.ask(post(RESPONSES, body.to_string())).await.expect(status).json();
        assert_eq!(refused["error"]["type"], "invalid_request_error");
        assert_eq!((&refused["error"]["param"], &refused["error"]["code"]), (&json!(param), &json!(status)));
        // The connection goes on.
        client.ask(post(RESPONSES, r#"{"model":"fast","input":"hi"}"#)).await.expect(200);
    }
    assert_eq!(engines[0].requests().len(), 4);
    assert!(balancer.metric(r#"vllm_lb_rejects_total{reason="field"}"#).await >= 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn engine_errors_are_forwarded_with_the_clients_model_name() {
    let engines = [engine(Options { max_model_len: 64, responses: false, ..Options::default() }).await];
    let mut config = translating(upstreams(&engines));
    config.routes.extend(routes("{model: long, to: sim, responses: chat, overflow: length}"));
    let balancer = Balancer::ready(config).await;
    let ask = |model: &str, stream: bool| {
        let input = "word ".repeat(500);
        post(RESPONSES, json!({"model": model, "input": input, "stream": stream}).to_string())
    };
    let error = balancer.ask(ask("fast", true)).await.expect(400).json();
    assert_eq!(error["error"]["param"], "input_tokens");
    let overflow = balancer.ask(ask("long", false)).await.expect(200).json();
    assert_eq!((&overflow["object"], &overflow["status"]), (&json!("response"), &json!("incomplete")));
    let overflow = events(&balancer.ask(ask("long", true)).await.expect(200));
    assert_eq!(overflow.last().map(|event| &event["type"]), Some(&json!("response.completed")));
    let odd = r#"{"model":"fast","input":"hi","temperature":"hot"}"#;
    let error = balancer.ask(post(RESPONSES, odd)).await.expect(400).json();
    assert_eq!(error["error"]["param"], "body.temperature");
    // What names no model takes a route that asks for none.
    let any = routes("{responses: chat}");
    let config = Config { routes: any, ..translating(upstreams(&engines)) };
    let balancer = Balancer::ready(config).await;
    for body in ["not json", r#"["a"]"#, "{}", r#"{"input":"\ud800"}"#] {
        let error = balancer.ask(post(RESPONSES, body)).await.expect(400).json();
        assert!(error["error"]["message"].is_string(), "{body}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_fails_before_the_first_event_is_retried() {
    for fault in [
        InjectedFault::CutHeaders { reset: true },
        InjectedFault::Status { status: 503, body: "{}".into() },
        InjectedFault::ErrorEvent { status: 500 },
        InjectedFault::AbortEmpty,
        InjectedFault::CutStream { events: 1, reset: false },
    ] {
        let (engines, config) = two().await;
        let balancer = Balancer::ready(config).await;
        engines[0].set_fault_for(1, fault.clone()).await;
        let body = r#"{"model":"fast","input":"hi","stream":true,"max_output_tokens":4}"#;
        let answer = balancer.ask(post(RESPONSES, body)).await.expect(200);
        let told = events(&answer);
        assert!(answer.whole && told[0]["type"] == "response.created", "{fault:?}: {answer:?}");
        assert_eq!(told.last().map(|event| &event["type"]), Some(&json!("response.completed")), "{fault:?}");
        let (first, second) = (engines[0].requests(), engines[1].requests());
        let hashes: Vec<u64> = first.iter().chain(&second).map(|request| request.body_hash).collect();
        assert!(hashes.len() == 2 && hashes[0] == hashes[1], "{fault:?}: {hashes:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_ends_with_an_error_event() {
    let (engines, mut config) = two().await;
    config.retry.attempts = 0;
    config.routes.iter_mut().for_each(|route| route.retry.attempts = 0);
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault_for(1, InjectedFault::CutStream { events: 3, reset: true }).await;
    let body = r#"{"model":"fast","input":"hi","stream":true}"#;
    let told = events(&balancer.ask(post(RESPONSES, body)).await.expect(200));
    assert_eq!(told[0]["type"], "response.created");
    assert_eq!(told.last().map(|event| &event["type"]), Some(&json!("error")));
    assert!(told.iter().all(|event| event["type"] != "response.completed"), "{told:?}");
    assert!(told.iter().any(|event| event["type"] == "response.output_text.delta"), "{told:?}");
}

/// Ends in every way that is none: properly framed, without `[DONE]`; and no chat at all.
#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_chat_is_not_translated_as_complete() {
    let chunk =
        r#"data: {"model":"sim","choices":[{"index":0,"delta":{"content":"wo"},"finish_reason":"stop"}]}"#;
    let answer = |kind: &str, body: &str| {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}", body.len());
        format!("{head}\r\n\r\n{body}")
    };
    let ask = post(RESPONSES, r#"{"model":"fast","input":"hi","stream":true}"#);
    let raw = Raw::start(&answer("text/event-stream", &format!("{chunk}\n\n"))).await;
    let mut config = translating(vec![raw.upstream()]);
    config.routes[0].retry.attempts = 0;
    config.breaker.failures = 1;
    let balancer = Balancer::ready(config).await;
    let told = events(&balancer.ask(&ask).await.expect(200));
    let kinds: Vec<&str> = told.iter().filter_map(|event| event["type"].as_str()).collect();
    assert_eq!(kinds.last(), Some(&"error"), "{kinds:?}");
    assert!(!kinds.contains(&"response.completed"), "{kinds:?}");
    // It is told as any other that breaks: in the log, in the metrics, to the breaker.
    balancer.until_metric("vllm_lb_broken_streams_total", 1.0).await;
    let of_it = |line: &String| line.contains(&format!("path={RESPONSES} "));
    let done = async || crate::common::logs::all().into_iter().find(of_it);
    let done = eventually("the request is logged", done).await;
    assert!(done.contains("outcome=broken "), "{done}");
    eventually("the breaker is open", async || {
        let tripped = |entry: &SnapshotEntry| !entry.is_ready();
        balancer.running.fleet.snapshot().entries.iter().all(tripped).then_some(())
    })
    .await;
    for (kind, body) in [("application/json", r#"{"object":"list"}"#), ("text/html", "<html>")] {
        let raw = Raw::start(&answer(kind, body)).await;
        let balancer = Balancer::ready(translating(vec![raw.upstream()])).await;
        let refused = balancer.ask(&ask).await.expect(502);
        assert!(refused.json()["error"]["message"].is_string(), "{refused:?}");
    }
}

/// A stream that cannot be translated is not read on: the upstream would generate to its end in vain.
#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_stream_closes_the_upstream_connection() {
    let chunk = r#"data: {"model":"sim","choices":[{"index":0,"delta":{"content":"wo"}}]}"#;
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 1000000";
    // It has more to say, and says nothing. What goes before is more than is read at once.
    let waiting = ": wait\n\n".repeat(40_000);
    let raw = Raw::holding(&format!("{head}\r\n\r\n{chunk}\n\n{waiting}data: {{oh\n\n")).await;
    let mut config = translating(vec![raw.upstream()]);
    config.routes[0].retry.attempts = 0;
    let balancer = Balancer::ready(config).await;
    let ask = post(RESPONSES, r#"{"model":"fast","input":"hi","stream":true}"#);
    let answer = balancer.ask(&ask).await;
    balancer.until_idle().await;
    if answer.status == 200 {
        let told = events(&answer);
        assert!(told.iter().any(|event| event["type"] == "response.output_text.delta"), "{told:?}");
        assert_eq!(told.last().map(|event| &event["message"]), Some(&json!(UNREADABLE)));
    } else {
        // All of it came at once, and nothing had gone out.
        answer.expect(502);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_by_a_route_has_the_routes_headers() {
    let engines = [only_chats(1).await];
    let written = "{model: fast, to: sim, responses: chat, response_headers: {set: {x-team: blue}}}";
    let config = Config { routes: routes(written), ..config(upstreams(&engines)) };
    let balancer = Balancer::ready(config).await;
    let body = r#"{"model":"fast","input":"hi","background":true}"#;
    let refused = balancer.ask(post(RESPONSES, body)).await.expect(400);
    assert_eq!(refused.header("x-team"), "blue");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_forwarded_at_once_and_a_disconnect_aborts_the_generation() {
    let timing = Timing { per_step: 0.02, ..Timing::instant() };
    let options = Options { timing, responses: false, ..Options::default() };
    let engine = EngineServer::start(options).await.expect("a free port is there");
    let balancer = Balancer::ready(translating(vec![upstream(&engine.url())])).await;
    let mut client = balancer.client().await;
    let body = r#"{"model":"fast","input":"hi","stream":true,"max_output_tokens":30000}"#;
    client.send(post(RESPONSES, body)).await;
    let mut framing = client.head().await.framing;
    let mut told = String::new();
    while told.matches("output_text.delta").count() < 6 {
        let piece = client.piece(&mut framing).await.expect("it goes on").expect("and has not ended");
        told.push_str(std::str::from_utf8(&piece).expect("is text"));
    }
    // Of 30,000 tokens.
    let stats = engine.stats();
    assert!(stats.running == 1 && stats.generation_tokens < 1000, "{stats:?}");
    drop(client);
    let free = async || (engine.stats().running == 0).then_some(());
    eventually("the engine is free", free).await;
    balancer.until_idle().await;
}

/// The chain is that of the chat which the engine gets: a chat of the same words finds it.
#[tokio::test(flavor = "multi_thread")]
async fn the_index_hashes_the_translated_prompt() {
    let engines = engines(2).await;
    let mut config = Config { expose: true, ..translating(upstreams(&engines)) };
    config.routes.extend(routes("{model: other, to: sim}"));
    let balancer = Balancer::ready(config).await;
    let text = "a long story ".repeat(400);
    let ask = json!({"model": "fast", "instructions": "be brief", "input": text}).to_string();
    let first = balancer.ask(post(RESPONSES, ask)).await.expect(200);
    let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]);
    let again = json!({"model": "other", "messages": messages}).to_string();
    let second = balancer.ask(post(CHAT, again)).await.expect(200);
    let (hit, blocks) = second.header("x-vllm-lb-hit").split_once('/').expect("hits of blocks");
    assert_eq!(hit, blocks);
    assert!(blocks.parse::<usize>().is_ok_and(|blocks| blocks > 3), "{blocks}");
    assert_eq!(first.header("x-vllm-lb-upstream"), second.header("x-vllm-lb-upstream"));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_models_and_other_paths_are_not_translated() {
    let engines = engines(1).await;
    let balancer = Balancer::ready(translating(upstreams(&engines))).await;
    balancer.ask(post(RESPONSES, r#"{"model":"sim","input":"hi"}"#)).await.expect(200);
    let chat = r#"{"model":"fast","messages":[{"role":"user","content":"hi"}]}"#;
    let told = balancer.ask(post(CHAT, chat)).await.expect(200).json();
    assert_eq!((&told["object"], &told["model"]), (&json!("chat.completion"), &json!("fast")));
    let paths: Vec<String> = engines[0].requests().into_iter().map(|one| one.path).collect();
    assert_eq!(paths, [RESPONSES, CHAT]);
}

/// It was parsed into a tree of any size.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_too_many_values_is_refused_with_the_limit_and_blamed_on_no_upstream() {
    let answer = |values: usize| {
        let (start, end) =
            (r#"{"model":"sim","choices":[{"index":0,"message":{"content":"wo"},"x":["#, "0]}]}");
        let body = format!("{start}{}{end}", "0,".repeat(values));
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json";
        format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let ask = post(RESPONSES, r#"{"model":"fast","input":"hi"}"#);
    let raws = [Raw::start(&answer(1_000_000)).await, Raw::start(&answer(1_000_000)).await];
    let mut config = translating(raws.iter().map(Raw::upstream).collect());
    config.breaker.failures = 1;
    let balancer = Balancer::ready(config).await;
    for asked in 1..=3 {
        let refused = balancer.ask(&ask).await.expect(502);
        let error = &refused.json()["error"];
        let told = "The upstream's answer has more than the 1000000 values that can be translated.";
        assert_eq!((&error["message"], &error["code"]), (&json!(told), &json!(502)));
        let heads = raws.iter().flat_map(Raw::heads);
        assert_eq!(heads.filter(|head| head.starts_with("POST ")).count(), asked, "each was tried once");
    }
    balancer.until_idle().await;
    let snapshot = balancer.running.fleet.snapshot();
    assert!(snapshot.entries.iter().all(SnapshotEntry::is_ready), "no upstream is to blame");
    let raw = Raw::start(&answer(900_000)).await;
    let balancer = Balancer::ready(translating(vec![raw.upstream()])).await;
    let told = balancer.ask(&ask).await.expect(200).json();
    assert_eq!(told["output"][0]["content"][0]["text"], "wo");
}
