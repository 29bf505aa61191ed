//! Tests of `usage`: vLLM's answers cut anywhere, wrong answers, and any document compared with its tree.

mod properties;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::Value;

use super::readings::UsageCounts;
use super::*;
use crate::sse::tests::assert_linear;

const JSON: &str = "application/json";
const SSE: &str = "text/event-stream; charset=utf-8";

/// All results of a meter.
type Told = (Usage, Option<String>, Option<StreamError>);

fn told(meter: &UsageMeter) -> Told {
    (meter.usage(), meter.id().map(str::to_owned), meter.found.failure)
}

fn pieces<'p>(kind: &str, pieces: impl IntoIterator<Item = &'p [u8]>) -> Told {
    let mut meter = UsageMeter::of(Some(kind)).unwrap();
    pieces.into_iter().for_each(|piece| meter.feed(piece));
    told(&meter)
}

fn whole(kind: &str, body: &[u8]) -> Told {
    pieces(kind, [body])
}

/// Prompt, cached, output and reasoning tokens.
fn usage(numbers: [Option<u64>; 4]) -> Usage {
    let [prompt_tokens, cached_tokens, output_tokens, reasoning_tokens] = numbers;
    Usage { prompt_tokens, cached_tokens, output_tokens, reasoning_tokens }
}

/// One of vLLM's answers.
fn sample(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/data/vllm-0.32/{name}.body", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).expect(&path)
}

/// The content type, the body and the expected results.
type Sample = (&'static str, Vec<u8>, [Option<u64>; 4], Option<&'static str>);

/// vLLM's answers.
fn samples() -> Vec<Sample> {
    let numbers = |prompt, output| [Some(prompt), Some(0), Some(output), None];
    let responses = |prompt, output| [Some(prompt), Some(0), Some(output), Some(0)];
    vec![
        (JSON, sample("chat"), numbers(31, 12), Some("chatcmpl-955534d1733abee8")),
        (SSE, sample("chat_stream"), numbers(31, 6), Some("chatcmpl-aac26cbe005fb1de")),
        (JSON, sample("compl"), numbers(5, 6), Some("cmpl-8c777fc2479be4bf")),
        (SSE, sample("compl_stream"), numbers(5, 4), Some("cmpl-af40cc4a7f537155")),
        (JSON, sample("responses"), responses(15, 16), Some("resp_9711382ea0b4cb19")),
        (SSE, sample("responses_stream"), responses(15, 16), Some("resp_8408fe1d916a092e")),
        (JSON, sample("messages"), numbers(15, 6), Some("chatcmpl-b80b6159a81705b6")),
        (SSE, sample("messages_stream"), numbers(15, 4), Some("chatcmpl-a0764b636acd2815")),
        (JSON, sample("inference_generate"), numbers(4, 4), None),
        (JSON, sample("err_long"), [None; 4], None),
        (JSON, sample("err_404"), [None; 4], None),
        (JSON, sample("count_tokens"), [None; 4], None),
    ]
}

#[test]
fn reads_usage_of_vllms_answers_cut_anywhere() {
    let read = |(usage, id, _): Told| (usage, id);
    for (kind, body, numbers, id) in samples() {
        let expected = (usage(numbers), id.map(str::to_owned));
        assert_eq!(read(whole(kind, &body)), expected, "{}", String::from_utf8_lossy(&body));
        for cut in 0..=body.len() {
            let (front, back) = body.split_at(cut);
            assert_eq!(read(pieces(kind, [front, back])), expected, "cut at {cut}");
        }
        assert_eq!(read(pieces(kind, body.chunks(1))), expected, "byte by byte");
    }
}

#[test]
fn reports_nothing_wrong_for_a_body_that_ends_early() {
    for (kind, body, numbers, ..) in samples() {
        for end in 0..body.len() {
            let (cut, ..) = whole(kind, &body[..end]);
            let all = usage(numbers);
            let is_right = |cut: Option<u64>, all| cut.is_none() || cut == all;
            assert!(is_right(cut.prompt_tokens, all.prompt_tokens), "{end}");
            assert!(is_right(cut.cached_tokens, all.cached_tokens), "{end}");
            assert!(is_right(cut.reasoning_tokens, all.reasoning_tokens), "{end}");
        }
    }
}

