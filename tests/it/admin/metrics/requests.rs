//! Traffic whose counts are known: answers, streams, refusals, retries, and the queue.

use std::time::Duration;

use super::ledger::{Ledger, MetricsPage};
use super::{CHAT, ended, labelled, named, ones, with_face};
use crate::common::body::{chat, stream};
use crate::common::wire::{Wire, get, post};
use crate::common::{Balancer, InjectedFault, Options, engine, engines, eventually, names, paced};
use serde_json::{Value, json};

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

/// The times of an answer that its first attempt had.
const TIMES: [&str; 4] = [
    "request_seconds_count|model|sim",
    "first_byte_seconds_count|model|sim",
    "upstream_first_byte_seconds_count|upstream|a",
    "added_latency_seconds_count",
];

fn long_chat(turns: usize) -> String {
    let text = |turn: usize| format!("turn {turn} of a long conversation ").repeat(300);
    let messages: Vec<Value> =
        (0..turns).map(|turn| json!({"role": "user", "content": text(turn)})).collect();
    json!({"model": "sim", "messages": messages, "max_tokens": 2}).to_string()
}

/// The counts of the tokens that an answer reports.
fn tokens(usage: &Value, route: &str) -> Vec<(String, f64)> {
    let kind =
        |kind: &str| format!("vllm_lb_tokens_total{{kind=\"{kind}\",model=\"sim\",route=\"{route}\"}}");
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_f64().unwrap_or(0.0);
    let prompt = usage["prompt_tokens"].as_f64().expect("is reported");
    let counts = vec![
        (kind("prompt"), prompt),
        (kind("output"), usage["completion_tokens"].as_f64().expect("is reported")),
        (labelled("cache_prompt_tokens_total|upstream|a"), prompt),
        (kind("cached"), cached),
        (labelled("cache_reported_tokens_total|upstream|a"), cached),
    ];
    counts.into_iter().filter(|(_, count)| *count > 0.0).collect()
}

/// The prompt tokens that the last choice believed to be cached.
async fn predicted(balancer: &Balancer) -> f64 {
    let decisions = balancer.admin(get("/admin/decisions")).await.expect(200).json();
    let last = &decisions[0];
    let chosen = last["candidates"].as_array().and_then(|all| all.first()).expect("there is one");
    last["prompt_tokens"].as_f64().expect("is there") - chosen["uncached"].as_f64().expect("is there")
}

pub async fn answers(ledger: &mut Ledger) {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::ready(with_face(named([&engine]))).await;
    let mut page = MetricsPage::of(&balancer).await;
    for (model, route) in [("sim", ""), ("face", "face")] {
        let answer = balancer.ask(post(CHAT, chat(model))).await.expect(200).json();
        let mut expected = ones(&TIMES);
        expected.extend(ones(&["choices_total|reason|only"]));
        expected.push((ended("sim", "200", route, "ok", "a"), 1.0));
        expected.extend(tokens(&answer["usage"], route));
        page = ledger.moved(&balancer, page, &expected).await;
    }
    // The scrape does not count itself.
    ledger.shows(&balancer, "vllm_lb_in_flight", 0.0).await;
    // A conversation goes on: the engine has its beginning.
    for turns in 1..3 {
        let answer = balancer.ask(post(CHAT, long_chat(turns))).await.expect(200).json();
        let predicted = predicted(&balancer).await;
        assert_eq!(predicted > 0.0, turns > 1, "{predicted}");
        let mut expected = ones(&TIMES);
        expected.extend(ones(&["choices_total|reason|only"]));
        expected.push((ended("sim", "200", "", "ok", "a"), 1.0));
        expected.extend(tokens(&answer["usage"], ""));
        if turns > 1 {
            expected.push((labelled("cache_predicted_tokens_total|upstream|a"), predicted));
        }
        page = ledger.moved(&balancer, page, &expected).await;
    }
    ledger.holds(&balancer, "vllm_lb_index_blocks", |blocks| blocks > 4.0).await;
    let blocks = MetricsPage::of(&balancer).await.value("vllm_lb_index_blocks");
    ledger.shows(&balancer, "vllm_lb_index_pairs", blocks).await;
    ledger.holds(&balancer, "vllm_lb_index_bytes", |bytes| bytes > blocks).await;
}

