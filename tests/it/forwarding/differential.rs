//! A client cannot tell the balancer from the vLLM behind it: each request is sent to an engine directly
//! and through the balancer over two such engines, and the answers are held against each other.

use crate::common::body::{chat, form, normal, normal_refusal, stream};
use crate::common::wire::{Answer, JSON, Wire, request};
use crate::common::{Balancer, EngineServer, Options, direct, engine, h2};
use serde_json::{Value, json};

/// Header fields that belong to a connection, a moment or the answering server.
const OWN: [&str; 7] =
    ["date", "x-request-id", "server", "connection", "keep-alive", "transfer-encoding", "x-should-retry"];

struct Case {
    name: String,
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, &'static str)>,
    body: Vec<u8>,
}

fn case(name: &str, method: &'static str, path: &str, body: impl Into<Vec<u8>>) -> Case {
    let body = body.into();
    let headers = if body.is_empty() && method != "POST" { vec![] } else { vec![JSON] };
    Case { name: name.into(), method, path: path.into(), headers, body }
}

fn post(name: &str, path: &str, body: impl Into<Vec<u8>>) -> Case {
    case(name, "POST", path, body)
}

// === impl Case ===

impl Case {
    fn with(mut self, header: (&'static str, &'static str)) -> Self {
        self.headers.retain(|(name, _)| *name != header.0);
        self.headers.push(header);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        request(self.method, &self.path, &self.headers, &self.body)
    }

    async fn ask(&self, address: &str) -> Answer {
        let mut client = Wire::connect(address).await;
        if self.method == "HEAD" {
            client.ask_head(self.bytes()).await
        } else {
            client.ask(self.bytes()).await
        }
    }
}

/// Status, headers and body, in a form that shows where two answers differ. Ids of responses say where they
/// are kept, for which they are longer than an engine's own: a length is told as of the body without ids.
/// Numbers in refusals are as [`normal_refusal`] has them.
fn told(path: &str, answer: &Answer) -> String {
    let body = normal_refusal(answer.status, path, &answer.body);
    let ids = answer.body.len() as i64 - body.len() as i64;
    let value = |name: &str, value: &[u8]| {
        let text = String::from_utf8_lossy(value).into_owned();
        match text.parse::<i64>() {
            Ok(length) if name == "content-length" => (length - ids).to_string(),
            _ => text,
        }
    };
    let mut headers: Vec<String> = answer
        .headers
        .iter()
        .filter(|(name, _)| !OWN.contains(&name.as_str()))
        .map(|(name, text)| format!("{name}: {}", value(name.as_str(), text.as_bytes())))
        .collect();
    headers.sort();
    format!("{} {}\n{}\n{}", answer.status, answer.whole, headers.join("\n"), body)
}

/// Two of one kind that cache no prompt: answers tell what was cached, which differs from one to the next.
async fn alike() -> [EngineServer; 2] {
    let options = Options { block_size: 4_096, ..Options::default() };
    [engine(options.clone()).await, engine(options).await]
}

/// Asks all cases both ways before it fails.
async fn hold(cases: Vec<Case>, at_least: usize) {
    assert!(cases.len() >= at_least, "only {} cases", cases.len());
    let engines = alike().await;
    let balancer = Balancer::over(&engines).await;
    let mut problems = Vec::new();
    for case in &cases {
        let there = told(&case.path, &case.ask(&direct(&engines[0])).await);
        let here = told(&case.path, &case.ask(balancer.address()).await);
        assert!(case.name != "valid" || there.starts_with("200 true"), "{}: {there}", case.path);
        if here != there {
            let Case { name, method, path, .. } = case;
            problems.push(format!("== {method} {path} ({name})\n-- direct: {there}\n-- balanced: {here}"));
        }
    }
    assert!(problems.is_empty(), "{} of {} differ\n{}", problems.len(), cases.len(), problems.join("\n"));
    balancer.until_idle().await;
}

// === the table ===

