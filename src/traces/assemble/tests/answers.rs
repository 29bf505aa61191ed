//! Whole answers, and the interfaces beside chats and completions.

use serde_json::{Value, json};

use super::*;

fn whole(api: TraceApi, body: &str) -> TraceRecord {
    record(facts(api, false), RequestParts::default(), Some(assembled(api, false, 200, [body.as_bytes()])))
}

/// The events of a stream, with their names.
fn events(events: &[Value]) -> String {
    let line = |event: &Value| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap());
    events.iter().map(line).collect()
}

fn message(answer: &AssembledAnswer) -> Value {
    value(&answer.choices[0].message)
}

fn gaps(record: &TraceRecord) -> Vec<CutPart> {
    record.response.iter().flat_map(|response| &response.gaps).map(|gap| gap.part).collect()
}

#[test]
fn lists_that_would_be_rebuilt_as_others_stay_in_the_document() {
    let chat = |logprobs: &str| {
        format!(
            "{{\"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"a\"}},\
             \"logprobs\":{logprobs},\"token_ids\":[1]}}]}}"
        )
    };
    let entry = |members: &str| format!("{{\"content\":[{{{members}}}]}}");
    let plain = r#""token":"a","logprob":-1.5,"bytes":[97],"top_logprobs":[]"#;
    for (logprobs, is_cut, numbers) in [
        (entry(plain), true, &[-1.5][..]),
        (r#"{"content":[]}"#.to_owned(), true, &[]),
        (entry(r#""token":"a","logprob":-1.5,"bytes":[97],"top_logprobs":[{"token":"a"}]"#), false, &[-1.5]),
        (entry(r#""token":"a","logprob":-1,"bytes":[97],"top_logprobs":[]"#), false, &[-1.0]),
        (entry(r#""token":"a","logprob":-1.5,"bytes":null,"top_logprobs":[]"#), false, &[-1.5]),
        (entry(r#""token":"a","logprob":-1.5,"bytes":[98],"top_logprobs":[]"#), false, &[-1.5]),
        (entry(r#""token":"a","logprob":-1.5,"bytes":[97,97],"top_logprobs":[]"#), false, &[-1.5]),
        (entry(r#""token":"ab","logprob":-1.5,"bytes":[97],"top_logprobs":[]"#), false, &[-1.5]),
        (entry(r#""token":"a","logprob":null,"bytes":[97],"top_logprobs":[]"#), false, &[]),
        (entry(&format!("{plain},\"x\":1")), false, &[-1.5]),
        (format!("{{\"content\":[{{{plain}}}],\"refusal\":null}}"), false, &[-1.5]),
        (format!("{{\"content\":[{{{plain}}},null]}}"), false, &[]),
        (r#"{"content":[["a",-1.5,[97],[]]]}"#.to_owned(), false, &[]),
        (r#"{"token_logprobs":[null,-2.5],"tokens":["a","b"]}"#.to_owned(), false, &[-2.5]),
        ("null".to_owned(), false, &[]),
    ] {
        let body = chat(&logprobs);
        let record = whole(TraceApi::Chat, &body);
        let cut = gaps(&record).contains(&CutPart::ChoiceLogprobs(0));
        assert_eq!((cut, &*record.choices[0].logprobs), (is_cut, numbers), "{logprobs}");
        assert_eq!(value(&to_json(&record))["raw_response"], value(&body), "{logprobs}");
    }
}

#[test]
fn prompts_of_several_choices_stay_where_they_differ() {
    let body = r#"{"choices":[{"index":0,"text":"a","prompt_token_ids":[1,2],"token_ids":[3]},
        {"index":1,"text":"b","prompt_token_ids":[1,2],"token_ids":[4]},
        {"index":2,"text":"c","prompt_token_ids":[9],"token_ids":[-1]}]}"#;
    let record = whole(TraceApi::Completions, body);
    use CutPart::{ChoiceIds, PromptIds};
    assert_eq!(gaps(&record), [PromptIds, ChoiceIds(0), PromptIds, ChoiceIds(1)]);
    assert_eq!(record.prompt_token_ids, [1, 2]);
    let wire = value(&to_json(&record));
    assert_eq!(wire["raw_response"], value(body));
    assert_eq!(wire["choices"][1]["text"], "b");
    assert_eq!(wire["choices"][1]["message"], json!({"role": "assistant", "content": "b"}));
    assert!(record.facts.partial, "an id that is none is missing");
}

#[test]
fn a_message_keeps_all_but_its_nulls() {
    let body = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":null,"refusal":null,
        "tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}}],
        "reasoning":"hm","audio":null}}],"error":null}"#;
    let record = whole(TraceApi::Chat, body);
    let calls = json!([{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    let expected = json!({"role": "assistant", "content": null, "tool_calls": calls, "reasoning": "hm"});
    assert_eq!(value(&record.choices[0].message), expected);
    assert_eq!((record.facts.error, record.facts.partial), (None, false));
    let bare = whole(TraceApi::Chat, r#"{"choices":[{"index":0}]}"#);
    assert_eq!(value(&bare.choices[0].message), json!({"role": "assistant", "content": null}));
}

#[test]
fn an_error_answer_is_kept_whole() {
    let body = r#"{"error":{"message":"no such model","code":404},"choices":[{"index":0}]}"#;
    for status in [404, 500] {
        let answer = assembled(TraceApi::Chat, false, status, [body.as_bytes()]);
        assert_eq!((answer.error, answer.partial, answer.choices.len()), (None, false, 0));
        let mut facts = facts(TraceApi::Chat, false);
        (facts.status, facts.error) = (status, TraceError::of_status(status));
        let wire = value(&to_json(&record(facts, RequestParts::default(), Some(answer))));
        assert_eq!(wire["raw_response"], value(body));
        assert_eq!((&wire["response_message"], &wire["choices"]), (&json!({}), &json!([])));
        assert_eq!(wire["error"], TraceError::of_status(status).unwrap().name());
    }
    let text = assembled(TraceApi::Chat, false, 502, [&b"Bad Gateway"[..]]);
    assert_eq!((text.response, text.error, text.partial), (None, None, false));
    let answer = assembled(TraceApi::Chat, false, 200, [body.as_bytes()]);
    assert_eq!((answer.error, answer.partial), (Some(TraceError::UpstreamError), true));
}

#[test]
fn a_document_that_broke_off_is_incomplete() {
    for body in ["", "{\"choices\":[", "text", "[{}]"] {
        let answer = assembled(TraceApi::Chat, false, 200, [body.as_bytes()]);
        assert_eq!((answer.error, answer.partial), (Some(TraceError::Incomplete), true), "{body}");
        assert_eq!(answer.response, None);
    }
    let odd = assembled(TraceApi::Chat, false, 200, [&b"{\"choices\":3}"[..]]);
    assert_eq!((odd.error, odd.partial, odd.response.is_some()), (None, true, true));
}

#[test]
fn a_document_beyond_the_bound_overflows() {
    let mut assembler = AnswerAssembler::bounded(TraceApi::Chat, false, 200, 1000);
    assembler.feed(&[b' '; 600]);
    assert!(assembler.bytes() >= 600);
    assembler.feed(&[b' '; 600]);
    assembler.feed(b"{}");
    assert_eq!(assembler.bytes(), 0);
    let answer = assembler.finish();
    assert_eq!((answer.error, answer.partial), (Some(TraceError::Overflow), true));
}

const RESPONSE: &str = r#"{"id":"resp_1","object":"response","model":"tiny","status":"incomplete",
    "incomplete_details":{"reason":"max_output_tokens"},"error":null,
    "output":[{"id":"rs_1","type":"reasoning","summary":[],"content":[{"type":"reasoning_text","text":"hm"}]},
    {"id":"msg_1","type":"message","role":"assistant","content":[
    {"type":"output_text","text":"a \"b\"","logprobs":[{"token":"a","logprob":-0.1},{"token":"b",
        "logprob":-2.0}]},
    {"type":"output_text","text":"c","logprobs":null}]},
    {"type":"function_call","id":"fc_1","call_id":"call_1","name":"f","arguments":"{}"}],
    "input_messages":[{"message":"x","tokens":[1,2],"type":"raw_message_tokens"},{"message":"y",
        "tokens":[3]}],
    "output_messages":[{"message":"z","tokens":[4,5],"type":"raw_message_tokens"}],
    "usage":{"input_tokens":15,"input_tokens_details":{"cached_tokens":8},"output_tokens":16,
    "output_tokens_details":{"reasoning_tokens":3},"total_tokens":31}}"#;

fn assert_is_response(answer: &AssembledAnswer) {
    let choice = &answer.choices[0];
    let said = message(answer);
    assert_eq!((&said["role"], &said["content"]), (&json!("assistant"), &json!("a \"b\"c")));
    assert_eq!(said["output"], value(RESPONSE)["output"]);
    assert_eq!(choice.logprobs, [-0.1, -2.0]);
    assert_eq!((&*answer.prompt_token_ids, &*choice.token_ids), (&[1, 2, 3][..], &[4, 5][..]));
    assert_eq!(choice.finish_reason.as_deref(), Some("max_output_tokens"));
    let tokens = TraceTokens { prompt: Some(15), completion: Some(16), cached: Some(8), reasoning: Some(3) };
    assert_eq!((answer.tokens, answer.model.as_deref()), (tokens, Some("tiny")));
    assert_eq!((answer.error, answer.partial, answer.is_complete), (None, false, true));
}

#[test]
fn a_response_is_assembled_whole_and_from_its_last_event() {
    assert_is_response(&assembled(TraceApi::Responses, false, 200, [RESPONSE.as_bytes()]));
    let stream = events(&[
        json!({"type": "response.created", "response": {"model": "other", "output": [], "usage": null}}),
        json!({"type": "response.output_text.delta", "delta": "lost", "output_index": 0, "content_index": 0}),
        json!({"type": "response.incomplete", "response": value(RESPONSE)}),
    ]);
    assert_is_response(&assembled(TraceApi::Responses, true, 200, stream.as_bytes().chunks(5)));
}

#[test]
fn a_response_without_its_last_event_is_put_together() {
    let added = "response.output_item.added";
    let item = |at: u64, item: Value| json!({"type": added, "output_index": at, "item": item});
    let delta = |kind: &str, at: u64, text: &str| {
        let kind = format!("response.{kind}.delta");
        json!({"type": kind, "output_index": at, "content_index": 0, "delta": text})
    };
    let mut first = delta("output_text", 1, "he");
    first["logprobs"] = json!([{"token": "he", "logprob": -0.25, "top_logprobs": []}]);
    let stream = events(&[
        json!({"type": "response.created", "response": {"model": "tiny", "output": []}}),
        item(0, json!({"id": "rs", "type": "reasoning", "summary": []})),
        delta("reasoning_text", 0, "so "),
        delta("reasoning_text", 0, "so"),
        item(1, json!({"id": "msg", "type": "message", "role": "assistant", "content": []})),
        json!({"type": "response.content_part.added", "output_index": 1, "content_index": 0,
            "part": {"type": "output_text", "text": "", "annotations": []}}),
        first,
        delta("output_text", 1, "llo"),
        item(2, json!({"id": "fc", "type": "function_call", "name": "f", "arguments": ""})),
        delta("function_call_arguments", 2, "{\"a\""),
        delta("function_call_arguments", 2, ":1"),
        json!({"type": "response.output_item.added", "output_index": 3, "item": {"id": "old"}}),
        json!({"type": "response.output_item.done", "output_index": 3, "item": {"id": "new", "x": 1}}),
    ]);
    let answer = assembled(TraceApi::Responses, true, 200, [stream.as_bytes()]);
    assert_eq!((answer.error, answer.partial), (Some(TraceError::Incomplete), true));
    assert_eq!(answer.choices[0].logprobs, [-0.25]);
    let text = json!([{"type": "output_text", "text": "hello", "annotations": []}]);
    let expected = json!([
        {"id": "rs", "type": "reasoning", "summary": [],
            "content": [{"type": "reasoning_text", "text": "so so"}]},
        {"id": "msg", "type": "message", "role": "assistant", "content": text},
        {"id": "fc", "type": "function_call", "name": "f", "arguments": "{\"a\":1"},
        {"id": "new", "x": 1},
    ]);
    assert_eq!(message(&answer), json!({"role": "assistant", "content": "hello", "output": expected}));
    // A failure at the end keeps what has come.
    let failure = json!({"type": "response.failed", "response": {"output": [], "error": {"code": "x"}}});
    let failed = [stream, events(&[failure])].concat();
    let failed = assembled(TraceApi::Responses, true, 200, [failed.as_bytes()]);
    assert_eq!((failed.error, failed.is_complete), (Some(TraceError::UpstreamError), true));
    assert_eq!(message(&failed)["content"], "hello");
}

const MESSAGE: &str = r#"{"id":"m","type":"message","role":"assistant","model":"tiny","content":[
    {"type":"thinking","thinking":"so so","signature":"sig"},{"type":"text","text":"hello"},
    {"type":"tool_use","id":"t","name":"f","input":{"a":[1,2.50]}},{"type":"tool_use","id":"u","name":"g",
        "input":{}}],
    "stop_reason":"tool_use","usage":{"input_tokens":5,"output_tokens":7,"cache_creation_input_tokens":2,
    "cache_read_input_tokens":8}}"#;

fn message_events() -> Vec<Value> {
    let kind = "content_block_start";
    let start = |index: u64, block: Value| json!({"type": kind, "index": index, "content_block": block});
    let delta =
        |index: u64, delta: Value| json!({"type": "content_block_delta", "index": index, "delta": delta});
    let tool = |id: &str, name: &str| json!({"type": "tool_use", "id": id, "name": name, "input": {}});
    vec![
        json!({"type": "message_start", "message": {"role": "assistant", "model": "tiny", "content": [],
            "stop_reason": null, "usage": {"input_tokens": 15, "output_tokens": 0}}}),
        json!({"type": "ping"}),
        start(0, json!({"type": "thinking", "thinking": "", "signature": ""})),
        delta(0, json!({"type": "thinking_delta", "thinking": "so "})),
        delta(0, json!({"type": "thinking_delta", "thinking": "so"})),
        delta(0, json!({"type": "signature_delta", "signature": "sig"})),
        json!({"type": "content_block_stop", "index": 0}),
        start(1, json!({"type": "text", "text": ""})),
        delta(1, json!({"type": "text_delta", "text": "hel"})),
        delta(1, json!({"type": "text_delta", "text": "lo"})),
        start(2, tool("t", "f")),
        delta(2, json!({"type": "input_json_delta", "partial_json": "{\"a\":[1"})),
        delta(2, json!({"type": "input_json_delta", "partial_json": ",2.50]}"})),
        start(3, tool("u", "g")),
        json!({"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null},
            "usage": {"input_tokens": 5, "output_tokens": 7, "cache_creation_input_tokens": 2,
            "cache_read_input_tokens": 8}}),
        json!({"type": "message_stop"}),
    ]
}

#[test]
fn a_message_is_assembled_whole_and_as_a_stream() {
    let stream = events(&message_events());
    for (is_stream, body) in [(false, MESSAGE), (true, stream.as_str())] {
        let answer = assembled(TraceApi::Messages, is_stream, 200, body.as_bytes().chunks(9));
        let expected = json!({"role": "assistant", "content": value(MESSAGE)["content"]});
        assert_eq!(message(&answer), expected, "{is_stream}");
        assert_eq!(answer.choices[0].finish_reason.as_deref(), Some("tool_use"));
        let tokens = TraceTokens { prompt: Some(15), completion: Some(7), cached: Some(8), reasoning: None };
        assert_eq!((answer.tokens, answer.model.as_deref()), (tokens, Some("tiny")));
        assert_eq!((answer.error, answer.partial, answer.is_complete), (None, false, true));
    }
}

#[test]
fn a_message_that_broke_off_is_kept_so_far() {
    let all = message_events();
    let answer = assembled(TraceApi::Messages, true, 200, [events(&all[..12]).as_bytes()]);
    assert_eq!((answer.error, answer.partial), (Some(TraceError::Incomplete), true));
    assert_eq!(message(&answer)["content"][2]["input"], "{\"a\":[1");
    assert_eq!(answer.tokens.prompt, Some(15));
    let error = json!({"type": "error", "error": {"type": "overloaded_error", "message": "x"}});
    let failed = events(&[all[0].clone(), error]);
    let failed = assembled(TraceApi::Messages, true, 200, [failed.as_bytes()]);
    assert_eq!((failed.error, failed.partial), (Some(TraceError::UpstreamError), true));
}

#[test]
fn the_wire_form_has_its_fields_in_their_order() {
    let wire = to_json(&whole(TraceApi::Completions, r#"{"choices":[{"index":0,"text":"x"}]}"#));
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let wire = value(&wire);
    assert_eq!(
        keys(&wire),
        "trace_id session_id model messages prompt_token_ids response_message completion_token_ids \
         logprobs routing_matrices finish_reason weight_version latency_ms token_counts timestamp metadata \
         raw_request raw_response api stream status error partial choices ttft_ms queue_ms \
         upstream attempts request_id client_model cumulative"
    );
    assert_eq!(keys(&wire["choices"][0]), "index message text completion_token_ids logprobs finish_reason");
    assert_eq!((&wire["latency_ms"], &wire["ttft_ms"]), (&json!(125.0), &json!(20.0)));
    assert_eq!((&wire["timestamp"], &wire["queue_ms"]), (&json!(1795154964.25), &Value::Null));
    assert_eq!((&wire["weight_version"], &wire["logprobs"]), (&json!(3), &Value::Null));
}
