//! Every form of a Redis URL, against a redis-server that wants it.

use super::board::Board;
use crate::common::eventually;
use crate::common::redis::Redis;
use vllm_lb::state::exchange::Binding;

/// Two balancers at this URL know of each other, and find what is kept.
async fn meet(url: &str) {
    let (a, b) = (Board::begun(url, "a").await, Board::begun(url, "b").await);
    a.set("u1", 3);
    b.until_others("u1", 3).await;
    a.bind(Binding::Session, "s", "u1");
    a.exchange.put_member("u9", "added".into());
    b.until_member("u9", Some("added")).await;
    eventually("the session is kept", async || b.exchange.lookup(Binding::Session, "s").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_passwords_users_and_databases() {
    let redis = Redis::start(&["--requirepass", "pass word/@"]).await;
    let port = redis.port;
    meet(&format!("redis://:pass word/@@127.0.0.1:{port}/3")).await;
    meet(&format!("redis://default:pass%20word%2F%40@localhost:{port}")).await;
    meet(&format!("unix://:pass%20word%2F%40@{}?db=5", redis.socket())).await;
    redis.ask(&["ACL", "SETUSER", "lb", "on", ">secret", "~vllm-lb:*", "+@all", "-@dangerous"]).await;
    meet(&format!("redis://lb:secret@127.0.0.1:{port}/7")).await;
    let keyspace = format!("{:?}", redis.ask(&["INFO", "keyspace"]).await);
    for database in ["db0", "db3", "db5", "db7"] {
        assert!(keyspace.contains(database), "{database}: {keyspace}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_prefix_separates_deployments() {
    let redis = Redis::start(&[]).await;
    let mut other = super::board::settings(&redis.url(), "other");
    other.options.prefix = "other:".into();
    let (a, other) = (Board::begun(&redis.url(), "a").await, Board::with(other));
    meet(&redis.url()).await;
    a.until_siblings(2).await;
    eventually("it says something", async || {
        (redis.count(&["EXISTS", "other:{lb}:stream"]).await == 1).then_some(())
    })
    .await;
    assert!(other.exchange.rows().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster() {
    let redis = Redis::start(&["--cluster-enabled", "yes"]).await;
    redis.ask(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    eventually("the cluster is up", async || {
        format!("{:?}", redis.ask(&["CLUSTER", "INFO"]).await).contains("cluster_state:ok").then_some(())
    })
    .await;
    meet(&format!("redis-cluster://127.0.0.1:{}", redis.port)).await;
}
