//! `vllm-lb doctor` over a real Redis with one fault, and over Sentinel.

use crate::common::doctor::{EngineProcess, file, visit};
use crate::common::ports::reserved_port;
use crate::common::redis::Redis;
use crate::common::sentinel::SentinelSet;

/// The findings about a Redis, and the exit code.
async fn findings(url: &str) -> (Vec<String>, Option<i32>) {
    let engine = EngineProcess::start(&[]).await;
    let file = file(&format!("upstreams: ['{}']\nredis: '{url}'", engine.url));
    let visit = visit(&["-c", &file.path().display().to_string(), "--json", "--request"]).await;
    assert!(!visit.text.contains("hunter2"), "{}", visit.text);
    let found = visit.findings();
    assert!(found.iter().all(|(subject, _)| subject == "redis"), "{found:?}");
    (found.into_iter().map(|(_, code)| code).collect(), visit.code)
}

fn one(code: &str, exit: i32) -> (Vec<String>, Option<i32>) {
    (vec![code.to_string()], Some(exit))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_redis_gives_no_finding() {
    let redis = Redis::start(&["--maxmemory", "256mb"]).await;
    assert_eq!(findings(&redis.url()).await, (vec![], Some(0)));
    assert_eq!(findings(&format!("unix://{}", redis.socket())).await, (vec![], Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_cannot_be_used_gives_an_error() {
    let nowhere = format!("redis://:hunter2@127.0.0.1:{}", reserved_port());
    assert_eq!(findings(&nowhere).await, one("redis_unreachable", 1));
    let redis = Redis::start(&["--requirepass", "hunter2"]).await;
    assert_eq!(findings(&redis.url()).await, one("redis_password", 1));
    let with = |password: &str| redis.url().replace("redis://", &format!("redis://:{password}@"));
    assert_eq!(findings(&with("hunter2x")).await, one("redis_password", 1));
    assert_eq!(findings(&with("hunter2")).await, (vec![], Some(0)));
    let replica = Redis::start(&[]).await;
    replica.set_read_only().await;
    assert_eq!(findings(&replica.url()).await, one("redis_replica", 1));
    let frozen = Redis::start(&[]).await;
    frozen.freeze();
    assert_eq!(findings(&frozen.url()).await, one("redis_unreachable", 1));
    frozen.thaw();
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_permissions_of_redis_give_findings() {
    let evicts = Redis::start(&["--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru"]).await;
    assert_eq!(findings(&evicts.url()).await, one("redis_evicts", 0));
    let small = Redis::start(&["--maxmemory", "100mb"]).await;
    assert_eq!(findings(&small.url()).await, one("redis_memory", 0));
    let strict = Redis::start(&[]).await;
    strict.ask(&["ACL", "SETUSER", "lb", "on", ">hunter2", "~*", "+@all", "-info"]).await;
    let url = strict.url().replace("redis://", "redis://lb:hunter2@");
    assert_eq!(findings(&url).await, one("redis_info_refused", 0));
}

/// The master that the Sentinel names is asked, also behind a failover.
#[tokio::test(flavor = "multi_thread")]
async fn the_master_that_sentinel_names_is_examined() {
    let mut set = SentinelSet::start().await;
    assert_eq!(findings(&set.url()).await, (vec![], Some(0)));
    let other = set.url().replace("/main", "/other");
    assert_eq!(findings(&other).await, one("redis_unreachable", 1), "the Sentinel knows no such master");
    set.master.ask(&["CONFIG", "SET", "maxmemory", "256mb"]).await;
    set.master.ask(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    assert_eq!(findings(&set.url()).await, one("redis_evicts", 0));
    set.fail_over().await;
    assert_eq!(findings(&set.url()).await, (vec![], Some(0)), "the new master does not evict");
    set.sentinel.kill();
    assert_eq!(findings(&set.url()).await, one("redis_unreachable", 1));
}
