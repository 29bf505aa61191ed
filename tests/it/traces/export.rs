//! Recorded calls, exported from a running balancer by the real binary, and replayed by it.

use std::process::Command;

use crate::common::wire::post;
use crate::common::{Balancer, engines};
use serde_json::{Value, json};

async fn run(arguments: Vec<String>) -> (Option<i32>, String, String) {
    let ran = tokio::task::spawn_blocking(move || {
        Command::new(env!("CARGO_BIN_EXE_vllm-lb")).args(arguments).env_clear().output()
    });
    let ran = ran.await.expect("no panic").expect("the binary can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (ran.status.code(), text(&ran.stdout), text(&ran.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn captured_calls_are_exported_and_replayed() {
    let engines = engines(2).await;
    let balancer = Balancer::over(&engines).await;
    let mut messages = json!([{"role": "user", "content": "tell me a story of a fox"}]);
    for turn in 0..3 {
        let body = json!({"model": "sim", "max_tokens": 20, "messages": messages}).to_string();
        let path = "/sessions/harbor%2Ffox:0/v1/chat/completions";
        let answer = balancer.ask(post(path, body)).await.expect(200).json();
        let list = messages.as_array_mut().expect("a list");
        list.push(answer["choices"][0]["message"].clone());
        list.push(json!({"role": "user", "content": format!("go on, {turn}")}));
    }
    let body = json!({"model": "sim", "prompt": "one two three", "max_tokens": 3}).to_string();
    balancer.ask(post("/sessions/other/v1/completions", body)).await.expect(200);
    balancer.admin(post("/admin/flush", "")).await.expect(200);

    let admin = format!("http://{}", balancer.running.admin);
    let export = |more: &[&str]| {
        let words = ["traces", "export", "--admin", &admin].into_iter().chain(more.iter().copied());
        run(words.map(String::from).collect())
    };
    let (code, lines, errors) = export(&[]).await;
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    let calls: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let sessions: Vec<&str> = calls.iter().filter_map(|call| call["session_id"].as_str()).collect();
    assert_eq!(sessions, ["harbor/fox:0", "harbor/fox:0", "harbor/fox:0", "other"]);
    let (_, only, _) = export(&["--session", "other"]).await;
    assert_eq!(only.lines().count(), 1);
    let (code, none, errors) = export(&["--session", "missing"]).await;
    assert_eq!((code, none.as_str()), (Some(0), ""));
    assert!(errors.contains("session missing has no traces"), "{errors}");

    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("calls.jsonl").display().to_string();
    assert_eq!(export(&["--output", &file]).await.0, Some(0));
    let words = ["simulate", "--trace", &file, "--policies", "work,round-robin", "--json"];
    let (code, rows, errors) = run(words.map(String::from).to_vec()).await;
    assert_eq!((code, rows.lines().count()), (Some(0), 2), "{errors}");
    let row: Value = serde_json::from_str(rows.lines().next().expect("a row")).expect("JSON");
    assert_eq!(row["requests"], 4);
}
