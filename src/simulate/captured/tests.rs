//! Recorded calls of known sessions, as conversations whose turns and waits can be foretold.

use serde_json::{Value, json};

use super::super::trace::{TraceForm, TraceReader};
use super::*;

/// So many token ids of a kind.
fn ids(kind: u32, count: u32) -> Vec<u32> {
    (0..count).map(|at| kind * 10_000 + at).collect()
}

/// A call that begins and ends at these seconds.
fn call(session: &str, begun: f64, ended: f64, prompt: &[Vec<u32>], answer: &[u32]) -> Value {
    json!({
        "trace_id": "t", "session_id": session, "model": "m", "messages": [{"role": "user", "content": "x"}],
        "prompt_token_ids": prompt.concat(), "completion_token_ids": answer, "logprobs": null,
        "response_message": {"role": "assistant", "content": "y"}, "timestamp": 1_760_000_000.0 + begun,
        "latency_ms": 1000.0 * (ended - begun), "token_counts": {}, "status": 200, "raw_request": null,
    })
}

fn load(calls: &[Value]) -> Workload {
    let mut captured = CapturedCalls::default();
    calls.iter().for_each(|call| captured.add(&call.to_string()).expect("a good line"));
    captured.load()
}

fn waits(conversation: &ReplayConversation) -> Vec<f64> {
    conversation.turns.iter().map(|turn| (turn.wait * 1000.0).round() / 1000.0).collect()
}

#[test]
fn calls_that_follow_one_another_are_turns_with_the_recorded_waits() {
    let (system, first, second) = (ids(1, 100), ids(2, 40), ids(3, 30));
    let calls = [
        call("a", 0.5, 2.0, std::slice::from_ref(&system), &first),
        call("b", 1.0, 1.5, std::slice::from_ref(&system), &second),
        call("a", 5.0, 6.0, &[system.clone(), first.clone(), second.clone()], &ids(4, 10)),
    ];
    // A file may have its lines in any order.
    for order in [[0, 1, 2], [2, 1, 0]] {
        let load = load(&order.map(|at| calls[at].clone()));
        assert_eq!((load.block, load.sessions.len(), load.requests()), (16, 2, 3));
        let [a, b] = load.sessions.as_slice() else { panic!("two conversations") };
        assert_eq!((a.start, waits(a)), (0.0, vec![0.0, 3.0]));
        assert_eq!((b.start, waits(b)), (0.5, vec![0.0]));
        assert_eq!((a.turns[0].prompt, a.turns[0].output), (100, 40));
        assert_eq!((a.turns[1].prompt, a.turns[1].output), (170, 10));
        assert_eq!((a.chain.len(), a.rewrites.len()), (180 / 16, 0), "the second turn continues the first");
        assert_eq!(a.prompt(0, 16), b.prompt(0, 16), "what sessions have in common is the same blocks");
        assert_ne!(a.whole(0, 16)[7], b.whole(0, 16)[7]);
    }
}

#[test]
fn a_turn_with_another_history_keeps_what_it_shares_and_no_more() {
    let (system, answer) = (ids(1, 160), ids(2, 64));
    let conversation = |second: &[Vec<u32>]| {
        let calls = [
            call("s", 0.0, 1.0, std::slice::from_ref(&system), &answer),
            call("s", 2.0, 3.0, second, &ids(5, 16)),
        ];
        let load = load(&calls);
        assert_eq!(load.sessions.len(), 1);
        load.sessions[0].clone()
    };
    // The same text came back as other tokens: the prompt before it is still shared.
    let changed = conversation(&[system.clone(), ids(3, 64), ids(4, 32)]);
    assert_eq!((changed.chain.len(), changed.rewrites.len()), (14, 1));
    assert_eq!(changed.whole(0, 16)[..10], changed.prompt(1, 16)[..10]);
    assert_ne!(changed.whole(0, 16)[10], changed.prompt(1, 16)[10]);
    // The same prompt again has another answer.
    let again = conversation(std::slice::from_ref(&system));
    assert_eq!(again.prompt(0, 16), again.prompt(1, 16));
    assert_ne!(again.whole(0, 16)[10], again.whole(1, 16)[10]);
}

#[test]
fn calls_that_overlap_are_conversations_beside_each_other() {
    let (main, side) = (ids(1, 64), ids(2, 64));
    let calls = [
        call("s", 0.0, 10.0, std::slice::from_ref(&main), &ids(3, 16)),
        call("s", 1.0, 2.0, std::slice::from_ref(&side), &ids(4, 16)),
        call("s", 11.0, 12.0, &[side.clone(), ids(4, 16)], &ids(5, 16)),
        call("s", 13.0, 14.0, &[main.clone(), ids(3, 16)], &ids(6, 16)),
    ];
    let load = load(&calls);
    assert_eq!(load.sessions.iter().map(waits).collect::<Vec<_>>(), [vec![0.0, 3.0], vec![0.0, 9.0]]);
    assert!(load.sessions.iter().all(|session| session.rewrites.is_empty()));
}

