//! A chat's answer that came whole, as a response.

use serde_json::{Value, json};

use super::AnswerFault;
use super::response::{self, AnswerTokens, OutputItemKind, ResponseBuilder, ResponseStatus};
use crate::route::json::has_at_most;

/// The most values that a chat's answer may have. Log-probabilities are most of those: with 20 of them for
/// each token it is enough for some 5,000 tokens.
pub const MAX_ANSWER_VALUES: usize = 1_000_000;

/// The text that a message has under one of these names; an empty one is none.
pub fn text<'a>(message: &'a Value, names: &[&str]) -> Option<&'a str> {
    let texts = names.iter().filter_map(|name| message[*name].as_str());
    texts.into_iter().find(|text| !text.is_empty())
}

/// Whether a message, or a piece of one, is made of tokens that clients see.
pub fn has_text(message: &Value) -> bool {
    let calls = message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    calls || text(message, &REASONING_FIELDS).or(text(message, &["content", "refusal"])).is_some()
}

/// Where engines put what the model thought.
pub const REASONING_FIELDS: [&str; 2] = ["reasoning", "reasoning_content"];

/// The response.
pub fn whole(form: &ResponseBuilder, body: &[u8]) -> Result<Vec<u8>, AnswerFault> {
    if !has_at_most(body, MAX_ANSWER_VALUES) {
        return Err(AnswerFault::ManyValues);
    }
    let mut chat: Value = serde_json::from_slice(body).map_err(|_| AnswerFault::NoChat)?;
    let (mut choice, mut output) = read(form, &mut chat).ok_or(AnswerFault::NoChat)?;
    if form.asker.token_ids
        && let Some(last) = output.last_mut()
    {
        let mut tokens = AnswerTokens::default();
        tokens.collect(&mut chat, &mut choice);
        if let Some(missing) = tokens.missing(&choice["message"]) {
            return Err(AnswerFault::Tokens(missing));
        }
        tokens.put_on(last);
    }
    write(form, chat, &choice, &output).ok_or(AnswerFault::NoChat)
}

/// The first choice and its items. `None`: this is no chat.
fn read(form: &ResponseBuilder, chat: &mut Value) -> Option<(Value, Vec<Value>)> {
    let choices = chat.get_mut("choices")?.as_array_mut()?;
    let first = choices.iter().position(|choice| choice["index"] == 0).unwrap_or(0);
    let choice = choices.get_mut(first)?.take();
    let output = items(form, &choice)?;
    Some((choice, output))
}

fn write(form: &ResponseBuilder, mut chat: Value, choice: &Value, output: &[Value]) -> Option<Vec<u8>> {
    let status = ResponseStatus::of(choice["finish_reason"].as_str().unwrap_or_default());
    let usage = response::usage(&chat["usage"]);
    let mut response = form.response(chat["model"].as_str().unwrap_or_default(), status, output, &usage);
    // The caller of a disaggregated prefill needs them for its next request.
    if chat["kv_transfer_params"].is_object() {
        response["kv_transfer_params"] = chat["kv_transfer_params"].take();
    }
    serde_json::to_vec(&response).ok()
}

/// What the message says, in vLLM's order: what it thought, what it says, what it calls.
fn items(form: &ResponseBuilder, choice: &Value) -> Option<Vec<Value>> {
    let message = choice.get("message").filter(|message| message.is_object())?;
    let mut output = Vec::new();
    if let Some(thought) = text(message, &REASONING_FIELDS) {
        output.push(response::reasoning(&form.item_id(OutputItemKind::Reasoning, 0), thought));
    }
    let calls = message["tool_calls"].as_array().map_or(&[][..], Vec::as_slice);
    let said = text(message, &["content", "refusal"]);
    if said.is_some() || (output.is_empty() && calls.is_empty()) {
        let logprobs = match &choice["logprobs"]["content"] {
            Value::Array(list) if !form.asker.hides_logprobs => json!(list),
            _ => Value::Null,
        };
        let id = form.item_id(OutputItemKind::Message, output.len());
        output.push(response::message(&id, said.unwrap_or_default(), logprobs));
    }
    for call in calls {
        let id = form.item_id(OutputItemKind::Call, output.len());
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (function, call_id) = (&call["function"], word(&call["id"]));
        let call_id = if call_id.is_empty() { id.clone() } else { call_id };
        let names = (call_id.as_str(), &*word(&function["name"]));
        output.push(response::call(&id, names, &word(&function["arguments"]), "completed"));
    }
    Some(output)
}
