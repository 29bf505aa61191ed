//! Answers a prompt that is longer than the model's context with an empty answer that ended by its length.
//!
//! Agents that run until the context is full take such an answer as the end of their run. Its usage is that
//! of the engine, which read nothing and generated nothing.

use serde_json::{Value, json};

use crate::json;
use crate::route::dialect::BodyDialect;

/// The longest error that is examined.
pub const MAX_OVERFLOW_ERROR_BYTES: usize = 64 << 10;

/// The largest number of choices: vLLM's own limit.
const MAX_CHOICES: usize = 1 << 14;

/// An answer in place of the upstream's error.
#[derive(Debug, PartialEq, Eq)]
pub struct OverflowAnswer {
    pub content_type: &'static str,
    pub body: String,
}

/// The request that is answered. `seed` makes the answer's id, `now` is in seconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct OverflowRequest<'a> {
    pub dialect: BodyDialect,
    pub stream: bool,
    /// The number of choices in the answer.
    pub choices: usize,
    /// The client's name of the model.
    pub model: &'a str,
    pub now: u64,
    pub seed: u64,
    /// The client expects token ids and log-probabilities on the answer's message.
    pub token_ids: bool,
}

/// The number of choices in an answer to this body: `n` for each prompt, or conversation of a batch.
pub fn choices(dialect: BodyDialect, body: &[u8]) -> usize {
    let field = match dialect {
        BodyDialect::Chat => "messages",
        BodyDialect::Completions => "prompt",
        BodyDialect::Responses | BodyDialect::Messages | BodyDialect::Other => return 1,
    };
    let Some(object) = json::document(body) else { return 1 };
    let number = |span: json::Span| std::str::from_utf8(&body[span]).ok()?.parse::<usize>().ok();
    let each = object.get("n").and_then(number).unwrap_or(1);
    let mut asked = 0;
    // A list of messages, or of token ids, is one prompt.
    let is_prompt = |at: usize| matches!(body.get(at), Some(b'"' | b'['));
    object.get(field).and_then(|list| {
        let count = |at| {
            asked += usize::from(is_prompt(at));
            json::read_value(body, at)
        };
        json::each(body, list.start, count).ok()
    });
    each.saturating_mul(asked.max(1)).clamp(1, MAX_CHOICES)
}

/// Whether a 400 reports that the prompt does not fit: by vLLM's parameter name, or by the error's words.
pub fn is_overflow(status: u16, body: &[u8]) -> bool {
    let Some(Value::Object(body)) = (status == 400 && body.len() <= MAX_OVERFLOW_ERROR_BYTES)
        .then(|| serde_json::from_slice(body).ok())
        .flatten()
    else {
        return false;
    };
    // Before 0.10.1 the error was the whole body.
    let error = body.get("error").and_then(Value::as_object).unwrap_or(&body);
    let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
    text("param") == "input_tokens" || text("message").contains("context length")
}

