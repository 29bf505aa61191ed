//! Server-sent events: one framer for everything that reads a stream of them, with one rule for line ends.
//!
//! A line ends at `\n`, `\r\n` or `\r` and at nothing else: JSON may hold U+2028 and other separators. An
//! empty line ends an event. A byte-order mark at the very beginning belongs to no line's text.
//!
//! [`LineSplitter`] takes a stream in chunks that are cut anywhere and yields [`SsePiece`]s. A line that is
//! whole in its chunk is borrowed from it; only a cut line is copied, up to the cap that the consumer names.
//! A longer line passes in pieces. A line is yielded as soon as its end has begun: a `\r` at the end of a
//! chunk ends its line, and a `\n` at the beginning of the next chunk follows as a piece of its own.
//!
//! Every byte of the stream stands in exactly one piece, in order: an editor that writes each piece's bytes
//! writes the stream. Which lines exceed the cap does not depend on the chunks.
//!
//! Never: examine a byte more than a constant number of times, hold more than one line, allocate for a line
//! that is not cut.

mod repeated_head;

use std::ops::Range;

pub use repeated_head::RepeatedHead;

/// The byte-order mark that may stand at the beginning of a stream.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The largest buffer of a cut line that is kept for the next one.
const MAX_KEPT_BUFFER_BYTES: usize = 1 << 10;

/// Splits one stream into lines.
#[derive(Clone, Debug)]
pub struct LineSplitter {
    /// The longest line, without its end, that is yielded as a whole.
    max_line_bytes: usize,
    position: LinePosition,
    /// The beginning of a cut line, or the line that was yielded last.
    held: Vec<u8>,
    /// The held line was yielded; the next call clears it.
    is_yielded: bool,
    /// No line has been yielded yet: a byte-order mark may stand here.
    is_first: bool,
}

/// The position in the stream after the bytes read so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinePosition {
    LineStart,
    /// At the start of a line, behind a `\r`: a `\n` that follows belongs to it.
    AfterReturn,
    /// In a line whose beginning is held.
    InLine,
    /// In a line beyond the cap, whose beginning was yielded.
    InLongLine,
}

/// The output of a [`LineSplitter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SsePiece<'a> {
    /// A whole line within the cap.
    Line(SseLine<'a>),
    /// A piece of a line beyond the cap. The first has at least as many bytes as the cap.
    Long { part: SseLine<'a>, begins: bool, ends: bool },
    /// The `\n` of a line end that the chunks cut in two.
    LineFeed,
}

/// A line, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SseLine<'a> {
    raw: &'a [u8],
    start: usize,
    end: usize,
}

