//! Puts the fields of an answer that only its capture requested back to null, and finds its end.
//!
//! vLLM writes null for `logprobs`, `token_ids` and `prompt_token_ids` that are not requested, in place, so
//! that the answer is the one without capture once the values are null again; every other byte stays. Of a
//! stream it does one more thing: tokens without text, as a tool call begins with, are an event only if
//! their ids or log-probabilities are requested. Such an event is removed, with the empty line behind it.
//!
//! A stream is edited line by line: a line of `data` is held until it is whole. Other JSON is held until it
//! is whole; it becomes shorter, so that a `content-length` must not go with it. An event above
//! [`MAX_EVENT_BYTES`] and an answer above [`MAX_WHOLE_ANSWER_BYTES`] go on unchanged, requested fields
//! included. A refusal (4xx) has none of the fields, and goes on unchanged too; a failure (5xx) may have
//! choices. Where the data of an event stands on several lines, the event is held until its end.
//!
//! If nothing was requested, a stream is only searched for its terminal event, and never held.
//!
//! Most events of a chat's stream have one token in the form of engines. [`AnswerCleanup::take_tokens`] reads
//! them once, for the client and for the trace; what it leaves goes to [`AnswerCleanup::feed`].
//!
//! Never: fail, change a field that the client requested, copy a piece in which nothing changes.

use std::ops::Range;

use super::document::{ClearedDocument, NULL, clear_fields};
use super::terminal::{TerminalWatch, is_done};
use crate::json;
use crate::reply::token_event::{TokenEvent, read_token_event};
use crate::route::answer::{MAX_EVENT_BYTES, MAX_WHOLE_ANSWER_BYTES};
use crate::route::dialect::BodyDialect;
use crate::route::rewrite::AddedAnswerFields;
use crate::sse::{LineSplitter, RepeatedHead, SseLine, SsePiece, count_work};

/// The end of an event's data, and of the event, as engines write them.
const EVENT_END: &[u8] = b"\n\n";

/// The most bytes for which there is room before they come.
const MAX_EXPECTED_BYTES: usize = 64 << 10;

/// The cleanup of one answer. See the module.
#[derive(Debug)]
pub struct AnswerCleanup {
    mode: CleanupMode,
    /// The end of the content was reported.
    is_complete: bool,
}

/// What became of a piece of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CleanedPiece {
    /// What goes on was appended to the output: other bytes than the piece, or none yet. Otherwise the piece
    /// goes on as it is.
    pub is_changed: bool,
    /// The content of the answer ends in this piece. True once.
    pub ends: bool,
}

#[derive(Debug)]
enum CleanupMode {
    Events(EventCleanup),
    Watched(TerminalWatch),
    Whole {
        fields: AddedAnswerFields,
        held: Vec<u8>,
        /// The bytes that are still to come, as far as that is known.
        expected: usize,
    },
    /// It ends where it ends.
    Unread,
}

/// A stream of chat or completions.
#[derive(Debug)]
struct EventCleanup {
    lines: LineSplitter,
    state: EventCleanupState,
    /// The stream has ended an event with its last byte.
    is_between_events: bool,
}

#[derive(Debug)]
struct EventCleanupState {
    dialect: BodyDialect,
    fields: AddedAnswerFields,
    /// What the events begin with.
    head: RepeatedHead,
    last: LastEventLine,
    is_terminal: bool,
    /// The event whose first line of data is no whole document.
    split: Option<SplitEvent>,
}

/// Lines of data that are one document together.
#[derive(Debug)]
struct SplitEvent {
    /// As they came.
    raw: Vec<u8>,
    /// The document, with a line feed where a line ended.
    data: Vec<u8>,
    /// What stands before the data of the first line.
    lead: Vec<u8>,
    /// The lines between them that are no data.
    others: Vec<u8>,
}

/// What became of the last line: a line end that was cut in two goes the same way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LastEventLine {
    #[default]
    Stays,
    /// An event was removed; the empty line behind it goes too.
    EventRemoved,
    /// The empty line was removed.
    EndRemoved,
}

// === impl AnswerCleanup ===

