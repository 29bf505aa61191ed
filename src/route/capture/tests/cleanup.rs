//! Tests of the cleanup: an answer with the fields becomes the answer without them, however it is cut.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::super::*;
use super::streams::*;
use crate::json::work::WORK;
use crate::route::answer::{MAX_EVENT_BYTES, MAX_WHOLE_ANSWER_BYTES};
use crate::route::dialect::BodyDialect;
use crate::sse::tests::{assert_linear, work};

use BodyDialect::{Chat, Completions};

#[test]
fn answers_of_an_engine_lose_what_was_requested() {
    for fields in [BOTH, LOGPROBS, IDS] {
        for (marked, dialect) in [(CHAT_STREAM, Chat), (COMPLETION_STREAM, Completions)] {
            for end in ["\n", "\r\n", "\r"] {
                let (with, without) = with_and_without(&marked.replace('\n', end), fields);
                assert_eq!(cleaned(stream(dialect, fields), with.as_bytes(), &[], false).body, without);
            }
        }
        for (marked, dialect) in [(CHAT, Chat), (COMPLETION, Completions)] {
            let (with, without) = with_and_without(marked, fields);
            for is_end_apart in [false, true] {
                assert_eq!(cleaned(whole(dialect, fields), with.as_bytes(), &[], is_end_apart).body, without);
            }
        }
    }
}

#[test]
fn without_a_request_nothing_is_changed() {
    for marked in [CHAT_STREAM, COMPLETION_STREAM, CHAT, COMPLETION] {
        let (with, _) = with_and_without(marked, BOTH);
        for cleanup in [
            stream(Chat, NOTHING),
            whole(Chat, NOTHING),
            AnswerCleanup::new(Chat, BOTH, 400, Some("application/json")),
            AnswerCleanup::new(Chat, BOTH, 500, Some("text/event-stream")),
            AnswerCleanup::new(Chat, BOTH, 200, Some("text/plain")),
            AnswerCleanup::new(Chat, BOTH, 200, None),
        ] {
            assert!(cleanup.keeps_length());
            let cleaned = cleaned(cleanup, with.as_bytes(), &[], true);
            assert!(cleaned.body == with && cleaned.pieces.iter().all(|piece| !piece.is_changed));
        }
        assert!(!stream(Chat, IDS).keeps_length() && !whole(Chat, IDS).keeps_length());
    }
}

/// A failure of an engine had choices, and kept what only the capture requested.
#[test]
fn a_failure_with_choices_loses_what_was_requested() {
    let (with, without) = with_and_without(CHAT, BOTH);
    let failure = || AnswerCleanup::new(Chat, BOTH, 500, Some("application/json"));
    assert_eq!(cleaned(failure(), with.as_bytes(), &[], false).body, without);
    let error = r#"{"error":{"message":"m","code":500}}"#;
    assert_eq!(cleaned(failure(), error.as_bytes(), &[], true).body, error);
}

#[test]
fn an_event_whose_data_stands_on_several_lines_loses_what_was_requested() {
    let (with, without) = with_and_without(CHAT_STREAM, BOTH);
    let (silent, _) = silent(BOTH);
    for end in ["\n", "\r\n", "\r"] {
        // Between members a line may end; the name of the event may come before and behind.
        let split = |text: &str| {
            let lines = text.replace(",\"model\"", ",\ndata: \"model\"").replace('\n', end);
            lines.replace("data: {\"id\"", &format!("event: a{end}data: {{\"id\""))
        };
        for more in ["", ": a\n\n", "data: {\"a\":\ndata: 1}\n\n", "data: {\ndata: x\n\n", "data: {\ndata"] {
            let with = split(&format!("{with}{more}"));
            let without = split(&format!("{without}{more}"));
            for cuts in [&[][..], &[40, 41, 200], &[with.len() - 1], &[with.len() - 3, with.len() - 2]] {
                let cuts: Vec<usize> = cuts.to_vec();
                assert_eq!(cleaned(stream(Chat, BOTH), with.as_bytes(), &cuts, false).body, without);
            }
        }
        let (asked, plain) = (split(&silent), split(PLAIN[1]));
        let text = format!("{asked}{plain}");
        let named = format!("event: a{end}");
        let left = cleaned(stream(Chat, BOTH), text.as_bytes(), &[], false).body.replace(&named, "");
        assert_eq!(left, plain.replace(&named, ""), "its data is removed");
    }
}

