//! Answers of the Responses interface: output items, taken from the final response, else put together.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::answer::AnswerParts;
use super::ids::append_ids;
use super::merge::MergedObject;
use super::wire::{AnswerBody, LenientCount, RawMembers, TokenLogprob, parse_object, read_tokens, string};
use crate::traces::json::push_string;
use crate::traces::record::{ChoiceRecord, TraceApi};

/// The memory of an item, or of a part of one, beside its texts, for the bound of memory.
const ITEM_BYTES: usize = 512;

/// Merges the events of a response.
#[derive(Debug, Default)]
pub(super) struct ResponseStream {
    parts: AnswerParts,
    has_begun: bool,
    items: BTreeMap<u64, GrowingItem>,
    /// The log-probabilities of the deltas.
    logprobs: Vec<f64>,
}

#[derive(Debug, Default)]
struct GrowingItem {
    item: MergedObject,
    content: BTreeMap<u64, MergedObject>,
    summary: BTreeMap<u64, MergedObject>,
}

#[derive(Deserialize)]
struct ResponseEvent<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    #[serde(borrow)]
    item: Option<&'a RawValue>,
    #[serde(borrow)]
    part: Option<&'a RawValue>,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    #[serde(borrow)]
    logprobs: Option<&'a RawValue>,
    #[serde(default)]
    output_index: LenientCount,
    #[serde(default)]
    content_index: LenientCount,
    #[serde(default)]
    summary_index: LenientCount,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct OutputItem<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct OutputText<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    logprobs: Option<&'a RawValue>,
}

/// What the engine read or wrote, with its tokens, where a request enabled that.
#[derive(Deserialize)]
struct MessageTokens<'a> {
    #[serde(borrow)]
    tokens: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct IncompleteDetails<'a> {
    #[serde(borrow)]
    reason: Option<&'a RawValue>,
}

// === impl ResponseStream ===

