//! A chat's stream, read chunk by chunk as it goes by, for the events that another API has for it.
//!
//! The first chunk begins the answer, `[DONE]` ends it: by then the usage is known. An error, an end without
//! `[DONE]`, or a chunk that cannot be read, ends the stream with an error, never as if it were complete.
//!
//! What is held is one line, and what the writer of the events holds.
//!
//! Never: wait for a chunk that is not needed, go on behind an end.

use std::fmt::Debug;

use serde_json::{Value, json};

use super::answer::has_text;
use super::tokens::AnswerTokens;
use crate::route::answer::{MAX_EVENT_BYTES, ModelRename};
use crate::route::token_ids::MissingTokens;
use crate::sse::{LineSplitter, SseField, SseLine, SsePiece};

/// Writes the events of one API for what the chunks of a chat say.
pub(super) trait ChatEvents: Debug {
    /// The first chunk has come.
    fn begin(&mut self, chunk: &Value);
    /// The first choice says more.
    fn delta(&mut self, choice: &Value) -> Result<(), StreamFault>;
    /// The chat is complete.
    fn end(&mut self, end: ChatEnd);
    /// The last event: the engine's error, as vLLM writes it.
    fn error(&mut self, error: Value);
    /// The last event: an error of the balancer's own.
    fn fault(&mut self, message: &str, status: u16);
    /// The events so far.
    fn out(&mut self) -> &mut Vec<u8>;
}

/// How a chat ended, and what it took.
#[derive(Debug, Default)]
pub(super) struct ChatEnd {
    pub finish_reason: String,
    /// The stop string that ended it, or what else the engine has there.
    pub stop_reason: Value,
    /// Null where the engine reported none.
    pub usage: Value,
    /// Empty unless the route requests them.
    pub tokens: AnswerTokens,
}

