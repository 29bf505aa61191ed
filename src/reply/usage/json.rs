//! Reads the usage members of one JSON document, which arrives in pieces.
//!
//! Only objects that may have such a member are entered; a [`ChunkWalker`] skips all others.

use super::readings::{MeterReadings, StreamError, UsageCounts};
use crate::json::{ChunkVisitor, ChunkWalker};
use crate::sse::count_work;

/// The longest name or word that is kept.
const MAX_WORD_BYTES: usize = 96;

/// The deepest scope: the details in `usage` in `response` in the document.
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

/// The use of a member's value.
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

/// One JSON document, which arrives in pieces.
#[derive(Debug)]
pub(super) struct UsageDocument {
    walker: ChunkWalker,
    members: UsageMembers,
}

/// The state of the search for the members, as far as the document has been read.
#[derive(Debug)]
struct UsageMembers {
    value_use: ValueUse,
    /// The open scopes; the last one is the current one.
    scopes: [UsageScope; MAX_SCOPE_DEPTH],
    open: usize,
    word: ParsedWord,
    /// The value of the number in progress; `None` once it is not an integer.
    number: Option<u64>,
    /// The numbers of the current usage.
    counts: UsageCounts,
}

/// The members of a document, and the readings that they update.
struct UsageVisitor<'m, 'f> {
    members: &'m mut UsageMembers,
    found: &'f mut MeterReadings,
}

/// A name or a word in progress.
#[derive(Debug)]
struct ParsedWord {
    bytes: [u8; MAX_WORD_BYTES],
    length: usize,
    /// Too long or with escapes, hence no known word.
    is_strange: bool,
    /// The key or the text has ended.
    is_over: bool,
}

impl Default for UsageDocument {
    fn default() -> Self {
        UsageDocument {
            walker: ChunkWalker::new(),
            members: UsageMembers {
                value_use: ValueUse::Nothing,
                scopes: [UsageScope::Top; MAX_SCOPE_DEPTH],
                open: 0,
                word: ParsedWord { bytes: [0; MAX_WORD_BYTES], length: 0, is_strange: false, is_over: false },
                number: None,
                counts: UsageCounts::default(),
            },
        }
    }
}

// === impl UsageDocument ===

impl UsageDocument {
    /// Reads the next piece.
    pub(super) fn feed(&mut self, piece: &[u8], found: &mut MeterReadings) {
        count_work(piece.len());
        self.walker.read(piece, &mut UsageVisitor { members: &mut self.members, found });
    }
}

// === impl UsageMembers ===

impl UsageMembers {
    fn scope(&self) -> UsageScope {
        self.scopes[self.open.saturating_sub(1)]
    }

    fn enter(&mut self, scope: UsageScope, found: &mut MeterReadings) {
        self.scopes[self.open] = scope;
        self.open += 1;
        match scope {
            UsageScope::Usage => self.counts = UsageCounts::default(),
            UsageScope::Error => found.fail(),
            _ => {}
        }
    }

    /// Stores the word that has ended, according to its use.
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

// === impl UsageVisitor ===

impl ChunkVisitor for UsageVisitor<'_, '_> {
    fn key(&mut self, part: &[u8]) {
        self.members.word.push(part);
    }

    fn key_end(&mut self) {
        let members = &mut *self.members;
        members.word.is_over = true;
        members.value_use = value_use(members.scope(), members.word.known());
    }

    fn value(&mut self, first: u8, _at: usize) -> bool {
        let members = &mut *self.members;
        match (first, members.value_use) {
            (b'{', _) if members.open == 0 => members.enter(UsageScope::Top, self.found),
            (b'{', ValueUse::Inside(scope)) => members.enter(scope, self.found),
            (b'"', ValueUse::Id | ValueUse::Type) => {}
            (b'"', ValueUse::Inside(UsageScope::Error)) => {
                self.found.fail();
                return false;
            }
            (b'0'..=b'9', ValueUse::Number(_) | ValueUse::Code) => members.number = Some(0),
            _ => return false,
        }
        true
    }

    fn text(&mut self, part: &[u8]) {
        self.members.word.push(part);
    }

    fn text_end(&mut self, _at: usize) {
        self.members.word.is_over = true;
        self.members.report(self.found);
    }

    fn scalar(&mut self, part: &[u8]) {
        for byte in part {
            let digit = Some(byte.wrapping_sub(b'0')).filter(|digit| *digit < 10);
            let tenfold = self.members.number.and_then(|number| number.checked_mul(10));
            self.members.number = tenfold.zip(digit).and_then(|(ten, digit)| ten.checked_add(digit.into()));
        }
    }

    fn scalar_end(&mut self) {
        match (self.members.value_use, self.members.number) {
            (ValueUse::Number(count), Some(value)) => self.members.counts.set(count, value),
            (ValueUse::Code, Some(code @ 400..600)) => {
                self.found.failure = Some(StreamError { code: u16::try_from(code).ok() });
            }
            _ => {}
        }
    }

    fn leave(&mut self) {
        let members = &mut *self.members;
        if members.scope() == UsageScope::Usage {
            self.found.counts.update(&members.counts);
        }
        members.open -= 1;
    }
}

/// The use of the value of a key in a scope.
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

// === impl ParsedWord ===

impl ParsedWord {
    fn push(&mut self, bytes: &[u8]) {
        if std::mem::take(&mut self.is_over) {
            self.length = 0;
            self.is_strange = false;
        }
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
