//! Requests of any content: what is read of them for the choice never changes what a client gets.

use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, MESSAGES, RESPONSES, telling, words};
use crate::common::dice::Dice;
use crate::common::wire::{JSON, Wire, request};
use crate::common::{config, direct, engines, upstreams};

const REQUESTS: u64 = 400;

const PATHS: [&str; 9] = [
    CHAT,
    COMPLETIONS,
    RESPONSES,
    MESSAGES,
    "/inference/v1/generate",
    "/v1/embeddings",
    "/tokenize",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/batch",
];

const FIELDS: [&str; 18] = [
    "messages",
    "input",
    "prompt",
    "system",
    "instructions",
    "tools",
    "documents",
    "cache_salt",
    "chat_template",
    "session_id",
    "user",
    "metadata",
    "stream",
    "max_tokens",
    "token_ids",
    "prompt_embeds",
    "previous_response_id",
    "sampling_params",
];

/// Some value, mostly of a wrong type.
fn value(dice: &mut Dice, depth: u64) -> Value {
    match dice.between(0, if depth == 0 { 9 } else { 12 }) {
        0 => Value::Null,
        1 => json!(dice.once_in(2)),
        2 => json!(dice.next()),
        3 => json!(-1.5e300),
        4 => json!(1),
        5 => json!(""),
        6 => json!(words(dice.next(), dice.between(0, 60) as usize)),
        7 => json!("\u{0}\u{1f}\"\\\u{7f}\u{10ffff}"),
        8 => json!([1, 2, 3]),
        9 => json!([{"role": "user", "content": words(dice.next(), 40)}]),
        10 => (0..dice.between(0, 4)).map(|_| value(dice, depth - 1)).collect(),
        11 => json!([{"role": value(dice, depth - 1), "content": value(dice, depth - 1)}]),
        _ => {
            let mut object = json!({});
            for key in ["type", "text", "content", "name", "image_url", "function"] {
                if dice.once_in(3) {
                    object[key] = value(dice, depth - 1);
                }
            }
            object
        }
    }
}

/// A body that may be none.
fn body(dice: &mut Dice) -> Vec<u8> {
    let mut body = json!({"model": "sim"});
    for field in FIELDS {
        if dice.once_in(4) {
            body[field] = value(dice, 3);
        }
    }
    if dice.once_in(3) {
        body["messages"] = json!([{"role": "user", "content": words(dice.next(), 300)}]);
    }
    // Answers are to be short.
    body["max_tokens"] = if dice.once_in(10) { json!("3") } else { json!(3) };
    let mut text = body.to_string().into_bytes();
    match dice.between(0, 11) {
        0 => text.truncate(dice.between(0, text.len() as u64) as usize),
        1 => text.extend_from_slice(b"}} "),
        2 => {
            let at = dice.between(0, text.len() as u64 - 1) as usize;
            text[at] = dice.next() as u8;
        }
        3 => text = format!("{}1{}", "[".repeat(3_000), "]".repeat(3_000)).into_bytes(),
        4 => text.splice(1..1, br#""messages":[{"content":"twice"}],"#.iter().copied()).for_each(drop),
        _ => {}
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn arbitrary_bodies_get_the_engines_status_and_leak_nothing() {
    let engines = engines(1).await;
    let mut dice = Dice::new(42, 0);
    for peek in [2 << 20, 700] {
        let mut config = config(upstreams(&engines));
        config.peek.bytes = peek;
        let balancer = telling(config).await;
        let mut statuses = std::collections::BTreeMap::new();
        for number in 0..REQUESTS {
            let (path, body) = (*dice.one_of(&PATHS), body(&mut dice));
            let request = request("POST", path, &[JSON], &body);
            let expected = Wire::connect(&direct(&engines[0])).await.ask(&request).await.status;
            let got = balancer.ask(&request).await.status;
            let shown = String::from_utf8_lossy(&body[..body.len().min(2_000)]).into_owned();
            assert_eq!(got, expected, "request {number} to {path}: {shown}");
            *statuses.entry(got).or_insert(0) += 1;
        }
        assert!(statuses.get(&200).is_some_and(|count| *count > 20), "{statuses:?}");
        assert!(statuses.get(&400).is_some_and(|count| *count > 20), "{statuses:?}");
        balancer.until_idle().await;
        balancer.until_metric("vllm_lb_in_flight", 0.0).await;
        assert_eq!(balancer.metric("vllm_lb_peeked_bytes").await, 0.0);
    }
}
