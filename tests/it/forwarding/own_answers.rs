//! Requests that the balancer makes to upstreams itself, and calls of its own API: bounded, with the caller's
//! key, and only for authorised callers.

use crate::common::raw::Raw;
use crate::common::wire::{CHUNKED, JSON, Wire, chunk, get, head, post, request, with_host};
use crate::common::{Balancer, Options, config, engine, engines, eventually, logs, upstreams};
use serde_json::json;
use vllm_lb::config::secret::Secret;

const ABORT: &str = "/inference/v1/abort_requests";
const UPSTREAMS: &str = "/admin/upstreams";

/// An address without a listener.
const NOWHERE: &str = "http://127.0.0.1:9";

/// What it takes to abort requests, in so many bytes.
fn abort(bytes: usize) -> String {
    let empty = json!({"request_ids": [""]}).to_string();
    json!({"request_ids": ["a".repeat(bytes - empty.len())]}).to_string()
}

async fn until_told(path: &str, outcome: &str) {
    let (path, outcome) = (format!("path={path} "), format!("outcome={outcome} "));
    eventually(&format!("a call ends: {path}{outcome}"), async || {
        logs::all().iter().any(|line| line.contains(&path) && line.contains(&outcome)).then_some(())
    })
    .await;
}

// === paths that lead elsewhere ===

/// A server behind us that resolves dots would have taken these for `/server_info`, which is denied.
#[tokio::test(flavor = "multi_thread")]
async fn dot_segments_do_not_bypass_the_deny_table() {
    let engine = engine(Options { dev_mode: true, ..Options::default() }).await;
    let balancer = Balancer::over([&engine]).await;
    for path in ["/static/../server_info", "/static/%2e%2e/server_info", "/static/a/%2E./.%2e/server_info"] {
        assert_eq!(balancer.ask(get(path)).await.expect(404).text(), r#"{"detail":"Not Found"}"#, "{path}");
    }
    assert_eq!(engine.stats().received, 0, "none of them was sent on");
}

// === bodies of calls ===

/// They were read up to `peek.max_body`, outside `peek.memory`.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_for_all_upstreams_is_small_and_counted() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.peek.memory = 768 << 10;
    let balancer = Balancer::ready(config).await;
    let large = (2 << 20).to_string();
    balancer.ask(head("POST", ABORT, &[JSON, ("content-length", &large)])).await.expect(413);
    let mut client = balancer.client().await;
    client.send(head("POST", ABORT, &[JSON, CHUNKED])).await;
    let body = abort(512 << 10);
    client.send(chunk(body.as_bytes())).await;
    balancer.until_metric("vllm_lb_peeked_bytes", body.len() as f64).await;
    balancer.ask(post(ABORT, &body)).await.expect(503);
    client.send(chunk(b"")).await;
    // Simulated engines have no such route, and are sent the call all the same.
    client.answer().await.expect(404);
    assert!(engines.iter().all(|engine| engine.requests()[0].body_length == body.len()));
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
}

/// The client of the other framing cannot be believed before it has sent too much.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_for_all_upstreams_that_grows_too_large_is_refused() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let mut client = balancer.client().await;
    client.send(head("POST", ABORT, &[JSON, CHUNKED])).await;
    client.send(chunk(&vec![b' '; 1 << 20])).await;
    client.send(chunk(b" ")).await;
    client.answer().await.expect(413);
    assert_eq!(engine.stats().received, 0);
}

/// The balancer waited up to five minutes without a client.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_to_all_upstreams_ends_when_its_client_disconnects() {
    let begun = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n";
    let raw = Raw::holding(begun).await;
    let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
    let mut client = balancer.client().await;
    client.send(post(ABORT, abort(100))).await;
    eventually("it is asked", async || (!raw.posts().is_empty()).then_some(())).await;
    drop(client);
    until_told(ABORT, "client_gone").await;

    let mut client = Wire::connect(&balancer.running.admin).await;
    let add = post(&format!("{UPSTREAMS}?wait=1h"), json!({"url": NOWHERE}).to_string());
    client.send(with_host(&add, &balancer.running.admin)).await;
    let fleet = &balancer.running.fleet;
    eventually("it is added", async || (fleet.snapshot().entries.len() == 2).then_some(())).await;
    drop(client);
    until_told(UPSTREAMS, "client_gone").await;
    balancer.stop().await;
}

