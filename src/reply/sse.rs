//! Tracks the progress of a stream of events: its first event, and the number of complete events.
//!
//! A line that begins with a colon is a comment. vLLM sends comments to keep a connection open before the
//! first token, so they are not progress of the request. An event counts from its first complete `data` line
//! on, since the client can act on it then.
//!
//! The state is a few flags and the first bytes of one line.

use super::FirstContent;
use crate::json::skip_space;
use crate::sse::{LineSplitter, SseField, SseLine, SsePiece};

/// The bytes of a line that suffice to recognise its field, and an error by the beginning of its data.
const MAX_HEAD_BYTES: usize = 64;

/// Tracks one stream of events.
#[derive(Clone, Debug)]
pub struct EventTracker {
    lines: LineSplitter,
    /// The meaning of the line in progress, when the line is longer than its head.
    long: LineSign,
    /// The event in progress has data.
    has_data: bool,
    /// The event in progress is called `error`.
    is_error: bool,
    first: Option<FirstContent>,
    whole: u64,
}

/// The meaning of a line for the event in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LineSign {
    Nothing,
    End,
    Name { is_error: bool },
    Data { is_error: bool },
}

impl Default for EventTracker {
    fn default() -> Self {
        EventTracker::new()
    }
}

impl EventTracker {
    pub fn new() -> Self {
        EventTracker {
            lines: LineSplitter::new(MAX_HEAD_BYTES),
            long: LineSign::Nothing,
            has_data: false,
            is_error: false,
            first: None,
            whole: 0,
        }
    }

    /// The first event, as soon as its first `data` line has ended.
    pub fn first(&self) -> Option<FirstContent> {
        self.first
    }

    /// The number of events that have ended with their empty line.
    pub fn whole(&self) -> u64 {
        self.whole
    }

    /// Whether the stream is between two events, where it can be cut or an event of our own be inserted.
    pub fn between_events(&self) -> bool {
        self.lines.is_between_lines() && !self.has_data && !self.is_error
    }

    /// Reads the next chunk.
    pub fn feed(&mut self, chunk: &[u8]) {
        let mut rest = chunk;
        while let Some(piece) = self.lines.next(&mut rest) {
            let sign = match piece {
                SsePiece::LineFeed => continue,
                SsePiece::Line(line) => LineSign::of(&line),
                SsePiece::Long { part, begins, ends } => {
                    if begins {
                        self.long = LineSign::of(&part);
                    }
                    if !ends {
                        continue;
                    }
                    self.long
                }
            };
            match sign {
                LineSign::Nothing => {}
                LineSign::End => {
                    self.whole += u64::from(self.has_data);
                    self.has_data = false;
                    self.is_error = false;
                }
                LineSign::Name { is_error } => self.is_error = is_error,
                LineSign::Data { is_error } => {
                    self.has_data = true;
                    let is_error = self.is_error || is_error;
                    self.first.get_or_insert(if is_error {
                        FirstContent::Error
                    } else {
                        FirstContent::Event
                    });
                }
            }
        }
    }
}

impl LineSign {
    /// Recognises a line by its beginning.
    fn of(line: &SseLine<'_>) -> Self {
        match line.field() {
            SseField::Empty => LineSign::End,
            SseField::Comment | SseField::Other => LineSign::Nothing,
            SseField::Event(name) => LineSign::Name { is_error: name == b"error" },
            SseField::Data(data) => {
                // Only the head of the line, so that the result does not depend on the chunks.
                let kept = MAX_HEAD_BYTES.saturating_sub(line.text().len() - data.len());
                LineSign::Data { is_error: is_error(&data[..data.len().min(kept)]) }
            }
        }
    }
}

/// Whether data begins like vLLM's errors, `{"error":`, or like Anthropic's, `{"type":"error"`.
pub fn is_error(data: &[u8]) -> bool {
    let mut rest = data;
    let mut next = |token: &[u8]| {
        rest = &rest[skip_space(rest, 0)..];
        let found = rest.strip_prefix(token);
        rest = found.unwrap_or(rest);
        found.is_some()
    };
    if !next(b"{") {
        return false;
    }
    if next(b"\"error\"") {
        // A chunk of an answer may carry `"error":null`.
        return next(b":") && !next(b"null");
    }
    next(b"\"type\"") && next(b":") && next(b"\"error\"")
}

#[cfg(test)]
mod tests;
