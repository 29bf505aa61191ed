//! A chat's stream as the events of a message, told as each chunk goes by.
//!
//! The events, their order and their fields are those of vLLM's own Messages: one block at a time. What is
//! said while a call is told waits for the call's end, in case its arguments go on. What is held is that, and
//! the arguments of the last call, which decide how the message ended.

use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::answer::error_form;
use super::blocks::{self, MessageBuilder, ToolUse};
use crate::reply::ending::{ErrorEventForm, error_events};
use crate::route::answer::MAX_WHOLE_ANSWER_BYTES;
use crate::route::translate::answer::{REASONING_FIELDS, text};
use crate::route::translate::stream::{ChatEnd, ChatEvents, StreamFault};
use crate::route::translate::tokens::AnswerTokens;

/// What a waiting text takes beside its bytes.
const WAITING_ENTRY_BYTES: usize = 64;

/// The message as far as it is told.
#[derive(Debug)]
pub(crate) struct MessageEvents {
    form: MessageBuilder,
    open: Option<BlockKind>,
    /// The index of the next block, or of the open one.
    index: usize,
    /// The latest call's place among all calls, and its arguments.
    called: Option<u64>,
    arguments: String,
    /// What was said while the open call was told.
    waiting: Vec<(BlockKind, String)>,
    /// How many bytes of the two are held.
    held: usize,
    out: Vec<u8>,
}

/// What a block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockKind {
    Thinking,
    Text,
    ToolUse,
}

impl MessageEvents {
    pub(crate) fn new(form: MessageBuilder) -> Self {
        MessageEvents {
            form,
            open: None,
            index: 0,
            called: None,
            arguments: String::new(),
            waiting: Vec::new(),
            held: 0,
            out: Vec::new(),
        }
    }

    /// The message says or thinks more.
    fn say(&mut self, kind: BlockKind, said: &str) -> Result<(), StreamFault> {
        if self.open == Some(BlockKind::ToolUse) {
            self.hold(said.len())?;
            match self.waiting.last_mut().filter(|(last, _)| *last == kind) {
                Some((_, text)) => text.push_str(said),
                None => {
                    self.hold(WAITING_ENTRY_BYTES)?;
                    self.waiting.push((kind, said.to_owned()));
                }
            }
            return Ok(());
        }
        self.tell(kind, said);
        Ok(())
    }

    fn tell(&mut self, kind: BlockKind, said: &str) {
        if self.open != Some(kind) {
            self.close();
            let block = if kind == BlockKind::Thinking { blocks::thinking("") } else { blocks::text("") };
            self.start(kind, block);
        }
        self.grow(if kind == BlockKind::Thinking {
            json!({"type": "thinking_delta", "thinking": said})
        } else {
            json!({"type": "text_delta", "text": said})
        });
    }

    fn call(&mut self, call: &Value) -> Result<(), StreamFault> {
        let index = call["index"].as_u64().unwrap_or(0);
        match self.called {
            Some(called) if called == index => {}
            // What is done cannot grow any more.
            Some(called) if called > index => return Err(StreamFault::UNREADABLE),
            _ => {
                self.finish_call();
                self.close();
                self.held -= self.arguments.len();
                self.arguments.clear();
                self.called = Some(index);
                let block = self.form.tool_use(call, self.index, json!({}));
                self.start(BlockKind::ToolUse, block);
            }
        }
        let arguments = match &call["function"]["arguments"] {
            Value::String(text) => text.clone(),
            object @ Value::Object(_) => object.to_string(),
            _ => return Ok(()),
        };
        if arguments.is_empty() {
            return Ok(());
        }
        self.hold(arguments.len())?;
        self.arguments.push_str(&arguments);
        self.grow(json!({"type": "input_json_delta", "partial_json": arguments}));
        Ok(())
    }

    /// Ends the open call, and tells what has waited for that.
    fn finish_call(&mut self) {
        if self.open != Some(BlockKind::ToolUse) {
            return;
        }
        self.close();
        for (kind, said) in std::mem::take(&mut self.waiting) {
            self.held -= said.len() + WAITING_ENTRY_BYTES;
            self.tell(kind, &said);
        }
    }

    fn hold(&mut self, bytes: usize) -> Result<(), StreamFault> {
        self.held += bytes;
        if self.held > MAX_WHOLE_ANSWER_BYTES { Err(StreamFault::TOO_LONG) } else { Ok(()) }
    }

    fn start(&mut self, kind: BlockKind, block: Value) {
        self.open = Some(kind);
        self.emit(json!({"type": "content_block_start", "content_block": block, "index": self.index}));
    }

    fn grow(&mut self, delta: Value) {
        self.emit(json!({"type": "content_block_delta", "delta": delta, "index": self.index}));
    }

    fn close(&mut self) {
        let Some(kind) = self.open.take() else { return };
        if kind == BlockKind::Thinking {
            let signature = self.form.signature();
            self.grow(json!({"type": "signature_delta", "signature": signature}));
        }
        self.emit(json!({"type": "content_block_stop", "index": self.index}));
        self.index += 1;
    }

    fn emit(&mut self, event: Value) {
        let name = event["type"].as_str().unwrap_or_default();
        self.out.extend_from_slice(format!("event: {name}\ndata: {event}\n\n").as_bytes());
    }

    /// The tokens stand on the last event that says something of the message as a whole.
    fn message_delta(&mut self, end: ChatEnd, tools: ToolUse) {
        let (reason, sequence) = blocks::stop_reason(&end, tools);
        let mut delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        if self.form.asker.token_ids {
            let tokens: AnswerTokens = end.tokens;
            tokens.put_on(&mut delta);
        }
        self.emit(json!({"type": "message_delta", "delta": delta, "usage": blocks::usage(&end.usage)}));
    }
}

impl ChatEvents for MessageEvents {
    fn begin(&mut self, chunk: &Value) {
        let mut message = self.form.message(chunk, Vec::new());
        message["stop_reason"] = Value::Null;
        message["stop_sequence"] = Value::Null;
        message["usage"] = blocks::usage(&chunk["usage"]);
        self.emit(json!({"type": "message_start", "message": message}));
    }

    fn delta(&mut self, choice: &Value) -> Result<(), StreamFault> {
        let delta = &choice["delta"];
        if let Some(thought) = text(delta, &REASONING_FIELDS) {
            self.say(BlockKind::Thinking, thought)?;
        }
        if let Some(said) = text(delta, &["content", "refusal"]) {
            self.say(BlockKind::Text, said)?;
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            self.call(call)?;
        }
        Ok(())
    }

    fn end(&mut self, end: ChatEnd) {
        let is_any = self.called.is_some();
        self.finish_call();
        if self.index == 0 && self.open.is_none() {
            // As a whole answer has it: there are clients that read the first block.
            self.start(BlockKind::Text, blocks::text(""));
        }
        self.close();
        let arguments = self.arguments.trim();
        let is_json = || serde_json::from_str::<IgnoredAny>(arguments).is_ok();
        let is_complete = is_any && (arguments.is_empty() || arguments.starts_with('{') && is_json());
        self.message_delta(end, ToolUse { is_any, is_complete });
        self.emit(json!({"type": "message_stop"}));
    }

    fn error(&mut self, error: Value) {
        let event = error_form(&error);
        self.emit(event);
    }

    fn fault(&mut self, message: &str, status: u16) {
        let events = error_events(ErrorEventForm::Messages, message, status, false);
        self.out.extend_from_slice(events.as_bytes());
    }

    fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }
}
