//! What the balancer answers for all upstreams together, what it lets through, and what only its admin
//! listener has.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::common::body::{chat, stream};
use crate::common::raw::Raw;
use crate::common::wire::{JSON, Wire, get, post, request, upgrade};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, config, engine, engines, paced, serving, upstreams,
};
use serde_json::json;
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::{Config, Passthrough, PassthroughTarget};

const CHAT: &str = "/v1/chat/completions";

fn named(engines: &[EngineServer], names: &[&str]) -> Config {
    let mut config = config(upstreams(engines));
    for (upstream, name) in config.upstreams.iter_mut().zip(names) {
        upstream.name = name.to_string();
    }
    config
}

// === for all together ===

/// Samples of a page by family, after a check that the page is one: each family stands in one place, with
/// one type.
fn samples(page: &str) -> BTreeMap<String, Vec<String>> {
    let mut families: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = String::new();
    for line in page.lines() {
        if let Some(described) = line.strip_prefix("# TYPE ") {
            current = described.split(' ').next().unwrap_or_default().to_string();
            assert!(families.insert(current.clone(), Vec::new()).is_none(), "{current} is described twice");
        } else if !line.starts_with('#') && !line.is_empty() {
            let value = line.rsplit(' ').next().unwrap_or_default();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(
                line.starts_with(&current) && !current.is_empty(),
                "{line} stands in the family {current}"
            );
            families.entry(current.clone()).or_default().push(line.to_string());
        }
    }
    families
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_metrics_are_merged_into_one_page() {
    let engines = engines(2).await;
    let balancer = Balancer::ready(named(&engines, &["gpu-a", "gpu-b"])).await;
    for _ in 0..30 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    let page = balancer.ask(get("/metrics")).await.expect(200);
    assert!(page.header("content-type").starts_with("text/plain; version="), "{:?}", page.headers);
    let families = samples(page.text());
    assert!(families.len() > 20, "{} families", families.len());
    let direct =
        Wire::connect(&crate::common::direct(&engines[0])).await.ask(get("/metrics")).await.expect(200);
    assert_eq!(families.len(), samples(direct.text()).len());
    for samples in families.values() {
        for upstream in ["upstream=\"gpu-a\"", "upstream=\"gpu-b\""] {
            assert!(samples.iter().any(|sample| sample.contains(upstream)), "{upstream} in {samples:?}");
        }
    }
    let finished: f64 = families["vllm:request_success_total"]
        .iter()
        .filter_map(|sample| sample.rsplit(' ').next()?.parse::<f64>().ok())
        .sum();
    assert_eq!(finished, 30.0);
    let below = balancer.ask(get("/metrics/")).await.expect(200);
    assert_eq!(samples(below.text()).len(), families.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_upstream_is_left_out_of_the_merged_metrics() {
    let engines = engines(2).await;
    let mut config = named(&engines, &["gpu-a", "gpu-b"]);
    config.health.fall = u32::MAX;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::CloseAfterAccept).await;
    let page = balancer.ask(get("/metrics")).await.expect(200);
    assert!(!page.text().contains("gpu-a") && page.text().contains("gpu-b"));
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_are_added() {
    let engines = [paced(Duration::from_millis(50)).await, paced(Duration::from_millis(50)).await];
    let balancer = Balancer::over(&engines).await;
    let mut clients = Vec::new();
    for count in 1..=5 {
        let mut client = balancer.client().await;
        client.send(post(CHAT, stream("sim", 30_000))).await;
        client.head().await;
        clients.push(client);
        crate::common::eventually("they run", async || {
            let running: usize = engines.iter().map(|engine| engine.stats().running).sum();
            (running == count).then_some(())
        })
        .await;
    }
    assert!(engines.iter().all(|engine| engine.stats().running > 0), "both have some");
    assert_eq!(balancer.ask(get("/load")).await.expect(200).text(), r#"{"server_load":5}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_version_is_the_oldest() {
    let of = async |version: &str| engine(Options { version: version.into(), ..Options::default() }).await;
    let engines = [of("0.32.0").await, of("0.31.2").await, of("0.100.0").await];
    let balancer = Balancer::over(&engines).await;
    assert_eq!(balancer.ask(get("/version")).await.expect(200).text(), r#"{"version":"0.31.2"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_good_while_one_upstream_is() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.health.fall = 1;
    let balancer = Balancer::ready(config).await;
    let asks = [get("/health"), get("/ping"), post("/ping", "")];
    for (ready, status) in [(2, 200), (1, 200), (0, 503), (2, 200)] {
        for (index, engine) in engines.iter().enumerate() {
            engine.set_health((index >= ready).then_some(503));
        }
        balancer.until_ready(ready).await;
        for ask in &asks {
            let answer = balancer.ask(ask).await.expect(status);
            assert_eq!((&answer.body[..], answer.header("content-length")), (&b""[..], "0"));
        }
    }
}

// === let through ===

fn passthrough(path: &str, to: PassthroughTarget) -> Passthrough {
    Passthrough { path: path.into(), to }
}

async fn developing(count: usize) -> Vec<EngineServer> {
    let mut engines = Vec::new();
    for _ in 0..count {
        engines.push(engine(Options { dev_mode: true, ..Options::default() }).await);
    }
    engines
}

fn paths(engine: &EngineServer) -> Vec<String> {
    engine.requests().into_iter().map(|recorded| format!("{} {}", recorded.method, recorded.path)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn control_paths_are_404_unless_allowed() {
    let engines = developing(2).await;
    let balancer = Balancer::over(&engines).await;
    for path in ["/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/collective_rpc"] {
        for ask in [post(path, ""), get(path), post(&format!("{path}/"), ""), post(&format!("{path}?x"), "")]
        {
            assert_eq!(balancer.ask(ask).await.expect(404).text(), r#"{"detail":"Not Found"}"#, "{path}");
        }
    }
    for path in ["/%70ause", "//pause", "/v1/../pause", "/./pause", "/pause%2f", "/PAUSE"] {
        balancer.ask(post(path, "")).await.expect(404);
    }
    for engine in &engines {
        assert_eq!(paths(engine), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_path_is_sent_to_all_upstreams() {
    let engines = developing(3).await;
    let mut config = config(upstreams(&engines));
    config.passthrough = ["/pause", "/resume", "/is_paused", "/sleep"]
        .map(|path| passthrough(path, PassthroughTarget::All))
        .to_vec();
    let balancer = Balancer::ready(config).await;
    let answer = balancer.ask(post("/pause?mode=keep", r#"{"x":1}"#)).await.expect(200);
    assert_eq!(answer.text(), r#"{"status":"paused"}"#);
    assert_eq!(answer.header("content-type"), "application/json");
    for engine in &engines {
        assert_eq!(paths(engine), ["POST /pause?mode=keep"]);
        assert_eq!(&engine.requests()[0].body[..], br#"{"x":1}"#);
    }
    assert_eq!(balancer.ask(get("/is_paused")).await.expect(200).text(), r#"{"is_paused":true}"#);
    balancer.ask(get("/pause")).await.expect(405);
    balancer.ask(post("/wake_up", "")).await.expect(404);
    balancer.ask(post("/resume", "")).await.expect(200);
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_call_reports_each_refusal() {
    let engines = [developing(1).await.remove(0), engine(Options::default()).await];
    let mut config = config(upstreams(&engines));
    config.passthrough = vec![passthrough("/pause", PassthroughTarget::All)];
    let balancer = Balancer::ready(config).await;
    balancer.ask(post("/pause", "")).await.expect(404);
    assert!(engines.iter().all(|engine| paths(engine) == ["POST /pause"]), "both were asked");
}

/// Regression: the client of a control call got the 101 of an upstream, and no final answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_control_call_answers_with_a_final_status() {
    for (answer, status) in [("101 Switching Protocols", 502), ("204 No Content", 204)] {
        let raw = Raw::start(&format!("HTTP/1.1 {answer}\r\n\r\n")).await;
        let mut config = config(vec![raw.upstream()]);
        config.passthrough = vec![passthrough("/pause", PassthroughTarget::All)];
        let balancer = Balancer::ready(config).await;
        let got = balancer.ask(post("/pause", "")).await.expect(status);
        assert_eq!(got.header("content-length").is_empty(), status == 204);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_path_can_name_one_upstream() {
    let engines = developing(3).await;
    let mut config = named(&engines, &["a", "b", "c"]);
    let to = || PassthroughTarget::Upstream("b".into());
    config.passthrough =
        vec![passthrough("/reset_prefix_cache", to()), passthrough("/own/{rest:path}", to())];
    let balancer = Balancer::ready(config).await;
    let answer = balancer.ask(post("/reset_prefix_cache?reset_external=true", "")).await.expect(200);
    assert_eq!(answer.text(), r#"{"success":true}"#);
    balancer.ask(request("PATCH", "/own/plugin?a=b", &[JSON], b"")).await.expect(404);
    assert_eq!(paths(&engines[1]), ["POST /reset_prefix_cache?reset_external=true", "PATCH /own/plugin?a=b"]);
    assert_eq!((paths(&engines[0]), paths(&engines[2])), (vec![], vec![]));
}

// === the admin listener ===

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_listener_shows_the_state() {
    let engines = [serving(&["one"]).await, serving(&["two"]).await];
    let mut config = named(&engines, &["gpu-a", "gpu-b"]);
    config.health.fall = 1;
    let balancer = Balancer::ready(config).await;
    balancer.ask(post(CHAT, chat("one"))).await.expect(200);
    balancer.ask(post(CHAT, chat("nope"))).await.expect(404);
    // A request is counted when it is over, which its client may know first.
    let page = crate::common::eventually("the request is counted", async || {
        let page = balancer.admin(get("/metrics")).await.expect(200);
        page.text().contains("model=\"one\",outcome=\"ok\"").then_some(page)
    })
    .await;
    let families = samples(page.text());
    assert!(families.keys().all(|name| name.starts_with("vllm_lb_")), "{:?}", families.keys());
    let requests = families["vllm_lb_requests_total"].join("\n");
    assert!(requests.contains("model=\"one\"") && requests.contains("upstream=\"gpu-a\""), "{requests}");
    assert!(!page.text().contains("nope"), "a client's text is no label");
    for (path, status) in [("/live", 200), ("/ready", 200), ("/health", 200)] {
        balancer.admin(get(path)).await.expect(status).json();
    }
    let rows = balancer.admin(get("/admin/upstreams")).await.expect(200).json();
    assert_eq!(rows.as_array().map(Vec::len), Some(2));
    assert_eq!((&rows[0]["name"], &rows[0]["state"]), (&json!("gpu-a"), &json!("ready")));
    assert_eq!((&rows[1]["models"], &rows[1]["active"]), (&json!(["two"]), &json!(0)));

    engines.iter().for_each(|engine| engine.set_health(Some(503)));
    balancer.until_ready(0).await;
    balancer.admin(get("/live")).await.expect(200);
    balancer.admin(get("/ready")).await.expect(503);
    balancer.admin(get("/health")).await.expect(200);
    assert_eq!(balancer.metric("vllm_lb_upstream_ready").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_listener_serves_the_public_paths_too() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    balancer.admin(post(CHAT, chat("sim"))).await.expect(200);
    balancer.admin(get("/v1/models")).await.expect(200);
    balancer.admin(get("/no/such/path")).await.expect(404);
    balancer.admin(get("/admin/nothing")).await.expect(404);
    balancer.admin(post("/live", "")).await.expect(405);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_masked_and_the_token_is_required() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.upstreams[0].api_key = Some(Secret::new("the upstream's secret"));
    config.admin.token = Some(Secret::new("the admin's secret"));
    let balancer = Balancer::ready(config).await;
    let with = |path: &str, token: &str| request("GET", path, &[("authorization", token)], b"");
    for path in ["/admin/config", "/admin/upstreams"] {
        balancer.admin(get(path)).await.expect(401);
        for wrong in [
            "Bearer wrong",
            "the admin's secret",
            "Basic the admin's secret",
            "Bearer ",
            "Bearer the admin's secret ",
        ] {
            let status = balancer.admin(with(path, wrong)).await.status;
            // Spaces at the end of a field are none of its value.
            assert_eq!(status, if wrong.ends_with("secret ") { 200 } else { 401 }, "{wrong:?}");
        }
        let page = balancer.admin(with(path, "Bearer the admin's secret")).await.expect(200);
        assert!(!page.text().contains("secret"), "{}", page.text());
    }
    for open in ["/metrics", "/live", "/ready", "/health"] {
        balancer.admin(get(open)).await.expect(200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_public_listener_has_no_admin_calls() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.admin.token = Some(Secret::new("token"));
    let balancer = Balancer::ready(config).await;
    let token = ("authorization", "Bearer token");
    for path in ["/admin/upstreams", "/admin/config", "/admin/reload", "/admin", "/live", "/ready"] {
        for method in ["GET", "POST", "DELETE"] {
            balancer.ask(request(method, path, &[token], b"")).await.expect(404);
        }
    }
    let page = balancer.ask(get("/metrics")).await.expect(200);
    assert!(!page.text().contains("vllm_lb_"));
    assert_eq!(engine.stats().received, 0);
}

// === a socket ===

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [1, 2, 3, 4];
    let mut frame = vec![0x80 | kind];
    match u8::try_from(payload.len()) {
        Ok(short @ 0..126) => frame.push(0x80 | short),
        _ => {
            frame.push(0x80 | 126);
            frame.extend(u16::try_from(payload.len()).expect("frames here are small").to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
    frame
}

async fn next_frame(client: &mut Wire) -> String {
    let head = client.exactly(2).await;
    let length = match head[1] {
        126 => usize::from(u16::from_be_bytes(client.exactly(2).await[..].try_into().expect("two bytes"))),
        short => usize::from(short),
    };
    String::from_utf8_lossy(&client.exactly(length).await).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_reaches_the_upstream_of_its_model() {
    let engines = [serving(&["one"]).await, serving(&["two"]).await];
    let balancer = Balancer::over(&engines).await;
    for (model, index) in [("one", 0), ("two", 1)] {
        let mut client = balancer.client().await;
        client.send(upgrade(&format!("/v1/realtime?model={model}"))).await;
        let head = client.head().await;
        assert_eq!(head.status, 101);
        assert_eq!(head.headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(head.headers["upgrade"], "websocket");
        assert!(head.headers["connection"].to_str().unwrap().eq_ignore_ascii_case("upgrade"));
        assert!(next_frame(&mut client).await.contains("session.created"));
        let wanted = json!({"type": "session.update", "model": model}).to_string();
        for text in [wanted.as_str(), "echo", &"long ".repeat(2_000)] {
            client.send(frame(1, text.as_bytes())).await;
            assert_eq!(next_frame(&mut client).await, text);
        }
        assert_eq!(balancer.loads()[index].active, 1, "an open socket is one request in flight");
        if index == 0 {
            client.send(frame(8, b"")).await;
            next_frame(&mut client).await;
            assert_eq!(client.rest().await, b""[..]);
        } else {
            drop(client);
        }
        balancer.until_idle().await;
        engines[index].wait_until("the socket is closed", |stats| stats.used == 0).await;
    }
    balancer.ask(upgrade("/v1/realtime?model=nope")).await.expect(404);
    // Of two models, servers take the first or the last.
    balancer.ask(upgrade("/v1/realtime?model=one&mod%65l=two")).await.expect(400);
    balancer.ask(get("/v1/realtime?model=one")).await.expect(404);
}