// === authorisation ===

/// The body of a caller without a token was read first: a megabyte, for any length of time.
#[tokio::test(flavor = "multi_thread")]
async fn the_token_is_checked_before_the_body() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.admin.token = Some(Secret::new("secret"));
    let balancer = Balancer::ready(config).await;
    let token = ("authorization", "Bearer secret");
    for framing in [("content-length", "1000"), CHUNKED] {
        balancer.admin(head("POST", UPSTREAMS, &[JSON, framing])).await.expect(401);
        let wrong = ("authorization", "Bearer wrong");
        balancer.admin(head("POST", UPSTREAMS, &[JSON, framing, wrong])).await.expect(401);
    }
    let body = json!({"url": NOWHERE}).to_string();
    let expecting = ("expect", "100-continue");
    balancer.admin(request("POST", UPSTREAMS, &[JSON, token], body.as_bytes())).await.expect(201);
    let again = request("POST", UPSTREAMS, &[JSON, token, expecting], body.as_bytes());
    let mut client = Wire::connect(&balancer.running.admin).await;
    client.send(again).await;
    assert_eq!(client.any_head().await.map(|head| head.status), Some(100));
    client.answer().await.expect(200);
    let one = format!("{UPSTREAMS}/{}", engine.address());
    // A client's own expectation is no question of ours.
    balancer.admin(request("GET", &one, &[token, expecting], b"")).await.expect(200);
}

/// A page of any site, open in an operator's browser, could add upstreams to a listener without a token.
#[tokio::test(flavor = "multi_thread")]
async fn web_pages_cannot_call_the_admin_listener() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let body = json!({"url": NOWHERE, "name": "evil"}).to_string();
    let form = ("content-type", "application/x-www-form-urlencoded");
    let plain = ("content-type", "text/plain");
    for headers in [&[form][..], &[plain], &[]] {
        let refused = balancer.admin(request("POST", UPSTREAMS, headers, body.as_bytes())).await.expect(415);
        assert!(refused.json()["error"].as_str().is_some_and(|error| error.contains("application/json")));
    }
    let one = format!("{UPSTREAMS}/{}", engine.address());
    for from in [("origin", "http://evil.test"), ("origin", "null"), ("sec-fetch-site", "cross-site")] {
        let add = request("POST", UPSTREAMS, &[JSON, from], body.as_bytes());
        balancer.admin(add).await.expect(403).json();
        balancer.admin(request("POST", "/admin/reload", &[from], b"")).await.expect(403);
        balancer.admin(request("DELETE", &one, &[from], b"")).await.expect(403);
        // Its body is not even read.
        balancer.admin(head("PATCH", &one, &[JSON, from, CHUNKED])).await.expect(403);
        balancer.admin(request("GET", &one, &[from], b"")).await.expect(403);
    }
    assert_eq!(balancer.running.fleet.snapshot().entries.len(), 1);
    let own = format!("http://{}", balancer.running.admin);
    let own = ("origin", own.as_str());
    balancer.admin(request("POST", UPSTREAMS, &[JSON, own], body.as_bytes())).await.expect(201);
    balancer.admin(request("DELETE", &format!("{UPSTREAMS}/evil?wait=20s"), &[], b"")).await;
    assert_eq!(balancer.running.fleet.snapshot().entries.len(), 1);
}

// === scrapes ===

