//! Answers of the Messages interface: blocks that begin, grow and end.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::answer::AnswerParts;
use super::merge::{MergedList, MergedObject};
use super::wire::{AnswerBody, LenientCount, RawMembers, is_null, parse_object, read_tokens, string};
use crate::traces::json::push_string;
use crate::traces::record::{ChoiceRecord, TraceApi};

/// The memory of a block beside its texts, for the bound of memory.
const BLOCK_BYTES: usize = 512;

/// Merges the events of a message.
#[derive(Debug, Default)]
pub(super) struct MessageStream {
    parts: AnswerParts,
    has_begun: bool,
    blocks: BTreeMap<u64, GrowingBlock>,
    role: Option<String>,
    stop_reason: Option<String>,
}

#[derive(Debug, Default)]
struct GrowingBlock {
    block: MergedObject,
    /// The JSON of a tool's input, so far.
    input: String,
    citations: MergedList,
}

#[derive(Deserialize)]
struct MessageEvent<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    #[serde(borrow)]
    content_block: Option<&'a RawValue>,
    #[serde(borrow)]
    delta: Option<RawMembers<'a>>,
    #[serde(default)]
    index: LenientCount,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

// === impl MessageStream ===

impl MessageStream {
    /// Reads the data of one event. Returns the growth of the held memory.
    pub(super) fn event(&mut self, data: &str) -> usize {
        let Some(event) = parse_object::<MessageEvent<'_>>(data) else {
            self.parts.is_damaged |= data != "[DONE]";
            return 0;
        };
        if let Some(usage) = event.usage {
            read_tokens(TraceApi::Messages, usage.get(), &mut self.parts.tokens);
        }
        self.parts.has_error |= event.error.is_some();
        match event.kind.map_or("", |kind| kind.get()) {
            "\"content_block_delta\"" => self.delta(&event),
            "\"content_block_start\"" => self.start(&event),
            "\"message_start\"" => self.begin(&event),
            "\"message_delta\"" => {
                let reason = event.delta.as_ref().and_then(|delta| delta.get("stop_reason"));
                self.stop_reason = reason.and_then(string).map(Into::into).or(self.stop_reason.take());
                0
            }
            "\"message_stop\"" => {
                self.parts.is_complete = true;
                0
            }
            "\"error\"" => {
                self.parts.has_error = true;
                0
            }
            _ => 0,
        }
    }

    /// The parts of the answer, at the end of the stream or where it broke off.
    pub(super) fn finish(self) -> AnswerParts {
        let mut parts = self.parts;
        if !self.has_begun && self.blocks.is_empty() {
            return parts;
        }
        let mut content = String::from("[");
        for block in self.blocks.into_values() {
            if content.len() > 1 {
                content.push(',');
            }
            block.finish().write(&mut content);
        }
        content.push(']');
        let message = turn(self.role.as_deref(), &content);
        parts.choices.push(ChoiceRecord {
            message: message.into(),
            finish_reason: self.stop_reason,
            ..ChoiceRecord::default()
        });
        parts
    }

    fn begin(&mut self, event: &MessageEvent<'_>) -> usize {
        let body = event.message.and_then(|raw| parse_object::<AnswerBody<'_>>(raw.get()));
        let Some(body) = body else {
            self.parts.is_damaged = true;
            return 0;
        };
        self.has_begun = true;
        self.parts.read_common(&body);
        self.parts.model = body.model.and_then(string).map(Into::into).or(self.parts.model.take());
        self.role = body.role.and_then(string).map(Into::into);
        if let Some(usage) = body.usage {
            read_tokens(TraceApi::Messages, usage.get(), &mut self.parts.tokens);
        }
        BLOCK_BYTES
    }

    fn start(&mut self, event: &MessageEvent<'_>) -> usize {
        let Some(members) = event.content_block.and_then(|block| RawMembers::parse(block.get())) else {
            self.parts.is_damaged = true;
            return 0;
        };
        let mut block = GrowingBlock::default();
        let held = block.block.set_all(&members);
        self.blocks.insert(event.index.0.unwrap_or(0), block);
        held + BLOCK_BYTES
    }

    fn delta(&mut self, event: &MessageEvent<'_>) -> usize {
        let Some(delta) = &event.delta else {
            self.parts.is_damaged = true;
            return 0;
        };
        let mut held = 0;
        let block = self.blocks.entry(event.index.0.unwrap_or(0)).or_insert_with(|| {
            held += BLOCK_BYTES;
            GrowingBlock::default()
        });
        for (key, value) in &delta.0 {
            held += match &**key {
                "type" => 0,
                "partial_json" => {
                    let piece = string(value).unwrap_or_default();
                    block.input.push_str(&piece);
                    piece.len()
                }
                "citation" => match serde_json::value::to_raw_value(&[value]) {
                    Ok(list) => block.citations.merge(&list),
                    Err(_) => 0,
                },
                "signature" => block.block.set(key, value),
                _ => block.block.merge(key, value),
            };
        }
        held
    }
}

// === impl GrowingBlock ===

impl GrowingBlock {
    /// The block as a whole answer has it. An input that broke off is kept as a text.
    fn finish(mut self) -> MergedObject {
        if !self.input.is_empty() {
            let json = match serde_json::from_str::<&RawValue>(&self.input) {
                Ok(input) => input.get().to_owned(),
                Err(_) => {
                    let mut text = String::new();
                    push_string(&mut text, &self.input);
                    text
                }
            };
            self.block.set_json("input", json);
        }
        if let Some(citations) = self.citations.into_json() {
            self.block.set_json("citations", citations);
        }
        self.block
    }
}

/// Reads an answer that was not a stream.
pub(super) fn read_whole(read: &AnswerBody<'_>, parts: &mut AnswerParts) {
    let Some(content) = read.content.filter(|content| !is_null(content)) else { return };
    parts.choices.push(ChoiceRecord {
        message: turn(read.role.and_then(string).as_deref(), content.get()).into(),
        finish_reason: read.stop_reason.and_then(string).map(Into::into),
        ..ChoiceRecord::default()
    });
}

/// The assistant's turn as the next request carries it.
fn turn(role: Option<&str>, content: &str) -> String {
    let mut message = String::with_capacity(content.len() + 40);
    message.push_str("{\"role\":");
    push_string(&mut message, role.unwrap_or("assistant"));
    message.push_str(",\"content\":");
    message.push_str(content);
    message.push('}');
    message
}
