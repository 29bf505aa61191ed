//! Tests of `answer` beyond the conformance file of tests/it/routing/conformance.rs: very long answers, and
//! any cuts.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::config::types::{Retry, RouteConfig, Timeouts};
use crate::route::virtual_models::RouteTable;
use crate::sse::tests::assert_linear;

const ALL: AddedAnswerFields = AddedAnswerFields { logprobs: true, token_ids: true };

fn answer(kind: &str, added_fields: AddedAnswerFields) -> AnswerEditor {
    let mut route = RouteConfig::new(Timeouts::default(), Retry::default());
    route.to = Some("served".into());
    route.think_tags = true;
    route.token_ids = added_fields.token_ids;
    let plan = RouteTable::new(&[route]).plan(None, "/", &http::HeaderMap::new()).unwrap();
    let asker = AnswerContext { dialect: BodyDialect::Chat, model: Some("mine"), added_fields };
    AnswerEditor::new(&plan, asker, 200, Some(kind)).unwrap()
}

fn fed(mut answer: AnswerEditor, body: &[u8], cuts: &[usize]) -> Vec<u8> {
    let (mut out, mut at) = (Vec::new(), 0);
    for cut in cuts {
        out.extend(answer.feed(&body[at..*cut], false));
        at = *cut;
    }
    out.extend(answer.feed(&body[at..], true));
    out
}

#[test]
fn renames_in_answers_that_are_too_long_to_be_held() {
    let text = "x".repeat(MAX_EVENT_BYTES);
    let event = format!("data: {{\"a\":\"{text}\",\"model\":\"served\"}}\n\n");
    let more = "data: {\"model\":\"served\"}\n\n";
    let body = format!("{event}{more}");
    let wanted = body.replace("served", "mine");
    let cuts: Vec<usize> = (0..body.len()).step_by(1 << 16).collect();
    assert!(fed(answer("text/event-stream", ALL), body.as_bytes(), &cuts) == wanted.as_bytes());
    let body = format!("{{\"a\":\"{}\",\"model\":\"served\"}}", "x".repeat(MAX_WHOLE_ANSWER_BYTES));
    let cuts: Vec<usize> = (0..body.len()).step_by(1 << 20).collect();
    let wanted = body.replace("served", "mine");
    assert!(fed(answer("application/json", ALL), body.as_bytes(), &cuts) == wanted.as_bytes());
}

#[test]
fn forwards_an_event_as_soon_as_its_line_is_whole() {
    let mut answer = answer("text/event-stream", ALL);
    assert_eq!(answer.feed(b"data: {\"mod", false), b"");
    assert_eq!(answer.feed(b"el\":\"served\"}\n", false), b"data: {\"model\":\"mine\"}\n");
    assert_eq!(answer.feed(b"\n: comment\n", false), b"\n: comment\n");
    assert_eq!(answer.feed(b"data: {\"model\":\"ser", true), b"data: {\"model\":\"ser");
}

#[test]
fn forwards_events_of_any_line_ends_as_soon_as_their_line_is_whole() {
    for end in ["\n", "\r\n", "\r"] {
        let mut answer = answer("text/event-stream", ALL);
        for mark in ["\u{feff}", ""] {
            let event = format!("{mark}data: {{\"model\":\"served\"}}{end}{end}");
            let told = answer.feed(event.as_bytes(), false);
            assert_eq!(String::from_utf8(told).unwrap(), event.replace("served", "mine"));
        }
    }
    let mut answer = answer("text/event-stream", ALL);
    for (piece, told) in [
        ("data: {\"model\":", ""),
        ("\"served\"}\r", "data: {\"model\":\"mine\"}\r"),
        ("\n", "\n"),
        ("\r", "\r"),
        ("\ndata: {\"model\":\"served\"}\r\r", "\ndata: {\"model\":\"mine\"}\r\r"),
        ("data: {\"model\":\"\u{2028}\"}\r", "data: {\"model\":\"mine\"}\r"),
    ] {
        assert_eq!(String::from_utf8(answer.feed(piece.as_bytes(), false)).unwrap(), told, "{piece:?}");
    }
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    assert_linear(8, || {
        let mut answer = answer("text/event-stream", ALL);
        Box::new(move |chunk| drop(answer.feed(chunk, false)))
    });
}

