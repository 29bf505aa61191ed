//! One document of JSON, read in pieces for the few names that tell of usage.
//!
//! Only objects in which such a name may stand are entered. All else is skipped: strings from quote to
//! quote, and between them only brackets are counted. A document that is none is read no further.

use super::{Counts, Failure, Found};
use crate::sse::count_work;

/// The longest name or word that is kept.
const WORD_BYTES: usize = 96;

/// `usage`'s details inside of `usage` inside of `response` inside of the document.
const DEEPEST: usize = 4;

/// An object that is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Top,
    /// `response` or `message` of an event.
    Answer,
    Usage,
    PromptDetails,
    OutputDetails,
    Error,
}

/// What is wanted of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Nothing,
    Inside(Scope),
    Id,
    Type,
    Number(Count),
    Code,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Count {
    Prompt,
    Input,
    CacheRead,
    CacheCreation,
    Cached,
    Output,
    Reasoning,
}

#[derive(Clone, Copy, Debug)]
enum Place {
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
pub(super) struct Document {
    place: Place,
    want: Want,
    /// The scopes that are open, of which the last is the present one.
    scopes: [Scope; DEEPEST],
    open: usize,
    /// The last chunk ended with a backslash in a string.
    escaped: bool,
    word: Word,
    /// Of the present usage.
    counts: Counts,
}

/// A name or a word in progress.
#[derive(Debug)]
struct Word {
    bytes: [u8; WORD_BYTES],
    length: usize,
    /// Too long or with escapes: none that is known.
    is_strange: bool,
}

impl Default for Document {
    fn default() -> Self {
        Document {
            place: Place::Start,
            want: Want::Nothing,
            scopes: [Scope::Top; DEEPEST],
            open: 0,
            escaped: false,
            word: Word { bytes: [0; WORD_BYTES], length: 0, is_strange: false },
            counts: Counts::default(),
        }
    }
}

// === impl Document ===

impl Document {
    /// Takes the next piece.
    pub(super) fn feed(&mut self, piece: &[u8], found: &mut Found) {
        count_work(piece.len());
        let mut rest = piece;
        while let Some(&byte) = rest.first() {
            rest = match self.place {
                Place::Over => return,
                Place::Key | Place::Word => self.word(rest, found),
                Place::Text => self.text(rest, Place::CommaOrEnd),
                Place::SkipText(depth) => self.text(rest, Place::Skip(depth)),
                Place::Skip(depth) => self.skip(rest, depth),
                Place::Scalar(value) => self.scalar(rest, value, found),
                _ => {
                    self.between(byte, found);
                    &rest[1..]
                }
            };
        }
    }

    fn scope(&self) -> Scope {
        self.scopes[self.open.saturating_sub(1)]
    }

    /// One byte outside of values and names.
    fn between(&mut self, byte: u8, found: &mut Found) {
        self.place = match (self.place, byte) {
            (place, b' ' | b'\n' | b'\r' | b'\t') => place,
            (Place::Start, b'{') => self.enter(Scope::Top, found),
            (Place::KeyOrEnd | Place::BeforeKey, b'"') => {
                self.word.clear();
                Place::Key
            }
            (Place::Colon, b':') => Place::BeforeValue,
            (Place::BeforeValue, b'"') => match self.want {
                Want::Id | Want::Type => {
                    self.word.clear();
                    Place::Word
                }
                Want::Inside(Scope::Error) => {
                    found.fail();
                    Place::Text
                }
                _ => Place::Text,
            },
            (Place::BeforeValue, b'{') => match self.want {
                Want::Inside(scope) => self.enter(scope, found),
                _ => Place::Skip(1),
            },
            (Place::BeforeValue, b'[') => Place::Skip(1),
            (Place::BeforeValue, b'0'..=b'9') => Place::Scalar(Some(u64::from(byte - b'0'))),
            (Place::BeforeValue, b'-' | b'a'..=b'z' | b'A'..=b'Z') => Place::Scalar(None),
            (Place::CommaOrEnd, b',') => Place::BeforeKey,
            (Place::CommaOrEnd | Place::KeyOrEnd, b'}') => self.leave(found),
            _ => Place::Over,
        };
    }

    fn enter(&mut self, scope: Scope, found: &mut Found) -> Place {
        self.scopes[self.open] = scope;
        self.open += 1;
        match scope {
            Scope::Usage => self.counts = Counts::default(),
            Scope::Error => found.fail(),
            _ => {}
        }
        Place::KeyOrEnd
    }

    fn leave(&mut self, found: &mut Found) -> Place {
        if self.scope() == Scope::Usage {
            found.counts.update(&self.counts);
        }
        self.open -= 1;
        if self.open == 0 { Place::Over } else { Place::CommaOrEnd }
    }

