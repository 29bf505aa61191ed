//! Answers that came whole: a chat's, the engine's count of tokens, and its errors.

use serde_json::{Value, json};

use super::blocks::{self, MessageBuilder, ToolUse};
use crate::json;
use crate::route::answer::ModelRename;
use crate::route::translate::answer::{AnswerFault, MAX_ANSWER_VALUES, REASONING_FIELDS, WholeChat, text};
use crate::route::translate::stream::{ChatEnd, error_in};

/// What the caller of a disaggregated prefill needs for its next request.
const TRANSFER_FIELDS: [&str; 2] = ["kv_transfer_params", "ec_transfer_params"];

/// The message.
pub(crate) fn whole(form: &MessageBuilder, mut chat: WholeChat) -> Result<Vec<u8>, AnswerFault> {
    let choice = &chat.choice;
    let end = ChatEnd {
        finish_reason: choice["finish_reason"].as_str().unwrap_or_default().to_owned(),
        stop_reason: choice["stop_reason"].clone(),
        ..ChatEnd::default()
    };
    let calls = choice["message"]["tool_calls"].as_array().map_or(&[][..], Vec::as_slice);
    let inputs: Vec<Option<Value>> = calls.iter().map(|call| input(&call["function"]["arguments"])).collect();
    let is_any = !calls.is_empty();
    let tools = ToolUse { is_any, is_complete: is_any && inputs.iter().all(Option::is_some) };
    let (reason, sequence) = blocks::stop_reason(&end, tools);
    // A call that was cut short is shown without its input; one that the client would run is none.
    if reason == Some("tool_use") && is_any && !tools.is_complete {
        return Err(AnswerFault::ToolInput);
    }
    let mut content = content(form, &choice["message"]);
    for (call, input) in calls.iter().zip(inputs) {
        let index = content.len();
        content.push(form.tool_use(call, index, input.unwrap_or_else(|| json!({}))));
    }
    if content.is_empty() {
        content.push(blocks::text(""));
    }
    if form.asker.token_ids
        && let Some(last) = content.last_mut()
    {
        chat.take_tokens()?.put_on(last);
    }
    let mut message = form.message(&chat.chat, content);
    for (key, value) in [("stop_reason", reason), ("stop_sequence", sequence)] {
        // What is null is left out of whole answers.
        if let Some(value) = value {
            message[key] = value.into();
        }
    }
    message["usage"] = blocks::usage(&chat.chat["usage"]);
    for key in TRANSFER_FIELDS {
        if chat.chat[key].is_object() {
            message[key] = chat.chat[key].take();
        }
    }
    serde_json::to_vec(&message).map_err(|_| AnswerFault::NoChat)
}

/// What the message thought and says.
fn content(form: &MessageBuilder, message: &Value) -> Vec<Value> {
    let mut content = Vec::new();
    if let Some(thought) = text(message, &REASONING_FIELDS) {
        let mut block = blocks::thinking(thought);
        block["signature"] = form.signature().into();
        content.push(block);
    }
    content.extend(text(message, &["content", "refusal"]).map(blocks::text));
    content
}

/// The arguments of a call as an object. Some engines write none at all.
fn input(arguments: &Value) -> Option<Value> {
    match arguments {
        Value::Null => Some(json!({})),
        Value::String(text) if text.trim().is_empty() => Some(json!({})),
        Value::String(text) => serde_json::from_str(text).ok().filter(Value::is_object),
        Value::Object(_) => Some(arguments.clone()),
        _ => None,
    }
}

/// The count of a prompt's tokens, from the answer of `/tokenize`; its tokens are not read.
pub(crate) fn count(body: &[u8]) -> Result<Vec<u8>, AnswerFault> {
    let count = json::document(body).and_then(|object| {
        let span = object.get("count")?;
        std::str::from_utf8(&body[span]).ok()?.parse::<u64>().ok()
    });
    let count = count.ok_or(AnswerFault::NoChat)?;
    let told = json!({"input_tokens": count, "context_management": {"original_input_tokens": count}});
    serde_json::to_vec(&told).map_err(|_| AnswerFault::NoChat)
}

/// The engine's error in Anthropic's form, with the client's name of the model. What is no error of vLLM's
/// own form, as a framework's 404 is none, stays as it is.
pub(crate) fn error(names: Option<&ModelRename>, body: &[u8]) -> Vec<u8> {
    let body = names.map_or_else(|| body.to_vec(), |names| names.document(body));
    if !json::has_at_most(&body, MAX_ANSWER_VALUES) {
        return body;
    }
    let Ok(document) = serde_json::from_slice::<Value>(&body) else { return body };
    if document["error"].is_string() || document["type"] == "error" {
        return body;
    }
    let error = error_in(document);
    if !error["message"].is_string() {
        return body;
    }
    serde_json::to_vec(&error_form(&error)).unwrap_or(body)
}

/// An error in Anthropic's form, from one as vLLM writes it.
pub(super) fn error_form(error: &Value) -> Value {
    let kind = error["type"].as_str().unwrap_or("api_error");
    // Clients of Anthropic's API expect a text.
    let message = error["message"].as_str().unwrap_or("The engine reported an error without a message.");
    json!({"type": "error", "error": {"type": kind, "message": message}})
}