impl AnswerCleanup {
    /// Of an answer to a request in this dialect, to which these fields were added. The answer is not
    /// compressed.
    pub fn new(
        dialect: BodyDialect,
        fields: AddedAnswerFields,
        status: u16,
        content_type: Option<&str>,
    ) -> Self {
        let kind = content_type.unwrap_or_default().trim_start().to_ascii_lowercase();
        let is_requested = fields != AddedAnswerFields::default();
        let mode = if kind.starts_with("text/event-stream") {
            if is_requested && (200..300).contains(&status) {
                CleanupMode::Events(EventCleanup::new(dialect, fields))
            } else {
                CleanupMode::Watched(TerminalWatch::new(dialect))
            }
        } else if is_requested && matches!(status, 200..300 | 500..) && kind.starts_with("application/json") {
            CleanupMode::Whole { fields, held: Vec::new(), expected: 0 }
        } else {
            CleanupMode::Unread
        };
        AnswerCleanup { mode, is_complete: false }
    }

    /// The answer states that it has so many bytes.
    pub fn expect(&mut self, length: u64) {
        if let CleanupMode::Whole { expected, .. } = &mut self.mode {
            *expected = usize::try_from(length).unwrap_or(usize::MAX).min(MAX_EXPECTED_BYTES);
        }
    }

    /// Whether the answer is as long as it was. Otherwise its length is not known before its end.
    pub fn keeps_length(&self) -> bool {
        matches!(self.mode, CleanupMode::Watched(_) | CleanupMode::Unread)
    }

    /// Whether the end of the content was in one of the pieces.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Passes on what is held back, and all else as it is: there is no memory to hold it.
    pub fn give_up(&mut self, out: &mut Vec<u8>) {
        match &mut self.mode {
            CleanupMode::Whole { held, .. } => {
                out.append(held);
                self.mode = CleanupMode::Unread;
            }
            CleanupMode::Events(events) => events.state.give_up(out),
            CleanupMode::Watched(_) | CleanupMode::Unread => {}
        }
    }

    /// The bytes that are held back.
    pub fn held_bytes(&self) -> usize {
        match &self.mode {
            CleanupMode::Events(events) => events.lines.held_bytes() + events.state.held_bytes(),
            CleanupMode::Whole { held, .. } => held.len(),
            CleanupMode::Watched(_) | CleanupMode::Unread => 0,
        }
    }

    /// Takes the events of one token at the front of a piece, and appends to `out` what goes on in their
    /// place. Returns the number of their bytes. The rest of the piece is fed next.
    pub fn take_tokens(
        &mut self,
        piece: &[u8],
        out: &mut Vec<u8>,
        mut take: impl FnMut(&TokenEvent<'_>),
    ) -> usize {
        let CleanupMode::Events(events) = &mut self.mode else { return 0 };
        let mut taken = 0;
        while let Some((token, bytes)) = events.token(&piece[taken..], out) {
            take(&token);
            taken += bytes;
        }
        taken
    }

    /// Takes the next piece, and appends to `out` what goes on in its place; `end`: it is the last.
    pub fn feed(&mut self, piece: &[u8], end: bool, out: &mut Vec<u8>) -> CleanedPiece {
        let (is_changed, is_end) = match &mut self.mode {
            CleanupMode::Events(events) => events.feed(piece, end, out),
            CleanupMode::Watched(watch) => (false, watch.feed(piece, end)),
            CleanupMode::Unread => (false, end),
            CleanupMode::Whole { fields, held, .. } if end => (clean_whole(*fields, held, piece, out), true),
            CleanupMode::Whole { held, .. } if held.len() + piece.len() > MAX_WHOLE_ANSWER_BYTES => {
                out.append(held);
                out.extend_from_slice(piece);
                self.mode = CleanupMode::Unread;
                (true, false)
            }
            CleanupMode::Whole { held, expected, .. } => {
                held.reserve_exact(std::mem::take(expected));
                held.extend_from_slice(piece);
                (true, false)
            }
        };
        let ends = is_end && !self.is_complete;
        self.is_complete |= is_end;
        CleanedPiece { is_changed, ends }
    }
}

/// The last piece of JSON of which the rest is held. Whether something was written.
fn clean_whole(fields: AddedAnswerFields, held: &mut Vec<u8>, piece: &[u8], out: &mut Vec<u8>) -> bool {
    let is_alone = held.is_empty();
    let mut held = std::mem::take(held);
    if !is_alone {
        held.extend_from_slice(piece);
    }
    let body = if is_alone { piece } else { &held };
    let is_written = body.len() <= MAX_WHOLE_ANSWER_BYTES
        && clear_fields(body, json::skip_space(body, 0), fields, None, b"", out) == ClearedDocument::Written;
    if !is_written && !is_alone {
        out.append(&mut held);
    }
    is_written || !is_alone
}

// === impl EventCleanup ===

impl EventCleanup {
    fn new(dialect: BodyDialect, fields: AddedAnswerFields) -> Self {
        let (head, last) = (RepeatedHead::default(), LastEventLine::default());
        let state = EventCleanupState { dialect, fields, head, last, is_terminal: false, split: None };
        EventCleanup { lines: LineSplitter::new(MAX_EVENT_BYTES), state, is_between_events: false }
    }

