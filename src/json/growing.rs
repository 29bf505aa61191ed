//! An object at the top of a buffer that grows at its end: each byte is examined once, however the buffer
//! comes to be whole.
//!
//! The members of the object are reported, and what is inside of their values is skipped: strings from quote
//! to quote at the speed of memory, the rest with a counter for the depth.

use std::ops::Range;

use super::bytes::{ByteClass, CLASSES, numbers_at, plain_prefix, string_end};
use super::scalar::{ScalarKind, ScalarState};
use super::space::BYTE_ORDER_MARK;
use super::work::spend;

/// How far a reader has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanProgress {
    /// The document goes on after the bytes seen so far.
    Cut,
    /// The document is whole, or is no object, in which there is nothing to find.
    Complete,
    /// No JSON from this offset on. What was found before it still holds.
    Malformed(usize),
}

/// The treatment of a member by the scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberKind {
    String,
    Container,
    Scalar(ScalarKind),
}

/// Measures a value while it is read.
pub(crate) trait ValueMeter: Copy + Default {
    /// Whether numbers are counted at all.
    const COUNTS_NUMBERS: bool;

    /// The text of a string, without its quotes.
    fn string(&mut self, text: &[u8]);

    fn numbers(&mut self, count: u64);
}

/// Measures nothing.
impl ValueMeter for () {
    const COUNTS_NUMBERS: bool = false;

    fn string(&mut self, _text: &[u8]) {}

    fn numbers(&mut self, _count: u64) {}
}

/// Takes the members of an object.
pub(crate) trait MemberSink<M> {
    /// The key of the next member, as it stands between its quotes.
    fn key(&mut self, raw: &[u8]);

    /// The value that begins at `at`, if it is known where it ends.
    fn known_end(&mut self, _body: &[u8], _at: usize) -> Option<usize> {
        None
    }

    /// A value that is known, or has been read to its end.
    fn value(&mut self, body: &[u8], value: GrownValue<M>);
}

/// A value of the object, which is whole.
pub(crate) struct GrownValue<M> {
    /// `None`: it was known.
    pub read: Option<(MemberKind, M)>,
    pub span: Range<usize>,
}

/// A value that the bytes end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenValue {
    pub start: usize,
    /// Where the text of the string begins that the bytes end in.
    pub text: Option<usize>,
}

/// Where in the document the reader stands. Offsets are into the buffer.
#[derive(Clone, Copy, Debug)]
pub(super) enum GrowingState {
    Start,
    /// After `{`.
    KeyOrEnd,
    /// After a comma.
    Key,
    InKey {
        start: usize,
    },
    Colon,
    BeforeValue,
    /// After the opening quote of a string.
    InString {
        start: usize,
    },
    InScalar {
        start: usize,
        scalar: ScalarState,
    },
    /// In an object or array.
    Nested {
        start: usize,
        skip: ContainerSkip,
    },
    CommaOrEnd,
    /// After the last bracket: white space only.
    End,
    NotAnObject,
    Malformed(usize),
}

/// See the module. Always give it the same buffer, grown at its end.
#[derive(Clone, Debug)]
pub(crate) struct GrowingObject<M> {
    pub(super) state: GrowingState,
    /// Everything before it has been examined.
    at: usize,
    /// Of the value in progress.
    meter: M,
}

/// Follows an object or an array in a buffer that grows, to its last bracket.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ContainerSkip {
    pub(super) depth: u64,
    /// Where the text of the string in progress begins.
    pub(super) text: Option<usize>,
}

// === impl GrowingObject ===

impl<M: ValueMeter> GrowingObject<M> {
    pub(crate) fn new() -> Self {
        GrowingObject { state: GrowingState::Start, at: 0, meter: M::default() }
    }

