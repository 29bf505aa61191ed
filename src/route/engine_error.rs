//! Edits vLLM's refusal of a body with inserted fields. vLLM's errors report the number of the body's fields
//! (`'input': '<dict of 5 items>'`) and the position of a syntax error (`'loc': 'body.40'`); the client must
//! receive the numbers of its own body.
//!
//! The refusal of a broken body may become shorter by an amount that is known only at its end, so its length
//! cannot be declared. Other refusals keep their length, unless a count loses a digit.
//!
//! Never: fail, hold more than the limit of an error, copy the body.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use memchr::memmem;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use crate::json::{self, MAX_MEMBERS};

/// The longest body that is read as an error of vLLM.
const MAX_REFUSAL_BYTES: usize = 1 << 20;

/// The text before an offset into the body, in a refusal of invalid JSON.
const OFFSET_PREFIX: &[u8] = b"body.";

/// The text before the kind of the first error, which no text of the client can precede, and the kind of
/// invalid JSON.
const KIND_PREFIX: &[u8] = b"'type': '";
const INVALID_JSON_KIND: &[u8] = b"json_invalid'";

/// Edits one refusal on its way to the client.
#[derive(Debug)]
pub(crate) struct RefusalEditor {
    /// The engine's phrase for the number of fields sent, and the phrase for those of the client.
    names: [Vec<u8>; 2],
    /// The span of the inserted field, if the body is broken after it.
    first: Option<Range<usize>>,
    held: Vec<u8>,
    is_long: bool,
}

/// The number of an object's distinct fields.
struct FieldCount(usize);

impl<'de> Deserialize<'de> for FieldCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldCounter)
    }
}

struct FieldCounter;

impl<'de> Visitor<'de> for FieldCounter {
    type Value = FieldCount;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of at the most {MAX_MEMBERS} members")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<FieldCount, A::Error> {
        let mut names = HashSet::new();
        for seen in 0.. {
            let Some(name) = fields.next_key::<String>()? else { break };
            if seen == MAX_MEMBERS {
                return Err(A::Error::custom("too many members"));
            }
            names.insert(name);
            fields.next_value::<IgnoredAny>()?;
        }
        Ok(FieldCount(names.len()))
    }
}

/// The number of fields of a body, if it is a valid object with fewer fields than the limit.
pub(crate) fn fields_if_sound(body: &[u8]) -> Option<usize> {
    serde_json::from_slice::<FieldCount>(body).ok().map(|fields| fields.0)
}

/// The number of fields of a body; `None` for a body that cannot be parsed.
pub(crate) fn fields(body: &[u8]) -> Option<usize> {
    let object = json::document(body)?;
    Some(object.members.iter().map(|member| &member.key).collect::<HashSet<_>>().len())
}

impl RefusalEditor {
    /// Creates the editor for a body with `fields` fields of the client and one inserted field.
    pub(crate) fn new(fields: usize) -> Self {
        RefusalEditor::with_added(fields, 1)
    }

    /// Creates the editor for a body with `fields` fields of the client and `added` inserted ones.
    pub(crate) fn with_added(fields: usize, added: usize) -> Self {
        let names = [fields + added, fields].map(|count| format!("<dict of {count} items>").into_bytes());
        RefusalEditor { names, first: None, held: Vec::new(), is_long: false }
    }

    /// Corrects offsets, too: the body is broken, and the inserted field is at this span before the client's.
    pub(crate) fn broken_behind(self, field: Range<usize>) -> Self {
        RefusalEditor { first: Some(field), ..self }
    }

    /// Whether the refusal keeps its length.
    pub(crate) fn keeps_length(&self) -> bool {
        self.names[0].len() == self.names[1].len() && self.first.is_none()
    }

    /// Edits the next piece and returns the bytes that can be forwarded; `end`: it is the last.
    pub(crate) fn feed(&mut self, piece: &[u8], end: bool) -> Vec<u8> {
        if self.is_long {
            return piece.to_vec();
        }
        self.held.extend_from_slice(piece);
        self.is_long = self.held.len() > MAX_REFUSAL_BYTES;
        if !end && !self.is_long {
            return Vec::new();
        }
        let held = std::mem::take(&mut self.held);
        let [said, meant] = &self.names;
        match &self.first {
            Some(field) if is_of_broken(&held) => without(field, &held),
            _ => renamed(&held, said, meant),
        }
    }
}

/// Whether this is a refusal of invalid JSON, which reports no number of fields.
fn is_of_broken(text: &[u8]) -> bool {
    memmem::find(text, KIND_PREFIX)
        .is_some_and(|at| text[at + KIND_PREFIX.len()..].starts_with(INVALID_JSON_KIND))
}

fn renamed(text: &[u8], said: &[u8], meant: &[u8]) -> Vec<u8> {
    let (mut out, mut at) = (Vec::with_capacity(text.len()), 0);
    for found in memmem::find_iter(text, said) {
        out.extend_from_slice(&text[at..found]);
        out.extend_from_slice(meant);
        at = found + said.len();
    }
    out.extend_from_slice(&text[at..]);
    out
}

/// The text with offsets into the body without the inserted field.
fn without(field: &Range<usize>, text: &[u8]) -> Vec<u8> {
    let (mut out, mut at) = (Vec::with_capacity(text.len()), 0);
    for found in memmem::find_iter(text, OFFSET_PREFIX) {
        let from = found + OFFSET_PREFIX.len();
        let to = from + text[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let offset =
            std::str::from_utf8(&text[from..to]).ok().and_then(|digits| digits.parse::<usize>().ok());
        if let Some(offset) = offset.filter(|offset| *offset >= field.end) {
            out.extend_from_slice(&text[at..from]);
            out.extend_from_slice((offset - field.len()).to_string().as_bytes());
            at = to;
        }
    }
    out.extend_from_slice(&text[at..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_offsets_in_the_clients_body() {
        let broken =
            |at: u32| format!("1 validation error:\\n  {{'type': 'json_invalid', 'loc': 'body.{at}', 'x'");
        // Text from the client stays unchanged.
        let quoted =
            "{'type': 'missing', 'loc': 'body.1', 'input': \"{'type': 'json_invalid', 'loc': 'body.88'\"";
        for (said, wanted) in [
            (broken(72), broken(16)),
            (broken(57), broken(1)),
            (broken(1), broken(1)),
            (quoted.into(), quoted.into()),
            ("The model does not exist".into(), "The model does not exist".into()),
        ] {
            for fields in [1, 3] {
                for cut in [0, 1, said.len() - 1] {
                    let mut refusal = RefusalEditor::new(fields).broken_behind(1..57);
                    let first = refusal.feed(&said.as_bytes()[..cut], false);
                    let all = [first, refusal.feed(&said.as_bytes()[cut..], true)].concat();
                    assert_eq!(String::from_utf8(all).unwrap(), wanted);
                }
            }
        }
    }

    #[test]
    fn counts_distinct_fields_of_valid_bodies() {
        for (body, wanted) in [
            (r#"{"a":1,"b":{"c":1,"d":2},"a":2}"#, (Some(2), Some(2))),
            ("{}", (Some(0), Some(0))),
            (r#"{"a":NaN}"#, (Some(1), None)),
            (r#"{"a":[1 2]}"#, (Some(1), None)),
            (r#"{"a":1"#, (None, None)),
            ("[1]", (None, None)),
            ("", (None, None)),
        ] {
            assert_eq!((fields(body.as_bytes()), fields_if_sound(body.as_bytes())), wanted, "{body}");
        }
    }
}