impl OverflowRequest<'_> {
    /// The answer; `None` for interfaces without an answer that ends by its length.
    pub fn answer(&self) -> Option<OverflowAnswer> {
        let body = match self.dialect {
            BodyDialect::Chat | BodyDialect::Completions => self.choices(),
            BodyDialect::Responses => self.response(),
            BodyDialect::Messages => self.message(),
            BodyDialect::Other => return None,
        };
        let content_type = if self.stream { "text/event-stream; charset=utf-8" } else { "application/json" };
        Some(OverflowAnswer { content_type, body })
    }

    fn id(&self, prefix: &str) -> String {
        format!("{prefix}{:016x}", self.seed)
    }

    /// Adds empty lists of tokens to a message, if the client expects token ids.
    fn with_tokens(&self, mut message: Value) -> Value {
        for field in ["prompt_token_ids", "generation_token_ids", "generation_log_probs"] {
            if self.token_ids {
                message[field] = json!([]);
            }
        }
        message
    }

    fn choices(&self) -> String {
        let chat = self.dialect == BodyDialect::Chat;
        let (prefix, kind) = match (chat, self.stream) {
            (true, true) => ("chatcmpl-", "chat.completion.chunk"),
            (true, false) => ("chatcmpl-", "chat.completion"),
            (false, _) => ("cmpl-", "text_completion"),
        };
        let answer = |choices: Vec<Value>| {
            json!({
                "id": self.id(prefix),
                "object": kind,
                "created": self.now,
                "model": self.model,
                "choices": choices,
            })
        };
        let text =
            |index: usize| json!({"index": index, "text": "", "logprobs": null, "finish_reason": "length"});
        let part = |index: usize, key: &str, part: Value, reason: Value| {
            let logprobs = Value::Null;
            json!({"index": index, key: part, "logprobs": logprobs, "finish_reason": reason})
        };
        let message = || self.with_tokens(json!({"role": "assistant", "content": ""}));
        let all = 0..self.choices.max(1);
        let events = |events: Vec<Value>| {
            data(&events.into_iter().map(|choice| answer(vec![choice])).collect::<Vec<_>>())
        };
        match (chat, self.stream) {
            (true, false) => {
                answer(all.map(|index| part(index, "message", message(), "length".into())).collect())
                    .to_string()
            }
            (false, false) => answer(all.map(text).collect()).to_string(),
            (true, true) => {
                let begun = all.clone().map(|index| part(index, "delta", message(), Value::Null));
                events(
                    begun.chain(all.map(|index| part(index, "delta", json!({}), "length".into()))).collect(),
                )
            }
            (false, true) => events(all.map(text).collect()),
        }
    }

    fn response(&self) -> String {
        let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": null});
        let item = |status: &str, content: Value| {
            json!({
                "id": self.id("msg_"),
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": content,
            })
        };
        let done = self.with_tokens(item("completed", json!([part])));
        let answer = |status: &str, details: Value, output: Value| {
            json!({
                "id": self.id("resp_"),
                "object": "response",
                "created_at": self.now,
                "status": status,
                "incomplete_details": details,
                "error": null,
                "instructions": null,
                "metadata": null,
                "model": self.model,
                "output": output,
                "parallel_tool_calls": true,
                "tool_choice": "auto",
                "tools": [],
                "usage": null,
            })
        };
        let whole = answer("incomplete", json!({"reason": "max_output_tokens"}), json!([done]));
        if !self.stream {
            return whole.to_string();
        }
        let begun = answer("in_progress", Value::Null, json!([]));
        let at = |mut event: Value| {
            event["output_index"] = json!(0);
            event
        };
        let in_item = |mut event: Value| {
            event["item_id"] = json!(self.id("msg_"));
            event["content_index"] = json!(0);
            at(event)
        };
        // Libraries accept only response.completed as the end; its status reports the reason.
        named(
            &[
                json!({"type": "response.created", "response": begun}),
                json!({"type": "response.in_progress", "response": begun}),
                at(json!({"type": "response.output_item.added", "item": item("in_progress", json!([]))})),
                in_item(json!({"type": "response.content_part.added", "part": part})),
                in_item(json!({"type": "response.output_text.done", "text": "", "logprobs": []})),
                in_item(json!({"type": "response.content_part.done", "part": part})),
                at(json!({"type": "response.output_item.done", "item": done})),
                json!({"type": "response.completed", "response": whole}),
            ],
            true,
        )
    }

    fn message(&self) -> String {
        let text = json!({"type": "text", "text": ""});
        // Like translated answers: on the last block of a whole answer, on the last event of a stream.
        let block = self.with_tokens(text.clone());
        let usage = json!({"input_tokens": 0, "output_tokens": 0});
        let answer = |content: Value, reason: Value| {
            json!({
                "id": self.id("msg_"),
                "type": "message",
                "role": "assistant",
                "content": content,
                "model": self.model,
                "stop_reason": reason,
                "stop_sequence": null,
                "usage": usage,
            })
        };
        if !self.stream {
            return answer(json!([block]), "max_tokens".into()).to_string();
        }
        let delta = self.with_tokens(json!({"stop_reason": "max_tokens", "stop_sequence": null}));
        named(
            &[
                json!({"type": "message_start", "message": answer(json!([]), Value::Null)}),
                json!({"type": "content_block_start", "index": 0, "content_block": text}),
                json!({"type": "content_block_stop", "index": 0}),
                json!({"type": "message_delta", "delta": delta, "usage": usage}),
                json!({"type": "message_stop"}),
            ],
            false,
        )
    }
}

fn data(events: &[Value]) -> String {
    let all: String = events.iter().map(|event| format!("data: {event}\n\n")).collect();
    all + "data: [DONE]\n\n"
}

/// Formats named events, with sequence numbers for the interface that has them.
fn named(events: &[Value], numbered: bool) -> String {
    let mut all = String::new();
    for (number, event) in events.iter().enumerate() {
        let mut event = event.clone();
        if numbered {
            event["sequence_number"] = json!(number);
        }
        let name = event["type"].as_str().unwrap_or_default();
        all.push_str(&format!("event: {name}\ndata: {event}\n\n"));
    }
    all
}

#[cfg(test)]
mod tests;
