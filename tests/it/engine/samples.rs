//! Answers held against those of a real vLLM 0.32: headers, keys, their order, nulls, framing.

use serde_json::{Map, Value, json};
use vllm_lb::engine::http::{EngineServer, Options};

use crate::client::{Answer, call, connect, events, instant, post};

/// Strings whose value is part of the shape; others are only strings.
const LITERAL: &[&str] = &[
    "object",
    "type",
    "role",
    "finish_reason",
    "stop_reason",
    "status",
    "owned_by",
    "organization",
    "service_tier",
    "truncation",
    "tool_choice",
    "output_mode",
    "reason",
    "version",
    "model",
];

fn sample(name: &str) -> String {
    let path = format!("{}/tests/data/vllm-0.32/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A value without what differs from request to request.
fn shape(key: &str, value: &Value) -> Value {
    match value {
        Value::Null | Value::Bool(_) => value.clone(),
        Value::Number(number) if number.is_f64() => json!(0.5),
        Value::Number(_) => json!(0),
        Value::String(text) if LITERAL.contains(&key) => json!(text),
        Value::String(_) => json!("text"),
        Value::Array(items) => {
            let mut shapes: Vec<Value> = items.iter().map(|item| shape(key, item)).collect();
            shapes.dedup();
            Value::Array(shapes)
        }
        Value::Object(map) => {
            // Maps from tokens to numbers have no keys of their own.
            let is_table = key == "top_logprobs" && map.values().all(Value::is_number)
                || map.keys().all(|key| key.parse::<u32>().is_ok());
            let mut shapes = Map::new();
            for (key, value) in map {
                let name = if is_table { "token" } else { key };
                shapes.insert(name.to_owned(), shape(key, value));
            }
            Value::Object(shapes)
        }
    }
}

fn shape_of_events(text: &str) -> Vec<(Option<String>, String)> {
    let shapes = events(text).into_iter().map(|(name, data)| (name, shape("", &data).to_string()));
    let mut shapes: Vec<_> = shapes.collect();
    shapes.dedup();
    shapes
}

/// Names of headers in order, but for `vary`, which says that origins are configured.
fn header_names(text: &str) -> Vec<String> {
    let lines = text.lines().skip(1).filter(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.split_once(':')).map(|(name, _)| name.to_owned());
    names.filter(|name| name != "vary").collect()
}

fn check_headers(name: &str, answer: &Answer) {
    let expected = sample(&format!("{name}.headers"));
    let status = expected.split(' ').nth(1).unwrap();
    assert_eq!(answer.status.to_string(), status, "{name}");
    let mut names: Vec<String> = answer.headers.iter().map(|(name, _)| name.clone()).collect();
    let mut expected_names = header_names(&expected);
    if expected_names.last().map(String::as_str) == Some("transfer-encoding") || answer.body.is_empty() {
        // What hyper adds by itself comes last, where it is.
        names.sort();
        expected_names.sort();
    }
    assert_eq!(names, expected_names, "{name}");
    for known in ["server", "content-type", "allow"] {
        let expected = expected.lines().find_map(|line| line.strip_prefix(&format!("{known}: ")));
        assert_eq!(answer.header(known), expected, "{name}");
    }
}

/// Holds an answer against the sample of this name.
fn check(name: &str, answer: &Answer) {
    check_headers(name, answer);
    let expected = sample(&format!("{name}.body"));
    if name.contains("stream") {
        assert_eq!(shape_of_events(answer.text()), shape_of_events(&expected), "{name}");
    } else {
        let expected: Value = serde_json::from_str(&expected).unwrap();
        assert_eq!(shape("", &answer.json()).to_string(), shape("", &expected).to_string(), "{name}");
    }
}

async fn start() -> EngineServer {
    let options = Options { request_id_headers: true, ..instant() };
    EngineServer::start(options).await.unwrap()
}

fn messages() -> Value {
    json!([
        {"role": "system", "content": "you are a part of the cache"},
        {"role": "user", "content": "hello prefix cache of the model"},
    ])
}

#[tokio::test]
async fn chat() {
    let engine = start().await;
    let at = engine.address();
    let body = json!({"model": "tiny", "messages": messages(), "max_tokens": 12, "temperature": 0});
    check("chat", &post(at, "/v1/chat/completions", &body).await);
    let body = json!({
        "model": "tiny", "messages": messages(), "max_tokens": 6, "stream": true,
        "stream_options": {"include_usage": true},
    });
    check("chat_stream", &post(at, "/v1/chat/completions", &body).await);
    let body = json!({
        "model": "tiny", "messages": messages(), "max_tokens": 4, "stream": true, "logprobs": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "return_token_ids": true,
    });
    check("chat_stream_tokids", &post(at, "/v1/chat/completions", &body).await);
    let body = json!({
        "model": "tiny", "messages": messages(), "max_tokens": 4, "logprobs": true, "top_logprobs": 2,
        "prompt_logprobs": 0, "return_token_ids": true,
    });
    let mut client = connect(&engine).await;
    let headers = [("x-request-id", "my-req-1")];
    client.send("POST", "/v1/chat/completions", &headers, body.to_string().as_bytes()).await;
    let answer = client.answer().await.unwrap();
    check("chat_tokids_logprobs", &answer);
    assert_eq!(answer.json()["id"], "chatcmpl-my-req-1");
    assert_eq!(answer.header("x-request-id"), Some("my-req-1"));
}

#[tokio::test]
async fn completions() {
    let engine = start().await;
    let at = engine.address();
    let body = json!({
        "model": "tiny", "prompt": "the of and to in", "max_tokens": 6, "logprobs": 1,
        "return_token_ids": true,
    });
    check("compl", &post(at, "/v1/completions", &body).await);
    let body = json!({"model": "tiny", "prompt": [1, 2, 3, 4], "max_tokens": 4});
    check("compl_ids", &post(at, "/v1/completions", &body).await);
    let body = json!({
        "model": "tiny", "prompt": "the of and to in", "max_tokens": 4, "stream": true,
        "stream_options": {"include_usage": true},
    });
    check("compl_stream", &post(at, "/v1/completions", &body).await);
}

#[tokio::test]
async fn responses() {
    let engine = start().await;
    let body = json!({"model": "tiny", "input": "hello there", "max_output_tokens": 16, "temperature": 0.0});
    check("responses", &post(engine.address(), "/v1/responses", &body).await);
    let body = json!({
        "model": "tiny", "input": "hello there", "max_output_tokens": 16, "temperature": 0.0, "stream": true,
    });
    let answer = post(engine.address(), "/v1/responses", &body).await;
    check("responses_stream", &answer);
    let numbers: Vec<Value> =
        answer.events().iter().map(|(_, data)| data["sequence_number"].clone()).collect();
    assert_eq!(numbers, (0..numbers.len()).map(|number| json!(number)).collect::<Vec<_>>());
}

#[tokio::test]
async fn anthropic_messages() {
    let engine = start().await;
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6});
    check("messages", &post(engine.address(), "/v1/messages?beta=true", &body).await);
    check("count_tokens", &post(engine.address(), "/v1/messages/count_tokens", &body).await);
    let mut streamed = body;
    streamed["stream"] = json!(true);
    check("messages_stream", &post(engine.address(), "/v1/messages", &streamed).await);
}

