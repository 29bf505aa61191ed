//! Answers that are not whole although their framing ends properly.

use crate::common::body::stream;
use crate::common::staged::Staged;
use crate::common::wire::{Answer, post};
use crate::common::{Balancer, Options, config, engine, upstreams};
use vllm_lb::config::types::UpstreamConfig;

const CHAT: &str = "/v1/chat/completions";

/// What a client gets for a stream when the first of two upstreams says this.
async fn answer_after(says: impl FnOnce(&Staged)) -> Answer {
    let (broken, engine) = (Staged::start().await, engine(Options::default()).await);
    let mut config = config(upstreams([&engine]));
    config.upstreams[0].weight = 0.001;
    config.upstreams.insert(0, UpstreamConfig { weight: 1000.0, ..broken.upstream() });
    config.health.fall = 1000;
    let balancer = Balancer::ready(config).await;
    says(&broken);
    let answer = balancer.ask(post(CHAT, stream("sim", 2))).await.expect(200);
    assert_eq!(balancer.metric("vllm_lb_attempt_failures_total").await, 1.0, "{answer:?}");
    answer
}

/// It went to the client, as a success, although another upstream could have answered.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_anything_in_it_is_retried() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: ";
    for nothing in [
        format!("{head}text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        format!("{head}text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n4\r\n: a\n\r\n0\r\n\r\n"),
        format!("{head}application/json\r\ncontent-length: 0\r\n\r\n"),
    ] {
        let answer = answer_after(|upstream| upstream.says(&nothing)).await;
        assert!(answer.text().contains("[DONE]"), "{nothing}: {answer:?}");
    }
}

/// The client had half an event, and nothing that said so.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_within_an_event_ends_with_an_error() {
    let answer = answer_after(|upstream| {
        upstream.begins();
        upstream.chunk("data: {\"id\":\"a\",\"choices\":[]}\n\ndata: {\"id\":\"a\",\"cho");
        upstream.chunk("");
    })
    .await;
    let text = answer.text();
    let last: Vec<&str> = text.trim_end().split("\n\n").skip(2).collect();
    assert!(matches!(last[..], [error, "data: [DONE]"] if error.starts_with("data: {\"error\":")), "{text}");
}
