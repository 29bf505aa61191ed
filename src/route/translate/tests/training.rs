//! What agents that train models need of a translated answer: numbers, reasoning, token ids.

use super::*;

const NO_DETAILS: [&str; 3] = [
    r#"{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}"#,
    r#"{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,"prompt_tokens_details":null}"#,
    r#"{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":null},
        "completion_tokens_details":{"reasoning_tokens":null}}"#,
];

/// The response to a chat's answer that came whole.
fn response_to(context: TranslationContext, chat: &Value) -> Value {
    let mut exchange = ResponseTranslation::default();
    exchange.request(br#"{"input":"hi"}"#, false).unwrap();
    exchange.begin(context, Some("application/json")).unwrap();
    let told = exchange.feed(chat.to_string().as_bytes(), true).unwrap().unwrap();
    serde_json::from_slice(&told).unwrap()
}

/// The last event of a chat's stream.
fn last_event(context: TranslationContext, chunks: &[Value]) -> Value {
    let mut exchange = ResponseTranslation::default();
    exchange.request(br#"{"input":"hi"}"#, false).unwrap();
    exchange.begin(context, STREAM).unwrap();
    let stream: String = chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect();
    let told = exchange.feed(format!("{stream}data: [DONE]\n\n").as_bytes(), true).unwrap().unwrap();
    events(&told).pop().unwrap()
}

/// The messages of the chat that a request with these items becomes.
fn messages_of(items: &Value) -> Value {
    let body = json!({"input": items}).to_string();
    let chat = ResponseTranslation::default().request(body.as_bytes(), false).unwrap().unwrap();
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
            assert_eq!(told["input_tokens_details"], json!({"cached_tokens": 0}));
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
