//! One pass over the JSON body of a request that may be cut at any byte: what routing needs to know.
//!
//! A body can be megabytes and is looked at before an upstream is chosen, so this is the hottest loop
//! of the balancer. It finds the top-level fields, and skips what is inside them: in strings from quote
//! to quote at the speed of memory, elsewhere byte by byte with a counter for the depth.
//!
//! The scanner stops where the bytes end and goes on from there when the same buffer has grown, so that
//! a body costs one pass however it is cut. It is laxer than vLLM: inside a value only brackets and
//! quotes are looked at. The upstream refuses what is wrong there; no reading of a body is ever a reason
//! to drop it. Where Python's `json` and others differ, Python is followed: the last of two equal keys
//! wins, and NaN and a byte-order mark are allowed.
//!
//! Never: a tree of the document, recursion, a copy of the body, a panic.

pub(super) mod bytes;
mod fields;
mod known;
mod tail;

use std::borrow::Cow;
use std::ops::Range;

pub(crate) use self::bytes::string_end;
use self::bytes::{ByteClass, CLASSES, numbers_at};
pub use self::fields::{BodyField, FieldSet};
use self::known::KnownValues;
pub use self::tail::DocumentTail;
use super::value::{
    MAX_MODEL_NAME_BYTES, MAX_RESPONSE_ID_BYTES, MAX_TRUE_WORD_BYTES, ModelField, is_true_number,
    is_true_word, unescape, unescape_short,
};
use super::work::spend;

/// How much of a string that is a `data:` URL counts as prompt: 1,000 tokens, about what an image costs.
/// Its base64 is megabytes, none of which is read as text.
const MEDIA_WEIGHT_BYTES: u64 = 4096;

/// What a number counts as prompt: it is a token id, and a token stands for four bytes.
const NUMBER_WEIGHT_BYTES: u64 = 4;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// How far the scanner has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanProgress {
    /// The document goes on after the bytes seen so far.
    Cut,
    /// The document is whole, or is no object, in which there is nothing to find.
    Complete,
    /// No JSON from this offset on. What was found before it still holds.
    Malformed(usize),
}

/// What the bytes seen so far say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanFacts<'a> {
    /// A name that is too long is cut: nothing serves it.
    pub model: ModelField<'a>,
    /// The answer is asked for as a stream of events.
    pub stream: bool,
    /// The known fields that are there and not null, the one that the cut goes through included.
    pub fields: FieldSet,
    /// An id that is too long is cut: no response has it.
    pub previous_response_id: Option<Cow<'a, str>>,
    /// The response is not to be kept.
    pub without_store: bool,
    /// The answer comes at once, and the work goes on without it.
    pub background: bool,
    /// About four times the prompt's tokens.
    pub prompt_bytes: u64,
    pub state: ScanProgress,
}

