//! Turns the answer of a completion into the answer of a chat.
//!
//! Ids, counts and log-probabilities keep their values; names and positions are those of vLLM's chats. A
//! stream begins with the event of the role, and lines without a document stay unchanged.
//!
//! Never: hold more than one line of a stream, continue after a document that is not a completion.

use serde_json::{Value, json};

use super::chat::{ChatFields, TokenForm};
use crate::json::has_at_most;
use crate::route::answer::{MAX_EVENT_BYTES, MAX_WHOLE_ANSWER_BYTES};
use crate::route::translate::MAX_ANSWER_VALUES;
use crate::sse::{LineSplitter, SseLine, SsePiece};

/// The reason why an answer cannot become a chat's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CompletionFault {
    /// The answer is not a completion.
    Unreadable,
    /// The answer exceeds the limit for translation.
    TooLarge,
}

/// Translates one answer of a completion.
#[derive(Debug)]
pub(crate) struct CompletionAnswer {
    tokens: TokenForm,
    mode: AnswerMode,
}

#[derive(Debug)]
enum AnswerMode {
    Whole(Vec<u8>),
    Events { lines: LineSplitter, has_begun: bool },
}

// === impl CompletionAnswer ===

impl CompletionAnswer {
    /// Creates the translation of an answer of this type, for a chat with this form of tokens. `None`: an
    /// answer of this type is not a completion.
    pub(crate) fn new(content_type: Option<&str>, tokens: TokenForm) -> Option<Self> {
        let kind = content_type.unwrap_or_default().trim_start().to_ascii_lowercase();
        let mode = if kind.starts_with("text/event-stream") {
            AnswerMode::Events { lines: LineSplitter::new(MAX_EVENT_BYTES), has_begun: false }
        } else if kind.starts_with("application/json") {
            AnswerMode::Whole(Vec::new())
        } else {
            return None;
        };
        Some(CompletionAnswer { tokens, mode })
    }

    /// Translates the next piece; `end`: it is the last.
    pub(crate) fn feed(&mut self, piece: &[u8], end: bool) -> Result<Vec<u8>, CompletionFault> {
        let tokens = self.tokens;
        match &mut self.mode {
            AnswerMode::Whole(held) => {
                if held.len() + piece.len() > MAX_WHOLE_ANSWER_BYTES {
                    return Err(CompletionFault::TooLarge);
                }
                held.extend_from_slice(piece);
                if end { whole(&std::mem::take(held), tokens) } else { Ok(Vec::new()) }
            }
            AnswerMode::Events { lines, has_begun } => {
                let (mut rest, mut out) = (piece, Vec::with_capacity(2 * piece.len()));
                while let Some(piece) = lines.next(&mut rest) {
                    match piece {
                        SsePiece::Line(line) => event(&line, has_begun, tokens, &mut out)?,
                        SsePiece::LineFeed => out.extend_from_slice(piece.raw()),
                        SsePiece::Long { .. } => return Err(CompletionFault::TooLarge),
                    }
                }
                if let Some(line) = end.then(|| lines.finish()).flatten() {
                    event(&line, has_begun, tokens, &mut out)?;
                }
                Ok(out)
            }
        }
    }
}

/// Translates an answer other than a stream.
fn whole(body: &[u8], tokens: TokenForm) -> Result<Vec<u8>, CompletionFault> {
    if !has_at_most(body, MAX_ANSWER_VALUES) {
        return Err(CompletionFault::TooLarge);
    }
    let Ok(Value::Object(mut given)) = serde_json::from_slice(body) else {
        return Err(CompletionFault::Unreadable);
    };
    let Some(Value::Array(choices)) = given.get_mut("choices").map(Value::take) else {
        return Err(CompletionFault::Unreadable);
    };
    let (mut told, mut prompt) = (Vec::new(), Value::Null);
    for choice in choices {
        let Value::Object(mut choice) = choice else { return Err(CompletionFault::Unreadable) };
        let text = choice.get_mut("text").map(Value::take).unwrap_or_default();
        prompt =
            choice.get_mut("prompt_token_ids").map(Value::take).filter(Value::is_array).unwrap_or(prompt);
        let message = json!({
            "role": "assistant", "content": text, "refusal": null, "annotations": null, "audio": null,
            "function_call": null, "reasoning": null,
        });
        let mut made = ChatFields::new();
        made.insert("index".into(), choice.get("index").cloned().unwrap_or(json!(0)));
        made.insert("message".into(), message);
        made.insert("logprobs".into(), logprobs(&choice, tokens));
        if tokens.hides_own_ids() {
            hide(&mut choice, &mut prompt);
        }
        take_rest(choice, &mut made);
        told.push(Value::Object(made));
    }
    let mut chat = ChatFields::new();
    for (key, value) in given {
        match &*key {
            "id" => chat.insert(key, chat_id(value)),
            "object" => chat.insert(key, json!("chat.completion")),
            "choices" => chat.insert(key, Value::Array(std::mem::take(&mut told))),
            "usage" => {
                chat.insert(key, value);
                // The position of these members in a chat.
                chat.insert("prompt_logprobs".into(), Value::Null);
                chat.insert("prompt_token_ids".into(), prompt.take());
                chat.insert("prompt_text".into(), Value::Null)
            }
            _ => chat.insert(key, value),
        };
    }
    if !prompt.is_null() {
        chat.insert("prompt_token_ids".into(), prompt);
    }
    Ok(Value::Object(chat).to_string().into_bytes())
}

