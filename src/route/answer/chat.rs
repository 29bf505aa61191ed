//! Edits the messages of a chat: in an answer, or in the pieces of a stream.

use crate::config::types::RouteConfig;
use crate::json::{self, JsonObject, Span};
use crate::route::rewrite::AddedAnswerFields;
use crate::route::splice::{ObjectEdit, Splices};
use crate::route::token_ids::{MissingTokens, SeenTokens};

/// The edits of a chat's messages, with the state of a stream.
#[derive(Debug)]
pub(super) struct ChatEdit {
    think_tags: bool,
    token_ids: bool,
    added_fields: AddedAnswerFields,
    thoughts: OpenReasoning,
    /// The token ids and log-probabilities seen so far.
    seen: SeenTokens,
    /// Those found missing.
    pub missing: Option<MissingTokens>,
}

/// The choices of a stream whose reasoning has begun and not ended, by their index.
#[derive(Debug, Default)]
struct OpenReasoning {
    open: Vec<u64>,
}

/// The most choices that are tracked at once: vLLM allows fewer.
const MAX_REASONING_CHOICES: usize = 1 << 14;

/// vLLM's value where the client does not request the field.
const NULL: &[u8] = b"null";

const REASONING_FIELDS: [&str; 2] = ["reasoning", "reasoning_content"];

// === impl ChatEdit ===

impl ChatEdit {
    /// The edits of a route; `None`: it leaves messages as they are.
    pub(super) fn new(route: &RouteConfig, added_fields: AddedAnswerFields) -> Option<Self> {
        let RouteConfig { think_tags, token_ids, .. } = *route;
        let (thoughts, seen, missing) = (OpenReasoning::default(), SeenTokens::default(), None);
        let edit = ChatEdit { think_tags, token_ids, added_fields, thoughts, seen, missing };
        (think_tags || token_ids).then_some(edit)
    }

    /// Edits the choices, each of which has its message under `key`.
    pub(super) fn choices(
        &mut self,
        bytes: &[u8],
        object: &JsonObject<'_>,
        key: &str,
        out: &mut Splices<'_>,
    ) {
        let Some(span) = object.get("choices") else { return };
        let choices =
            json::items(bytes, span.start, |at| Some((json::object(bytes, at), json::value_end(bytes, at)?)));
        let prompt = list(bytes, object, "prompt_token_ids");
        for choice in choices.into_iter().flat_map(|(choices, _)| choices).flatten() {
            let Some(message) = choice.object(bytes, key) else { continue };
            let mut edit = ObjectEdit::new(bytes, &message);
            if self.think_tags {
                self.thoughts(bytes, &choice, &mut edit, key == "message", out);
            }
            if self.token_ids {
                self.check_tokens(bytes, &choice, &message, prompt.is_some(), key == "message");
                self.tokens(bytes, &choice, prompt.clone(), &mut edit, out);
            }
            edit.finish(out);
        }
        if self.added_fields.token_ids {
            prompt.into_iter().for_each(|span| out.replace(span, NULL));
        }
    }

    /// Moves reasoning into the content. Both are JSON strings, so they are joined in their escaped form.
    fn thoughts(
        &mut self,
        bytes: &[u8],
        choice: &JsonObject<'_>,
        edit: &mut ObjectEdit<'_, '_>,
        whole: bool,
        out: &mut Splices<'_>,
    ) {
        let written = |key: &str| {
            let span = edit.object.get(key)?;
            json::inside(&bytes[span]).filter(|text| !text.is_empty())
        };
        let thought = REASONING_FIELDS.iter().find_map(|key| written(key));
        let content = written("content");
        let index = choice.get("index").and_then(|span| std::str::from_utf8(&bytes[span]).ok()?.parse().ok());
        let index: u64 = index.unwrap_or(0);
        let calls = list(bytes, edit.object, "tool_calls");
        let calls = calls.is_some_and(|span| !json::is_empty_list(bytes, &span));
        let finished = choice.get("finish_reason").is_some_and(|span| bytes[span.start] == b'"');
        let over = whole || content.is_some() || calls || finished;
        let mut text = b"\"".to_vec();
        if let Some(thought) = thought {
            if self.thoughts.begin(index) {
                text.extend_from_slice(b"<think>");
            }
            text.extend_from_slice(thought);
        }
        if over && self.thoughts.end(index) {
            text.extend_from_slice(b"</think>");
        } else if thought.is_none() {
            return;
        }
        text.extend_from_slice(content.unwrap_or_default());
        text.push(b'"');
        edit.set("content", text, out);
        for key in REASONING_FIELDS {
            edit.remove(key);
        }
    }

