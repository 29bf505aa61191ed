//! Messages over engines that have only chats (`messages: chat`), held against an engine that has them.
//!
//! What exactly a request and an answer become is held by `conformance.rs`; here it is held that they become
//! what an engine's own Messages are, and that everything else of a request goes on as for any other.

use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::types::{Config, RouteConfig, UpstreamConfig};

use crate::common::raw::Raw;
use crate::common::wire::{Answer, Wire, get, post};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, config, direct, engine, upstream, upstreams,
};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn routes(written: &str) -> Vec<RouteConfig> {
    let text = format!("upstreams: [http://a]\nroutes: [{written}]");
    check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes
}

fn translating(upstreams: Vec<UpstreamConfig>) -> Config {
    Config { routes: routes("{model: fast, to: sim, messages: chat}"), ..config(upstreams) }
}

/// An engine that has only chats.
async fn only_chats(seed: u64) -> EngineServer {
    engine(Options { seed, messages: false, ..Options::default() }).await
}

fn events(answer: &Answer) -> Vec<Value> {
    let data = answer.text().lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

/// What two engines must say alike: without ids and signatures, and without the names of the cache, which is
/// another engine's, and the model's name.
fn alike(mut value: Value) -> Value {
    const VARY: [&str; 5] =
        ["id", "signature", "model", "cache_creation_input_tokens", "cache_read_input_tokens"];
    match &mut value {
        Value::Array(items) => items.iter_mut().for_each(|item| *item = alike(item.take())),
        Value::Object(fields) => {
            let number = |fields: &serde_json::Map<String, Value>, key: &str| {
                fields.get(key).and_then(Value::as_u64).unwrap_or(0)
            };
            if fields.contains_key("input_tokens") {
                let cached = VARY[3..].iter().map(|key| number(fields, key)).sum::<u64>();
                let all = number(fields, "input_tokens") + cached;
                fields.insert("input_tokens".into(), all.into());
            }
            fields.retain(|key, _| !VARY.contains(&&**key));
            fields.values_mut().for_each(|field| *field = alike(field.take()));
        }
        _ => {}
    }
    value
}

/// Requests of all kinds that a chat can answer.
fn requests() -> Vec<Value> {
    let schema = json!({"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}});
    let tool = json!({"name": "weather", "description": "d", "input_schema": schema});
    let ask = json!([{"role": "user", "content": "hi"}]);
    let text = |text: &str| json!({"type": "text", "text": text});
    let source = json!({"type": "base64", "media_type": "image/png", "data": "QQ=="});
    let image = json!({"type": "image", "source": source});
    let used = json!({"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "x"}});
    let result = |content: Value| json!({"type": "tool_result", "tool_use_id": "t1", "content": content});
    let turns = json!([
        {"role": "user", "content": [text("what now"), image]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            text("I look"), used,
        ]},
        {"role": "user", "content": [result(json!([text("sun"), text("wind"), image])), text("and?")]},
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result(json!("rain"))]},
        {"role": "system", "content": [text("be"), text(" brief")]},
    ]);
    let system = json!([text("x-anthropic-billing-header: 1"), text("be brief"), text(" and kind")]);
    let format = json!({"type": "json_schema", "schema": schema});
    let thinking = json!({"type": "enabled", "budget_tokens": 1024});
    let kwargs = json!({"enable_thinking": true});
    vec![
        json!({"messages": ask, "max_tokens": 5}),
        json!({"messages": ask, "max_tokens": 5, "system": "be brief"}),
        json!({"messages": turns, "max_tokens": 6, "system": system, "tools": [tool]}),
        json!({"messages": ask, "max_tokens": 9, "chat_template_kwargs": kwargs}),
        json!({"messages": ask, "max_tokens": 1050, "thinking": thinking}),
        json!({"messages": ask, "max_tokens": 9, "thinking": {"type": "disabled"}}),
        json!({"messages": ask, "max_tokens": 9, "output_config": {"effort": "low"}}),
        json!({"messages": ask, "max_tokens": 99, "output_config": {"format": format}}),
        json!({"messages": ask, "max_tokens": 99, "stop_sequences": ["a"]}),
        json!({"messages": ask, "max_tokens": 99, "tools": [tool], "tool_choice": {"type": "auto"}}),
        json!({"messages": ask, "max_tokens": 99, "tools": [tool], "tool_choice": {"type": "any"}}),
        json!({
            "messages": ask, "max_tokens": 1050, "tools": [tool],
            "tool_choice": {"type": "tool", "name": "weather"}, "thinking": thinking,
        }),
        json!({"messages": ask, "max_tokens": 3, "tools": [tool], "tool_choice": {"type": "any"}}),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_told_as_the_engines_own_message() {
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
                post(MESSAGES, request.to_string())
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
            assert_eq!(told[0]["message"]["model"], "fast");
            let (told, expected) = (alike(json!(told)), alike(json!(expected)));
            assert_eq!(told, expected, "{request}");
        }
    }
    let asked = engines[0].requests();
    assert_eq!(asked.len(), 2 * requests.len());
    assert!(asked.iter().all(|one| one.path == CHAT));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted_by_the_engines_tokenizer() {
    let native = engine(Options::default()).await;
    let engines = [only_chats(7).await];
    let balancer = Balancer::ready(translating(upstreams(&engines))).await;
    let mut client = Wire::connect(&direct(&native)).await;
    for mut request in requests() {
        request["model"] = json!("sim");
        let expected = client.ask(post(COUNT, request.to_string())).await.expect(200).json();
        request["model"] = json!("fast");
        let counted = balancer.ask(post(COUNT, request.to_string())).await.expect(200).json();
        assert_eq!(counted, expected, "{request}");
    }
    assert!(engines[0].requests().iter().all(|one| one.path == "/tokenize"));
    // An engine without a tokenizer that can be asked says so itself.
    let bare = engine(Options { messages: false, tokenize: false, ..Options::default() }).await;
    let balancer = Balancer::ready(translating(vec![upstream(&bare.url())])).await;
    let body = r#"{"model":"fast","messages":[]}"#;
    let answer = balancer.ask(post(COUNT, body)).await.expect(404);
    assert_eq!(answer.json(), json!({"detail": "Not Found"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_said_is_refused_in_anthropics_form() {
    let engines = [only_chats(1).await];
    let balancer = Balancer::ready(translating(upstreams(&engines))).await;
    let good = json!({"model": "fast", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]});
    for (field, value) in [
        ("tools", json!([{"type": "web_search_20250305", "name": "web_search"}])),
        ("messages", json!([{"role": "user", "content": [{"type": "document"}]}])),
        ("max_tokens", json!(0)),
    ] {
        let mut body = good.clone();
        body[field] = value;
        let mut client = balancer.client().await;
        let refused = client.ask(post(MESSAGES, body.to_string())).await.expect(400).json();
        let kinds = (&refused["type"], &refused["error"]["type"]);
        assert_eq!(kinds, (&json!("error"), &json!("invalid_request_error")));
        assert!(refused["error"]["message"].is_string());
        // The connection goes on.
        client.ask(post(MESSAGES, good.to_string())).await.expect(200);
    }
    assert_eq!(engines[0].requests().len(), 3);
    assert!(balancer.metric(r#"vllm_lb_rejects_total{reason="field"}"#).await >= 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engines_errors_take_anthropics_form_with_the_clients_name() {
    let engines = [engine(Options { max_model_len: 64, messages: false, ..Options::default() }).await];
    let mut config = translating(upstreams(&engines));
    config.routes.extend(routes("{model: long, to: sim, messages: chat, overflow: length}"));
    config.routes.extend(routes("{model: gone, to: gone, messages: chat}"));
    let balancer = Balancer::ready(config).await;
    let ask = |model: &str, stream: bool| {
        let content = "word ".repeat(500);
        let messages = json!([{"role": "user", "content": content}]);
        let body = json!({"model": model, "max_tokens": 4, "messages": messages, "stream": stream});
        post(MESSAGES, body.to_string())
    };
    for stream in [false, true] {
        let error = balancer.ask(ask("fast", stream)).await.expect(400).json();
        assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!("BadRequestError")));
        assert!(error["error"]["message"].as_str().expect("a text").contains("context length"), "{error}");
    }
    let overflow = balancer.ask(ask("long", false)).await.expect(200).json();
    assert_eq!((&overflow["type"], &overflow["stop_reason"]), (&json!("message"), &json!("max_tokens")));
    let overflow = events(&balancer.ask(ask("long", true)).await.expect(200));
    assert_eq!(overflow.last().map(|event| &event["type"]), Some(&json!("message_stop")));
    let odd = r#"{"model":"fast","max_tokens":4,"messages":[],"temperature":"hot"}"#;
    let error = balancer.ask(post(MESSAGES, odd)).await.expect(400).json();
    assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!("Bad Request")));
    // What is no JSON is left to the engine, whose chats refuse it.
    let config = Config { routes: routes("{messages: chat}"), ..translating(upstreams(&engines)) };
    let balancer = Balancer::ready(config).await;
    for body in ["not json", r#"["a"]"#] {
        let error = balancer.ask(post(MESSAGES, body)).await.expect(400).json();
        assert_eq!(error["type"], "error", "{body}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_at_another_engine_before_its_first_event_and_ends_with_an_error_behind_it() {
    let engines = vec![only_chats(1).await, only_chats(2).await];
    let mut config = translating(upstreams(&engines));
    config.upstreams[0].weight = 1000.0;
    config.upstreams[1].weight = 0.001;
    config.health.fall = 1000;
    let balancer = Balancer::ready(config.clone()).await;
    let body = r#"{"model":"fast","max_tokens":9,"messages":[{"role":"user","content":"hi"}],"stream":true}"#;
    let busy = InjectedFault::Status { status: 503, body: "{}".into() };
    for fault in [InjectedFault::ErrorEvent { status: 500 }, busy] {
        engines[0].set_fault_for(1, fault.clone()).await;
        let told = events(&balancer.ask(post(MESSAGES, body)).await.expect(200));
        assert_eq!(told[0]["type"], "message_start", "{fault:?}");
        assert_eq!(told.last().map(|event| &event["type"]), Some(&json!("message_stop")), "{fault:?}");
    }
    config.retry.attempts = 0;
    config.routes.iter_mut().for_each(|route| route.retry.attempts = 0);
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault_for(1, InjectedFault::CutStream { events: 3, reset: true }).await;
    let told = events(&balancer.ask(post(MESSAGES, body)).await.expect(200));
    assert_eq!(told[0]["type"], "message_start");
    let last = told.last().expect("an event");
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
    assert!(told.iter().any(|event| event["type"] == "content_block_delta"), "{told:?}");
}

/// The chain is that of the chat which the engine gets: a chat of the same words finds it.
#[tokio::test(flavor = "multi_thread")]
async fn the_index_knows_a_messages_prompt_as_the_engine_does() {
    let engines = [only_chats(1).await, only_chats(2).await];
    let mut config = Config { expose: true, ..translating(upstreams(&engines)) };
    config.routes.extend(routes("{model: other, to: sim}"));
    let balancer = Balancer::ready(config).await;
    let text = "a long story ".repeat(400);
    let turn = json!({"role": "user", "content": text});
    let ask = json!({"model": "fast", "max_tokens": 4, "system": "be brief", "messages": [turn]}).to_string();
    let first = balancer.ask(post(MESSAGES, ask)).await.expect(200);
    let messages = json!([{"role": "system", "content": "be brief"}, turn]);
    let again = json!({"model": "other", "messages": messages}).to_string();
    let second = balancer.ask(post(CHAT, again)).await.expect(200);
    let (hit, blocks) = second.header("x-vllm-lb-hit").split_once('/').expect("hits of blocks");
    assert_eq!(hit, blocks);
    assert!(blocks.parse::<usize>().is_ok_and(|blocks| blocks > 3), "{blocks}");
    assert_eq!(first.header("x-vllm-lb-upstream"), second.header("x-vllm-lb-upstream"));
}

/// Trainers find the tokens on the last block of the message, and every call of a session in its trace.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_stand_on_the_message_and_in_the_trace_and_are_counted() {
    let engines = [only_chats(1).await];
    let written =
        "{model: fast, to: sim, messages: chat, token_ids: true, body: {overrides: {max_tokens: 3}}}";
    let config = Config { routes: routes(written), ..config(upstreams(&engines)) };
    let balancer = Balancer::ready(config).await;
    let ask = |stream: bool| {
        let messages = json!([{"role": "user", "content": "hi"}]);
        let body = json!({"model": "fast", "max_tokens": 9, "messages": messages, "stream": stream});
        post(&format!("/sessions/s{MESSAGES}"), body.to_string())
    };
    let told = balancer.ask(ask(false)).await.expect(200).json();
    let ids = told["content"][0]["generation_token_ids"].clone();
    assert_eq!(ids.as_array().map(Vec::len), Some(3), "{told}");
    assert_eq!(told["content"][0]["generation_log_probs"].as_array().map(Vec::len), Some(3));
    let prompt = told["content"][0]["prompt_token_ids"].as_array().map(Vec::len).expect("a list");
    assert!(prompt > 0 && told["usage"]["output_tokens"] == 3, "{told}");
    let told = events(&balancer.ask(ask(true)).await.expect(200));
    let delta = told.iter().find(|event| event["type"] == "message_delta").expect("is told");
    assert_eq!(delta["delta"]["generation_token_ids"], ids);
    balancer.until_recorded().await;
    balancer.admin(post("/admin/flush", "")).await.expect(200);
    let found = balancer.admin(get("/sessions/s/traces")).await.expect(200).json();
    let found = found.as_array().expect("a list");
    assert_eq!(found.len(), 2, "{found:?}");
    for trace in found {
        assert_eq!(trace["completion_token_ids"], ids, "{trace}");
        assert_eq!(trace["messages"], json!([{"role": "user", "content": "hi"}]), "{trace}");
    }
    let usage = balancer.admin(get("/admin/usage")).await.expect(200).text().to_owned();
    assert!(usage.contains("\"fast\"") || usage.contains("\"sim\""), "{usage}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_the_token_ids_of_its_route_is_an_anthropic_error() {
    let chat = r#"{"model":"sim","choices":[{"index":0,"message":{"content":"wo"},"finish_reason":"stop"}]}"#;
    let call = r#"{"function":{"name":"f","arguments":"["}}"#;
    let odd =
        format!(r#"{{"choices":[{{"message":{{"tool_calls":[{call}]}},"finish_reason":"tool_calls"}}]}}"#);
    let body = r#"{"model":"fast","max_tokens":9,"messages":[{"role":"user","content":"hi"}]}"#;
    for (answer, route, status, part) in [
        (chat, "{model: fast, to: sim, messages: chat, token_ids: true}", 500, "`return_token_ids: true`"),
        (&odd, "{model: fast, to: sim, messages: chat}", 502, "no JSON object"),
    ] {
        let json = "HTTP/1.1 200 OK\r\ncontent-type: application/json";
        let raw = Raw::start(&format!("{json}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len())).await;
        let mut config = Config { routes: routes(route), ..config(vec![raw.upstream_below("/team")]) };
        config.breaker.failures = 1;
        let balancer = Balancer::ready(config).await;
        let refused = balancer.ask(post("/v1/messages?beta=true", body)).await.expect(status).json();
        assert_eq!((&refused["type"], &refused["error"]["type"]), (&json!("error"), &json!("api_error")));
        assert!(refused["error"]["message"].as_str().expect("a text").contains(part), "{refused}");
        let head = raw.posts().pop().expect("it was asked");
        assert!(head.starts_with("POST /team/v1/chat/completions?beta=true HTTP/1.1\r\n"), "{head}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_and_other_models_are_not_translated_by_it() {
    let engines = [engine(Options::default()).await];
    let balancer = Balancer::ready(translating(upstreams(&engines))).await;
    let turns = r#""max_tokens":4,"messages":[{"role":"user","content":"hi"}]"#;
    balancer.ask(post(MESSAGES, format!(r#"{{"model":"sim",{turns}}}"#))).await.expect(200);
    balancer.ask(post("/v1/responses", r#"{"model":"fast","input":"hi"}"#)).await.expect(200);
    let paths: Vec<String> = engines[0].requests().into_iter().map(|one| one.path).collect();
    assert_eq!(paths, [MESSAGES, "/v1/responses"]);
}