/// Why a stream cannot go on.
#[derive(Debug)]
pub(super) struct StreamFault(&'static str);

impl StreamFault {
    /// The stream ended before the answer was whole.
    pub(super) const ENDED: StreamFault = StreamFault("The upstream ended before the answer was whole.");
    /// An event of the stream is not a chunk of a chat.
    pub(super) const UNREADABLE: StreamFault = StreamFault("The upstream's stream cannot be read as a chat.");
    /// The answer exceeds the limit for translation.
    pub(super) const TOO_LONG: StreamFault =
        StreamFault("The upstream's answer is too long to be translated.");
}

/// Translates the stream of a chat into events of another interface.
#[derive(Debug)]
pub(super) struct ChatStreamTranslator<E> {
    lines: LineSplitter,
    chat: ChatStream<E>,
}

/// The chat as far as it has come.
#[derive(Debug)]
struct ChatStream<E> {
    events: E,
    names: Option<ModelRename>,
    token_ids: bool,
    has_begun: bool,
    has_finished: bool,
    end: ChatEnd,
    over: bool,
    /// It ended as no chat does.
    broken: bool,
}

impl<E: ChatEvents> ChatStreamTranslator<E> {
    /// `token_ids`: a stream without the token ids that its route requests ends with an error.
    pub(super) fn new(events: E, names: Option<ModelRename>, token_ids: bool) -> Self {
        let end = ChatEnd::default();
        let (has_begun, has_finished, over, broken) = (false, false, false, false);
        let chat = ChatStream { events, names, token_ids, has_begun, has_finished, end, over, broken };
        ChatStreamTranslator { lines: LineSplitter::new(MAX_EVENT_BYTES), chat }
    }

    /// Takes the next piece, and gives the events that it makes; the last of them says what is broken.
    pub(super) fn feed(&mut self, piece: &[u8], end: bool) -> Vec<u8> {
        if let Err(StreamFault(why)) = self.pieces(piece, end) {
            self.chat.fault(why, 502);
            self.chat.broken = true;
        }
        std::mem::take(self.chat.events.out())
    }

    pub(super) fn is_broken(&self) -> bool {
        self.chat.broken
    }

    fn pieces(&mut self, piece: &[u8], end: bool) -> Result<(), StreamFault> {
        let ChatStreamTranslator { lines, chat } = self;
        let mut rest = piece;
        while !chat.over
            && let Some(piece) = lines.next(&mut rest)
        {
            match piece {
                SsePiece::Line(line) => chat.line(&line)?,
                SsePiece::Long { .. } => return Err(StreamFault::TOO_LONG),
                SsePiece::LineFeed => {}
            }
        }
        if chat.over || !end {
            return Ok(());
        }
        if let Some(line) = lines.finish() {
            chat.line(&line)?;
        }
        if chat.over { Ok(()) } else { Err(StreamFault::ENDED) }
    }
}

impl<E: ChatEvents> ChatStream<E> {
    fn line(&mut self, line: &SseLine<'_>) -> Result<(), StreamFault> {
        match line.field() {
            SseField::Comment => {
                // A keep-alive for the client and for proxies in front of it.
                let out = self.events.out();
                out.extend_from_slice(line.text());
                out.extend_from_slice(b"\n\n");
                Ok(())
            }
            SseField::Data(data) => match data.trim_ascii() {
                b"" => Ok(()),
                b"[DONE]" => self.done(),
                data => self.chunk(data),
            },
            SseField::Empty | SseField::Event(_) | SseField::Other => Ok(()),
        }
    }

    fn chunk(&mut self, data: &[u8]) -> Result<(), StreamFault> {
        let mut chunk: Value = serde_json::from_slice(data).map_err(|_| StreamFault::UNREADABLE)?;
        if !chunk.is_object() {
            return Err(StreamFault::UNREADABLE);
        }
        // Before 0.10.1 the error was all there was.
        if !chunk["error"].is_null() || chunk["object"] == "error" {
            self.failed(data);
            return Ok(());
        }
        if !self.has_begun {
            self.has_begun = true;
            self.events.begin(&chunk);
        }
        if chunk["usage"].is_object() {
            self.end.usage = chunk["usage"].take();
        }
        let choices = chunk["choices"].as_array_mut();
        let mut first = choices.into_iter().flatten().filter(|choice| choice.is_object());
        // There is one; a route that asks for several gets the first.
        let Some(choice) = first.find(|choice| choice["index"].as_u64().unwrap_or(0) == 0) else {
            return Ok(());
        };
        let mut choice = choice.take();
        if self.token_ids {
            self.end.tokens.collect(&mut chunk, &mut choice);
            if let Some(missing) = self.end.tokens.missing(has_text(&choice["delta"])) {
                self.fault(&missing.message(), MissingTokens::REJECT_STATUS);
                return Ok(());
            }
        }
        self.events.delta(&choice)?;
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.has_finished = true;
            self.end.finish_reason = reason.to_owned();
            self.end.stop_reason = choice["stop_reason"].take();
        }
        Ok(())
    }

    fn done(&mut self) -> Result<(), StreamFault> {
        if !self.has_finished {
            return Err(StreamFault::ENDED);
        }
        self.events.end(std::mem::take(&mut self.end));
        self.over = true;
        Ok(())
    }

    /// The engine's own error is the last that is told.
    fn failed(&mut self, data: &[u8]) {
        let data = self.names.as_ref().map_or_else(|| data.to_vec(), |names| names.document(data));
        let chunk: Value = serde_json::from_slice(&data).unwrap_or_default();
        self.events.error(error_in(chunk));
        self.over = true;
    }

    fn fault(&mut self, message: &str, status: u16) {
        self.events.fault(message, status);
        self.over = true;
    }
}

/// The error that a document has, as vLLM writes it. Before 0.10.1 it was the whole document.
pub(super) fn error_in(mut document: Value) -> Value {
    match document.get_mut("error").map(Value::take) {
        Some(error @ Value::Object(_)) => error,
        Some(Value::String(message)) => json!({ "message": message }),
        _ => document,
    }
}
