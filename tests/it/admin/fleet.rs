//! The fleet under load: it is changed while it serves, its engines fail in their ways, and clients notice
//! nothing that could be spared them.

use std::time::Duration;

use crate::common::body::{chat, stream};
use crate::common::clients::{Clients, none};
use crate::common::ports::reserved_address;
use crate::common::wire::{self, get, post};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, admin, config, direct as name, engine, engines,
    eventually, paced, serving, upstreams,
};
use serde_json::{Value, json};
use vllm_lb::config::types::Breaker;

const CHAT: &str = "/v1/chat/completions";

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

fn path(engine: &EngineServer) -> String {
    format!("/admin/upstreams/{}", name(engine))
}

async fn state(balancer: &Balancer, engine: &EngineServer) -> String {
    let row = admin(balancer, "GET", &path(engine), Value::Null).await.expect(200).json();
    row["state"].as_str().expect("a state is text").to_string()
}

async fn until_state(balancer: &Balancer, engine: &EngineServer, wanted: &[&str]) {
    eventually(&format!("it is one of {wanted:?}"), async || {
        wanted.contains(&state(balancer, engine).await.as_str()).then_some(())
    })
    .await;
}

fn served(engine: &EngineServer) -> usize {
    engine.requests().len()
}

// === changes at run time ===

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_upstream_finishes_its_requests_and_receives_none_until_undrained() {
    let engines = [paced(ENDLESS).await, engine(Options::default()).await];
    let mut config = config(upstreams(&engines));
    config.upstreams[1].weight = 0.001;
    let balancer = Balancer::ready(config).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 30))).await;
    engines[0].wait_until("it runs", |stats| stats.running == 1).await;

    let drained = admin(&balancer, "PATCH", &path(&engines[0]), json!({"state": "drain"})).await;
    assert_eq!(drained.expect(200).json()["state"], "draining");
    let load = Clients::start(&balancer, 4);
    load.until_more(50).await;
    assert_eq!(load.end().await, none());
    assert_eq!(served(&engines[0]), 1, "what is in flight, and no more");
    assert_eq!(state(&balancer, &engines[0]).await, "draining", "probes do not end an operator's word");
    let whole = client.answer().await.expect(200);
    assert!(whole.text().trim_end().ends_with("data: [DONE]"), "{}", whole.text());

    let back = admin(&balancer, "PATCH", &path(&engines[0]), json!({"drain": false, "weight": 500})).await;
    let back = back.expect(200).json();
    assert_eq!((back["state"].as_str(), back["weight"].as_f64()), (Some("ready"), Some(500.0)));
    balancer.ask(post(CHAT, stream("sim", 1))).await.expect(200);
    assert_eq!(served(&engines[0]), 2);
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_is_added_and_the_call_answers_when_it_is_routable() {
    let engines = engines(2).await;
    let balancer = Balancer::over([&engines[0]]).await;
    let added = json!({"url": engines[1].url(), "name": "second", "weight": 1000, "max_active": 9});
    let answer = admin(&balancer, "POST", "/admin/upstreams?wait=20s", added.clone()).await.expect(201);
    assert_eq!(answer.json()["state"], "ready");
    assert_eq!(answer.json()["models"], json!(["sim"]));
    let load = Clients::start(&balancer, 4);
    load.until_more(40).await;
    assert_eq!(load.end().await, none());
    assert!(served(&engines[1]) > 0, "it gets requests");

    let again = admin(&balancer, "POST", "/admin/upstreams?wait=20s", added).await;
    assert_eq!(again.expect(200).json()["name"], "second");
    let other = json!({"url": engines[1].url(), "name": "second"});
    admin(&balancer, "POST", "/admin/upstreams", other).await.expect(409);
    let list = admin(&balancer, "GET", "/admin/upstreams", Value::Null).await.expect(200).json();
    assert_eq!(list.as_array().map(Vec::len), Some(2));

    let dead = json!({"url": format!("http://{}", reserved_address()), "name": "[a]/b"});
    let late = admin(&balancer, "POST", "/admin/upstreams?wait=50ms", dead).await.expect(504).json();
    assert_eq!(late["upstream"]["state"], "unknown", "{late}");
    admin(&balancer, "GET", "/admin/upstreams/%5Ba%5D%2Fb", Value::Null).await.expect(200);
    admin(&balancer, "DELETE", "/admin/upstreams/[a]/b?wait=20s", Value::Null).await.expect(200);
    admin(&balancer, "GET", "/admin/upstreams/%5Ba%5D%2Fb", Value::Null).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_admin_call_is_explained_and_changes_nothing() {
    let engines = engines(1).await;
    let balancer = Balancer::over(&engines).await;
    let one = path(&engines[0]);
    let table = [
        ("POST", "/admin/upstreams", json!({"url": "gpu-0"}), 400, "problems"),
        ("POST", "/admin/upstreams", json!({"url": "http://a", "wieght": 2}), 400, "wieght"),
        ("POST", "/admin/upstreams", json!([]), 400, "must be an object"),
        ("POST", "/admin/upstreams?wait=soon", json!({"url": "http://a"}), 400, "wait"),
        ("POST", "/admin/upstreams?wiat=30s", json!({"url": "http://a"}), 400, "known are wait"),
        ("DELETE", "/admin/upstreams/nobody?forse", Value::Null, 400, "known are wait, force"),
        ("PUT", "/admin/upstreams", json!({}), 405, "Method"),
        ("PATCH", &one, json!({}), 400, "nothing to change"),
        ("PATCH", &one, json!({"state": "down"}), 400, "neither drain nor ready"),
        ("PATCH", &one, json!({"drain": "yes"}), 400, "neither true nor false"),
        ("PATCH", &one, json!({"weight": 0}), 400, "out of range"),
        ("PATCH", &one, json!({"url": "http://b"}), 400, "cannot be changed"),
        ("PATCH", "/admin/upstreams/nobody", json!({"drain": true}), 404, "nobody"),
        ("DELETE", "/admin/upstreams/nobody", Value::Null, 404, "nobody"),
        ("GET", "/admin/upstreams/%zz", Value::Null, 400, "percent"),
        ("POST", &one, json!({}), 405, "Method"),
        ("GET", "/admin/upstreamsx", Value::Null, 404, "Not Found"),
        ("GET", "/admin/reload", Value::Null, 405, "Method"),
    ];
    let before = admin(&balancer, "GET", "/admin/upstreams", Value::Null).await.expect(200).json();
    for (method, path, body, status, wanted) in table {
        let answer = admin(&balancer, method, path, body).await;
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
        assert!(answer.text().contains(wanted), "{method} {path}: {}", answer.text());
    }
    let after = admin(&balancer, "GET", "/admin/upstreams", Value::Null).await.expect(200).json();
    assert_eq!(after[0]["weight"], before[0]["weight"]);
    assert_eq!((after.as_array().map(Vec::len), &after[0]["state"]), (Some(1), &json!("ready")));
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_list_every_candidate() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.upstreams[0].weight = 1000.0;
    config.upstreams[1].weight = 0.001;
    config.index.block_bytes = 64;
    config.expose = true;
    let balancer = Balancer::ready(config).await;
    let ask = |id| wire::request("POST", CHAT, &[wire::JSON, ("x-request-id", id)], chat("sim").as_bytes());
    let long = json!({"model": "sim", "prompt": "x".repeat(640), "max_tokens": 1}).to_string();
    for hit in ["0/10", "10/10"] {
        let answer = balancer.ask(post("/v1/completions", &long)).await.expect(200);
        assert_eq!(answer.header("x-vllm-lb-hit"), hit);
    }
    let answer = balancer.ask(ask("first")).await.expect(200);
    assert_eq!(answer.header("x-vllm-lb-reason"), "load");
    engines[0].set_fault(InjectedFault::Status { status: 502, body: "{}".into() }).await;
    let answer = balancer.ask(ask("second")).await.expect(200);
    assert_eq!((answer.header("x-vllm-lb-attempts"), answer.header("x-vllm-lb-reason")), ("2", "retry"));

    let decisions = async |query: &str| {
        let path = format!("/admin/decisions{query}");
        admin(&balancer, "GET", &path, Value::Null).await
    };
    let told = decisions("").await.expect(200).json();
    let rows = told.as_array().expect("it is a list");
    assert_eq!(rows.len(), 5);
    let held = [&rows[3], &rows[4]].map(|row| [&row["blocks"], &row["candidates"][0]["hit"]]);
    assert_eq!(held, [[&json!(10), &json!(10)], [&json!(10), &json!(0)]]);
    let rows = &rows[..3];
    let outline: Vec<_> = rows
        .iter()
        .map(|row| (row["id"].as_str(), row["attempt"].as_u64(), row["reason"].as_str()))
        .map(|(id, attempt, reason)| format!("{id:?} {attempt:?} {reason:?}").replace("Some", ""))
        .collect();
    let expected =
        ["(\"second\") (2) (\"retry\")", "(\"second\") (1) (\"load\")", "(\"first\") (1) (\"load\")"];
    assert_eq!(outline, expected);
    assert_eq!(
        [&rows[0], &rows[2]].map(|row| row["upstream"].as_str()),
        [Some(name(&engines[1]).as_str()), Some(name(&engines[0]).as_str())]
    );
    let first = &rows[2];
    assert_eq!((&first["model"], &first["of"], &first["session"]), (&json!("sim"), &json!(2), &Value::Null));
    let candidates = first["candidates"].as_array().expect("it is a list");
    let names: Vec<_> = candidates.iter().filter_map(|candidate| candidate["upstream"].as_str()).collect();
    assert_eq!(names, engines.iter().map(name).collect::<Vec<_>>());
    assert!(candidates[0]["cost"].as_f64() < candidates[1]["cost"].as_f64(), "{first}");
    assert_eq!(candidates[0]["uncached"], first["prompt_tokens"]);
    assert_eq!(decisions("?limit=1").await.expect(200).json(), json!([rows[0]]));
    for limit in ["0", "257", "-1", "x", ""] {
        let answer = decisions(&format!("?limit={limit}")).await.expect(400);
        assert!(answer.text().contains("limit: "), "{}", answer.text());
    }
    admin(&balancer, "POST", "/admin/decisions", json!({})).await.expect(405);
    let record = crate::common::logs::all().into_iter().find(|line| line.contains("upstream chosen"));
    let record = record.expect("choices are logged");
    for name in names {
        assert!(record.contains(&format!("{name} cost ")), "{record}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_upstream_goes_when_its_last_request_has_ended() {
    let engines = [paced(ENDLESS).await, engine(Options::default()).await];
    let mut config = config(upstreams(&engines));
    config.upstreams[1].weight = 0.001;
    let balancer = Balancer::ready(config).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 80))).await;
    engines[0].wait_until("it runs", |stats| stats.running == 1).await;

    let one = path(&engines[0]);
    let early = admin(&balancer, "DELETE", &one, Value::Null).await.expect(202).json();
    assert_eq!(early["active"], 1);
    let row = admin(&balancer, "GET", &one, Value::Null).await.expect(200).json();
    assert_eq!((&row["state"], &row["removing"]), (&json!("draining"), &json!(true)));
    let row = admin(&balancer, "PATCH", &one, json!({"weight": 3, "state": "ready"})).await.expect(200);
    assert_eq!(row.json()["removing"], true, "only who adds it again keeps it");
    admin(&balancer, "DELETE", &format!("{one}?wait=1ms"), Value::Null).await.expect(504);
    for _ in 0..10 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!((served(&engines[0]), served(&engines[1])), (1, 10));
    let patient = format!("{one}?wait=20s");
    let gone = admin(&balancer, "DELETE", &patient, Value::Null);
    let (gone, whole) = tokio::join!(gone, client.answer());
    assert_eq!(gone.expect(200).json()["removed"], true);
    assert!(whole.expect(200).text().contains("[DONE]"));
    admin(&balancer, "GET", &one, Value::Null).await.expect(404);
    assert_eq!(balancer.loads().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_removal_is_immediate_and_requests_in_flight_finish() {
    let engines = [paced(ENDLESS).await];
    let balancer = Balancer::over(&engines).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 10))).await;
    engines[0].wait_until("it runs", |stats| stats.running == 1).await;
    let gone = admin(&balancer, "DELETE", &format!("{}?force", path(&engines[0])), Value::Null).await;
    assert_eq!(gone.expect(200).json()["removed"], true);
    balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    assert!(client.answer().await.expect(200).text().contains("[DONE]"));
}