/// The field of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SseField<'a> {
    /// Nothing: the end of an event.
    Empty,
    Comment,
    Event(&'a [u8]),
    Data(&'a [u8]),
    Other,
}

// === impl LineSplitter ===

impl LineSplitter {
    /// Creates the splitter of a new stream. Lines of up to `max_line_bytes` are yielded as a whole.
    pub fn new(max_line_bytes: usize) -> Self {
        LineSplitter {
            max_line_bytes: max_line_bytes.max(BYTE_ORDER_MARK.len()),
            position: LinePosition::LineStart,
            held: Vec::new(),
            is_yielded: false,
            is_first: true,
        }
    }

    /// Takes the next piece from the front of `chunk`. `None`: the chunk is used up.
    pub fn next<'a, 'c: 'a>(&'a mut self, chunk: &mut &'c [u8]) -> Option<SsePiece<'a>> {
        self.make_room();
        let rest = *chunk;
        let first = *rest.first()?;
        if self.position == LinePosition::AfterReturn {
            self.position = LinePosition::LineStart;
            if first == b'\n' {
                *chunk = &rest[1..];
                return Some(SsePiece::LineFeed);
            }
        }
        let found = memchr::memchr2(b'\n', b'\r', rest);
        let length = found.unwrap_or(rest.len());
        count_work(length + 1);
        if self.position == LinePosition::InLine && self.held.len() + length > self.max_line_bytes {
            let (front, behind) = rest.split_at(self.max_line_bytes - self.held.len());
            *chunk = behind;
            self.hold(front);
            self.position = LinePosition::InLongLine;
            let part = self.held_line(self.held.len());
            return Some(SsePiece::Long { part, begins: true, ends: false });
        }
        let before = self.position;
        let end = self.end_line(rest, found);
        let (raw, behind) = rest.split_at(end);
        *chunk = behind;
        match before {
            LinePosition::InLine => {
                let length = self.held.len() + length;
                self.hold(raw);
                found.map(|_| SsePiece::Line(self.held_line(length)))
            }
            LinePosition::InLongLine => {
                let part = SseLine { raw, start: 0, end: length };
                Some(SsePiece::Long { part, begins: false, ends: found.is_some() })
            }
            _ if length > self.max_line_bytes => {
                if found.is_none() {
                    self.position = LinePosition::InLongLine;
                }
                let part = self.begin(raw, length);
                Some(SsePiece::Long { part, begins: true, ends: found.is_some() })
            }
            _ => {
                if found.is_none() {
                    self.hold(raw);
                }
                found.map(|_| SsePiece::Line(self.begin(raw, length)))
            }
        }
    }

    /// The line that the stream ended in, when it was within the cap.
    pub fn finish(&mut self) -> Option<SseLine<'_>> {
        self.make_room();
        let is_cut = std::mem::replace(&mut self.position, LinePosition::LineStart) == LinePosition::InLine;
        is_cut.then(|| self.held_line(self.held.len()))
    }

    /// Splits a chunk into the whole lines at its front, which can be skipped, and the rest.
    pub fn split_whole<'c>(&self, chunk: &'c [u8]) -> (&'c [u8], &'c [u8]) {
        if self.are_whole_in(chunk) {
            return (chunk, &[]);
        }
        let last = memchr::memrchr2(b'\n', b'\r', chunk).filter(|_| self.is_between_lines());
        chunk.split_at(last.map_or(0, |last| last + 1))
    }

    /// Whether the chunk has whole lines only, none of them begun in an earlier chunk.
    pub fn are_whole_in(&self, chunk: &[u8]) -> bool {
        self.is_between_lines() && chunk.last().is_none_or(|byte| matches!(byte, b'\n' | b'\r'))
    }

    /// Skips a chunk for which [`LineSplitter::are_whole_in`] holds, without searching its lines.
    pub fn skip(&mut self, chunk: &[u8]) {
        debug_assert!(self.are_whole_in(chunk), "a line is cut");
        if let Some(last) = chunk.last() {
            self.position = if *last == b'\r' { LinePosition::AfterReturn } else { LinePosition::LineStart };
            self.is_first = false;
        }
    }

    /// Whether the last line has ended.
    pub fn is_between_lines(&self) -> bool {
        matches!(self.position, LinePosition::LineStart | LinePosition::AfterReturn)
    }

    /// Whether the last line ended with a `\r` that may be half of a `\r\n`, so that the next chunk may begin
    /// with its `\n`.
    pub fn may_await_line_feed(&self) -> bool {
        self.position == LinePosition::AfterReturn
    }

    /// The number of held bytes of a cut line.
    pub fn held_bytes(&self) -> usize {
        if self.is_yielded { 0 } else { self.held.len() }
    }

    /// The end of the line at the start of `rest`, whose text ends at `found`.
    fn end_line(&mut self, rest: &[u8], found: Option<usize>) -> usize {
        let Some(at) = found else {
            if self.position == LinePosition::LineStart {
                self.position = LinePosition::InLine;
            }
            return rest.len();
        };
        self.position = LinePosition::LineStart;
        match (rest[at], rest.get(at + 1)) {
            (b'\r', Some(b'\n')) => return at + 2,
            (b'\r', None) => self.position = LinePosition::AfterReturn,
            _ => {}
        }
        at + 1
    }

    fn hold(&mut self, bytes: &[u8]) {
        count_work(bytes.len());
        self.held.extend_from_slice(bytes);
    }

    /// The held bytes as a line whose text ends at `end`.
    fn held_line(&mut self, end: usize) -> SseLine<'_> {
        self.is_yielded = true;
        let is_first = std::mem::take(&mut self.is_first);
        SseLine::new(&self.held, end, is_first)
    }

    /// A line at its beginning, in place.
    fn begin<'a>(&mut self, raw: &'a [u8], end: usize) -> SseLine<'a> {
        SseLine::new(raw, end, std::mem::take(&mut self.is_first))
    }

    fn make_room(&mut self) {
        if !std::mem::take(&mut self.is_yielded) {
            return;
        }
        self.held.clear();
        if self.held.capacity() > MAX_KEPT_BUFFER_BYTES {
            self.held = Vec::new();
        }
    }
}

