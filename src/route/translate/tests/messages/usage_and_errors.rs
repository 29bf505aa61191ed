//! Tests of usage, token ids and errors in translated answers to messages.

use super::*;

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