/// First taken out, then stopped, as a rolling restart does it. What SIGTERM leaves behind is an open
/// connection on which nothing ever comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_a_removed_upstreams_engine_stops() {
    let drain = json!({"state": "drain"});
    let table = [("PATCH", "", drain), ("DELETE", "", Value::Null), ("DELETE", "?force", Value::Null)];
    // Each waits for the failed probes of its own engine.
    let cases = table.map(async |(method, query, body)| {
        let engines = engines(2).await;
        let mut config = config(upstreams(&engines));
        config.upstreams[0].weight = 1000.0;
        config.upstreams[1].weight = 0.001;
        let balancer = Balancer::ready(config).await;
        engines[0].set_fault(InjectedFault::StallStream { events: 5 }).await;
        let mut client = balancer.client().await;
        client.send(post(CHAT, stream("sim", 50))).await;
        let head = client.head().await;
        let address = format!("{}{query}", path(&engines[0]));
        let answer = admin(&balancer, method, &address, body).await;
        assert!(matches!(answer.status, 200 | 202), "{method} {query}: {answer:?}");
        engines[0].set_fault(InjectedFault::Silent).await;
        let answer = client.body(head).await.expect(200);
        assert!(answer.text().contains(r#"{"error":"#), "{method} {query}: {answer:?}");
        balancer.until_idle().await;
    });
    futures_util::future::join_all(cases).await;
}

// === how engines fail ===

#[tokio::test(flavor = "multi_thread")]
async fn client_errors_do_not_affect_upstream_state() {
    let engines = [serving(&["a"]).await, serving(&["b"]).await];
    let balancer = Balancer::over(&engines).await;
    let changes = balancer.metric("vllm_lb_upstream_changes_total").await;
    for _ in 0..20 {
        balancer.ask(post(CHAT, chat("nobody"))).await.expect(404);
        balancer.ask(post(CHAT, r#"{"model":"a"}"#)).await.expect(400);
    }
    // Also when it is the engine that does not know the model.
    let direct = Balancer::over([&engines[0]]).await;
    for _ in 0..20 {
        direct.ask(post(CHAT, chat("nobody"))).await.expect(404);
    }
    assert_eq!(state(&direct, &engines[0]).await, "ready");
    assert_eq!(balancer.metric("vllm_lb_upstream_changes_total").await, changes);
    for engine in &engines {
        assert_eq!(state(&balancer, engine).await, "ready");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_engines_are_skipped_briefly_and_stay_up() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.queue.size = 0;
    let balancer = Balancer::ready(config).await;
    let body = json!({"error": {"message": "busy", "type": "Service Unavailable", "code": 503}}).to_string();
    for engine in &engines {
        engine.set_fault(InjectedFault::Status { status: 503, body: body.clone() }).await;
    }
    for _ in 0..20 {
        let answer = balancer.ask(post(CHAT, chat("sim"))).await;
        assert!(matches!(answer.status, 429 | 503), "{} {}", answer.status, answer.text());
    }
    for engine in &engines {
        assert_eq!(state(&balancer, engine).await, "ready");
        assert!(served(engine) <= 5, "it was left alone: {}", served(engine));
        engine.clear_fault().await;
    }
    eventually("they get requests again", async || {
        (balancer.ask(post(CHAT, chat("sim"))).await.status == 200).then_some(())
    })
    .await;
    assert!(balancer.metric("vllm_lb_upstream_busy_total").await >= 2.0);
}

fn quick_breaker() -> Breaker {
    Breaker { failures: 3, open: Duration::from_millis(300), ..Breaker::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_breaker_trips_admits_a_trial_and_closes() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.breaker = quick_breaker();
    config.upstreams[0].weight = 1000.0;
    let balancer = Balancer::ready(config).await;
    let body = "{\"error\":{\"message\":\"broken\",\"code\":500}}".to_string();
    engines[0].set_fault(InjectedFault::Status { status: 500, body }).await;
    let mut failed = 0;
    eventually("it has tripped", async || {
        failed += u32::from(balancer.ask(post(CHAT, chat("sim"))).await.status == 500);
        (state(&balancer, &engines[0]).await == "tripped").then_some(())
    })
    .await;
    assert!((3..=5).contains(&failed), "{failed}");
    let before = served(&engines[0]);
    let load = Clients::start(&balancer, 8);
    eventually("one request was let through", async || (served(&engines[0]) > before).then_some(())).await;
    load.until_more(50).await;
    let wrong = load.end().await;
    let tried = served(&engines[0]) - before;
    assert!(wrong.len() <= tried && tried <= 4, "{tried} tries, {wrong:?}");
    assert_ne!(state(&balancer, &engines[0]).await, "ready", "good probes do not end a trip");
    engines[0].clear_fault().await;
    let load = Clients::start(&balancer, 4);
    until_state(&balancer, &engines[0], &["ready"]).await;
    assert_eq!(load.end().await, none());
}

/// Five answers of 500 to one client had tripped each upstream in turn, and all clients got 503.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_fail_on_every_upstream_take_the_fleet_from_nobody() {
    let engines = engines(3).await;
    let mut config = config(upstreams(&engines));
    config.breaker = Breaker { open: Duration::from_secs(60), ..quick_breaker() };
    let balancer = Balancer::ready(config).await;
    let body = "{\"error\":{\"message\":\"broken\",\"code\":500}}".to_string();
    for engine in &engines {
        engine.set_fault(InjectedFault::Status { status: 500, body: body.clone() }).await;
    }
    for engine in &engines {
        eventually("it has tripped", async || {
            assert_eq!(balancer.ask(post(CHAT, chat("sim"))).await.status, 500);
            (state(&balancer, engine).await == "tripped").then_some(())
        })
        .await;
    }
    for engine in &engines {
        engine.clear_fault().await;
    }
    let before: Vec<usize> = engines.iter().map(served).collect();
    for _ in 0..30 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    for (engine, before) in engines.iter().zip(before) {
        assert_eq!(state(&balancer, engine).await, "tripped", "its time is not over");
        assert!(served(engine) > before, "each has its part");
    }
    balancer.ask(get("/health")).await.expect(200);
    let models = balancer.ask(get("/v1/models")).await.expect(200).json();
    assert_eq!(models["data"][0]["id"], "sim");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_breaker_ejects_an_engine_that_hangs_while_its_probes_succeed() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.breaker = Breaker { open: Duration::from_secs(60), ..quick_breaker() };
    config.timeouts.first_byte = Some(Duration::from_millis(500));
    config.upstreams[0].weight = 1000.0;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::StallHeaders).await;
    eventually("it has tripped", async || {
        drop(balancer.ask(post(CHAT, chat("sim"))).await);
        (state(&balancer, &engines[0]).await == "tripped").then_some(())
    })
    .await;
    let load = Clients::start(&balancer, 4);
    load.until_more(40).await;
    assert_eq!(load.end().await, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn flapping_health_fails_no_request() {
    let engines = engines(2).await;
    let balancer = Balancer::over(&engines).await;
    let load = Clients::start(&balancer, 6);
    for _ in 0..5 {
        engines[0].set_health(Some(503));
        until_state(&balancer, &engines[0], &["down", "suspect"]).await;
        load.until_more(20).await;
        engines[0].set_health(None);
        until_state(&balancer, &engines[0], &["ready"]).await;
        load.until_more(20).await;
    }
    assert_eq!(load.end().await, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn refusing_and_draining_engines_cost_no_request() {
    let engines = engines(3).await;
    let balancer = Balancer::over(&engines).await;
    let load = Clients::start(&balancer, 6);
    load.until_more(20).await;
    engines[0].set_fault(InjectedFault::Refuse).await;
    until_state(&balancer, &engines[0], &["down"]).await;
    engines[1].set_fault(InjectedFault::ShuttingDown).await;
    until_state(&balancer, &engines[1], &["draining"]).await;
    load.until_more(20).await;
    engines[0].clear_fault().await;
    until_state(&balancer, &engines[0], &["ready"]).await;
    engines[1].set_fault(InjectedFault::Refuse).await;
    until_state(&balancer, &engines[1], &["down"]).await;
    engines[1].clear_fault().await;
    until_state(&balancer, &engines[1], &["ready"]).await;
    load.until_more(20).await;
    assert_eq!(load.end().await, none());
}

/// As `POST /inference/v1/abort_requests` does it, which goes to all of them.
#[tokio::test(flavor = "multi_thread")]
async fn engines_that_each_failed_one_request_keep_serving() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.upstreams[0].weight = 1000.0;
    let balancer = Balancer::ready(config).await;
    let changes = async || balancer.metric("vllm_lb_upstream_changes_total").await;
    let before = changes().await;
    for engine in &engines {
        engine.set_fault_for(1, InjectedFault::AbortEmpty).await;
    }
    let aborted = balancer.ask(post(CHAT, chat("sim"))).await;
    assert_ne!(aborted.status, 503, "{aborted:?}");
    for _ in 0..20 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    for engine in &engines {
        until_state(&balancer, engine, &["ready"]).await;
    }
    assert_eq!(changes().await, before + 4.0, "each was suspected, and found to be well");
    // The same word of one that goes: its probes tell.
    engines[0].set_fault_for(1, InjectedFault::AbortEmpty).await;
    engines[0].set_health(Some(503));
    until_state(&balancer, &engines[0], &["down"]).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
}

// === limits ===
#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_wait() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.limits.connections = 2;
    let balancer = Balancer::ready(config).await;
    let (mut first, mut second) = (balancer.client().await, balancer.client().await);
    first.ask(post(CHAT, chat("sim"))).await.expect(200);
    second.ask(post(CHAT, chat("sim"))).await.expect(200);
    let mut third = balancer.client().await;
    third.send(post(CHAT, chat("sim"))).await;
    balancer.admin(get("/live")).await.expect(200);
    second.ask(post(CHAT, chat("sim"))).await.expect(200);
    assert_eq!(served(&engines[0]), 3);
    drop(first);
    third.answer().await.expect(200);
}
