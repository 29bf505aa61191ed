//! What is shown, and to whom: names of upstreams to clients, texts of clients to operators, and the admin
//! listener to web pages.

use crate::common::body::{chat, stream};
use crate::common::h2::{self, H2};
use crate::common::raw::Raw;
use crate::common::wire::{Answer, Wire, get, post, request, upgrade};
use crate::common::{Balancer, InjectedFault, Options, config, engine, listen, serving, upstreams};
use http::{HeaderMap, HeaderValue};
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::Config;

const CHAT: &str = "/v1/chat/completions";
const ABORT: &str = "/inference/v1/abort_requests";

// === upstreams ===

/// The errors of a balancer whose only upstream fails in every way: before the answer, in it, and in a call.
async fn errors(expose: bool) -> (String, Vec<Answer>) {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.expose = expose;
    config.retry.attempts = 0;
    config.breaker.failures = 1000;
    config.timeouts.first_byte = Some(std::time::Duration::from_secs(1));
    let balancer = Balancer::ready(config).await;
    let mut errors = Vec::new();
    engine.set_fault(InjectedFault::StallHeaders).await;
    errors.push(balancer.ask(post(CHAT, chat("sim"))).await.expect(504));
    engine.set_fault(InjectedFault::CutStream { events: 3, reset: false }).await;
    errors.push(balancer.ask(post(CHAT, stream("sim", 20))).await.expect(200));
    engine.set_fault(InjectedFault::CutHeaders { reset: true }).await;
    errors.push(balancer.ask(post(CHAT, chat("sim"))).await.expect(502));
    errors.push(balancer.ask(post(ABORT, r#"{"request_ids":["a"]}"#)).await.expect(502));
    (engine.address().to_string(), errors)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_names_its_upstream_only_where_that_is_exposed() {
    for expose in [false, true] {
        let (address, errors) = errors(expose).await;
        for error in errors {
            let text = error.text();
            assert!(text.contains("The upstream "), "{text}");
            assert_eq!(text.contains(&address), expose, "{text}");
        }
    }
}

/// Answers of an upstream, of the balancer itself, and refusals name the balancer, and an upstream cannot.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_names_the_balancer_where_that_is_exposed() {
    let fake = "x-vllm-lb-balancer: fake-1\r\nx-vllm-lb-balancer: fake-2\r\n";
    let json = "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    let raw = Raw::start(&format!("HTTP/1.1 200 OK\r\n{fake}{json}")).await;
    let mut config = config(vec![raw.upstream()]);
    let hiding = Balancer::ready(config.clone()).await;
    config.expose = true;
    config.listen.push(listen("127.0.0.1:0"));
    let exposing = [Balancer::ready(config.clone()).await, Balancer::ready(config).await];
    let names = |answer: &Answer| -> Vec<String> {
        let values = answer.headers.get_all("x-vllm-lb-balancer").iter();
        values.map(|value| value.to_str().expect("is a text").to_string()).collect()
    };
    let asked = [
        (post(CHAT, chat("sim")), 200),
        (get("/v1/models"), 200),
        (get("/health"), 200),
        (get("/nowhere"), 404),
    ];
    let mut all = Vec::new();
    for balancer in &exposing {
        let wanted = format!("@{}", balancer.running.addresses.join(","));
        for (request, status) in &asked {
            let found = names(&balancer.ask(request).await.expect(*status));
            assert!(found.len() == 1 && found[0].ends_with(&wanted), "{found:?} {wanted}");
            all.extend(found);
        }
        // The operator has chosen the listener of this balancer.
        assert_eq!(names(&balancer.admin(get("/admin/config")).await.expect(200)), [""; 0]);
    }
    all.dedup();
    assert_eq!(all.len(), 2, "{all:?}");
    for (request, status) in &asked {
        assert_eq!(names(&hiding.ask(request).await.expect(*status)), [""; 0]);
    }
}

/// The header fields by which a balancer names itself and its choice.
fn own_fields(headers: &HeaderMap) -> Vec<(String, String)> {
    let own = headers.iter().filter(|(name, _)| name.as_str().starts_with("x-vllm-lb-"));
    let text = |value: &HeaderValue| value.to_str().expect("is a text").to_string();
    own.map(|(name, value)| (name.to_string(), text(value))).collect()
}

/// An upstream could claim a balancer's choice where the balancer exposed none.
#[tokio::test(flavor = "multi_thread")]
async fn own_fields_of_an_upstream_reach_no_client() {
    let names = ["upstream", "attempts", "reason", "hit", "forecast-ms", "balancer", "other"];
    let fakes: String = names.map(|name| format!("X-vLLM-lb-{name}: fake\r\n")).concat();
    let json = "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    let plain = Raw::start(&format!("HTTP/1.1 200 OK\r\n{fakes}x-vllm: kept\r\n{json}")).await;
    let switch = "connection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let socket =
        Raw::holding(&format!("HTTP/1.1 101 Switching Protocols\r\n{fakes}x-vllm: kept\r\n{switch}")).await;
    for expose in [false, true] {
        let over = async |raw: &Raw| Balancer::ready(Config { expose, ..config(vec![raw.upstream()]) }).await;
        let (balancer, sockets) = (over(&plain).await, over(&socket).await);
        let mut heads = vec![balancer.ask(post(CHAT, chat("sim"))).await.expect(200).headers];
        let mut client = H2::connect(balancer.address()).await;
        heads.push(client.ask(h2::post(CHAT), &[chat("sim").into()]).await.expect(200).headers);
        let mut client = sockets.client().await;
        client.send(upgrade("/v1/realtime?model=sim")).await;
        let head = client.head().await;
        assert_eq!(head.status, 101);
        heads.push(head.headers);
        for headers in heads {
            let own = own_fields(&headers);
            // Each of the balancer's own once, and none of the upstream's.
            assert_eq!(own.len(), if expose { names.len() - 1 } else { 0 }, "{own:?}");
            assert!(!own.iter().any(|(name, value)| name.ends_with("-other") || value == "fake"), "{own:?}");
            assert_eq!(headers["x-vllm"], "kept");
        }
    }
}

// === texts of clients ===

/// They were kept as they came: with names of 2 MiB half a gigabyte.
#[tokio::test(flavor = "multi_thread")]
async fn client_values_are_truncated_where_shown() {
    let engines = [serving(&["one"]).await, serving(&["two"]).await];
    let mut config = config(upstreams(&engines));
    let (long, cut) = ("é".repeat(500), format!("{}…", "é".repeat(62)));
    config.upstreams[0].models = Some(vec![long.clone()]);
    let balancer = Balancer::ready(config).await;
    balancer.ask(post(CHAT, chat(&long))).await;
    let kept = balancer.admin(get("/admin/decisions?limit=1")).await.expect(200).json();
    assert_eq!(kept[0]["model"], cut, "{kept}");
    // vLLM repeats the name, and so does the balancer.
    let unknown = balancer.ask(post(CHAT, chat(&"é".repeat(501)))).await.expect(404);
    assert!(unknown.text().contains(&"é".repeat(501)));
    balancer.ask(post(CHAT, chat(&"é".repeat(1 << 20)))).await.expect(400);
}

// === the admin listener ===

/// One call with this host, and these headers, on a connection of its own.
async fn call(balancer: &Balancer, method: &str, path: &str, headers: &[(&str, &str)]) -> u16 {
    Wire::connect(&balancer.running.admin).await.ask(request(method, path, headers, b"")).await.status
}

/// A site whose name leads here for a moment could read and change everything from a visitor's browser.
#[tokio::test(flavor = "multi_thread")]
async fn dns_rebinding_does_not_reach_the_admin_listener() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let port = balancer.running.admin.rsplit(':').next().expect("a port");
    let evil = format!("evil.example:{port}");
    let origin = format!("http://{evil}");
    let rebound = [("host", evil.as_str()), ("origin", origin.as_str()), ("sec-fetch-site", "same-origin")];
    for path in ["/admin/config", "/admin/decisions", "/admin/usage", "/admin/siblings", "/admin/upstreams"] {
        assert_eq!(call(&balancer, "GET", path, &rebound[..1]).await, 421, "{path}");
        for host in [balancer.running.admin.as_str(), "127.0.0.1", "[::1]", "localhost"] {
            assert_eq!(call(&balancer, "GET", path, &[("host", host)]).await, 200, "{path} {host}");
        }
    }
    let one = format!("/admin/upstreams/{}", engine.address());
    for (method, path) in [("POST", "/admin/reload"), ("DELETE", one.as_str()), ("PATCH", one.as_str())] {
        for headers in [&rebound[..1], &rebound[..2], &rebound] {
            assert_eq!(call(&balancer, method, path, headers).await, 421, "{method} {path} {headers:?}");
        }
        // A proxy in front may give every call the right host.
        let proxied = [("host", "127.0.0.1"), rebound[1], rebound[2]];
        assert_eq!(call(&balancer, method, path, &proxied).await, 403, "{method} {path}");
    }
    let refused = Wire::connect(&balancer.running.admin).await.ask(get("/admin/config")).await.expect(421);
    let error = refused.json()["error"].as_str().expect("a text").to_string();
    assert!(error.contains("admin.token") && error.contains("IP address"), "{error}");
    // No browser leaves the host out.
    let old = Wire::connect(&balancer.running.admin).await.ask("GET /admin/config HTTP/1.0\r\n\r\n").await;
    assert_eq!(old.status, 200);
    // A monitor may use any name for the listener; and so may clients.
    for path in ["/metrics", "/live", "/ready", "/health", "/v1/models"] {
        assert_eq!(call(&balancer, "GET", path, &rebound[..1]).await, 200, "{path}");
    }
    assert_eq!(balancer.running.fleet.snapshot().ready().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_allows_any_host_on_the_admin_listener() {
    let engine = engine(Options::default()).await;
    let mut with_token = config(upstreams([&engine]));
    with_token.admin.token = Some(Secret::new("secret"));
    let balancer = Balancer::ready(with_token).await;
    let host = ("host", "lb.example");
    let token = ("authorization", "Bearer secret");
    assert_eq!(call(&balancer, "GET", "/admin/config", &[host, token]).await, 200);
    assert_eq!(call(&balancer, "GET", "/admin/config", &[host]).await, 401);
}
