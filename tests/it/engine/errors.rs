//! Refusals: missing keys, malformed requests, unknown paths and models.

use serde_json::{Value, json};
use vllm_lb::engine::http::{EngineServer, Options};

use crate::client::{Answer, call, connect, instant, paced, post};

const CHAT: &str = "/v1/chat/completions";

async fn send(engine: &EngineServer, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let mut client = connect(engine).await;
    client.send("POST", path, headers, body.as_bytes()).await;
    client.answer().await.unwrap()
}

fn hi() -> Value {
    json!([{"role": "user", "content": "hi"}])
}

#[tokio::test]
async fn schema() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let missing = |field: &str, items: usize| {
        format!(
            "1 validation error:\n  {{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required', \
             'input': '<dict of {items} items>'}}"
        )
    };
    for (path, body, message, param) in [
        (CHAT, json!({"model": "tiny"}), missing("messages", 1), "body.messages"),
        ("/v1/completions", json!({}), missing("prompt", 0), "body.prompt"),
        ("/v1/responses", json!({"model": "tiny"}), missing("input", 1), "body.input"),
        ("/v1/messages", json!({"model": "", "messages": []}), missing("max_tokens", 2), "body.max_tokens"),
        ("/v1/embeddings", json!({"model": "tiny"}), missing("input", 1), "body.input"),
        ("/tokenize", json!({"model": "tiny"}), missing("prompt", 1), "body.prompt"),
        (
            CHAT,
            json!({"messages": hi(), "max_tokens": "x", "stream": "maybe"}),
            "2 validation errors:\n  {'type': 'int_parsing', 'loc': 'body.max_tokens', 'msg': 'Input should \
             be a valid integer, unable to parse string as an integer', 'input': 'x'}\n  \
             {'type': 'bool_parsing', 'loc': 'body.stream', 'msg': 'Input should be a valid boolean, \
             unable to interpret input', 'input': 'maybe'}"
                .to_owned(),
            "body.max_tokens",
        ),
    ] {
        let answer = post(engine.address(), path, &body).await;
        assert_eq!(answer.status, 400, "{path} {body}");
        // Errors of the framework have this shape also on Anthropic's routes.
        let error = json!({"message": message, "type": "Bad Request", "param": param, "code": 400});
        assert_eq!(answer.text(), json!({"error": error}).to_string(), "{path}");
    }
}

#[tokio::test]
async fn rules() {
    let engine = EngineServer::start(instant()).await.unwrap();
    for (extra, message) in [
        (json!({"stream_options": {}}), "Stream options can only be defined when `stream=True`."),
        (json!({"tool_choice": "required"}), "When using `tool_choice`, `tools` must be set."),
        (json!({"temperature": 3}), "temperature must be in [0, 2], got 3.0."),
        (json!({"top_p": 0}), "top_p must be in (0, 1], got 0.0."),
        (json!({"max_tokens": 0}), "max_tokens must be at least 1, got 0."),
        (json!({"n": 0}), "n must be at least 1, got 0."),
    ] {
        let mut body = json!({"messages": hi()});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let answer = post(engine.address(), CHAT, &body).await;
        assert_eq!(answer.status, 400, "{extra}");
        assert!(answer.text().contains(message), "{}", answer.text());
    }
}

#[tokio::test]
async fn content_type() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let body = json!({"messages": hi()}).to_string();
    let answer = send(&engine, CHAT, &[("content-type", "text/plain")], &body).await;
    let message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed";
    let expected = json!({"error": {"message": message, "type": "Bad Request", "param": null, "code": 400}});
    assert_eq!((answer.status, answer.text()), (400, expected.to_string().as_str()));
    let answer = send(&engine, CHAT, &[("content-type", "application/json; charset=utf-8")], &body).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_prompt_that_is_too_long() {
    let engine = EngineServer::start(Options { max_model_len: 64, ..instant() }).await.unwrap();
    let text = "word ".repeat(100);
    let body = json!({"prompt": text, "max_tokens": 14});
    let answer = post(engine.address(), "/v1/completions", &body).await;
    let error = &answer.json()["error"];
    assert_eq!(
        error["message"],
        "This model's maximum context length is 64 tokens. However, your prompt contains at least 51 input \
         tokens, which exceeds this limit even without any output tokens. Please reduce the length of the \
         input prompt. (parameter=input_tokens, value=51)"
    );
    assert_eq!((&error["param"], &error["code"]), (&json!("input_tokens"), &json!(400)));
    let ids: Vec<u32> = (100..200).collect();
    let answer = post(engine.address(), "/v1/completions", &json!({"prompt": ids})).await;
    assert!(answer.text().contains("contains 100 input tokens"), "{}", answer.text());
}

