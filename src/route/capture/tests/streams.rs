//! Answers for tests, each as the engine sends it with requested fields and without.

use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::Value;

use super::super::*;
use crate::route::dialect::BodyDialect;
use crate::route::rewrite::AddedAnswerFields;

pub(super) const BOTH: AddedAnswerFields = AddedAnswerFields { logprobs: true, token_ids: true };
pub(super) const LOGPROBS: AddedAnswerFields = AddedAnswerFields { logprobs: true, token_ids: false };
pub(super) const IDS: AddedAnswerFields = AddedAnswerFields { logprobs: false, token_ids: true };
pub(super) const NOTHING: AddedAnswerFields = AddedAnswerFields { logprobs: false, token_ids: false };

/// Of a real engine, with requested values between marks: `‹l…›` are log-probabilities, `‹t…›` token ids.
pub(super) const CHAT_STREAM: &str = concat!(
    r#"data: {"id":"chatcmpl-82","object":"chat.completion.chunk","created":1795154964,"#,
    r#""model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},"#,
    r#""logprobs":null,"finish_reason":null}],"#,
    r#""usage":{"prompt_tokens":31,"total_tokens":31,"completion_tokens":0},"#,
    r#""prompt_token_ids":‹t[1,85,496,201,1806,387,265,451,434,273,429,2,201,1,87,433]›,"#,
    r#""prompt_text":null}"#,
    "\n\n",
    r#"data: {"id":"chatcmpl-82","object":"chat.completion.chunk","created":1795154964,"#,
    r#""model":"tiny","choices":[{"index":0,"delta":{"content":"exo"},"#,
    r#""logprobs":‹l{"content":[{"token":"exo","logprob":-7.015422344207764,"bytes":[101,120,111],"#,
    r#""top_logprobs":[]}]}›,"finish_reason":null,"token_ids":‹t[1312]›}]}"#,
    "\n\n",
    r#"data: {"id":"chatcmpl-82","object":"chat.completion.chunk","created":1795154964,"#,
    r#""model":"tiny","choices":[{"index":0,"delta":{"content":""},"#,
    r#""logprobs":‹l{"content":[{"token":"","logprob":-6.872665882110596,"bytes":[127],"#,
    r#""top_logprobs":[]}]}›,"finish_reason":"length","stop_reason":null,"token_ids":‹t[224]›}]}"#,
    "\n\n",
    r#"data: {"id":"chatcmpl-82","object":"chat.completion.chunk","created":1795154964,"#,
    r#""model":"tiny","choices":[],"usage":{"prompt_tokens":31,"total_tokens":35,"#,
    r#""completion_tokens":4,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":0}},"#,
    r#""system_fingerprint":"vllm-0.32.0-3ea7ed80"}"#,
    "\n\ndata: [DONE]\n\n",
);

pub(super) const COMPLETION_STREAM: &str = concat!(
    r#"data: {"id":"cmpl-af","object":"text_completion","created":1795154964,"model":"tiny","#,
    r#""choices":[{"index":0,"text":" dal","logprobs":‹l{"text_offset":[0],"#,
    r#""token_logprobs":[-7.0481791496276855],"tokens":[" dal"],"#,
    r#""top_logprobs":[{" dal":-7.0481791496276855}]}›,"finish_reason":null,"stop_reason":null,"#,
    r#""prompt_token_ids":‹t[368,434,395,310,327]›,"token_ids":‹t[1186]›}]}"#,
    "\n\n",
    r#"data: {"id":"cmpl-af","object":"text_completion","created":1795154964,"model":"tiny","#,
    r#""choices":[{"index":0,"text":" bed","logprobs":‹l{"text_offset":[4],"#,
    r#""token_logprobs":[-6.916828632354736],"tokens":[" bed"],"#,
    r#""top_logprobs":[{" bed":-6.916828632354736}]}›,"finish_reason":"length","stop_reason":null,"#,
    r#""prompt_token_ids":null,"token_ids":‹t[1188]›}]}"#,
    "\n\ndata: [DONE]\n\n",
);

