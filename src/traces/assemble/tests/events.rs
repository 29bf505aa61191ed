//! Streams: what is merged, what ends them, what is missing of one that broke off.

use serde_json::{Value, json};

use super::*;

/// A stream of these data, each on one line, and its end.
fn stream(data: &[&str]) -> String {
    let events = data.iter().chain([&"[DONE]"]);
    let event = |data: &&str| format!("data: {}\n\n", data.lines().map(str::trim).collect::<String>());
    events.map(event).collect()
}

fn chat(data: &[&str]) -> AssembledAnswer {
    assembled(TraceApi::Chat, true, 200, [stream(data).as_bytes()])
}

fn delta(delta: &str) -> String {
    format!("{{\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}")
}

fn message(answer: &AssembledAnswer) -> Value {
    value(&answer.choices[0].message)
}

/// The message of a chat's stream with these deltas.
fn merged(deltas: &[&str]) -> Value {
    let deltas: Vec<String> = deltas.iter().map(|text| delta(text)).collect();
    message(&chat(&deltas.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// The members of a choice that have no field of their own.
fn extra(answer: &AssembledAnswer, place: usize) -> Value {
    value(&format!("{{{}}}", answer.choices[place].extra.as_deref().unwrap_or_default()))
}

#[test]
fn a_choice_of_a_stream_keeps_its_stop_reason_and_its_prompt() {
    let chunk = |index: u32, more: &str| format!(r#"{{"choices":[{{"index":{index},"text":"a",{more}}}]}}"#);
    let first =
        r#""stop_reason":null,"prompt_logprobs":[null,{"7":{"logprob":-1.5}}],"prompt_token_ids":[1,2]"#;
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let of = |index| match index {
            0 => chunk(0, first),
            1 => chunk(1, r#""prompt_token_ids":[1,2]"#),
            _ => chunk(2, r#""prompt_token_ids":[3]"#),
        };
        let mut data: Vec<String> = order.into_iter().map(of).collect();
        data.push(chunk(0, r#""stop_reason":"</s>","finish_reason":"stop","prompt_token_ids":null"#));
        data.push(chunk(2, r#""stop_reason":7,"finish_reason":"stop""#));
        let data: Vec<&str> = data.iter().map(String::as_str).collect();
        let answer = assembled(TraceApi::Completions, true, 200, [stream(&data).as_bytes()]);
        assert_eq!(answer.prompt_token_ids, [1, 2], "{order:?}");
        let logprobs = json!([null, {"7": {"logprob": -1.5}}]);
        assert_eq!(extra(&answer, 0), json!({"stop_reason": "</s>", "prompt_logprobs": logprobs}));
        assert_eq!(answer.choices[1].extra, None, "of the same prompt: {order:?}");
        assert_eq!(extra(&answer, 2), json!({"stop_reason": 7, "prompt_token_ids": [3]}), "{order:?}");
    }
    let whole =
        r#"{"choices":[{"index":0,"text":"a","stop_reason":7},{"index":1,"text":"b","stop_reason":null}]}"#;
    let answer = assembled(TraceApi::Completions, false, 200, [whole.as_bytes()]);
    assert_eq!((extra(&answer, 0), &answer.choices[1].extra), (json!({"stop_reason": 7}), &None));
}

#[test]
fn a_stream_of_vllm_is_assembled() {
    let answer = chat(&[
        r#"{"id":"c","model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},
            "logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":31,"total_tokens":31,
            "completion_tokens":0,"completion_tokens_details":null},"prompt_token_ids":[1,85,496],
            "prompt_text":null}"#,
        r#"{"id":"c","model":"tiny","choices":[{"index":0,"delta":{"content":"exo"},
            "logprobs":{"content":[{"token":"exo","logprob":-7.015422344207764,"bytes":[101,120,111],
            "top_logprobs":[]}]},"finish_reason":null,"token_ids":[1312]}]}"#,
        r#"{"id":"c","model":"tiny","choices":[{"index":0,"delta":{"content":""},
            "logprobs":{"content":[{"token":"","logprob":-6.872665882110596,"bytes":[127],
            "top_logprobs":[]}]},"finish_reason":"length","stop_reason":null,"token_ids":[224,7]}]}"#,
        r#"{"id":"c","model":"tiny","choices":[],"usage":{"prompt_tokens":31,"total_tokens":35,
            "completion_tokens":4,"prompt_tokens_details":{"cached_tokens":16,"created_cache_tokens":0},
            "completion_tokens_details":{"reasoning_tokens":2}},"weight_version":9}"#,
    ]);
    let choice = &answer.choices[0];
    assert_eq!(answer.prompt_token_ids, [1, 85, 496]);
    assert_eq!(choice.token_ids, [1312, 224, 7]);
    assert_eq!(choice.logprobs, [-7.015422344207764, -6.872665882110596]);
    assert_eq!(message(&answer), json!({"role": "assistant", "content": "exo"}));
    assert_eq!(choice.finish_reason.as_deref(), Some("length"));
    let tokens = TraceTokens { prompt: Some(31), completion: Some(4), cached: Some(16), reasoning: Some(2) };
    assert_eq!(answer.tokens, tokens);
    assert_eq!((answer.model.as_deref(), answer.weight_version), (Some("tiny"), Some(9)));
    assert_eq!((answer.error, answer.partial, answer.is_complete), (None, false, true));
    assert_eq!(
        record(facts(TraceApi::Chat, true), RequestParts::default(), Some(answer)).facts.weight_version,
        Some(9)
    );
}