impl ResponseStream {
    /// Reads the data of one event. Returns the growth of the held memory.
    pub(super) fn event(&mut self, data: &str) -> usize {
        let Some(event) = parse_object::<ResponseEvent<'_>>(data) else {
            self.parts.is_damaged |= data != "[DONE]";
            return 0;
        };
        let kind = event.kind.map_or("", |kind| kind.get()).trim_matches('"');
        self.parts.has_error |= event.error.is_some() || kind == "error";
        match kind.strip_prefix("response.").unwrap_or_default() {
            "output_text.delta" => {
                let before = self.logprobs.len();
                if let Some(list) = event.logprobs {
                    self.parts.is_damaged |= !append_logprobs(list, &mut self.logprobs);
                }
                let held = size_of::<f64>() * (self.logprobs.len() - before);
                held + self.part_delta(&event, "output_text", "text")
            }
            "refusal.delta" => self.part_delta(&event, "refusal", "refusal"),
            "reasoning_text.delta" => self.part_delta(&event, "reasoning_text", "text"),
            "reasoning_summary_text.delta" => self.part_delta(&event, "summary_text", "text"),
            "function_call_arguments.delta" | "mcp_call_arguments.delta" => {
                self.item_delta(&event, "arguments")
            }
            "custom_tool_call_input.delta" => self.item_delta(&event, "input"),
            "code_interpreter_call_code.delta" => self.item_delta(&event, "code"),
            "content_part.added"
            | "content_part.done"
            | "reasoning_part.added"
            | "reasoning_part.done"
            | "reasoning_summary_part.added"
            | "reasoning_summary_part.done" => self.part(&event),
            "output_item.added" | "output_item.done" => self.item(&event),
            "created" | "in_progress" | "queued" => self.begin(&event),
            "completed" | "incomplete" | "failed" => self.end(&event, kind == "response.failed"),
            _ => 0,
        }
    }

    /// The parts of the answer, at the end of the stream or where it broke off.
    pub(super) fn finish(self) -> AnswerParts {
        let mut parts = self.parts;
        if let Some(choice) = parts.choices.first_mut() {
            if choice.logprobs.is_empty() {
                choice.logprobs = self.logprobs;
            }
        } else if self.has_begun || !self.items.is_empty() {
            let items: Vec<String> = self.items.into_values().map(|item| item.finish().to_json()).collect();
            let output = format!("[{}]", items.join(","));
            let (mut choice, _) = choice_of(&output);
            choice.logprobs = self.logprobs;
            parts.choices.push(choice);
        }
        parts
    }

    fn begin(&mut self, event: &ResponseEvent<'_>) -> usize {
        self.has_begun = true;
        let body = event.response.and_then(|raw| parse_object::<AnswerBody<'_>>(raw.get()));
        if let Some(body) = body
            && self.parts.model.is_none()
        {
            self.parts.model = body.model.and_then(string).map(Into::into);
            self.parts.read_common(&body);
        }
        0
    }

    fn end(&mut self, event: &ResponseEvent<'_>, is_failure: bool) -> usize {
        self.parts.is_complete = true;
        self.parts.has_error |= is_failure;
        let body = event.response.and_then(|raw| parse_object::<AnswerBody<'_>>(raw.get()));
        let Some(body) = body else {
            self.parts.is_damaged = true;
            return 0;
        };
        self.parts.read_common(&body);
        self.parts.model = body.model.and_then(string).map(Into::into).or(self.parts.model.take());
        if let Some(usage) = body.usage {
            read_tokens(TraceApi::Responses, usage.get(), &mut self.parts.tokens);
        }
        // A failed response may have no output where deltas have come.
        let is_empty = body.output.is_none_or(|output| output.get() == "[]");
        if is_failure && is_empty && !self.items.is_empty() {
            return 0;
        }
        self.parts.choices.clear();
        read_whole(&body, &mut self.parts);
        self.items.clear();
        self.parts.choices.iter().map(|choice| choice.message.len() + 12 * choice.logprobs.len()).sum()
    }

    fn entry(&mut self, event: &ResponseEvent<'_>, held: &mut usize) -> &mut GrowingItem {
        self.items.entry(event.output_index.0.unwrap_or(0)).or_insert_with(|| {
            *held += ITEM_BYTES;
            GrowingItem::default()
        })
    }

    fn item(&mut self, event: &ResponseEvent<'_>) -> usize {
        let mut held = 0;
        let entry = self.entry(event, &mut held);
        let Some(members) = event.item.and_then(|item| RawMembers::parse(item.get())) else { return held };
        *entry = GrowingItem::default();
        held + entry.item.set_all(&members)
    }

    fn part(&mut self, event: &ResponseEvent<'_>) -> usize {
        let mut held = 0;
        let part = self.entry(event, &mut held).part(event, &mut held);
        let Some(members) = event.part.and_then(|part| RawMembers::parse(part.get())) else { return held };
        *part = MergedObject::default();
        held + part.set_all(&members)
    }

    fn part_delta(&mut self, event: &ResponseEvent<'_>, kind: &str, member: &str) -> usize {
        let Some(text) = event.delta.and_then(string) else { return 0 };
        let mut held = 0;
        let part = self.entry(event, &mut held).part(event, &mut held);
        if part.is_empty() {
            held += part.append("type", kind);
        }
        held + part.append(member, &text)
    }

    fn item_delta(&mut self, event: &ResponseEvent<'_>, member: &str) -> usize {
        let Some(text) = event.delta.and_then(string) else { return 0 };
        let mut held = 0;
        held + self.entry(event, &mut held).item.append(member, &text)
    }
}

// === impl GrowingItem ===

impl GrowingItem {
    /// The part of the content, or of the summary, that an event is about.
    fn part(&mut self, event: &ResponseEvent<'_>, held: &mut usize) -> &mut MergedObject {
        let (parts, index) = match event.summary_index.0 {
            Some(index) => (&mut self.summary, index),
            None => (&mut self.content, event.content_index.0.unwrap_or(0)),
        };
        parts.entry(index).or_insert_with(|| {
            *held += ITEM_BYTES;
            MergedObject::default()
        })
    }

    /// The item with the parts that came behind its beginning.
    fn finish(mut self) -> MergedObject {
        for (name, parts) in [("content", self.content), ("summary", self.summary)] {
            if !parts.is_empty() {
                let parts: Vec<String> = parts.values().map(MergedObject::to_json).collect();
                self.item.set_json(name, format!("[{}]", parts.join(",")));
            }
        }
        self.item
    }
}

/// Reads an answer that was not a stream, or the response at a stream's end.
pub(super) fn read_whole(read: &AnswerBody<'_>, parts: &mut AnswerParts) {
    let Some(output) = read.output else { return };
    let (mut choice, is_read) = choice_of(output.get());
    parts.is_damaged |= !is_read;
    let details = read.incomplete_details.and_then(|raw| parse_object::<IncompleteDetails<'_>>(raw.get()));
    let reason = details.and_then(|details| details.reason).and_then(string);
    choice.finish_reason = reason.or_else(|| read.status.and_then(string)).map(Into::into);
    parts.prompt_token_ids = message_tokens(read.input_messages);
    choice.token_ids = message_tokens(read.output_messages);
    parts.choices.push(choice);
}

/// The choice of these output items. `false`: some could not be read.
fn choice_of(output: &str) -> (ChoiceRecord, bool) {
    let (mut text, mut has_text, mut logprobs) = (String::new(), false, Vec::new());
    let items = serde_json::from_str::<Vec<&RawValue>>(output);
    let mut is_read = items.is_ok();
    for item in items.unwrap_or_default() {
        let content = parse_object::<OutputItem<'_>>(item.get()).and_then(|item| item.content);
        let parts = content.and_then(|content| serde_json::from_str::<Vec<&RawValue>>(content.get()).ok());
        for part in parts.unwrap_or_default() {
            let Some(part) = parse_object::<OutputText<'_>>(part.get()) else { continue };
            if part.kind.is_none_or(|kind| kind.get() != "\"output_text\"") {
                continue;
            }
            has_text = true;
            text.push_str(&part.text.and_then(string).unwrap_or_default());
            if let Some(list) = part.logprobs {
                is_read &= append_logprobs(list, &mut logprobs);
            }
        }
    }
    let mut message = String::with_capacity(output.len() + text.len() + 64);
    message.push_str("{\"role\":\"assistant\",\"content\":");
    if has_text {
        push_string(&mut message, &text);
    } else {
        message.push_str("null");
    }
    message.push_str(",\"output\":");
    message.push_str(output);
    message.push('}');
    (ChoiceRecord { message: message.into(), logprobs, ..ChoiceRecord::default() }, is_read)
}

/// The token ids of all messages of the list.
fn message_tokens(messages: Option<&RawValue>) -> Vec<u32> {
    let list = messages.and_then(|raw| serde_json::from_str::<Vec<&RawValue>>(raw.get()).ok());
    let mut ids = Vec::new();
    for message in list.unwrap_or_default() {
        let tokens = parse_object::<MessageTokens<'_>>(message.get()).and_then(|message| message.tokens);
        if let Some(tokens) = tokens {
            append_ids(tokens, &mut ids);
        }
    }
    ids
}

/// Appends the numbers of a text's log-probabilities. `false`: they are no such list.
fn append_logprobs(list: &RawValue, logprobs: &mut Vec<f64>) -> bool {
    let Ok(tokens) = serde_json::from_str::<Vec<TokenLogprob>>(list.get()) else { return false };
    logprobs.extend(tokens.iter().filter_map(|token| token.logprob));
    true
}
