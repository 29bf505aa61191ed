//! Several balancers' memories on one real Redis: what one says the others know.

mod board;
mod file_entries;
mod foreign_keys;
mod forms;
mod lag;
mod memory;
mod partitions;
mod permissions;
mod skew;
mod trouble;

use std::time::{Duration, Instant};

use crate::common::eventually;
use crate::common::redis::Redis;
use board::{Board, options, settings};
use vllm_lb::state::exchange::{Binding, Message};
use vllm_lb::state::redis::ExchangeSettings;
use vllm_lb::state::redis::stored_binding::StoredBinding;

/// A conversation's chain, by its number.
fn chain(number: u64, blocks: u64) -> Vec<u64> {
    (1..=blocks).map(|block| number << 32 | block).collect()
}

/// As `Board::bind` says it.
fn found(upstream: &str) -> Option<StoredBinding> {
    Some(StoredBinding { upstream: upstream.into(), number: 7 })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_event_reaches_all_siblings() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await);
    let c = Board::begun(&redis.url(), "c").await;
    a.set("u1", 3);
    b.set("u1", 4);
    b.set("u2", 1);
    c.until_others("u1", 7).await;
    c.until_others("u2", 1).await;
    a.until_others("u1", 4).await;
    b.set("u1", 0);
    c.until_others("u1", 3).await;
    // A conversation goes from one balancer to another; each says what was new to it.
    a.send("u1", &chain(1, 5));
    b.until_held("u1", &chain(1, 5), 5).await;
    b.send("u1", &chain(1, 9));
    c.until_held("u1", &chain(1, 9), 9).await;
    a.until_held("u1", &chain(1, 9), 9).await;
    c.send("u2", &chain(1, 12));
    a.until_held("u2", &chain(1, 12), 12).await;
    assert_eq!(a.held("u1", &chain(1, 12)), 9);
    a.bind(Binding::Session, "s 1", "u2");
    a.bind(Binding::Response, "resp_1", "u1");
    eventually("bindings are told", async || (c.bound().len() == 2).then_some(())).await;
    assert_eq!(b.exchange.lookup(Binding::Session, "s 1").await, found("u2"));
    assert_eq!(b.exchange.lookup(Binding::Response, "resp_1").await, found("u1"));
    assert_eq!(b.exchange.lookup(Binding::Response, "s 1").await, None);
    eventually("all reports are new", async || {
        let rows = c.exchange.rows();
        let names: Vec<(&str, &str)> =
            rows.iter().map(|row| (row.name.as_str(), row.address.as_str())).collect();
        assert_eq!(names, [("a", "a:8000"), ("b", "b:8000")]);
        rows.iter().all(|row| row.age < Duration::from_secs(1)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_starting_balancer_is_warm_and_counts_only_live_siblings() {
    let redis = Redis::start(&[]).await;
    let (a, gone) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "gone").await);
    a.set("u1", 3);
    gone.set("u1", 50);
    a.until_others("u1", 50).await;
    for number in 1..500 {
        a.send("u1", &chain(number, 20));
        a.send("u1", &chain(number, 25));
    }
    a.bind(Binding::Session, "kept", "u1");
    gone.crash().await;
    a.until_others("u1", 0).await;
    let late = Board::begun(&redis.url(), "late").await;
    assert!((1..500).all(|number| late.held("u1", &chain(number, 25)) == 25));
    assert_eq!(late.exchange.lookup(Binding::Session, "kept").await, found("u1"));
    late.until_others("u1", 3).await;
    // A balancer that shuts down is forgotten at once.
    let start = Instant::now();
    late.set("u2", 1);
    a.until_others("u2", 1).await;
    late.leave().await;
    a.until_others("u2", 0).await;
    assert!(start.elapsed() < options().gauge_ttl);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_sibling_expires() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await);
    b.set("u1", 9);
    a.until_others("u1", 9).await;
    let start = Instant::now();
    b.crash().await;
    a.until_others("u1", 0).await;
    let took = start.elapsed();
    assert!(took > options().gauge_ttl / 3 && took < options().gauge_ttl * 2, "{took:?}");
    a.until_siblings(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_with_an_unknown_beginning_is_requested() {
    let redis = Redis::start(&["--stream-node-max-entries", "10"]).await;
    let options = vllm_lb::config::types::RedisOptions { stream_length: 100, ..options() };
    let small = |name: &str| ExchangeSettings { options: options.clone(), ..settings(&redis.url(), name) };
    let a = Board::with(small("a"));
    a.exchange.wait_caught_up(crate::common::PATIENCE).await;
    a.send("u1", &chain(1, 20));
    let watcher = Board::begun(&redis.url(), "watcher").await;
    watcher.until_held("u1", &chain(1, 20), 20).await;
    // Enough for the beginning to be trimmed away.
    for number in 2..400 {
        a.send("u2", &chain(number, 1));
        watcher.until_held("u2", &chain(number, 1), 1).await;
    }
    let length = redis.count(&["XLEN", "vllm-lb:{lb}:chains"]).await;
    assert!((100..200).contains(&length), "{length}");
    let late = Board::with(small("late"));
    late.exchange.wait_caught_up(crate::common::PATIENCE).await;
    assert_eq!(late.held("u1", &chain(1, 20)), 0);
    assert_eq!(late.held("u2", &chain(390, 1)), 1);
    a.send("u1", &chain(1, 22));
    late.until_held("u1", &chain(1, 22), 22).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_many_siblings_lack_is_published_about_once() {
    const CHAINS: u64 = 40;
    let (redis, stream) = (Redis::start(&[]).await, "vllm-lb:{lb}:chains");
    let a = Board::begun(&redis.url(), "a").await;
    (1..=CHAINS).for_each(|number| a.send("u1", &chain(number, 20)));
    let watcher = Board::begun(&redis.url(), "watcher").await;
    watcher.until_held("u1", &chain(CHAINS, 20), 20).await;
    redis.ask(&["DEL", stream]).await;
    let mut late = Vec::new();
    for name in ["late 1", "late 2", "late 3", "late 4", "late 5"] {
        late.push(Board::begun(&redis.url(), name).await);
    }
    for board in &late {
        board.until_siblings(late.len() + 1).await;
    }
    (1..=CHAINS).for_each(|number| a.send("u1", &chain(number, 21)));
    for board in &late {
        for number in 1..=CHAINS {
            board.until_held("u1", &chain(number, 21), 21).await;
        }
    }
    let answer = redis.ask(&["XRANGE", stream, "-", "+"]).await;
    let redis::Value::Array(entries) = answer else { panic!("no list") };
    let answers = entries.iter().map(|entry| {
        let fields = entry.as_sequence().and_then(|entry| entry[1].as_sequence());
        let Some([_, redis::Value::BulkString(bytes)]) = fields else { panic!("no entry: {entry:?}") };
        let message = Message::decode(bytes).expect("is a message");
        message.chains.iter().filter(|chain| chain.parent.is_none()).count()
    });
    let answers: usize = answers.sum();
    assert!((CHAINS as usize..=CHAINS as usize * 2).contains(&answers), "{answers} answers");
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_stream_entries_are_ignored() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await);
    let key = "vllm-lb:{lb}:stream";
    redis.ask(&["XADD", key, "*", "x", "y"]).await;
    redis.ask(&["XADD", key, "*", "d", "garbage"]).await;
    redis.ask(&["XADD", key, "*", "d", "\u{2}of a newer version"]).await;
    redis.ask(&["SET", "vllm-lb:{lb}:members", "no hash at all"]).await;
    a.set("u1", 2);
    b.until_others("u1", 2).await;
    assert!(Message::decode(b"garbage").is_err());
    let late = Board::begun(&redis.url(), "late").await;
    late.until_others("u1", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn membership_changes_reach_all_and_persist() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await);
    a.put_member("u1", "added");
    b.until_member("u1", Some("added")).await;
    b.put_member("u1", "drained");
    b.put_member("u2", "added");
    a.until_member("u1", Some("drained")).await;
    a.until_member("u2", Some("added")).await;
    let late = Board::begun(&redis.url(), "late").await;
    late.until_member("u1", Some("drained")).await;
    // Redis loses all, and gets it back.
    redis.ask(&["FLUSHALL"]).await;
    eventually("the list is given back", async || {
        (redis.count(&["HLEN", "vllm-lb:{lb}:members"]).await == 2).then_some(())
    })
    .await;
    for board in [a, b, late] {
        assert_eq!(board.exchange.members().get("u1").map(String::as_str), Some("drained"));
        board.crash().await;
    }
    let next = Board::begun(&redis.url(), "next").await;
    next.until_member("u2", Some("added")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_redis_is_not_trusted() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await);
    let list = "vllm-lb:{lb}:members";
    let text = async || match redis.ask(&["HGET", list, "u1"]).await {
        redis::Value::BulkString(text) => String::from_utf8(text).expect("text"),
        other => panic!("{other:?}"),
    };
    a.put_member("u1", "added");
    b.until_member("u1", Some("added")).await;
    let before = text().await;
    b.put_member("u1", "drained");
    a.until_member("u1", Some("drained")).await;
    let after = text().await;
    // As a snapshot, or a replica that lagged, would have it.
    redis.ask(&["HSET", list, "u1", &before]).await;
    redis.ask(&["SET", "vllm-lb:{lb}:mark", "another"]).await;
    eventually("it is as it was", async || (text().await == after).then_some(())).await;
    for board in [&a, &b] {
        board.until_member("u1", Some("drained")).await;
    }
    // A later change wins, and so does any change over a text without a number, which no version writes.
    a.put_member("u1", "added again");
    b.until_member("u1", Some("added again")).await;
    redis.ask(&["HSET", list, "u2", "{}"]).await;
    redis.ask(&["SET", "vllm-lb:{lb}:mark", "yet another"]).await;
    b.until_member("u2", Some("{}")).await;
    a.put_member("u2", "said");
    b.until_member("u2", Some("said")).await;
}