pub(super) const CHAT: &str = concat!(
    r#"{"id":"chatcmpl-my-req-1","object":"chat.completion","created":1795154962,"model":"tiny","#,
    r#""choices":[{"index":0,"message":{"role":"assistant","content":"exo this","refusal":null,"#,
    r#""annotations":null,"audio":null,"function_call":null,"reasoning":null},"#,
    r#""logprobs":‹l{"content":[{"token":"exo","logprob":-7.015422344207764,"bytes":[101,120,111],"#,
    r#""top_logprobs":[{"token":"exo","logprob":-7.015422344207764,"bytes":[101,120,111]},"#,
    r#"{"token":" topere","logprob":-7.023234844207764,"bytes":[32,116]}]}]}›,"#,
    r#""finish_reason":"length","stop_reason":null,"token_ids":‹t[1312,479,224,224]›,"#,
    r#""routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-3ea7ed80","#,
    r#""usage":{"prompt_tokens":31,"total_tokens":35,"completion_tokens":4},"#,
    r#""prompt_logprobs":[null,{"85":{"logprob":-7.471378803253174,"rank":462,"#,
    r#""decoded_token":"s"}}],"prompt_token_ids":‹t[1,85,496,201]›,"prompt_text":null,"#,
    r#""kv_transfer_params":{"prompt_token_ids":[1],"choices":[{"logprobs":{}}]},"#,
    r#""ec_transfer_params":null,"metrics":null}"#,
);

pub(super) const COMPLETION: &str = concat!(
    r#"{"id":"cmpl-8c777fc2479be4bf","object":"text_completion","created":1795154964,"#,
    r#""model":"tiny","choices":[{"index":0,"text":" dal","#,
    r#""logprobs":‹l{"text_offset":[0],"token_logprobs":[-7.0481791496276855],"tokens":[" dal"],"#,
    r#""top_logprobs":[{" dal":-7.0481791496276855}]}›,"finish_reason":"length","stop_reason":null,"#,
    r#""token_ids":‹t[1186]›,"prompt_logprobs":null,"prompt_token_ids":‹t[368,434,395,310,327]›,"#,
    r#""routed_experts":null}],"service_tier":null,"system_fingerprint":"f","#,
    r#""usage":{"prompt_tokens":5,"total_tokens":11,"completion_tokens":6},"#,
    r#""kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"#,
);

/// Tokens that a tool call begins with: an event only if one of the fields is requested.
pub(super) const SILENT: &str = concat!(
    r#"data: {"id":"c","choices":[{"index":0,"delta":{},"logprobs":‹l{"content":[{"token":"<tool>","#,
    r#""logprob":-0.5}]}›,"finish_reason":null,"token_ids":‹t[7]›}]}"#,
    "\n\n"
);

/// Events in which nothing is requested, or which are to be left alone.
pub(super) const PLAIN: [&str; 11] = [
    "data: {\"error\":{\"message\":\"token_ids\",\"type\":\"InternalServerError\",\"param\":null,\
     \"code\":500}}\n\n",
    ": keep-alive\n\n",
    "event: x\ndata: {\"choices\":[]}\n\n",
    "retry: 5\n\n",
    "data\n\n",
    "data: {\"choices\":[{\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\",\
     \"token_ids\":null}]}\n\n",
    "data: {\"choices\":[{\"delta\":{},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\"\\\"logprobs\\\":{},\\\"token_ids\\\":[1]\"}}]}\n\n",
    "data: {\"choices\":[{\"delta\":{\"token_ids\":[1],\"logprobs\":{}}}],\"token_ids\":[2]}\n\n",
    "data: {\"choices\":{\"token_ids\":[1]},\"a\":{\"prompt_token_ids\":[1]}} x\n\n",
    "data: [{\"choices\":[{\"token_ids\":[1]}]}]\n\n",
];