#[test]
fn treats_absent_and_invalid_numbers_as_unknown() {
    let most = u64::MAX.to_string();
    for (written, number) in [
        ("7", Some(7)),
        ("0", Some(0)),
        (" 12 ", Some(12)),
        ("null", None),
        (most.as_str(), Some(u64::MAX)),
        ("18446744073709551616", None),
        ("99999999999999999999999999999999", None),
        ("-1", None),
        ("1.5", None),
        ("1e3", None),
        ("\"7\"", None),
        ("[7]", None),
        ("{\"prompt_tokens\":7}", None),
        ("true", None),
        ("NaN", None),
    ] {
        let body = format!("{{\"usage\":{{\"prompt_tokens\":{written},\"completion_tokens\":3}}}}");
        let expected = usage([number, None, Some(3), None]);
        assert_eq!(whole(JSON, body.as_bytes()).0, expected, "{written}");
        assert_eq!(pieces(JSON, body.as_bytes().chunks(1)).0, expected, "{written}");
    }
}

#[test]
fn adds_cached_tokens_to_anthropics_prompt() {
    let body = |usage: &str| format!("{{\"type\":\"message\",\"usage\":{usage}}}");
    for (said, prompt, cached) in [
        (r#"{"input_tokens":5,"cache_read_input_tokens":90,"cache_creation_input_tokens":5}"#, 100, Some(90)),
        (r#"{"cache_creation_input_tokens":null,"cache_read_input_tokens":9,"input_tokens":1}"#, 10, Some(9)),
        (r#"{"input_tokens":5,"cache_read_input_tokens":null}"#, 5, None),
    ] {
        let (told, ..) = whole(JSON, body(said).as_bytes());
        assert_eq!((told.prompt_tokens, told.cached_tokens), (Some(prompt), cached), "{said}");
    }
    let most = u64::MAX;
    let (told, ..) =
        whole(JSON, body(&format!(r#"{{"input_tokens":{most},"cache_read_input_tokens":1}}"#)).as_bytes());
    assert_eq!((told.prompt_tokens, told.cached_tokens), (None, Some(1)));
}

#[test]
fn counts_only_the_answers_own_usage() {
    let fake = r#"{"prompt_tokens":666,"completion_tokens":666}"#;
    let quoted = serde_json::to_string(&format!("\\\"usage\":{fake}}}],\"usage\":{fake}")).unwrap();
    let real = "\"usage\":{\"prompt_tokens\":1}";
    for body in [
        format!("{{\"choices\":[{{\"message\":{{\"content\":{quoted}}}}}],{real}}}"),
        format!("{{\"choices\":[{{\"message\":{{\"usage\":{fake}}},\"usage\":{fake}}}],{real}}}"),
        format!("{{\"choices\":[[{{\"usage\":{fake}}}],{{\"x\":[{{\"usage\":{fake}}}]}}],{real}}}"),
        format!("{{{real},\"metadata\":{{\"usage\":{fake}}},\"prompt_text\":{quoted}}}"),
        format!("{{{real},\"Usage\":{fake},\"\\\"usage\":{fake},\"us\\u0061ge\":{fake},\"usage \":{fake}}}"),
        format!("{{\"message\":{{\"message\":{{\"usage\":{fake}}}}},{real},\"usage\":[{fake}]}}"),
        format!("{{{real},\"usage\":\"{{\\\"prompt_tokens\\\":7}}\",\"usage\":null,\"usage\":9}}"),
        format!("{{\"choices\":{{\"finish_reason\":\"stop\"}},{real}}}{{\"usage\":{fake}}}"),
        format!("{{\"{}\":1,{real}}}", "\\\\".repeat(100)),
    ] {
        let expected = (usage([Some(1), None, None, None]), None, None);
        assert_eq!(whole(JSON, body.as_bytes()), expected, "{body}");
        assert_eq!(pieces(JSON, body.as_bytes().chunks(1)), expected, "{body}");
        let event = format!("data: {body}\n\n");
        assert_eq!(pieces(SSE, event.as_bytes().chunks(7)), expected, "{body}");
    }
    for body in
        [quoted.as_str(), "[{\"usage\":{\"prompt_tokens\":1}}]", "{\"usage\"{\"prompt_tokens\":1}}", ""]
    {
        assert_eq!(whole(JSON, body.as_bytes()).0, Usage::default(), "{body}");
    }
}

#[test]
fn reads_a_stream_line_by_line() {
    let real = |n: u64| format!("{{\"id\":\"a\",\"usage\":{{\"prompt_tokens\":{n}}}}}");
    for (stream, prompt) in [
        (format!("data: {}\r\n\r\n", real(1)), Some(1)),
        (format!("data:{}\r\r", real(1)), Some(1)),
        (format!("\u{feff}data: {}\n\n", real(1)), Some(1)),
        (format!("data: {}\r\rdata: {}\r\r", real(1), real(2)), Some(2)),
        (format!("data: {}", real(1)), Some(1)),
        (format!("event: x\ndata: {}\n\ndata: {}\n\ndata: [DONE]\n\n", real(1), real(2)), Some(2)),
        (format!("data: {}\n\ndata: {{\"usage\": null}}\n\n", real(1)), Some(1)),
        (format!(": {}\n\n", real(1)), None),
        (format!("database: {}\n\n", real(1)), None),
        (format!(" data: {}\n\n", real(1)), None),
        (format!("event: {}\n\n", real(1)), None),
        (format!("data: {{\"id\":\"\n\ndata: {}\n\n", real(1)), Some(1)),
    ] {
        assert_eq!(whole(SSE, stream.as_bytes()).0.prompt_tokens, prompt, "{stream:?}");
        assert_eq!(pieces(SSE, stream.as_bytes().chunks(1)).0.prompt_tokens, prompt, "{stream:?}");
    }
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    for kind in [SSE, JSON] {
        assert_linear(8, || {
            let mut meter = UsageMeter::of(Some(kind)).unwrap();
            Box::new(move |chunk| meter.feed(chunk))
        });
    }
}

#[test]
fn reports_the_failure_of_a_stream() {
    let said = |code| Some(StreamError { code });
    let good = "data: {\"id\":\"a\",\"error\":null,\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    for (event, failure) in [
        (
            r#"{"error":{"message":"x","type":"InternalServerError","param":null,"code":500}}"#,
            said(Some(500)),
        ),
        (r#"{"error": {"code": 400, "message": "\"code\":500"}}"#, said(Some(400))),
        (r#"{"error":{"message":"x","code":"server_error"}}"#, said(None)),
        (r#"{"error":{"message":"x","code":7}}"#, said(None)),
        (r#"{"error":"Unauthorized"}"#, said(None)),
        (r#"{"type":"error","error":{"type":"internal_error","message":"x"}}"#, said(None)),
        (r#"{"code":"server_error","message":"x","sequence_number":7,"type":"error"}"#, said(None)),
        (r#"{"response":{"status":"failed","error":null},"type":"response.failed"}"#, said(None)),
        (r#"{"response":{"error":{"code":503}},"type":"response.failed"}"#, said(Some(503))),
        (r#"{"object":"error","message":"x","code":400}"#, said(None)),
        // No JSON, but what was read of it counts, in one piece as in two.
        (r#"{"type":"error":null,"m]"#, said(None)),
        (r#"{"type":"response.failed":null}"#, said(None)),
        (r#"{"type":,"error":null}"#, None),
        (r#"{"type":"response.completed","response":{"error":null}}"#, None),
        (r#"{"choices":[{"delta":{"content":"{\"error\":{\"code\":500}}"}}]}"#, None),
        (r#"{"choices":[{"error":{"code":500},"type":"error"}],"x":{"error":{}},"error":null}"#, None),
        (r#"{"type":"content_block_delta","delta":{"type":"error","error":{}}}"#, None),
        (r#"{"type":"response.output_text.delta","delta":"error"}"#, None),
    ] {
        let stream = format!("{good}event: x\ndata: {event}\n\ndata: [DONE]\n\n");
        for cut in 0..=stream.len() {
            let (front, back) = stream.as_bytes().split_at(cut);
            assert_eq!(pieces(SSE, [front, back]).2, failure, "{event} cut at {cut}");
        }
        let mut document = UsageMeter::of(Some(JSON)).unwrap();
        document.feed(event.as_bytes());
        assert_eq!(document.failure(), None, "{event}");
    }
}

#[test]
fn keeps_valid_ids_only() {
    let longest = "x".repeat(96);
    for (written, id) in [
        ("\"chatcmpl-1\"", Some("chatcmpl-1")),
        ("\"\"", None),
        ("7", None),
        ("null", None),
        ("\"a\\\"b\"", None),
        (&format!("\"{longest}\""), Some(longest.as_str())),
        (&format!("\"{longest}x\""), None),
    ] {
        let body = format!("{{\"id\":{written}}}");
        assert_eq!(whole(JSON, body.as_bytes()).1.as_deref(), id, "{written}");
        assert_eq!(pieces(JSON, body.as_bytes().chunks(1)).1.as_deref(), id, "{written}");
    }
}

#[test]
fn reads_documents_and_streams_only() {
    for kind in [None, Some("audio/wav"), Some("text/plain"), Some("application/jsonl"), Some("")] {
        assert!(UsageMeter::of(kind).is_none(), "{kind:?}");
    }
    for kind in ["application/json", "Application/JSON ; charset=utf-8", "TEXT/EVENT-STREAM"] {
        assert!(UsageMeter::of(Some(kind)).is_some(), "{kind}");
    }
}
