//! The verdicts on answers and their events.

use super::*;
use crate::sse::tests::assert_linear;

fn whole(status: u16, kind: &str, body: &str) -> AnswerVerdict {
    let mut judge = AnswerJudge::new(status, Some(kind), Some(body.len() as u64));
    judge.feed(body.as_bytes(), true)
}

const SSE: &str = "text/event-stream; charset=utf-8";

#[test]
fn distinguishes_answers_about_the_upstream_from_answers_to_the_client() {
    let leaving = r#"{"error":{"message":"cannot schedule new futures after shutdown","code":500}}"#;
    let aborted = r#"{"choices":[{"finish_reason":"abort"}],"usage":{"completion_tokens":0}}"#;
    let partial = r#"{"choices":[{"finish_reason":"abort"}],"usage":{"completion_tokens":4}}"#;
    for (status, kind, body, verdict) in [
        (500, "application/json", leaving, AnswerVerdict::Leaving),
        (500, "application/json", r#"{"error":{"message":"other"}}"#, AnswerVerdict::Accept),
        (200, "application/json", aborted, AnswerVerdict::Aborted),
        (200, "application/json", partial, AnswerVerdict::Accept),
        (
            200,
            "application/json",
            r#"{"status":"cancelled","usage":{"output_tokens":0}}"#,
            AnswerVerdict::Aborted,
        ),
        (
            200,
            "application/json",
            r#"{"status":"cancelled","usage":{"output_tokens":9}}"#,
            AnswerVerdict::Accept,
        ),
        (
            200,
            "application/json",
            r#"{"type":"message","usage":{"output_tokens":0}}"#,
            AnswerVerdict::Aborted,
        ),
        (200, "application/json", r#"{"type":"message","usage":{"output_tokens":3}}"#, AnswerVerdict::Accept),
        (404, "application/json", leaving, AnswerVerdict::Accept),
        (200, SSE, "data: {\"error\":{\"message\":\"dead\",\"code\":500}}\n\n", AnswerVerdict::Failed(500)),
        (200, SSE, "data: {\"error\":{\"message\":\"bad\",\"code\":400}}\n\n", AnswerVerdict::Failed(400)),
        (200, SSE, "data: {\"error\":{\"message\":\"no code\"}}\n\n", AnswerVerdict::Failed(500)),
        (200, SSE, "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n", AnswerVerdict::Accept),
        (
            200,
            SSE,
            "data: {\"choices\":[{\"delta\":{\"content\":\"\"},\"finish_reason\":\"abort\"}]}\n\n",
            AnswerVerdict::Aborted,
        ),
        // Ends that are proper, of answers that are none.
        (200, SSE, "", AnswerVerdict::Nothing),
        (200, SSE, ": keep-alive\n\n", AnswerVerdict::Nothing),
        (200, SSE, "data: {\"choices\":[{\"del", AnswerVerdict::Nothing),
        (200, SSE, "data: [DONE]\n\n", AnswerVerdict::Accept),
        (200, "application/json", "", AnswerVerdict::Nothing),
        (200, "text/plain", "", AnswerVerdict::Accept),
        (404, "application/json", "", AnswerVerdict::Accept),
    ] {
        assert_eq!(whole(status, kind, body), verdict, "{status} {body}");
    }
}

const ROLE: &str = r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
const STARTS: &str = r#"{"type":"message_start","message":{"stop_reason":null}}"#;

fn events(events: &[(&str, &str)]) -> String {
    let event = |(name, data): &(&str, &str)| match *name {
        "" => format!("data: {data}\n\n"),
        name => format!("event: {name}\ndata: {data}\n\n"),
    };
    events.iter().map(event).collect()
}

#[test]
fn holds_the_prelude_of_a_stream_until_the_next_event() {
    let text = r#"{"choices":[{"delta":{"content":"a"},"finish_reason":null}]}"#;
    let abort = r#"{"choices":[{"delta":{"content":""},"finish_reason":"abort"}]}"#;
    let empty = r#"{"choices":[{"text":"","finish_reason":"abort"}]}"#;
    let late = r#"{"choices":[{"text":"a","finish_reason":"abort"}]}"#;
    let gave_up = r#"{"delta":{"stop_reason":null},"usage":{"output_tokens":0}}"#;
    let ended = r#"{"delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":0}}"#;
    let cancelled = r#"{"response":{"status":"cancelled","usage":{"output_tokens":0,"x":{}}}}"#;
    let dead = r#"{"error":{"message":"EngineCore encountered an issue","code":500}}"#;
    for (prelude, last, verdict) in [
        (&[("", ROLE), ("", ROLE)][..], ("", text), AnswerVerdict::Accept),
        (&[("", ROLE)], ("", abort), AnswerVerdict::Aborted),
        (&[("", ROLE)], ("", dead), AnswerVerdict::Failed(500)),
        (&[], ("", empty), AnswerVerdict::Aborted),
        (&[], ("", late), AnswerVerdict::Accept),
        (&[("message_start", STARTS)], ("content_block_start", "{}"), AnswerVerdict::Accept),
        (&[("message_start", STARTS), ("ping", "{}")], ("message_delta", gave_up), AnswerVerdict::Aborted),
        (&[("message_start", STARTS)], ("message_delta", ended), AnswerVerdict::Accept),
        (&[("message_start", STARTS)], ("error", "{}"), AnswerVerdict::Failed(500)),
        (&[("response.created", "{}"), ("response.in_progress", "{}")], ("x", "{}"), AnswerVerdict::Accept),
        (&[("response.created", "{}")], ("response.completed", cancelled), AnswerVerdict::Aborted),
        (&[("response.created", "{}")], ("response.completed", "{}"), AnswerVerdict::Accept),
        (&[("response.created", "{}")], ("", dead), AnswerVerdict::Failed(500)),
    ] {
        for line_end in ["\n", "\r\n", "\r"] {
            let mut judge = AnswerJudge::new(200, Some(SSE), None);
            for byte in events(prelude).replace('\n', line_end).as_bytes() {
                assert_eq!(judge.feed(&[*byte], false), AnswerVerdict::Wait, "{prelude:?}");
            }
            let last = events(&[last]).replace('\n', line_end);
            assert_eq!(judge.feed(last.as_bytes(), false), verdict, "{prelude:?} {last}");
        }
    }
}

#[test]
fn distinguishes_a_dead_engine_from_other_errors() {
    const TEXT: &str = "EngineCore encountered an issue. See stack trace (above) for the root cause.";
    let error = |message: &str, code: &str| {
        let kind = r#""type":"InternalServerError","param":null"#;
        format!(r#"{{"error":{{"message":"{message}",{kind},"code":{code}}}}}"#)
    };
    let quoted = format!(r#"cannot read \"message\":\"{TEXT}\""#);
    let anthropic =
        |text: &str| format!(r#"{{"type":"error","error":{{"type":"internal_error","message":"{text}"}}}}"#);
    for (body, json, first_event) in [
        (error(TEXT, "500"), AnswerVerdict::EngineDead, AnswerVerdict::EngineDead),
        (error(TEXT, "503"), AnswerVerdict::EngineDead, AnswerVerdict::EngineDead),
        (error(TEXT, "400"), AnswerVerdict::EngineDead, AnswerVerdict::Failed(400)),
        (error(TEXT, "500").replace(":", ": "), AnswerVerdict::EngineDead, AnswerVerdict::EngineDead),
        (anthropic(TEXT), AnswerVerdict::EngineDead, AnswerVerdict::EngineDead),
        (
            format!(r#"{{"object":"error","message":"{TEXT}","code":500}}"#),
            AnswerVerdict::EngineDead,
            AnswerVerdict::Accept,
        ),
        (error(&TEXT[..40], "500"), AnswerVerdict::Accept, AnswerVerdict::Failed(500)),
        (error(&format!("{TEXT} Again."), "500"), AnswerVerdict::Accept, AnswerVerdict::Failed(500)),
        (error(&format!("Not so: {TEXT}"), "500"), AnswerVerdict::Accept, AnswerVerdict::Failed(500)),
        (error(&quoted, "500"), AnswerVerdict::Accept, AnswerVerdict::Failed(500)),
        (
            format!(r#"{{"error":{{"message":"x","param":"{TEXT}","code":500}}}}"#),
            AnswerVerdict::Accept,
            AnswerVerdict::Failed(500),
        ),
        (error("other", "500"), AnswerVerdict::Accept, AnswerVerdict::Failed(500)),
        (TEXT.to_owned(), AnswerVerdict::Accept, AnswerVerdict::Accept),
    ] {
        let event = format!("data: {body}\n\n");
        let cases = [
            (500, "application/json", &body, json),
            (200, SSE, &event, first_event),
            (404, "application/json", &body, AnswerVerdict::Accept),
            (503, "application/json", &body, AnswerVerdict::Accept),
        ];
        for (status, kind, text, verdict) in cases {
            assert_eq!(whole(status, kind, text), verdict, "{status} {text}");
            for size in [1, 50] {
                let mut judge = AnswerJudge::new(status, Some(kind), Some(text.len() as u64));
                let pieces = text.as_bytes().chunks(size).map(|piece| (piece, false));
                let mut verdicts =
                    pieces.chain([(&b""[..], true)]).map(|(piece, end)| judge.feed(piece, end));
                let cut = verdicts.find(|verdict| *verdict != AnswerVerdict::Wait);
                assert_eq!(cut, Some(verdict), "{status} {text} in pieces of {size}");
            }
        }
    }
    let later = format!("data: {{\"choices\":[]}}\n\ndata: {}\n\n", error(TEXT, "500"));
    assert_eq!(whole(200, SSE, &later), AnswerVerdict::Accept, "the client has had a part of the answer");
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    for (status, kind) in [(500, "application/json"), (200, SSE)] {
        // Each byte may be the last one of a searched word.
        assert_linear(200, || {
            let mut judge = AnswerJudge::new(status, Some(kind), None);
            Box::new(move |chunk| {
                judge.feed(chunk, false);
            })
        });
    }
}

#[test]
fn holds_comments_and_cut_events_and_nothing_large() {
    let mut judge = AnswerJudge::new(200, Some(SSE), None);
    assert_eq!(judge.feed(b": keep-alive\n\n", false), AnswerVerdict::Wait);
    assert_eq!(judge.feed(b"data: {\"x\"", false), AnswerVerdict::Wait);
    assert_eq!(judge.feed(b":1}\n", false), AnswerVerdict::Accept);

    // The beginning of an answer may repeat a request of any length.
    let mut judge = AnswerJudge::new(200, Some(SSE), None);
    let long = format!("event: response.created\ndata: {}\n\n", "x".repeat(MAX_SEEN_BYTES));
    assert_eq!(judge.feed(long.as_bytes(), false), AnswerVerdict::Accept);

    let mut judge = AnswerJudge::new(500, Some("text/plain"), None);
    assert_eq!(judge.feed(&vec![b'x'; MAX_SEEN_BYTES - 1], false), AnswerVerdict::Wait);
    assert_eq!(judge.feed(b"xx", false), AnswerVerdict::Accept);
    let JudgedAnswer::Error(text) = &judge.kind else { panic!("{judge:?}") };
    assert!(text.capacity() <= 2 * MAX_SEEN_BYTES);

    let mut judge = AnswerJudge::new(200, Some("application/json"), Some(1 << 20));
    assert_eq!(judge.feed(b"", false), AnswerVerdict::Wait);
    assert_eq!(judge.feed(b"{", false), AnswerVerdict::Accept, "a large answer is not held");
}
