//! Messages over chats: any stream, however it is cut, makes the same blocks as the whole answer.

mod usage_and_errors;

use std::collections::HashMap;

use super::*;
use crate::prompt::canon::{PromptDialect, PromptReader, PromptSource};
use crate::prompt::chain::BlockLayout;
use crate::prompt::scan::Scanner;
use crate::route::token_ids::MissingTokens;

const ASK: &[u8] = br#"{"messages":[],"max_tokens":9}"#;

fn messages() -> ChatTranslation {
    let mut exchange = ChatTranslation::new(TranslatedApi::Messages);
    exchange.request(ASK, false).unwrap().unwrap();
    exchange
}

fn streaming(context: TranslationContext) -> ChatTranslation {
    let mut exchange = messages();
    exchange.begin(context, STREAM).unwrap();
    exchange
}

fn streamed(context: TranslationContext, chat: &[u8], cuts: &[usize]) -> Vec<u8> {
    let mut exchange = streaming(context);
    let (mut told, mut at) = (Vec::new(), 0);
    for cut in cuts {
        let cut = (*cut).clamp(at, chat.len());
        told.extend(exchange.feed(&chat[at..cut], false).unwrap().unwrap());
        at = cut;
    }
    told.extend(exchange.feed(&chat[at..], true).unwrap().unwrap());
    told
}

fn whole(context: TranslationContext, chat: &Value) -> Result<Value, AnswerFault> {
    let mut exchange = messages();
    exchange.begin(context, Some("application/json")).unwrap();
    let told = exchange.feed(chat.to_string().as_bytes(), true)?.unwrap();
    Ok(serde_json::from_slice(&told).unwrap())
}

/// The blocks that a client makes of the events, which must come one block at a time.
fn blocks(events: &[Value]) -> Vec<Value> {
    let (mut blocks, mut open) = (Vec::<Value>::new(), false);
    let mut arguments = HashMap::<usize, String>::new();
    for event in events {
        let index = event["index"].as_u64().unwrap_or_default() as usize;
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert!(!open && index == blocks.len(), "{events:?}");
                blocks.push(event["content_block"].clone());
                open = true;
            }
            "content_block_stop" => {
                assert!(open && index + 1 == blocks.len(), "{events:?}");
                open = false;
            }
            "content_block_delta" => {
                assert!(open && index + 1 == blocks.len(), "{events:?}");
                let delta = &event["delta"];
                let (key, more) = match delta["type"].as_str().unwrap() {
                    "text_delta" => ("text", &delta["text"]),
                    "thinking_delta" => ("thinking", &delta["thinking"]),
                    "signature_delta" => {
                        blocks[index]["signature"] = delta["signature"].clone();
                        continue;
                    }
                    "input_json_delta" => {
                        let more = delta["partial_json"].as_str().unwrap();
                        arguments.entry(index).or_default().push_str(more);
                        continue;
                    }
                    other => panic!("{other}"),
                };
                assert_ne!(more, "", "an empty delta");
                let text = blocks[index][key].as_str().unwrap().to_owned() + more.as_str().unwrap();
                blocks[index][key] = text.into();
            }
            _ => {}
        }
    }
    assert!(!open);
    for (index, text) in arguments {
        blocks[index]["input"] = serde_json::from_str(&text).unwrap_or(json!(text));
    }
    blocks
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

/// The events that are no part of a block.
fn frame(events: &[Value]) -> Vec<&str> {
    kinds(events).into_iter().filter(|kind| !kind.starts_with("content_block")).collect()
}

