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

#[test]
fn details_of_usage_are_numbers_where_the_engine_omits_them() {
    for usage in NO_DETAILS {
        let usage: Value = serde_json::from_str(usage).unwrap();
        let choice = json!({"index": 0, "message": {"content": "wo"}, "finish_reason": "stop"});
        let whole =
            response_to(TranslationContext::default(), &json!({"choices": [choice], "usage": usage}));
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
