//! Builds the response: the echoed fields of its request, its items, its usage, its end.
//!
//! Fields, and their order, are those of vLLM 0.32. What the engine did not report is null, but for the
//! details of its usage: clients type those as numbers.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::json;
use crate::route::translate::context::TranslationContext;

/// The request fields that the response echoes.
const ECHOED_FIELDS: [&str; 17] = [
    "frequency_penalty",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning",
    "service_tier",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
];

/// The echoed fields that a route may change in the chat, with their names in a chat.
const ROUTE_CHANGED_FIELDS: [(&str, &[&str]); 6] = [
    ("frequency_penalty", &["frequency_penalty"]),
    ("max_output_tokens", &["max_completion_tokens", "max_tokens"]),
    ("parallel_tool_calls", &["parallel_tool_calls"]),
    ("presence_penalty", &["presence_penalty"]),
    ("temperature", &["temperature"]),
    ("top_p", &["top_p"]),
];

/// The fields of the request that its response echoes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct RequestEcho {
    fields: Map<String, Value>,
    /// The id that the client gave the response.
    id: Option<String>,
}

/// Builds the responses of one request, from its first event to its last.
#[derive(Debug)]
pub(crate) struct ResponseBuilder {
    echo: Arc<RequestEcho>,
    id: String,
    pub asker: TranslationContext,
}

/// How far a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponseStatus {
    Running,
    Completed,
    /// With its reason.
    Incomplete(&'static str),
    Cancelled,
}

/// What an item of the output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputItemKind {
    Reasoning,
    Message,
    Call,
}

// === impl Echo ===

impl RequestEcho {
    pub(crate) fn new(request: &Map<String, Value>) -> Self {
        let fields =
            ECHOED_FIELDS.iter().filter_map(|key| Some(((*key).to_owned(), request.get(*key)?.clone())));
        let id = request.get("request_id").and_then(Value::as_str).map(str::to_owned);
        RequestEcho { fields: fields.collect(), id }
    }

    /// Takes the values that were really sent, after the route's edits.
    pub(crate) fn apply_sent_chat(&mut self, chat: &[u8]) {
        let Some(object) = json::document(chat) else { return };
        for (key, names) in ROUTE_CHANGED_FIELDS {
            let written = names.iter().find_map(|name| object.get(name));
            let value = written.and_then(|span| serde_json::from_slice(&chat[span]).ok());
            match value {
                Some(value) => drop(self.fields.insert(key.to_owned(), value)),
                // A chat without tools is not told whether it may call several at once.
                None if key == "parallel_tool_calls" => {}
                None => drop(self.fields.shift_remove(key)),
            }
        }
    }

    fn get(&self, key: &str) -> Value {
        self.fields.get(key).cloned().unwrap_or(Value::Null)
    }

    fn or(&self, key: &str, value: Value) -> Value {
        self.fields.get(key).cloned().unwrap_or(value)
    }
}

// === impl Form ===

impl ResponseBuilder {
    pub(crate) fn new(echo: Arc<RequestEcho>, asker: TranslationContext) -> Self {
        let id = echo.id.clone().unwrap_or_else(|| format!("resp_{:032x}", asker.seed));
        ResponseBuilder { echo, id, asker }
    }

    /// The id of an item: other than those of all others, and of the response.
    pub(crate) fn item_id(&self, kind: OutputItemKind, index: usize) -> String {
        let prefix = match kind {
            OutputItemKind::Reasoning => "rs",
            OutputItemKind::Message => "msg",
            OutputItemKind::Call => "fc",
        };
        format!("{prefix}_{:032x}", self.asker.seed.wrapping_add(index as u128 + 1))
    }