pub async fn streams(ledger: &mut Ledger) {
    let engine = paced(Duration::from_millis(20)).await;
    let balancer = Balancer::ready(named([&engine])).await;
    // The stream has the same prompt.
    let usage = balancer.ask(post(CHAT, chat("sim"))).await.expect(200).json()["usage"].clone();
    balancer.until_metric("vllm_lb_requests_total", 1.0).await;
    let page = MetricsPage::of(&balancer).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 8))).await;
    ledger.shows(&balancer, "vllm_lb_upstream_active{upstream=\"a\"}", 1.0).await;
    client.answer().await.expect(200);
    let usage = json!({"prompt_tokens": usage["prompt_tokens"], "completion_tokens": 8});
    let mut expected = ones(&TIMES);
    expected.extend(ones(&[
        "choices_total|reason|only",
        "inter_token_seconds_count|model|sim",
        "stream_gap_seconds_count|model|sim",
        "forecast_seconds_count|upstream|a",
        "forecast_error_seconds_count|upstream|a",
    ]));
    expected.push((ended("sim", "200", "", "ok", "a"), 1.0));
    expected.extend(tokens(&usage, ""));
    let page = ledger.moved(&balancer, page, &expected).await;
    let late = labelled("forecast_late_total|upstream|a");
    ledger.holds(&balancer, &late, |count| count <= 1.0).await;
    for sum in ["inter_token", "stream_gap"] {
        let seconds = page.value(&labelled(&format!("{sum}_seconds_sum|model|sim")));
        assert!((0.01..1.0).contains(&seconds), "{sum}: {seconds}");
    }
    // A stream that breaks.
    engine.set_fault_for(1, InjectedFault::CutStream { events: 3, reset: true }).await;
    let page = MetricsPage::of(&balancer).await;
    balancer.ask(post(CHAT, stream("sim", 20))).await.expect(200);
    let mut expected = ones(&TIMES);
    expected.extend(ones(&[
        "choices_total|reason|only",
        "broken_streams_total|upstream|a",
        "stream_gap_seconds_count|model|sim",
        "forecast_seconds_count|upstream|a",
        "forecast_error_seconds_count|upstream|a",
    ]));
    expected.push((labelled("attempt_failures_total") + "{cause=\"reset\",upstream=\"a\"}", 1.0));
    expected.push((ended("sim", "200", "", "broken", "a"), 1.0));
    ledger.moved(&balancer, page, &expected).await;
}

pub async fn refusals(ledger: &mut Ledger) {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::ready(named([&engine])).await;
    let mut page = MetricsPage::of(&balancer).await;
    let refused = [(get("/nowhere"), 404, "path"), (get(CHAT), 405, "method")];
    // Where all upstreams serve the same models, it is left to the engine whether there is such a model.
    let both = engines(2).await;
    let mut config = named(&both);
    config.upstreams[1].models = Some(names(&["second"]));
    let two = Balancer::ready(config).await;
    let before = MetricsPage::of(&two).await;
    two.ask(post(CHAT, chat("unknown"))).await.expect(404);
    let mut expected = ones(&["request_seconds_count|model|other", "rejects_total|reason|model"]);
    expected.push((ended("other", "404", "", "model", ""), 1.0));
    ledger.moved(&two, before, &expected).await;
    for (request, status, reason) in refused {
        balancer.ask(request).await.expect(status);
        let mut expected = ones(&["request_seconds_count|model|other"]);
        expected.push((labelled(&format!("rejects_total|reason|{reason}")), 1.0));
        expected.push((ended("other", &status.to_string(), "", reason, ""), 1.0));
        page = ledger.moved(&balancer, page, &expected).await;
    }
    // A call to the admin API is no request of a client.
    balancer.admin(get("/admin/upstreams")).await.expect(200);
    page = ledger.moved(&balancer, page, &[]).await;
    // The engine refuses it.
    let body = json!({"model": "sim", "messages": "none"}).to_string();
    balancer.ask(post(CHAT, body)).await.expect(400);
    let mut expected = ones(&TIMES);
    expected.extend(ones(&["choices_total|reason|only"]));
    expected.push((ended("sim", "400", "", "client_error", "a"), 1.0));
    ledger.moved(&balancer, page, &expected).await;
    // Half a body.
    let mut client = balancer.client().await;
    let request = post(CHAT, chat("sim"));
    client.send(&request[..request.len() - 4]).await;
    ledger.holds(&balancer, "vllm_lb_peeked_bytes", |bytes| bytes > 0.0).await;
    ledger.shows(&balancer, "vllm_lb_connections", 1.0 + 1.0).await;
    drop(client);
    ledger.shows(&balancer, "vllm_lb_peeked_bytes", 0.0).await;
}