/// Moves the members that both interfaces have, and unknown ones.
fn take_rest(choice: ChatFields, made: &mut ChatFields) {
    const OWN: [&str; 5] = ["index", "text", "logprobs", "prompt_logprobs", "prompt_token_ids"];
    made.extend(choice.into_iter().filter(|(key, _)| !OWN.contains(&key.as_str())));
}

/// Translates one line of a stream.
fn event(
    line: &SseLine<'_>,
    has_begun: &mut bool,
    tokens: TokenForm,
    out: &mut Vec<u8>,
) -> Result<(), CompletionFault> {
    let raw = line.raw();
    let Some(data) = line.data().filter(|data| raw[data.clone()].trim_ascii_start().starts_with(b"{")) else {
        out.extend_from_slice(raw);
        return Ok(());
    };
    let Ok(Value::Object(chunk)) = serde_json::from_slice(&raw[data.clone()]) else {
        return Err(CompletionFault::Unreadable);
    };
    let is_error = chunk.get("error").is_some_and(|error| !error.is_null());
    if is_error || !chunk.get("choices").is_some_and(Value::is_array) {
        out.extend_from_slice(raw);
        return Ok(());
    }
    let (first, chunk) = chat_chunks(chunk, *has_begun, tokens).ok_or(CompletionFault::Unreadable)?;
    out.extend_from_slice(&raw[..data.start]);
    if let Some(first) = first {
        *has_begun = true;
        out.extend_from_slice(first.to_string().as_bytes());
        out.extend_from_slice(b"\n\ndata: ");
    }
    out.extend_from_slice(chunk.to_string().as_bytes());
    out.extend_from_slice(&raw[data.end..]);
    Ok(())
}

/// The chunks of a chat for one chunk of a completion; the first of the two only before the first text.
fn chat_chunks(mut given: ChatFields, has_begun: bool, tokens: TokenForm) -> Option<(Option<Value>, Value)> {
    if let Some(id) = given.get_mut("id") {
        *id = chat_id(id.take());
    }
    given.insert("object".into(), json!("chat.completion.chunk"));
    let Some(Value::Array(choices)) = given.get_mut("choices").map(Value::take) else { return None };
    let (mut told, mut prompt) = (Vec::new(), Value::Null);
    let begins = !has_begun && !choices.is_empty();
    for choice in choices {
        let Value::Object(mut choice) = choice else { return None };
        let text = choice.get_mut("text").map(Value::take).unwrap_or_default();
        prompt = choice.get_mut("prompt_token_ids").map(Value::take).unwrap_or_default();
        let is_last = choice.get("finish_reason").is_some_and(|reason| !reason.is_null());
        let mut made = ChatFields::new();
        made.insert("index".into(), choice.get("index").cloned().unwrap_or(json!(0)));
        made.insert("delta".into(), json!({"content": text}));
        made.insert("logprobs".into(), logprobs(&choice, tokens));
        if tokens.hides_own_ids() {
            hide(&mut choice, &mut prompt);
        }
        if !is_last {
            choice.retain(|key, _| key != "stop_reason");
        }
        take_rest(choice, &mut made);
        told.push(Value::Object(made));
    }
    let first = begins.then(|| role_chunk(&given, prompt));
    given.insert("choices".into(), Value::Array(told));
    Some((first, Value::Object(given)))
}

/// The event that begins a chat's stream.
fn role_chunk(given: &ChatFields, prompt: Value) -> Value {
    let mut chunk = ChatFields::new();
    for key in ["id", "object", "created", "model"] {
        chunk.insert(key.into(), given.get(key).cloned().unwrap_or_default());
    }
    let delta = json!({"role": "assistant", "content": ""});
    let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
    chunk.insert("choices".into(), json!([choice]));
    if let Some(usage) = given.get("usage").filter(|usage| usage.is_object()) {
        let mut usage = usage.clone();
        usage["completion_tokens"] = json!(0);
        usage["total_tokens"] = usage["prompt_tokens"].clone();
        chunk.insert("usage".into(), usage);
    }
    chunk.insert("prompt_token_ids".into(), prompt);
    chunk.insert("prompt_text".into(), Value::Null);
    Value::Object(chunk)
}

/// `cmpl-…` as the id of a chat.
fn chat_id(id: Value) -> Value {
    match id.as_str().map(|id| id.strip_prefix("cmpl-").unwrap_or(id)) {
        Some(own) => json!(format!("chatcmpl-{own}")),
        None => id,
    }
}

/// Puts null in the place of ids that the chat did not request.
fn hide(choice: &mut ChatFields, prompt: &mut Value) {
    prompt.take();
    if let Some(ids) = choice.get_mut("token_ids") {
        ids.take();
    }
}

/// The log-probabilities of a choice in a chat's form, without alternatives.
fn logprobs(choice: &ChatFields, form: TokenForm) -> Value {
    let Some(Value::Object(given)) = choice.get("logprobs") else { return Value::Null };
    let list = |key: &str| given.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let (tokens, logprobs) = (list("tokens"), list("token_logprobs"));
    let ids = choice.get("token_ids").and_then(Value::as_array).filter(|ids| ids.len() == tokens.len());
    let ids = ids.filter(|_| form.as_ids);
    let content = tokens.iter().zip(logprobs).enumerate().map(|(at, (token, logprob))| {
        let bytes = token.as_str().map(str::as_bytes);
        // vLLM writes this number for an impossible token.
        let logprob = if logprob.is_null() { json!(-9999.0) } else { logprob.clone() };
        let token = ids.map_or_else(|| token.clone(), |ids| json!(format!("token_id:{}", ids[at])));
        json!({"token": token, "logprob": logprob, "bytes": bytes, "top_logprobs": []})
    });
    json!({"content": content.collect::<Vec<Value>>()})
}