/// Each scrape was sent to every upstream, for any number of scrapes.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_scrapes_are_coalesced() {
    let page = "# TYPE a gauge\na 1\n";
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", page.len());
    let slow = Raw::holding(&head).await;
    let quick = Raw::start(&format!("{head}{page}")).await;
    let mut config = config(vec![slow.upstream(), quick.upstream()]);
    // The prober would ask for them too.
    config.health.metrics = false;
    let balancer = Balancer::ready(config).await;
    let scrape = async |number: usize| {
        let path = format!("/metrics/{number}");
        let answer = balancer.ask(get(&path)).await.expect(200);
        assert!(answer.text().contains("\na{"), "{}", answer.text());
    };
    // One upstream keeps all of them waiting, until the time of the scrape is over.
    futures_util::future::join_all((0..20).map(scrape)).await;
    assert_eq!((slow.heads().len(), quick.heads().len()), (1, 1));
    let head = balancer.client().await.ask_head(request("HEAD", "/metrics", &[], b"")).await;
    assert_eq!(head.status, 200);
}

/// A page as large as a question of ours may be answered with was held for each upstream.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_is_too_large_is_left_out() {
    let of = async |size: usize| {
        let page = format!("# TYPE a gauge\na 1\n#{}\n", "x".repeat(size));
        Raw::start(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{page}", page.len())).await
    };
    let raws = [of(5 << 20).await, of(3 << 20).await];
    let mut config = config(raws.iter().map(Raw::upstream).collect());
    for (upstream, name) in config.upstreams.iter_mut().zip(["large", "small"]) {
        upstream.name = name.into();
    }
    let balancer = Balancer::ready(config).await;
    let page = balancer.ask(get("/metrics")).await.expect(200);
    assert!(page.text().contains("\"small\"") && !page.text().contains("\"large\""));
}

// === the caller's key ===

/// With `--api-key` and clients that bring it, as with one vLLM, these calls were refused everywhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_to_all_upstreams_forwards_the_clients_key() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.upstreams[1].api_key = Some(Secret::new("its own"));
    let balancer = Balancer::ready(config).await;
    let key = ("authorization", "Bearer the client's");
    balancer.ask(request("POST", ABORT, &[JSON, key, ("x-other", "a")], abort(50).as_bytes())).await;
    let brought = |index: usize| {
        let recorded = engines[index].requests().remove(0);
        assert_eq!((recorded.header(JSON.0), recorded.header("x-other")), (Some(JSON.1), None));
        recorded.header("authorization").map(str::to_string)
    };
    assert_eq!(brought(0).as_deref(), Some(key.1));
    assert_eq!(brought(1).as_deref(), Some("Bearer its own"), "a key in the configuration goes before");
    balancer.ask(post(ABORT, abort(50))).await;
    assert_eq!(engines[0].requests()[1].header("authorization"), None);
}

/// The search found no stored response, and a conversation went on at an upstream without its beginning.
#[tokio::test(flavor = "multi_thread")]
async fn a_stored_response_is_searched_with_the_clients_key() {
    let options = Options { api_key: Some("the client's".into()), ..Options::default() };
    let engines = [engine(options.clone()).await, engine(options).await];
    let mut config = config(upstreams(&engines));
    config.upstreams.iter_mut().for_each(|upstream| upstream.models = Some(crate::common::names(&["sim"])));
    let balancer = Balancer::ready(config).await;
    let key = ("authorization", "Bearer the client's");
    let body = |id: &str, previous: Option<&str>| {
        let body = json!({"model": "sim", "input": "a", "request_id": id, "previous_response_id": previous});
        request("POST", "/v1/responses", &[JSON, key], body.to_string().as_bytes())
    };
    for (number, engine) in engines.iter().cycle().take(8).enumerate() {
        // Made behind the balancer's back, so that nothing but asking tells where it is.
        let (id, next) = (format!("mine-{number}"), format!("next-{number}"));
        Wire::connect(&crate::common::direct(engine)).await.ask(body(&id, None)).await.expect(200);
        let path = format!("/v1/responses/{id}");
        balancer.ask(request("GET", &path, &[key], b"")).await.expect(200);
        balancer.ask(get(&path)).await.expect(404);
        balancer.ask(body(&next, Some(&id))).await.expect(200);
        // What was made through it is known; without a key its engine says what it says.
        balancer.ask(get(&format!("/v1/responses/{next}"))).await.expect(401);
    }
}
