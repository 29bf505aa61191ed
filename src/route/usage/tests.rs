//! Tests of `usage`: the request for the usage, and a filtered stream that equals the one without the
//! request.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::sse::tests::assert_linear;

fn asking(body: &str, dialect: BodyDialect) -> Option<String> {
    let mut scanner = Scanner::new();
    scanner.scan(body.as_bytes());
    usage_request(body.as_bytes(), &scanner, dialect)
        .map(|asking| String::from_utf8(asking.apply(body.as_bytes())).unwrap())
}

#[test]
fn requests_the_usage_of_streams() {
    const OPTIONS: &str = r#""stream_options":{"include_usage":true}"#;
    for (body, wanted) in [
        (r#"{"stream":true}"#, Some(format!(r#"{{"stream":true,{OPTIONS}}}"#))),
        (" {\"stream\": 1 }\r\n", Some(format!(" {{\"stream\": 1 ,{OPTIONS}}}\r\n"))),
        (r#"{"stream":"yes","n":null}"#, Some(format!(r#"{{"stream":"yes","n":null,{OPTIONS}}}"#))),
        (r#"{"stream_options":null,"stream":true}"#, Some(format!(r#"{{{OPTIONS},"stream":true}}"#))),
        (r#"{"stream":true,"stream_options":{}}"#, Some(format!(r#"{{"stream":true,{OPTIONS}}}"#))),
        (
            r#"{"stream":true,"stream_options":{"include_usage":true},"stream_options":null}"#,
            Some(format!(r#"{{"stream":true,{OPTIONS},{OPTIONS}}}"#)),
        ),
        (r#"{"stream":true,"prompt":[1,2]}"#, Some(format!(r#"{{"stream":true,"prompt":[1,2],{OPTIONS}}}"#))),
        (r#"{"stream":true,"stream_options":{"include_usage":false}}"#, None),
        (r#"{"stream":true,"stream_options":{"include_usage":true}}"#, None),
        (r#"{"stream":true,"stream_options":{"continuous_usage_stats":true}}"#, None),
        (r#"{"stream":true,"stream_options":7}"#, None),
        (r#"{"stream":false}"#, None),
        (r#"{"stream":null}"#, None),
        (r#"{}"#, None),
        (r#"{"stream":true,"stream":false}"#, None),
        (r#"{"stream":true,"n":3}"#, None),
        (r#"{"stream":true,"n":"1"}"#, None),
        (r#"{"stream":true,"prompt":["a","b"]}"#, None),
        (r#"{"stream":true,"prompt":[[1],[2]]}"#, None),
        (r#"{"stream":true,"prompt":"a","prompt_embeds":"b"}"#, None),
        (r#"{"stream":true,"prompt_embeds":["a","b"]}"#, None),
        (r#"{"stream":true"#, None),
        (r#"{"stream":true,}"#, None),
        (r#"{"stream":true} x"#, None),
        (r#"[{"stream":true}]"#, None),
        ("", None),
    ] {
        for dialect in [BodyDialect::Chat, BodyDialect::Completions] {
            assert_eq!(asking(body, dialect), wanted, "{body}");
        }
        for dialect in [BodyDialect::Responses, BodyDialect::Messages, BodyDialect::Other] {
            assert_eq!(asking(body, dialect), None, "{body}");
        }
    }
}

/// The filtered stream, fed in pieces that end at these places, and whether each piece was copied.
fn fed(body: &[u8], cuts: &[usize]) -> (Vec<u8>, Vec<bool>) {
    let (mut filter, mut out, mut copied, mut start) = (UsageFilter::default(), Vec::new(), Vec::new(), 0);
    for end in cuts.iter().copied().chain([body.len()]) {
        let piece = &body[start..end];
        let taken = filter.feed(piece, end == body.len() && start != end);
        copied.push(taken.is_some());
        out.extend_from_slice(taken.as_deref().unwrap_or(piece));
        start = end;
    }
    let taken = filter.feed(b"", true);
    out.extend(taken.unwrap_or_default());
    (out, copied)
}

const TALK: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#;
const END: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
const STAMPED: &str =
    r#"data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"system_fingerprint":"f"}"#;
const USAGE: &str = r#"data: {"id":"c","choices":[],"usage":{"prompt_tokens":5},"system_fingerprint":"f"}"#;
const BARE: &str = r#"data: {"id":"c","choices":[],"usage":{"prompt_tokens":5}}"#;
const NULL: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"}}],"usage":null}"#;

fn events(events: &[&str]) -> String {
    events.iter().map(|event| format!("{event}\n\n")).collect()
}

#[test]
fn leaves_the_stream_without_the_request() {
    const DONE: &str = "data: [DONE]";
    for (asked, wanted) in [
        (vec![TALK, END, USAGE, DONE], vec![TALK, STAMPED, DONE]),
        (vec![TALK, END, BARE, DONE], vec![TALK, END, DONE]),
        (vec![TALK, STAMPED, USAGE, DONE], vec![TALK, STAMPED, DONE]),
        (vec![END, TALK, USAGE], vec![END, TALK]),
        (vec![END, ": ping", USAGE, DONE], vec![STAMPED, ": ping", DONE]),
        (vec![END, END, USAGE, DONE], vec![END, STAMPED, DONE]),
        (vec![NULL, END, DONE], vec![NULL, END, DONE]),
        (vec![TALK, END], vec![TALK, END]),
        (vec![USAGE], vec![]),
    ] {
        let (asked, wanted) = (events(&asked), events(&wanted));
        for end in ["\n", "\r\n", "\r"] {
            let (asked, wanted) = (asked.replace('\n', end), wanted.replace('\n', end));
            let told = fed(asked.as_bytes(), &[]).0;
            assert_eq!(String::from_utf8(told).unwrap(), wanted);
        }
    }
}

#[test]
fn does_not_copy_pieces_without_usage() {
    let text = r#"data: {"choices":[{"delta":{"content":"\"usage\":{},\"finish_reason\":\"stop\""}}]}"#;
    let first = events(&[TALK, TALK, text, ": ping"]);
    let second = events(&[TALK]);
    let all = format!("{first}{second}{}", events(&[END, USAGE, "data: [DONE]"]));
    let cuts = [first.len(), first.len() + second.len(), all.len() - "data: [DONE]\n\n".len()];
    let (told, copied) = fed(all.as_bytes(), &cuts);
    assert_eq!(copied, [false, false, true, false], "with the end of its choice, a stream is looked into");
    assert!(String::from_utf8(told).unwrap().ends_with("\"f\"}\n\ndata: [DONE]\n\n"));
}

#[test]
fn forwards_events_as_soon_as_they_are_whole() {
    for end in ["\n", "\r\n", "\r"] {
        let mut filter = UsageFilter::default();
        for (event, goes_on) in [(TALK, true), (END, false), (USAGE, true), ("data: [DONE]", true)] {
            let event = format!("{event}{end}{end}");
            let told = filter.feed(event.as_bytes(), false);
            assert_eq!(told.is_none_or(|told| !told.is_empty()), goes_on, "{event:?}");
        }
    }
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    assert_linear(8, || {
        let mut filter = UsageFilter::default();
        Box::new(move |chunk| drop(filter.feed(chunk, false)))
    });
}

#[test]
fn forwards_a_line_above_the_limit() {
    let long = format!(
        "data: {{\"usage\":{{}},\"choices\":[],\"x\":\"{}\"}}",
        "x".repeat(crate::route::answer::MAX_EVENT_BYTES + 1000)
    );
    let body = events(&[END, &long, USAGE, "data: [DONE]"]);
    let wanted = events(&[END, &long, "data: [DONE]"]);
    let half = body.len() / 2;
    assert!(fed(body.as_bytes(), &[half, body.len() - 200]).0 == wanted.as_bytes());
}

/// Events of a stream with requested usage, and the same stream without the request.
fn streams() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let between = prop::collection::vec(
        select(vec![": ping", "event: x\ndata: {}", "retry: 5", "data:", "data"]),
        0..3,
    );
    let talk = prop::collection::vec(
        select(vec![TALK, NULL, "data: {\"choices\":[{\"delta\":{\"content\":\"usage\"}}]}"]),
        0..6,
    );
    let ends =
        select(vec![(vec![END, USAGE], vec![STAMPED]), (vec![END, BARE], vec![END]), (vec![], vec![])]);
    let done = any::<bool>();
    (between, talk, ends, done, select(vec!["\n", "\r\n", "\r"]), select(vec!["data: ", "data:", "data:  "]))
        .prop_map(|(between, talk, (asked, plain), done, end, prefix)| {
            let whole = |ends: Vec<&str>| {
                let last = done.then_some("data: [DONE]");
                let all: Vec<&str> = between.iter().chain(&talk).copied().chain(ends).chain(last).collect();
                events(&all).replace("data: ", prefix).replace('\n', end).into_bytes()
            };
            (whole(asked), whole(plain))
        })
}

proptest! {
    #[test]
    fn leaves_the_stream_without_the_request_for_any_cuts(
        (asked, plain) in streams(),
        cuts in prop::collection::vec(any::<Index>(), 0..12),
    ) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(asked.len() + 1)).collect();
        cuts.sort_unstable();
        prop_assert_eq!(String::from_utf8(fed(&asked, &cuts).0).unwrap(), String::from_utf8(plain).unwrap());
    }

    /// All other bytes stay.
    #[test]
    fn keeps_all_other_bytes(
        pieces in prop::collection::vec(
            select(vec![
                END, NULL, TALK, "data: {\"usage\":{},\"choices\":[", "data:",
                "\"usage\"", "\"finish_reason\"",
                ":", "\"stop\"", "{", "}", "\n", "\r\n", "\n\n", "\r", "é",
            ]),
            0..30,
        ),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let body = pieces.concat().into_bytes();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
        cuts.sort_unstable();
        prop_assert_eq!(fed(&body, &cuts).0, body);
    }

    #[test]
    fn edited_body_differs_by_the_request_only(
        fields in prop::collection::vec(select(vec![
            r#""stream":true"#, r#""stream_options":{ }"#, r#""stream_options":null"#, r#""n":1"#,
            r#""prompt":"x""#, r#""a":{"stream_options":{}}"#, r#""é\"":[1, 2.50]"#,
        ]), 0..6),
        space in "[ \n\t]{0,3}",
    ) {
        let body = format!("{space}{{{space}{}{space}}}{space}", fields.join(&format!("{space},")));
        let asks = fields.contains(&r#""stream":true"#);
        let asking = asking(&body, BodyDialect::Chat);
        prop_assert_eq!(asking.is_some(), asks);
        let Some(asking) = asking else { return Ok(()) };
        let mut wanted: serde_json::Value = serde_json::from_str(&body).unwrap();
        wanted["stream_options"] = serde_json::json!({"include_usage": true});
        prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&asking).unwrap(), wanted);
        let (front, back) = same_ends(body.as_bytes(), asking.as_bytes());
        prop_assert!(body.len() - front - back <= "null".len(), "{} {}", body, asking);
        prop_assert!((asking.len() - body.len()) as u64 <= STREAM_OPTIONS_MEMBER.len() as u64);
    }
}

/// The lengths of the common prefix and the common suffix of two texts.
fn same_ends(one: &[u8], other: &[u8]) -> (usize, usize) {
    let front = one.iter().zip(other).take_while(|(a, b)| a == b).count();
    let behind = one[front..].iter().rev().zip(other[front..].iter().rev());
    (front, behind.take_while(|(a, b)| a == b).count())
}