    /// Reads what the buffer has gained since the last call.
    pub(crate) fn read(&mut self, body: &[u8], sink: &mut impl MemberSink<M>) {
        while let Some(&byte) = body.get(self.at) {
            spend(1);
            let moved = match self.state {
                GrowingState::Start => self.start(body),
                GrowingState::InKey { start } => self.key(body, start, sink),
                GrowingState::InString { start } => self.string(body, start, sink),
                GrowingState::InScalar { start, scalar } => self.scalar(body, start, scalar, sink),
                GrowingState::Nested { start, skip } => self.nested(body, start, skip, sink),
                GrowingState::NotAnObject | GrowingState::Malformed(_) => false,
                GrowingState::BeforeValue => self.known(body, sink) || self.between(byte),
                _ => self.between(byte),
            };
            if !moved {
                return;
            }
        }
    }

    /// The progress of the scan, and the error of a broken document.
    pub(crate) fn progress(&self) -> ScanProgress {
        match self.state {
            GrowingState::End | GrowingState::NotAnObject => ScanProgress::Complete,
            GrowingState::Malformed(offset) => ScanProgress::Malformed(offset),
            _ => ScanProgress::Cut,
        }
    }

    /// How many bytes have been examined.
    pub(crate) fn examined(&self) -> usize {
        self.at
    }

    /// The value that the bytes end in, where it can no longer turn out to be null.
    pub(crate) fn open_value(&self) -> Option<OpenValue> {
        match self.state {
            GrowingState::InString { start } => Some(OpenValue { start: start - 1, text: Some(start) }),
            GrowingState::Nested { start, skip } => Some(OpenValue { start, text: skip.text }),
            _ => None,
        }
    }

    /// What was measured of the value in progress, without the string that the bytes end in.
    pub(crate) fn open_meter(&self) -> M {
        self.meter
    }

    fn go(&mut self, at: usize, state: GrowingState) -> bool {
        self.at = at;
        self.state = state;
        true
    }

    /// The bytes end here; the state stays, all of them have been examined.
    fn wait(&mut self, body: &[u8]) -> bool {
        self.at = body.len();
        false
    }

    fn start(&mut self, body: &[u8]) -> bool {
        if self.at == 0 {
            if body.starts_with(BYTE_ORDER_MARK) {
                return self.go(BYTE_ORDER_MARK.len(), GrowingState::Start);
            }
            if BYTE_ORDER_MARK.starts_with(body) {
                return false;
            }
        }
        let byte = body[self.at];
        let state = match byte {
            b' ' | b'\n' | b'\r' | b'\t' => GrowingState::Start,
            b'{' => GrowingState::KeyOrEnd,
            b'[' | b'"' => GrowingState::NotAnObject,
            _ if ScalarState::begin(byte).is_some() => GrowingState::NotAnObject,
            _ => GrowingState::Malformed(self.at),
        };
        self.go(self.at + 1, state)
    }

    /// One byte of the object, outside keys and values.
    fn between(&mut self, byte: u8) -> bool {
        let next = self.at + 1;
        let state = match (self.state, byte) {
            (state, b' ' | b'\n' | b'\r' | b'\t') => state,
            (GrowingState::KeyOrEnd | GrowingState::Key, b'"') => GrowingState::InKey { start: next },
            (GrowingState::KeyOrEnd | GrowingState::CommaOrEnd, b'}') => GrowingState::End,
            (GrowingState::Colon, b':') => GrowingState::BeforeValue,
            (GrowingState::CommaOrEnd, b',') => GrowingState::Key,
            (GrowingState::BeforeValue, b'"') => GrowingState::InString { start: next },
            (GrowingState::BeforeValue, b'{' | b'[') => {
                GrowingState::Nested { start: self.at, skip: ContainerSkip { depth: 1, text: None } }
            }
            (GrowingState::BeforeValue, _) => match ScalarState::begin(byte) {
                Some(scalar) => GrowingState::InScalar { start: self.at, scalar },
                None => GrowingState::Malformed(self.at),
            },
            _ => GrowingState::Malformed(self.at),
        };
        self.go(next, state)
    }

    fn key(&mut self, body: &[u8], start: usize, sink: &mut impl MemberSink<M>) -> bool {
        let Some(end) = string_end(body, start, self.at) else {
            return self.wait(body);
        };
        sink.key(&body[start..end]);
        self.meter = M::default();
        self.go(end + 1, GrowingState::Colon)
    }