#[test]
fn events_without_text_are_removed_as_the_engine_would_not_send_them() {
    for (fields, wanted) in [(BOTH, 0), (LOGPROBS, 1), (IDS, 1)] {
        let (with, without) = silent(fields);
        assert_eq!(without.matches("data").count(), wanted);
        for end in ["\n", "\r\n", "\r"] {
            let asked = [": a\n\n", &with, &with, PLAIN[1], &with].concat().replace('\n', end);
            let plain = [": a\n\n", &without, &without, PLAIN[1], &without].concat().replace('\n', end);
            assert_eq!(cleaned(stream(Chat, fields), asked.as_bytes(), &[], false).body, plain);
        }
    }
    // With one choice that has text, a chunk stays.
    let chunk = |delta: &str, ids: &str| {
        format!(
            "data: {{\"choices\":[{{\"delta\":{{}},\"token_ids\":{ids}}},\
             {{\"delta\":{delta},\"token_ids\":{ids}}}]}}\n\n"
        )
    };
    for (delta, wanted) in [("{}", String::new()), ("{\"a\":1}", chunk("{\"a\":1}", "null"))] {
        let asked = chunk(delta, "[1]");
        assert_eq!(cleaned(stream(Chat, IDS), asked.as_bytes(), &[], false).body, wanted);
    }
}

#[test]
fn pieces_in_which_nothing_changes_are_not_copied() {
    let mut cleanup = stream(Chat, BOTH);
    for event in PLAIN {
        let cleaned = cleanup.feed(event.as_bytes(), false, &mut Vec::new());
        assert!(!cleaned.is_changed, "{event}");
    }
    let mut whole = whole(Chat, BOTH);
    assert!(!whole.feed(b"{\"choices\":[]}", true, &mut Vec::new()).is_changed);
}

#[test]
fn events_go_on_as_soon_as_they_are_whole() {
    for end in ["\n", "\r\n", "\r"] {
        let mut cleanup = stream(Chat, BOTH);
        let (with, without) = with_and_without(&CHAT_STREAM.replace('\n', end), BOTH);
        let separator = end.repeat(2);
        for (event, wanted) in with.split_inclusive(&separator).zip(without.split_inclusive(&separator)) {
            let mut out = Vec::new();
            if !cleanup.feed(event.as_bytes(), false, &mut out).is_changed {
                out = event.into();
            }
            assert_eq!(String::from_utf8(out).unwrap(), wanted);
        }
    }
}

/// The event of a token, and what is left of it without the fields.
fn word(text: &str, more: &str) -> (String, String) {
    let marked = format!(
        "data: {{\"id\":\"c\",\"model\":\"m\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"content\":\"{text}\"}},\"logprobs\":‹l{{\"content\":[{{\
         \"token\":\"{text}\",\"logprob\":-0.5,\"bytes\":[1],\"top_logprobs\":[]}}]}}›,\
         \"finish_reason\":null,\"token_ids\":‹t[7]›}}]{more}}}\n\n"
    );
    with_and_without(&marked, BOTH)
}

