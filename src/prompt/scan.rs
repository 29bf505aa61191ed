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
use self::bytes::{CLASSES, Class, numbers_at};
pub use self::fields::{Field, FieldSet};
use self::known::Known;
pub use self::tail::DocumentTail;
use super::value::{
    MAX_MODEL_NAME_BYTES, MAX_RESPONSE_ID_BYTES, MAX_TRUE_WORD_BYTES, Model, is_true_number, is_true_word,
    unescape, unescape_short,
};
use super::work::spend;

/// How much of a string that is a `data:` URL counts as prompt: 1,000 tokens, about what an image costs.
/// Its base64 is megabytes, none of which is read as text.
const MEDIA_BYTES: u64 = 4096;

/// What a number counts as prompt: it is a token id, and a token stands for four bytes.
const NUMBER_BYTES: u64 = 4;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// How far the scanner has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The document goes on after the bytes seen so far.
    Cut,
    /// The document is whole, or is no object, in which there is nothing to find.
    Complete,
    /// No JSON from this offset on. What was found before it still holds.
    Malformed(usize),
}

/// What the bytes seen so far say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts<'a> {
    /// A name that is too long is cut: nothing serves it.
    pub model: Model<'a>,
    /// The answer is asked for as a stream of events.
    pub stream: bool,
    /// The known fields that are there and not null, the one that the cut goes through included.
    pub fields: FieldSet,
    /// An id that is too long is cut: no response has it.
    pub previous_response_id: Option<Cow<'a, str>>,
    /// The response is not to be kept.
    pub forgets: bool,
    /// The answer comes at once, and the work goes on without it.
    pub background: bool,
    /// About four times the prompt's tokens.
    pub prompt_bytes: u64,
    pub state: Progress,
}