// === impl SsePiece ===

impl<'a> SsePiece<'a> {
    /// The bytes of the stream that this piece covers.
    pub fn raw(&self) -> &'a [u8] {
        match self {
            SsePiece::Line(line) | SsePiece::Long { part: line, .. } => line.raw,
            SsePiece::LineFeed => b"\n",
        }
    }
}

// === impl SseLine ===

impl<'a> SseLine<'a> {
    fn new(raw: &'a [u8], end: usize, is_first: bool) -> Self {
        let has_mark = is_first && raw[..end].starts_with(BYTE_ORDER_MARK);
        SseLine { raw, start: if has_mark { BYTE_ORDER_MARK.len() } else { 0 }, end }
    }

    /// The line as it stands in the stream, its end included.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// The line without its end and without the byte-order mark.
    pub fn text(&self) -> &'a [u8] {
        &self.raw[self.start..self.end]
    }

    /// The field of a whole line.
    pub fn field(&self) -> SseField<'a> {
        let text = self.text();
        match text.first() {
            None => SseField::Empty,
            Some(b':') => SseField::Comment,
            Some(b'd') => value_of(text, b"data").map_or(SseField::Other, SseField::Data),
            Some(b'e') => value_of(text, b"event").map_or(SseField::Other, SseField::Event),
            Some(_) => SseField::Other,
        }
    }

    /// The range of the data in `raw`. The line must be whole, or the first part of a long one.
    pub fn data(&self) -> Option<Range<usize>> {
        let value = value_of(self.text(), b"data")?;
        Some(self.end - value.len()..self.end)
    }
}

/// The value of a line's field: the text after the colon, without one leading space.
fn value_of<'l>(line: &'l [u8], field: &[u8]) -> Option<&'l [u8]> {
    let rest = line.strip_prefix(field)?;
    if rest.is_empty() {
        return Some(rest);
    }
    let value = rest.strip_prefix(b":")?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

/// Tracks whether a stream is between two events, by its last bytes only.
///
/// A `\r` behind a `\n` does not count yet: it may be the first half of a line end. A stream of the other
/// line ends has them twice in a row.
#[derive(Clone, Copy, Debug)]
pub struct StreamTail {
    last: [u8; 3],
}

impl Default for StreamTail {
    fn default() -> Self {
        StreamTail { last: *b"\n\n\n" }
    }
}

impl StreamTail {
    /// Reads the next piece of the stream.
    pub fn feed(&mut self, piece: &[u8]) {
        let [_, before, last] = self.last;
        self.last = match *piece {
            [] => self.last,
            [one] => [before, last, one],
            [one, two] => [last, one, two],
            [.., one, two, three] => [one, two, three],
        };
    }

    /// Whether the stream ends in the middle of a line, and so of an event. Some engines write no line end
    /// behind the last event: where that one may be whole, it counts as whole.
    pub fn is_cut(&self) -> bool {
        !matches!(self.last, [.., b'\n' | b'\r' | b'}'] | [b'N', b'E', b']'])
    }

    /// Whether the last event has had its end.
    pub fn between_events(&self) -> bool {
        matches!(self.last, [_, b'\n', b'\n'] | [_, b'\r', b'\r'] | [b'\n' | b'\r', b'\r', b'\n'])
    }
}

/// Counts bytes that a reader of a stream examines or copies, in tests only.
#[inline]
pub(crate) fn count_work(bytes: usize) {
    #[cfg(test)]
    tests::work::add(bytes);
    #[cfg(not(test))]
    let _ = bytes;
}

#[cfg(test)]
pub(crate) mod tests;
