//! Any chat's stream, however it is cut, makes the same events, and they say what it said.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::route::answer::MAX_EVENT_BYTES;
use crate::sse::tests::assert_linear;

mod messages;
mod training;

const STREAM: Option<&str> = Some("text/event-stream; charset=utf-8");

/// What a chunk of a chat says.
#[derive(Clone, Debug)]
enum Said {
    Thought(String),
    Word(String),
    Call(u64, String),
    Comment,
    /// Of a choice that the client did not request.
    Other(String),
}

fn said() -> impl Strategy<Value = Said> {
    prop_oneof![
        "[a-zä\n\"\\\\{}]{0,4}".prop_map(Said::Thought),
        "[a-zé\u{2028}:]{0,4}".prop_map(Said::Word),
        (0..3_u64, "[a-z\"{}]{0,4}").prop_map(|(index, text)| Said::Call(index, text)),
        Just(Said::Comment),
        "[a-z]{1,3}".prop_map(Said::Other),
    ]
}

fn chat(all: &[Said], finish: &str, line_end: &str) -> String {
    let chunk = |index: u64, delta: Value| {
        let choice = json!({"index": index, "delta": delta, "finish_reason": null});
        format!("data: {}", json!({"model": "big", "choices": [choice]}))
    };
    let event = |said: &Said| match said {
        Said::Thought(text) => chunk(0, json!({"reasoning": text})),
        Said::Word(text) => chunk(0, json!({"content": text})),
        Said::Call(index, text) => {
            let function = json!({"name": format!("f{index}"), "arguments": text});
            let call = json!({"index": index, "id": format!("c{index}"), "function": function});
            chunk(0, json!({"tool_calls": [call]}))
        }
        Said::Comment => ": ping".into(),
        Said::Other(text) => chunk(1, json!({"content": text})),
    };
    let last = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]});
    let mut events: Vec<String> = all.iter().map(event).collect();
    events.push(format!("data: {last}"));
    events.push("data: [DONE]".into());
    events.iter().map(|event| format!("{event}{line_end}{line_end}")).collect()
}

fn responses() -> ChatTranslation {
    ChatTranslation::new(TranslatedApi::Responses)
}

