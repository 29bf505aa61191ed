//! What a client gets when its upstream fails before, and after, the first byte of an answer.
//!
//! The first of two engines is so strong that every request goes there first, and fails.

use std::time::{Duration, Instant};

use crate::common::body::{Place, chat, normal, padded, stream};
use crate::common::raw::Raw;
use crate::common::wire::{Answer, CHUNKED, JSON, Wire, chunk, head, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, config, direct, engine, engines, eventually, upstreams,
};
use serde_json::{Value, json};
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::{Config, Retry, RetryOn};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

/// Two engines; the first is asked first. Probes never eject it: what requests see decides.
async fn two() -> (Vec<EngineServer>, Config) {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.upstreams[0].weight = 1000.0;
    config.upstreams[1].weight = 0.001;
    config.health.fall = 1000;
    (engines, config)
}

/// Asks all three interfaces, streaming and not, while the first engine has `fault`, and expects whole
/// answers of the second.
async fn is_retried_unseen(fault: InjectedFault) {
    let (engines, config) = two().await;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(fault.clone()).await;
    for path in [CHAT, MESSAGES] {
        for body in [chat("sim"), stream("sim", 3)] {
            let answer = balancer.ask(post(path, &body)).await;
            assert_eq!((answer.status, answer.whole), (200, true), "{fault:?} {path} {answer:?}");
            assert!(!answer.text().contains("error"), "{fault:?} {path} {answer:?}");
            assert_eq!(answer.header("x-should-retry"), "", "nothing was wrong for the client");
        }
    }
    let input = r#"{"model":"sim","input":"hello","stream":true}"#;
    let answer = balancer.ask(post(RESPONSES, input)).await.expect(200);
    assert!(answer.text().contains("response.completed"), "{fault:?}: {answer:?}");
    assert_eq!(engines[1].stats().received, 5, "{fault:?}");
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_is_retried() {
    is_retried_unseen(InjectedFault::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_closed_at_once_is_retried() {
    is_retried_unseen(InjectedFault::CloseAfterAccept).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_closed_before_the_answer_is_retried() {
    is_retried_unseen(InjectedFault::CutHeaders { reset: false }).await;
    is_retried_unseen(InjectedFault::CutHeaders { reset: true }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_engine_is_retried_elsewhere() {
    is_retried_unseen(InjectedFault::Status { status: 503, body: "{}".into() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_errors_are_retried() {
    is_retried_unseen(InjectedFault::Status { status: 502, body: "<html>".into() }).await;
    is_retried_unseen(InjectedFault::Status { status: 504, body: "<html>".into() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_engine_is_retried_elsewhere() {
    is_retried_unseen(InjectedFault::ShuttingDown).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_without_a_token_is_retried() {
    for stream in [false, true] {
        let chat = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3});
        for (path, body) in [
            (CHAT, chat.clone()),
            (MESSAGES, chat),
            ("/v1/completions", json!({"prompt": "hi", "max_tokens": 3})),
            (RESPONSES, json!({"input": "hi", "max_output_tokens": 3})),
        ] {
            let mut body = body;
            body["model"] = "sim".into();
            body["stream"] = stream.into();
            let (engines, config) = two().await;
            let whole = Wire::connect(&direct(&engines[1])).await.ask(post(path, body.to_string())).await;
            let balancer = Balancer::ready(config).await;
            engines[0].set_fault(InjectedFault::AbortEmpty).await;
            let answer = balancer.ask(post(path, body.to_string())).await.expect(200);
            assert_eq!(normal(&answer.body), normal(&whole.body), "{path} stream {stream}");
            assert_eq!((engines[0].stats().received, engines[1].stats().received), (1, 2));
        }
    }
}

/// One that aborts everything has always room; going back to it is no use while the others are full.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_request_waits_for_another_upstream_instead_of_the_same() {
    let (engines, mut config) = two().await;
    config.upstreams[1].max_active = Some(1);
    let balancer = Balancer::ready(config).await;
    engines[1].set_fault_for(1, InjectedFault::StallHeaders).await;
    engines[0].set_fault(InjectedFault::AbortEmpty).await;
    let mut first = balancer.client().await;
    first.send(post(CHAT, chat("sim"))).await;
    engines[1].wait_until("the first is there", |stats| stats.received == 1).await;
    let mut second = balancer.client().await;
    second.send(post(CHAT, chat("sim"))).await;
    balancer.until_metric("vllm_lb_queued", 1.0).await;
    drop(first);
    let answer = second.answer().await.expect(200);
    assert!(!answer.text().contains("abort"), "{answer:?}");
    assert_eq!(engines[0].stats().received, 2, "each went there once");
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_as_the_first_event_is_retried() {
    let (engines, config) = two().await;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::ErrorEvent { status: 500 }).await;
    let answer = balancer.ask(post(CHAT, stream("sim", 3))).await.expect(200);
    assert!(!answer.text().contains("error"), "{answer:?}");
    // What is wrong with the request itself, another engine would say too.
    engines[0].set_fault(InjectedFault::ErrorEvent { status: 400 }).await;
    let answer = balancer.ask(post(CHAT, stream("sim", 3))).await.expect(200);
    assert!(answer.text().contains("error"), "{answer:?}");
    assert_eq!(engines[1].stats().received, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_pooled_connection_is_retried() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    for _ in 0..20 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
        engine.set_fault(InjectedFault::CloseIdle).await;
    }
}

/// After SIGTERM the connection stays open and silent, and the port is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_engine_is_retried_elsewhere() {
    let (engines, mut config) = two().await;
    config.health.fall = 2;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::StallHeaders).await;
    let mut clients = Vec::new();
    for body in [chat("sim"), stream("sim", 3)] {
        let mut client = balancer.client().await;
        client.send(post(CHAT, body)).await;
        clients.push(client);
    }
    engines[0].wait_until("both are there", |stats| stats.received == 2).await;
    engines[0].set_fault(InjectedFault::Silent).await;
    for client in &mut clients {
        let answer = client.answer().await.expect(200);
        assert!(!answer.text().contains("error"), "{answer:?}");
    }
    assert_eq!(engines[1].stats().received, 2);
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_sends_the_same_body_in_any_size_and_framing() {
    for size in [0x10000, 3 << 20, 9 << 20] {
        for chunked in [false, true] {
            let (engines, config) = two().await;
            let balancer = Balancer::ready(config).await;
            engines[0].set_fault(InjectedFault::CutHeaders { reset: false }).await;
            let body = padded(size, "sim", Place::First);
            let mut client = balancer.client().await;
            if chunked {
                client.send(head("POST", CHAT, &[JSON, CHUNKED])).await;
                for piece in body.chunks(100_000) {
                    client.send(chunk(piece)).await;
                }
                client.send(chunk(b"")).await;
            } else {
                client.send(request("POST", CHAT, &[JSON], &body)).await;
            }
            client.answer().await;
            let [first, second] = [&engines[0], &engines[1]].map(|engine| engine.requests());
            let hash =
                |seen: &[crate::common::Recorded]| seen.last().map(|seen| (seen.body_length, seen.body_hash));
            assert_eq!(hash(&second).map(|(length, _)| length), Some(size), "chunked: {chunked}");
            assert_eq!(hash(&first), hash(&second), "chunked: {chunked}");
            balancer.until_idle().await;
            balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
        }
    }
}

// === what is not tried again ===

#[tokio::test(flavor = "multi_thread")]
async fn after_all_attempts_the_last_answer_is_forwarded() {
    let (engines, config) = two().await;
    let balancer = Balancer::ready(config).await;
    let busy = r#"{"error":{"message":"The engine is currently busy","code":503}}"#;
    for engine in &engines {
        engine.set_fault(InjectedFault::Status { status: 503, body: busy.into() }).await;
    }
    let answer = balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    assert_eq!((answer.text(), answer.header("x-should-retry")), (busy, "false"));
    assert!(engines.iter().all(|engine| engine.stats().received > 0), "both were asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn client_errors_are_not_retried() {
    let (engines, config) = two().await;
    let balancer = Balancer::ready(config).await;
    for status in [400, 404, 422, 500, 501] {
        engines[0].set_fault(InjectedFault::Status { status, body: "{\"error\":\"x\"}".into() }).await;
        assert_eq!(balancer.ask(post(CHAT, chat("sim"))).await.expect(status).text(), "{\"error\":\"x\"}");
    }
    assert_eq!(engines[1].stats().received, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_one_instance_is_not_retried_elsewhere() {
    let (engines, config) = two().await;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::Status { status: 503, body: "{}".into() }).await;
    let mut body: Value = serde_json::from_slice(chat("sim").as_ref()).expect("is JSON");
    body["kv_transfer_params"] = serde_json::json!({"remote_engine_id": "e1"});
    balancer.ask(post(CHAT, body.to_string())).await.expect(503);
    assert_eq!(engines[1].stats().received, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_can_be_switched_off_whole_and_by_cause() {
    let on = RetryOn { unavailable: false, ..RetryOn::default() };
    for retry in [Retry { attempts: 0, ..Retry::default() }, Retry { on, ..Retry::default() }] {
        let (engines, mut config) = two().await;
        config.retry = retry;
        let balancer = Balancer::ready(config).await;
        engines[0].set_fault(InjectedFault::Status { status: 503, body: "{}".into() }).await;
        balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
        assert_eq!(engines[1].stats().received, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_retry_budget_bounds_an_outage() {
    let engines = engines(4).await;
    let mut config = config(upstreams(&engines));
    config.retry.budget = 0.1;
    config.retry.backoff = Duration::from_millis(1);
    // No back-pressure and no trip may hide the tries.
    config.breaker.failures = 1000;
    let balancer = Balancer::ready(config).await;
    for engine in &engines {
        engine.set_fault(InjectedFault::Status { status: 502, body: "{}".into() }).await;
    }
    for _ in 0..400 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(502);
    }
    let attempts: u64 = engines.iter().map(|engine| engine.stats().received).sum();
    // 400 first tries, the reserve of 100, a tenth of the requests, and a few for rounding.
    assert!((450..=545).contains(&attempts), "{attempts} attempts for 400 requests");
}

// === after the first byte ===

fn last_event(answer: &Answer) -> Value {
    let events: Vec<&str> = answer.text().split("\n\n").filter(|event| !event.is_empty()).collect();
    let last = events.iter().rev().find(|event| !event.contains("[DONE]")).expect("there are events");
    let data = last.lines().find_map(|line| line.strip_prefix("data: ")).expect("an event has data");
    serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"))
}

async fn a_stream_ends_with_an_error(balancer: &Balancer) {
    let chat = balancer.ask(post(CHAT, stream("sim", 50))).await.expect(200);
    assert!(chat.text().ends_with("data: [DONE]\n\n"), "{chat:?}");
    assert_eq!(last_event(&chat)["error"]["type"], "InternalServerError", "{chat:?}");
    let messages = balancer.ask(post(MESSAGES, stream("sim", 50))).await.expect(200);
    assert_eq!(
        (&last_event(&messages)["type"], &last_event(&messages)["error"]["type"]),
        (&"error".into(), &"api_error".into())
    );
    assert!(!messages.text().contains("message_stop"));
    let input = r#"{"model":"sim","input":"hello","stream":true,"max_output_tokens":50}"#;
    let responses = balancer.ask(post(RESPONSES, input)).await.expect(200);
    assert_eq!(last_event(&responses)["type"], "error");
    assert!(!responses.text().contains("response.completed"));
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cut_ends_with_an_error_and_is_never_given_to_another_engine() {
    for reset in [false, true] {
        let (engines, config) = two().await;
        let balancer = Balancer::ready(config).await;
        engines[0].set_fault(InjectedFault::CutStream { events: 5, reset }).await;
        a_stream_ends_with_an_error(&balancer).await;
        assert_eq!(engines[1].stats().received, 0);
    }
}

/// Its first event and its end come at once: nothing has gone out yet, though the answer looked good.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_dies_after_its_first_event_is_retried_or_reported() {
    let event = "data: {\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":null}]}\n\n";
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let dying = Raw::start(&format!("{head}{:x}\r\n{event}\r\n", event.len())).await;
    let engine = engine(Options::default()).await;
    let mut config = config(vec![dying.upstream(), upstreams([&engine]).remove(0)]);
    config.upstreams[0].weight = 1000.0;
    config.upstreams[1].weight = 0.001;
    config.breaker.failures = 1000;
    let balancer = Balancer::ready(config).await;
    let (mut whole, body) = (0, r#"{"model":"sim","prompt":"hi","stream":true,"max_tokens":3}"#);
    for _ in 0..50 {
        let answer = balancer.ask(post("/v1/completions", body)).await.expect(200);
        let broken = answer.text().starts_with(event) && last_event(&answer)["error"]["code"] == 502;
        assert!(broken || !answer.text().contains("error"), "{answer:?}");
        whole += usize::from(!broken);
    }
    assert!(whole > 0, "nothing had gone out, and no attempt followed");
    balancer.until_idle().await;
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
}

/// What vLLM leaves behind after SIGTERM: an open connection on which nothing ever comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_of_a_vanished_engine_ends_with_an_error() {
    let (engines, mut config) = two().await;
    config.health.fall = 2;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::StallStream { events: 5 }).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 50))).await;
    let head = client.head().await;
    engines[0].set_fault(InjectedFault::Silent).await;
    let answer = client.body(head).await.expect(200);
    assert!(last_event(&answer)["error"]["message"].is_string(), "{answer:?}");
    balancer.until_idle().await;
}

// === deadlines ===

const SHORT: Option<Duration> = Some(Duration::from_millis(300));

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_first_byte_is_a_gateway_timeout() {
    let (engines, mut config) = two().await;
    config.timeouts.first_byte = SHORT;
    let balancer = Balancer::ready(config).await;
    // Heads alone are no first byte: vLLM sends them before the prompt is read.
    for fault in [InjectedFault::StallHeaders, InjectedFault::StallStream { events: 0 }] {
        engines[0].set_fault(fault).await;
        for path in [CHAT, MESSAGES] {
            let answer = balancer.ask(post(path, stream("sim", 5))).await.expect(504);
            assert_eq!(answer.header("x-should-retry"), "false");
        }
    }
    engines[0].wait_until("nothing runs", |stats| stats.running + stats.waiting == 0).await;
    balancer.until_idle().await;
    // Each was one failure of the engine's, not two.
    assert_eq!(balancer.running.fleet.snapshot().ready().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_stream_ends_with_an_error() {
    let (engines, mut config) = two().await;
    config.timeouts.idle = SHORT;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::StallStream { events: 5 }).await;
    let answer = balancer.ask(post(CHAT, stream("sim", 50))).await.expect(200);
    assert_eq!(last_event(&answer)["error"]["code"], 504, "{answer:?}");
    engines[0].wait_until("nothing runs", |stats| stats.running == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_in_all_ends() {
    let engine = crate::common::paced(Duration::from_millis(50)).await;
    let mut config = config(upstreams([&engine]));
    config.timeouts.total = SHORT;
    let balancer = Balancer::ready(config).await;
    let answer = balancer.ask(post(CHAT, stream("sim", 1000))).await.expect(200);
    assert_eq!(last_event(&answer)["error"]["code"], 504, "{answer:?}");
    balancer.ask(post(CHAT, r#"{"model":"sim","messages":[],"prompt":"x"}"#)).await;
    engine.wait_until("nothing runs", |stats| stats.running == 0).await;
    assert_eq!(balancer.running.fleet.snapshot().ready().count(), 1, "a long answer is nobody's fault");
}

// === waiting for room ===

#[tokio::test(flavor = "multi_thread")]
async fn queued_requests_are_fifo_and_disconnects_leave_the_queue() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.upstreams[0].max_active = Some(1);
    let balancer = Balancer::ready(config).await;
    engine.set_fault_for(1, InjectedFault::StallHeaders).await;
    let mut first = balancer.client().await;
    first.send(post(CHAT, chat("sim"))).await;
    balancer.until_active(1).await;
    let mut leaving = balancer.client().await;
    leaving.send(post(CHAT, chat("sim"))).await;
    balancer.until_metric("vllm_lb_queued", 1.0).await;
    let mut staying = balancer.client().await;
    staying.send(post(CHAT, chat("sim"))).await;
    balancer.until_metric("vllm_lb_queued", 2.0).await;
    drop(leaving);
    balancer.until_metric("vllm_lb_queued", 1.0).await;
    assert_eq!(engine.stats().received, 1, "nobody was let in");
    drop(first);
    staying.answer().await.expect(200);
    assert_eq!(engine.stats().received, 2, "who left never came to the engine");
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_and_a_long_wait_give_retry_after() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.upstreams[0].max_active = Some(1);
    config.queue.size = 1;
    config.queue.wait = Duration::from_millis(300);
    let balancer = Balancer::ready(config).await;
    engine.set_fault(InjectedFault::StallHeaders).await;
    let mut first = balancer.client().await;
    first.send(post(CHAT, chat("sim"))).await;
    balancer.until_active(1).await;
    let mut waiting = balancer.client().await;
    waiting.send(post(CHAT, chat("sim"))).await;
    balancer.until_metric("vllm_lb_queued", 1.0).await;
    for refused in [balancer.ask(post(CHAT, chat("sim"))).await, waiting.answer().await] {
        let refused = refused.expect(429);
        let seconds: u64 = refused.header("retry-after").parse().expect("a number of seconds");
        assert!((1..=60).contains(&seconds));
        assert_eq!(refused.json()["error"]["type"], "RateLimitError");
    }
    drop(first);
    balancer.until_idle().await;
    eventually("nobody waits", async || (balancer.metric("vllm_lb_queued").await == 0.0).then_some(())).await;
}

/// Regression: an upstream that limited one client by its key was closed to all clients for a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_429_to_a_clients_key_pauses_the_upstream_briefly() {
    let limited = "HTTP/1.1 429 Too Many Requests\r\nretry-after: 60\r\ncontent-length: 2\r\n\r\n{}";
    for (header, own_key, least) in [(JSON, None, 50), (KEY, None, 0), (KEY, Some("k"), 50)] {
        let raw = Raw::start(limited).await;
        let mut config = config(vec![raw.upstream()]);
        config.upstreams[0].api_key = own_key.map(Secret::new);
        let balancer = Balancer::ready(config).await;
        balancer.ask(request("POST", CHAT, &[JSON, header], chat("sim").as_bytes())).await.expect(429);
        let snapshot = balancer.running.fleet.snapshot();
        let now = Instant::now();
        let pause = snapshot.entries[0].upstream.busy_until(now).map_or(Duration::ZERO, |until| until - now);
        assert!(pause >= Duration::from_secs(least) && pause <= Duration::from_secs(least + 10), "{pause:?}");
    }
}

const KEY: (&str, &str) = ("authorization", "Bearer of-one-client");
