//! Reads the facts that routing needs in one pass over a JSON body, which may be cut at any byte.
//!
//! A body can be megabytes and is looked at before an upstream is chosen, so this is the hottest loop
//! of the balancer. It finds the top-level fields, and skips what is inside them: in strings from quote
//! to quote at the speed of memory, elsewhere byte by byte with a counter for the depth.
//!
//! The scanner stops where the bytes end and goes on from there when the same buffer has grown, so that
//! a body costs one pass however it is cut: see [`GrowingObject`], which also says where it is laxer than
//! vLLM. Where Python's `json` and others differ, Python is followed: the last of two equal keys wins.
//!
//! Never: a tree of the document, recursion, a copy of the body, a panic.

mod fields;
mod known;
pub(crate) mod tail;

use std::borrow::Cow;
use std::ops::Range;

pub use self::fields::{BodyField, FieldSet};
use super::value::{
    MAX_MODEL_NAME_BYTES, MAX_RESPONSE_ID_BYTES, MAX_TRUE_WORD_BYTES, ModelField, is_true_number,
    is_true_word, unescape_short,
};
pub use crate::json::ScanProgress;
use crate::json::{GrowingObject, GrownValue, MemberKind, MemberSink, ScalarKind, ValueMeter, unescape};

/// How much of a string that is a `data:` URL counts as prompt: 1,000 tokens, about what an image costs.
/// Its base64 is megabytes, none of which is read as text.
const MEDIA_WEIGHT_BYTES: u64 = 4096;

/// What a number counts as prompt: it is a token id, and a token stands for four bytes.
const NUMBER_WEIGHT_BYTES: u64 = 4;

/// The facts in the bytes read so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanFacts<'a> {
    /// A name above the limit is cut: no upstream serves it.
    pub model: ModelField<'a>,
    /// Whether the client requests a stream of events.
    pub stream: bool,
    /// The known fields that are present and not null, including one that is cut.
    pub fields: FieldSet,
    /// An id that is too long is cut: no response has it.
    pub previous_response_id: Option<Cow<'a, str>>,
    /// Whether the response must not be stored.
    pub without_store: bool,
    /// Whether the response is generated in the background.
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

/// A top-level value that is whole.
#[derive(Clone, Copy, Debug)]
struct ScannedValue {
    kind: MemberKind,
    /// A number that pydantic takes for true, of a field that is true or false.
    is_one: bool,
    start: usize,
    end: usize,
    prompt: u64,
}

/// About four times the tokens of a value.
#[derive(Clone, Copy, Debug, Default)]
struct PromptWeight(u64);

/// Scans one body. Every call must pass the same buffer, grown at its end.
#[derive(Clone, Debug)]
pub struct Scanner {
    object: GrowingObject<PromptWeight>,
    found: FieldValues,
}

/// The values of the known fields.
#[derive(Clone, Debug)]
struct FieldValues {
    /// Of the value in progress.
    field: Option<BodyField>,
    values: [Option<ScannedValue>; fields::FIELDS.len()],
}

impl Default for Scanner {
    fn default() -> Self {
        Scanner::new()
    }
}

impl ValueMeter for PromptWeight {
    const COUNTS_NUMBERS: bool = true;

    #[inline]
    fn string(&mut self, text: &[u8]) {
        self.0 += string_weight(text);
    }

    #[inline]
    fn numbers(&mut self, count: u64) {
        self.0 += NUMBER_WEIGHT_BYTES * count;
    }
}

// === impl FieldValues ===

impl MemberSink<PromptWeight> for FieldValues {
    fn key(&mut self, raw: &[u8]) {
        self.field = BodyField::of_key(raw);
    }

    fn value(&mut self, body: &[u8], value: GrownValue<PromptWeight>) {
        let Some(field) = self.field.take() else { return };
        let Some((kind, PromptWeight(prompt))) = value.read else { return };
        let (start, end) = (value.span.start, value.span.end);
        // Parsed here, and not whenever it is asked for: a number may be as long as the body.
        let is_flag = matches!(field, BodyField::Stream | BodyField::Background);
        let is_number = kind == MemberKind::Scalar(ScalarKind::Number);
        let is_one = is_flag && is_number && is_true_number(&body[value.span]);
        self.values[field.index()] = Some(ScannedValue { kind, is_one, start, end, prompt });
    }
}

