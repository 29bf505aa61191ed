//! A document that flows by in chunks that are cut anywhere: each byte is read once, and none is kept.
//!
//! A [`ChunkVisitor`] says which objects and arrays are entered and which strings and numbers it reads; all
//! else is skipped, strings from quote to quote, and between them only brackets are counted. What is no JSON
//! is read no further.

use super::bytes::{is_escaped, plain_prefix, string_end};
use super::growing::{GrowingObject, GrowingState};
use super::scalar::ScalarState;
use super::work::spend;

/// The most objects and arrays that are entered inside one another; deeper ones are skipped.
const MAX_ENTERED: u32 = 32;

/// What reads a document. Offsets are into the present chunk.
pub(crate) trait ChunkVisitor {
    /// A part of a key of an entered object, as it stands between its quotes; then comes its end.
    fn key(&mut self, part: &[u8]);

    fn key_end(&mut self) {}

    /// A value of an entered object or array begins at `at` with the byte `first`: whether it is entered or
    /// read. Otherwise it is skipped.
    fn value(&mut self, first: u8, at: usize) -> bool;

    /// A part of a string that is read, as it stands between its quotes.
    fn text(&mut self, _part: &[u8]) {}

    /// A string that is read has ended before `at`.
    fn text_end(&mut self, _at: usize) {}

    /// A part of a number or a literal that is read; then comes its end.
    fn scalar(&mut self, _part: &[u8]) {}

    fn scalar_end(&mut self) {}

    /// The innermost object or array that was entered has ended.
    fn leave(&mut self) {}
}

#[derive(Clone, Copy, Debug)]
enum ChunkState {
    /// Before the document, after a colon, or after a comma of an array.
    BeforeValue,
    /// After `[`.
    ValueOrEnd,
    /// After `{`.
    KeyOrEnd,
    /// After a comma of an object.
    BeforeKey,
    Key,
    Colon,
    /// In a string that is read.
    Text,
    /// In one that is skipped.
    SkippedText,
    Scalar {
        scalar: ScalarState,
        is_read: bool,
    },
    /// In an object or array that is skipped, with so many open brackets.
    Skipped(u64),
    /// In a string in there.
    TextInSkipped(u64),
    CommaOrEnd,
    /// After the document.
    Ended,
    Malformed,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct ChunkWalker {
    state: ChunkState,
    /// The number of containers that are entered.
    depth: u32,
    /// Which of them are objects: a bit for each, that of the innermost at `depth - 1`.
    objects: u32,
    /// The next byte of the string stands behind an odd number of backslashes.
    escaped: bool,
}

impl ChunkWalker {
    pub(crate) fn new() -> Self {
        ChunkWalker { state: ChunkState::BeforeValue, depth: 0, objects: 0, escaped: false }
    }

    /// What reads the document behind `body`, of which `object` has read all, and the beginning of the key
    /// that `body` ends in.
    pub(crate) fn behind<'b, M>(object: &GrowingObject<M>, body: &'b [u8]) -> (Self, Option<&'b [u8]>) {
        let mut key = None;
        let mut text = None;
        let state = match object.state {
            GrowingState::Start | GrowingState::NotAnObject | GrowingState::Malformed(_) => {
                ChunkState::Malformed
            }
            GrowingState::End => ChunkState::Ended,
            GrowingState::KeyOrEnd => ChunkState::KeyOrEnd,
            GrowingState::Key => ChunkState::BeforeKey,
            GrowingState::InKey { start } => {
                key = body.get(start..);
                text = key;
                ChunkState::Key
            }
            GrowingState::Colon => ChunkState::Colon,
            GrowingState::BeforeValue => ChunkState::BeforeValue,
            GrowingState::InString { start } => {
                text = body.get(start..);
                ChunkState::SkippedText
            }
            GrowingState::InScalar { scalar, .. } => ChunkState::Scalar { scalar, is_read: false },
            GrowingState::Nested { skip, .. } => match skip.text {
                Some(start) => {
                    text = body.get(start..);
                    ChunkState::TextInSkipped(skip.depth)
                }
                None => ChunkState::Skipped(skip.depth),
            },
            GrowingState::CommaOrEnd => ChunkState::CommaOrEnd,
        };
        let escaped = text.is_some_and(|text| is_escaped(text, 0, text.len()));
        (ChunkWalker { state, depth: 1, objects: 1, escaped }, key)
    }

    /// Reads the next chunk.
    pub(crate) fn read(&mut self, chunk: &[u8], visitor: &mut impl ChunkVisitor) {
        let mut at = 0;
        while let Some(&byte) = chunk.get(at) {
            at = match self.state {
                ChunkState::Key => self.key(chunk, at, visitor),
                ChunkState::Text => self.text(chunk, at, visitor),
                ChunkState::SkippedText => self.skip_text(chunk, at, None),
                ChunkState::TextInSkipped(depth) => self.skip_text(chunk, at, Some(depth)),
                ChunkState::Skipped(depth) => self.skip(chunk, at, depth),
                ChunkState::Scalar { scalar, is_read } => self.scalar(chunk, at, (scalar, is_read), visitor),
                ChunkState::Malformed => return,
                _ => {
                    self.between(byte, at, visitor);
                    spend(1);
                    at + 1
                }
            };
        }
    }

