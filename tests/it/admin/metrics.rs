//! The balancer's own metrics: every documented one is exported, and moves as known traffic says.

mod balancers;
mod ledger;
mod requests;

use std::time::Duration;

use tokio::time::timeout;

use crate::common::body::chat;
use crate::common::h2::{self, H2};
use crate::common::wire::{get, head, post, tcp};
use crate::common::{Balancer, EngineServer, Options, PATIENCE, config, engine, upstreams};
use ledger::Ledger;
use vllm_lb::config::check::check;
use vllm_lb::config::types::Config;

const CHAT: &str = "/v1/chat/completions";

/// Metrics that other tests hold, and where.
const HELD_ELSEWHERE: [(&str, &str); 14] = [
    ("vllm_lb_accept_failures_total", "needs a machine without file descriptors"),
    ("vllm_lb_signs_lost_total", "needs a keeper that is stuck"),
    ("vllm_lb_handshake_failures_total", "forwarding: listeners"),
    ("vllm_lb_cache_trimmed_total", "routing: choice, usage"),
    ("vllm_lb_cumulative_turns_total", "traces: cumulative"),
    ("vllm_lb_trace_store_failures_total", "traces: durability"),
    ("vllm_lb_traces_expired_total", "counted by a task that runs once a minute; unit tests of the stores"),
    ("vllm_lb_traces_waiting", "is 0 but for the moments in which a store is slow; traces: durability"),
    ("vllm_lb_traces_waiting_bytes", "like vllm_lb_traces_waiting"),
    ("vllm_lb_responses_found_total", "cluster: stored"),
    ("vllm_lb_upstream_incarnation", "admin: engine_metrics, with engines that restart"),
    ("vllm_lb_spans_total", "needs a collector; the SDK tests of spans"),
    ("vllm_lb_span_export_failures_total", "like vllm_lb_spans_total"),
    ("vllm_lb_log_records_dropped_total", "needs an output that is not read; unit tests of the queue"),
];

/// Over engines that are named `a`, `b` and so on.
fn named<'a>(engines: impl IntoIterator<Item = &'a EngineServer>) -> Config {
    let mut config = config(upstreams(engines));
    for (upstream, name) in config.upstreams.iter_mut().zip(["a", "b", "c"]) {
        upstream.name = name.into();
    }
    config
}