#[test]
fn the_prompt_of_a_first_choice_goes_before_others() {
    let answer = chat(&[
        r#"{"choices":[{"index":1,"delta":{},"prompt_token_ids":[4]}]}"#,
        r#"{"choices":[{"index":0,"delta":{},"prompt_token_ids":[5]}]}"#,
        r#"{"choices":[{"index":2,"delta":{},"prompt_token_ids":[6]}]}"#,
    ]);
    assert_eq!(answer.prompt_token_ids, [5]);
    assert_eq!(answer.choices.iter().map(|choice| choice.index).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn tool_calls_are_merged_by_index() {
    let message = merged(&[
        r#"{"role":"assistant","content":null}"#,
        r#"{"tool_calls":[{"index":1,"id":"b","type":"function","function":{"name":"two","arguments":""}}]}"#,
        r#"{"tool_calls":[{"index":0,"id":"a","type":"function","function":{"name":"one",
            "arguments":"{\"x\""}}]}"#,
        r#"{"tool_calls":[{"index":1,"function":{"arguments":"{}"}},{"index":0,"id":null,
            "function":{"name":null,"arguments":":1}"}}]}"#,
    ]);
    let call = |id: &str, name: &str, arguments: &str| {
        let function = json!({"name": name, "arguments": arguments});
        json!({"id": id, "type": "function", "function": function})
    };
    let calls = json!([call("a", "one", "{\"x\":1}"), call("b", "two", "{}")]);
    assert_eq!(message, json!({"role": "assistant", "content": null, "tool_calls": calls}));
}

#[test]
fn tool_calls_without_an_index_are_told_apart_by_their_ids() {
    let message = merged(&[
        r#"{"tool_calls":[{"id":"a","function":{"name":"one","arguments":"1"}}]}"#,
        r#"{"tool_calls":[{"function":{"arguments":"2"}}]}"#,
        r#"{"tool_calls":[{"id":"b","function":{"name":"two","arguments":"3"}}]}"#,
    ]);
    let arguments = |at: usize| message["tool_calls"][at]["function"]["arguments"].clone();
    assert_eq!([arguments(0), arguments(1)], [json!("12"), json!("3")]);
}

#[test]
fn members_of_deltas_are_merged() {
    let message = merged(&[
        r#"{"role":"assistant","content":"","reasoning":"th","refusal":null,"note":"a","count":1}"#,
        r#"{"reasoning":"ink","reasoning_content":"old","function_call":{"name":"f","arguments":"{"}}"#,
        r#"{"content":"x","function_call":{"arguments":"}"},"note":"b","count":{"n":2},"refusal":"no"}"#,
    ]);
    assert_eq!(
        message,
        json!({
            "role": "assistant", "content": "x", "reasoning": "think", "reasoning_content": "old",
            "refusal": "no", "note": "ab", "count": {"n": 2},
            "function_call": {"name": "f", "arguments": "{}"},
        })
    );
}