#[tokio::test]
async fn unknown_models() {
    let options = Options { models: vec!["tiny".to_owned(), "alias".to_owned()], ..instant() };
    let engine = EngineServer::start(Options { loras: vec!["poet".to_owned()], ..options }).await.unwrap();
    let at = engine.address();
    let message = "The model `nope` does not exist. Valid aliases: tiny, alias.";
    for (path, body) in [
        (CHAT, json!({"model": "nope", "messages": hi()})),
        ("/v1/completions", json!({"model": "nope", "prompt": "a"})),
        ("/v1/responses", json!({"model": "nope", "input": "a"})),
        ("/v1/embeddings", json!({"model": "nope", "input": "a"})),
    ] {
        let answer = post(at, path, &body).await;
        assert_eq!(answer.status, 404);
        assert_eq!(answer.json()["error"]["message"], message, "{path}");
    }
    let body = json!({"model": "nope", "messages": hi(), "max_tokens": 1});
    let answer = post(at, "/v1/messages", &body).await;
    let expected = json!({"type": "error", "error": {"type": "NotFoundError", "message": message}});
    assert_eq!((answer.status, answer.text()), (404, expected.to_string().as_str()));
    let answer = post(at, "/tokenize", &json!({"model": "nope", "prompt": "a"})).await;
    assert_eq!(answer.json()["error"]["message"], "The model `nope` does not exist.");
}

#[tokio::test]
async fn paths_and_methods() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let at = engine.address();
    for (method, path, status) in [
        ("GET", "/", 404),
        ("HEAD", "/", 404),
        ("HEAD", "/health", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/tiny", 404),
        ("DELETE", "/v1/responses/resp_1", 405),
        ("GET", "/v1/responses/resp_1/input_items", 404),
        ("GET", "/v1/files", 404),
        ("POST", "/sleep", 404),
        ("GET", "/v1/realtime", 404),
        ("GET", "/metrics/", 200),
    ] {
        assert_eq!(call(at, method, path).await.status, status, "{method} {path}");
    }
    let answer = call(at, "POST", "/v1/chat/completions/?a=b").await;
    let location = "http://sim.test/v1/chat/completions?a=b";
    assert_eq!((answer.status, answer.header("location")), (307, Some(location)));
    let answer = call(at, "DELETE", "/ping").await;
    assert_eq!((answer.status, answer.header("allow")), (405, Some("GET")));
}

#[tokio::test]
async fn keys() {
    let engine =
        EngineServer::start(Options { api_key: Some("secret".to_owned()), ..instant() }).await.unwrap();
    let body = json!({"messages": hi()}).to_string();
    for (headers, status) in [
        (vec![], 401),
        (vec![("authorization", "Bearer wrong")], 401),
        (vec![("x-api-key", "secret")], 401),
        (vec![("authorization", "Basic secret")], 401),
        (vec![("authorization", "bearer secret")], 200),
    ] {
        let answer = send(&engine, CHAT, &headers, &body).await;
        assert_eq!(answer.status, status, "{headers:?}");
        if status == 401 {
            assert_eq!(answer.text(), "{\"error\":\"Unauthorized\"}");
        }
    }
    assert_eq!(call(engine.address(), "GET", "/v1/nope").await.status, 401, "before it is looked for");
    assert_eq!(call(engine.address(), "GET", "/metrics").await.status, 200, "only the API is guarded");
}

#[tokio::test]
async fn a_full_queue() {
    let options = Options { max_num_seqs: 1, max_num_queued_reqs: Some(1), ..paced() };
    let engine = EngineServer::start(options).await.unwrap();
    let body = json!({"messages": hi(), "max_tokens": 2_000}).to_string();
    let (mut first, mut second) = (connect(&engine).await, connect(&engine).await);
    first.send("POST", CHAT, &[], body.as_bytes()).await;
    engine.wait_until("one runs", |stats| stats.running == 1).await;
    second.send("POST", CHAT, &[], body.as_bytes()).await;
    engine.wait_until("one waits", |stats| stats.waiting == 1).await;
    let answer = send(&engine, CHAT, &[], &body).await;
    assert_eq!(answer.status, 503);
    let error = &answer.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("Service Unavailable"), &json!(503)));
    assert!(error["message"].as_str().unwrap().starts_with("The engine is currently busy"));
}
