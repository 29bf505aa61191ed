//! Conversations that name their sessions, turn by turn.

use serde_json::{Value, json};

use crate::common::Balancer;
use crate::common::wire::{JSON, request};

const SESSIONS: usize = 24;

/// Sends a turn of every session, one after the other. Returns the upstreams that answered.
pub async fn turn(balancer: &Balancer, number: usize) -> Vec<String> {
    let mut places = Vec::new();
    for session in 0..SESSIONS {
        // A conversation grows; its beginning is its own.
        let said: Vec<Value> = (0..=number)
            .map(|turn| {
                let words = format!("session {session} turn {turn} ").repeat(60);
                json!({"role": if turn % 2 == 0 { "user" } else { "assistant" }, "content": words})
            })
            .collect();
        let body = json!({"model": "sim", "messages": said, "max_tokens": 2}).to_string();
        let id = format!("session-{session}");
        let headers = [JSON, ("x-session-id", id.as_str())];
        let turn = request("POST", "/v1/chat/completions", &headers, body.as_bytes());
        let answer = balancer.ask(turn).await.expect(200);
        places.push(answer.header("x-vllm-lb-upstream").to_string());
    }
    places
}

/// Returns the sessions that have another upstream now, and did not have `gone`.
pub fn moved(before: &[String], after: &[String], gone: &str) -> Vec<usize> {
    assert_eq!(before.len(), after.len());
    let has_moved = |session: &usize| before[*session] != after[*session] && before[*session] != gone;
    (0..before.len()).filter(has_moved).collect()
}