#[test]
fn content_is_null_only_where_a_whole_answer_has_none() {
    for (deltas, content) in [
        (&[r#"{"role":"assistant","content":""}"#][..], json!("")),
        (&[r#"{"role":"assistant","content":""}"#, r#"{"reasoning":"x"}"#], Value::Null),
        (&[r#"{"role":"assistant"}"#], Value::Null),
        (&[r#"{"content":"a"}"#, r#"{"reasoning":"x"}"#], json!("a")),
    ] {
        let message = merged(deltas);
        assert_eq!((&message["role"], &message["content"]), (&json!("assistant"), &content), "{deltas:?}");
    }
}

#[test]
fn routed_experts_are_kept() {
    for (first, second, expected) in [
        (r#""routed_experts":"abc""#, r#""routed_experts":null"#, "\"abc\""),
        (r#""routing_matrices":["a"]"#, r#""routing_matrices":["b","c"]"#, "[\"a\",\"b\",\"c\"]"),
        (r#""routed_experts":[[1]]"#, r#""routed_experts":[]"#, "[[1]]"),
    ] {
        let chunk = |member: &str| format!("{{\"choices\":[{{\"index\":0,\"delta\":{{}},{member}}}]}}");
        let answer = chat(&[&chunk(first), &chunk(second)]);
        assert_eq!(answer.choices[0].routed_experts.as_deref(), Some(expected));
    }
}

#[test]
fn an_error_event_makes_the_answer_partial() {
    let data = delta(r#"{"content":"so far"}"#);
    for stream in [
        stream(&[&data, r#"{"error":{"message":"engine died","code":500}}"#]),
        format!("data: {data}\n\nevent: error\ndata: gone\n\n"),
    ] {
        let answer = assembled(TraceApi::Chat, true, 200, [stream.as_bytes()]);
        assert_eq!((answer.error, answer.partial), (Some(TraceError::UpstreamError), true));
        assert_eq!(message(&answer)["content"], "so far");
        let mut facts = facts(TraceApi::Chat, true);
        facts.error = Some(TraceError::Timeout);
        let record = record(facts, RequestParts::default(), Some(answer));
        assert_eq!((record.facts.error, record.facts.partial), (Some(TraceError::Timeout), true));
    }
}

#[test]
fn a_stream_without_its_end_is_incomplete() {
    let data = format!("data: {}\n\n", delta(r#"{"content":"x"}"#));
    for (rest, is_complete, content) in [
        ("", false, "x"),
        ("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"y", false, "x"),
        ("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"y\"}}]}", false, "xy"),
        ("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"y\"}}]}\n", false, "xy"),
        ("data: [DONE]", true, "x"),
        ("data: [DONE]\n", true, "x"),
        ("data: [DONE]\r\n\r\n", true, "x"),
        (": [DONE]\n\n", false, "x"),
    ] {
        let text = [data.as_str(), rest].concat();
        let answer = assembled(TraceApi::Chat, true, 200, text.as_bytes().chunks(3));
        assert_eq!(answer.is_complete, is_complete, "{rest}");
        assert_eq!(answer.partial, !is_complete, "{rest}");
        assert_eq!(answer.error, (!is_complete).then_some(TraceError::Incomplete), "{rest}");
        assert_eq!(message(&answer)["content"], content, "{rest}");
    }
}

#[test]
fn separators_that_are_no_line_ends_stay_in_the_text() {
    let answer = chat(&[&delta("{\"content\":\"a\u{2028}b\u{2029}c\u{85}d\"}")]);
    assert_eq!(message(&answer)["content"], "a\u{2028}b\u{2029}c\u{85}d");
}

#[test]
fn an_event_that_is_unreadable_costs_no_other() {
    let answer = chat(&[&delta(r#"{"content":"a"}"#), "{", "[1]", &delta(r#"{"content":"b"}"#)]);
    assert_eq!((message(&answer)["content"].as_str(), answer.partial), (Some("ab"), true));
    assert_eq!(answer.error, None);
    // One member of another form costs no other member.
    let odd = r#"{"model":7,"weight_version":"x","choices":[{"index":"x","delta":{"content":"a",
        "tool_calls":3},"token_ids":"no","logprobs":[1],"finish_reason":5}],"usage":[]}"#;
    let answer = chat(&[odd]);
    assert_eq!((message(&answer)["content"].as_str(), answer.partial), (Some("a"), true));
    assert!(answer.choices[0].token_ids.is_empty());
}

#[test]
fn escapes_of_half_a_pair_become_replacement_characters() {
    for (escaped, text) in [
        (r"\ud83d", "\u{fffd}"),
        (r"\uD83D\uDE00", "😀"),
        (r"\ude00\ud83d!", "\u{fffd}\u{fffd}!"),
        (r"\\ud83d", "\\ud83d"),
        (r"\ud83d\ud83d\ude00", "\u{fffd}😀"),
        (r"\u0041\\\udfff", "A\\\u{fffd}"),
    ] {
        let data = delta(&format!("{{\"content\":\"{escaped}\",\"x{escaped}\":[\"{escaped}\"]}}"));
        let message = message(&chat(&[&data]));
        assert_eq!(message["content"], text, "{escaped}");
        assert_eq!(message[&format!("x{text}")], json!([text]), "{escaped}");
    }
}

#[test]
fn a_stream_beyond_the_bound_overflows() {
    const MOST: usize = 64 << 10;
    let event = format!("data: {}\n\n", delta(r#"{"content":"0123456789"}"#));
    let endless = format!("data: {}", "x".repeat(2 * MOST));
    let choices: String = (0..2000)
        .map(|index| format!("data: {{\"choices\":[{{\"index\":{index},\"delta\":{{\"x\":1}}}}]}}\n\n"))
        .collect();
    for (stream, size) in
        [(event.repeat(20_000), 1000), (endless.clone(), 1000), (endless, 1 << 20), (choices, 77)]
    {
        let mut assembler = AnswerAssembler::bounded(TraceApi::Chat, true, 200, MOST);
        for piece in stream.as_bytes().chunks(size) {
            assembler.feed(piece);
            assert!(assembler.bytes() <= MOST + 2 * size.clamp(1000, MOST), "{}", assembler.bytes());
        }
        let answer = assembler.finish();
        assert_eq!((answer.error, answer.partial), (Some(TraceError::Overflow), true));
        assert!(!answer.is_complete);
    }
    // A long stream whose record is small passes.
    let short = format!("data: {}\n\n", delta("{}"));
    let mut assembler = AnswerAssembler::bounded(TraceApi::Chat, true, 200, MOST);
    (0..4000).for_each(|_| assembler.feed(short.as_bytes()));
    assert!(assembler.bytes() < MOST / 8);
    assembler.feed(b"data: [DONE]\n\n");
    assert_eq!(assembler.finish().error, None);
}