/// Adds a route from `face` to `sim`.
fn with_face(mut config: Config) -> Config {
    let written = "upstreams: [http://a]\nroutes: [{model: face, to: sim}]";
    config.routes = check(written, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes;
    config
}

/// The sample of requests that ended so.
fn ended(model: &str, status: &str, route: &str, outcome: &str, upstream: &str) -> String {
    format!(
        "vllm_lb_requests_total{{model=\"{model}\",outcome=\"{outcome}\",route=\"{route}\",\
         status=\"{status}\",upstream=\"{upstream}\"}}"
    )
}

/// A sample with one label, as `name|label|value`.
fn labelled(written: &str) -> String {
    let parts: Vec<&str> = written.split('|').collect();
    match parts[..] {
        [name, label, value] => format!("vllm_lb_{name}{{{label}=\"{value}\"}}"),
        _ => format!("vllm_lb_{written}"),
    }
}

/// Samples with one label that have moved by one.
fn ones(written: &[&str]) -> Vec<(String, f64)> {
    written.iter().map(|written| (labelled(written), 1.0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_metric_is_exported_and_moves_as_it_should() {
    let mut ledger = Ledger::default();
    requests::answers(&mut ledger).await;
    requests::streams(&mut ledger).await;
    requests::refusals(&mut ledger).await;
    requests::retries(&mut ledger).await;
    requests::queue(&mut ledger).await;
    balancers::upstreams(&mut ledger).await;
    balancers::engine_load(&mut ledger).await;
    balancers::process(&mut ledger).await;
    balancers::traces(&mut ledger).await;
    balancers::siblings(&mut ledger).await;
    let problems = ledger.problems(&HELD_ELSEWHERE);
    assert!(problems.is_empty(), "{problems:#?}");
}

/// A fleet that changes for months must not fill the memory with series.
#[tokio::test(flavor = "multi_thread")]
async fn series_of_upstreams_and_models_that_have_gone_are_removed() {
    let engines = [engine(Options::default()).await, crate::common::serving(&["other-model"]).await];
    let balancer = Balancer::ready(named(&engines)).await;
    for model in ["sim", "other-model"] {
        balancer.ask(post(CHAT, chat(model))).await.expect(200);
    }
    let has = async |text: &str| balancer.admin(get("/metrics")).await.expect(200).text().contains(text);
    let counted = async |text: &str| {
        crate::common::eventually(&format!("{text} is counted"), async || has(text).await.then_some(()))
            .await;
    };
    counted("upstream=\"a\"} 1").await;
    counted("upstream=\"b\"} 1").await;
    crate::common::admin(&balancer, "DELETE", "/admin/upstreams/b", serde_json::Value::Null).await;
    balancer.until_ready(1).await;
    for gone in ["upstream=\"b\"", "model=\"other-model\""] {
        let none = async || (!has(gone).await).then_some(());
        crate::common::eventually(&format!("{gone} is gone"), none).await;
    }
    assert!(has("upstream=\"a\"").await && has("model=\"sim\"").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_accepts_openmetrics_gets_it() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    balancer.until_metric("vllm_lb_requests_total", 1.0).await;
    let accept = ("accept", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5");
    let open = balancer.admin(head("GET", "/metrics", &[accept])).await.expect(200);
    assert_eq!(open.header("content-type"), "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(open.text().ends_with("\n# EOF\n"));
    assert!(open.text().contains("\n# TYPE vllm_lb_requests counter\n"));
    let text = balancer.admin(get("/metrics")).await.expect(200);
    assert_eq!(text.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    assert!(
        !text.text().contains("# EOF") && text.text().contains("# TYPE vllm_lb_requests_total counter\n")
    );
}

/// What the balancer adds is less than what a request takes in it, and no wait for others is in it.
#[tokio::test(flavor = "multi_thread")]
async fn added_latency_has_no_time_of_the_client_the_queue_or_the_upstream() {
    let engine = crate::common::paced(Duration::from_millis(300)).await;
    let mut config = named([&engine]);
    config.upstreams[0].max_active = Some(1);
    let balancer = Balancer::ready(config).await;
    let mut first = balancer.client().await;
    first.send(post(CHAT, chat("sim"))).await;
    balancer.until_active(1).await;
    // The body comes in two pieces, and the request waits in the queue.
    let request = post(CHAT, chat("sim"));
    let mut second = balancer.client().await;
    second.send(&request[..request.len() - 5]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    second.send(&request[request.len() - 5..]).await;
    first.answer().await.expect(200);
    second.answer().await.expect(200);
    balancer.until_metric("vllm_lb_added_latency_seconds_count", 2.0).await;
    let seconds = balancer.metric("vllm_lb_request_seconds_sum").await;
    let added = balancer.metric("vllm_lb_added_latency_seconds_sum").await;
    assert!(seconds > 1.0 && added > 0.0 && added < 0.1, "{added} of {seconds}");
}

/// Regression: the time in which a client does not read was taken for the balancer's own.
#[tokio::test(flavor = "multi_thread")]
async fn added_latency_has_no_time_of_a_client_that_does_not_read() {
    const STALL: Duration = Duration::from_millis(500);
    let engine = engine(Options::default()).await;
    let balancer = Balancer::ready(named([&engine])).await;
    let mut client = H2::with_window(tcp(balancer.address()).await, 16).await;
    let mut asked = client.begin(h2::post(CHAT), false).await;
    asked.body.send_data(chat("sim").into(), true).expect("the stream is open");
    let answer = timeout(PATIENCE, asked.answer).await.expect("in time").expect("the head comes");
    tokio::time::sleep(STALL).await;
    let answer = h2::read(answer).await.expect(200);
    assert!(answer.whole && answer.body.len() > 100, "{}", answer.text());
    balancer.until_metric("vllm_lb_added_latency_seconds_count", 1.0).await;
    let seconds = balancer.metric("vllm_lb_request_seconds_sum").await;
    let added = balancer.metric("vllm_lb_added_latency_seconds_sum").await;
    assert!(seconds >= STALL.as_secs_f64() && added > 0.0 && added < 0.1, "{added} of {seconds}");
}
