//! Every form of a Redis URL, against a redis-server that wants it.

use std::collections::BTreeSet;
use std::path::Path;

use super::board::{Board, settings};
use crate::common::certs::Certs;
use crate::common::eventually;
use crate::common::ports::reserved_port;
use crate::common::redis::Redis;
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::{RedisTls, SentinelAccess};
use vllm_lb::state::exchange::Binding;

/// Two balancers at this URL know of each other, and find what is kept.
async fn meet(url: &str) {
    let (a, b) = (Board::begun(url, "a").await, Board::begun(url, "b").await);
    a.set("u1", 3);
    b.until_others("u1", 3).await;
    a.bind(Binding::Session, "s", "u1");
    a.put_member("u9", "added");
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
    // By default it is the port of Redis plus 10,000, which is more than there are for a high port.
    let port_of_nodes = reserved_port().to_string();
    let redis = Redis::start(&["--cluster-enabled", "yes", "--cluster-port", &port_of_nodes]).await;
    redis.ask(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    eventually("the cluster is up", async || {
        format!("{:?}", redis.ask(&["CLUSTER", "INFO"]).await).contains("cluster_state:ok").then_some(())
    })
    .await;
    meet(&format!("redis-cluster://127.0.0.1:{}", redis.port)).await;
}

// === access ===

/// The commands of docs/operating.md that make the user of a balancer.
pub fn documented_acl() -> Vec<String> {
    let page = include_str!("../../../../docs/operating.md");
    let line = page.lines().find(|line| line.contains("ACL SETUSER")).expect("the page has the command");
    let words = line.split_whitespace().skip_while(|word| *word != "ACL");
    words.map(|word| word.trim_matches('\'').to_string()).collect()
}

/// The user of the page may do all that balancers do, on their keys, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_user_has_all_rights_that_a_balancer_needs_and_no_other() {
    let redis = Redis::start(&[]).await;
    let acl = documented_acl();
    redis.ask(&acl.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let url = format!("redis://vllm-lb:secret@127.0.0.1:{}", redis.port);
    let (a, b) = (Board::begun(&url, "a").await, Board::begun(&url, "b").await);
    meet(&url).await;
    a.send("u1", &[1, 2, 3]);
    b.until_held("u1", &[1, 2, 3], 3).await;
    // A list that was lost is restored.
    a.put_member("u8", "drained");
    b.until_member("u8", Some("drained")).await;
    redis.ask(&["FLUSHALL"]).await;
    eventually("the list is restored", async || {
        (redis.count(&["HLEN", "vllm-lb:{lb}:members"]).await == 2).then_some(())
    })
    .await;
    let denied = format!("{:?}", redis.ask(&["ACL", "LOG"]).await);
    assert!(!denied.contains("vllm-lb"), "{denied}");
    for command in [&["GET", "other:key"][..], &["KEYS", "*"], &["FLUSHALL"], &["CONFIG", "GET", "*"]] {
        let words = [&["ACL", "DRYRUN", "vllm-lb"], command].concat();
        let answer = format!("{:?}", redis.ask(&words).await);
        assert!(answer.contains("no permissions") || answer.contains("permission"), "{command:?}: {answer}");
    }
    // The doctor reads the version, the role and the memory of Redis with it.
    let answer = redis.ask(&["ACL", "DRYRUN", "vllm-lb", "INFO", "everything"]).await;
    assert_eq!(answer, redis::Value::Okay);
}

/// Regression: the user of the compose file could not read the list of members, so that the first run-time
/// change stopped the exchange of its balancers.
#[test]
fn the_user_of_the_compose_file_has_the_documented_rights() {
    let rights = |words: &[String]| -> BTreeSet<String> {
        words.iter().filter(|word| word.starts_with(['+', '-', '~', '&'])).cloned().collect()
    };
    let file = include_str!("../../../../docker/compose.yaml");
    let lines = file.lines().map(str::trim).skip_while(|line| *line != r#"- "resetkeys""#);
    let items =
        lines.map_while(|line| line.strip_prefix("- ")).map(|item| item.trim_matches('"').to_string());
    assert_eq!(rights(&items.collect::<Vec<_>>()), rights(&documented_acl()));
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A Redis that asks for certificates gets this balancer's.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_the_balancer() {
    let (certs, others) = (Certs::new(), Certs::new());
    let files = certs.listen();
    let (certificate, key) = (shown(&files.certificate), shown(&files.key));
    let (ca, port) = (shown(&certs.authority()), reserved_port().to_string());
    let tls = ["--tls-port", &port, "--tls-cert-file", &certificate, "--tls-key-file", &key];
    let client = ["--tls-ca-cert-file", &ca, "--tls-auth-clients", "yes"];
    let _redis = Redis::start(&[&tls[..], &client[..]].concat()).await;
    let with = |tls: RedisTls| {
        let mut settings = settings(&format!("rediss://localhost:{port}"), "a");
        settings.options.tls = tls;
        Board::with(settings)
    };
    let files_of = |certs: &Certs, ca: &Certs| RedisTls {
        ca: Some(ca.authority()),
        certificate: Some(certs.listen().certificate),
        key: Some(certs.listen().key),
    };
    let (a, b) = (with(files_of(&certs, &certs)), with(files_of(&certs, &certs)));
    a.set("u1", 3);
    b.until_others("u1", 3).await;
    assert!(b.exchange.works());
    // Without a certificate, with one of another authority, and with a Redis that is not to be trusted.
    let none = RedisTls { ca: Some(certs.authority()), ..RedisTls::default() };
    for tls in [none, files_of(&others, &certs), files_of(&certs, &others)] {
        let refused = with(tls.clone());
        refused.exchange.wait_caught_up(crate::common::PATIENCE).await;
        assert!(!refused.exchange.works(), "{tls:?}");
        assert_eq!(refused.others("u1").active, 0);
    }
}

/// Sentinels have a password of their own.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_of_the_sentinels() {
    let master = Redis::start(&["--requirepass", "of-redis"]).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("sentinel.conf");
    let text =
        format!("sentinel monitor main 127.0.0.1 {} 1\nsentinel auth-pass main of-redis\n", master.port);
    std::fs::write(&file, text).expect("the folder can be written");
    let sentinel = Redis::start(&[&shown(&file), "--sentinel", "--requirepass", "of-sentinel"]).await;
    let with = |password: &str| {
        let url = format!("redis+sentinel://:of-redis@127.0.0.1:{}/main", sentinel.port);
        let mut settings = settings(&url, "a");
        settings.options.sentinel = SentinelAccess { user: None, password: Some(Secret::new(password)) };
        Board::with(settings)
    };
    let (a, b) = (with("of-sentinel"), with("of-sentinel"));
    a.set("u1", 3);
    b.until_others("u1", 3).await;
    let refused = with("of-redis");
    refused.exchange.wait_caught_up(crate::common::PATIENCE).await;
    assert!(!refused.exchange.works());
}