#[test]
fn calls_without_a_session_follow_from_nothing() {
    assert_eq!(UNNAMED, crate::traces::record::UNNAMED_SESSION);
    let calls: Vec<Value> =
        (0..3).map(|at| call(UNNAMED, f64::from(at), f64::from(at), &[ids(1, 20)], &[7])).collect();
    let load = load(&calls);
    assert_eq!(load.sessions.iter().map(|session| session.start).collect::<Vec<_>>(), [0.0, 1.0, 2.0]);
}

#[test]
fn a_prompt_without_token_ids_is_its_text() {
    let text = "x".repeat(1000);
    let message = json!({"role": "user", "content": text});
    let without = |messages: Value, request: Value, counts: Value| {
        let mut call = call("s", 0.0, 1.0, &[], &[]);
        (call["messages"], call["raw_request"], call["token_counts"]) = (messages, request, counts);
        call["response_message"] = json!({});
        call
    };
    let request = json!({"model": "m", "tools": [{"type": "function"}], "messages": []});
    let load = load(&[
        without(json!([message]), request.clone(), json!({"completion": 7})),
        without(json!([]), json!({"prompt": text}), json!({"completion": 8, "prompt": null})),
    ]);
    let turns: Vec<_> = load.sessions.iter().flat_map(|session| &session.turns).collect();
    let chat = (message.to_string().len() + request["tools"].to_string().len()).div_ceil(4);
    assert_eq!((turns[0].prompt, turns[0].output), (chat, 7));
    assert_eq!((turns[1].prompt, turns[1].output), (251, 8), "with its quotes");
    assert_eq!(load.sessions[0].prompt(0, 16).len(), chat / 16);
}

#[test]
fn a_call_without_an_answer_is_left_out() {
    let good = call("s", 0.0, 1.0, &[ids(1, 20)], &[1, 2]);
    let mut refused = call("s", 2.0, 3.0, &[ids(1, 20)], &[1]);
    refused["status"] = 429.into();
    let mut gone = call("s", 2.0, 3.0, &[ids(1, 20)], &[]);
    (gone["response_message"], gone["status"]) = (json!({}), 0.into());
    let mut reader = TraceReader::default();
    // Of a body that could not be recorded.
    let mut unread = good.clone();
    (unread["prompt_token_ids"], unread["messages"]) = (json!([]), json!([]));
    for call in [&good, &refused, &gone, &unread] {
        reader.line(&call.to_string()).expect("a good line");
    }
    let read = reader.finish(1).expect("a trace");
    assert_eq!((read.form, read.left_out, read.load.requests()), (TraceForm::Captured, 3, 1));
    let mut reader = TraceReader::default();
    reader.line(&refused.to_string()).expect("a good line");
    assert!(reader.finish(1).expect_err("nothing is left").contains("none of its 1 calls"));
}

#[test]
fn a_bad_line_is_named() {
    let good = call("s", 0.0, 1.0, &[ids(1, 20)], &[1]);
    let changed = |field: &str, value: Value| {
        let mut call = good.clone();
        call[field] = value;
        call.to_string()
    };
    let mut no_time = good.clone();
    no_time.as_object_mut().expect("an object").remove("timestamp");
    for (bad, problem) in [
        ("nonsense".to_string(), "line 3: expected"),
        (good.to_string().trim_end_matches('}').to_string(), "line 3: EOF"),
        (no_time.to_string(), "line 3: missing field `timestamp`"),
        (changed("timestamp", (-1).into()), "line 3: timestamp -1 is no time"),
        (changed("latency_ms", (-1).into()), "line 3: latency_ms must not be below 0"),
        (changed("prompt_token_ids", json!(["a"])), "line 3: invalid type"),
        (changed("prompt_token_ids", json!([-1])), "line 3: invalid value"),
        (
            json!({"session_id": "s", "timestamp": 1, "completion_token_ids": [1]}).to_string(),
            "line 3: neither prompt_token_ids nor messages",
        ),
        (
            json!({"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1]}).to_string(),
            "line 3: its form is not that of the lines before it",
        ),
    ] {
        let mut reader = TraceReader::default();
        reader.line(&good.to_string()).expect("a good line");
        reader.line("").expect("an empty line");
        let seen = reader.line(&bad).expect_err("a bad line");
        assert!(seen.starts_with(problem) && !seen.contains("column"), "{seen} for {bad}");
    }
    let mut counts = good.clone();
    (counts["token_counts"], counts["completion_token_ids"]) = (json!({"completion": u64::MAX}), json!([]));
    let seen = CapturedCalls::default().add(&counts.to_string()).expect_err("out of range");
    assert!(seen.contains("token_counts.completion"), "{seen}");
}