#[tokio::test]
async fn tokens() {
    let engine = start().await;
    let at = engine.address();
    let body = json!({"model": "tiny", "prompt": "the of and to in", "return_token_strs": true});
    let answer = post(at, "/tokenize", &body).await;
    check("tokenize", &answer);
    let expected: Value = serde_json::from_str(&sample("tokenize.body")).unwrap();
    assert_eq!(answer.json()["token_strs"], expected["token_strs"], "a toy, but it cuts words the same way");
    let body = json!({"model": "tiny", "tokens": answer.json()["tokens"]});
    let back = post(at, "/detokenize", &body).await;
    check("detokenize", &back);
    assert_eq!(back.json()["prompt"], "the of and to in");
    check("tokenize_chat", &post(at, "/tokenize", &json!({"model": "tiny", "messages": messages()})).await);
    let body = json!({"model": "tiny", "token_ids": [1, 2, 3, 4], "sampling_params": {"max_tokens": 4}});
    check("inference_generate", &post(at, "/inference/v1/generate", &body).await);
}

#[tokio::test]
async fn small_gets() {
    let engine = start().await;
    let at = engine.address();
    for (name, path) in [("models", "/v1/models"), ("version", "/version"), ("load", "/load")] {
        check(name, &call(at, "GET", path).await);
    }
    for (name, path) in [("health", "/health"), ("ping", "/ping")] {
        let answer = call(at, "GET", path).await;
        check_headers(name, &answer);
        assert!(answer.body.is_empty());
    }
    assert_eq!(call(at, "POST", "/ping").await.status, 200);
}