#[test]
fn tokens_are_taken_between_two_events_that_begin_as_one_before() {
    let taken = |cleanup: &mut AnswerCleanup, piece: &str| {
        let (mut out, mut texts) = (Vec::new(), Vec::new());
        let bytes = cleanup.take_tokens(piece.as_bytes(), &mut out, |token| {
            assert_eq!((token.logprob, token.token_id), (Some(-0.5), Some(7)));
            texts.push(token.text.to_owned());
        });
        cleanup.feed(&piece.as_bytes()[bytes..], false, &mut out);
        (texts, bytes, String::from_utf8(out).unwrap())
    };
    let ((one, one_cleaned), (two, two_cleaned)) = (word("one", ""), word("two", ""));
    let mut cleanup = stream(Chat, BOTH);
    let (texts, bytes, _) = taken(&mut cleanup, &one);
    assert_eq!((texts.len(), bytes), (0, 0), "no head is known");
    let (texts, bytes, out) = taken(&mut cleanup, &[&*one, &two].concat());
    assert_eq!((texts, bytes), (vec!["one".into(), "two".into()], one.len() + two.len()));
    assert_eq!(out, [one_cleaned, two_cleaned.clone()].concat());
    let left = [
        word("t\\n", "").0,
        word("two", ",\"usage\":{}").0,
        two.replace("\"id\":\"c\"", "\"id\":\"d\""),
        two.replace("\"finish_reason\":null", "\"finish_reason\":\"stop\""),
        two.replace('\n', "\r\n"),
        two[..two.len() - 1].to_owned(),
        format!("event: x\n{two}"),
        format!(": x\n{two}"),
    ];
    for piece in left {
        let mut cleanup = stream(Chat, BOTH);
        taken(&mut cleanup, &one);
        assert_eq!(taken(&mut cleanup, &piece).1, 0, "{piece}");
    }
    // Within an event it is a line of that event.
    for before in ["event: x\n", "data: {\n", "data: 1\n", ": x\r\n", "x"] {
        let mut cleanup = stream(Chat, BOTH);
        taken(&mut cleanup, &one);
        taken(&mut cleanup, before);
        assert_eq!(taken(&mut cleanup, &two).1, 0, "{before}");
    }
    for mut cleanup in [stream(Chat, NOTHING), stream(Completions, BOTH), whole(Chat, BOTH)] {
        taken(&mut cleanup, &one);
        assert_eq!(taken(&mut cleanup, &two).1, 0);
    }
}

