//! The hashes of a few prompts, which change only with `FORM_VERSION`.

use super::*;

/// A conversation with everything that has a place in the canonical text.
const CHAT: &str = r#"{"model": "m", "tools": [{"type": "function", "function": {"name": "f",
    "description": "d \u00e9\n", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}}],
    "documents": [{"title": "t", "text": "x"}], "messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "look"},
    {"type": "image_url", "image_url": {"url": "https://example.com/1.png"}}]},
    {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
    "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "found"}, {"role": "user", "content": "thanks"}]}"#;

const RESPONSES: &str = r#"{"model": "m", "instructions": "Be brief.", "previous_response_id": "resp_1",
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "found"}]}"#;

const MESSAGES: &str = r#"{"model": "m", "system": [{"type": "text", "text": "Be brief."}], "tools": [
    {"name": "f", "description": "d", "input_schema": {"type": "object"}}], "messages": [
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "t",
    "name": "f", "input": {"a": 1}}]}, {"role": "user", "content": [{"type": "tool_result",
    "tool_use_id": "t", "content": "found"}]}]}"#;

const TEXT: &str = r#"{"model": "m", "prompt": "Once upon a time, there was", "cache_salt": "s"}"#;

const IDS: &str = r#"{"model": "m", "token_ids": [1, 2, 300, 70000], "features": {"mm_hashes": ["h"]}}"#;

/// A failure here means that the hashes of prompts have changed: raise `FORM_VERSION` with the new hashes, so
/// that balancers of two releases do not mix their chains.
#[test]
fn hashes_change_only_with_the_version_of_the_form() {
    let table = [
        (PromptDialect::Chat, CHAT, 0xd964_ab0c_8c10_e576),
        (PromptDialect::Responses, RESPONSES, 0x0c2c_c6af_cb5e_6c72),
        (PromptDialect::Messages, MESSAGES, 0x96c9_1b7d_cf69_f102),
        (PromptDialect::Completions, TEXT, 0x98ed_ebca_fd1b_68cc),
        (PromptDialect::Generate, IDS, 0x4a78_84e5_8a5b_db5e),
    ];
    let hashes = table.map(|(dialect, body, _)| {
        assert!(serde_json::from_str::<serde_json::Value>(body).is_ok(), "{body}");
        *chain(dialect, body.as_bytes()).blocks.last().expect("has blocks")
    });
    assert_eq!((FORM_VERSION, hashes), (1, table.map(|(_, _, hash)| hash)), "{hashes:#x?}");
}