/// An event whose document has no end, which could come with further lines of data.
pub(super) const TORN: &str = "data: {\"choices\":[{\"token_ids\":[1]}\n\n";

/// A text as it is with all requested values, and as it is without those of `fields`.
pub(super) fn with_and_without(marked: &str, fields: AddedAnswerFields) -> (String, String) {
    let mut parts = marked.split('‹');
    let first = parts.next().unwrap();
    let (mut with, mut without) = (first.to_owned(), first.to_owned());
    for part in parts {
        let (value, behind) = part.split_once('›').unwrap();
        let is_added = if value.starts_with('l') { fields.logprobs } else { fields.token_ids };
        with.extend([&value[1..], behind]);
        without.extend([if is_added { "null" } else { &value[1..] }, behind]);
    }
    (with, without)
}

/// As `with_and_without`, of a silent event: without the fields there is none, unless the client requested
/// one.
pub(super) fn silent(fields: AddedAnswerFields) -> (String, String) {
    let (with, without) = with_and_without(SILENT, fields);
    (with, if fields == BOTH { String::new() } else { without })
}

/// The places in a body of so many bytes, in order.
pub(super) fn places(cuts: &[Index], bytes: usize) -> Vec<usize> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes + 1)).collect();
    places.sort_unstable();
    places
}

/// What a cleanup makes of a body.
pub(super) struct Cleaned {
    pub body: String,
    /// Of each piece, whether it was changed and whether the content ends in it.
    pub pieces: Vec<CleanedPiece>,
    /// How many bytes had been fed when the content ended.
    pub ended_at: Option<usize>,
}

/// Feeds a body in pieces that end at these places, in order. The end comes with the last, or by itself.
pub(super) fn cleaned(
    mut cleanup: AnswerCleanup,
    body: &[u8],
    cuts: &[usize],
    is_end_apart: bool,
) -> Cleaned {
    let (mut out, mut pieces, mut ended_at, mut fed) = (Vec::new(), Vec::new(), None, 0);
    let ends: Vec<usize> = cuts.iter().copied().chain([body.len()]).collect();
    let starts = std::iter::once(0).chain(ends.clone());
    let spans = starts.zip(ends.iter().copied().chain(is_end_apart.then_some(body.len())));
    let count = ends.len() + usize::from(is_end_apart);
    for (at, (start, end)) in spans.enumerate() {
        let (before, piece) = (out.len(), &body[start..end]);
        let rest = &piece[cleanup.take_tokens(piece, &mut out, |_| {})..];
        let before = before + if rest.len() < piece.len() { out.len() - before } else { 0 };
        let cleaned = cleanup.feed(rest, at + 1 == count, &mut out);
        fed += piece.len();
        if !cleaned.is_changed {
            assert_eq!(out.len(), before, "an unchanged piece is not copied");
            out.extend_from_slice(rest);
        }
        assert!(!(cleaned.ends && ended_at.is_some()), "the end is reported once");
        if cleaned.ends {
            ended_at = Some(fed);
        }
        assert_eq!(cleanup.is_complete(), ended_at.is_some());
        pieces.push(cleaned);
    }
    assert_eq!(cleanup.held_bytes(), 0);
    Cleaned { body: String::from_utf8(out).unwrap(), pieces, ended_at }
}

pub(super) fn stream(dialect: BodyDialect, fields: AddedAnswerFields) -> AnswerCleanup {
    AnswerCleanup::new(dialect, fields, 200, Some("text/event-stream; charset=utf-8"))
}

pub(super) fn whole(dialect: BodyDialect, fields: AddedAnswerFields) -> AnswerCleanup {
    AnswerCleanup::new(dialect, fields, 200, Some("application/json"))
}

