//! The forecast of the time to the first token: where it is shown, how it follows the engine, and what
//! becomes of a request whose limit no forecast meets.
//!
//! A prompt that an engine never answers makes a backlog of known size. Short streams, which take a step of
//! 50 ms, move the forecasts' base and not their pace, which stays near 8,000 tokens a second.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::choice::{COMPLETIONS, all, only, who, words};
use crate::common::wire::{Answer, JSON, Wire, get, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, Timing, config, eventually, logs, upstreams,
};
use vllm_lb::config::types::{Preset, SloRule};

/// Engines that answer after a step of 50 ms, also after the longest prompts.
async fn engines(count: usize) -> Vec<EngineServer> {
    let mut engines = Vec::new();
    for seed in 0..count as u64 {
        let timing = Timing { per_step: 0.05, ..Timing::instant() };
        let options = Options { seed, timing, max_model_len: 1_000_000, ..Options::default() };
        engines.push(EngineServer::start(options).await.expect("a free port is there"));
    }
    engines
}

/// A completion of one token after so many words, as a stream.
fn completion(seed: u64, tokens: usize) -> String {
    json!({"model": "sim", "prompt": words(seed, tokens), "max_tokens": 1, "stream": true}).to_string()
}

/// The same with a limit of the time to the first token.
fn limited(millis: &str, body: &str) -> Vec<u8> {
    request("POST", COMPLETIONS, &[JSON, ("x-slo-ttft-ms", millis)], body.as_bytes())
}

/// Over engines whose forecasts have been corrected by a first stream.
async fn balancer(engines: &[EngineServer], rule: SloRule, wait: Duration) -> Balancer {
    let mut config = config(upstreams(engines));
    (config.slo, config.expose, config.queue.wait) = (rule, true, wait);
    let balancer = Balancer::ready(config).await;
    let errors = || {
        let snapshot = balancer.running.fleet.snapshot();
        snapshot.entries.iter().filter(|entry| entry.upstream.forecast_error().is_none()).count()
    };
    assert_eq!(errors(), engines.len());
    eventually("each upstream has had a stream", async || {
        balancer.ask(post(COMPLETIONS, completion(0, 1))).await.expect(200);
        (errors() == 0).then_some(())
    })
    .await;
    balancer
}

/// Sends a prompt that its engine never answers.
async fn stall(balancer: &Balancer, engine: &EngineServer, tokens: usize) -> Wire {
    engine.set_fault_for(1, InjectedFault::StallHeaders).await;
    let received = engine.stats().received;
    let mut client = balancer.client().await;
    client.send(post(COMPLETIONS, completion(99, tokens))).await;
    engine.wait_until("the prompt has come", |stats| stats.received == received + 1).await;
    client
}

fn late(answer: &Answer) -> (u16, bool) {
    (answer.status, answer.text().contains("No upstream is expected to begin the answer within"))
}

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_forecast_is_shown_wherever_a_request_is() {
    let engines = engines(1).await;
    let balancer = balancer(&engines, SloRule::Ignore, MINUTE).await;
    let count = "vllm_lb_forecast_seconds_count";
    let (before, late) = (balancer.metric(count).await, "vllm_lb_forecast_late_total");
    let late_before = balancer.metric(late).await;
    let answer = balancer.ask(limited("1", &completion(5, 40_000))).await.expect(200);
    let millis: u64 = answer.header("x-vllm-lb-forecast-ms").parse().expect("whole milliseconds");
    assert!((4_000..5_200).contains(&millis), "{millis}");
    let whole = completion(6, 10).replace("true", "false");
    balancer.ask(post(COMPLETIONS, whole)).await.expect(200);
    balancer.until_recorded().await;
    assert_eq!(balancer.metric(count).await, before + 1.0, "an answer as a whole is not compared");
    assert_eq!(balancer.metric("vllm_lb_forecast_error_seconds_count").await, before + 1.0);
    let error = balancer.metric("vllm_lb_forecast_error_seconds_sum").await;
    assert!((1.0..5.3).contains(&error), "{error}");
    assert_eq!(balancer.metric(late).await, late_before, "the engine was faster than forecast");

    let decisions: Value = balancer.admin(get("/admin/decisions?limit=2")).await.expect(200).json();
    let forecast = decisions[1]["candidates"][0]["forecast_ms"].as_f64().expect("is a number");
    assert_eq!(forecast as u64, millis, "{decisions}");
    let record = logs::all().into_iter().rfind(|line| line.contains(&format!("forecast_ms={millis}")));
    assert!(record.is_some_and(|record| record.contains("request done")), "{:?}", logs::all());
}