impl Facts<'_> {
    pub fn has(&self, field: Field) -> bool {
        self.fields.contains(field)
    }

    /// The caller has chosen where the keys and values of the prompt lie: never try another upstream.
    pub fn kv_transfer(&self) -> bool {
        self.has(Field::KvTransferParams) || self.has(Field::EcTransferParams)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
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
struct Value {
    kind: Kind,
    start: usize,
    end: usize,
    prompt: u64,
}

/// Where in the document the scanner stands. Offsets are into the buffer.
#[derive(Clone, Copy, Debug)]
enum Place {
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
    place: Place,
    /// Everything before it has been looked at.
    at: usize,
    depth: u64,
    /// Of the value in progress.
    field: Option<Field>,
    prompt: u64,
    values: [Option<Value>; fields::FIELDS.len()],
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
            place: Place::Start,
            at: 0,
            depth: 0,
            field: None,
            prompt: 0,
            values: [None; fields::FIELDS.len()],
        }
    }

    /// Looks at what the buffer has gained since the last call.
    pub fn scan(&mut self, body: &[u8]) {
        self.scan_with(body, &Known::NOTHING);
    }

    fn scan_with(&mut self, body: &[u8], known: &Known<'_>) {
        while let Some(&byte) = body.get(self.at) {
            spend(1);
            let moved = match self.place {
                Place::Start => self.start(body),
                Place::InKey { start } => self.key(body, start),
                Place::InString { start } => self.string(body, start),
                Place::InScalar { start } => self.scalar(body, start),
                Place::Nested { start } => self.nested(body, start),
                Place::NestedString { start, quote } => self.nested_string(body, start, quote),
                Place::NotAnObject | Place::Malformed(_) => false,
                Place::BeforeValue => self.take_known(body, known) || self.between(byte),
                _ => self.between(byte),
            };
            if !moved {
                return;
            }
        }
    }

    fn go(&mut self, at: usize, place: Place) -> bool {
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
                return self.go(BYTE_ORDER_MARK.len(), Place::Start);
            }
            if BYTE_ORDER_MARK.starts_with(body) {
                return false;
            }
        }
        let place = match body[self.at] {
            b' ' | b'\n' | b'\r' | b'\t' => Place::Start,
            b'{' => Place::KeyOrEnd,
            b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n' | b'N' | b'I' => Place::NotAnObject,
            _ => Place::Malformed(self.at),
        };
        self.go(self.at + 1, place)
    }

    /// One byte of the top-level object, outside keys and values.
    fn between(&mut self, byte: u8) -> bool {
        let next = self.at + 1;
        let place = match (self.place, byte) {
            (place, b' ' | b'\n' | b'\r' | b'\t') => place,
            (Place::KeyOrEnd | Place::Key, b'"') => Place::InKey { start: next },
            (Place::KeyOrEnd | Place::CommaOrEnd, b'}') => Place::End,
            (Place::Colon, b':') => Place::BeforeValue,
            (Place::CommaOrEnd, b',') => Place::Key,
            (Place::BeforeValue, b'"') => Place::InString { start: next },
            (Place::BeforeValue, b'{' | b'[') => {
                self.depth = 1;
                Place::Nested { start: self.at }
            }
            (Place::BeforeValue, b'-' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z') => {
                Place::InScalar { start: self.at }
            }
            _ => Place::Malformed(self.at),
        };
        self.go(next, place)
    }

    fn key(&mut self, body: &[u8], start: usize) -> bool {
        let Some(end) = string_end(body, start, self.at) else {
            return self.wait(body);
        };
        self.field = Field::of_key(&body[start..end]);
        self.prompt = 0;
        self.go(end + 1, Place::Colon)
    }

    fn string(&mut self, body: &[u8], start: usize) -> bool {
        let Some(end) = string_end(body, start, self.at) else {
            return self.wait(body);
        };
        self.prompt += string_weight(&body[start..end]);
        self.finish(Kind::String, start - 1, end + 1)
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
            b"true" => Kind::True,
            b"false" => Kind::False,
            b"null" => Kind::Null,
            b"NaN" | b"Infinity" | b"-Infinity" => Kind::Number,
            [b'-' | b'0'..=b'9', ..] => Kind::Number,
            _ => return self.go(end, Place::Malformed(start)),
        };
        if kind == Kind::Number {
            self.prompt += NUMBER_BYTES;
        }
        // Parsed here, and not whenever it is asked for: a number may be as long as the body.
        let is_flag = matches!(self.field, Some(Field::Stream | Field::Background));
        let is_one = is_flag && kind == Kind::Number && is_true_number(&body[start..end]);
        self.finish(if is_one { Kind::One } else { kind }, start, end)
    }

    /// The inside of an object or array: only quotes, brackets and the beginnings of numbers matter.
    fn nested(&mut self, body: &[u8], start: usize) -> bool {
        let mut at = self.at;
        let (mut depth, mut prompt) = (self.depth, self.prompt);
        let place = loop {
            let Some(&byte) = body.get(at) else {
                break Place::Nested { start };
            };
            spend(1);
            match CLASSES[usize::from(byte)] {
                Class::Other => at += 1,
                Class::Number => {
                    let (length, numbers) = numbers_at(body, at);
                    prompt += NUMBER_BYTES * numbers;
                    at += length;
                }
                Class::Open => {
                    depth += 1;
                    at += 1;
                }
                Class::Close => {
                    depth -= 1;
                    at += 1;
                    if depth == 0 {
                        self.prompt = prompt;
                        return self.finish(Kind::Container, start, at);
                    }
                }
                Class::Quote => match string_end(body, at + 1, at + 1) {
                    Some(end) => {
                        prompt += string_weight(&body[at + 1..end]);
                        at = end + 1;
                    }
                    None => break Place::NestedString { start, quote: at + 1 },
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
        self.go(end + 1, Place::Nested { start })
    }

    fn finish(&mut self, kind: Kind, start: usize, end: usize) -> bool {
        if let Some(field) = self.field.take() {
            self.values[field.index()] = Some(Value { kind, start, end, prompt: self.prompt });
        }
        self.go(end, Place::CommaOrEnd)
    }
}

// === impl Scanner: telling ===

impl Scanner {
    /// What is known so far, out of the buffer that was scanned.
    pub fn facts<'a>(&self, body: &'a [u8]) -> Facts<'a> {
        let open = self.open_value();
        let mut fields = FieldSet::default();
        let mut prompt_bytes = 0;
        for (field, _) in fields::FIELDS {
            let is_open = open == Some(field);
            let whole = self.values[field.index()].filter(|_| !is_open);
            if is_open || whole.is_some_and(|value| value.kind != Kind::Null) {
                fields.insert(field);
            }
            if field.is_prompt() {
                prompt_bytes += if is_open { self.open_prompt(body) } else { 0 };
                prompt_bytes += whole.map_or(0, |value| value.prompt);
            }
        }
        Facts {
            model: self.model(body),
            stream: self.is_true(body, Field::Stream),
            fields,
            previous_response_id: self
                .string_of(body, Field::PreviousResponseId)
                .map(|raw| unescape_short(raw, MAX_RESPONSE_ID_BYTES)),
            forgets: self.values[Field::Store.index()].is_some_and(|value| value.kind == Kind::False),
            background: self.is_true(body, Field::Background),
            prompt_bytes,
            state: self.progress(),
        }
    }

    pub fn progress(&self) -> Progress {
        match self.place {
            Place::End | Place::NotAnObject => Progress::Complete,
            Place::Malformed(offset) => Progress::Malformed(offset),
            _ => Progress::Cut,
        }
    }

    /// Where the value of a field stands, quotes and brackets included; the last one where the key comes
    /// twice. `None` until it is whole.
    pub fn span(&self, field: Field) -> Option<Range<usize>> {
        self.values[field.index()].map(|value| value.start..value.end)
    }

    /// Where the value of a field stands as far as it was seen, and whether that is all of it.
    pub fn seen(&self, field: Field) -> Option<(Range<usize>, bool)> {
        if self.open_value() != Some(field) {
            return Some((self.span(field)?, true));
        }
        let start = match self.place {
            Place::InString { start } => start - 1,
            Place::Nested { start } | Place::NestedString { start, .. } => start,
            _ => return None,
        };
        Some((start..self.at, false))
    }

    fn model<'a>(&self, body: &'a [u8]) -> Model<'a> {
        match self.values[Field::Model.index()] {
            None | Some(Value { kind: Kind::Null, .. }) => Model::Absent,
            Some(_) => self
                .string_of(body, Field::Model)
                .map_or(Model::NotAString, |raw| Model::named(unescape_short(raw, MAX_MODEL_NAME_BYTES))),
        }
    }

    /// The bytes between the quotes of a field whose value is a string.
    fn string_of<'a>(&self, body: &'a [u8], field: Field) -> Option<&'a [u8]> {
        let value = self.values[field.index()].filter(|value| value.kind == Kind::String)?;
        body.get(value.start + 1..value.end - 1)
    }

    fn is_true(&self, body: &[u8], field: Field) -> bool {
        let Some(value) = self.values[field.index()] else {
            return false;
        };
        match value.kind {
            Kind::True | Kind::One => true,
            Kind::String => self
                .string_of(body, field)
                .filter(|raw| raw.len() <= MAX_TRUE_WORD_BYTES)
                .is_some_and(|raw| is_true_word(&unescape(raw))),
            Kind::False | Kind::Null | Kind::Number | Kind::Container => false,
        }
    }

    /// The field whose value the cut goes through, where it can no longer turn out to be null.
    fn open_value(&self) -> Option<Field> {
        match self.place {
            Place::InString { .. } | Place::Nested { .. } | Place::NestedString { .. } => self.field,
            _ => None,
        }
    }

    fn open_prompt(&self, body: &[u8]) -> u64 {
        let string = match self.place {
            Place::InString { start } | Place::NestedString { quote: start, .. } => body.get(start..self.at),
            _ => None,
        };
        self.prompt + string.map_or(0, string_weight)
    }
}

#[inline]
fn string_weight(text: &[u8]) -> u64 {
    let length = text.len() as u64;
    if length > MEDIA_BYTES && text.starts_with(b"data:") { MEDIA_BYTES } else { length }
}

#[cfg(test)]
mod tests;
