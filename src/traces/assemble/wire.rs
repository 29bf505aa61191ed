//! The members of engines' JSON that a record needs, borrowed from the text.
//!
//! Each member that may have an unexpected form is kept unparsed and parsed on its own, so that one invalid
//! member does not affect the others.

use std::borrow::Cow;
use std::fmt;

use memchr::memmem;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::json::{code_unit, unescape, visit_structure};
use crate::reply::token_event::single_logprob;
use crate::traces::record::{TraceApi, TraceTokens};

/// The deepest nesting of a document that is recorded. Python reads about a thousand levels, others 128: one
/// call must not make the list that it stands in unreadable.
const MAX_DEPTH: usize = 100;

/// The most digits in a row of a number that is recorded: many readers take no integer above 1e308, and
/// Python none of more than 4,300 digits.
const MAX_DIGITS: usize = 300;

/// A whole answer of any interface, or one chunk of a chat's or a completion's stream.
#[derive(serde::Deserialize)]
pub(super) struct AnswerBody<'a> {
    #[serde(borrow)]
    pub model: Option<&'a RawValue>,
    #[serde(borrow)]
    pub choices: Option<Vec<AnswerChoice<'a>>>,
    #[serde(borrow)]
    pub usage: Option<&'a RawValue>,
    #[serde(borrow)]
    pub prompt_token_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    pub weight_version: Option<&'a RawValue>,
    #[serde(borrow)]
    pub error: Option<&'a RawValue>,
    // Responses.
    #[serde(borrow)]
    pub output: Option<&'a RawValue>,
    #[serde(borrow)]
    pub status: Option<&'a RawValue>,
    #[serde(borrow)]
    pub incomplete_details: Option<&'a RawValue>,
    #[serde(borrow)]
    pub input_messages: Option<&'a RawValue>,
    #[serde(borrow)]
    pub output_messages: Option<&'a RawValue>,
    // Messages.
    #[serde(borrow)]
    pub content: Option<&'a RawValue>,
    #[serde(borrow)]
    pub role: Option<&'a RawValue>,
    #[serde(borrow)]
    pub stop_reason: Option<&'a RawValue>,
}

/// A choice of a whole answer, or of a chunk.
#[derive(serde::Deserialize)]
pub(super) struct AnswerChoice<'a> {
    #[serde(default)]
    pub index: LenientCount,
    #[serde(borrow)]
    pub message: Option<&'a RawValue>,
    #[serde(borrow)]
    pub delta: Option<RawMembers<'a>>,
    #[serde(borrow)]
    pub text: Option<&'a RawValue>,
    #[serde(borrow)]
    pub token_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    pub prompt_token_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    pub logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    pub finish_reason: Option<&'a RawValue>,
    #[serde(borrow)]
    pub stop_reason: Option<&'a RawValue>,
    #[serde(borrow)]
    pub prompt_logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    pub routed_experts: Option<&'a RawValue>,
    #[serde(borrow)]
    pub routing_matrices: Option<&'a RawValue>,
}

/// The log-probabilities of a choice, as chats or as completions have them.
#[derive(serde::Deserialize)]
pub(super) struct ChoiceLogprobs {
    content: Option<Vec<TokenLogprob>>,
    token_logprobs: Option<Vec<Option<f64>>>,
}

/// One entry of a list of log-probabilities.
#[derive(serde::Deserialize)]
pub(super) struct TokenLogprob {
    pub logprob: Option<f64>,
}

/// The members of an object in their order, as they stand.
pub(super) struct RawMembers<'a>(pub Vec<(Cow<'a, str>, &'a RawValue)>);

/// A number of something; `None`: missing, or no such number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LenientCount(pub Option<u64>);

/// A key of an object.
struct BorrowedKey<'a>(Cow<'a, str>);

/// The token counts of an answer under the names of all interfaces.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct ReportedTokens {
    prompt_tokens: LenientCount,
    completion_tokens: LenientCount,
    input_tokens: LenientCount,
    output_tokens: LenientCount,
    cache_read_input_tokens: LenientCount,
    cache_creation_input_tokens: LenientCount,
    prompt_tokens_details: Option<TokenDetails>,
    completion_tokens_details: Option<TokenDetails>,
    input_tokens_details: Option<TokenDetails>,
    output_tokens_details: Option<TokenDetails>,
}

#[derive(Clone, Copy, Default, serde::Deserialize)]
#[serde(default)]
struct TokenDetails {
    cached_tokens: LenientCount,
    reasoning_tokens: LenientCount,
}

// === impl ChoiceLogprobs ===

impl ChoiceLogprobs {
    /// Appends the values to `values`; a null among them is passed over. `false`: they are no such list.
    pub(super) fn append(raw: &RawValue, values: &mut Vec<f64>) -> bool {
        if let Some((value, [])) = single_logprob(raw.get().as_bytes()) {
            values.push(value);
            return true;
        }
        let Ok(read) = serde_json::from_str::<ChoiceLogprobs>(raw.get()) else { return false };
        match (read.content, read.token_logprobs) {
            (Some(content), _) => values.extend(content.iter().filter_map(|token| token.logprob)),
            (None, Some(all)) => values.extend(all.iter().flatten()),
            (None, None) => {}
        }
        true
    }
}

