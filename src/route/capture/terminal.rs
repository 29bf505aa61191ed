//! Finds the event after which a stream has no more content.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::route::dialect::BodyDialect;
use crate::sse::{LineSplitter, SseField, SseLine, SsePiece};

/// The data that ends a stream of chat or completions.
pub(super) const DONE: &[u8] = b"[DONE]";

/// The longest line that is looked at: names of events and short data. Longer ones are passed over.
const MAX_WATCHED_LINE_BYTES: usize = 64;

static DONE_FINDER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(DONE));
static MESSAGE_STOP: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("message_stop"));

/// Watches one stream, of which nothing is changed.
///
/// Terminal are `data: [DONE]` for chat and completions, the event `message_stop` for messages, and the
/// events `response.completed`, `response.incomplete` and `response.failed` for responses. An event counts as
/// soon as its line of data is whole.
#[derive(Debug)]
pub(super) struct TerminalWatch {
    lines: LineSplitter,
    dialect: BodyDialect,
    event: CurrentEvent,
}

/// What the lines of an event have said so far. Servers write its name before its data.
#[derive(Clone, Copy, Debug, Default)]
struct CurrentEvent {
    has_terminal_name: bool,
    /// In a line of data that is passed over.
    is_in_data: bool,
}

impl TerminalWatch {
    pub(super) fn new(dialect: BodyDialect) -> Self {
        TerminalWatch {
            lines: LineSplitter::new(MAX_WATCHED_LINE_BYTES),
            dialect,
            event: CurrentEvent::default(),
        }
    }

    /// Reads the next piece. Whether the terminal event is in it.
    pub(super) fn feed(&mut self, piece: &[u8], end: bool) -> bool {
        if !self.event.has_terminal_name && self.lines.are_whole_in(piece) && self.has_no_terminal(piece) {
            self.lines.skip(piece);
            return false;
        }
        let (mut rest, mut is_terminal) = (piece, false);
        while let Some(piece) = self.lines.next(&mut rest) {
            is_terminal |= self.event.take(&piece, self.dialect);
        }
        // Data of a named event that has no line end may have been cut off.
        if let Some(line) = end.then(|| self.lines.finish()).flatten()
            && let SseField::Data(data) = line.field()
        {
            is_terminal |= is_done(data, self.dialect);
        }
        is_terminal
    }

    /// Whether a search finds nothing of a terminal event in whole lines. It may be in other dialects.
    fn has_no_terminal(&self, piece: &[u8]) -> bool {
        match self.dialect {
            BodyDialect::Chat | BodyDialect::Completions => DONE_FINDER.find(piece).is_none(),
            BodyDialect::Messages => MESSAGE_STOP.find(piece).is_none(),
            BodyDialect::Responses | BodyDialect::Other => false,
        }
    }
}

impl CurrentEvent {
    /// Whether the event is terminal, as far as it was read.
    fn take(&mut self, piece: &SsePiece<'_>, dialect: BodyDialect) -> bool {
        match piece {
            SsePiece::Line(line) => self.line(line, dialect),
            SsePiece::LineFeed => false,
            SsePiece::Long { part, begins, ends } => {
                if *begins {
                    self.is_in_data = part.data().is_some();
                }
                *ends && std::mem::take(&mut self.is_in_data) && self.data(b"", dialect)
            }
        }
    }

    fn line(&mut self, line: &SseLine<'_>, dialect: BodyDialect) -> bool {
        match line.field() {
            SseField::Data(data) => self.data(data, dialect),
            SseField::Event(name) => {
                self.has_terminal_name = is_terminal_name(name, dialect);
                false
            }
            SseField::Empty => {
                *self = CurrentEvent::default();
                false
            }
            SseField::Comment | SseField::Other => false,
        }
    }

    fn data(&self, data: &[u8], dialect: BodyDialect) -> bool {
        self.has_terminal_name || is_done(data, dialect)
    }
}

/// Whether the data of an event ends a stream of this dialect.
pub(super) fn is_done(data: &[u8], dialect: BodyDialect) -> bool {
    matches!(dialect, BodyDialect::Chat | BodyDialect::Completions) && data.trim_ascii() == DONE
}

fn is_terminal_name(name: &[u8], dialect: BodyDialect) -> bool {
    match dialect {
        BodyDialect::Messages => name == b"message_stop",
        BodyDialect::Responses => {
            matches!(name, b"response.completed" | b"response.incomplete" | b"response.failed")
        }
        _ => false,
    }
}
