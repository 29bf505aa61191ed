//! Tests of the end of the content: reported with the first piece that makes the terminal event whole.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::streams::*;
use crate::route::dialect::BodyDialect;

use BodyDialect::{Chat, Completions, Messages, Other, Responses};

const MESSAGE_STOP: &str = "event: message_stop\ndata: {\"type\":\"message_stop\"}";

/// A dialect, a stream up to the line that ends its content, and whether it does.
fn ends() -> Vec<(BodyDialect, String, bool)> {
    let event = |name: &str, bytes: usize| {
        format!("event: {name}\ndata: {{\"response\":{{\"x\":\"{}\"}}}}", "x".repeat(bytes))
    };
    let delta = "event: content_block_delta\ndata: {\"text\":\"event: message_stop\"}\n\n";
    vec![
        (Chat, "data: {}\n\ndata: [DONE]".into(), true),
        (Completions, "data:[DONE]".into(), true),
        (Chat, "data:  [DONE] ".into(), true),
        (Chat, "data: {\"error\":{}}".into(), false),
        (Chat, "event: error\ndata: {}".into(), false),
        (Chat, "data: \"[DONE]\"".into(), false),
        (Chat, ": [DONE]".into(), false),
        (Chat, "event: [DONE]".into(), false),
        (Chat, MESSAGE_STOP.into(), false),
        (Messages, [delta, MESSAGE_STOP].concat(), true),
        (Messages, delta.trim_end().into(), false),
        (Messages, "data: [DONE]".into(), false),
        (Messages, "event: message_stop".into(), false),
        (Messages, "event: message_stop\n\ndata: {}".into(), false),
        (Messages, "event: message_stop\n: comment\nid: 5\ndata: {}".into(), true),
        (Messages, "event: error\ndata: {\"type\":\"error\"}".into(), false),
        (Responses, event("response.completed", 5), true),
        (Responses, event("response.completed", 5000), true),
        (Responses, event("response.incomplete", 5), true),
        (Responses, event("response.failed", 5000), true),
        (Responses, event("response.created", 5000), false),
        (Responses, event("response.output_text.delta", 5), false),
        (Responses, format!("event: response.completed\n: {}", "x".repeat(5000)), false),
        (Responses, "data: [DONE]".into(), false),
        (Other, "data: [DONE]".into(), false),
    ]
}

#[test]
fn a_stream_ends_with_the_line_of_its_terminal_event() {
    for (dialect, text, is_end) in ends() {
        for end in ["\n", "\r\n", "\r"] {
            let text = text.replace('\n', end);
            let body = format!("{text}{end}{end}: late{end}{end}");
            let ended_at = |body: &str| {
                let cuts = [text.len(), text.len() + 1].map(|cut| cut.min(body.len()));
                cleaned(stream(dialect, NOTHING), body.as_bytes(), &cuts, true).ended_at
            };
            assert_eq!(ended_at(&body), is_end.then_some(text.len() + 1), "{dialect:?} {text}");
            // Without its line end, only the text that ends a chat is known to be whole.
            let is_end = is_end && matches!(dialect, Chat | Completions);
            assert_eq!(ended_at(&text), is_end.then_some(text.len()), "{dialect:?} {text}");
        }
    }
}

#[test]
fn other_answers_end_with_their_last_piece() {
    let cleanups = [whole(Chat, BOTH), whole(Messages, NOTHING)];
    for (mut cleanup, last) in cleanups.into_iter().zip([&b"}"[..], b""]) {
        assert!(!cleanup.feed(b"{", false, &mut Vec::new()).ends);
        assert!(cleanup.feed(last, true, &mut Vec::new()).ends);
    }
    let mut cut = stream(Chat, BOTH);
    assert!(!cut.feed(b"data: {}\n\n", true, &mut Vec::new()).ends, "a stream that is cut off has no end");
}

proptest! {
    #[test]
    fn any_chunks_report_the_same_end(
        (dialect, text, is_end) in select(ends()),
        end in select(vec!["\n", "\r\n", "\r"]),
        fields in select(vec![NOTHING, BOTH]),
        cuts in prop::collection::vec(any::<Index>(), 0..8),
        before in select(vec!["", ": ping\n\n", "data: {\"choices\":[]}\n\n", "event: ping\ndata: {}\n\n"]),
    ) {
        let fields = if matches!(dialect, Chat | Completions) { fields } else { NOTHING };
        let text = format!("{before}{text}").replace('\n', end);
        let body = format!("{text}{end}{end}: late{end}{end}");
        let cleaned = cleaned(stream(dialect, fields), body.as_bytes(), &places(&cuts, body.len()), false);
        // The end of the first piece that has the line and the beginning of its end.
        let wanted = places(&cuts, body.len()).into_iter().find(|end| *end > text.len()).or(Some(body.len()));
        prop_assert_eq!(cleaned.ended_at, wanted.filter(|_| is_end));
        prop_assert_eq!(cleaned.body, body);
    }
}
