//! Bodies longer than what is read of them before the choice: all of the prompt is learnt all the same.

use std::ops::RangeInclusive;

use bytes::Bytes;
use serde_json::Value;
use vllm_lb::prompt::chain::thinning::last_stored;

use super::{BLOCK, CHAT, chat_of, known, next_turn, telling, who, words};
use crate::common::h2::{self, H2};
use crate::common::wire::{Answer, CHUNKED, JSON, chunk, head, post};
use crate::common::{Balancer, EngineServer, InjectedFault, config, engines, upstreams};

const PEEK: u64 = 8 << 10;

/// Eight times as long as the peek.
const TOKENS: usize = 16_000;

#[derive(Clone, Copy, Debug)]
enum Way {
    Length,
    Chunks,
    H2,
}

async fn over(engines: &[EngineServer]) -> Balancer {
    let mut config = config(upstreams(engines));
    config.peek.bytes = PEEK;
    telling(config).await
}

async fn send(balancer: &Balancer, way: Way, body: &Value) -> Answer {
    let text = body.to_string();
    let pieces: Vec<&[u8]> = text.as_bytes().chunks(5_000).collect();
    match way {
        Way::Length => balancer.ask(post(CHAT, &text)).await,
        Way::Chunks => {
            let mut client = balancer.client().await;
            client.send(head("POST", CHAT, &[JSON, CHUNKED])).await;
            for piece in pieces {
                client.send(chunk(piece)).await;
            }
            client.ask(chunk(b"")).await
        }
        Way::H2 => {
            let pieces: Vec<Bytes> = pieces.into_iter().map(Bytes::copy_from_slice).collect();
            H2::connect(balancer.address()).await.ask(h2::post(CHAT), &pieces).await
        }
    }
    .expect(200)
}

/// How many blocks the index counts of a prompt of about so many: behind the leading ones it stores one for
/// several.
fn stored(blocks: usize) -> RangeInclusive<usize> {
    last_stored(blocks - 2)..=blocks + 2
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_body_is_indexed_whole_and_attracts_its_next_turn() {
    let engines = engines(3).await;
    let balancer = over(&engines).await;
    for (number, way) in (0u64..).zip([Way::Length, Way::Chunks, Way::H2, Way::Length, Way::Chunks]) {
        let text = words(number, TOKENS);
        let before = known(&balancer).await.1;
        let first = who(&engines, &send(&balancer, way, &chat_of(&text)).await);
        let learnt = known(&balancer).await.1 - before;
        let blocks = 4 * TOKENS / BLOCK;
        assert!(stored(blocks).contains(&learnt), "{way:?}: {learnt} of {blocks} blocks");
        let next = who(&engines, &send(&balancer, way, &next_turn(&text)).await);
        assert_eq!(first, next, "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_long_body_is_indexed_once() {
    for fault in [InjectedFault::Refuse, InjectedFault::Status { status: 503, body: "{}".into() }] {
        for way in [Way::Length, Way::Chunks, Way::H2] {
            let engines = engines(2).await;
            let mut config = config(upstreams(&engines));
            config.peek.bytes = PEEK;
            config.health.fall = 1_000;
            config.upstreams[0].weight = 1_000.0;
            let balancer = telling(config).await;
            engines[0].set_fault(fault.clone()).await;
            let text = words(3, TOKENS);
            let before = known(&balancer).await;
            let first = who(&engines, &send(&balancer, way, &chat_of(&text)).await);
            assert_eq!(first, 1, "{fault:?} {way:?}");
            let after = known(&balancer).await;
            let blocks = 4 * TOKENS / BLOCK;
            let learnt = after.0 - before.0;
            assert!(stored(blocks).contains(&learnt), "{fault:?} {way:?}: {learnt} of {blocks}");
            assert_eq!(after.1 - before.1, learnt, "{fault:?} {way:?}: one holder for each block");
        }
    }
}

/// The body has passed by to its end when the engine says that it is too long.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_long_body_leaves_nothing_in_the_index() {
    let engines = engines(2).await;
    let balancer = over(&engines).await;
    let before = known(&balancer).await;
    let body = chat_of(&words(1, 40_000)).to_string();
    balancer.ask(post(CHAT, &body)).await.expect(400);
    assert_eq!(known(&balancer).await.1, before.1);
}
