//! The comparison of a restarted balancer's file with the one before.

use super::board::{Board, settings};
use crate::common::eventually;
use crate::common::redis::Redis;
use vllm_lb::config::types::UpstreamConfig;
use vllm_lb::config::url;
use vllm_lb::state::redis::ExchangeSettings;

const MEMBERS: &str = "vllm-lb:{lb}:members";
const ENTRIES: &str = "vllm-lb:{lb}:file:a@:8000";
const DRAINED: &str = r#"{"drain": true}"#;

/// A balancer with this name, whose file has one upstream of this weight.
fn board(redis: &Redis, weight: f64) -> Board {
    let identity = Some("a@:8000".to_string());
    let board = Board::with(ExchangeSettings { identity, ..settings(&redis.url(), "a") });
    let upstream = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
    board.exchange.member_list().set_entries(&[UpstreamConfig { weight, ..upstream }]);
    board
}

async fn text(redis: &Redis, command: &[&str]) -> String {
    format!("{:?}", redis.ask(command).await)
}

/// Regression: a balancer that had something to write, and could not, never compared its file.
#[tokio::test(flavor = "multi_thread")]
async fn files_are_compared_once_redis_accepts_writes() {
    let redis = Redis::start(&[]).await;
    let before = board(&redis, 1.0);
    before.put_member("gpu:1", DRAINED);
    eventually("the change and the file are stored", async || {
        let exists = redis.count(&["EXISTS", MEMBERS, ENTRIES]).await;
        (exists == 2).then_some(())
    })
    .await;
    before.leave().await;
    let stored = text(&redis, &["GET", ENTRIES]).await;
    redis.ask(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    // So that a change waits before the first connection.
    redis.freeze();
    let after = board(&redis, 2.0);
    after.put_member("gpu:2", DRAINED);
    redis.thaw();
    after.exchange.wait_caught_up(crate::common::PATIENCE).await;
    assert_eq!(text(&redis, &["GET", ENTRIES]).await, stored);
    redis.ask(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
    eventually("the change that is older than the file has ended", async || {
        let members = after.exchange.members();
        let ended = members.get("gpu:1").is_some_and(|text| text != DRAINED);
        (ended && members.get("gpu:2").is_some_and(|text| text == DRAINED)).then_some(())
    })
    .await;
    eventually("the new file is stored", async || {
        (text(&redis, &["GET", ENTRIES]).await != stored).then_some(())
    })
    .await;
}
