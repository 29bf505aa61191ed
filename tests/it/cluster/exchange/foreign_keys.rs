//! Other programs write to the keys of the balancers: the exchange goes on, and what they wrote can be
//! removed.

use std::time::Duration;

use redis::Value;

use super::board::Board;
use super::chain;
use super::permissions::share_all_else;
use crate::common::redis::Redis;
use crate::common::{eventually, logs};
use vllm_lb::state::exchange::Message;
use vllm_lb::state::members::MAX_MEMBERS;

const STREAM: &str = "vllm-lb:{lb}:stream";
const CHAINS: &str = "vllm-lb:{lb}:chains";
const STORED: &str = "vllm-lb:{lb}:stored";
const MEMBERS: &str = "vllm-lb:{lb}:members";
const MARK: &str = "vllm-lb:{lb}:mark";
const REPAIR: &str = "vllm-lb:{lb}:repair";

const RENAMED: &str = "renamed a key in redis that is not the balancers'";

async fn pair(redis: &Redis) -> (Board, Board) {
    (Board::begun(&redis.url(), "a").await, Board::begun(&redis.url(), "b").await)
}

fn said(message: &str) -> usize {
    logs::all().iter().filter(|line| line.contains(message)).count()
}

/// Exchanges something of each kind, with numbers that no other round has.
async fn exchange_all(a: &Board, b: &Board, round: u64) {
    share_all_else(a, b, round).await;
    let text = format!("round {round}");
    b.put_member("u1", &text);
    a.until_member("u1", Some(&text)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_type_is_renamed() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    exchange_all(&a, &b, 1).await;
    for (round, key) in (2..).zip([STREAM, CHAINS, STORED, MEMBERS, MARK]) {
        redis.ask(&["DEL", key]).await;
        redis.ask(&["LPUSH", key, "of another program"]).await;
        exchange_all(&a, &b, round).await;
        let aside = format!("{key}:aside");
        eventually("the key is renamed", async || {
            (redis.ask(&["LRANGE", &aside, "0", "9"]).await
                == Value::Array(vec![Value::BulkString(b"of another program".to_vec())]))
            .then_some(())
        })
        .await;
        assert_eq!(said(RENAMED), round as usize - 1, "one of the two renames it");
    }
    // The lost list of members was restored with all that the balancers know.
    assert_eq!(redis.count(&["HLEN", MEMBERS]).await, 1);
    // Once more: the renamed key is replaced.
    redis.ask(&["SET", STREAM, "again"]).await;
    exchange_all(&a, &b, 20).await;
    assert_eq!(redis.ask(&["GET", "vllm-lb:{lb}:stream:aside"]).await, Value::BulkString(b"again".to_vec()));
}

/// Regression: a key in place of the turn to repair kept all balancers from it for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_key_of_the_turn_to_repair_is_renamed() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    exchange_all(&a, &b, 1).await;
    redis.ask(&["LPUSH", REPAIR, "of another program"]).await;
    redis.ask(&["SET", STREAM, "no stream"]).await;
    exchange_all(&a, &b, 2).await;
    assert_eq!(redis.count(&["LLEN", &format!("{REPAIR}:aside")]).await, 1);
    // Of the type of a turn, but without an end.
    redis.ask(&["SET", REPAIR, "of another program"]).await;
    redis.ask(&["SET", STREAM, "no stream"]).await;
    exchange_all(&a, &b, 3).await;
    let aside = redis.ask(&["GET", &format!("{REPAIR}:aside")]).await;
    assert_eq!(aside, Value::BulkString(b"of another program".to_vec()));
    assert_eq!((said(RENAMED), redis.count(&["EXISTS", REPAIR]).await), (4, 0), "each key once");
}

