//! One document of JSON, read in pieces for the few names that tell of usage.
//!
//! Only objects in which such a name may stand are entered. All else is skipped: strings from quote to
//! quote, and between them only brackets are counted. A document that is none is read no further.

use super::{MeterReadings, StreamError, UsageCounts};
use crate::sse::count_work;

/// The longest name or word that is kept.
const MAX_WORD_BYTES: usize = 96;

/// `usage`'s details inside of `usage` inside of `response` inside of the document.
const MAX_SCOPE_DEPTH: usize = 4;

/// An object that is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UsageScope {
    Top,
    /// `response` or `message` of an event.
    Answer,
    Usage,
    PromptDetails,
    OutputDetails,
    Error,
}

/// What the parser does with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueUse {
    Nothing,
    Inside(UsageScope),
    Id,
    Type,
    Number(UsageField),
    Code,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UsageField {
    Prompt,
    Input,
    CacheRead,
    CacheCreation,
    Cached,
    Output,
    Reasoning,
}

#[derive(Clone, Copy, Debug)]
enum UsageParserState {
    Start,
    /// After `{`.
    KeyOrEnd,
    /// After a comma in an object.
    BeforeKey,
    Key,
    Colon,
    BeforeValue,
    /// In a string that is wanted.
    Word,
    /// In a string that is not.
    Text,
    /// In a number or a literal: its value as far as it is a whole number.
    Scalar(Option<u64>),
    /// In an object or a list that is not entered, with so many open brackets.
    Skip(u64),
    /// In a string in there.
    SkipText(u64),
    CommaOrEnd,
    /// After the end, or after something that is no JSON.
    Over,
}

/// See the module.
#[derive(Debug)]
pub(super) struct UsageDocument {
    place: UsageParserState,
    value_use: ValueUse,
    /// The scopes that are open, of which the last is the present one.
    scopes: [UsageScope; MAX_SCOPE_DEPTH],
    open: usize,
    /// The last chunk ended with a backslash in a string.
    escaped: bool,
    word: ParsedWord,
    /// Of the present usage.
    counts: UsageCounts,
}

/// A name or a word in progress.
#[derive(Debug)]
struct ParsedWord {
    bytes: [u8; MAX_WORD_BYTES],
    length: usize,
    /// Too long or with escapes: none that is known.
    is_strange: bool,
}

impl Default for UsageDocument {
    fn default() -> Self {
        UsageDocument {
            place: UsageParserState::Start,
            value_use: ValueUse::Nothing,
            scopes: [UsageScope::Top; MAX_SCOPE_DEPTH],
            open: 0,
            escaped: false,
            word: ParsedWord { bytes: [0; MAX_WORD_BYTES], length: 0, is_strange: false },
            counts: UsageCounts::default(),
        }
    }
}

// === impl Document ===

impl UsageDocument {
    /// Takes the next piece.
    pub(super) fn feed(&mut self, piece: &[u8], found: &mut MeterReadings) {
        count_work(piece.len());
        let mut rest = piece;
        while let Some(&byte) = rest.first() {
            rest = match self.place {
                UsageParserState::Over => return,
                UsageParserState::Key | UsageParserState::Word => self.word(rest, found),
                UsageParserState::Text => self.text(rest, UsageParserState::CommaOrEnd),
                UsageParserState::SkipText(depth) => self.text(rest, UsageParserState::Skip(depth)),
                UsageParserState::Skip(depth) => self.skip(rest, depth),
                UsageParserState::Scalar(value) => self.scalar(rest, value, found),
                _ => {
                    self.between(byte, found);
                    &rest[1..]
                }
            };
        }
    }

    fn scope(&self) -> UsageScope {
        self.scopes[self.open.saturating_sub(1)]
    }

    /// One byte outside of values and names.
    fn between(&mut self, byte: u8, found: &mut MeterReadings) {
        self.place = match (self.place, byte) {
            (place, b' ' | b'\n' | b'\r' | b'\t') => place,
            (UsageParserState::Start, b'{') => self.enter(UsageScope::Top, found),
            (UsageParserState::KeyOrEnd | UsageParserState::BeforeKey, b'"') => {
                self.word.clear();
                UsageParserState::Key
            }
            (UsageParserState::Colon, b':') => UsageParserState::BeforeValue,
            (UsageParserState::BeforeValue, b'"') => match self.value_use {
                ValueUse::Id | ValueUse::Type => {
                    self.word.clear();
                    UsageParserState::Word
                }
                ValueUse::Inside(UsageScope::Error) => {
                    found.fail();
                    UsageParserState::Text
                }
                _ => UsageParserState::Text,
            },
            (UsageParserState::BeforeValue, b'{') => match self.value_use {
                ValueUse::Inside(scope) => self.enter(scope, found),
                _ => UsageParserState::Skip(1),
            },
            (UsageParserState::BeforeValue, b'[') => UsageParserState::Skip(1),
            (UsageParserState::BeforeValue, b'0'..=b'9') => {
                UsageParserState::Scalar(Some(u64::from(byte - b'0')))
            }
            (UsageParserState::BeforeValue, b'-' | b'a'..=b'z' | b'A'..=b'Z') => {
                UsageParserState::Scalar(None)
            }
            (UsageParserState::CommaOrEnd, b',') => UsageParserState::BeforeKey,
            (UsageParserState::CommaOrEnd | UsageParserState::KeyOrEnd, b'}') => self.leave(found),
            _ => UsageParserState::Over,
        };
    }