    /// Reads the event of one token that the piece begins with, and writes what goes on in its place. Returns
    /// it with its length. `None`: the piece begins with another event, or within one.
    fn token<'a>(&mut self, piece: &'a [u8], out: &mut Vec<u8>) -> Option<(TokenEvent<'a>, usize)> {
        let EventCleanupState { dialect, fields, head, last, split, .. } = &self.state;
        let is_plain = *last == LastEventLine::Stays && split.is_none() && *dialect == BodyDialect::Chat;
        if !self.is_between_events || !is_plain {
            return None;
        }
        let data = piece.strip_prefix(b"data: ")?;
        head.comma_in(data)?;
        let start = piece.len() - data.len() + head.bytes();
        let choice = &piece[start..];
        let choice = &choice[..memchr::memchr(b'\n', choice)?];
        let end = start + choice.len() + EVENT_END.len();
        let (token, spans) = read_token_event(choice)?;
        let (has_logprob, has_id) = (token.logprob.is_some(), token.token_id.is_some());
        let is_cleared = (fields.logprobs && has_logprob) || (fields.token_ids && has_id);
        if token.usage.is_some() || !is_cleared || !piece[..end.min(piece.len())].ends_with(EVENT_END) {
            return None;
        }
        count_work(end);
        let (logprobs, ids) = (spans.logprobs, spans.token_ids);
        let value = |is_cleared: bool, span: Range<usize>| if is_cleared { NULL } else { &choice[span] };
        out.extend_from_slice(&piece[..start + logprobs.start]);
        out.extend_from_slice(value(fields.logprobs, logprobs.clone()));
        out.extend_from_slice(&choice[logprobs.end..ids.start]);
        out.extend_from_slice(value(fields.token_ids, ids.clone()));
        out.extend_from_slice(&piece[start + ids.end..end]);
        Some((token, end))
    }

    /// Whether something else goes on than the piece, and whether the terminal event is in it.
    fn feed(&mut self, piece: &[u8], end: bool, out: &mut Vec<u8>) -> (bool, bool) {
        // Of whole lines, everything before the first change goes on with it.
        let mut is_copied = !self.lines.are_whole_in(piece);
        let mut rest = piece;
        loop {
            let before = if is_copied { &[][..] } else { &piece[..piece.len() - rest.len()] };
            let Some(next) = self.lines.next(&mut rest) else { break };
            let is_written = self.state.take(&next, before, out);
            if is_copied && !is_written {
                count_work(next.raw().len());
                out.extend_from_slice(next.raw());
            }
            is_copied |= is_written;
        }
        if self.state.last == LastEventLine::EndRemoved && !self.lines.may_await_line_feed() {
            self.state.last = LastEventLine::Stays;
        }
        if let Some(line) = end.then(|| self.lines.finish()).flatten()
            && !self.state.line(&line, b"", out)
        {
            out.extend_from_slice(line.raw());
        }
        if end && self.state.split.is_some() {
            self.state.end_split(out);
            is_copied = true;
        }
        self.is_between_events = match piece {
            [] => self.is_between_events,
            piece => piece.ends_with(EVENT_END),
        };
        (is_copied, std::mem::take(&mut self.state.is_terminal))
    }
}

// === impl EventCleanupState ===

impl EventCleanupState {
    /// Whether `before`, and what goes on in place of the piece, was written.
    fn take(&mut self, piece: &SsePiece<'_>, before: &[u8], out: &mut Vec<u8>) -> bool {
        match piece {
            SsePiece::Line(line) => self.line(line, before, out),
            SsePiece::LineFeed if self.split.is_some() => {
                out.extend_from_slice(before);
                if let Some(split) = &mut self.split {
                    split.raw.push(b'\n');
                }
                true
            }
            SsePiece::LineFeed if self.last != LastEventLine::Stays => {
                out.extend_from_slice(before);
                true
            }
            SsePiece::LineFeed => false,
            SsePiece::Long { .. } => {
                self.last = LastEventLine::Stays;
                if self.split.is_none() {
                    return false;
                }
                // The lines of the event that are held go first.
                out.extend_from_slice(before);
                self.give_up(out);
                out.extend_from_slice(piece.raw());
                true
            }
        }
    }