#[test]
fn leaves_other_types_unchanged() {
    let route =
        RouteConfig { to: Some("served".into()), ..RouteConfig::new(Timeouts::default(), Retry::default()) };
    let plan = RouteTable::new(&[route]).plan(None, "/", &http::HeaderMap::new()).unwrap();
    let asker = |model| AnswerContext {
        dialect: BodyDialect::Other,
        model,
        added_fields: AddedAnswerFields::default(),
    };
    let is_edited = |model, kind| AnswerEditor::new(&plan, asker(model), 200, kind).is_some();
    assert!(is_edited(Some("mine"), Some("Application/JSON; charset=utf-8")));
    for (model, kind) in [
        (Some("mine"), Some("audio/wav")),
        (Some("mine"), None),
        (Some("served"), Some("application/json")),
        (None, Some("application/json")),
    ] {
        assert!(!is_edited(model, kind), "{model:?} {kind:?}");
    }
}

#[test]
fn renames_in_the_header_that_describes_an_answer_of_bytes() {
    let route =
        RouteConfig { to: Some("served".into()), ..RouteConfig::new(Timeouts::default(), Retry::default()) };
    let plan = RouteTable::new(&[route]).plan(None, "/", &http::HeaderMap::new()).unwrap();
    for (model, header, wanted) in [
        (
            Some("mine"),
            r#"{"id": "e", "model": "served", "data": [{"model": "x"}], "usage": {}}"#,
            Some(r#"{"id": "e", "model": "mine", "data": [{"model": "x"}], "usage": {}}"#),
        ),
        (Some("né\"\u{7f}😀"), r#"{"model":"served"}"#, Some(r#"{"model":"n\u00e9\"\u007f\ud83d\ude00"}"#)),
        (Some("mine"), r#"{"model":null}"#, None),
        (Some("mine"), r#"{"model":"served""#, None),
        (Some("mine"), "served", None),
        (Some("mine"), "", None),
        (Some("served"), r#"{"model":"other"}"#, None),
        (None, r#"{"model":"served"}"#, None),
    ] {
        assert_eq!(metadata(&plan, model, header.as_bytes()).as_deref(), wanted, "{header}");
    }
    assert_eq!(metadata(&plan, Some("mine"), b"{\"model\":\"\xff\",\"a\":\"\xff\"}"), None);
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let lines = select(vec![
        r#"data: {"model":"served","choices":[{"index":0,"delta":{"reasoning":"a\n"}}]}"#,
        r#"data: {"model":"served","choices":[{"index":0,"delta":{"content":"b"},"token_ids":[1]}]}"#,
        r#"data: {"choices":[],"usage":{"a":1}}"#,
        r#"data: {"choices":[{"index":1,"delta":{"reasoning":"c","content":"d"},"finish_reason":"stop"}]}"#,
        "data: [DONE]",
        "event: x",
        ": comment",
        "",
        "\r",
        "data: {\"model\":\"served\"}\r\rdata: {\"model\":\"served\"}\r",
        "data",
        "data: {\"model\":",
        "é",
    ]);
    prop::collection::vec(lines, 0..20).prop_map(|lines| lines.join("\n").into_bytes())
}

proptest! {
    #[test]
    fn any_cuts_give_the_same(body in stream(), cuts in prop::collection::vec(any::<Index>(), 0..10)) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
        cuts.sort_unstable();
        for kind in ["text/event-stream", "application/json"] {
            let cut = fed(answer(kind, ALL), &body, &cuts);
            prop_assert_eq!(cut, fed(answer(kind, ALL), &body, &[]));
        }
    }

    /// Reasoning that a client keeps in the content and sends back reaches the upstream as reasoning.
    #[test]
    fn reasoning_survives_the_round_trip(thought in "\\PC{1,20}|[\n\"\\\\]{1,4}", content in "\\PC{0,20}") {
        let message = serde_json::json!({"role": "assistant", "content": content, "reasoning": thought});
        let body = serde_json::json!({"choices": [{"index": 0, "message": message}]}).to_string();
        let told = fed(answer("application/json", AddedAnswerFields::default()), body.as_bytes(), &[]);
        let told: Value = serde_json::from_slice(&told).unwrap();
        let history = serde_json::json!({"messages": [told["choices"][0]["message"]]}).to_string();
        let mut route = RouteConfig::new(Timeouts::default(), Retry::default());
        route.think_tags = true;
        let plan = RouteTable::new(&[route]).plan(None, "/", &http::HeaderMap::new()).unwrap();
        let sent = plan.edits(BodyDialect::Chat).edit(history.as_bytes()).unwrap().body.unwrap();
        let sent: Value = serde_json::from_slice(&sent).unwrap();
        let message = &sent["messages"][0];
        let came = [&message["content"], &message["reasoning"], &message["reasoning_content"]];
        prop_assert_eq!(came, [&Value::from(content), &Value::from(thought.clone()), &Value::from(thought)]);
    }
}
