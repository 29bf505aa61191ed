//! Tests of answers to prompts that overflow the context.

use super::*;

#[test]
fn has_as_many_choices_as_requested() {
    for (dialect, body, wanted) in [
        (BodyDialect::Chat, r#"{"messages":[{"role":"user","content":"hi"},{}]}"#, 1),
        (BodyDialect::Chat, r#"{"messages":[{}],"n":2}"#, 2),
        (BodyDialect::Chat, r#"{"messages":[[{}],[{},{}]]}"#, 2),
        (BodyDialect::Chat, r#"{"n":3,"messages":[[{}],[{}]]}"#, 6),
        (BodyDialect::Chat, r#"{"messages":[{}],"n":null}"#, 1),
        (BodyDialect::Chat, r#"{"messages":[{}],"n":0}"#, 1),
        (BodyDialect::Chat, r#"{"messages":[{}],"n":99999999999999999999999}"#, 1),
        (BodyDialect::Chat, r#"{"messages":[{}],"n":18446744073709551615}"#, 1 << 14),
        (BodyDialect::Chat, r#"{"messages":[[{}],[{"#, 1),
        (BodyDialect::Completions, r#"{"prompt":"a","n":2}"#, 2),
        (BodyDialect::Completions, r#"{"prompt":["a","b"],"n":2}"#, 4),
        (BodyDialect::Completions, r#"{"prompt":[1,2,3]}"#, 1),
        (BodyDialect::Completions, r#"{"prompt":[[1,2],[3]]}"#, 2),
        (BodyDialect::Completions, r#"{"prompt":[]}"#, 1),
        (BodyDialect::Responses, r#"{"input":["a","b"],"n":2}"#, 1),
        (BodyDialect::Messages, r#"{"messages":[[],[]],"n":2}"#, 1),
    ] {
        assert_eq!(choices(dialect, body.as_bytes()), wanted, "{body}");
    }
}

#[test]
fn distinguishes_an_overflow_from_other_errors() {
    for (status, body, wanted) in [
        (400, r#"{"error":{"message":"too long","param":"input_tokens"}}"#, true),
        (400, r#"{"object":"error","message":"This model's maximum context length is 10 tokens"}"#, true),
        (400, r#"{"type":"error","error":{"type":"x","message":"maximum context length"}}"#, true),
        (400, r#"{"error":{"message":"max_tokens=9 cannot be greater than max_model_len=4"}}"#, false),
        (400, r#"{"error":{"message":"temperature must be non-negative","param":"temperature"}}"#, false),
        (500, r#"{"error":{"message":"maximum context length"}}"#, false),
        (400, "maximum context length", false),
        (400, r#"{"error":"maximum context length"}"#, false),
        (400, "", false),
    ] {
        assert_eq!(is_overflow(status, body.as_bytes()), wanted, "{status} {body}");
    }
    let large =
        format!(r#"{{"error":{{"message":"context length {}"}}}}"#, "x".repeat(MAX_OVERFLOW_ERROR_BYTES));
    assert!(!is_overflow(400, large.as_bytes()));
}