    /// The inside of a name or of a word that is wanted.
    fn word<'p>(&mut self, rest: &'p [u8], found: &mut Found) -> &'p [u8] {
        let (length, is_over) = self.string(rest);
        self.word.push(&rest[..length]);
        if !is_over {
            return &[];
        }
        if let Place::Key = self.place {
            self.want = wanted(self.scope(), self.word.known());
            self.place = Place::Colon;
        } else {
            self.tell(found);
            self.place = Place::CommaOrEnd;
        }
        &rest[length + 1..]
    }

    /// The inside of a string that nobody wants, and what comes behind it.
    fn text<'p>(&mut self, rest: &'p [u8], then: Place) -> &'p [u8] {
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
        while let Some(length) = special(&rest[at..]) {
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
        for (at, byte) in rest.iter().enumerate() {
            match byte {
                b'"' => {
                    self.place = Place::SkipText(depth);
                    return &rest[at + 1..];
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => {
                    depth -= 1;
                    if depth == 0 {
                        self.place = Place::CommaOrEnd;
                        return &rest[at + 1..];
                    }
                }
                _ => {}
            }
        }
        self.place = Place::Skip(depth);
        &[]
    }

    fn scalar<'p>(&mut self, rest: &'p [u8], mut value: Option<u64>, found: &mut Found) -> &'p [u8] {
        for (at, &byte) in rest.iter().enumerate() {
            match byte {
                b'0'..=b'9' => {
                    let tenfold = value.and_then(|value| value.checked_mul(10));
                    value = tenfold.and_then(|tenfold| tenfold.checked_add(u64::from(byte - b'0')));
                }
                b'+' | b'-' | b'.' | b'a'..=b'z' | b'A'..=b'Z' => value = None,
                _ => {
                    match (self.want, value) {
                        (Want::Number(count), Some(value)) => self.counts.set(count, value),
                        (Want::Code, Some(code @ 400..600)) => {
                            found.failure = Some(Failure { code: u16::try_from(code).ok() });
                        }
                        _ => {}
                    }
                    self.place = Place::CommaOrEnd;
                    return &rest[at..];
                }
            }
        }
        self.place = Place::Scalar(value);
        &[]
    }

    /// A word that was wanted has ended.
    fn tell(&mut self, found: &mut Found) {
        let Some(word) = self.word.known() else { return };
        match (self.want, word) {
            (Want::Type, b"error" | b"response.failed") => found.fail(),
            (Want::Id, id) if found.id.is_none() && !id.is_empty() => {
                found.id = std::str::from_utf8(id).ok().map(Box::from);
            }
            _ => {}
        }
    }
}

/// Where the first quote or backslash stands. Most strings of an answer are names and words, too short for
/// a search by vectors to pay.
fn special(text: &[u8]) -> Option<usize> {
    const SHORT: usize = 16;
    let is_special = |byte: &u8| matches!(byte, b'"' | b'\\');
    let (short, long) = text.split_at(text.len().min(SHORT));
    let near = short.iter().position(is_special);
    near.or_else(|| memchr::memchr2(b'"', b'\\', long).map(|at| at + SHORT))
}

/// What the value of a key is wanted for.
fn wanted(scope: Scope, key: Option<&[u8]>) -> Want {
    let Some(key) = key else { return Want::Nothing };
    match (scope, key) {
        (Scope::Top | Scope::Answer, b"usage") => Want::Inside(Scope::Usage),
        (Scope::Top | Scope::Answer, b"id") => Want::Id,
        (Scope::Top | Scope::Answer, b"error") => Want::Inside(Scope::Error),
        (Scope::Top, b"type" | b"object") => Want::Type,
        (Scope::Error, b"code") => Want::Code,
        (Scope::Top, b"response" | b"message") => Want::Inside(Scope::Answer),
        (Scope::Usage, b"prompt_tokens") => Want::Number(Count::Prompt),
        (Scope::Usage, b"input_tokens") => Want::Number(Count::Input),
        (Scope::Usage, b"cache_read_input_tokens") => Want::Number(Count::CacheRead),
        (Scope::Usage, b"cache_creation_input_tokens") => Want::Number(Count::CacheCreation),
        (Scope::Usage, b"completion_tokens" | b"output_tokens") => Want::Number(Count::Output),
        (Scope::Usage, b"prompt_tokens_details" | b"input_tokens_details") => {
            Want::Inside(Scope::PromptDetails)
        }
        (Scope::Usage, b"completion_tokens_details" | b"output_tokens_details") => {
            Want::Inside(Scope::OutputDetails)
        }
        (Scope::PromptDetails, b"cached_tokens") => Want::Number(Count::Cached),
        (Scope::OutputDetails, b"reasoning_tokens") => Want::Number(Count::Reasoning),
        _ => Want::Nothing,
    }
}

impl Counts {
    fn set(&mut self, count: Count, value: u64) {
        let place = match count {
            Count::Prompt => &mut self.prompt,
            Count::Input => &mut self.input,
            Count::CacheRead => &mut self.cache_read,
            Count::CacheCreation => &mut self.cache_creation,
            Count::Cached => &mut self.cached,
            Count::Output => &mut self.output,
            Count::Reasoning => &mut self.reasoning,
        };
        *place = Some(value);
    }
}

// === impl Word ===

impl Word {
    fn clear(&mut self) {
        self.length = 0;
        self.is_strange = false;
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        if self.is_strange || end > WORD_BYTES || memchr::memchr(b'\\', bytes).is_some() {
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