    /// As `take`, of a whole line.
    fn line(&mut self, line: &SseLine<'_>, before: &[u8], out: &mut Vec<u8>) -> bool {
        let last = std::mem::take(&mut self.last);
        if self.split.is_some() {
            out.extend_from_slice(before);
            self.split_line(line, out);
            return true;
        }
        let Some(data) = line.data() else {
            if last != LastEventLine::EventRemoved || !line.text().is_empty() {
                return false;
            }
            self.last = LastEventLine::EndRemoved;
            out.extend_from_slice(before);
            return true;
        };
        let (raw, end) = (line.raw(), data.end);
        let start = data.start + json::skip_space(&raw[data], 0);
        if raw.get(start) != Some(&b'{') {
            self.is_terminal |= is_done(&raw[start..end], self.dialect);
            return false;
        }
        match clear_fields(&raw[..end], start, self.fields, Some(&mut self.head), before, out) {
            ClearedDocument::Unreadable if json::read_value(&raw[..end], start).is_err() => {
                out.extend_from_slice(before);
                let lead = raw[..line.data().map_or(0, |data| data.start)].to_vec();
                self.split = Some(SplitEvent {
                    raw: raw.to_vec(),
                    data: raw[start..end].to_vec(),
                    lead,
                    others: Vec::new(),
                });
                true
            }
            ClearedDocument::Unchanged | ClearedDocument::Unreadable => false,
            ClearedDocument::Written => {
                out.extend_from_slice(&raw[end..]);
                true
            }
            ClearedDocument::Superfluous => {
                self.last = LastEventLine::EventRemoved;
                out.extend_from_slice(before);
                // A byte-order mark belongs to the stream.
                out.extend_from_slice(&raw[..end - line.text().len()]);
                true
            }
        }
    }

    /// Takes a line of an event whose data stands on several lines.
    fn split_line(&mut self, line: &SseLine<'_>, out: &mut Vec<u8>) {
        let Some(split) = &mut self.split else { return };
        match line.data() {
            _ if !line.text().is_empty() && split.raw.len() + line.raw().len() > MAX_EVENT_BYTES => {
                self.give_up(out);
                out.extend_from_slice(line.raw());
            }
            Some(data) => {
                split.raw.extend_from_slice(line.raw());
                split.data.push(b'\n');
                split.data.extend_from_slice(&line.raw()[data]);
            }
            None if line.text().is_empty() => {
                if self.end_split(out) {
                    out.extend_from_slice(line.raw());
                } else {
                    self.last = LastEventLine::EndRemoved;
                }
            }
            None => {
                split.raw.extend_from_slice(line.raw());
                split.others.extend_from_slice(line.raw());
            }
        }
    }

    /// Writes the event whose data stands on several lines. False: it is removed.
    fn end_split(&mut self, out: &mut Vec<u8>) -> bool {
        let Some(SplitEvent { raw, data, lead, others }) = self.split.take() else { return true };
        let mut cleaned = Vec::new();
        match clear_fields(&data, 0, self.fields, None, b"", &mut cleaned) {
            ClearedDocument::Written => {}
            ClearedDocument::Superfluous => return false,
            ClearedDocument::Unchanged | ClearedDocument::Unreadable => {
                out.extend_from_slice(&raw);
                return true;
            }
        }
        let is_end = |byte: &u8| matches!(byte, b'\r' | b'\n');
        let behind = &raw[raw.iter().position(is_end).unwrap_or(raw.len())..];
        let line_end =
            if behind.starts_with(b"\r\n") { &behind[..2] } else { &behind[..1.min(behind.len())] };
        // A byte-order mark stands before the first line alone.
        let name = lead.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&lead);
        out.extend_from_slice(&lead[..lead.len() - name.len()]);
        // Their place within the event means nothing.
        out.extend_from_slice(&others);
        for line in cleaned.split(|byte| *byte == b'\n') {
            out.extend_from_slice(name);
            out.extend_from_slice(line);
            out.extend_from_slice(line_end);
        }
        true
    }

    /// Passes on what is held.
    fn give_up(&mut self, out: &mut Vec<u8>) {
        if let Some(split) = self.split.take() {
            out.extend_from_slice(&split.raw);
        }
    }

    fn held_bytes(&self) -> usize {
        self.split.as_ref().map_or(0, |split| split.raw.len() + split.data.len() + split.others.len())
    }
}