    /// `served`: what the engine calls its model, for a client that has named none.
    pub(crate) fn response(
        &self,
        served: &str,
        status: ResponseStatus,
        output: &[Value],
        usage: &Value,
    ) -> Value {
        let echo = &self.echo;
        let reason = match status {
            ResponseStatus::Incomplete(reason) => json!({ "reason": reason }),
            _ => Value::Null,
        };
        let has_tools = echo.fields.get("tools").and_then(Value::as_array).is_some_and(|all| !all.is_empty());
        json!({
            "id": self.id,
            "created_at": self.asker.now,
            "incomplete_details": reason,
            "instructions": echo.get("instructions"),
            "metadata": echo.get("metadata"),
            "model": self.asker.model.as_deref().unwrap_or(served),
            "object": "response",
            "output": output,
            "parallel_tool_calls": echo.or("parallel_tool_calls", json!(true)),
            "temperature": echo.get("temperature"),
            "tool_choice": echo.or("tool_choice", json!(if has_tools { "auto" } else { "none" })),
            "tools": echo.or("tools", json!([])),
            "top_p": echo.get("top_p"),
            "background": false,
            "max_output_tokens": echo.get("max_output_tokens"),
            "max_tool_calls": echo.get("max_tool_calls"),
            "previous_response_id": null,
            "prompt": null,
            "reasoning": echo.get("reasoning"),
            "service_tier": echo.or("service_tier", json!("auto")),
            "status": status.name(),
            "store": false,
            "text": echo.get("text"),
            "top_logprobs": echo.get("top_logprobs"),
            "truncation": echo.or("truncation", json!("disabled")),
            "usage": usage,
            "user": echo.get("user"),
            "presence_penalty": echo.get("presence_penalty"),
            "frequency_penalty": echo.get("frequency_penalty"),
        })
    }
}

// === impl Status ===

impl ResponseStatus {
    /// By the chat's `finish_reason`.
    pub(crate) fn of(finish_reason: &str) -> Self {
        match finish_reason {
            "length" => ResponseStatus::Incomplete("max_output_tokens"),
            "content_filter" => ResponseStatus::Incomplete("content_filter"),
            "abort" => ResponseStatus::Cancelled,
            _ => ResponseStatus::Completed,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ResponseStatus::Running => "in_progress",
            ResponseStatus::Completed => "completed",
            ResponseStatus::Incomplete(_) => "incomplete",
            ResponseStatus::Cancelled => "cancelled",
        }
    }
}

// === items ===

/// Reasoning stands in the content, as vLLM puts it, and in the summary: clients that keep only the summary
/// send it back with their next request.
pub(super) fn reasoning(id: &str, text: &str) -> Value {
    json!({
        "id": id,
        "summary": [{"text": text, "type": "summary_text"}],
        "type": "reasoning",
        "content": [{"text": text, "type": "reasoning_text"}],
        "encrypted_content": null,
        "status": "completed",
    })
}

/// `logprobs`: null where the client did not request them.
pub(super) fn message(id: &str, text: &str, logprobs: Value) -> Value {
    json!({
        "id": id,
        "content": [{"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}],
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": null,
    })
}

/// The output item of a function call.
pub(super) fn call(id: &str, (call_id, name): (&str, &str), arguments: &str, status: &str) -> Value {
    json!({
        "arguments": arguments,
        "call_id": call_id,
        "name": name,
        "type": "function_call",
        "id": id,
        "status": status,
    })
}

/// Translates a chat's usage. Details that the engine's chat leaves out are 0, as in vLLM's own Responses:
/// strict clients refuse a null there.
pub(super) fn usage(chat: &Value) -> Value {
    if !chat.is_object() {
        return Value::Null;
    }
    let detail = |list: &str, key: &str| chat[list][key].as_u64().unwrap_or(0);
    json!({
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": detail("prompt_tokens_details", "cached_tokens"),
            // OpenAI's types require it; the engine's chat has it by another name.
            "cache_write_tokens": detail("prompt_tokens_details", "created_cache_tokens"),
        },
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": detail("completion_tokens_details", "reasoning_tokens"),
        },
        "total_tokens": chat["total_tokens"],
    })
}
