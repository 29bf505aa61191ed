//! A chat that a completion can answer as well, and the completion.

use serde_json::{Map, Value, json};

use super::fallback::FallbackReason;
use super::fingerprint;
use crate::json::has_at_most;

/// The members of a chat, of a completion, or of an answer.
pub(super) type ChatFields = Map<String, Value>;

/// The largest chat that is read.
pub(crate) const MAX_CHAT_BYTES: usize = 32 << 20;

/// The largest number of JSON values in a chat; each takes memory of its own.
const MAX_CHAT_VALUES: usize = 200_000;

/// The memory, in bytes, for one value and for one byte of a chat while it is parsed and written again.
const VALUE_BYTES: usize = 256;
const BYTE_FACTOR: usize = 12;

/// Fields that chats and completions have alike.
const COMMON_FIELDS: [&str; 29] = [
    "allowed_token_ids",
    "cache_salt",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "length_penalty",
    "logit_bias",
    "min_p",
    "min_tokens",
    "model",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "request_id",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "seed",
    "session_id",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
    "user",
    "vllm_xargs",
];

/// Fields of a chat that a completion has under other names, or that do not change an answer.
const OTHER_FIELDS: [&str; 15] = [
    "chat_template",
    "chat_template_kwargs",
    "include_reasoning",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "rllm",
    "safety_identifier",
    "service_tier",
    "store",
];

/// Fields that shape the prompt which the engine makes of the messages.
const TEMPLATE_FIELDS: [&str; 9] = [
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "functions",
    "mm_processor_kwargs",
    "reasoning_effort",
    "tools",
];

/// The form of the tokens in the answer to a chat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenForm {
    /// Log-probabilities have `token_id:ID` in the place of a token's text.
    pub as_ids: bool,
    /// The chat did not request the token ids that its completion has because of `as_ids`.
    pub hides_ids: bool,
}

/// A chat that a completion may answer.
#[derive(Debug)]
pub struct ChatTurn {
    fields: ChatFields,
    /// The fingerprint of each message.
    pub(super) fingerprints: Vec<u128>,
}

/// The most memory for reading a chat of `body_len` bytes and writing the completion.
pub(crate) fn memory_needed(body_len: usize) -> u64 {
    ((body_len / 2 + 1).min(MAX_CHAT_VALUES) * VALUE_BYTES + body_len * BYTE_FACTOR) as u64
}

/// The fingerprint of the fields, other than messages, that shape the prompt.
pub(super) fn settings_of(fields: &ChatFields) -> u128 {
    let settings = TEMPLATE_FIELDS.iter().filter_map(|key| Some((key, fields.get(*key)?)));
    let is_set = |value: &Value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty());
    let settings: ChatFields = settings
        .filter(|(_, value)| is_set(value))
        .map(|(key, value)| ((*key).to_owned(), value.clone()))
        .collect();
    fingerprint::of_value(&Value::Object(settings))
}

impl TokenForm {
    /// Whether the completion's answer has token ids that the chat's lacks.
    pub fn hides_own_ids(self) -> bool {
        self.as_ids && self.hides_ids
    }
}

impl ChatTurn {
    /// Parses a chat in the form in which it goes to the upstream.
    pub fn read(body: &[u8]) -> Result<Self, FallbackReason> {
        if body.len() > MAX_CHAT_BYTES || !has_at_most(body, MAX_CHAT_VALUES) {
            return Err(FallbackReason::Size);
        }
        let Ok(Value::Object(fields)) = serde_json::from_slice(body) else {
            return Err(FallbackReason::Fields);
        };
        let messages = fields.get("messages").and_then(Value::as_array).ok_or(FallbackReason::Fields)?;
        let fingerprints = messages.iter().map(fingerprint::of_message).collect();
        Ok(ChatTurn { fields, fingerprints })
    }

    /// Whether the messages contain an answer, so that this is not the first turn.
    pub fn has_history(&self) -> bool {
        self.messages().iter().any(|message| message["role"] == "assistant")
    }

    /// Fails if the answer to a completion would differ from the answer to the chat.
    pub fn check(&self) -> Result<(), FallbackReason> {
        for (key, value) in self.fields.iter().filter(|(_, value)| !value.is_null()) {
            check_field(key, value)?;
        }
        self.messages().iter().try_for_each(check_message)
    }

    pub fn model(&self) -> &str {
        self.fields.get("model").and_then(Value::as_str).unwrap_or_default()
    }

    /// How the chat's answer writes its tokens.
    pub fn token_form(&self) -> TokenForm {
        let is_set = |key: &str| self.fields.get(key) == Some(&Value::Bool(true));
        TokenForm { as_ids: self.asks_for_ids_as_texts(), hides_ids: !is_set("return_token_ids") }
    }