/// Two balancers may repair at once, where another program replaces the key of the turn meanwhile: then the
/// second one renames keys that are the balancers'. That is no more than a loss of these keys.
#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_key_of_the_balancers_is_made_anew() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    a.put_member("u2", "added");
    exchange_all(&a, &b, 1).await;
    b.until_member("u2", Some("added")).await;
    // A balancer that ends in between leaves the mark beside a list that it has renamed.
    for (round, key) in (2..).zip([STREAM, CHAINS, STORED, MEMBERS, MARK]) {
        redis.ask(&["RENAME", key, &format!("{key}:aside")]).await;
        exchange_all(&a, &b, round).await;
    }
    eventually("the list is whole", async || (redis.count(&["HLEN", MEMBERS]).await == 2).then_some(()))
        .await;
    assert_eq!(a.exchange.members(), b.exchange.members());
    assert_eq!(said(RENAMED), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_a_further_id_is_renamed() {
    const LAST: &str = "18446744073709551615-18446744073709551615";
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    for (round, key) in (1..).zip([STREAM, CHAINS, STORED]) {
        redis.ask(&["XADD", key, LAST, "d", "x"]).await;
        exchange_all(&a, &b, round).await;
    }
    assert_eq!(said(RENAMED), 3);
    // Also where the entry itself is gone.
    redis.ask(&["XADD", STREAM, LAST, "d", "x"]).await;
    redis.ask(&["XDEL", STREAM, LAST]).await;
    exchange_all(&a, &b, 9).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_of_other_programs_can_be_removed_from_the_list() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    a.put_member("u1", "added");
    b.until_member("u1", Some("added")).await;
    redis.ask(&["HSET", MEMBERS, "garbage", "nonsense", "ahead", "9999999999999999999 {}"]).await;
    redis.ask(&["SET", MARK, "another"]).await;
    for board in [&a, &b] {
        board.until_member("garbage", Some("nonsense")).await;
    }
    redis.ask(&["HDEL", MEMBERS, "garbage", "ahead", "u1"]).await;
    redis.ask(&["SET", MARK, "yet another"]).await;
    for board in [&a, &b] {
        board.until_member("garbage", None).await;
        board.until_member("ahead", None).await;
    }
    eventually("the balancers' own record is restored", async || {
        (redis.count(&["HLEN", MEMBERS]).await == 1).then_some(())
    })
    .await;
    b.put_member("u2", "added");
    a.until_member("u2", Some("added")).await;
    assert_eq!(redis.count(&["HEXISTS", MEMBERS, "garbage"]).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_any_length_is_read_in_pages_up_to_a_limit() {
    const NAMES: usize = 50_000;
    let redis = Redis::start(&[]).await;
    let fill = format!("for n = 1, {NAMES} do redis.call('HSET', KEYS[1], n, ARGV[1]) end");
    redis.ask(&["EVAL", &fill, "1", MEMBERS, r#"1 {"drain": true}"#]).await;
    redis.ask(&["SET", MARK, "another"]).await;
    let a = Board::begun(&redis.url(), "a").await;
    eventually("the list is reported", async || {
        (said("the list of changed upstreams is full, further names are ignored") == 1).then_some(())
    })
    .await;
    let known = a.exchange.members().len();
    assert!((MAX_MEMBERS / 2..=MAX_MEMBERS).contains(&known), "{known} names");
    assert!(said(&format!("names={NAMES}")) == 1);
    let pages = redis.calls("hscan").await;
    assert!((2..=30).contains(&pages), "{pages} pages");
    assert_eq!(redis.calls("hgetall").await, 0);
    // Nothing that was not read is taken for lost.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!a.exchange.member_list().has_unwritten());
}

/// The messages in the stream of chains with chains that are taken back.
async fn take_backs(redis: &Redis) -> Vec<Vec<u8>> {
    let entries = redis.ask(&["XRANGE", CHAINS, "-", "+"]).await;
    let bytes = entries.as_sequence().into_iter().flatten().filter_map(|entry| {
        match entry.as_sequence()?.get(1)?.as_sequence()?.get(1)? {
            Value::BulkString(bytes) => Some(bytes.clone()),
            _ => None,
        }
    });
    bytes.filter(|bytes| Message::decode(bytes).is_ok_and(|message| !message.take_backs.is_empty())).collect()
}

/// Redis executes commands of a connection that was closed without an answer: then the message of a take-back
/// is in the stream twice. The request of another balancer still claims the blocks.
#[tokio::test(flavor = "multi_thread")]
async fn a_take_back_that_was_published_twice_is_applied_once() {
    let redis = Redis::start(&[]).await;
    let (a, b) = pair(&redis).await;
    let c = Board::begun(&redis.url(), "c").await;
    a.send("u1", &chain(1, 5));
    for board in [&b, &c] {
        board.until_held("u1", &chain(1, 5), 5).await;
    }
    c.send("u1", &chain(1, 5));
    c.send("u1", &chain(2, 5));
    b.until_held("u1", &chain(2, 5), 5).await;
    redis.freeze();
    a.take_back("u1", &chain(1, 5));
    let failing = "redis does not work, routing goes on from local memory";
    eventually("all have noticed", async || (said(failing) == 3).then_some(())).await;
    redis.thaw();
    let published = async || Some(take_backs(&redis).await).filter(|copies| !copies.is_empty());
    let first = eventually("the take-back is published", published).await[0].clone();
    a.send("u1", &chain(3, 5));
    b.until_held("u1", &chain(3, 5), 5).await;
    let copies = take_backs(&redis).await;
    assert!(copies.iter().all(|copy| *copy == first), "both have one sequence");
    if copies.len() == 1 {
        // The balancer had noticed the failure before it published.
        redis.add(CHAINS, &first).await;
        a.send("u1", &chain(4, 5));
        b.until_held("u1", &chain(4, 5), 5).await;
    }
    assert_eq!(b.held("u1", &chain(1, 5)), 5, "the claim of c is left");
    // A take-back of its own message releases that claim.
    c.take_back("u1", &chain(1, 5));
    b.until_held("u1", &chain(1, 5), 0).await;
}
