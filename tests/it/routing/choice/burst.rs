//! Many requests at once with one long prefix that no engine holds.

use serde_json::json;
use tokio::task::JoinSet;

use super::{CHAT, fast, telling, who, words};
use crate::common::wire::{Wire, post};
use crate::common::{config, upstreams};

const PREFIX: usize = 8_000;
const REQUESTS: u64 = 32;

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_with_an_unseen_prefix_neither_prefills_it_everywhere_nor_queues_on_one() {
    let engines = fast(8, 4.0).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let prefix = words(1, PREFIX);
    let mut clients = Vec::new();
    for number in 0..REQUESTS {
        let body = json!({
            "model": "sim", "stream": true, "max_tokens": 20,
            "messages": [
                {"role": "system", "content": prefix},
                {"role": "user", "content": words(100 + number, 50)},
            ],
        });
        clients.push((Wire::connect(balancer.address()).await, post(CHAT, body.to_string())));
    }
    let mut asking = JoinSet::new();
    for (mut client, request) in clients {
        asking.spawn(async move { client.ask(request).await.expect(200) });
    }
    let mut requests = vec![0u64; engines.len()];
    while let Some(answer) = asking.join_next().await {
        requests[who(&engines, &answer.expect("clients do not panic"))] += 1;
    }
    let missed = |engine: &super::EngineServer| engine.stats().prefix_queries - engine.stats().prefix_hits;
    let prefills: Vec<u64> = engines.iter().map(|engine| missed(engine) / PREFIX as u64).collect();
    let (total, most) = (prefills.iter().sum::<u64>(), requests.iter().max().copied().unwrap_or(0));
    println!("prefilled {total} times by {prefills:?}; requests {requests:?}");
    assert!(total <= 8, "at most once an engine: {prefills:?}, requests {requests:?}");
    assert!(total >= 2, "one engine alone would have all in its queue: {requests:?}");
    assert!(most <= 12, "at most three even shares on one: {requests:?}");
    balancer.until_idle().await;
}
