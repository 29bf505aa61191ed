//! Redis dies, freezes, is flushed, is full: no request waits for it, and the state recovers with it.

use std::time::{Duration, Instant};

use super::board::{Board, gauges, settings};
use crate::common::redis::Redis;
use crate::common::sentinel::SentinelSet;
use crate::common::{PATIENCE, eventually, logs};
use vllm_lb::state::exchange::Binding;

const WARNING: &str = "redis does not work, routing goes on from local memory";
const BACK: &str = "redis works again";

fn said(message: &str) -> usize {
    logs::all().iter().filter(|line| line.contains(message)).count()
}

/// Two balancers that know each other, with requests in flight.
async fn pair(redis: &Redis) -> (Board, Board) {
    let (a, b) = (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await);
    a.set("u1", 1);
    b.set("u1", 2);
    a.until_others("u1", 2).await;
    b.until_others("u1", 1).await;
    (a, b)
}

/// Says something new on both sides; how long it takes until both know.
async fn right_again(a: &Board, b: &Board, active: u64) -> Duration {
    a.set("u1", active);
    b.set("u1", active + 1);
    let start = Instant::now();
    a.until_others("u1", active + 1).await;
    b.until_others("u1", active).await;
    start.elapsed()
}

/// Waits until both have noticed.
async fn until_trouble(count: usize) {
    eventually("both have noticed", async || (said(WARNING) == count).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_started_again_empty() {
    let mut redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    for round in 1..3 {
        redis.kill();
        until_trouble(2 * round).await;
        // The requests in flight of siblings expire, and no call waits.
        a.until_others("u1", 0).await;
        let start = Instant::now();
        let chain: Vec<u64> = (0..2000).map(|block| block + 10_000 * round as u64).collect();
        (0..100).for_each(|_| a.send("u1", &chain));
        assert!(start.elapsed() < Duration::from_secs(1));
        assert_eq!(a.exchange.lookup(Binding::Session, "x").await, None);
        redis.again().await;
        let took = right_again(&a, &b, 10 * round as u64).await;
        assert!(took < Duration::from_secs(2), "{took:?}");
        b.until_held("u1", &chain, 2000).await;
        eventually("both say so", async || (said(BACK) == 2 * round).then_some(())).await;
    }
    assert_eq!((said(WARNING), said(BACK)), (4, 4), "one word of each kind a balancer a time");
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_for_seconds() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    redis.freeze();
    let start = Instant::now();
    assert_eq!(a.exchange.lookup(Binding::Response, "x").await, None);
    assert!(start.elapsed() < Duration::from_millis(500), "a request waits 50 ms: {:?}", start.elapsed());
    until_trouble(2).await;
    a.until_others("u1", 0).await;
    redis.thaw();
    let took = right_again(&a, &b, 20).await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    eventually("both say so", async || (said(BACK) == 2).then_some(())).await;
    assert_eq!(said(WARNING), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed_and_cut_off() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    for round in 1..5 {
        redis.ask(&["FLUSHALL"]).await;
        right_again(&a, &b, 100 * round).await;
        redis.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
        let took = right_again(&a, &b, 200 * round).await;
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed_after_ids_far_in_the_future() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    for key in ["vllm-lb:{lb}:stream", "vllm-lb:{lb}:chains"] {
        redis.ask(&["XADD", key, "99999999999999-0", "d", "x"]).await;
    }
    let chain: Vec<u64> = (1..20).collect();
    a.send("u1", &chain);
    b.until_held("u1", &chain, 19).await;
    right_again(&a, &b, 10).await;
    redis.ask(&["FLUSHALL"]).await;
    right_again(&a, &b, 20).await;
    let chain: Vec<u64> = (101..120).collect();
    a.send("u1", &chain);
    b.until_held("u1", &chain, 19).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
    until_trouble(2).await;
    a.set("u1", 7);
    redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
    b.until_others("u1", 7).await;
    right_again(&a, &b, 30).await;
    eventually("both say so", async || (said(BACK) == 2).then_some(())).await;
    assert_eq!(said(WARNING), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn not_there_at_the_start_or_with_another_password() {
    let start = Instant::now();
    let nobody = Board::start("redis://127.0.0.1:1", "nobody");
    nobody.exchange.wait_caught_up(PATIENCE).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(nobody.exchange.lookup(Binding::Session, "x").await, None);
    nobody.leave().await;
    let redis = Redis::start(&["--requirepass", "right"]).await;
    let wrong = format!("redis://:hunter2@127.0.0.1:{}", redis.port);
    let a = Board::begun(&wrong, "a").await;
    let none = Board::begun(&redis.url(), "none").await;
    until_trouble(3).await;
    assert!(!logs::all().iter().any(|line| line.contains("hunter2")));
    let right = format!("redis://:right@127.0.0.1:{}", redis.port);
    let b = Board::begun(&right, "b").await;
    b.set("u1", 3);
    redis.ask(&["CONFIG", "SET", "requirepass", "hunter2"]).await;
    a.until_others("u1", 3).await;
    assert_eq!(none.others("u1"), gauges(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_at_the_start() {
    let redis = Redis::start(&[]).await;
    redis.freeze();
    let start = Instant::now();
    let a = Board::start(&redis.url(), "a");
    a.exchange.wait_caught_up(Duration::from_secs(1)).await;
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    redis.thaw();
    let b = Board::begun(&redis.url(), "b").await;
    right_again(&a, &b, 5).await;
}

/// A replica takes the master's place: sentinels tell where it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_is_followed() {
    let mut set = SentinelSet::start().await;
    let url = format!("{}/2", set.url());
    let (a, b) = (Board::begun(&url, "a").await, Board::begun(&url, "b").await);
    right_again(&a, &b, 3).await;
    set.master.kill();
    until_trouble(2).await;
    right_again(&a, &b, 9).await;
    assert_eq!(settings(&url, "a").url.database, 2);
}

/// The ids of the connections that wait for entries of streams.
async fn readers(redis: &Redis) -> Vec<String> {
    let redis::Value::BulkString(list) = redis.ask(&["CLIENT", "LIST"]).await else { panic!("is a text") };
    let list = String::from_utf8(list).expect("is a text");
    let reading = list.lines().filter(|line| line.contains("cmd=xread"));
    reading.filter_map(|line| line.split(' ').next()).map(str::to_string).collect()
}

/// No write is accepted, not even a trim: the readers keep their connections.
#[tokio::test(flavor = "multi_thread")]
async fn without_replicas_that_writes_need() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    let before = readers(&redis).await;
    assert!(!before.is_empty());
    redis.ask(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    until_trouble(2).await;
    // Longer than the interval between two trims.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(readers(&redis).await.iter().any(|id| before.contains(id)), "all readers have connected again");
    redis.ask(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
    right_again(&a, &b, 30).await;
}