impl ScanFacts<'_> {
    pub fn has(&self, field: BodyField) -> bool {
        self.fields.contains(field)
    }

    /// The caller has chosen where the keys and values of the prompt lie: never try another upstream.
    pub fn kv_transfer(&self) -> bool {
        self.has(BodyField::KvTransferParams) || self.has(BodyField::EcTransferParams)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ScannedKind {
    String,
    Number,
    /// A number that pydantic takes for true, of a field that is true or false.
    One,
    True,
    False,
    Null,
    Container,
}

/// A top-level value that is whole.
#[derive(Clone, Copy, Debug)]
struct ScannedValue {
    kind: ScannedKind,
    start: usize,
    end: usize,
    prompt: u64,
}

/// Where in the document the scanner stands. Offsets are into the buffer.
#[derive(Clone, Copy, Debug)]
enum ScannerState {
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
    /// After the opening quote of a top-level string.
    InString {
        start: usize,
    },
    /// In a number or a literal.
    InScalar {
        start: usize,
    },
    /// In an object or array, outside strings.
    Nested {
        start: usize,
    },
    /// In an object or array, after the opening quote of a string.
    NestedString {
        start: usize,
        quote: usize,
    },
    CommaOrEnd,
    /// After the last bracket: white space only.
    End,
    NotAnObject,
    Malformed(usize),
}

/// See the module. Always give it the same buffer, grown at its end.
#[derive(Clone, Debug)]
pub struct Scanner {
    place: ScannerState,
    /// Everything before it has been looked at.
    at: usize,
    depth: u64,
    /// Of the value in progress.
    field: Option<BodyField>,
    prompt: u64,
    values: [Option<ScannedValue>; fields::FIELDS.len()],
}

impl Default for Scanner {
    fn default() -> Self {
        Scanner::new()
    }
}

// === impl Scanner: reading ===

impl Scanner {
    pub fn new() -> Self {
        Scanner {
            place: ScannerState::Start,
            at: 0,
            depth: 0,
            field: None,
            prompt: 0,
            values: [None; fields::FIELDS.len()],
        }
    }

    /// Looks at what the buffer has gained since the last call.
    pub fn scan(&mut self, body: &[u8]) {
        self.scan_with(body, &KnownValues::NOTHING);
    }

    fn scan_with(&mut self, body: &[u8], known: &KnownValues<'_>) {
        while let Some(&byte) = body.get(self.at) {
            spend(1);
            let moved = match self.place {
                ScannerState::Start => self.start(body),
                ScannerState::InKey { start } => self.key(body, start),
                ScannerState::InString { start } => self.string(body, start),
                ScannerState::InScalar { start } => self.scalar(body, start),
                ScannerState::Nested { start } => self.nested(body, start),
                ScannerState::NestedString { start, quote } => self.nested_string(body, start, quote),
                ScannerState::NotAnObject | ScannerState::Malformed(_) => false,
                ScannerState::BeforeValue => self.copy_known(body, known) || self.between(byte),
                _ => self.between(byte),
            };
            if !moved {
                return;
            }
        }
    }

    fn go(&mut self, at: usize, place: ScannerState) -> bool {
        self.at = at;
        self.place = place;
        true
    }

    /// The bytes end here; the place stays, all of them have been looked at.
    fn wait(&mut self, body: &[u8]) -> bool {
        self.at = body.len();
        false
    }

    fn start(&mut self, body: &[u8]) -> bool {
        if self.at == 0 {
            if body.starts_with(BYTE_ORDER_MARK) {
                return self.go(BYTE_ORDER_MARK.len(), ScannerState::Start);
            }
            if BYTE_ORDER_MARK.starts_with(body) {
                return false;
            }
        }
        let place = match body[self.at] {
            b' ' | b'\n' | b'\r' | b'\t' => ScannerState::Start,
            b'{' => ScannerState::KeyOrEnd,
            b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n' | b'N' | b'I' => ScannerState::NotAnObject,
            _ => ScannerState::Malformed(self.at),
        };
        self.go(self.at + 1, place)
    }

    /// One byte of the top-level object, outside keys and values.
    fn between(&mut self, byte: u8) -> bool {
        let next = self.at + 1;
        let place = match (self.place, byte) {
            (place, b' ' | b'\n' | b'\r' | b'\t') => place,
            (ScannerState::KeyOrEnd | ScannerState::Key, b'"') => ScannerState::InKey { start: next },
            (ScannerState::KeyOrEnd | ScannerState::CommaOrEnd, b'}') => ScannerState::End,
            (ScannerState::Colon, b':') => ScannerState::BeforeValue,
            (ScannerState::CommaOrEnd, b',') => ScannerState::Key,
            (ScannerState::BeforeValue, b'"') => ScannerState::InString { start: next },
            (ScannerState::BeforeValue, b'{' | b'[') => {
                self.depth = 1;
                ScannerState::Nested { start: self.at }
            }
            (ScannerState::BeforeValue, b'-' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z') => {
                ScannerState::InScalar { start: self.at }
            }
            _ => ScannerState::Malformed(self.at),
        };
        self.go(next, place)
    }

    fn key(&mut self, body: &[u8], start: usize) -> bool {
        let Some(end) = string_end(body, start, self.at) else {
            return self.wait(body);
        };
        self.field = BodyField::of_key(&body[start..end]);
        self.prompt = 0;
        self.go(end + 1, ScannerState::Colon)
    }

    fn string(&mut self, body: &[u8], start: usize) -> bool {
        let Some(end) = string_end(body, start, self.at) else {
            return self.wait(body);
        };
        self.prompt += string_weight(&body[start..end]);
        self.finish(ScannedKind::String, start - 1, end + 1)
    }

    fn scalar(&mut self, body: &[u8], start: usize) -> bool {
        let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
        let Some(length) = body[self.at..].iter().position(|byte| !is_part(byte)) else {
            spend(body.len() - self.at);
            return self.wait(body);
        };
        spend(length);
        let end = self.at + length;
        let kind = match &body[start..end] {
            b"true" => ScannedKind::True,
            b"false" => ScannedKind::False,
            b"null" => ScannedKind::Null,
            b"NaN" | b"Infinity" | b"-Infinity" => ScannedKind::Number,
            [b'-' | b'0'..=b'9', ..] => ScannedKind::Number,
            _ => return self.go(end, ScannerState::Malformed(start)),
        };
        if kind == ScannedKind::Number {
            self.prompt += NUMBER_WEIGHT_BYTES;
        }
        // Parsed here, and not whenever it is asked for: a number may be as long as the body.
        let is_flag = matches!(self.field, Some(BodyField::Stream | BodyField::Background));
        let is_one = is_flag && kind == ScannedKind::Number && is_true_number(&body[start..end]);
        self.finish(if is_one { ScannedKind::One } else { kind }, start, end)
    }

    /// The inside of an object or array: only quotes, brackets and the beginnings of numbers matter.
    fn nested(&mut self, body: &[u8], start: usize) -> bool {
        let mut at = self.at;
        let (mut depth, mut prompt) = (self.depth, self.prompt);
        let place = loop {
            let Some(&byte) = body.get(at) else {
                break ScannerState::Nested { start };
            };
            spend(1);
            match CLASSES[usize::from(byte)] {
                ByteClass::Other => at += 1,
                ByteClass::Number => {
                    let (length, numbers) = numbers_at(body, at);
                    prompt += NUMBER_WEIGHT_BYTES * numbers;
                    at += length;
                }
                ByteClass::Open => {
                    depth += 1;
                    at += 1;
                }
                ByteClass::Close => {
                    depth -= 1;
                    at += 1;
                    if depth == 0 {
                        self.prompt = prompt;
                        return self.finish(ScannedKind::Container, start, at);
                    }
                }
                ByteClass::Quote => match string_end(body, at + 1, at + 1) {
                    Some(end) => {
                        prompt += string_weight(&body[at + 1..end]);
                        at = end + 1;
                    }
                    None => break ScannerState::NestedString { start, quote: at + 1 },
                },
            }
        };
        (self.depth, self.prompt) = (depth, prompt);
        self.go(body.len(), place)
    }

    fn nested_string(&mut self, body: &[u8], start: usize, quote: usize) -> bool {
        let Some(end) = string_end(body, quote, self.at) else {
            return self.wait(body);
        };
        self.prompt += string_weight(&body[quote..end]);
        self.go(end + 1, ScannerState::Nested { start })
    }

    fn finish(&mut self, kind: ScannedKind, start: usize, end: usize) -> bool {
        if let Some(field) = self.field.take() {
            self.values[field.index()] = Some(ScannedValue { kind, start, end, prompt: self.prompt });
        }
        self.go(end, ScannerState::CommaOrEnd)
    }
}

// === impl Scanner: telling ===

impl Scanner {
    /// What is known so far, out of the buffer that was scanned.
    pub fn facts<'a>(&self, body: &'a [u8]) -> ScanFacts<'a> {
        let open = self.open_value();
        let mut fields = FieldSet::default();
        let mut prompt_bytes = 0;
        for (field, _) in fields::FIELDS {
            let is_open = open == Some(field);
            let whole = self.values[field.index()].filter(|_| !is_open);
            if is_open || whole.is_some_and(|value| value.kind != ScannedKind::Null) {
                fields.insert(field);
            }
            if field.is_prompt() {
                prompt_bytes += if is_open { self.open_prompt(body) } else { 0 };
                prompt_bytes += whole.map_or(0, |value| value.prompt);
            }
        }
        ScanFacts {
            model: self.model(body),
            stream: self.is_true(body, BodyField::Stream),
            fields,
            previous_response_id: self
                .string_of(body, BodyField::PreviousResponseId)
                .map(|raw| unescape_short(raw, MAX_RESPONSE_ID_BYTES)),
            without_store: self.values[BodyField::Store.index()]
                .is_some_and(|value| value.kind == ScannedKind::False),
            background: self.is_true(body, BodyField::Background),
            prompt_bytes,
            state: self.progress(),
        }
    }

    pub fn progress(&self) -> ScanProgress {
        match self.place {
            ScannerState::End | ScannerState::NotAnObject => ScanProgress::Complete,
            ScannerState::Malformed(offset) => ScanProgress::Malformed(offset),
            _ => ScanProgress::Cut,
        }
    }

    /// Where the value of a field stands, quotes and brackets included; the last one where the key comes
    /// twice. `None` until it is whole.
    pub fn span(&self, field: BodyField) -> Option<Range<usize>> {
        self.values[field.index()].map(|value| value.start..value.end)
    }

    /// Where the value of a field stands as far as it was seen, and whether that is all of it.
    pub fn seen(&self, field: BodyField) -> Option<(Range<usize>, bool)> {
        if self.open_value() != Some(field) {
            return Some((self.span(field)?, true));
        }
        let start = match self.place {
            ScannerState::InString { start } => start - 1,
            ScannerState::Nested { start } | ScannerState::NestedString { start, .. } => start,
            _ => return None,
        };
        Some((start..self.at, false))
    }

    fn model<'a>(&self, body: &'a [u8]) -> ModelField<'a> {
        match self.values[BodyField::Model.index()] {
            None | Some(ScannedValue { kind: ScannedKind::Null, .. }) => ModelField::Absent,
            Some(_) => self.string_of(body, BodyField::Model).map_or(ModelField::NotAString, |raw| {
                ModelField::named(unescape_short(raw, MAX_MODEL_NAME_BYTES))
            }),
        }
    }

    /// The bytes between the quotes of a field whose value is a string.
    fn string_of<'a>(&self, body: &'a [u8], field: BodyField) -> Option<&'a [u8]> {
        let value = self.values[field.index()].filter(|value| value.kind == ScannedKind::String)?;
        body.get(value.start + 1..value.end - 1)
    }

    fn is_true(&self, body: &[u8], field: BodyField) -> bool {
        let Some(value) = self.values[field.index()] else {
            return false;
        };
        match value.kind {
            ScannedKind::True | ScannedKind::One => true,
            ScannedKind::String => self
                .string_of(body, field)
                .filter(|raw| raw.len() <= MAX_TRUE_WORD_BYTES)
                .is_some_and(|raw| is_true_word(&unescape(raw))),
            ScannedKind::False | ScannedKind::Null | ScannedKind::Number | ScannedKind::Container => false,
        }
    }

    /// The field whose value the cut goes through, where it can no longer turn out to be null.
    fn open_value(&self) -> Option<BodyField> {
        match self.place {
            ScannerState::InString { .. }
            | ScannerState::Nested { .. }
            | ScannerState::NestedString { .. } => self.field,
            _ => None,
        }
    }

    fn open_prompt(&self, body: &[u8]) -> u64 {
        let string = match self.place {
            ScannerState::InString { start } | ScannerState::NestedString { quote: start, .. } => {
                body.get(start..self.at)
            }
            _ => None,
        };
        self.prompt + string.map_or(0, string_weight)
    }
}

#[inline]
fn string_weight(text: &[u8]) -> u64 {
    let length = text.len() as u64;
    if length > MEDIA_WEIGHT_BYTES && text.starts_with(b"data:") { MEDIA_WEIGHT_BYTES } else { length }
}

#[cfg(test)]
mod tests;
