//! When a prefill counts as over: never with an answer's head, at the latest when it should be.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use super::{CHAT, COMPLETIONS, MESSAGES, RESPONSES, chat_of, pending, telling, words};
use crate::common::staged::Staged;
use crate::common::wire::{CHUNKED, Framing, JSON, Wire, head, post};
use crate::common::{Balancer, InjectedFault, config, engines, eventually, upstreams};

const TOKENS: usize = 2_000;

fn backlog(balancer: &Balancer) -> u64 {
    balancer.loads().iter().map(|load| load.backlog).sum()
}

fn is_whole(backlog: u64) -> bool {
    (TOKENS as u64..TOKENS as u64 + 100).contains(&backlog)
}

/// A stream's request in an interface.
fn stream(path: &str) -> Value {
    let mut body = chat_of(&words(1, TOKENS));
    body["stream"] = true.into();
    if path == RESPONSES {
        body["input"] = words(1, TOKENS).into();
        body.as_object_mut().expect("it is one").remove("messages");
    }
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_stays_in_the_backlog_for_its_estimated_prefill() {
    let engines = engines(1).await;
    let balancer = telling(config(upstreams(&engines))).await;
    engines[0].set_fault(InjectedFault::StallHeaders).await;
    let client = pending(&balancer, CHAT, &chat_of(&words(1, TOKENS))).await;
    let begun = backlog(&balancer);
    assert!(is_whole(begun) || begun == 0, "{begun}");
    eventually("the prefill should be over", async || (backlog(&balancer) == 0).then_some(())).await;
    let load = balancer.loads()[0];
    assert_eq!(load.active, 1, "and the answer is not");
    assert!(is_whole(load.context), "{load:?}");
    drop(client);
    balancer.until_idle().await;
}

/// The piece of an answer that has come to the client.
async fn piece(client: &mut Wire, framing: &mut Framing) -> String {
    let piece = client.piece(framing).await.expect("the answer goes on").expect("it has not ended");
    String::from_utf8_lossy(&piece).into_owned()
}

/// The prefill of a stream is not over, nor is it over by itself: a quarter of a second would be enough for
/// all of it.
async fn still(balancer: &Balancer, path: &str) {
    for _ in 0..25 {
        sleep(Duration::from_millis(20)).await;
        assert!(is_whole(backlog(balancer)), "{path}: {}", backlog(balancer));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streams_prefill_ends_with_its_first_event_and_not_with_its_head() {
    for path in [CHAT, COMPLETIONS, MESSAGES] {
        let upstream = Staged::start().await;
        let balancer = telling(config(vec![upstream.upstream()])).await;
        let mut body = stream(path);
        if path == COMPLETIONS {
            body["prompt"] = words(1, TOKENS).into();
        }
        let mut client = pending(&balancer, path, &body).await;
        upstream.begins();
        still(&balancer, path).await;
        upstream.chunk("data: {\"choices\":[]}\n\n");
        let mut framing = client.head().await.framing;
        piece(&mut client, &mut framing).await;
        assert_eq!(backlog(&balancer), 0, "{path}");
        assert_eq!(balancer.loads()[0].active, 1);
        upstream.chunk("");
        balancer.until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_only_announce_a_response_do_not_end_its_prefill() {
    let upstream = Staged::start().await;
    let balancer = telling(config(vec![upstream.upstream()])).await;
    let mut client = pending(&balancer, RESPONSES, &stream(RESPONSES)).await;
    upstream.begins();
    let event = |kind: &str| format!("event: {kind}\ndata: {{\"type\":\"{kind}\"}}\n\n");
    upstream.chunk(&event("response.created"));
    upstream.chunk(&event("response.in_progress"));
    still(&balancer, RESPONSES).await;
    upstream.chunk(&event("response.output_item.added"));
    let mut framing = client.head().await.framing;
    while !piece(&mut client, &mut framing).await.contains("output_item") {}
    eventually("the prefill is over", async || (backlog(&balancer) == 0).then_some(())).await;
    assert_eq!(balancer.loads()[0].active, 1);
    drop(client);
    balancer.until_idle().await;
}

/// Clients that leave at every stage, on every interface.
#[tokio::test(flavor = "multi_thread")]
async fn gauges_return_to_zero_after_disconnects_at_any_stage() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.peek.bytes = 4 << 10;
    let balancer = telling(config).await;
    for path in [CHAT, COMPLETIONS, MESSAGES, RESPONSES] {
        let mut body = stream(path);
        body["prompt"] = words(1, TOKENS).into();
        body["max_tokens"] = 5_000.into();
        body["max_output_tokens"] = 5_000.into();
        let text = body.to_string();
        // Within the head; within what is peeked; behind it, of both framings.
        let whole = post(path, &text);
        for cut in [20, 1_000, 6_000] {
            let mut client = balancer.client().await;
            client.send(&whole[..cut]).await;
            drop(client);
        }
        let mut client = balancer.client().await;
        client.send(head("POST", path, &[JSON, CHUNKED])).await;
        client.send(crate::common::wire::chunk(&text.as_bytes()[..6_000])).await;
        drop(client);
        // Before an answer, and in the middle of one.
        for engine in &engines {
            engine.set_fault(InjectedFault::StallHeaders).await;
        }
        drop(pending(&balancer, path, &body).await);
        for engine in &engines {
            // The first of some interfaces only announce the answer.
            engine.set_fault(InjectedFault::StallStream { events: 6 }).await;
        }
        let mut client = balancer.client().await;
        client.send(&whole).await;
        assert_eq!(client.head().await.status, 200, "{path}");
        drop(client);
        for engine in &engines {
            engine.clear_fault().await;
        }
        balancer.until_idle().await;
    }
    let answer = balancer.ask(post(CHAT, json!({"model": "sim"}).to_string())).await;
    assert_eq!(answer.status, 400);
    balancer.until_idle().await;
    assert_eq!(balancer.metric("vllm_lb_upstream_backlog_tokens").await, 0.0);
    assert_eq!(balancer.metric("vllm_lb_upstream_context_tokens").await, 0.0);
    balancer.until_metric("vllm_lb_in_flight", 0.0).await;
}
