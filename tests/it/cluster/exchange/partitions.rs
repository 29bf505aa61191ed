//! Chains that are spread over several streams, of which a balancer serves some.

use std::time::Duration;

use super::board::{Board, options, settings};
use super::chain;
use crate::common::PATIENCE;
use crate::common::redis::Redis;
use vllm_lb::config::types::RedisOptions;
use vllm_lb::state::exchange::Binding;
use vllm_lb::state::redis::ExchangeSettings;

/// A balancer that serves these of two streams.
async fn board(redis: &Redis, name: &str, served: &[usize]) -> Board {
    let chain_streams_served = served.to_vec();
    let options = RedisOptions { chain_streams: 2, chain_streams_served, ..options() };
    let board = Board::with(ExchangeSettings { options, ..settings(&redis.url(), name) });
    board.exchange.wait_caught_up(PATIENCE).await;
    board
}

/// A chain whose opening has this remainder of two; chains of different numbers have no block in common.
fn chain_of(stream: u64, number: u64, blocks: u64) -> Vec<u64> {
    let mut chain = chain(2 * number + stream, blocks);
    chain[0] = chain[0] / 2 * 2 + stream;
    chain
}

#[tokio::test(flavor = "multi_thread")]
async fn balancers_share_the_chains_of_the_streams_that_they_serve() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (board(&redis, "a", &[0]).await, board(&redis, "b", &[0]).await);
    let (c, all) = (board(&redis, "c", &[1]).await, board(&redis, "all", &[]).await);
    // Whatever the opening is, a group has one stream.
    for stream in [0, 1] {
        let chain = chain_of(stream, 1, 6);
        a.send("u1", &chain[..4]);
        b.until_held("u1", &chain[..4], 4).await;
        b.send("u1", &chain);
        a.until_held("u1", &chain, 6).await;
        all.until_held("u1", &chain, 6).await;
    }
    // Gauges and bindings are everyone's.
    a.set("u1", 3);
    a.bind(Binding::Session, "s", "u1");
    c.until_others("u1", 3).await;
    assert_eq!([0, 1].map(|stream| c.held("u1", &chain_of(stream, 1, 6))), [0, 0]);
    // A tail goes to the stream of its opening.
    for (stream, group, others) in [(0, &a, &c), (1, &c, &a)] {
        let chain = chain_of(stream, 2, 9);
        all.send("u2", &chain[..5]);
        group.until_held("u2", &chain[..5], 5).await;
        all.send("u2", &chain);
        group.until_held("u2", &chain, 9).await;
        assert_eq!(others.held("u2", &chain), 0);
    }
    assert_eq!(redis.count(&["EXISTS", "vllm-lb:{lb}:chains"]).await, 0);
    assert_eq!(redis.count(&["EXISTS", "vllm-lb:{lb}:chains:0", "vllm-lb:{lb}:chains:1"]).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_requested_chain_comes_on_the_stream_of_its_opening() {
    let redis = Redis::start(&[]).await;
    let all = board(&redis, "all", &[]).await;
    let chains = [chain_of(0, 1, 8), chain_of(1, 2, 8)];
    for chain in &chains {
        all.send("u1", &chain[..6]);
    }
    all.set("u1", 1);
    let watcher = board(&redis, "watcher", &[]).await;
    for chain in &chains {
        watcher.until_held("u1", &chain[..6], 6).await;
    }
    redis.ask(&["DEL", "vllm-lb:{lb}:chains:0", "vllm-lb:{lb}:chains:1"]).await;
    let late = [board(&redis, "late 0", &[0]).await, board(&redis, "late 1", &[1]).await];
    for (late, chain) in late.iter().zip(&chains) {
        assert_eq!(late.held("u1", chain), 0);
        late.until_others("u1", 1).await;
        all.send("u1", chain);
        late.until_held("u1", chain, 8).await;
    }
}

/// Regression: a stream that was replaced was not read while the other one went on.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_stream_is_noticed_while_the_other_one_goes_on() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (board(&redis, "a", &[]).await, board(&redis, "b", &[]).await);
    // As of a Redis with another clock, or of another one.
    let replaced = "vllm-lb:{lb}:chains:0";
    redis.ask(&["XADD", replaced, "99999999999999-0", "d", "x"]).await;
    for stream in [0, 1] {
        a.send("u1", &chain_of(stream, 1, 4));
        b.until_held("u1", &chain_of(stream, 1, 4), 4).await;
    }
    redis.ask(&["DEL", replaced]).await;
    let busy = async {
        for number in 10.. {
            a.send("u2", &chain_of(1, number, 2));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let noticed = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        a.send("u1", &chain_of(0, 2, 4));
        b.until_held("u1", &chain_of(0, 2, 4), 4).await;
    };
    tokio::select! {
        () = busy => {}
        () = noticed => {}
    }
    assert_eq!(b.held("u2", &chain_of(1, 10, 2)), 2, "the other stream went on");
}