pub async fn retries(ledger: &mut Ledger) {
    let engines = engines(2).await;
    let mut config = named(&engines);
    config.upstreams[0].weight = 1000.0;
    let balancer = Balancer::ready(config).await;
    balancer.ask(post(CHAT, long_chat(1))).await.expect(200);
    assert_eq!(engines[0].requests().len(), 1, "the weight decides");
    balancer.until_metric("vllm_lb_requests_total", 1.0).await;
    let page = MetricsPage::of(&balancer).await;
    let broken = InjectedFault::Status { status: 502, body: "{}".into() };
    engines[0].set_fault_for(1, broken).await;
    let answer = balancer.ask(post(CHAT, long_chat(1))).await.expect(200).json();
    let decisions = balancer.admin(get("/admin/decisions")).await.expect(200).json();
    assert_eq!((&decisions[0]["reason"], &decisions[0]["upstream"]), (&json!("retry"), &json!("b")));
    let reason = decisions[1]["reason"].as_str().expect("it has one");
    let mut expected: Vec<(String, f64)> = tokens(&answer["usage"], "");
    expected.iter_mut().for_each(|(sample, _)| *sample = sample.replace("upstream=\"a\"", "upstream=\"b\""));
    expected.extend(ones(&[
        "request_seconds_count|model|sim",
        "first_byte_seconds_count|model|sim",
        "upstream_first_byte_seconds_count|upstream|b",
        "choices_total|reason|retry",
        "retries_total|cause|502",
    ]));
    expected.push((labelled(&format!("choices_total|reason|{reason}")), 1.0));
    expected.push((labelled("attempt_failures_total") + "{cause=\"502\",upstream=\"a\"}", 1.0));
    expected.push((ended("sim", "200", "", "ok", "b"), 1.0));
    ledger.moved(&balancer, page, &expected).await;
    // An engine that is full.
    let busy = InjectedFault::Status { status: 503, body: "{}".into() };
    let before = MetricsPage::of(&balancer).await;
    for engine in &engines {
        engine.set_fault_for(1, busy.clone()).await;
    }
    balancer.ask(post(CHAT, chat("sim"))).await;
    let sample = labelled("upstream_busy_total|upstream|a");
    ledger.holds(&balancer, &sample, |value| value == before.value(&sample) + 1.0).await;
}

async fn waiting(balancer: &Balancer, count: usize) -> Wire {
    let mut client = balancer.client().await;
    client.send(post(CHAT, chat("sim"))).await;
    eventually(&format!("{count} wait"), async || {
        (balancer.running.fleet.queue().len() == count).then_some(())
    })
    .await;
    client
}

pub async fn queue(ledger: &mut Ledger) {
    let engine = paced(ENDLESS).await;
    let mut config = named([&engine]);
    config.upstreams[0].max_active = Some(1);
    config.queue.size = 2;
    config.queue.wait = Duration::from_secs(2);
    let balancer = Balancer::ready(config).await;
    let page = MetricsPage::of(&balancer).await;
    let mut running = balancer.client().await;
    running.send(post(CHAT, stream("sim", 10_000))).await;
    balancer.until_active(1).await;
    let leaving = waiting(&balancer, 1).await;
    let mut late = waiting(&balancer, 2).await;
    ledger.shows(&balancer, "vllm_lb_queued", 2.0).await;
    ledger.shows(&balancer, "vllm_lb_in_flight", 3.0).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(429);
    drop(leaving);
    late.answer().await.expect(429);
    ledger.shows(&balancer, "vllm_lb_queued", 0.0).await;
    let mut expected = ones(&[
        "choices_total|reason|only",
        "forecast_seconds_count|upstream|a",
        "forecast_error_seconds_count|upstream|a",
        "queue_total|end|full",
        "queue_total|end|left",
        "queue_total|end|waited_out",
    ]);
    expected.push((labelled("rejects_total|reason|full"), 2.0));
    expected.push((labelled("request_seconds_count|model|sim"), 3.0));
    expected.push((labelled("queue_seconds_count|model|sim"), 2.0));
    expected.push((ended("sim", "429", "", "full", ""), 2.0));
    expected.push((ended("sim", "none", "", "client_gone", ""), 1.0));
    ledger.moved(&balancer, page, &expected).await;
    // The next one gets the place of a client that disconnects.
    let mut admitted = waiting(&balancer, 1).await;
    let page = MetricsPage::of(&balancer).await;
    drop(running);
    admitted.answer().await.expect(200);
    let sample = labelled("queue_total|end|admitted");
    ledger.holds(&balancer, &sample, |value| value == page.value(&sample) + 1.0).await;
    let sample = labelled("queue_seconds_count|model|sim");
    ledger.holds(&balancer, &sample, |value| value == page.value(&sample) + 1.0).await;
}