proptest! {
    #[test]
    fn any_cuts_give_the_same_message_events(
        all in prop::collection::vec(said(), 0..12),
        finish in prop::sample::select(&["stop", "length", "tool_calls", "abort"][..]),
        line_end in prop::sample::select(&["\n", "\r\n", "\r"][..]),
        mut cuts in prop::collection::vec(0..4000_usize, 0..12),
    ) {
        let chat = chat(&all, finish, line_end);
        cuts.sort_unstable();
        let told = |cuts: &[usize]| streamed(TranslationContext::default(), chat.as_bytes(), cuts);
        let whole = told(&[]);
        let cut = told(&cuts);
        prop_assert_eq!(String::from_utf8_lossy(&cut), String::from_utf8_lossy(&whole));
        let each: Vec<usize> = (0..chat.len()).collect();
        prop_assert_eq!(&told(&each), &whole);
    }

    #[test]
    fn a_stream_has_the_blocks_of_the_whole_answer(
        thought in "[a-zä\n\"\\\\{}]{0,9}",
        word in "[a-zé\u{2028}:]{0,9}",
        inputs in prop::collection::vec("[a-z\"ö]{0,6}", 0..4),
        stop in prop::option::of("[a-z]{1,3}"),
        finish in prop::sample::select(&["stop", "length", "tool_calls", "abort"][..]),
    ) {
        let arguments: Vec<String> = inputs.iter().map(|text| json!({"a": text}).to_string()).collect();
        let mut all: Vec<Said> = thought.chars().map(|one| Said::Thought(one.into())).collect();
        all.extend(word.chars().map(|one| Said::Word(one.into())));
        for (index, text) in arguments.iter().enumerate() {
            all.extend(text.chars().map(|one| Said::Call(index as u64, one.into())));
        }
        let stream = chat(&all, finish, "\n");
        let ends = format!("\"finish_reason\":\"{finish}\"");
        let stream = stream.replace(&ends, &format!("{ends},\"stop_reason\":{}", json!(stop)));
        let events = events(&streamed(TranslationContext::default(), stream.as_bytes(), &[]));
        let calls = arguments.iter().enumerate().map(|(index, text)| {
            json!({"id": format!("c{index}"), "function": {"name": format!("f{index}"), "arguments": text}})
        });
        let message = json!({"reasoning": thought, "content": word, "tool_calls": calls.collect::<Vec<_>>()});
        let choice =
            json!({"index": 0, "message": message, "finish_reason": finish, "stop_reason": stop});
        let whole = whole(TranslationContext::default(), &json!({"choices": [choice]})).unwrap();
        prop_assert_eq!(&json!(blocks(&events)), &whole["content"]);
        prop_assert_eq!(frame(&events), ["message_start", "message_delta", "message_stop"]);
        let delta = &events[events.len() - 2]["delta"];
        for key in ["stop_reason", "stop_sequence"] {
            prop_assert_eq!(&delta[key], &whole[key]);
        }
    }

    #[test]
    fn no_message_is_too_odd(
        text in r#"\{("messages"|"system"|"tools"|"type"|"role"|"content"|"text"|[{}\[\]:,"a1 ]){0,30}\}"#,
    ) {
        for api in [TranslatedApi::Messages, TranslatedApi::CountTokens] {
            drop(ChatTranslation::new(api).request(text.as_bytes(), true));
        }
    }

    #[test]
    fn no_answer_to_a_message_is_too_odd(
        text in r#"((data: ?)?(\{|"choices"|"delta"|"index"|"error"|"usage"|[{}\[\]:,"a1\n ]){0,30}\n){0,4}"#,
    ) {
        let told = events(&streamed(TranslationContext::default(), text.as_bytes(), &[]));
        prop_assert_eq!(&told.last().unwrap()["type"], "error");
        let mut exchange = messages();
        exchange.begin(TranslationContext::default(), Some("application/json")).unwrap();
        drop(exchange.feed(text.as_bytes(), true));
        let mut refused = messages();
        assert!(refused.begin_error((Some("a"), Some("b")), Some("application/json")));
        prop_assert_eq!(refused.feed(text.as_bytes(), true).unwrap().unwrap().is_empty(), text.is_empty());
    }
}

/// vLLM's parsers let line ends between pieces of a call through.
#[test]
fn what_is_said_within_a_call_follows_it() {
    let call = |text: &str| Said::Call(0, text.into());
    let all = [
        call("{"),
        Said::Word("\n".into()),
        Said::Word("w".into()),
        call("}"),
        Said::Thought("h".into()),
        Said::Call(1, "{}".into()),
        Said::Word("o".into()),
    ];
    let stream = chat(&all, "tool_calls", "\n");
    let events = events(&streamed(TranslationContext::default(), stream.as_bytes(), &[]));
    let blocks = blocks(&events);
    let signature = "0".repeat(32);
    let expected = json!([
        {"type": "tool_use", "id": "c0", "name": "f0", "input": {}},
        {"type": "text", "text": "\nw"},
        {"type": "thinking", "thinking": "h", "signature": signature},
        {"type": "tool_use", "id": "c1", "name": "f1", "input": {}},
        {"type": "text", "text": "o"},
    ]);
    assert_eq!(json!(blocks), expected);
    let back = chat(&[Said::Call(1, "{".into()), call("}")], "tool_calls", "\n");
    let told = streamed(TranslationContext::default(), back.as_bytes(), &[]);
    assert_eq!(super::events(&told).last().unwrap()["type"], "error", "a call that is closed goes on");
}

