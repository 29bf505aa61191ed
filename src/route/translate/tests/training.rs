//! What agents that train models need of a translated answer: numbers, reasoning, token ids.

use super::*;

const NO_DETAILS: [&str; 3] = [
    r#"{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}"#,
    r#"{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,"prompt_tokens_details":null}"#,
    r#"{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,
        "prompt_tokens_details":{"cached_tokens":null},
        "completion_tokens_details":{"reasoning_tokens":null}}"#,
];

/// The response to a chat's answer that came whole.
fn response_to(context: TranslationContext, chat: &Value) -> Value {
    let mut exchange = responses();
    exchange.request(br#"{"input":"hi"}"#, false).unwrap();
    exchange.begin(context, Some("application/json")).unwrap();
    let told = exchange.feed(chat.to_string().as_bytes(), true).unwrap().unwrap();
    serde_json::from_slice(&told).unwrap()
}

/// The last event of a chat's stream.
fn last_event(context: TranslationContext, chunks: &[Value]) -> Value {
    let mut exchange = responses();
    exchange.request(br#"{"input":"hi"}"#, false).unwrap();
    exchange.begin(context, STREAM).unwrap();
    let stream: String = chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect();
    let told = exchange.feed(format!("{stream}data: [DONE]\n\n").as_bytes(), true).unwrap().unwrap();
    events(&told).pop().unwrap()
}

/// The messages of the chat that a request with these items becomes.
fn messages_of(items: &Value) -> Value {
    let body = json!({"input": items}).to_string();
    let chat = responses().request(body.as_bytes(), false).unwrap().unwrap();
    serde_json::from_slice::<Value>(&chat).unwrap()["messages"].take()
}

#[test]
fn details_of_usage_are_numbers_where_the_engine_omits_them() {
    for usage in NO_DETAILS {
        let usage: Value = serde_json::from_str(usage).unwrap();
        let choice = json!({"index": 0, "message": {"content": "wo"}, "finish_reason": "stop"});
        let whole = response_to(TranslationContext::default(), &json!({"choices": [choice], "usage": usage}));
        let delta = json!({"index": 0, "delta": {"content": "wo"}, "finish_reason": "stop"});
        let chunks = [json!({"choices": [delta]}), json!({"choices": [], "usage": usage})];
        let streamed = last_event(TranslationContext::default(), &chunks);
        for told in [&whole["usage"], &streamed["response"]["usage"]] {
            assert_eq!(told["input_tokens"], 3);
            assert_eq!(told["input_tokens_details"], json!({"cached_tokens": 0, "cache_write_tokens": 0}));
            assert_eq!(told["output_tokens_details"], json!({"reasoning_tokens": 0}));
        }
    }
}

/// NeMo Gym's item has no content: what stands there only does not come back with the next request.
#[test]
fn reasoning_comes_back_from_a_client_that_keeps_only_its_summary() {
    let answer =
        json!({"index": 0, "message": {"reasoning": "hm", "content": "wo"}, "finish_reason": "stop"});
    let mut whole = response_to(TranslationContext::default(), &json!({"choices": [answer]}));
    let delta = json!({"index": 0, "delta": {"reasoning": "hm", "content": "wo"}, "finish_reason": "stop"});
    let mut streamed = last_event(TranslationContext::default(), &[json!({"choices": [delta]})]);
    let assistant = json!([{"role": "assistant", "content": "wo", "reasoning": "hm"}]);
    for output in [&mut whole["output"], &mut streamed["response"]["output"]] {
        assert_eq!(output[0]["summary"], json!([{"text": "hm", "type": "summary_text"}]));
        assert_eq!(output[0]["content"][0]["text"], "hm");
        assert_eq!(messages_of(output), assistant, "both stand there");
        output[0].as_object_mut().unwrap().shift_remove("content");
        assert_eq!(messages_of(output), assistant, "the summary alone");
        output[0]["content"] = json!([{"text": "hm", "type": "reasoning_text"}]);
        output[0]["summary"] = json!([]);
        assert_eq!(messages_of(output), assistant, "the content alone");
    }
}

/// As NeMo Gym has them: on the last item of each answer.
#[test]
fn token_ids_of_earlier_answers_stand_on_their_messages() {
    let ids = |prompt: &[u64], experts: Value| {
        json!({
            "prompt_token_ids": prompt, "generation_token_ids": [7, 8],
            "generation_log_probs": [-0.5, -1e-05], "routed_experts": experts,
        })
    };
    let with = |mut item: Value, tokens: Value| {
        item.as_object_mut().unwrap().extend(tokens.as_object().unwrap().clone());
        item
    };
    let thought =
        json!({"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]});
    let call = json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"});
    let output = json!({"type": "function_call_output", "call_id": "c", "output": "4"});
    let said =
        json!({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "wo"}]});
    let asked = with(json!({"role": "user", "content": "hi"}), ids(&[1], Value::Null));
    let items = json!([
        asked,
        thought,
        with(call, ids(&[1, 2], Value::Null)),
        output,
        with(said.clone(), ids(&[1, 2, 3], json!([[[0, 1]]]))),
        {"role": "user", "content": "more"},
        with(said, ids(&[], Value::Null)),
    ]);
    let messages = messages_of(&items);
    assert_eq!(messages[0], json!({"role": "user", "content": "hi"}));
    let first = &messages[1];
    assert_eq!((&first["reasoning"], &first["tool_calls"][0]["id"]), (&json!("hm"), &json!("c")));
    assert_eq!(first["prompt_token_ids"], json!([1, 2]));
    assert_eq!(first["generation_token_ids"], json!([7, 8]));
    assert_eq!(first["generation_log_probs"], json!([-0.5, -1e-05]));
    assert!(first.get("routed_experts").is_none());
    assert_eq!(messages[3]["prompt_token_ids"], json!([1, 2, 3]));
    assert_eq!(messages[3]["routed_experts"], json!([[[0, 1]]]));
    assert_eq!(messages[5], json!({"role": "assistant", "content": "wo"}));
}

#[test]
fn the_tokens_of_a_message_move_to_the_last_item() {
    let context = || TranslationContext { token_ids: true, ..TranslationContext::default() };
    let call = json!({"id": "c", "function": {"name": "f", "arguments": "{}"}});
    // Beside the message as vLLM has them, and on it as engines of trainers do.
    let choices = [
        json!({
            "index": 0, "finish_reason": "stop", "token_ids": [7, 8],
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.0}]},
            "message": {"content": "wo", "tool_calls": [call], "routed_experts": [[[0, 1]], [[1, 2]]]},
        }),
        json!({
            "index": 0, "finish_reason": "stop",
            "message": {
                "content": "wo", "tool_calls": [call], "routed_experts": [[[0, 1]], [[1, 2]]],
                "prompt_token_ids": [1, 2], "generation_token_ids": [7, 8],
                "generation_log_probs": [-0.5, -1.0],
            },
        }),
    ];
    for choice in choices {
        let told = response_to(context(), &json!({"choices": [choice], "prompt_token_ids": [1, 2]}));
        assert!(told["output"][0].get("prompt_token_ids").is_none());
        let last = &told["output"][1];
        assert_eq!(last["type"], "function_call");
        assert_eq!(last["prompt_token_ids"], json!([1, 2]));
        assert_eq!(last["generation_token_ids"], json!([7, 8]));
        assert_eq!(last["generation_log_probs"], json!([-0.5, -1.0]));
        assert_eq!(last["routed_experts"], json!([[[0, 1]], [[1, 2]]]));
    }
    let piece = |text: &str, id: u64, end: Value| {
        let delta = json!({"content": text, "routed_experts": [[[id, id]]]});
        let logprobs = json!({"content": [{"logprob": -0.5}]});
        let choice = json!({
            "index": 0, "delta": delta, "token_ids": [id], "logprobs": logprobs, "finish_reason": end,
        });
        json!({"choices": [choice], "prompt_token_ids": if id == 7 { json!([1, 2]) } else { Value::Null }})
    };
    let told = last_event(context(), &[piece("w", 7, Value::Null), piece("o", 8, json!("stop"))]);
    let last = &told["response"]["output"][0];
    assert_eq!(last["prompt_token_ids"], json!([1, 2]));
    assert_eq!(last["generation_token_ids"], json!([7, 8]));
    assert_eq!(last["routed_experts"], json!([[[7, 7]], [[8, 8]]]));
}

#[test]
fn a_stream_without_token_ids_ends_with_an_error_before_its_first_word() {
    let context = || TranslationContext { token_ids: true, ..TranslationContext::default() };
    let chunk =
        |delta: Value, end: Value| json!({"choices": [{"index": 0, "delta": delta, "finish_reason": end}]});
    let begun = chunk(json!({"role": "assistant", "content": ""}), Value::Null);
    let word = chunk(json!({"content": "wo"}), json!("stop"));
    let told = last_event(context(), &[begun.clone(), word]);
    assert_eq!((&told["type"], &told["error"]["code"]), (&json!("error"), &json!(500)));
    assert!(told["message"].as_str().unwrap().contains("`return_token_ids: true`"));
    let told = last_event(context(), &[begun, chunk(json!({}), json!("length"))]);
    assert_eq!(told["type"], "response.completed");
}