/// An engine that reads 40,000 tokens a second behind 50 ms, five times faster than is assumed at first.
/// Other work of the machine only makes it slower, so the first forecast is compared with the engine's own
/// time.
#[tokio::test(flavor = "multi_thread")]
async fn forecasts_follow_the_engines_pace() {
    let timing = Timing { per_step: 0.05, per_prefill_token: 1.0 / 40_000.0, ..Timing::instant() };
    let engine = EngineServer::start(Options { timing, ..Options::default() }).await.expect("a port is free");
    let mut config = config(upstreams([&engine]));
    config.expose = true;
    let balancer = Balancer::ready(config).await;
    let (mut first, mut ratios) = (None, Vec::new());
    for round in 0..40 {
        let (tokens, begun) = (1_000 + 700 * (round % 4), Instant::now());
        let answer = balancer.ask(post(COMPLETIONS, completion(round as u64 + 1, tokens))).await.expect(200);
        let forecast: f64 = answer.header("x-vllm-lb-forecast-ms").parse().expect("milliseconds");
        ratios.push(forecast / begun.elapsed().as_millis() as f64);
        first.get_or_insert(forecast / (50.0 + tokens as f64 / 40.0));
    }
    let last = &mut ratios[25..];
    last.sort_by(f64::total_cmp);
    let (first, last) = (first.expect("there were requests"), last[last.len() / 2]);
    assert!(first > 1.8 && (0.4..1.4).contains(&last), "{first} {last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_no_upstream_answers_in_time_is_refused() {
    let engines = engines(1).await;
    let balancer = balancer(&engines, SloRule::Reject, MINUTE).await;
    balancer.ask(limited("1000", &completion(1, 10))).await.expect(200);
    let _stalled = stall(&balancer, &engines[0], 400_000).await;
    let refused = balancer.ask(limited("1000", &completion(1, 10))).await;
    assert_eq!(late(&refused), (429, true), "{}", refused.text());
    assert!(refused.text().contains("within 1000 ms"), "{}", refused.text());
    assert_eq!(refused.json()["error"]["type"], "RateLimitError");
    let seconds: u64 = refused.header("retry-after").parse().expect("whole seconds");
    assert!((20..=60).contains(&seconds), "{seconds}");
    assert_eq!(balancer.metric("vllm_lb_rejects_total").await, 1.0);
    assert!(balancer.metrics().contains("vllm_lb_rejects_total{reason=\"slo\"} 1"));
    for millis in ["90000", "0", "inf", "1e300"] {
        balancer.ask(limited(millis, &completion(1, 10))).await.expect(200);
    }
    balancer.ask(post(COMPLETIONS, completion(1, 10))).await.expect(200);
    for millis in ["-1", "soon", "1s", "", "NaN"] {
        let answer = balancer.ask(limited(millis, &completion(1, 10))).await.expect(400);
        assert_eq!(answer.json()["error"]["param"], "x-slo-ttft-ms");
    }
    let sent = engines[0].requests();
    let limits: Vec<_> = sent.iter().filter_map(|request| request.headers.get("x-slo-ttft-ms")).collect();
    assert_eq!(limits, ["1000", "90000", "0", "inf", "1e300"], "the header goes on as it is");
}

/// The first upstream holds the prompt, and has so much to read before it that it would be late, which the
/// preset does not count. The second costs more, for it would read the prompt anew, and would be in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_a_limit_goes_to_an_upstream_that_meets_it() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    (config.slo, config.expose, config.balance) = (SloRule::Reject, true, Preset::Prefix.balance());
    let balancer = Balancer::ready(config).await;
    let prompt = completion(7, 20_000);
    // The long prompt comes first: after it the engine is as fast as forecast again.
    for (engine, prompts) in [(1, vec![completion(0, 1)]), (0, vec![prompt.clone(), completion(0, 1)])] {
        only(&balancer, &engines, engine).await;
        for prompt in prompts {
            balancer.ask(post(COMPLETIONS, prompt)).await.expect(200);
        }
    }
    let _stalled = stall(&balancer, &engines[0], 200_000).await;
    all(&balancer, &engines).await;
    let ask = async |request: Vec<u8>| {
        let answer = balancer.ask(request).await.expect(200);
        (who(&engines, &answer), answer.header("x-vllm-lb-reason").to_string())
    };
    // As a whole, since a stream would show that the engine is not as busy as it seems.
    let whole = prompt.replace("true", "false");
    assert_eq!(ask(post(COMPLETIONS, whole)).await, (0, "prefix".to_string()));
    assert_eq!(ask(limited("10000", &prompt)).await, (1, "only".to_string()));
    let decisions: Value = balancer.admin(get("/admin/decisions?limit=1")).await.expect(200).json();
    let compared = decisions[0]["candidates"].as_array().map(Vec::len);
    assert_eq!((&decisions[0]["of"], compared), (&json!(2), Some(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_for_a_forecast_that_meets_its_limit() {
    let engines = engines(1).await;
    let balancer = balancer(&engines, SloRule::Queue, MINUTE).await;
    let stalled = stall(&balancer, &engines[0], 400_000).await;
    let queued = async |count: usize| {
        eventually(&format!("{count} wait"), async || {
            (balancer.running.fleet.queue().len() == count).then_some(())
        })
        .await;
    };
    let mut waiting = Vec::new();
    for (place, millis) in ["1000", "2000", "1000"].into_iter().enumerate() {
        let mut client = balancer.client().await;
        client.send(limited(millis, &completion(1, 10))).await;
        queued(place + 1).await;
        waiting.push(client);
    }
    // Requests without a limit, and with one that is met, do not wait behind those. Their answers do not
    // stream: a first token would show that the engine is not as busy as it seems.
    let whole = completion(1, 10).replace("true", "false");
    balancer.ask(post(COMPLETIONS, &whole)).await.expect(200);
    balancer.ask(limited("90000", &whole)).await.expect(200);
    queued(3).await;
    drop(stalled);
    for mut client in waiting {
        client.answer().await.expect(200);
    }
    queued(0).await;
    balancer.until_idle().await;
    assert!(balancer.metrics().contains("vllm_lb_queue_total{end=\"admitted\"} 3"));
}

/// The engine has 50 s to read. The first request would have its first token after 75 s, 15 s late; the
/// second one, with the same limit, after 50 s. Their answers do not stream: a first token would show that
/// the engine is not as busy as it seems.
#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_request_gives_way_to_a_later_one_that_meets_the_limit() {
    let engines = engines(1).await;
    let balancer = balancer(&engines, SloRule::Queue, MINUTE).await;
    let stalled = stall(&balancer, &engines[0], 400_000).await;
    let mut first = balancer.client().await;
    first.send(limited("60000", &completion(1, 200_000).replace("true", "false"))).await;
    let waits = async || (balancer.running.fleet.queue().len() == 1).then_some(());
    eventually("the first request waits", waits).await;
    let begun = Instant::now();
    balancer.ask(limited("60000", &completion(2, 10).replace("true", "false"))).await.expect(200);
    let taken = begun.elapsed();
    assert!(waits().await.is_some(), "the first one still waits");
    assert!(taken < Duration::from_secs(10), "{taken:?}");
    drop(stalled);
    first.answer().await.expect(200);
    balancer.until_idle().await;
    assert_eq!(balancer.running.fleet.queue().len(), 0);
}

/// The prompt takes 5 s on an idle engine.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_no_upstream_could_ever_meet_is_refused_at_once() {
    let engines = engines(1).await;
    let balancer = balancer(&engines, SloRule::Queue, MINUTE).await;
    let whole = |seed, tokens| completion(seed, tokens).replace("true", "false");
    let refused = balancer.ask(limited("1000", &whole(1, 40_000))).await;
    assert_eq!(late(&refused), (429, true), "{}", refused.text());
    let _stalled = stall(&balancer, &engines[0], 400_000).await;
    let mut waiting = balancer.client().await;
    waiting.send(limited("1000", &whole(2, 10))).await;
    let waits = async || (balancer.running.fleet.queue().len() == 1).then_some(());
    eventually("a request waits", waits).await;
    let refused = balancer.ask(limited("1000", &whole(3, 40_000))).await;
    assert_eq!(late(&refused), (429, true), "behind another one: {}", refused.text());
    assert!(waits().await.is_some(), "the other one still waits");
}

/// As a request that waits for a place: the upstream is full.
#[tokio::test(flavor = "multi_thread")]
async fn a_hopeless_limit_is_refused_also_while_every_upstream_is_full() {
    for rule in [SloRule::Queue, SloRule::Reject] {
        let engines = engines(1).await;
        let mut config = config(upstreams(&engines));
        config.slo = rule;
        config.upstreams[0].max_active = Some(1);
        let balancer = Balancer::ready(config).await;
        balancer.ask(post(COMPLETIONS, completion(0, 1))).await.expect(200);
        let _stalled = stall(&balancer, &engines[0], 10).await;
        let begun = Instant::now();
        let refused = balancer.ask(limited("4000", &completion(1, 100_000))).await;
        assert_eq!(late(&refused), (429, true), "{}", refused.text());
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shortest_of_several_limits_counts() {
    let engines = engines(1).await;
    let balancer = balancer(&engines, SloRule::Reject, MINUTE).await;
    let _stalled = stall(&balancer, &engines[0], 400_000).await;
    let ask = async |limits: &[&str]| {
        let mut headers = vec![JSON];
        headers.extend(limits.iter().map(|limit| ("x-slo-ttft-ms", *limit)));
        let body = completion(1, 10).replace("true", "false");
        balancer.ask(request("POST", COMPLETIONS, &headers, body.as_bytes())).await.status
    };
    assert_eq!(ask(&["90000", "80000"]).await, 200);
    assert_eq!(ask(&["90000", "1000"]).await, 429);
    assert_eq!(ask(&["1000", "90000"]).await, 429);
    assert_eq!(ask(&["90000, 1e3"]).await, 429);
    assert_eq!(ask(&["90000", "soon"]).await, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_for_a_forecast_ends_with_the_queues_wait() {
    let engines = engines(1).await;
    let balancer = balancer(&engines, SloRule::Queue, Duration::from_millis(300)).await;
    let _stalled = stall(&balancer, &engines[0], 400_000).await;
    let refused = balancer.ask(limited("1000", &completion(1, 10))).await;
    assert_eq!(late(&refused), (429, true), "{}", refused.text());
    assert_eq!(balancer.running.fleet.queue().len(), 0);
}

/// With `reject`, the wait for room is part of the limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_refused_once_it_has_waited_too_long_for_room() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.slo = SloRule::Reject;
    config.upstreams[0].max_active = Some(1);
    let balancer = Balancer::ready(config).await;
    let _stalled = stall(&balancer, &engines[0], 10).await;
    let begun = Instant::now();
    let refused = balancer.ask(limited("300", &completion(1, 10))).await;
    assert_eq!(late(&refused), (429, true), "{}", refused.text());
    let waited = begun.elapsed();
    assert!((Duration::from_millis(300)..Duration::from_secs(15)).contains(&waited), "{waited:?}");
}

/// No answer has corrected the forecasts: whatever they are, they refuse nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_forecast_without_an_answer_refuses_nothing() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.slo = SloRule::Reject;
    let balancer = Balancer::ready(config).await;
    balancer.ask(limited("1", &completion(1, 40_000))).await.expect(200);
    balancer.ask(limited("1", &completion(2, 40_000))).await.expect(429);
}