/// Routes that take JSON, each with a body that it takes.
fn routes() -> Vec<(&'static str, Value)> {
    let messages = json!([{"role": "user", "content": "hi"}]);
    vec![
        ("/v1/chat/completions", json!({"model": "sim", "messages": messages, "max_tokens": 3})),
        ("/v1/completions", json!({"model": "sim", "prompt": "hi", "max_tokens": 3})),
        ("/v1/responses", json!({"model": "sim", "input": "hi", "max_output_tokens": 3})),
        ("/v1/messages", json!({"model": "sim", "messages": messages, "max_tokens": 3})),
        ("/v1/messages/count_tokens", json!({"model": "sim", "messages": messages})),
        (
            "/inference/v1/generate",
            json!({"model": "sim", "token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 3}}),
        ),
        ("/v1/embeddings", json!({"model": "sim", "input": ["hi", "there"]})),
        ("/pooling", json!({"model": "sim", "input": "hi"})),
        ("/classify", json!({"model": "sim", "input": "hi"})),
        ("/score", json!({"model": "sim", "text_1": "hi", "text_2": ["a", "b"]})),
        ("/v1/score", json!({"model": "sim", "queries": "hi", "documents": ["a", "b"]})),
        ("/rerank", json!({"model": "sim", "query": "hi", "documents": ["a", "b"]})),
        ("/v1/rerank", json!({"model": "sim", "query": "hi", "documents": ["a", "b"]})),
        ("/v2/rerank", json!({"model": "sim", "query": "hi", "documents": ["a", "b"], "top_n": 1})),
        ("/tokenize", json!({"model": "sim", "prompt": "hello there"})),
        ("/detokenize", json!({"model": "sim", "tokens": [1, 2, 3]})),
        ("/invocations", json!({"model": "sim", "messages": messages, "max_tokens": 3})),
    ]
}

/// A valid body with one field changed, or taken out where the value is none.
fn with(body: &Value, field: &str, value: Option<Value>) -> String {
    let mut body = body.clone();
    let fields = body.as_object_mut().expect("bodies are objects");
    match value {
        Some(value) => fields.insert(field.into(), value),
        None => fields.shift_remove(field),
    };
    body.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_good_and_bad_bodies_alike() {
    let mut cases = Vec::new();
    for (path, valid) in routes() {
        let text = valid.to_string();
        cases.push(post("valid", path, text.clone()));
        cases.push(post("spaced", path, serde_json::to_string_pretty(&valid).unwrap()));
        cases.push(post("with a query", &format!("{path}?beta=true&x=%20y"), text.clone()));
        cases.push(post("empty", path, ""));
        for bad in [
            "{",
            "}",
            "not json",
            "[]",
            "null",
            "5",
            "\"text\"",
            "{\"model\":\"sim\"",
            "{\"a\":1,}",
            "\u{feff}{}",
        ] {
            cases.push(post(bad, path, bad));
        }
        cases.push(post("nothing in it", path, "{}"));
        cases.push(post("not UTF-8", path, b"{\"model\":\"\xff\"}".to_vec()));
        cases.push(post("cut", path, &text.as_bytes()[..text.len() - 3]));
        cases.push(post("more behind it", path, format!("{text} x")));
        cases.push(post("unknown model", path, with(&valid, "model", Some(json!("nope")))));
        cases.push(post("no model", path, with(&valid, "model", None)));
        cases.push(post("null model", path, with(&valid, "model", Some(Value::Null))));
        cases.push(post("empty model", path, with(&valid, "model", Some(json!("")))));
        cases.push(post("numeric model", path, with(&valid, "model", Some(json!(5)))));
        cases.push(post("listed model", path, with(&valid, "model", Some(json!(["sim"])))));
        cases.push(post("text as type", path, text.clone()).with(("content-type", "text/plain")));
        cases.push(
            post("parameters on the type", path, text.clone())
                .with(("content-type", "application/json; a=b")),
        );
        for field in valid.as_object().unwrap().keys() {
            cases.push(post(&format!("without {field}"), path, with(&valid, field, None)));
            cases.push(post(&format!("wrong {field}"), path, with(&valid, field, Some(json!({"x": [1]})))));
        }
        for method in ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            cases.push(case("wrong method", method, path, ""));
        }
        cases.push(post("slash", &format!("{path}/"), text.clone()));
        cases.push(post("slash and query", &format!("{path}/?a=b"), text.clone()));
        cases.push(case("slash and wrong method", "GET", &format!("{path}/"), ""));
    }
    hold(cases, 400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_of_a_chat_are_judged_alike() {
    let mut cases = Vec::new();
    let chat_body: Value = serde_json::from_str(&chat("sim")).unwrap();
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]);
    let schema = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}});
    for (field, value) in [
        ("temperature", json!(-5)),
        ("temperature", json!("hot")),
        ("temperature", json!(99)),
        ("top_p", json!(7)),
        ("n", json!(0)),
        ("n", json!(3)),
        ("max_tokens", json!(99_999_999)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("many")),
        ("max_tokens", json!(1.5)),
        ("stream", json!("maybe")),
        ("stream", json!(true)),
        ("stream_options", json!({"include_usage": true})),
        ("messages", json!("text")),
        ("messages", json!([])),
        ("messages", json!([{"role": "user", "content": "word ".repeat(60_000)}])),
        ("messages", json!([{"role": "user", "content": "ünïcödé ☃ \u{1F600}"}])),
        ("messages", json!([{"role": "user", "content": [{"type": "text", "text": "part"}]}])),
        ("logprobs", json!(true)),
        ("tool_choice", json!("auto")),
        ("stop", json!(["a", "e"])),
        ("tools", tools),
        ("response_format", schema),
        ("return_token_ids", json!(true)),
        ("session_id", json!("one")),
        ("unknown_field", json!({"kept": [1, 2.50, 1e3, null]})),
    ] {
        let body = with(&chat_body, field, Some(value));
        cases.push(post(field, "/v1/chat/completions", body.clone()));
        cases.push(post(
            &format!("{field}, as a stream"),
            "/v1/chat/completions",
            body.replacen('{', r#"{"stream":true,"#, 1),
        ));
        cases.push(post(&format!("{field}, anthropic"), "/v1/messages", body.clone()));
        cases.push(post(&format!("{field}, invoked"), "/invocations", body));
    }
    hold(cases, 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_documents_are_read_alike() {
    let mut cases = Vec::new();
    for (name, body) in [
        ("a stream", stream("sim", 12)),
        ("keys twice", chat("nope").replacen("\"messages\"", "\"model\":\"sim\",\"messages\"", 1)),
        (
            "keys twice, the other way",
            chat("sim").replacen("\"messages\"", "\"model\":\"nope\",\"messages\"", 1),
        ),
        ("an escaped name", chat("s\\u0069m").replace("\\\\", "\\")),
        ("an escaped key", chat("sim").replace("\"model\"", "\"m\\u006fdel\"")),
        ("a name with quotes", chat("a\"b\\c")),
        ("a long unknown name", chat(&"n".repeat(3_000))),
        ("a lone surrogate", chat("sim").replace("\"sim\"", "\"\\ud800\"")),
        (
            "deeply nested",
            chat("sim").replacen('{', &format!(r#"{{"x":{}1{},"#, "[".repeat(90), "]".repeat(90)), 1),
        ),
    ] {
        for path in ["/v1/chat/completions", "/v1/messages", "/invocations"] {
            cases.push(post(name, path, body.clone()));
        }
    }
    hold(cases, 27).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_of_each_interface_answer_alike() {
    let mut cases = Vec::new();
    let messages = json!([{"role": "user", "content": "x"}]);
    for (path, extra) in [
        ("/v1/completions", json!({"prompt": ["one", "two"]})),
        ("/v1/completions", json!({"prompt": [1, 2, 3], "echo": true, "logprobs": 2})),
        ("/v1/completions", json!({"prompt": "x", "stream": true, "n": 2})),
        ("/v1/responses", json!({"input": "x", "stream": true})),
        ("/v1/responses", json!({"input": [{"role": "user", "content": "x"}], "instructions": "be brief"})),
        ("/v1/responses", json!({"input": "x", "store": false})),
        ("/v1/responses", json!({"input": "x", "background": true, "store": false})),
        ("/v1/responses", json!({"input": "x", "previous_response_id": "resp_unknown"})),
        ("/v1/messages", json!({"messages": messages})),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 4, "stream": true, "system": "s"})),
        (
            "/inference/v1/generate",
            json!({"token_ids": [1, 2], "sampling_params": {"max_tokens": 4}, "stream": true}),
        ),
        ("/invocations", json!({"prompt": "x", "max_tokens": 3})),
        ("/invocations", json!({"input": "x"})),
        ("/invocations", json!({"query": "x", "documents": ["y"]})),
        ("/invocations", json!({"nothing": "known"})),
        ("/tokenize", json!({"messages": messages})),
        ("/v1/embeddings", json!({"input": "x", "encoding_format": "base64"})),
    ] {
        cases.push(post("a variant", path, with(&extra, "model", Some(json!("sim")))));
        cases.push(post("a variant without a model", path, extra.to_string()));
    }
    hold(cases, 34).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_answer_alike() {
    let kind = ("content-type", "multipart/form-data; boundary=b");
    let mut cases = Vec::new();
    for path in ["/v1/audio/transcriptions", "/v1/audio/translations"] {
        for (name, parts) in [
            ("valid", vec![("model", "sim"), ("file", "RIFF....")]),
            ("model last", vec![("file", "RIFF...."), ("model", "sim")]),
            ("unknown model", vec![("file", "RIFF...."), ("model", "nope")]),
            ("no model", vec![("file", "RIFF....")]),
            ("empty model", vec![("file", "RIFF...."), ("model", "")]),
            ("no file", vec![("model", "sim")]),
            ("nothing", vec![]),
            ("as text", vec![("model", "sim"), ("file", "RIFF...."), ("response_format", "text")]),
            ("as a stream", vec![("model", "sim"), ("file", "RIFF...."), ("stream", "true")]),
        ] {
            cases.push(post(name, path, form("b", &parts)).with(kind));
        }
        cases.push(post("JSON", path, r#"{"model":"sim"}"#));
        cases.push(
            post("no boundary", path, form("b", &[("model", "sim")]))
                .with(("content-type", "multipart/form-data")),
        );
        cases.push(post("another boundary", path, form("c", &[("model", "sim")])).with(kind));
        cases.push(post("cut", path, &form("b", &[("model", "sim"), ("file", "RIFF")])[..60]).with(kind));
        cases.push(case("wrong method", "GET", path, ""));
    }
    hold(cases, 25).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_other_requests_answer_alike() {
    let mut cases = Vec::new();
    for path in ["/v1/models", "/health", "/ping", "/version", "/load"] {
        for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"] {
            cases.push(case("", method, path, ""));
        }
        cases.push(case("slash", "GET", &format!("{path}/"), ""));
        cases.push(case("query", "GET", &format!("{path}?x=y"), ""));
    }
    let unknown = [
        "/",
        "//",
        "/v1",
        "/v1/",
        "/v2/models",
        "/v1/models/sim",
        "/v1/chat",
        "/v1/chat/completion",
        "/v1/chat/completions/x",
        "/V1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/../models",
        "/v1/files",
        "/v1/batches",
        "/v1/images/generations",
        "/favicon.ico",
        "/admin/upstreams",
        "/admin/config",
        "/live",
        "/ready",
        "/v1/realtime",
        "/v1/responses/",
        "/v1/responses/resp_x/input_items",
        "/v1/%2e%2e/models",
        "/v1/mod%65ls%00",
        "/x%zz",
        "/sleep",
        "/wake_up",
        "/pause",
        "/is_sleeping",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/server_info",
        "/v1/load_lora_adapter",
    ];
    for path in unknown {
        for method in ["GET", "POST", "DELETE"] {
            cases.push(case("unknown", method, path, ""));
        }
    }
    // Routes of vLLM that the simulated one does not have.
    let missing = [
        "/v1/chat/completions/batch",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/v1/systemone",
        "/v2/embed",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
        "/cohere/v2/chat/render",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
    ];
    cases.extend(missing.map(|path| post("not there", path, chat("sim"))));
    cases.extend(["/docs", "/redoc", "/openapi.json"].map(|path| case("not there", "GET", path, "")));
    hold(cases, 120).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn api_keys_are_required_alike() {
    let options = Options { api_key: Some("right".into()), ..Options::default() };
    let engines: [EngineServer; 2] = [engine(options.clone()).await, engine(options).await];
    let mut upstreams = crate::common::upstreams(&engines);
    // Without a key of its own, the balancer cannot ask for the names.
    upstreams.iter_mut().for_each(|upstream| upstream.models = Some(crate::common::names(&["sim"])));
    let balancer = Balancer::ready(crate::common::config(upstreams)).await;
    for (path, _) in routes() {
        for key in ["Bearer right", "Bearer wrong", "bearer right", "Basic right", "right", ""] {
            let body = routes().into_iter().find(|(other, _)| *other == path).unwrap().1;
            let case = post(key, path, body.to_string()).with(("authorization", key));
            let there = told(path, &case.ask(&direct(&engines[0])).await);
            assert_eq!(told(path, &case.ask(balancer.address()).await), there, "{path} {key}");
        }
    }
}

/// The same over HTTP/2, where heads have another form.
#[tokio::test(flavor = "multi_thread")]
async fn http2_clients_are_answered_alike() {
    let engines = alike().await;
    let balancer = Balancer::over(&engines).await;
    let mut client = h2::H2::connect(balancer.address()).await;
    for (path, valid) in routes() {
        for body in [valid.to_string(), "{".into(), with(&valid, "model", Some(json!("nope")))] {
            let there = post("", path, body.clone()).ask(&direct(&engines[0])).await;
            let here = client.ask(h2::post(path), &[body.clone().into()]).await;
            assert_eq!(told(path, &here), told(path, &there), "{path} {body}");
        }
    }
}

#[test]
fn a_comparison_ignores_only_varying_fields() {
    let body = br#"{"id": "chatcmpl-1","created":17.5,"x":[{"idx":"id","id":null}],"created_at":""}"#;
    let bare = r#"{"id": "varies","created":0,"x":[{"idx":"id","id":null}],"created_at":"varies"}"#;
    assert_eq!(normal(body), bare);
    let refusal = br#"{"param":"body.57","message":"{'type': 'json_invalid', 'x': '<dict of 12 items>'"}"#;
    let path = "/v1/responses";
    let bare = r#"{"param":"body.0","message":"{'type': 'json_invalid', 'x': '<dict of 0 items>'"}"#;
    assert_eq!(normal_refusal(400, path, refusal), bare);
    assert_eq!(normal_refusal(400, "/v1/completions", refusal), bare.replace("body.0", "body.57"));
    assert_eq!(normal_refusal(200, path, refusal).as_bytes(), refusal);
    let other = r#"{"param":"body.57","message":"{'type': 'missing', 'loc': 'body.input'"}"#;
    assert_eq!(normal_refusal(400, path, other.as_bytes()), other);
}

/// The balancer adds fields to these bodies. What the engine reports of the body that it received is
/// forwarded as it is, and the answer keeps its length.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_that_of_the_body_as_the_engine_received_it() {
    let engines = [engine(Options::default()).await];
    let balancer = Balancer::over(&engines).await;
    for (prefix, path, body) in [
        ("", "/v1/chat/completions", r#"{"model":"sim","stream":true}"#),
        ("", "/v1/completions", r#"{"model":"sim","stream":true}"#),
        ("/sessions/s-1", "/v1/chat/completions", r#"{"model":"sim","stream":true}"#),
        ("/sessions/s-1", "/v1/completions", r#"{"model":"sim"}"#),
        ("", "/v1/responses", r#"{"model":"sim"}"#),
        ("", "/v1/responses", r#"{"model":"sim","input":[{"role":"user",}]}"#),
        ("", "/v1/responses", r#" {"model":"sim","input":"a","tools":[1 2]}"#),
    ] {
        let here = post("", &format!("{prefix}{path}"), body).ask(balancer.address()).await.expect(400);
        let sent = engines[0].requests().pop().expect("the engine received the request").body.to_vec();
        assert!(sent.len() > body.len(), "{path} {body}");
        let there = post("", path, sent).ask(&direct(&engines[0])).await.expect(400);
        assert!(there.text().contains(" items>"), "{}", there.text());
        assert_eq!(here.text(), there.text(), "{path} {body}");
        assert!(here.headers.contains_key("content-length"), "{path} {body}");
        assert_eq!(here.headers["content-length"], there.headers["content-length"], "{path} {body}");
    }
    balancer.until_idle().await;
}
