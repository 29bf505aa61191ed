//! Builds the message of an answer: its blocks, its end, its usage, in the fields of vLLM 0.32.

use serde_json::{Map, Value, json};

use crate::route::translate::context::TranslationContext;
use crate::route::translate::stream::ChatEnd;

/// Builds the message that answers one request, whole or event by event.
#[derive(Debug)]
pub(crate) struct MessageBuilder {
    pub asker: TranslationContext,
}

/// The tools that an answer calls, as far as they decide how it ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ToolUse {
    pub is_any: bool,
    /// The arguments of the last are complete: it may be run.
    pub is_complete: bool,
}

impl MessageBuilder {
    pub(crate) fn new(asker: TranslationContext) -> Self {
        MessageBuilder { asker }
    }

    /// `chat`: the answer, or its first chunk, which has the id that the message gets.
    pub(crate) fn message(&self, chat: &Value, content: Vec<Value>) -> Value {
        let id = match chat["id"].as_str() {
            Some(id) if !id.is_empty() => id.to_owned(),
            _ => format!("msg_{:032x}", self.asker.seed),
        };
        json!({
            "id": id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.asker.model.as_deref().or(chat["model"].as_str()).unwrap_or_default(),
        })
    }

    /// The signature of thoughts, which clients send back and vLLM does not read.
    pub(crate) fn signature(&self) -> String {
        format!("{:032x}", self.asker.seed)
    }

    /// A call of a tool. `index`: of the block, for the id of one that the engine gave none.
    pub(crate) fn tool_use(&self, call: &Value, index: usize, input: Value) -> Value {
        let id = match call["id"].as_str() {
            Some(id) if !id.is_empty() => id.to_owned(),
            _ => format!("toolu_{:032x}", self.asker.seed.wrapping_add(index as u128 + 1)),
        };
        let name = call["function"]["name"].as_str().unwrap_or_default();
        json!({"type": "tool_use", "id": id, "name": name, "input": input})
    }
}

pub(super) fn thinking(text: &str) -> Value {
    json!({"type": "thinking", "thinking": text})
}

pub(super) fn text(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

/// Why the answer ended, and the stop sequence that ended it, as vLLM decides both. The limit goes before all
/// else. A stop string goes before a call that it cut short: the call must not be run.
pub(super) fn stop_reason(end: &ChatEnd, tools: ToolUse) -> (Option<&'static str>, Option<&str>) {
    match (end.finish_reason.as_str(), end.stop_reason.as_str()) {
        ("length", _) => (Some("max_tokens"), None),
        ("stop" | "tool_calls", _) if tools.is_complete => (Some("tool_use"), None),
        ("stop" | "tool_calls", Some(stop)) => (Some("stop_sequence"), Some(stop)),
        ("tool_calls", None) => (Some("tool_use"), None),
        ("stop", None) => (Some(if tools.is_any { "tool_use" } else { "end_turn" }), None),
        _ => (None, None),
    }
}

/// The usage of a chat as Messages count it: `input_tokens` are those that were not read from the cache, and
/// what the engine did not report of the cache is absent.
pub(super) fn usage(chat: &Value) -> Value {
    let mut usage = Map::new();
    let mut input = chat["prompt_tokens"].as_u64().unwrap_or(0);
    let details = &chat["prompt_tokens_details"];
    usage.insert("input_tokens".into(), Value::Null);
    usage.insert("output_tokens".into(), chat["completion_tokens"].as_u64().unwrap_or(0).into());
    let cached = [
        ("cache_creation_input_tokens", "created_cache_tokens"),
        ("cache_read_input_tokens", "cached_tokens"),
    ];
    for (name, key) in cached {
        if let Some(tokens) = details[key].as_u64() {
            usage.insert(name.into(), tokens.into());
            input = input.saturating_sub(tokens);
        }
    }
    usage.insert("input_tokens".into(), input.into());
    Value::Object(usage)
}
