//! Assembles a record from the bytes of a request and of its answer.
//!
//! ```text
//! AnswerAssembler: stream  -> sse::LineSplitter -> chunks (chat, completions) | responses | messages
//!                  tokens that the relay has read -> chunks
//!                  whole   -> document
//! read_request + AssembledAnswer + CallFacts -> record() -> TraceRecord
//! ```
//!
//! A message of a chat has the members of the engine's own without its nulls, and always `role` and
//! `content`; a stream's message equals that of the same answer as a whole.
//!
//! Never: I/O, a clock, a panic on invalid bytes, a copy of a whole stream, more than [`MAX_ANSWER_BYTES`] of
//! one answer.

mod answer;
mod answer_buffer;
mod chunks;
mod document;
mod ids;
mod merge;
mod messages;
mod request;
mod responses;
mod wire;

pub use answer::AssembledAnswer;
pub use answer_buffer::AnswerBuffer;
pub use ids::KnownPrompt;
pub use request::{RequestParts, read_request, record};

use answer::AnswerParts;
use answer_buffer::AnswerSection;
use chunks::ChunkStream;
use messages::MessageStream;
use responses::ResponseStream;

use super::record::{CutDocument, TraceApi, TraceError};
use crate::reply::token_event::TokenEvent;
use crate::sse::{LineSplitter, SseField, SsePiece, count_work};

/// The largest number of held bytes of one answer.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;

/// The largest buffer of an event that is kept for the next one.
const MAX_KEPT_EVENT_BYTES: usize = 64 << 10;

/// Reads one answer as it arrives and keeps the parts that a record needs.
#[derive(Debug)]
pub struct AnswerAssembler {
    api: TraceApi,
    status: u16,
    /// The most bytes that are held.
    most: usize,
    source: AnswerSource,
    is_overflown: bool,
}

#[derive(Debug)]
enum AnswerSource {
    Whole(Vec<u8>),
    Stream(Box<StreamReader>),
}

/// A stream of events, and its parts so far.
#[derive(Debug)]
struct StreamReader {
    lines: LineSplitter,
    events: StreamEvents,
    /// The most bytes that are held.
    most: usize,
}

/// The events of a stream.
#[derive(Debug)]
struct StreamEvents {
    /// The data of the event in progress.
    data: Vec<u8>,
    /// Whether the event in progress is named `error`.
    is_error: bool,
    has_error: bool,
    state: StreamState,
    /// The approximate memory of `state`.
    held: usize,
}

#[derive(Debug)]
enum StreamState {
    Chunks(ChunkStream),
    Responses(ResponseStream),
    Messages(MessageStream),
}

// === impl AnswerAssembler ===

impl AnswerAssembler {
    /// Creates the assembler of an answer. `stream`: its content type is `text/event-stream`.
    pub fn new(api: TraceApi, stream: bool, status: u16) -> Self {
        Self::bounded(api, stream, status, MAX_ANSWER_BYTES)
    }

    fn bounded(api: TraceApi, stream: bool, status: u16, most: usize) -> Self {
        let source = if stream {
            AnswerSource::Stream(Box::new(StreamReader::new(api, most)))
        } else {
            AnswerSource::Whole(Vec::new())
        };
        AnswerAssembler { api, status, most, source, is_overflown: false }
    }

    /// Reads the next part of the answer.
    pub fn read(&mut self, part: &AnswerBuffer) {
        for section in part.sections() {
            match section {
                AnswerSection::Bytes(piece) => self.feed(piece),
                AnswerSection::Token(token) => self.token(&token),
            }
        }
    }

    /// Reads a token. The event of the token came between two events of the stream.
    fn token(&mut self, token: &TokenEvent<'_>) {
        if let AnswerSource::Stream(reader) = &mut self.source
            && !self.is_overflown
        {
            self.is_overflown = !reader.token(token);
        }
    }

    /// Reads the next piece of the body, which may be cut anywhere.
    pub fn feed(&mut self, piece: &[u8]) {
        if self.is_overflown {
            return;
        }
        match &mut self.source {
            AnswerSource::Stream(reader) => self.is_overflown = !reader.feed(piece),
            AnswerSource::Whole(body) if body.len() + piece.len() <= self.most => {
                count_work(piece.len());
                body.extend_from_slice(piece);
            }
            AnswerSource::Whole(body) => {
                self.is_overflown = true;
                *body = Vec::new();
            }
        }
    }

    /// The approximate memory held.
    pub fn bytes(&self) -> usize {
        match &self.source {
            AnswerSource::Whole(body) => body.capacity(),
            AnswerSource::Stream(reader) => reader.bytes(),
        }
    }

    /// The assembled answer, at its end or where it broke off.
    pub fn finish(self) -> AssembledAnswer {
        self.finish_after(&mut KnownPrompt::default())
    }

