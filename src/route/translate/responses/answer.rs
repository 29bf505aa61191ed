//! A chat's answer that came whole, as a response.

use serde_json::{Value, json};

use super::response::{self, OutputItemKind, ResponseBuilder, ResponseStatus};
use crate::route::translate::answer::{AnswerFault, REASONING_FIELDS, WholeChat, text};

/// The response.
pub(crate) fn whole(form: &ResponseBuilder, mut chat: WholeChat) -> Result<Vec<u8>, AnswerFault> {
    let mut output = items(form, &chat.choice);
    if form.asker.token_ids
        && let Some(last) = output.last_mut()
    {
        chat.take_tokens()?.put_on(last);
    }
    write(form, chat, &output).ok_or(AnswerFault::NoChat)
}

fn write(form: &ResponseBuilder, chat: WholeChat, output: &[Value]) -> Option<Vec<u8>> {
    let WholeChat { mut chat, choice } = chat;
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
fn items(form: &ResponseBuilder, choice: &Value) -> Vec<Value> {
    let message = &choice["message"];
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
    output
}