    fn enter(&mut self, scope: UsageScope, found: &mut MeterReadings) -> UsageParserState {
        self.scopes[self.open] = scope;
        self.open += 1;
        match scope {
            UsageScope::Usage => self.counts = UsageCounts::default(),
            UsageScope::Error => found.fail(),
            _ => {}
        }
        UsageParserState::KeyOrEnd
    }

    fn leave(&mut self, found: &mut MeterReadings) -> UsageParserState {
        if self.scope() == UsageScope::Usage {
            found.counts.update(&self.counts);
        }
        self.open -= 1;
        if self.open == 0 { UsageParserState::Over } else { UsageParserState::CommaOrEnd }
    }

    /// The inside of a name or of a word that is wanted.
    fn word<'p>(&mut self, rest: &'p [u8], found: &mut MeterReadings) -> &'p [u8] {
        let (length, is_over) = self.string(rest);
        self.word.push(&rest[..length]);
        if !is_over {
            return &[];
        }
        if let UsageParserState::Key = self.place {
            self.value_use = value_use(self.scope(), self.word.known());
            self.place = UsageParserState::Colon;
        } else {
            self.report(found);
            self.place = UsageParserState::CommaOrEnd;
        }
        &rest[length + 1..]
    }

    /// Skips the rest of an unused string, and what follows it.
    fn text<'p>(&mut self, rest: &'p [u8], then: UsageParserState) -> &'p [u8] {
        let (length, is_over) = self.string(rest);
        if !is_over {
            return &[];
        }
        self.place = then;
        &rest[length + 1..]
    }

    /// How much of the rest belongs to the string in progress, and whether its closing quote follows.
    fn string(&mut self, rest: &[u8]) -> (usize, bool) {
        let mut at = usize::from(std::mem::take(&mut self.escaped));
        while let Some(length) = find_special(&rest[at..]) {
            at += length;
            if rest[at] == b'"' {
                return (at, true);
            }
            at += 2;
            if at > rest.len() {
                self.escaped = true;
                break;
            }
        }
        (rest.len(), false)
    }

    /// The inside of an object or a list that is not entered, outside of its strings.
    fn skip<'p>(&mut self, rest: &'p [u8], mut depth: u64) -> &'p [u8] {
        // A list that earlier pieces began goes on here.
        let mut at = plain_windows(rest);
        while let Some(byte) = rest.get(at) {
            at += 1;
            match byte {
                b'"' => {
                    self.place = UsageParserState::SkipText(depth);
                    return &rest[at..];
                }
                b'{' | b'[' => {
                    depth += 1;
                    at += plain_windows(&rest[at..]);
                }
                b'}' | b']' => {
                    depth -= 1;
                    if depth == 0 {
                        self.place = UsageParserState::CommaOrEnd;
                        return &rest[at..];
                    }
                }
                _ => {}
            }
        }
        self.place = UsageParserState::Skip(depth);
        &[]
    }

    fn scalar<'p>(&mut self, rest: &'p [u8], mut value: Option<u64>, found: &mut MeterReadings) -> &'p [u8] {
        for (at, &byte) in rest.iter().enumerate() {
            match byte {
                b'0'..=b'9' => {
                    let tenfold = value.and_then(|value| value.checked_mul(10));
                    value = tenfold.and_then(|tenfold| tenfold.checked_add(u64::from(byte - b'0')));
                }
                b'+' | b'-' | b'.' | b'a'..=b'z' | b'A'..=b'Z' => value = None,
                _ => {
                    match (self.value_use, value) {
                        (ValueUse::Number(count), Some(value)) => self.counts.set(count, value),
                        (ValueUse::Code, Some(code @ 400..600)) => {
                            found.failure = Some(StreamError { code: u16::try_from(code).ok() });
                        }
                        _ => {}
                    }
                    self.place = UsageParserState::CommaOrEnd;
                    return &rest[at..];
                }
            }
        }
        self.place = UsageParserState::Scalar(value);
        &[]
    }

    /// A word that was wanted has ended.
    fn report(&mut self, found: &mut MeterReadings) {
        let Some(word) = self.word.known() else { return };
        match (self.value_use, word) {
            (ValueUse::Type, b"error" | b"response.failed") => found.fail(),
            (ValueUse::Id, id) if found.id.is_none() && !id.is_empty() => {
                found.id = std::str::from_utf8(id).ok().map(Box::from);
            }
            _ => {}
        }
    }
}