    /// As `finish`. `known`: the prompt of the previous turn, which is replaced by that of this turn.
    pub fn finish_after(self, known: &mut KnownPrompt) -> AssembledAnswer {
        let is_failure = self.status >= 400;
        let (mut parts, response) = match self.source {
            AnswerSource::Stream(reader) => (reader.finish(), None),
            AnswerSource::Whole(_) if self.is_overflown => (AnswerParts::default(), None),
            AnswerSource::Whole(body) => document::read_document(self.api, is_failure, &body, known),
        };
        if is_failure {
            parts.choices.clear();
            parts.is_complete |= !self.is_overflown;
        }
        let error = if parts.has_error && !is_failure {
            Some(TraceError::UpstreamError)
        } else if self.is_overflown {
            Some(TraceError::Overflow)
        } else {
            (!parts.is_complete).then_some(TraceError::Incomplete)
        };
        AssembledAnswer {
            model: parts.model,
            choices: parts.choices,
            prompt_token_ids: parts.prompt_token_ids,
            tokens: parts.tokens,
            weight_version: parts.weight_version,
            response,
            error,
            partial: error.is_some() || parts.is_damaged,
            is_complete: parts.is_complete,
        }
    }
}

// === impl StreamReader ===

impl StreamReader {
    fn new(api: TraceApi, most: usize) -> Self {
        let state = match api {
            TraceApi::Chat | TraceApi::Completions => StreamState::Chunks(ChunkStream::new(api)),
            TraceApi::Responses => StreamState::Responses(ResponseStream::default()),
            TraceApi::Messages => StreamState::Messages(MessageStream::default()),
        };
        let events = StreamEvents { data: Vec::new(), is_error: false, has_error: false, state, held: 0 };
        StreamReader { lines: LineSplitter::new(most), events, most }
    }

    /// Reads a piece. `false`: the limit of held bytes is reached, and later pieces are ignored.
    fn feed(&mut self, piece: &[u8]) -> bool {
        let mut rest = piece;
        let mut fits = true;
        while fits && let Some(piece) = self.lines.next(&mut rest) {
            match piece {
                SsePiece::Line(line) => {
                    self.events.line(line.field());
                    fits = self.events.bytes() <= self.most;
                }
                SsePiece::Long { .. } => fits = false,
                SsePiece::LineFeed => {}
            }
        }
        (fits && self.bytes() <= self.most) || self.give_up()
    }

    /// As `feed`, of a token.
    fn token(&mut self, token: &TokenEvent<'_>) -> bool {
        // The relay reads tokens in streams of chats only.
        if let StreamState::Chunks(chunks) = &mut self.events.state {
            self.events.held += chunks.token(token);
        }
        self.bytes() <= self.most || self.give_up()
    }

    fn give_up(&mut self) -> bool {
        self.lines = LineSplitter::new(0);
        self.events.data = Vec::new();
        false
    }

    fn bytes(&self) -> usize {
        self.lines.held_bytes() + self.events.bytes()
    }

    fn finish(mut self) -> AnswerParts {
        if let Some(line) = self.lines.finish() {
            // A line without an end may be complete; an incomplete one is ignored.
            let is_whole = |data: &[u8]| {
                data == b"[DONE]" || serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok()
            };
            if matches!(line.field(), SseField::Data(data) if is_whole(data)) {
                self.events.line(line.field());
            }
        }
        self.events.finish()
    }
}

// === impl StreamEvents ===

impl StreamEvents {
    fn line(&mut self, field: SseField<'_>) {
        match field {
            SseField::Empty => self.dispatch(),
            SseField::Event(name) => self.is_error = name == b"error",
            SseField::Data(data) => {
                count_work(data.len());
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(data);
            }
            SseField::Comment | SseField::Other => {}
        }
    }

    fn dispatch(&mut self) {
        let is_error = std::mem::take(&mut self.is_error);
        if self.data.is_empty() {
            return;
        }
        self.has_error |= is_error;
        count_work(self.data.len());
        self.held += match &mut self.state {
            StreamState::Chunks(chunks) => chunks.event(&mut self.data),
            StreamState::Responses(responses) => responses.event(&wire::readable(&self.data)),
            StreamState::Messages(messages) => messages.event(&wire::readable(&self.data)),
        };
        self.data.clear();
        if self.data.capacity() > MAX_KEPT_EVENT_BYTES {
            self.data = Vec::new();
        }
    }

    fn bytes(&self) -> usize {
        self.data.capacity() + self.held
    }

    fn finish(mut self) -> AnswerParts {
        self.dispatch();
        let mut parts = match self.state {
            StreamState::Chunks(chunks) => chunks.finish(),
            StreamState::Responses(responses) => responses.finish(),
            StreamState::Messages(messages) => messages.finish(),
        };
        parts.has_error |= self.has_error;
        parts
    }
}

/// The document of an upstream's error. `None`: the body is not a JSON object.
pub fn read_error(api: TraceApi, body: &[u8]) -> Option<CutDocument> {
    document::read_document(api, true, body, &mut KnownPrompt::default()).1
}

#[cfg(test)]
mod tests;
