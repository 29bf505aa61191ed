//! Removes from a stream the usage that the balancer requested.
//!
//! Most pieces are unaffected: they end with a line end, and contain neither a usage nor the end of a choice.
//! Two searches detect this, and the piece is forwarded without a copy. Within a text the quotes of such a
//! name would be escaped, so that a match is a name, or a text of that one word.
//!
//! Other pieces are read line by line, and only a line with such a name is parsed as JSON.
//!
//! Never: fail, change a line except for the fingerprint, hold more than a line and the last chunk of a
//! choice.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::json::{self, JsonObject, Span};
use crate::route::answer::MAX_EVENT_BYTES;
use crate::sse::{LineSplitter, SseLine, SsePiece, count_work};

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"usage\""));
static FINISH_REASON: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"finish_reason\""));

const FINGERPRINT: &str = "system_fingerprint";

/// Removes the usage from one stream.
#[derive(Debug)]
pub struct UsageFilter {
    lines: LineSplitter,
    removal: UsageRemoval,
}

/// The held part of a stream from which the chunk of usage is removed.
#[derive(Debug, Default)]
struct UsageRemoval {
    /// The chunk that ended the choice, and the bytes after it.
    ended: Vec<u8>,
    /// The offset in `ended` at which the fingerprint is inserted.
    seam: usize,
    last: LastLine,
}

/// The treatment of the last line; the second half of a cut line end gets the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LastLine {
    #[default]
    Stays,
    /// The chunk was removed; the empty line after it is removed too.
    ChunkRemoved,
    /// The empty line after the chunk was removed.
    EndRemoved,
}

impl Default for UsageFilter {
    fn default() -> Self {
        UsageFilter { lines: LineSplitter::new(MAX_EVENT_BYTES), removal: UsageRemoval::default() }
    }
}

// === impl UsageFilter ===

impl UsageFilter {
    /// Filters the next piece and returns the bytes that can be forwarded; `None`: the unchanged piece.
    /// `end`: it is the last.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Option<Vec<u8>> {
        let holds_nothing = self.removal.is_idle() && self.lines.is_between_lines();
        if holds_nothing && (end || self.lines.are_whole_in(piece)) && !is_of_interest(piece) {
            if !end {
                self.lines.skip(piece);
            }
            return None;
        }
        let held = self.lines.held_bytes() + self.removal.ended.len();
        let mut out = Vec::with_capacity(held + piece.len());
        let mut rest = piece;
        while let Some(piece) = self.lines.next(&mut rest) {
            self.removal.take(&piece, &mut out);
        }
        if self.removal.last == LastLine::EndRemoved && !self.lines.may_await_line_feed() {
            self.removal.last = LastLine::Stays;
        }
        if end {
            if let Some(line) = self.lines.finish() {
                self.removal.line(&line, &mut out);
            }
            self.removal.release_held(&mut out);
        }
        Some(out)
    }
}

// === impl UsageRemoval ===

impl UsageRemoval {
    /// Whether nothing is held, and nothing more is to be removed.
    fn is_idle(&self) -> bool {
        self.ended.is_empty() && self.last == LastLine::Stays
    }

    fn take(&mut self, piece: &SsePiece<'_>, out: &mut Vec<u8>) {
        match piece {
            SsePiece::Line(line) => self.line(line, out),
            SsePiece::LineFeed if self.last == LastLine::Stays => self.put(piece.raw(), out),
            SsePiece::LineFeed => {}
            SsePiece::Long { .. } => {
                self.last = LastLine::Stays;
                self.release_held(out);
                out.extend_from_slice(piece.raw());
            }
        }
    }

    fn line(&mut self, line: &SseLine<'_>, out: &mut Vec<u8>) {
        let raw = line.raw();
        if std::mem::take(&mut self.last) == LastLine::ChunkRemoved && line.text().is_empty() {
            self.last = LastLine::EndRemoved;
            return;
        }
        let Some(data) = line.data() else { return self.put(raw, out) };
        // The chunk that ended the choice waits for one line only.
        let start = data.start + json::skip_space(&raw[data.clone()], 0);
        let document = json::trim_end(&raw[start..data.end]);
        let object = Some(document).filter(|data| is_of_interest(data)).and_then(json::document);
        match object {
            Some(object) if is_usage_alone(document, &object) => {
                if let Some(fingerprint) = fingerprint(document, &object) {
                    let member = [b",\"", FINGERPRINT.as_bytes(), b"\":", fingerprint].concat();
                    self.stamp(&member);
                }
                self.release_held(out);
                self.last = LastLine::ChunkRemoved;
            }
            Some(object) if object.get(FINGERPRINT).is_none() && ends_choice(document) => {
                self.release_held(out);
                count_work(raw.len());
                self.ended.extend_from_slice(raw);
                self.seam = start + object.span.end - 1;
            }
            _ => {
                self.release_held(out);
                out.extend_from_slice(raw);
            }
        }
    }

    /// Appends bytes other than data to the held bytes.
    fn put(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        if self.ended.is_empty() {
            out.extend_from_slice(bytes);
            return;
        }
        count_work(bytes.len());
        self.ended.extend_from_slice(bytes);
        if self.ended.len() > MAX_EVENT_BYTES {
            self.release_held(out);
        }
    }

    fn stamp(&mut self, member: &[u8]) {
        if !self.ended.is_empty() {
            self.ended.splice(self.seam..self.seam, member.iter().copied());
        }
    }

    fn release_held(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.ended);
    }
}

/// Whether the bytes may contain a usage or the end of a choice.
fn is_of_interest(bytes: &[u8]) -> bool {
    count_work(bytes.len());
    ends_choice(bytes) || USAGE.find(bytes).is_some()
}

/// Whether a choice has a finish reason.
fn ends_choice(bytes: &[u8]) -> bool {
    FINISH_REASON.find_iter(bytes).any(|at| {
        let colon = json::skip_space(bytes, at + FINISH_REASON.needle().len());
        let value = json::skip_space(bytes, colon + 1);
        bytes.get(colon) == Some(&b':') && bytes.get(value) == Some(&b'"')
    })
}

/// The chunk that carries a stream's usage and nothing else.
fn is_usage_alone(bytes: &[u8], object: &JsonObject<'_>) -> bool {
    let usage = object.get("usage").is_some_and(|span| bytes[span.start] == b'{');
    usage && object.get("choices").is_some_and(|span| json::is_empty_list(bytes, &span))
}

/// The serialized member.
fn fingerprint<'a>(bytes: &'a [u8], object: &JsonObject<'_>) -> Option<&'a [u8]> {
    let written = |span: Span| &bytes[span];
    object.get(FINGERPRINT).map(written).filter(|value| value.starts_with(b"\""))
}