/// As vLLM 0.32 decides it: the limit first, a stop string before a call that it cut short.
#[test]
fn the_end_of_a_message_is_told_as_vllm_tells_it() {
    let call = |arguments: &str| json!([{"id": "c", "function": {"name": "f", "arguments": arguments}}]);
    let none = json!([]);
    for (finish, stop, calls, reason, sequence) in [
        ("stop", json!(null), &none, json!("end_turn"), json!(null)),
        ("stop", json!(7), &none, json!("end_turn"), json!(null)),
        ("stop", json!("x"), &none, json!("stop_sequence"), json!("x")),
        ("length", json!("x"), &none, json!("max_tokens"), json!(null)),
        ("length", json!(null), &call("{\"a\":"), json!("max_tokens"), json!(null)),
        ("tool_calls", json!(null), &call("{}"), json!("tool_use"), json!(null)),
        ("tool_calls", json!("x"), &call("{}"), json!("tool_use"), json!(null)),
        ("tool_calls", json!(null), &none, json!("tool_use"), json!(null)),
        ("stop", json!(null), &call("{}"), json!("tool_use"), json!(null)),
        ("stop", json!("x"), &call("{\"a\":"), json!("stop_sequence"), json!("x")),
        ("stop", json!(null), &call(" "), json!("tool_use"), json!(null)),
        ("content_filter", json!(null), &none, json!(null), json!(null)),
        ("abort", json!(null), &none, json!(null), json!(null)),
    ] {
        let choice = |key: &str| {
            let said = json!({"tool_calls": calls});
            json!({"index": 0, key: said, "finish_reason": finish, "stop_reason": stop})
        };
        let message = whole(TranslationContext::default(), &json!({"choices": [choice("message")]})).unwrap();
        let stream = format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [choice("delta")]}));
        let events = events(&streamed(TranslationContext::default(), stream.as_bytes(), &[]));
        let delta = &events[events.len() - 2]["delta"];
        for told in [&message, delta] {
            let told = (&told["stop_reason"], &told["stop_sequence"]);
            assert_eq!(told, (&reason, &sequence), "{}", choice("message"));
        }
        assert!(message.get("stop_sequence").is_none() || !sequence.is_null(), "null is left out");
    }
}

#[test]
fn the_cost_of_a_byte_of_a_message_is_bounded() {
    assert_linear(4, || {
        let mut exchange = streaming(TranslationContext::default());
        Box::new(move |chunk| drop(exchange.feed(chunk, false)))
    });
}

/// A client that changes from an engine's own Messages to translated ones finds the same prompt cached.
#[test]
fn the_prompt_of_a_translated_message_is_that_of_the_message() {
    let chain = |dialect: PromptDialect, body: &[u8]| {
        let mut scanner = Scanner::new();
        scanner.scan(body);
        let source = PromptSource { dialect, model: "m", body, scanner: &scanner };
        let layout = BlockLayout { bytes: 16, ..BlockLayout::default() };
        PromptReader::default().read(&source, layout).blocks.clone()
    };
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let sun = json!([{"type": "text", "text": "sun"}]);
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": sun});
    let billing = json!({"type": "text", "text": "x-anthropic-billing-header: 1"});
    let body = json!({
        "model": "m", "max_tokens": 9,
        "system": [billing, {"type": "text", "text": "brief"}],
        "messages": [
            {"role": "user", "content": "what is the weather in the city of the two rivers"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I look at it"},
                {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "x"}},
            ]},
            {"role": "user", "content": [result, {"type": "text", "text": "and tomorrow, what about that"}]},
            {"role": "user", "content": [
                {"type": "text", "text": "look"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
            ]},
        ],
        "tools": [{"name": "weather", "description": "d", "input_schema": schema}],
    });
    let body = body.to_string();
    let chat = messages().request(body.as_bytes(), false).unwrap().unwrap();
    let (native, translated) =
        (chain(PromptDialect::Messages, body.as_bytes()), chain(PromptDialect::Chat, &chat));
    assert!(native.len() > 8, "{native:?}");
    assert_eq!(native, translated);
}