fn exchange() -> ChatTranslation {
    let mut exchange = responses();
    exchange.request(br#"{"input":"hi"}"#, false).unwrap();
    exchange.begin(TranslationContext::default(), STREAM).unwrap();
    exchange
}

fn told(chat: &[u8], cuts: &[usize]) -> Vec<u8> {
    let mut exchange = exchange();
    let (mut told, mut at) = (Vec::new(), 0);
    for cut in cuts {
        let cut = (*cut).clamp(at, chat.len());
        told.extend(exchange.feed(&chat[at..cut], false).unwrap().unwrap());
        at = cut;
    }
    told.extend(exchange.feed(&chat[at..], true).unwrap().unwrap());
    told
}

fn events(told: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(told).unwrap();
    let events = text.split("\n\n").filter_map(|event| event.split_once("data: "));
    events.map(|(_, data)| serde_json::from_str(data).unwrap()).collect()
}

/// The deltas of one kind, put together.
fn deltas(events: &[Value], kind: &str) -> String {
    let of_kind = events.iter().filter(|event| event["type"] == kind);
    of_kind.map(|event| event["delta"].as_str().unwrap()).collect()
}

proptest! {
    #[test]
    fn any_cuts_give_the_same_events(
        all in prop::collection::vec(said(), 0..12),
        finish in prop::sample::select(&["stop", "length", "tool_calls", "abort"][..]),
        line_end in prop::sample::select(&["\n", "\r\n", "\r"][..]),
        mut cuts in prop::collection::vec(0..4000_usize, 0..12),
    ) {
        let chat = chat(&all, finish, line_end);
        cuts.sort_unstable();
        let whole = told(chat.as_bytes(), &[]);
        let cut = told(chat.as_bytes(), &cuts);
        prop_assert_eq!(String::from_utf8_lossy(&cut), String::from_utf8_lossy(&whole));
        let each: Vec<usize> = (0..chat.len()).collect();
        prop_assert_eq!(&told(chat.as_bytes(), &each), &whole);
    }

    #[test]
    fn the_events_say_what_the_chunks_said(all in prop::collection::vec(said(), 0..12)) {
        // Calls come one behind the other, as engines write them.
        let mut next = 0;
        let in_order = |said: Said| match said {
            Said::Call(_, text) => { next += 1; Said::Call(next, text) }
            other => other,
        };
        let all: Vec<Said> = all.into_iter().map(in_order).collect();
        let events = events(&told(chat(&all, "stop", "\n").as_bytes(), &[]));
        let texts = |pick: &dyn Fn(&Said) -> Option<String>| all.iter().filter_map(pick).collect::<String>();
        let words = texts(&|said| match said { Said::Word(text) => Some(text.clone()), _ => None });
        let thoughts = texts(&|said| match said { Said::Thought(text) => Some(text.clone()), _ => None });
        let arguments = texts(&|said| match said { Said::Call(_, text) => Some(text.clone()), _ => None });
        prop_assert_eq!(deltas(&events, "response.output_text.delta"), words);
        prop_assert_eq!(deltas(&events, "response.reasoning_text.delta"), thoughts);
        prop_assert_eq!(deltas(&events, "response.function_call_arguments.delta"), arguments);
        let number = |event: &Value| event["sequence_number"].as_u64().unwrap();
        let numbers: Vec<u64> = events.iter().map(number).collect();
        prop_assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
        prop_assert_eq!(&events[0]["type"], "response.created");
        let last = &events[events.len() - 1];
        prop_assert_eq!(&last["type"], "response.completed");
        // What was told of each item when it was done is what the response has of it.
        let done = events.iter().filter(|event| event["type"] == "response.output_item.done");
        let mut done: Vec<&Value> = done.collect();
        done.sort_by_key(|event| event["output_index"].as_u64());
        let done: Vec<&Value> = done.iter().map(|event| &event["item"]).collect();
        prop_assert_eq!(&json!(done), &last["response"]["output"]);
        let mut ids: Vec<String> = done.iter().map(|item| item["id"].to_string()).collect();
        ids.sort();
        ids.dedup();
        prop_assert_eq!(ids.len(), done.len());
    }

    /// Training on log-probabilities needs the engine's own digits.
    #[test]
    fn numbers_are_told_as_they_were(number in -30.0..0.0_f64) {
        let body = format!(r#"{{"input":"hi","temperature":{number:?}}}"#);
        let chat = responses().request(body.as_bytes(), false).unwrap().unwrap();
        let chat = String::from_utf8(chat).unwrap();
        prop_assert!(chat.contains(&format!("{number:?}")), "{} of {}", chat, body);
    }

    #[test]
    fn no_request_is_too_odd(
        text in r#"\{("input"|"tools"|"text"|"type"|"role"|"content"|[{}\[\]:,"a1 ]){0,30}\}"#,
    ) {
        drop(responses().request(text.as_bytes(), true));
    }

    #[test]
    fn no_answer_is_too_odd(
        text in r#"((data: ?)?(\{|"choices"|"delta"|"index"|"error"|"usage"|[{}\[\]:,"a1\n ]){0,30}\n){0,4}"#,
    ) {
        let told = events(&told(text.as_bytes(), &[]));
        prop_assert_eq!(&told.last().unwrap()["type"], "error");
        let mut whole = exchange();
        whole.begin(TranslationContext::default(), Some("application/json")).unwrap();
        drop(whole.feed(text.as_bytes(), true));
    }
}

#[test]
fn a_line_that_never_ends_is_not_held() {
    let mut exchange = exchange();
    let piece = vec![b'x'; 1 << 20];
    let mut fed = 0;
    let told = loop {
        let told = exchange.feed(&piece, false).unwrap().unwrap();
        fed += piece.len();
        if !told.is_empty() || fed > 2 * MAX_EVENT_BYTES {
            break told;
        }
    };
    assert!(fed <= MAX_EVENT_BYTES + piece.len());
    assert_eq!(events(&told)[0]["type"], "error");
    assert_eq!(exchange.feed(b"data: [DONE]\n\n", true), Ok(Some(Vec::new())));
}

/// vLLM's parsers let line ends between calls through, and tell the end of the arguments behind them.
#[test]
fn a_call_goes_on_behind_a_word() {
    let call = |text: &str| Said::Call(0, text.into());
    let all =
        [call("{"), Said::Word("\n".into()), call("}"), Said::Thought("h".into()), Said::Call(1, "x".into())];
    let events = events(&told(chat(&all, "tool_calls", "\n").as_bytes(), &[]));
    let output = events[events.len() - 1]["response"]["output"].as_array().unwrap();
    let kinds: Vec<&str> = output.iter().filter_map(|item| item["type"].as_str()).collect();
    assert_eq!(kinds, ["function_call", "message", "reasoning", "function_call"]);
    assert_eq!((&output[0]["name"], &output[0]["arguments"]), (&json!("f0"), &json!("{}")));
    assert_eq!(output[3]["arguments"], "x");
    let of_first = |event: &&Value| event["output_index"] == 0;
    let last = events.iter().rfind(of_first).unwrap();
    assert_eq!(last["type"], "response.output_item.done");
}

#[test]
fn the_last_event_has_its_number_also_when_it_is_an_error() {
    for error in ["", "data: {\n\n", "data: {\"error\":{\"message\":\"m\"}}\n\n"] {
        let begun = chat(&[Said::Word("w".into())], "stop", "\n").replace("data: [DONE]", error);
        let events = events(&told(begun.as_bytes(), &[]));
        let last = &events[events.len() - 1];
        assert_eq!((&last["type"], &last["sequence_number"]), (&json!("error"), &json!(events.len() - 1)));
    }
}

/// A character may take several tokens, of which only the last makes text; the end is one that makes none.
#[test]
fn log_probabilities_of_tokens_without_text_are_kept() {
    let chunk = |text: &str, logprob: f64| {
        let logprobs = json!({"content": [{"logprob": logprob}]});
        let choice = json!({"index": 0, "delta": {"content": text}, "logprobs": logprobs});
        format!("data: {}\n\n", json!({"model": "big", "choices": [choice]}))
    };
    let end = chat(&[], "stop", "\n");
    let stream = format!("{}{}{}{end}", chunk("", -1.0), chunk("é", -2.0), chunk("", -3.0));
    let events = events(&told(stream.as_bytes(), &[]));
    let of = |value: &Value| {
        let all = value.as_array().unwrap().iter().map(|one| one["logprob"].as_f64().unwrap());
        all.collect::<Vec<f64>>()
    };
    let delta = events.iter().find(|event| event["type"] == "response.output_text.delta").unwrap();
    assert_eq!(of(&delta["logprobs"]), [-1.0, -2.0]);
    let response = &events[events.len() - 1]["response"];
    assert_eq!(of(&response["output"][0]["content"][0]["logprobs"]), [-1.0, -2.0, -3.0]);
}

#[test]
fn a_thought_that_nobody_can_read_is_no_turn() {
    let secret = r#"{"type":"reasoning","summary":[],"encrypted_content":"x"}"#;
    let body = format!(r#"{{"input":[{{"role":"user","content":"a"}},{secret}]}}"#);
    let chat = responses().request(body.as_bytes(), false).unwrap().unwrap();
    let chat: Value = serde_json::from_slice(&chat).unwrap();
    assert_eq!(chat["messages"], json!([{"role": "user", "content": "a"}]));
}

#[test]
fn every_event_goes_out_with_its_chunk() {
    for end in ['\n', '\r'] {
        let mut exchange = exchange();
        let chat = chat(&[Said::Thought("h".into()), Said::Word("w".into())], "stop", &end.to_string());
        let mut counts = Vec::new();
        for line in chat.split_inclusive(end).filter(|line| line.len() > 1) {
            counts.push(events(&exchange.feed(line.as_bytes(), false).unwrap().unwrap()).len());
        }
        // Created, in progress, added, part, delta; done thrice and the same again; nothing; the ends.
        assert_eq!(counts, [5, 6, 0, 4]);
    }
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    assert_linear(4, || {
        let mut exchange = exchange();
        Box::new(move |chunk| drop(exchange.feed(chunk, false)))
    });
}

#[test]
fn an_answer_of_another_kind_is_refused() {
    for kind in [None, Some("text/html")] {
        assert_eq!(responses().begin(TranslationContext::default(), kind), Err(AnswerFault::NoChat));
    }
    let mut exchange = exchange();
    assert!(!exchange.begin_error((None, None), Some("application/json")));
    assert_eq!(exchange.feed(b"{}", true), Ok(None));
}

#[test]
fn an_answer_above_a_limit_is_refused_with_the_limit() {
    let begun = || {
        let mut exchange = exchange();
        exchange.begin(TranslationContext::default(), Some("application/json")).unwrap();
        exchange
    };
    let answer = |values| format!(r#"{{"choices":[{{"message":{{}},"x":[{}0]}}]}}"#, "0,".repeat(values));
    let fault = begun().feed(answer(MAX_ANSWER_VALUES).as_bytes(), true).unwrap_err();
    assert_eq!((fault, fault.limit().as_deref()), (AnswerFault::ManyValues, Some("1000000 values")));
    assert!(begun().feed(answer(MAX_ANSWER_VALUES - 20).as_bytes(), true).unwrap().is_some());
    let (mut exchange, piece) = (begun(), vec![b' '; 1 << 20]);
    let fault = (0..=MAX_WHOLE_ANSWER_BYTES >> 20).find_map(|_| exchange.feed(&piece, false).err());
    assert_eq!(fault, Some(AnswerFault::ManyBytes));
}