#[tokio::test]
async fn errors_are_the_same_bytes() {
    let engine = start().await;
    let at = engine.address();
    let messages = json!([{"role": "user", "content": "hi"}]);
    let chat = |extra: Value| {
        let mut body = json!({"model": "tiny", "messages": messages});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let path = "/v1/chat/completions";
    let mut client = connect(&engine).await;
    client.send("POST", path, &[], b"{\"model\":").await;
    let cases = [
        ("err_404", call(at, "GET", "/v1/nope").await),
        ("err_405", call(at, "GET", path).await),
        ("err_json", client.answer().await.unwrap()),
        ("err_model", post(at, path, &chat(json!({"model": "nope"}))).await),
        ("err_field", post(at, path, &chat(json!({"temperature": -5}))).await),
        ("err_long", post(at, path, &chat(json!({"max_tokens": 99_999}))).await),
    ];
    for (name, answer) in cases {
        check_headers(name, &answer);
        assert_eq!(answer.text(), sample(&format!("{name}.body")).trim_end(), "{name}");
    }
}

/// Every line of the metrics but its value, without labels whose values are the server's own.
fn metric_lines(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.starts_with("# HELP"));
    let lines = lines.map(|line| match line.rsplit_once(' ') {
        Some((head, _)) if !line.starts_with('#') => head.to_owned(),
        _ => line.to_owned(),
    });
    lines.collect()
}

#[tokio::test]
async fn metrics() {
    let engine = start().await;
    let body = json!({"model": "tiny", "messages": messages(), "max_tokens": 3});
    post(engine.address(), "/v1/chat/completions", &body).await;
    let answer = call(engine.address(), "GET", "/metrics").await;
    check_headers("metrics", &answer);
    let expected = metric_lines(&sample("metrics.body"));
    let own = metric_lines(answer.text());
    assert!(own.len() > 200, "{} lines", own.len());
    for line in &own {
        let is_config = line.starts_with("vllm:cache_config_info{");
        // Buckets for tokens grow with the longest context.
        let is_large = line.contains("_tokens_bucket{") && line.contains("000.0\"");
        assert!(is_config || is_large || expected.contains(line), "real servers have no {line}");
    }
    for line in [
        "vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 0.0",
        "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"tiny\"} 1.0",
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 3.0",
        "vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"tiny\"} 1.0",
        "http_requests_total{handler=\"/v1/chat/completions\",method=\"POST\",status=\"2xx\"} 1.0",
    ] {
        assert!(answer.text().lines().any(|known| known == line), "{line}");
    }
    assert!(
        answer.text().contains("num_gpu_blocks=\"16384\"") && answer.text().contains("block_size=\"16\"")
    );
    assert!(answer.text().contains("kv_cache_size_tokens=\"262144\""));
}
