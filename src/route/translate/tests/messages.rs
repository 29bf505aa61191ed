//! Messages over chats: any stream, however it is cut, makes the same blocks as the whole answer.

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
fn a_call_that_cannot_be_read_is_refused_where_the_client_would_run_it() {
    for (arguments, fault) in [
        (json!("{\"a\":"), true),
        (json!("[1]"), true),
        (json!("a"), true),
        (json!(1), true),
        (json!("{\"a\":1}"), false),
        (json!({"a": 1}), false),
        (json!(null), false),
    ] {
        let call = json!({"id": "c", "function": {"name": "f", "arguments": arguments}});
        let choice = json!({"index": 0, "message": {"tool_calls": [call]}, "finish_reason": "tool_calls"});
        let told = whole(TranslationContext::default(), &json!({"choices": [choice]}));
        assert_eq!(told.err(), fault.then_some(AnswerFault::ToolInput), "{call}");
    }
}

#[test]
fn usage_has_the_cache_where_the_engine_reports_it() {
    for (chat, expected) in [
        (json!(null), json!({"input_tokens": 0, "output_tokens": 0})),
        (
            json!({"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": null}),
            json!({"input_tokens": 9, "output_tokens": 2}),
        ),
        (
            json!({
                "prompt_tokens": 9, "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 4},
            }),
            json!({"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 4}),
        ),
        (
            json!({
                "prompt_tokens": 9, "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 4, "created_cache_tokens": 3},
            }),
            json!({
                "input_tokens": 2, "output_tokens": 2,
                "cache_creation_input_tokens": 3, "cache_read_input_tokens": 4,
            }),
        ),
        (
            json!({
                "prompt_tokens": 1, "completion_tokens": 0,
                "prompt_tokens_details": {"cached_tokens": 4},
            }),
            json!({"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 4}),
        ),
    ] {
        let choice = json!({"index": 0, "message": {"content": "wo"}, "finish_reason": "stop"});
        let body = json!({"choices": [choice], "usage": chat});
        assert_eq!(whole(TranslationContext::default(), &body).unwrap()["usage"], expected, "{chat}");
    }
}

#[test]
fn the_tokens_of_a_chat_stand_on_the_last_block_or_the_last_delta() {
    let context = || TranslationContext { token_ids: true, ..TranslationContext::default() };
    let call = json!({"id": "c", "function": {"name": "f", "arguments": "{}"}});
    let logprobs = json!({"content": [{"logprob": -0.5}, {"logprob": -1e-5}]});
    let choice = json!({
        "index": 0, "finish_reason": "tool_calls", "token_ids": [7, 8], "logprobs": logprobs,
        "message": {"content": "wo", "tool_calls": [call]},
    });
    let told = whole(context(), &json!({"choices": [choice], "prompt_token_ids": [1, 2]})).unwrap();
    let expected = json!({
        "prompt_token_ids": [1, 2], "generation_token_ids": [7, 8], "generation_log_probs": [-0.5, -1e-5],
    });
    let has = |value: &Value| expected.as_object().unwrap().iter().all(|(key, all)| value[key] == *all);
    assert!(told["content"][0].get("prompt_token_ids").is_none());
    assert!(has(&told["content"][1]), "{told}");
    let piece = |text: &str, id: u64, number: f64, end: Value| {
        let logprobs = json!({"content": [{"logprob": number}]});
        let choice = json!({
            "index": 0, "delta": {"content": text}, "token_ids": [id], "logprobs": logprobs,
            "finish_reason": end,
        });
        json!({"choices": [choice], "prompt_token_ids": if id == 7 { json!([1, 2]) } else { Value::Null }})
    };
    let chunks = [piece("w", 7, -0.5, Value::Null), piece("o", 8, -1e-5, json!("stop"))];
    let stream: String = chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect();
    let stream = format!("{stream}data: [DONE]\n\n");
    let events = events(&streamed(context(), stream.as_bytes(), &[]));
    assert!(has(&events[events.len() - 2]["delta"]), "{events:?}");
    // What comes back with the next request stands on the message again.
    let body = json!({"messages": [{"role": "assistant", "content": told["content"]}], "max_tokens": 9});
    let chat = messages().request(body.to_string().as_bytes(), false).unwrap().unwrap();
    let chat: Value = serde_json::from_slice(&chat).unwrap();
    assert!(has(&chat["messages"][0]), "{chat}");
}

#[test]
fn a_message_without_the_token_ids_of_its_route_is_an_error() {
    let context = || TranslationContext { token_ids: true, ..TranslationContext::default() };
    let choice = json!({"index": 0, "message": {"content": "wo"}, "finish_reason": "stop"});
    let fault = whole(context(), &json!({"choices": [choice]})).unwrap_err();
    assert_eq!(fault, AnswerFault::Tokens(MissingTokens::AnswerIds));
    let stream = chat(&[Said::Word("wo".into())], "stop", "\n");
    let events = events(&streamed(context(), stream.as_bytes(), &[]));
    assert_eq!(kinds(&events), ["message_start", "error"]);
    let error = &events[1]["error"];
    assert_eq!(error["type"], "api_error");
    assert!(error["message"].as_str().unwrap().contains("`return_token_ids: true`"));
}

#[test]
fn a_delta_that_is_no_object_is_no_panic() {
    for delta in ["\"x\"", "[]", "7", "null", "true"] {
        let context = TranslationContext { token_ids: true, ..TranslationContext::default() };
        let chunk = format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}\n\n");
        // An error and an event are both fine; the connection must not just end.
        drop(streaming(context).feed(chunk.as_bytes(), true));
    }
}

#[test]
fn an_error_of_too_many_values_stays_as_it_is() {
    let values = vec!["7"; MAX_ANSWER_VALUES + 1].join(",");
    let body = format!(r#"{{"error":{{"message":"m","code":500,"more":[{values}]}}}}"#);
    let mut exchange = messages();
    assert!(exchange.begin_error((None, None), Some("application/json")));
    assert_eq!(exchange.feed(body.as_bytes(), true).unwrap().unwrap(), body.as_bytes());
}

#[test]
fn errors_take_anthropics_form() {
    let ours = |kind: &str, message: &str| {
        json!({"type": "error", "error": {"type": kind, "message": message}}).to_string()
    };
    let nested = r#"{"error":{"message":"The model `big` is gone.","type":"NotFoundError","code":404}}"#;
    let flat = r#"{"object":"error","message":"m","type":"BadRequestError","param":null,"code":400}"#;
    for (body, expected) in [
        (nested.to_owned(), ours("NotFoundError", "The model `fast` is gone.")),
        (flat.to_owned(), ours("BadRequestError", "m")),
        (r#"{"error":{"message":"m","code":500}}"#.into(), ours("api_error", "m")),
        (r#"{"error":"Unauthorized"}"#.into(), r#"{"error":"Unauthorized"}"#.into()),
        (r#"{"detail":"Not Found"}"#.into(), r#"{"detail":"Not Found"}"#.into()),
        (ours("x", "y"), ours("x", "y")),
        ("{".into(), "{".into()),
    ] {
        for api in [TranslatedApi::Messages, TranslatedApi::CountTokens] {
            let mut exchange = ChatTranslation::new(api);
            assert!(exchange.begin_error((Some("fast"), Some("big")), Some("application/json")));
            let mut told = Vec::new();
            for byte in body.as_bytes() {
                told.extend(exchange.feed(&[*byte], false).unwrap().unwrap());
            }
            told.extend(exchange.feed(&[], true).unwrap().unwrap());
            assert_eq!(String::from_utf8(told).unwrap(), expected, "{body}");
        }
    }
    assert!(!messages().begin_error((None, None), Some("text/plain")), "it goes on as it is");
}

#[test]
fn a_stream_of_messages_that_breaks_ends_with_an_error() {
    let begun = chat(&[Said::Word("w".into())], "stop", "\n");
    let engines = "data: {\"error\":{\"message\":\"`big` m\",\"type\":\"T\",\"code\":500}}\n\n";
    let ends = [("", "api_error", true), ("data: {\n\n", "api_error", true), (engines, "T", false)];
    for (end, kind, broken) in ends {
        let stream = begun.replace("data: [DONE]\n\n", end);
        let model = TranslationContext {
            model: Some("fast".into()),
            to: Some("big".into()),
            ..TranslationContext::default()
        };
        let mut exchange = streaming(model);
        let events = events(&exchange.feed(stream.as_bytes(), true).unwrap().unwrap());
        let last = &events[events.len() - 1];
        assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!(kind)));
        assert!(broken || last["error"]["message"] == "`fast` m", "{last}");
        assert_eq!(exchange.is_broken(), broken);
        assert_eq!(events[0]["message"]["model"], "fast");
    }
}

#[test]
fn a_count_is_that_of_the_tokenizer() {
    let mut exchange = ChatTranslation::new(TranslatedApi::CountTokens);
    exchange.begin(TranslationContext::default(), Some("application/json")).unwrap();
    let tokens = vec!["7"; MAX_ANSWER_VALUES + 1].join(",");
    let body = format!(r#"{{"count":1000001,"max_model_len":2000000,"tokens":[{tokens}]}}"#);
    let told = exchange.feed(body.as_bytes(), true).unwrap().unwrap();
    let expected = r#"{"input_tokens":1000001,"context_management":{"original_input_tokens":1000001}}"#;
    assert_eq!(String::from_utf8(told).unwrap(), expected);
    for body in ["{}", r#"{"count":"7"}"#, "[7]", "7"] {
        exchange.begin(TranslationContext::default(), Some("application/json")).unwrap();
        assert_eq!(exchange.feed(body.as_bytes(), true), Err(AnswerFault::NoChat), "{body}");
    }
    assert_eq!(exchange.begin(TranslationContext::default(), STREAM), Err(AnswerFault::NoChat));
}

#[test]
fn every_message_event_goes_out_with_its_chunk() {
    let mut exchange = streaming(TranslationContext::default());
    let chat = chat(&[Said::Thought("h".into()), Said::Word("w".into()), Said::Comment], "stop", "\n");
    let mut counts = Vec::new();
    for line in chat.split_inclusive('\n').filter(|line| line.len() > 1) {
        let told = exchange.feed(line.as_bytes(), false).unwrap().unwrap();
        counts.push(if told.starts_with(b":") { 1 } else { events(&told).len() });
    }
    // Started, block, delta; signature, stop, block, delta; the keep-alive; nothing; stop, delta, stop.
    assert_eq!(counts, [3, 4, 1, 0, 3]);
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
