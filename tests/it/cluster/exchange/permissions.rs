//! Users of Redis that lack a permission: what they may do goes on.

use std::time::Instant;

use super::board::Board;
use super::chain;
use super::forms::documented_acl;
use crate::common::redis::Redis;
use crate::common::{eventually, logs};
use vllm_lb::state::exchange::Binding;

const DENIED: &str = "redis does not permit sharing changes of upstreams, all else is shared";
const GRANTED: &str = "redis permits sharing changes of upstreams again";

fn said(message: &str) -> Vec<String> {
    logs::all().into_iter().filter(|line| line.contains(message)).collect()
}

/// Makes the user of the documents, without a command.
async fn user_without(redis: &Redis, command: &str) -> String {
    let mut acl = documented_acl();
    acl.push(format!("-{command}"));
    redis.ask(&acl.iter().map(String::as_str).collect::<Vec<_>>()).await;
    format!("redis://vllm-lb:secret@127.0.0.1:{}", redis.port)
}

/// Shares something of each kind but a change of an upstream, with numbers that no other round has.
pub(super) async fn share_all_else(a: &Board, b: &Board, round: u64) {
    a.set("u1", round);
    b.until_others("u1", round).await;
    b.send("u1", &chain(round, 5));
    a.until_held("u1", &chain(round, 5), 5).await;
    let key = format!("response {round}");
    a.bind(Binding::Response, &key, "u1");
    eventually("the binding is stored", async || b.exchange.lookup(Binding::Response, &key).await).await;
}

async fn all_but_the_list_is_shared_without(command: &str) {
    let redis = Redis::start(&[]).await;
    let url = user_without(&redis, command).await;
    let (a, b) = (Board::begun(&url, "a").await, Board::begun(&url, "b").await);
    share_all_else(&a, &b, 1).await;
    eventually("the empty list is shared", async || a.exchange.shares_members().then_some(())).await;
    a.put_member("u1", "drained");
    eventually("the permission is missed", async || (!a.exchange.shares_members()).then_some(())).await;
    for round in 2..6 {
        share_all_else(&a, &b, round).await;
    }
    assert!(a.exchange.works() && b.exchange.works());
    assert!(!b.exchange.members().contains_key("u1"), "without {command}");
    redis.ask(&["ACL", "SETUSER", "vllm-lb", &format!("+{command}")]).await;
    b.until_member("u1", Some("drained")).await;
    eventually("both share again", async || {
        (a.exchange.shares_members() && b.exchange.shares_members()).then_some(())
    })
    .await;
    share_all_else(&a, &b, 6).await;
    let warnings = said(DENIED);
    assert!((1..=2).contains(&warnings.len()), "one of each balancer at most: {warnings:?}");
    assert!(warnings.iter().all(|line| line.contains(&format!("'{command}'"))), "{warnings:?}");
    assert_eq!(said(GRANTED).len(), warnings.len());
}

/// Regression: the exchange stopped with the first change of an upstream, for all that it shares.
#[tokio::test(flavor = "multi_thread")]
async fn all_but_the_list_is_shared_by_a_user_that_may_not_read_it() {
    all_but_the_list_is_shared_without("hscan").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_but_the_list_is_shared_by_a_user_that_may_not_write_it() {
    all_but_the_list_is_shared_without("hset").await;
}

/// The right is missing from the start, and so nothing of the list is known.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_was_never_read_is_read_when_that_is_permitted() {
    let redis = Redis::start(&[]).await;
    let known = Board::begun(&redis.url(), "known").await;
    known.put_member("u1", "drained");
    eventually("the change is written", async || {
        (redis.count(&["EXISTS", "vllm-lb:{lb}:mark"]).await == 1).then_some(())
    })
    .await;
    let late = Board::begun(&user_without(&redis, "hlen").await, "late").await;
    share_all_else(&known, &late, 1).await;
    assert!(late.exchange.works() && !late.exchange.shares_members());
    redis.ask(&["ACL", "SETUSER", "vllm-lb", "+hlen"]).await;
    late.until_member("u1", Some("drained")).await;
    assert!(late.exchange.shares_members());
}

/// Regression: a balancer that could not write a change did not read the changes of its siblings either.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_that_may_not_write_the_list_reads_it() {
    let redis = Redis::start(&[]).await;
    let a = Board::begun(&user_without(&redis, "hset").await, "a").await;
    let b = Board::begun(&redis.url(), "b").await;
    eventually("the empty list is shared", async || a.exchange.shares_members().then_some(())).await;
    let (start, first) = (Instant::now(), redis.rejected("hset").await);
    for name in ["u1", "u2"] {
        a.put_member(name, "changed by a");
    }
    eventually("the permission is missed", async || (!a.exchange.shares_members()).then_some(())).await;
    for name in ["u3", "u4"] {
        b.put_member(name, "changed by b");
        a.until_member(name, Some("changed by b")).await;
    }
    for name in ["u1", "u2"] {
        a.until_member(name, Some("changed by a")).await;
        assert!(!b.exchange.members().contains_key(name), "it waits");
    }
    // Without another change the list is read no more, and writing is tried from time to time only.
    let reads = redis.calls("hscan").await;
    for round in 1..6 {
        share_all_else(&a, &b, round).await;
    }
    assert_eq!(redis.calls("hscan").await, reads);
    let tries = redis.rejected("hset").await - first;
    assert!(tries <= 2 * (2 + start.elapsed().as_secs() as i64 / 5), "{tries} tries of two records");
    assert!(a.exchange.works() && !a.exchange.shares_members());
    // The newer change of an upstream counts.
    b.put_member("u1", "changed by b");
    a.until_member("u1", Some("changed by b")).await;
    assert_eq!((said(DENIED).len(), said(GRANTED).len()), (1, 0));
    redis.ask(&["ACL", "SETUSER", "vllm-lb", "+hset"]).await;
    b.until_member("u2", Some("changed by a")).await;
    eventually("a shares again", async || a.exchange.shares_members().then_some(())).await;
    assert_eq!((a.exchange.members(), said(GRANTED).len()), (b.exchange.members(), 1));
}

/// The records of this balancer cannot be written from its start on.
#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_that_starts_with_unwritten_changes_reads_the_list_without_the_right_to_write() {
    let redis = Redis::start(&[]).await;
    let known = Board::begun(&redis.url(), "known").await;
    known.put_member("u1", "drained");
    eventually("the change is written", async || {
        (redis.count(&["EXISTS", "vllm-lb:{lb}:mark"]).await == 1).then_some(())
    })
    .await;
    let url = user_without(&redis, "hset").await;
    let late = Board::start(&url, "late");
    late.put_member("u2", "added");
    late.until_member("u1", Some("drained")).await;
    assert_eq!(late.exchange.members()["u2"], "added");
    assert!(!late.exchange.shares_members() && !known.exchange.members().contains_key("u2"));
}