    /// Records the requested tokens that the answer lacks. In a stream, tokens seen once count for the whole
    /// stream; in other answers each choice is checked on its own.
    fn check_tokens(
        &mut self,
        bytes: &[u8],
        choice: &JsonObject<'_>,
        message: &JsonObject<'_>,
        prompt: bool,
        whole: bool,
    ) {
        let ids = list(bytes, choice, "token_ids").or(list(bytes, message, "generation_token_ids"));
        let logprobs = choice.object(bytes, "logprobs");
        let logprobs = logprobs.and_then(|logprobs| list(bytes, &logprobs, "content"));
        let seen = SeenTokens {
            prompt: prompt || list(bytes, message, "prompt_token_ids").is_some(),
            ids: ids.is_some(),
            logprobs: logprobs.or(list(bytes, message, "generation_log_probs")).is_some(),
        };
        self.seen = if whole { seen } else { self.seen.and(seen) };
        let is_text = |key: &&str| {
            let text = message.get(key).and_then(|span| json::inside(&bytes[span]));
            text.is_some_and(|text| !text.is_empty())
        };
        let has_items = |list: Option<Span>| list.is_some_and(|span| !json::is_empty_list(bytes, &span));
        let has_text = ["content", "refusal"].iter().chain(&REASONING_FIELDS).any(is_text);
        let is_made_of_tokens = has_text || has_items(ids) || has_items(list(bytes, message, "tool_calls"));
        if is_made_of_tokens && self.missing.is_none() {
            self.missing = self.seen.missing();
        }
    }

    /// Moves ids and log-probabilities to the message, and removes fields that the client did not request.
    fn tokens(
        &self,
        bytes: &[u8],
        choice: &JsonObject<'_>,
        prompt: Option<Span>,
        edit: &mut ObjectEdit<'_, '_>,
        out: &mut Splices<'_>,
    ) {
        if let Some(span) = prompt {
            edit.set("prompt_token_ids", bytes[span].to_vec(), out);
        }
        if let Some(span) = list(bytes, choice, "token_ids") {
            edit.set("generation_token_ids", bytes[span.clone()].to_vec(), out);
            if self.added_fields.token_ids {
                out.replace(span, NULL);
            }
        }
        let logprobs = choice.get("logprobs").filter(|span| bytes[span.start] == b'{');
        let Some(span) = logprobs else { return };
        if let Some(numbers) = log_probabilities(bytes, span.start) {
            edit.set("generation_log_probs", numbers, out);
        }
        if self.added_fields.logprobs {
            out.replace(span, NULL);
        }
    }
}

/// The list in a field.
fn list(bytes: &[u8], object: &JsonObject<'_>, key: &str) -> Option<Span> {
    object.get(key).filter(|span| bytes[span.start] == b'[')
}

/// The numbers of `logprobs.content`, as they are written.
fn log_probabilities(bytes: &[u8], start: usize) -> Option<Vec<u8>> {
    let content = json::object(bytes, start)?.get("content")?;
    let (numbers, _) = json::items(bytes, content.start, |at| {
        let token = json::object(bytes, at)?;
        Some((token.get("logprob")?, token.span.end))
    })?;
    let numbers: Vec<&[u8]> = numbers.into_iter().map(|span| &bytes[span]).collect();
    Some([b"[", numbers.join(&b","[..]).as_slice(), b"]"].concat())
}

// === impl OpenReasoning ===

impl OpenReasoning {
    /// Whether the reasoning of a choice begins here.
    fn begin(&mut self, index: u64) -> bool {
        let new = !self.open.contains(&index) && self.open.len() < MAX_REASONING_CHOICES;
        if new {
            self.open.push(index);
        }
        new
    }

    /// Ends the reasoning of a choice. Returns whether it was open.
    fn end(&mut self, index: u64) -> bool {
        let before = self.open.len();
        self.open.retain(|open| *open != index);
        self.open.len() < before
    }
}