    fn string(&mut self, body: &[u8], start: usize, sink: &mut impl MemberSink<M>) -> bool {
        let Some(end) = string_end(body, start, self.at) else {
            return self.wait(body);
        };
        self.meter.string(&body[start..end]);
        self.finish(body, MemberKind::String, start - 1..end + 1, sink)
    }

    fn scalar(
        &mut self,
        body: &[u8],
        start: usize,
        scalar: ScalarState,
        sink: &mut impl MemberSink<M>,
    ) -> bool {
        let (length, scalar) = scalar.run(&body[self.at..]);
        let end = self.at + length;
        if end == body.len() {
            return self.go(end, GrowingState::InScalar { start, scalar });
        }
        let Some(kind) = scalar.kind() else {
            return self.go(end, GrowingState::Malformed(start));
        };
        if kind == ScalarKind::Number {
            self.meter.numbers(1);
        }
        self.finish(body, MemberKind::Scalar(kind), start..end, sink)
    }

    fn nested(
        &mut self,
        body: &[u8],
        start: usize,
        mut skip: ContainerSkip,
        sink: &mut impl MemberSink<M>,
    ) -> bool {
        let end = skip.resume(body, self.at, &mut self.meter);
        match end {
            Some(end) => self.finish(body, MemberKind::Container, start..end, sink),
            None => self.go(body.len(), GrowingState::Nested { start, skip }),
        }
    }

    fn known(&mut self, body: &[u8], sink: &mut impl MemberSink<M>) -> bool {
        let Some(end) = sink.known_end(body, self.at) else { return false };
        sink.value(body, GrownValue { read: None, span: self.at..end });
        self.go(end, GrowingState::CommaOrEnd)
    }

    fn finish(
        &mut self,
        body: &[u8],
        kind: MemberKind,
        span: Range<usize>,
        sink: &mut impl MemberSink<M>,
    ) -> bool {
        let end = span.end;
        sink.value(body, GrownValue { read: Some((kind, self.meter)), span });
        self.go(end, GrowingState::CommaOrEnd)
    }
}

// === impl ContainerSkip ===

impl ContainerSkip {
    /// Examines the bytes from `at` on, before which all have been. Returns where the container ends, if the
    /// bytes reach so far; else it goes on behind them.
    pub(crate) fn resume<M: ValueMeter>(
        &mut self,
        bytes: &[u8],
        mut at: usize,
        meter: &mut M,
    ) -> Option<usize> {
        if let Some(start) = self.text {
            let end = string_end(bytes, start, at)?;
            meter.string(&bytes[start..end]);
            self.text = None;
            at = end + 1;
        }
        // In registers while it loops.
        let (mut depth, mut measured) = (self.depth, *meter);
        let end = loop {
            let Some(&byte) = bytes.get(at) else { break None };
            spend(1);
            match CLASSES[usize::from(byte)] {
                ByteClass::Number if M::COUNTS_NUMBERS => {
                    let (length, numbers) = numbers_at(bytes, at);
                    measured.numbers(numbers);
                    at += length;
                }
                ByteClass::Other if M::COUNTS_NUMBERS => at += 1,
                ByteClass::Other | ByteClass::Number => at += 1 + plain_prefix(&bytes[at + 1..]),
                ByteClass::Open => {
                    depth += 1;
                    at += 1;
                }
                ByteClass::Close => {
                    depth = depth.saturating_sub(1);
                    at += 1;
                    if depth == 0 {
                        break Some(at);
                    }
                }
                ByteClass::Quote => match string_end(bytes, at + 1, at + 1) {
                    Some(end) => {
                        measured.string(&bytes[at + 1..end]);
                        at = end + 1;
                    }
                    None => {
                        self.text = Some(at + 1);
                        break None;
                    }
                },
            }
        };
        (self.depth, *meter) = (depth, measured);
        end
    }

    /// The buffer has lost so many bytes at its beginning, none of which belong to a string in progress.
    pub(crate) fn shift(&mut self, lost: usize) {
        self.text = self.text.map(|text| text.saturating_sub(lost));
    }
}
