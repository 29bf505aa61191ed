//! The API of rllm-model-gateway on the admin listener: what calls answer, what they refuse, and to whom.

use crate::common::body::chat;
use crate::common::wire::{Answer, JSON, Wire, get, post, request};
use crate::common::{Balancer, Options, admin, config, direct, engine, eventually, upstreams};
use serde_json::{Value, json};
use vllm_lb::config::secret::Secret;

const CHAT: &str = "/v1/chat/completions";

/// Without upstreams: nothing that these calls answer comes from one.
async fn balancer() -> Balancer {
    Balancer::start(config(Vec::new())).await
}

/// One call with a body as it is.
async fn raw(balancer: &Balancer, method: &str, path: &str, body: &[u8]) -> Answer {
    balancer.admin(request(method, path, &[JSON], body)).await
}

/// The status and the error of an answer; every error is a text.
fn error(answer: &Answer) -> (u16, String) {
    let body = answer.json();
    (answer.status, body["error"].as_str().unwrap_or_else(|| panic!("{body} has no error")).to_string())
}

// === sessions ===

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_made_shown_replaced_and_deleted() {
    let balancer = balancer().await;
    let made = admin(&balancer, "POST", "/sessions", Value::Null).await.expect(200).json();
    let id = made["session_id"].as_str().expect("a text");
    assert_eq!((id.len(), id.as_bytes()[14]), (36, b'4'), "{id} is a UUID of version 4");
    assert_eq!(made, json!({"session_id": id, "url": format!("/sessions/{id}/v1")}));

    let id = "harbor/hello-world:0";
    let body =
        json!({"session_id": id, "metadata": {"task": 1, "x": [null]}, "sampling_params": {"top_p": 1}});
    let made = admin(&balancer, "POST", "/sessions", body).await.expect(200).json();
    assert_eq!(made, json!({"session_id": id, "url": "/sessions/harbor/hello-world:0/v1"}));
    let mut shown = Vec::new();
    for path in ["/sessions/harbor/hello-world:0", "/sessions/harbor%2Fhello-world%3A0"] {
        shown.push(admin(&balancer, "GET", path, Value::Null).await.expect(200).json());
    }
    assert_eq!(shown[0], shown[1]);
    let expected = json!({
        "session_id": id,
        "trace_count": 0,
        "created_at": shown[0]["created_at"],
        "metadata": {"task": 1, "x": [null]},
    });
    assert_eq!(shown[0], expected);
    assert!(shown[0]["created_at"].as_f64().expect("a number") > 1e9);
    assert_eq!(admin(&balancer, "GET", "/sessions", Value::Null).await.expect(200).json(), json!([]));

    admin(&balancer, "POST", "/sessions", json!({"session_id": id, "metadata": {"y": 2}})).await.expect(200);
    for nothing in [json!({"session_id": id}), json!({"session_id": id, "metadata": {}})] {
        admin(&balancer, "POST", "/sessions", nothing).await.expect(200);
    }
    let again =
        admin(&balancer, "GET", "/sessions/harbor/hello-world:0", Value::Null).await.expect(200).json();
    assert_eq!(again["metadata"], json!({"y": 2}), "replaced, and kept by calls that say nothing of it");
    assert!(again["created_at"].as_f64() > shown[0]["created_at"].as_f64());

    for path in ["/sessions/harbor/hello-world:0", "/sessions/unknown"] {
        let deleted = admin(&balancer, "DELETE", path, Value::Null).await.expect(200).json();
        assert_eq!(deleted, json!({"deleted": 0}), "{path}");
    }
    let gone = admin(&balancer, "GET", "/sessions/harbor/hello-world:0", Value::Null).await;
    assert_eq!(error(&gone), (404, "Session harbor/hello-world:0 not found".into()));
    let gone = admin(&balancer, "GET", "/sessions/harbor/hello-world:0/traces", Value::Null).await;
    assert_eq!(gone.expect(200).json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_several_sessions_takes_any_list_of_ids() {
    let balancer = balancer().await;
    for id in ["a", "b"] {
        admin(&balancer, "POST", "/sessions", json!({"session_id": id})).await.expect(200);
    }
    for body in
        [json!({"session_ids": ["a", "a", "x/y:1"]}), json!({"session_ids": []}), json!({}), Value::Null]
    {
        let answer = admin(&balancer, "POST", "/sessions/batch_delete", body.clone()).await;
        assert_eq!(answer.expect(200).json(), json!({"deleted": 0}), "{body}");
    }
    admin(&balancer, "GET", "/sessions/a", Value::Null).await.expect(404);
    admin(&balancer, "GET", "/sessions/b", Value::Null).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_bodies_are_rejected_with_a_reason() {
    let balancer = balancer().await;
    // As rllm-model-gateway: what is no JSON stands for no members.
    for body in ["", "{", "not json", "{\"a\": \u{1}}"] {
        raw(&balancer, "POST", "/sessions", body.as_bytes()).await.expect(200);
    }
    raw(&balancer, "POST", "/sessions", b"\xff\xfe").await.expect(200);
    raw(&balancer, "POST", "/sessions", br#"{"session_id": null, "metadata": null, "model": null}"#)
        .await
        .expect(200);
    let long = "x".repeat(1025);
    let large = "x".repeat(64 << 10);
    for (path, body, said) in [
        ("/sessions", json!([]), "the body must be a JSON object"),
        ("/sessions", json!(7), "the body must be a JSON object"),
        ("/sessions", json!({"session_id": 7}), "session_id must be a string"),
        ("/sessions", json!({"session_id": ["a"]}), "session_id must be a string"),
        ("/sessions", json!({"session_id": "a/v1/b"}), "session_id cannot stand in a path"),
        ("/sessions", json!({"session_id": "a/../b"}), "session_id cannot stand in a path"),
        ("/sessions", json!({"session_id": "a\nb"}), "session_id cannot stand in a path"),
        ("/sessions", json!({"session_id": " "}), "session_id cannot stand in a path"),
        ("/sessions", json!({"session_id": long}), "session_id is longer than 1024 bytes"),
        ("/sessions", json!({"metadata": []}), "metadata must be an object"),
        ("/sessions", json!({"metadata": "x"}), "metadata must be an object"),
        ("/sessions", json!({"sampling_params": 1}), "sampling_params must be an object"),
        ("/sessions", json!({"model": 1}), "model must be a string"),
        ("/sessions", json!({"metadata": {"x": large}}), "are longer than 65536 bytes"),
        ("/sessions", json!({"sampling_params": {"x": large}}), "are longer than 65536 bytes"),
        ("/sessions/batch_delete", json!({"session_ids": "a"}), "session_ids must be a list of strings"),
        ("/sessions/batch_delete", json!({"session_ids": [1]}), "session_ids must be a list of strings"),
        ("/sessions/batch_delete", json!([]), "the body must be a JSON object"),
        ("/traces/query", json!({"session_ids": {"a": 1}}), "session_ids must be a list of strings"),
        ("/traces/query", json!({"since": "1"}), "since must be a number"),
        ("/traces/query", json!({"limit": -1}), "limit must be a number"),
        ("/traces/query", json!({"limit": 0.5}), "limit must be a number"),
        ("/admin/weight_version", Value::Null, "weight_version is required"),
        ("/admin/weight_version", json!({"weight_version": null}), "weight_version is required"),
        ("/admin/weight_version", json!({"weight_version": "x"}), "invalid weight_version: 'x'"),
        ("/admin/weight_version", json!({"weight_version": 1.5}), "invalid weight_version: 1.5"),
        ("/admin/weight_version", json!({"weight_version": [1]}), "invalid weight_version: [1]"),
        ("/admin/workers", Value::Null, "url is required"),
        ("/admin/workers", json!({"url": 1}), "url must be a string"),
        ("/admin/workers", json!({"url": "gpu-0:8000"}), "has no scheme"),
        ("/admin/workers", json!({"url": "http://a", "api_path": "/openai"}), "must end with /v1"),
        ("/admin/workers", json!({"url": "http://a", "weight": -1}), "weight"),
    ] {
        let answer = admin(&balancer, "POST", path, body.clone()).await;
        let (status, said_there) = error(&answer);
        assert_eq!(status, 400, "{path} {body}");
        assert!(said_there.contains(said), "{path} {body}: {said_there}");
    }
    let largest = json!({"session_id": "x".repeat(1024), "metadata": {"x": "x".repeat(60_000)}});
    admin(&balancer, "POST", "/sessions", largest).await.expect(200);
    let shown = admin(&balancer, "GET", &format!("/sessions/{}", "x".repeat(1024)), Value::Null).await;
    assert_eq!(shown.expect(200).json()["metadata"]["x"].as_str().map(str::len), Some(60_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_a_query_are_checked() {
    let balancer = balancer().await;
    for path in ["/sessions", "/sessions/a/traces"] {
        for (query, status) in [
            ("", 200),
            ("?since=1.5&limit=10", 200),
            ("?since=-1&limit=0", 200),
            ("?since=99999999999999999999&limit=99999999999999999999999999", 200),
            ("?since=1e300", 200),
            ("?unknown=1", 200),
            ("?since=", 422),
            ("?since=nan", 422),
            ("?since=inf", 422),
            ("?since=yesterday", 422),
            ("?since=%ff", 422),
            ("?limit=-1", 422),
            ("?limit=1.5", 422),
            ("?limit=0x10", 422),
        ] {
            let answer = balancer.admin(get(&format!("{path}{query}"))).await;
            assert_eq!(answer.status, status, "{path}{query}: {}", answer.text());
            match status {
                200 => assert_eq!(answer.json(), json!([])),
                _ => assert!(!error(&answer).1.is_empty()),
            }
        }
    }
    for (format, status, kind) in [
        ("json", 200, "application/json"),
        ("jsonl", 200, "application/x-ndjson"),
        ("csv", 422, "application/json"),
        ("", 422, "application/json"),
    ] {
        let answer = balancer.admin(get(&format!("/sessions/a/traces?format={format}"))).await;
        assert_eq!(
            (answer.status, answer.headers["content-type"].to_str().ok()),
            (status, Some(kind)),
            "{format}"
        );
    }
    let huge = json!({"session_ids": ["a", "b"], "since": -1e300, "limit": 1e300});
    assert_eq!(admin(&balancer, "POST", "/traces/query", huge).await.expect(200).json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_and_odd_paths_are_answered_as_what_they_name() {
    let balancer = balancer().await;
    for (path, status, said) in [
        ("/sessions/x", 404, "Session x not found"),
        ("/sessions/batch_delete", 404, "Session batch_delete not found"),
        ("/sessions/a%22b%0A", 404, "Session a\"b\n not found"),
        ("/sessions/%2e%2e", 404, "Session .. not found"),
        ("/sessions/a%2F..%2Fb", 404, "Session a/../b not found"),
        ("/sessions/%ff", 400, "the id is not percent-encoded UTF-8"),
        ("/sessions/%zz/traces", 400, "the id is not percent-encoded UTF-8"),
        ("/traces/x", 404, "Trace x not found"),
        ("/traces/query", 404, "Trace query not found"),
        ("/traces/%", 400, "the id is not percent-encoded UTF-8"),
    ] {
        let answer = balancer.admin(get(path)).await;
        assert_eq!(error(&answer), (status, said.to_string()), "{path}");
    }
    for path in ["/sessions/", "/traces/", "/traces", "/admin/workers/", "/admin/flush/x", "/admin/nothing"] {
        let answer = balancer.admin(get(path)).await;
        assert_eq!((answer.status, answer.text()), (404, r#"{"detail":"Not Found"}"#), "{path}");
    }
    let missing = admin(&balancer, "DELETE", "/admin/workers/x%2Fy", Value::Null).await;
    assert_eq!(error(&missing), (404, "Worker x/y not found".into()));
    for (method, path, allow) in [
        ("PUT", "/sessions", "GET, POST"),
        ("DELETE", "/sessions", "GET, POST"),
        ("POST", "/sessions/a", "GET, DELETE"),
        ("POST", "/sessions/a/traces", "GET"),
        ("DELETE", "/traces/a", "GET"),
        ("DELETE", "/admin/workers", "GET, POST"),
        ("GET", "/admin/workers/a", "DELETE"),
        ("GET", "/admin/flush", "POST"),
        ("PUT", "/admin/weight_version", "GET, POST"),
        ("POST", "/health/workers", "GET"),
        ("GET", "/admin/reload", "POST"),
    ] {
        let answer = admin(&balancer, method, path, Value::Null).await;
        assert_eq!(
            (answer.status, answer.headers["allow"].to_str().ok()),
            (405, Some(allow)),
            "{method} {path}"
        );
    }
}

// === permission ===

const CALLS: [(&str, &str, &str); 12] = [
    ("GET", "/sessions", ""),
    ("POST", "/sessions", r#"{"session_id":"a"}"#),
    ("GET", "/sessions/a", ""),
    ("GET", "/sessions/a/b:0/traces", ""),
    ("DELETE", "/sessions/b", ""),
    ("POST", "/sessions/batch_delete", "{}"),
    ("GET", "/traces/a", ""),
    ("POST", "/traces/query", "{}"),
    ("GET", "/health/workers", ""),
    ("GET", "/admin/workers", ""),
    ("POST", "/admin/flush", ""),
    ("GET", "/admin/weight_version", ""),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_public_listener_shows_no_session_and_no_trace() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    admin(&balancer, "POST", "/sessions", json!({"session_id": "a", "metadata": {"x": 1}})).await.expect(200);
    for (method, path, body) in CALLS {
        let answer = balancer.ask(request(method, path, &[JSON], body.as_bytes())).await;
        assert_eq!((answer.status, answer.text()), (404, r#"{"detail":"Not Found"}"#), "{method} {path}");
    }
    admin(&balancer, "GET", "/sessions/a", Value::Null).await.expect(200);
    // The API of a session is one of every listener.
    for path in ["/sessions/a/v1/chat/completions", "/sessions/harbor%2Fhello-world%3A0/v1/chat/completions"]
    {
        balancer.ask(post(path, chat("sim"))).await.expect(200);
        balancer.admin(post(path, chat("sim"))).await.expect(200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_protects_sessions_and_traces() {
    let engine = engine(Options::default()).await;
    let mut with_token = config(upstreams([&engine]));
    with_token.admin.token = Some(Secret::new("secret"));
    let balancer = Balancer::ready(with_token).await;
    for (method, path, body) in CALLS {
        let call = async |token: Option<&str>| {
            let token = token.map(|token| ("authorization", token));
            let headers: Vec<_> = [JSON].into_iter().chain(token).collect();
            balancer.admin(request(method, path, &headers, body.as_bytes())).await.status
        };
        for token in [None, Some("Bearer wrong"), Some("Bearer "), Some("secret")] {
            assert_eq!(call(token).await, 401, "{method} {path} {token:?}");
        }
        let status = call(Some("Bearer secret")).await;
        assert!(matches!(status, 200 | 404), "{method} {path}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn web_pages_of_other_sites_reach_no_session_and_no_trace() {
    let balancer = balancer().await;
    for (method, path, body) in CALLS {
        let call = async |headers: &[(&str, &str)]| {
            let mut wire = Wire::connect(&balancer.running.admin).await;
            wire.ask(request(method, path, headers, body.as_bytes())).await.status
        };
        let evil = ("host", "evil.example:9090");
        assert_eq!(call(&[evil, JSON]).await, 421, "{method} {path}");
        if method == "GET" {
            continue;
        }
        let host = ("host", "127.0.0.1:9090");
        assert_eq!(call(&[host, JSON, ("origin", "http://evil.example")]).await, 403, "{method} {path}");
        assert_eq!(call(&[host, JSON, ("sec-fetch-site", "cross-site")]).await, 403, "{method} {path}");
        if !body.is_empty() {
            assert_eq!(call(&[host, ("content-type", "text/plain")]).await, 415, "{method} {path}");
        }
    }
}

// === workers ===

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_added_by_the_url_of_its_api_serves_and_goes() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::start(config(Vec::new())).await;
    let none = json!({"workers": [], "healthy": 0, "total": 0});
    assert_eq!(balancer.admin(get("/health/workers")).await.expect(200).json(), none);
    // As rllm's client does.
    let worker = json!({"url": format!("{}/v1", engine.url()), "api_path": "/v1", "weight": 1});
    let added = admin(&balancer, "POST", "/admin/workers?wait=20s", worker.clone()).await.expect(200).json();
    let id = direct(&engine);
    let expected = json!({"worker_id": id, "url": engine.url(), "api_path": "/v1"});
    assert_eq!(added, expected);
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    for same in [worker, json!({"url": engine.url(), "worker_id": "another"})] {
        let again = admin(&balancer, "POST", "/admin/workers", same).await.expect(200).json();
        assert_eq!(again, expected, "a URL is one worker");
    }
    // The lease of the answered request, and what a scrape counted of it, may end a moment later.
    balancer.until_idle().await;
    let row = json!({
        "worker_id": id, "url": engine.url(), "api_path": "/v1", "model_name": "sim", "weight": 1,
        "healthy": true, "active_requests": 0, "state": "ready",
    });
    let workers = balancer.admin(get("/admin/workers")).await.expect(200).json();
    assert_eq!(workers, json!([row]));
    let health = balancer.admin(get("/health/workers")).await.expect(200).json();
    assert_eq!(health, json!({"workers": workers, "healthy": 1, "total": 1}));
    let other = json!({"url": "http://127.0.0.1:1", "worker_id": id});
    let (status, said) = error(&admin(&balancer, "POST", "/admin/workers", other).await);
    assert_eq!(status, 409, "{said}");

    let path = format!("/admin/workers/{id}");
    assert_eq!(
        admin(&balancer, "DELETE", &path, Value::Null).await.expect(200).json(),
        json!({"removed": id})
    );
    let missing = admin(&balancer, "DELETE", &path, Value::Null).await;
    assert_eq!(error(&missing), (404, format!("Worker {id} not found")));
    assert_eq!(balancer.admin(get("/health/workers")).await.expect(200).json(), none);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_keeps_its_id_its_model_and_its_weight() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::start(config(Vec::new())).await;
    let worker = json!({"url": engine.url(), "worker_id": "7", "model_name": "sim", "weight": 3});
    let added = admin(&balancer, "POST", "/admin/workers", worker).await.expect(200).json();
    assert_eq!(added["worker_id"], "7");
    let row = eventually("the worker is healthy", async || {
        let workers = balancer.admin(get("/admin/workers")).await.expect(200).json();
        (workers[0]["healthy"] == true).then(|| workers[0].clone())
    })
    .await;
    assert_eq!((&row["model_name"], &row["weight"]), (&json!("sim"), &json!(3)));
    let late = json!({"url": "http://127.0.0.1:1", "worker_id": "8"});
    let late = admin(&balancer, "POST", "/admin/workers?wait=10ms", late).await.expect(504).json();
    assert_eq!(late["worker_id"], "8", "{late}");
    let health = balancer.admin(get("/health/workers")).await.expect(200).json();
    assert_eq!((&health["healthy"], &health["total"]), (&json!(1), &json!(2)));
    admin(&balancer, "DELETE", "/admin/workers/7?wait=20s", Value::Null).await.expect(200);
}

// === the rest ===

#[tokio::test(flavor = "multi_thread")]
async fn flush_weight_version_reload_and_health_answer_as_rllms() {
    let balancer = balancer().await;
    let call = async |method: &str, path: &str, body: Value| {
        admin(&balancer, method, path, body).await.expect(200).json()
    };
    assert_eq!(call("POST", "/admin/flush", Value::Null).await, json!({"status": "flushed"}));
    assert_eq!(call("GET", "/health", Value::Null).await, json!({"status": "ok"}));
    let version = |version: Value| json!({"weight_version": version});
    assert_eq!(call("GET", "/admin/weight_version", Value::Null).await, version(Value::Null));
    for given in [json!(3), json!("3"), json!(" 3 ")] {
        assert_eq!(call("POST", "/admin/weight_version", version(given)).await, version(json!(3)));
    }
    assert_eq!(call("GET", "/admin/weight_version", Value::Null).await, version(json!(3)));
    let reloaded = call("POST", "/admin/reload", Value::Null).await;
    assert_eq!((&reloaded["status"], &reloaded["changed"]), (&json!("ok"), &json!([])), "{reloaded}");
}