pub(super) fn fields() -> impl Strategy<Value = AddedAnswerFields> {
    select(vec![BOTH, LOGPROBS, IDS])
}

fn ids() -> impl Strategy<Value = String> {
    prop::collection::vec(any::<u32>(), 0..50).prop_map(|ids| format!("‹t{}›", Value::from(ids)))
}

fn logprobs() -> impl Strategy<Value = String> {
    let token = (text(), -20.0..0.0_f64).prop_map(|(token, logprob)| {
        format!(r#"{{"token":{token},"logprob":{logprob},"bytes":[1,2],"top_logprobs":[]}}"#)
    });
    prop::collection::vec(token, 0..4).prop_map(|tokens| format!("‹l{{\"content\":[{}]}}›", tokens.join(",")))
}

/// A JSON string without the marks of tests.
fn text() -> impl Strategy<Value = String> {
    let special =
        select(vec!["\u{2028}", "\u{2029}", "\u{85}", "\"", "\\", "]}", "\r\n", "data: [DONE]", "null"]);
    prop_oneof![special.prop_map(str::to_owned), "[^‹›]{0,8}"].prop_map(|text| Value::from(text).to_string())
}

fn null_or(value: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    prop_oneof![1 => Just("null".to_owned()), 3 => value]
}

/// A choice with its fields in any order.
fn choice(part: &'static str) -> impl Strategy<Value = String> {
    (text(), null_or(logprobs()), null_or(ids()), null_or(ids()), null_or(text()), "[ \t]{0,2}")
        .prop_flat_map(move |(text, logprobs, ids, prompt, finish, space)| {
            let members = vec![
                format!(r#""index":0,"{part}":{{{space}"content":{text},"logprobs":{{"token_ids":[1]}}}}"#),
                format!(r#""logprobs":{space}{logprobs}{space}"#),
                format!(r#""token_ids"{space}:{ids}"#),
                format!(r#""prompt_token_ids":{prompt}"#),
                format!(r#""finish_reason":{finish}"#),
            ];
            let open = space.clone();
            Just(members).prop_shuffle().prop_map(move |all| format!("{{{open}{}}}", all.join(",")))
        })
}

/// An event of one token as engines write it, marked.
pub(super) fn token() -> impl Strategy<Value = String> {
    let logprob = (text(), -20.0..0.0_f64).prop_map(|(token, logprob)| {
        let token = format!(r#"{{"token":{token},"logprob":{logprob:?},"bytes":[1,2],"top_logprobs":[]}}"#);
        format!("‹l{{\"content\":[{token}]}}›")
    });
    let id = any::<u32>().prop_map(|id| format!("‹t[{id}]›"));
    let usage = select(vec!["", "", ",\"usage\":null", ",\"usage\":{\"prompt_tokens\":1}"]);
    (0..2_u8, text(), null_or(logprob), null_or(id), usage).prop_map(|(index, text, logprob, id, usage)| {
        format!(
            "{{\"id\":\"c\",\"created\":1,\"model\":\"m\",\"choices\":[{{\"index\":{index},\
             \"delta\":{{\"content\":{text}}},\"logprobs\":{logprob},\"finish_reason\":null,\
             \"token_ids\":{id}}}]{usage}}}"
        )
    })
}

/// A document, marked.
pub(super) fn document(part: &'static str) -> impl Strategy<Value = String> {
    let choices = prop::collection::vec(choice(part), 0..4);
    (choices, null_or(ids()), text(), any::<bool>()).prop_map(|(choices, prompt, text, is_first)| {
        let choices = format!(r#""choices":[{}]"#, choices.join(", "));
        let prompt = format!(r#""prompt_token_ids":{prompt}"#);
        let (one, two) = if is_first { (prompt, choices) } else { (choices, prompt) };
        format!(r#"{{"id":{text},{one},"kv":{{"prompt_token_ids":[1],"logprobs":{{}}}},{two}}}"#)
    })
}