// === impl Scanner: reading ===

impl Scanner {
    pub fn new() -> Self {
        let found = FieldValues { field: None, values: [None; fields::FIELDS.len()] };
        Scanner { object: GrowingObject::new(), found }
    }

    /// Scans the bytes that the buffer has gained since the last call.
    pub fn scan(&mut self, body: &[u8]) {
        self.object.read(body, &mut self.found);
    }
}

// === impl Scanner: results ===

impl Scanner {
    /// The facts so far, from the buffer that was scanned.
    pub fn facts<'a>(&self, body: &'a [u8]) -> ScanFacts<'a> {
        let open = self.open_value();
        let mut fields = FieldSet::default();
        let mut prompt_bytes = 0;
        for (field, _) in fields::FIELDS {
            let is_open = open == Some(field);
            let whole = self.found.values[field.index()].filter(|_| !is_open);
            if is_open || whole.is_some_and(|value| !value.is_null()) {
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
            without_store: self.found.values[BodyField::Store.index()]
                .is_some_and(|value| value.kind == MemberKind::Scalar(ScalarKind::False)),
            background: self.is_true(body, BodyField::Background),
            prompt_bytes,
            state: self.progress(),
        }
    }

    pub fn progress(&self) -> ScanProgress {
        self.object.progress()
    }

    /// Where the value of a field stands, quotes and brackets included; the last one where the key comes
    /// twice. `None` until it is whole.
    pub fn span(&self, field: BodyField) -> Option<Range<usize>> {
        self.found.values[field.index()].map(|value| value.start..value.end)
    }

    /// Where the value of a field stands as far as it was seen, and whether that is all of it.
    pub fn seen(&self, field: BodyField) -> Option<(Range<usize>, bool)> {
        match self.object.open_value() {
            Some(open) if self.found.field == Some(field) => {
                Some((open.start..self.object.examined(), false))
            }
            _ => Some((self.span(field)?, true)),
        }
    }

    fn model<'a>(&self, body: &'a [u8]) -> ModelField<'a> {
        match self.found.values[BodyField::Model.index()] {
            None => ModelField::Absent,
            Some(value) if value.is_null() => ModelField::Absent,
            Some(_) => self.string_of(body, BodyField::Model).map_or(ModelField::NotAString, |raw| {
                ModelField::named(unescape_short(raw, MAX_MODEL_NAME_BYTES))
            }),
        }
    }

    /// The bytes between the quotes of a field whose value is a string.
    fn string_of<'a>(&self, body: &'a [u8], field: BodyField) -> Option<&'a [u8]> {
        let value = self.found.values[field.index()].filter(|value| value.kind == MemberKind::String)?;
        body.get(value.start + 1..value.end - 1)
    }

    fn is_true(&self, body: &[u8], field: BodyField) -> bool {
        let Some(value) = self.found.values[field.index()] else {
            return false;
        };
        match value.kind {
            MemberKind::Scalar(kind) => kind == ScalarKind::True || value.is_one,
            MemberKind::String => self
                .string_of(body, field)
                .filter(|raw| raw.len() <= MAX_TRUE_WORD_BYTES)
                .is_some_and(|raw| is_true_word(&unescape(raw))),
            MemberKind::Container => false,
        }
    }

    /// The field whose value the cut goes through, where it can no longer turn out to be null.
    fn open_value(&self) -> Option<BodyField> {
        self.object.open_value().and(self.found.field)
    }

    fn open_prompt(&self, body: &[u8]) -> u64 {
        let PromptWeight(mut weight) = self.object.open_meter();
        let text = self.object.open_value().and_then(|open| open.text);
        if let Some(text) = text.and_then(|start| body.get(start..self.object.examined())) {
            weight += string_weight(text);
        }
        weight
    }
}

impl ScannedValue {
    fn is_null(&self) -> bool {
        self.kind == MemberKind::Scalar(ScalarKind::Null)
    }
}

#[inline]
fn string_weight(text: &[u8]) -> u64 {
    let length = text.len() as u64;
    if length > MEDIA_WEIGHT_BYTES && text.starts_with(b"data:") { MEDIA_WEIGHT_BYTES } else { length }
}

#[cfg(test)]
mod tests;