/// How many of the next bytes are neither quotes nor brackets, in whole windows: lists of token ids are long.
fn plain_windows(bytes: &[u8]) -> usize {
    const WINDOW: usize = 32;
    // Bytes of 0 and 1 are compared many at a time, which truth values are not.
    let structure =
        |byte: u8| u8::from(byte == b'"') | u8::from(byte | 0x20 == b'{') | u8::from(byte | 0x20 == b'}');
    let is_plain =
        |window: &&[u8; WINDOW]| window.iter().fold(0, |found, byte| found | structure(*byte)) == 0;
    bytes.as_chunks::<WINDOW>().0.iter().take_while(is_plain).count() * WINDOW
}

/// Where the first quote or backslash stands. Most strings of an answer are names and words, too short for
/// a search by vectors to pay.
fn find_special(text: &[u8]) -> Option<usize> {
    const SHORT: usize = 16;
    let is_special = |byte: &u8| matches!(byte, b'"' | b'\\');
    let (short, long) = text.split_at(text.len().min(SHORT));
    let near = short.iter().position(is_special);
    near.or_else(|| memchr::memchr2(b'"', b'\\', long).map(|at| at + SHORT))
}

/// What the value of a key is wanted for.
fn value_use(scope: UsageScope, key: Option<&[u8]>) -> ValueUse {
    let Some(key) = key else { return ValueUse::Nothing };
    match (scope, key) {
        (UsageScope::Top | UsageScope::Answer, b"usage") => ValueUse::Inside(UsageScope::Usage),
        (UsageScope::Top | UsageScope::Answer, b"id") => ValueUse::Id,
        (UsageScope::Top | UsageScope::Answer, b"error") => ValueUse::Inside(UsageScope::Error),
        (UsageScope::Top, b"type" | b"object") => ValueUse::Type,
        (UsageScope::Error, b"code") => ValueUse::Code,
        (UsageScope::Top, b"response" | b"message") => ValueUse::Inside(UsageScope::Answer),
        (UsageScope::Usage, b"prompt_tokens") => ValueUse::Number(UsageField::Prompt),
        (UsageScope::Usage, b"input_tokens") => ValueUse::Number(UsageField::Input),
        (UsageScope::Usage, b"cache_read_input_tokens") => ValueUse::Number(UsageField::CacheRead),
        (UsageScope::Usage, b"cache_creation_input_tokens") => ValueUse::Number(UsageField::CacheCreation),
        (UsageScope::Usage, b"completion_tokens" | b"output_tokens") => ValueUse::Number(UsageField::Output),
        (UsageScope::Usage, b"prompt_tokens_details" | b"input_tokens_details") => {
            ValueUse::Inside(UsageScope::PromptDetails)
        }
        (UsageScope::Usage, b"completion_tokens_details" | b"output_tokens_details") => {
            ValueUse::Inside(UsageScope::OutputDetails)
        }
        (UsageScope::PromptDetails, b"cached_tokens") => ValueUse::Number(UsageField::Cached),
        (UsageScope::OutputDetails, b"reasoning_tokens") => ValueUse::Number(UsageField::Reasoning),
        _ => ValueUse::Nothing,
    }
}

impl UsageCounts {
    fn set(&mut self, count: UsageField, value: u64) {
        let place = match count {
            UsageField::Prompt => &mut self.prompt,
            UsageField::Input => &mut self.input,
            UsageField::CacheRead => &mut self.cache_read,
            UsageField::CacheCreation => &mut self.cache_creation,
            UsageField::Cached => &mut self.cached,
            UsageField::Output => &mut self.output,
            UsageField::Reasoning => &mut self.reasoning,
        };
        *place = Some(value);
    }
}

// === impl Word ===

impl ParsedWord {
    fn clear(&mut self) {
        self.length = 0;
        self.is_strange = false;
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        if self.is_strange || end > MAX_WORD_BYTES || memchr::memchr(b'\\', bytes).is_some() {
            self.is_strange = true;
            return;
        }
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }

    fn known(&self) -> Option<&[u8]> {
        (!self.is_strange).then(|| &self.bytes[..self.length])
    }
}