    /// Whether log-probabilities have ids in place of the tokens' texts.
    fn asks_for_ids_as_texts(&self) -> bool {
        let is_set = |key: &str| self.fields.get(key) == Some(&Value::Bool(true));
        is_set("return_tokens_as_token_ids") && is_set("logprobs")
    }

    pub(super) fn settings(&self) -> u128 {
        settings_of(&self.fields)
    }

    pub(super) fn messages(&self) -> &[Value] {
        self.fields.get("messages").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// The request for the tokens of the chat; `replaced`: with this text in place of a message's content.
    pub(super) fn tokenize_body(&self, replaced: Option<(usize, &str)>) -> Vec<u8> {
        let mut messages = self.messages().to_vec();
        if let Some((at, text)) = replaced
            && let Some(message) = messages.get_mut(at)
        {
            message["content"] = json!(text);
        }
        let mut body = ChatFields::new();
        for key in ["model", "chat_template", "chat_template_kwargs"] {
            let value = self.fields.get(key).filter(|value| !value.is_null());
            body.extend(value.map(|value| (key.to_owned(), value.clone())));
        }
        body.insert("messages".into(), Value::Array(messages));
        body.insert("add_generation_prompt".into(), json!(true));
        Value::Object(body).to_string().into_bytes()
    }

    /// The body of the completion that continues from these tokens.
    pub fn completion(&self, prompt: &[u32]) -> Vec<u8> {
        let mut body = ChatFields::new();
        for (key, value) in &self.fields {
            if COMMON_FIELDS.contains(&key.as_str()) {
                body.insert(key.clone(), value.clone());
            }
        }
        let limits = ["max_completion_tokens", "max_tokens"];
        let limit = limits.iter().filter_map(|key| self.fields.get(*key)).find(|limit| !limit.is_null());
        // Without the field a completion ends after 16 tokens; null is as much as fits, as for a chat.
        body.insert("max_tokens".into(), limit.cloned().unwrap_or(Value::Null));
        if self.fields.get("logprobs") == Some(&Value::Bool(true)) {
            body.insert("logprobs".into(), json!(0));
        }
        if self.asks_for_ids_as_texts() {
            // A chat has the bytes of the text besides, which a completion then leaves out: with both the
            // text and the id, the answer can have all of it.
            body.insert("return_tokens_as_token_ids".into(), json!(false));
            body.insert("return_token_ids".into(), json!(true));
        }
        body.insert("add_special_tokens".into(), json!(false));
        body.insert("prompt".into(), json!(prompt));
        Value::Object(body).to_string().into_bytes()
    }
}

/// Fails if a field, which is not null, has another meaning for a completion.
fn check_field(key: &str, value: &Value) -> Result<(), FallbackReason> {
    use FallbackReason::{Choices, Fields, Logprobs, Media, Structured, Tools};
    let is_off = value == false;
    let is_number = |number: u64| value.as_u64() == Some(number);
    let is_empty = value.as_array().is_some_and(Vec::is_empty);
    let (is_plain, reason) = match key {
        "tools" | "functions" => (is_empty, Tools),
        "tool_choice" | "function_call" => (value == "none" || value == "auto", Tools),
        "response_format" => (value["type"] == "text", Structured),
        "structured_outputs" => (false, Structured),
        _ if key.starts_with("guided_") => (false, Structured),
        "n" | "best_of" => (is_number(1), Choices),
        "use_beam_search" => (is_off, Choices),
        "logprobs" => (value.is_boolean(), Logprobs),
        "top_logprobs" => (is_number(0), Logprobs),
        "prompt_logprobs" | "logprob_token_ids" => (false, Logprobs),
        "modalities" => (value.as_array().is_some_and(|all| all.iter().all(|one| one == "text")), Media),
        "audio" | "mm_processor_kwargs" | "media_io_kwargs" => (false, Media),
        "echo" | "continue_final_message" | "add_special_tokens" | "return_prompt_text" => (is_off, Fields),
        "add_generation_prompt" => (value == true, Fields),
        _ => (COMMON_FIELDS.contains(&key) || OTHER_FIELDS.contains(&key), Fields),
    };
    if is_plain { Ok(()) } else { Err(reason) }
}

fn check_message(message: &Value) -> Result<(), FallbackReason> {
    let is_call =
        |key: &str| !message[key].is_null() && message[key].as_array().is_none_or(|all| !all.is_empty());
    if is_call("tool_calls") || is_call("function_call") {
        return Err(FallbackReason::Tools);
    }
    let parts = message["content"].as_array().map_or(&[][..], Vec::as_slice);
    let is_text = |part: &Value| part.is_string() || part["type"] == "text";
    if parts.iter().all(is_text) { Ok(()) } else { Err(FallbackReason::Media) }
}