// === impl RawMembers ===

impl<'a> RawMembers<'a> {
    /// The members of the object that a text is.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The value of the last member of this name.
    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| *value)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawMembers<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = RawMembers<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(BorrowedKey(key)) = map.next_key()? {
                    members.push((key, map.next_value()?));
                }
                Ok(RawMembers(members))
            }
        }
        from.deserialize_map(MembersVisitor)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for BorrowedKey<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = BorrowedKey<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Self::Value, E> {
                Ok(BorrowedKey(Cow::Borrowed(key)))
            }

            fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
                Ok(BorrowedKey(Cow::Owned(key.to_owned())))
            }
        }
        from.deserialize_str(KeyVisitor)
    }
}

// === impl LenientCount ===

impl<'de> Deserialize<'de> for LenientCount {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(LenientCount(None))
    }
}

impl<'de> Visitor<'de> for LenientCount {
    type Value = LenientCount;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("any value")
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self, E> {
        Ok(LenientCount(Some(value)))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(self)
    }
}

/// Adds what a `usage` object reports; what it leaves out stays.
pub(super) fn read_tokens(api: TraceApi, usage: &str, tokens: &mut TraceTokens) {
    let Ok(read) = serde_json::from_str::<ReportedTokens>(usage) else { return };
    let set = |into: &mut Option<u64>, count: Option<u64>| *into = count.or(*into);
    let input = read.input_tokens.0;
    let cached = read.cache_read_input_tokens.0;
    let prompt = if api == TraceApi::Messages {
        let more = [cached, read.cache_creation_input_tokens.0];
        input.map(|input| more.iter().flatten().fold(input, |sum, count| sum.saturating_add(*count)))
    } else {
        read.prompt_tokens.0.or(input)
    };
    set(&mut tokens.prompt, prompt);
    set(&mut tokens.completion, read.completion_tokens.0.or(read.output_tokens.0));
    let prompts = read.prompt_tokens_details.or(read.input_tokens_details).unwrap_or_default();
    set(&mut tokens.cached, prompts.cached_tokens.0.or(cached));
    let completions = read.completion_tokens_details.or(read.output_tokens_details).unwrap_or_default();
    set(&mut tokens.reasoning, completions.reasoning_tokens.0);
}

/// Reads an object: a list of the members' values is none.
pub(super) fn parse_object<'a, T: Deserialize<'a>>(text: &'a str) -> Option<T> {
    text.trim_ascii_start().starts_with('{').then(|| serde_json::from_str(text).ok())?
}

/// The text of a JSON string.
pub(super) fn string(raw: &RawValue) -> Option<Cow<'_, str>> {
    let inner = raw.get().strip_prefix('"')?.strip_suffix('"')?;
    Some(unescape(inner.as_bytes()))
}

/// Whether all readers of JSON take the document.
pub(super) fn is_within_limits(text: &str) -> bool {
    let (mut depth, mut digits) = (0_usize, 0_usize);
    visit_structure(text.as_bytes(), |byte| {
        digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth <= MAX_DEPTH && digits <= MAX_DIGITS
    })
}

pub(super) fn is_null(raw: &RawValue) -> bool {
    raw.get() == "null"
}

/// Where in `text` a value stands that was read from it.
pub(super) fn span_in(text: &str, value: &RawValue) -> Option<std::ops::Range<usize>> {
    let start = (value.get().as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    let end = start + value.get().len();
    (text.is_char_boundary(start) && text.is_char_boundary(end)).then_some(start..end)
}

/// The bytes as text that any reader of JSON takes: what is no UTF-8, and the escape of half a surrogate
/// pair, becomes U+FFFD.
pub(super) fn readable(bytes: &[u8]) -> Cow<'_, str> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => String::from_utf8_lossy(bytes),
    };
    let escaped = memchr::memchr(b'\\', text.as_bytes());
    if escaped.is_none_or(|at| memmem::find(&text.as_bytes()[at..], b"\\u").is_none()) {
        return text;
    }
    match without_half_pairs(&text) {
        Some(mended) => Cow::Owned(mended),
        None => text,
    }
}

/// The text with the escapes of lone surrogates replaced; `None`: it has none.
fn without_half_pairs(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let (mut mended, mut copied, mut at) = (String::new(), 0, 0);
    while let Some(next) = memchr::memchr(b'\\', bytes.get(at..)?) {
        at += next;
        match code_unit(&bytes[at..]) {
            Some(0xd800..0xdc00)
                if matches!(bytes.get(at + 6..).and_then(code_unit), Some(0xdc00..0xe000)) =>
            {
                at += 12
            }
            Some(0xd800..0xe000) => {
                mended.push_str(text.get(copied..at)?);
                mended.push_str("\\ufffd");
                at += 6;
                copied = at;
            }
            Some(_) => at += 6,
            None => at += 2,
        }
        if at > bytes.len() {
            break;
        }
    }
    if mended.is_empty() {
        return None;
    }
    mended.push_str(text.get(copied..)?);
    Some(mended)
}
