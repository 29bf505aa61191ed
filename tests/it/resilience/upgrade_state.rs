//! What an upgrade without a Redis hands over: changes at run time, and the prefix index.

use crate::common::process::{Process, Setup};
use crate::common::wire::{Answer, JSON, Wire, post, request, with_host};
use crate::common::{engine, eventually};
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";

async fn change(process: &Process, method: &str, path: &str, body: serde_json::Value) -> Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let request = request(method, &format!("/admin/upstreams{path}"), &[JSON], body.as_bytes());
    Wire::connect(&process.admin).await.ask(with_host(&request, &process.admin)).await
}

/// Name, state and weight of each upstream, sorted by name.
async fn fleet(process: &Process) -> Vec<(String, String, f64)> {
    let rows = process.admin("/admin/upstreams").await.expect(200).json();
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap_or_default().to_string();
    let rows = rows.as_array().cloned().unwrap_or_default();
    let mut rows: Vec<(String, String, f64)> = rows
        .iter()
        .map(|row| (text(row, "name"), text(row, "state"), row["weight"].as_f64().unwrap_or_default()))
        .collect();
    rows.sort_by(|one, other| one.0.cmp(&other.0));
    rows
}

fn pairs(page: &Answer) -> i64 {
    crate::common::gauge_of(page.text(), "vllm_lb_index_pairs")
}

/// Without a Redis only the running process has what was changed at run time, and what it knows of caches.
#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_hands_runtime_changes_and_the_prefix_index_over() {
    let mut engines = Vec::new();
    for _ in 0..5 {
        engines.push(engine(Default::default()).await);
    }
    let item = |name: &str, at: usize| format!("{{url: '{}', name: {name}}}", engines[at].url());
    let file = |more: &str| {
        let all = [item("kept", 0), item("drained", 1), item("removed", 2), item("changed", 3)].join(", ");
        all.replace("name: changed", &format!("name: changed{more}"))
    };
    let setup = Setup::over([], "");
    setup.write(&file(""), "expose: true");
    let running = setup.start().await;
    let added = json!({"url": engines[4].url(), "name": "added", "weight": 2, "api_key": "hunter2"});
    change(&running, "POST", "?wait=20s", added).await.expect(201);
    change(&running, "PATCH", "/drained", json!({"drain": true})).await.expect(200);
    change(&running, "PATCH", "/kept", json!({"weight": 7})).await.expect(200);
    change(&running, "PATCH", "/changed", json!({"drain": true})).await.expect(200);
    change(&running, "DELETE", "/removed?wait=20s", serde_json::Value::Null).await.expect(200);
    let prompt = |number: usize| {
        let text = format!("conversation {number} ").repeat(300);
        let messages = json!([{"role": "user", "content": text}]);
        json!({"model": "sim", "messages": messages, "max_tokens": 2}).to_string()
    };
    let ask = async |process: &Process, number: usize| {
        let mut client = Wire::connect(&process.addresses[0]).await;
        let answer = client.ask(post(CHAT, prompt(number))).await.expect(200);
        (answer.header("x-vllm-lb-upstream").to_string(), answer.header("x-vllm-lb-hit").to_string())
    };
    let mut before = Vec::new();
    for number in 0..8 {
        before.push(ask(&running, number).await.0);
    }
    let known = pairs(&running.admin("/metrics").await);
    assert!(known > 50, "{known}");
    // The new file has another entry for one of them.
    setup.write(&file(", max_active: 9"), "expose: true");
    let next = setup.upgrade().await;
    let row = |name: &str, state: &str, weight: f64| (name.to_string(), state.to_string(), weight);
    eventually("all are as they were", async || {
        let wanted = [
            row("added", "ready", 2.0),
            row("changed", "ready", 1.0),
            row("drained", "draining", 1.0),
            row("kept", "ready", 7.0),
        ];
        (fleet(&next).await == wanted).then_some(())
    })
    .await;
    assert!(next.has_said("took the prefix index over"));
    assert_eq!(pairs(&next.admin("/metrics").await), known);
    for (number, upstream) in before.iter().enumerate() {
        let (place, hit) = ask(&next, number).await;
        assert_eq!(&place, upstream, "conversation {number}");
        assert!(!hit.starts_with("0/"), "conversation {number}: {hit}");
    }
    // And on to the next.
    let last = setup.upgrade().await;
    assert_eq!(fleet(&last).await.len(), 4);
    let log = |process: &Process| format!("{:?}", process.records());
    assert!(!log(&running).contains("hunter2") && !log(&next).contains("hunter2"));
}