#[test]
fn what_is_too_long_goes_on_unchanged() {
    let long =
        |bytes: usize| format!(r#"{{"choices":[{{"token_ids":[1],"text":"{}"}}]}}"#, "x".repeat(bytes));
    let event = format!("data: {}\n\n", long(MAX_EVENT_BYTES + 1000));
    let (with, without) = with_and_without(CHAT_STREAM, BOTH);
    let (asked, plain) = ([&event, &*with].concat(), [&event, &*without].concat());
    let cuts = [asked.len() / 2, asked.len() - 300];
    assert!(cleaned(stream(Chat, BOTH), asked.as_bytes(), &cuts, false).body == plain);
    let body = long(MAX_WHOLE_ANSWER_BYTES);
    let cleaned = cleaned(whole(Completions, BOTH), body.as_bytes(), &cuts[..1], true);
    assert!(cleaned.body == body && cleaned.ended_at == Some(body.len()));
}

/// A stream with requested values, and the stream without.
fn streams(fields: crate::route::rewrite::AddedAnswerFields) -> impl Strategy<Value = (String, String)> {
    let chunk = prop_oneof![document("delta"), token()].prop_map(move |marked| {
        let (with, without) = with_and_without(&marked, fields);
        (format!("data: {with}\n\n"), format!("data: {without}\n\n"))
    });
    let plain = select([&PLAIN[..], &[TORN]].concat()).prop_map(|event| (event.to_owned(), event.to_owned()));
    let event = prop_oneof![4 => chunk, 2 => plain, 1 => Just(silent(fields))];
    let last = select(vec!["", "data: [DONE]\n\n", "data: [DONE]\n", "data: [DONE]"]);
    let starts = select(vec!["", "\u{feff}"]);
    (starts, prop::collection::vec(event, 0..8), last, select(vec!["\n", "\r\n", "\r"])).prop_map(
        |(start, events, last, end)| {
            let (with, without): (Vec<String>, Vec<String>) = events.into_iter().unzip();
            let all = |events: Vec<String>| [start, &events.concat(), last].concat().replace('\n', end);
            (all(with), all(without))
        },
    )
}

proptest! {
    #[test]
    fn any_stream_in_any_chunks_becomes_the_one_without_fields(
        ((with, without), fields) in fields().prop_flat_map(|fields| (streams(fields), Just(fields))),
        cuts in prop::collection::vec(any::<Index>(), 0..12),
        is_end_apart in any::<bool>(),
    ) {
        let cuts = places(&cuts, with.len());
        let cleaned = cleaned(stream(Chat, fields), with.as_bytes(), &cuts, is_end_apart);
        prop_assert_eq!(cleaned.body, without);
    }

    #[test]
    fn any_answer_in_any_chunks_becomes_the_one_without_fields(
        marked in document("message"),
        fields in fields(),
        cuts in prop::collection::vec(any::<Index>(), 0..5),
        is_end_apart in any::<bool>(),
        space in "[ \n]{0,2}",
    ) {
        let (with, without) = with_and_without(&format!("{space}{marked}{space}"), fields);
        let cleaned = cleaned(whole(Chat, fields), with.as_bytes(), &places(&cuts, with.len()), is_end_apart);
        prop_assert_eq!(cleaned.ended_at, Some(with.len()));
        prop_assert_eq!(cleaned.body, without);
    }

    /// Whatever else comes stays, byte by byte.
    #[test]
    fn what_is_no_document_stays(
        pieces in prop::collection::vec(
            select(vec![
                "data: {\"choices\":[{", "\"token_ids\":[1]", "\"logprobs\":{", "\"prompt_token_ids\"",
                "data:", ":", "{", "[", ",", "\"", "\n", "\r\n", "\n\n", "\r", "é", "\u{2028}",
            ]),
            0..30,
        ),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let body = pieces.concat();
        let cuts = places(&cuts, body.len());
        prop_assert_eq!(cleaned(stream(Chat, BOTH), body.as_bytes(), &cuts, true).body, &*body);
        prop_assert_eq!(cleaned(whole(Chat, BOTH), body.as_bytes(), &cuts, true).body, body);
    }
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    for fields in [BOTH, NOTHING] {
        assert_linear(8, || {
            let (mut cleanup, mut out) = (stream(Chat, fields), Vec::new());
            Box::new(move |chunk| {
                cleanup.feed(chunk, false, &mut out);
                out.clear();
            })
        });
    }
}

#[test]
fn long_documents_are_walked_a_few_times_at_most() {
    const BYTES: usize = 100_000;
    let repeated = |before: &str, again: &str, behind: &str| {
        [before, &again.repeat(BYTES / again.len()), behind].concat()
    };
    for body in [
        repeated(r#"{"choices":[],"prompt_token_ids":[1"#, ",12345", "]}"),
        repeated(r#"{"choices":[{"token_ids":[1]}"#, r#",{"token_ids":[1],"logprobs":{"a":[{}]}}"#, "]}"),
        repeated(r#"{"choices":[{"token_ids":[1]}"#, r#",{"token_ids":[1],"logprobs":{"a":[{}]}}"#, "!]}"),
        repeated(r#"{"choices":[{"token_ids":"#, "[", ""),
        repeated("", r#"{"choices":[{"delta":"#, ""),
        repeated(r#"{"a":1"#, r#","choices":[{"logprobs":{}}]"#, "}"),
        repeated(r#"{"choices":[{"logprobs":""#, "\\\"", "\"}]}"),
    ] {
        WORK.set(0);
        let work = work::of(|| {
            cleaned(whole(Chat, BOTH), body.as_bytes(), &[], false);
            cleaned(stream(Chat, BOTH), format!("data: {body}\n\n").as_bytes(), &[], false);
        });
        let walked = WORK.get() as usize + work as usize;
        assert!(walked <= 8 * body.len(), "{walked} of {}: {}", body.len(), &body[..40]);
    }
}
