//! A fleet of balancers that hash prompts in two ways, or of two releases: they share their load, and ignore
//! each other's chains.

use std::time::Duration;

use super::board::{Board, settings};
use super::chain;
use crate::common::body::stream;
use crate::common::process::{Process, Setup};
use crate::common::redis::Redis;
use crate::common::wire::{Wire, post};
use crate::common::{Balancer, config, eventually, logs, paced, upstreams};
use serde_json::Value;
use vllm_lb::config::redis;
use vllm_lb::fleet::upstream::UpstreamLoad;
use vllm_lb::state::exchange::{Binding, SiblingLoad, fingerprint};
use vllm_lb::state::redis::ExchangeSettings;

const STREAM: &str = "vllm-lb:{lb}:stream";

const WARNING: &str = "ignores the chains of a sibling with another block_bytes or release";

const FOREIGN: &str = "vllm_lb_exchange_lost_total{what=\"foreign\"}";

fn warnings() -> Vec<String> {
    logs::all().into_iter().filter(|line| line.starts_with("WARN") && line.contains(WARNING)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn balancers_with_other_blocks_share_their_load_and_no_chains() {
    let (redis, engines) = (Redis::start(&[]).await, [paced(Duration::from_millis(20)).await]);
    let start = async |block_bytes: usize| {
        let mut config = config(upstreams(&engines));
        config.redis = Some(redis::url(&redis.url()).expect("is a URL"));
        config.index.block_bytes = block_bytes;
        Balancer::ready(config).await
    };
    let balancers = [start(512).await, start(256).await];
    let siblings = |balancer: &Balancer| {
        let snapshot = balancer.running.fleet.snapshot();
        snapshot.entries[0].upstream.siblings()
    };
    let mut clients = Vec::new();
    for balancer in &balancers {
        let mut client = balancer.client().await;
        client.send(post("/v1/chat/completions", stream("sim", 2000))).await;
        clients.push(client);
    }
    for balancer in &balancers {
        eventually("each knows of the other's request", async || {
            (siblings(balancer).active == 1).then_some(())
        })
        .await;
    }
    // Only the first learns prompts of its own; each is long enough for many blocks.
    for number in 0..5 {
        let text = format!("conversation {number} ").repeat(600);
        let body = serde_json::json!({"model": "sim", "max_tokens": 1, "messages": [
            {"role": "user", "content": text}]});
        balancers[0].ask(post("/v1/chat/completions", body.to_string())).await.expect(200);
    }
    eventually("the chains were ignored", async || (balancers[1].metric(FOREIGN).await >= 5.0).then_some(()))
        .await;
    let pairs = balancers.each_ref().map(|balancer| balancer.running.state.size().pairs);
    assert!(pairs[0] > 5 * 15 && pairs[1] < 15, "{pairs:?}");
    let warned = warnings();
    assert_eq!(warned.len(), 1, "one for each sender of chains: {warned:?}");
    drop(clients);
    for balancer in &balancers {
        eventually("each knows that the other is idle", async || {
            (siblings(balancer) == UpstreamLoad::default()).then_some(())
        })
        .await;
    }
}

/// Two processes of the binary, of which one makes other blocks of prompts, as another release may.
#[tokio::test(flavor = "multi_thread")]
async fn processes_of_two_kinds_balance_as_one_and_learn_apart() {
    let redis = Redis::start(&[]).await;
    let engines = [paced(Duration::from_millis(20)).await, paced(Duration::from_millis(20)).await];
    let setups = [512, 256].map(|block_bytes| {
        let more = format!("redis: {}\nbalance: {{block_bytes: {block_bytes}}}", redis.url());
        Setup::over(&engines, &more)
    });
    let processes = [setups[0].start().await, setups[1].start().await];
    let rows = async |process: &Process| -> Vec<Value> {
        let rows = process.admin("/admin/upstreams").await.expect(200).json();
        rows.as_array().cloned().unwrap_or_default()
    };
    for process in &processes {
        eventually("both engines are ready", async || {
            let rows = rows(process).await;
            (rows.len() == 2 && rows.iter().all(|row| row["state"] == "ready")).then_some(())
        })
        .await;
        eventually("there is a sibling", async || {
            let page = process.admin("/admin/siblings").await.expect(200).json();
            (page["siblings"].as_array().map(Vec::len) == Some(1)).then_some(())
        })
        .await;
    }
    // Endless requests, one after the other over both processes: each chooses by the load of both.
    let mut clients = Vec::new();
    for number in 1..=8usize {
        let mut client = Wire::connect(&processes[number % 2].addresses[0]).await;
        client.send(post("/v1/chat/completions", stream("sim", 2000))).await;
        clients.push(client);
        for process in &processes {
            eventually("both know all requests", async || {
                let rows = rows(process).await;
                let of = |key: &str| rows.iter().filter_map(|row| row[key].as_u64()).sum::<u64>();
                (of("active") + of("siblings_active") == number as u64).then_some(())
            })
            .await;
        }
    }
    for row in rows(&processes[0]).await {
        let (own, theirs) = (row["active"].as_u64(), row["siblings_active"].as_u64());
        assert_eq!(own.zip(theirs).map(|(own, theirs)| own + theirs), Some(4), "{row}");
    }
    // Both learn prompts that the other cannot use.
    for number in 0..6 {
        let text = format!("conversation {number} ").repeat(600);
        let body = serde_json::json!({"model": "sim", "max_tokens": 1, "messages": [
            {"role": "user", "content": text}]});
        let mut client = Wire::connect(&processes[number % 2].addresses[0]).await;
        client.ask(post("/v1/chat/completions", body.to_string())).await.expect(200);
    }
    for process in &processes {
        process.says(&format!("{WARNING}, only its load counts")).await;
        eventually("the chains are counted", async || {
            let page = process.admin("/metrics").await.expect(200);
            let value =
                page.text().lines().find_map(|line| line.strip_prefix(FOREIGN)?.trim().parse::<f64>().ok());
            (value.unwrap_or(0.0) >= 3.0).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_balancers_with_the_same_fingerprint_learn_a_chain() {
    let redis = Redis::start(&[]).await;
    let board = async |name: &str, fingerprint: u64| {
        let board = Board::with(ExchangeSettings { fingerprint, ..settings(&redis.url(), name) });
        board.exchange.wait_caught_up(crate::common::PATIENCE).await;
        board
    };
    let (a, same) = (board("a", fingerprint(1, 512)).await, board("same", fingerprint(1, 512)).await);
    let other = board("other", fingerprint(2, 512)).await;
    for number in 1..20 {
        a.send("u1", &chain(number, 20));
        same.until_held("u1", &chain(number, 20), 20).await;
    }
    other.send("u1", &chain(100, 20));
    a.set("u1", 2);
    other.set("u1", 3);
    a.until_others("u1", 3).await;
    other.until_others("u1", 2).await;
    a.bind(Binding::Session, "s", "u1");
    eventually("bindings apply", async || (other.bound().len() == 1).then_some(())).await;
    eventually("each sender is warned of", async || (warnings().len() == 3).then_some(())).await;
    a.take_back("u1", &chain(19, 20));
    same.until_held("u1", &chain(19, 20), 0).await;
    assert!((1..20).all(|number| other.held("u1", &chain(number, 20)) == 0));
    assert_eq!((a.held("u1", &chain(100, 20)), same.held("u1", &chain(100, 20))), (0, 0));
    let mut senders: Vec<String> = warnings();
    senders.sort();
    for (line, sender) in senders.iter().zip(["a", "other", "other"]) {
        assert!(line.ends_with(&format!("sibling={sender}")), "{senders:?}");
    }
    assert_eq!(senders.len(), 3);
}

/// The bytes of the first release: a balancer with gauges, chains, bindings, a request and a change of
/// members.
#[tokio::test(flavor = "multi_thread")]
async fn messages_of_the_first_release_have_load_and_no_chains() {
    const LEAVING: [u8; 2] = [8, 0];
    let all = include_bytes!("../../../../fuzz/seeds/exchange/everything");
    let staying = all.strip_suffix(&LEAVING).expect("leaves at the end");
    let redis = Redis::start(&[]).await;
    let board = Board::begun(&redis.url(), "a").await;
    for sequence in 1..4 {
        let mut bytes = staying.to_vec();
        // Behind the version and the id of the balancer.
        bytes[9] = sequence;
        redis.add(STREAM, &bytes).await;
        let count = usize::from(sequence);
        eventually("the message is read", async || (board.bound().len() == 2 * count).then_some(())).await;
    }
    assert_eq!(board.others("a:1"), SiblingLoad { active: 3, backlog: 4000, context: 123_456 });
    assert_eq!(board.held("a:1", &[1, u64::MAX, 3]), 0);
    let warned = warnings();
    assert!(warned.len() == 1 && warned[0].ends_with("sibling=lb-1"), "{warned:?}");
    let rows = board.exchange.rows();
    assert_eq!((rows[0].balancer, rows[0].name.as_str()), (7, "lb-1"));
    let mut leaving = all.to_vec();
    leaving[9] = 9;
    redis.add(STREAM, &leaving).await;
    board.until_siblings(0).await;
    assert_eq!(board.others("a:1"), SiblingLoad::default());
}
