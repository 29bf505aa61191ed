//! A change of membership moves the sessions of the upstream that goes, and no other.

use super::files::{ListFolder, list};
use super::names::{engines_at, lookup};
use super::*;
use crate::common::dns::DnsServer;
use crate::session_turns::{moved, turn};

/// Over a source of these engines; `say` makes it name some of them.
async fn check_sessions(source: DiscoverySource, engines: &[EngineServer], say: impl Fn(&[EngineServer])) {
    say(&engines[..3]);
    let mut config = asking([source]);
    config.expose = true;
    let balancer = Balancer::start(config).await;
    until_ready(&balancer, &engines[..3]).await;
    let first = turn(&balancer, 0).await;
    let used: std::collections::BTreeSet<&String> = first.iter().collect();
    assert_eq!(used.len(), 3, "the sessions are spread: {first:?}");
    assert_eq!(moved(&first, &turn(&balancer, 2).await, ""), Vec::<usize>::new());
    say(engines);
    until_ready(&balancer, engines).await;
    let added = turn(&balancer, 4).await;
    assert_eq!(moved(&first, &added, ""), Vec::<usize>::new(), "one more moves none");
    say(&engines[1..]);
    until_ready(&balancer, &engines[1..]).await;
    let gone = name(&engines[0]);
    let removed = turn(&balancer, 6).await;
    assert_eq!(moved(&added, &removed, &gone), Vec::<usize>::new(), "one less moves its own");
    assert!(!removed.contains(&gone));
    assert!(added.contains(&gone), "there was something to move");
    // And where they went they stay.
    say(engines);
    until_ready(&balancer, engines).await;
    assert_eq!(moved(&removed, &turn(&balancer, 8).await, ""), Vec::<usize>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_stay_when_a_file_changes() {
    let (folder, engines) = (ListFolder::new(), engines(4).await);
    check_sessions(folder.source(), &engines, |some| folder.replace(&list(some))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_stay_when_a_name_changes() {
    let (server, (port, engines)) = (DnsServer::start().await, engines_at(17, 4).await);
    let source = lookup(&server, &format!("http://vllm.test.:{port}"));
    check_sessions(source, &engines, |some| {
        let addresses: Vec<String> = some.iter().map(|engine| engine.address().ip().to_string()).collect();
        // The order of an answer changes with every one.
        let turned = addresses.iter().rev().map(String::as_str);
        server.set_addresses("vllm.test", 1, turned);
    })
    .await;
}
