//! What the exchange keeps in Redis is bounded, and a Redis without memory is used as far as it goes.

use std::time::Duration;

use super::board::{Board, options, settings};
use super::{chain, found};
use crate::common::redis::Redis;
use crate::common::{PATIENCE, eventually, logs};
use vllm_lb::config::types::RedisOptions;
use vllm_lb::state::exchange::Binding;
use vllm_lb::state::redis::ExchangeSettings;

const FULL: [&str; 4] = ["--maxmemory", "3mb", "--maxmemory-policy", "noeviction"];

async fn pair(redis: &Redis) -> (Board, Board) {
    (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_fills_up_is_trimmed_and_goes_on() {
    let redis = Redis::start(&FULL).await;
    let (a, b) = pair(&redis).await;
    // Several times what fits. Gauges are shared all the time.
    for round in 1..=25 {
        for number in 0..25 {
            a.send("u1", &chain(100 * round + number, 16_000));
        }
        a.set("u1", round);
        b.until_others("u1", round).await;
    }
    b.set("u2", 7);
    a.until_others("u2", 7).await;
    // Afterwards the exchange is whole.
    a.send("u1", &chain(1, 30));
    b.until_held("u1", &chain(1, 30), 30).await;
    b.send("u1", &chain(1, 40));
    a.until_held("u1", &chain(1, 40), 40).await;
    a.put_member("u9", "added");
    b.until_member("u9", Some("added")).await;
    let warnings = logs::all().iter().filter(|line| line.contains("redis is out of memory,")).count();
    assert!((1..=2).contains(&warnings), "{warnings} warnings of two balancers");
    assert!(a.exchange.works() && b.exchange.works());
}

/// Regression: a balancer with a change that Redis had no memory for did not read the changes of siblings.
#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_that_starts_with_a_full_redis_reads_the_changes_of_siblings() {
    let redis = Redis::start(&["--maxmemory-policy", "noeviction"]).await;
    let known = Board::begun(&redis.url(), "known").await;
    known.put_member("u1", "drained");
    eventually("the change is written", async || {
        (redis.count(&["EXISTS", "vllm-lb:{lb}:mark"]).await == 1).then_some(())
    })
    .await;
    redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let late = Board::start(&redis.url(), "late");
    late.put_member("u2", "added");
    late.until_member("u1", Some("drained")).await;
    assert_eq!(late.exchange.members()["u2"], "added");
    assert!(!late.exchange.shares_members() && !known.exchange.members().contains_key("u2"));
    redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
    known.until_member("u2", Some("added")).await;
    eventually("late shares", async || late.exchange.shares_members().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_responses_do_not_fill_redis() {
    let redis = Redis::start(&FULL).await;
    let (a, b) = pair(&redis).await;
    for round in 1..=30 {
        for number in 0..1_000 {
            a.bind(Binding::Response, &format!("a response with a long name {round} {number}"), "u1");
        }
        a.set("u1", round);
        b.until_others("u1", round).await;
    }
    a.bind(Binding::Response, "last", "u2");
    eventually("the last one is stored", async || {
        (b.exchange.lookup(Binding::Response, "last").await == found("u2")).then_some(())
    })
    .await;
    // Every key is in the list from which the oldest are removed; some are there twice, as their message was
    // repeated.
    let keys = redis.count(&["DBSIZE"]).await;
    let listed = redis.count(&["XLEN", "vllm-lb:{lb}:stored"]).await;
    assert!(keys < 20_000 && listed + 10 > keys, "{keys} keys, {listed} in the list");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_trimmed_by_size_and_by_age() {
    let redis = Redis::start(&[]).await;
    let options = RedisOptions { stream_bytes: 512 << 10, stream_age: Duration::from_secs(3), ..options() };
    let small = |name: &str| ExchangeSettings { options: options.clone(), ..settings(&redis.url(), name) };
    let (a, b) = (Board::with(small("a")), Board::with(small("b")));
    b.exchange.wait_caught_up(PATIENCE).await;
    let stream = "vllm-lb:{lb}:chains";
    for number in 0..80 {
        a.send("u1", &chain(number, 2_000));
        b.until_held("u1", &chain(number, 2_000), 2_000).await;
    }
    eventually("only half a megabyte is kept", async || {
        let bytes = redis.count(&["MEMORY", "USAGE", stream, "SAMPLES", "0"]).await;
        (bytes < 700 << 10).then_some(())
    })
    .await;
    assert!(redis.count(&["XLEN", stream]).await > 5, "not more than needed is removed");
    eventually("old messages are removed", async || {
        (redis.count(&["XLEN", stream]).await <= 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_lost_message_are_published_again() {
    let mut redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    redis.freeze();
    for number in 0..20 {
        a.bind(Binding::Session, &format!("session {number}"), "u1");
        a.send("u1", &chain(number, 5));
        // At most one of the messages is on its way when Redis is lost.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    redis.kill();
    redis.again().await;
    eventually("all bindings are there", async || (b.bound().len() >= 20).then_some(())).await;
    for number in 0..20 {
        b.until_held("u1", &chain(number, 5), 5).await;
    }
}
