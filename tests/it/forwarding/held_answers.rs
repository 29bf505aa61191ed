//! The memory of answers that a route edits as a whole counts in `peek.memory`, until the client has them.

use serde_json::json;
use vllm_lb::config::check::check;

use crate::common::staged::Staged;
use crate::common::wire::{JSON, Wire, post, request};
use crate::common::{Balancer, config, eventually};

const ROUTES: &str = "upstreams: [http://a]\nroutes: [{model: message, to: sim, messages: chat},
    {model: thinking, to: sim, think_tags: true}]";

const KIB: usize = 1 << 10;

async fn balancer(upstream: &Staged, memory: usize) -> Balancer {
    let mut config = config(vec![upstream.upstream()]);
    config.routes = check(ROUTES, &|_| None).expect("a right configuration").routes;
    config.peek.memory = memory as u64;
    config.peek.max_body = 64 * KIB as u64;
    config.peek.bytes = 64 * KIB as u64;
    Balancer::ready(config).await
}

/// A chat's answer with so much text, as HTTP.
fn chat_answer(size: usize) -> String {
    let message = json!({"role": "assistant", "content": "a".repeat(size)});
    let choices = json!([{"index": 0, "message": message, "finish_reason": "stop"}]);
    let body = json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "sim",
        "choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}});
    let body = body.to_string();
    let head = format!("content-type: application/json\r\ncontent-length: {}", body.len());
    format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}")
}

fn message() -> Vec<u8> {
    let messages = json!([{"role": "user", "content": "a"}]);
    post("/v1/messages", json!({"model": "message", "max_tokens": 9, "messages": messages}).to_string())
}

fn thinking() -> Vec<u8> {
    let messages = json!([{"role": "user", "content": "a"}]);
    let body = json!({"model": "thinking", "messages": messages}).to_string();
    request("POST", "/v1/chat/completions", &[JSON, ("connection", "close")], body.as_bytes())
}

async fn held(balancer: &Balancer) -> f64 {
    balancer.metric("vllm_lb_peeked_bytes").await
}

/// Eight clients that read slowly took 900 MB beside the limit.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_counted_while_its_client_does_not_read() {
    for ask in [message(), thinking()] {
        let size = 16 * KIB * KIB;
        let upstream = Staged::start().await;
        let balancer = balancer(&upstream, 64 * KIB * KIB).await;
        upstream.says(&chat_answer(size));
        let mut client = Wire::connect(balancer.address()).await;
        client.send(ask).await;
        eventually("it is counted", async || (held(&balancer).await >= size as f64).then_some(())).await;
        let answer = client.answer().await.expect(200);
        assert!(answer.body.len() > size);
        balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_room_is_refused_and_its_upstream_is_not_to_blame() {
    for (size, status) in [(300 * KIB, 200), (600 * KIB, 503)] {
        let upstream = Staged::start().await;
        let balancer = balancer(&upstream, KIB * KIB).await;
        upstream.says(&chat_answer(size));
        let answer = balancer.ask(message()).await.expect(status);
        assert_eq!(answer.header("retry-after"), if status == 503 { "1" } else { "" });
        balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
        assert_eq!(balancer.metric("vllm_lb_attempt_failures_total").await, 0.0);
    }
}

/// The head has gone out by then.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_whose_rest_has_no_room_is_cut() {
    for (size, whole) in [(300 * KIB, true), (1200 * KIB, false)] {
        let upstream = Staged::start().await;
        let balancer = balancer(&upstream, KIB * KIB).await;
        upstream.says(&chat_answer(size));
        let mut client = Wire::connect(balancer.address()).await;
        client.send(thinking()).await;
        let got = client.rest().await;
        assert_eq!((got.len() > size, got.ends_with(b"0\r\n\r\n")), (whole, whole), "{}", got.len());
        balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
    }
}