    /// One byte outside of keys and values.
    #[inline]
    fn between(&mut self, byte: u8, at: usize, visitor: &mut impl ChunkVisitor) {
        self.state = match (self.state, byte) {
            (state, b' ' | b'\n' | b'\r' | b'\t') => state,
            (ChunkState::KeyOrEnd | ChunkState::BeforeKey, b'"') => ChunkState::Key,
            (ChunkState::Colon, b':') => ChunkState::BeforeValue,
            (ChunkState::CommaOrEnd, b',') if self.is_in_object() => ChunkState::BeforeKey,
            (ChunkState::CommaOrEnd, b',') => ChunkState::BeforeValue,
            (ChunkState::CommaOrEnd | ChunkState::KeyOrEnd, b'}') if self.is_in_object() => {
                self.leave(visitor)
            }
            (ChunkState::CommaOrEnd | ChunkState::ValueOrEnd, b']') if !self.is_in_object() => {
                self.leave(visitor)
            }
            (ChunkState::BeforeValue | ChunkState::ValueOrEnd, _) => self.begin(byte, at, visitor),
            _ => ChunkState::Malformed,
        };
    }

    fn is_in_object(&self) -> bool {
        self.objects >> self.depth.saturating_sub(1) & 1 == 1
    }

    #[inline]
    fn begin(&mut self, first: u8, at: usize, visitor: &mut impl ChunkVisitor) -> ChunkState {
        match first {
            b'"' if visitor.value(first, at) => ChunkState::Text,
            b'"' => ChunkState::SkippedText,
            b'{' | b'[' if self.depth < MAX_ENTERED && visitor.value(first, at) => {
                let (bit, is_object) = (1 << self.depth, first == b'{');
                self.objects = if is_object { self.objects | bit } else { self.objects & !bit };
                self.depth += 1;
                if is_object { ChunkState::KeyOrEnd } else { ChunkState::ValueOrEnd }
            }
            b'{' | b'[' => ChunkState::Skipped(1),
            _ => {
                let Some(scalar) = ScalarState::begin(first) else { return ChunkState::Malformed };
                let is_read = visitor.value(first, at);
                if is_read {
                    visitor.scalar(&[first]);
                }
                ChunkState::Scalar { scalar, is_read }
            }
        }
    }

    fn leave(&mut self, visitor: &mut impl ChunkVisitor) -> ChunkState {
        self.depth -= 1;
        visitor.leave();
        self.behind_value()
    }

    fn behind_value(&self) -> ChunkState {
        if self.depth == 0 { ChunkState::Ended } else { ChunkState::CommaOrEnd }
    }

    /// Where the string ends that goes on at `start`; `None`: not in this chunk.
    #[inline]
    fn string_end(&mut self, chunk: &[u8], start: usize) -> Option<usize> {
        let text = start + usize::from(std::mem::take(&mut self.escaped));
        let end = string_end(chunk, text, text);
        if end.is_none() {
            // The byte that was escaped may be all there is.
            self.escaped = text <= chunk.len() && is_escaped(chunk, text, chunk.len());
        }
        end
    }

    fn key(&mut self, chunk: &[u8], start: usize, visitor: &mut impl ChunkVisitor) -> usize {
        let end = self.string_end(chunk, start);
        visitor.key(&chunk[start..end.unwrap_or(chunk.len())]);
        let Some(end) = end else { return chunk.len() };
        visitor.key_end();
        self.state = ChunkState::Colon;
        end + 1
    }

    fn text(&mut self, chunk: &[u8], start: usize, visitor: &mut impl ChunkVisitor) -> usize {
        let end = self.string_end(chunk, start);
        visitor.text(&chunk[start..end.unwrap_or(chunk.len())]);
        let Some(end) = end else { return chunk.len() };
        visitor.text_end(end + 1);
        self.state = self.behind_value();
        end + 1
    }

    /// `skipped`: the string is in a container that is skipped, with so many open brackets.
    fn skip_text(&mut self, chunk: &[u8], start: usize, skipped: Option<u64>) -> usize {
        let Some(end) = self.string_end(chunk, start) else { return chunk.len() };
        self.state = skipped.map_or_else(|| self.behind_value(), ChunkState::Skipped);
        end + 1
    }

    /// The inside of a container that is skipped, outside of its strings.
    fn skip(&mut self, chunk: &[u8], start: usize, mut depth: u64) -> usize {
        let mut at = start;
        while let Some(byte) = chunk.get(at) {
            at += 1;
            spend(1);
            match byte {
                b'"' => match self.string_end(chunk, at) {
                    Some(end) => at = end + 1,
                    None => {
                        self.state = ChunkState::TextInSkipped(depth);
                        return chunk.len();
                    }
                },
                b'{' | b'[' => depth += 1,
                b'}' | b']' => {
                    depth -= 1;
                    if depth == 0 {
                        self.state = self.behind_value();
                        return at;
                    }
                }
                _ => {
                    let plain = plain_prefix(&chunk[at..]);
                    spend(plain);
                    at += plain;
                }
            }
        }
        self.state = ChunkState::Skipped(depth);
        at
    }

    fn scalar(
        &mut self,
        chunk: &[u8],
        start: usize,
        (scalar, is_read): (ScalarState, bool),
        visitor: &mut impl ChunkVisitor,
    ) -> usize {
        let (length, scalar) = scalar.run(&chunk[start..]);
        let end = start + length;
        if is_read {
            visitor.scalar(&chunk[start..end]);
        }
        self.state = match scalar.kind() {
            _ if end == chunk.len() => ChunkState::Scalar { scalar, is_read },
            None => ChunkState::Malformed,
            Some(_) => {
                if is_read {
                    visitor.scalar_end();
                }
                self.behind_value()
            }
        };
        end
    }

    /// Whether the document is whole if no chunk follows.
    #[cfg(test)]
    pub(crate) fn is_whole(&self) -> bool {
        match self.state {
            ChunkState::Ended => true,
            ChunkState::Scalar { scalar, .. } => self.depth == 0 && scalar.kind().is_some(),
            _ => false,
        }
    }
}
