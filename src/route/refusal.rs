//! The refusal of a body that fields were put into: vLLM's errors tell how many fields the body has
//! (`'input': '<dict of 5 items>'`), and where it is broken (`'loc': 'body.40'`), and the client must be told
//! of its own.
//!
//! The refusal of a broken body may become shorter, which is known only at its end: its length
//! cannot be declared. All others keep their length, except where a count loses a digit.
//!
//! Never: fail, hold more than an error may be long, copy the body.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use memchr::memmem;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use crate::json::{self, MAX_MEMBERS};

/// The longest body that is read as an error of vLLM.
const MAX_REFUSAL_BYTES: usize = 1 << 20;

/// What comes before an offset into the body, in a refusal of what is no JSON.
const OFFSET_PREFIX: &[u8] = b"body.";

/// What comes before the kind of the first mistake, which no text of the client's can stand before, and the
/// kind of what is no JSON.
const KIND_PREFIX: &[u8] = b"'type': '";
const INVALID_JSON_KIND: &[u8] = b"json_invalid'";

/// Edits one refusal on its way to the client.
#[derive(Debug)]
pub struct RefusalEditor {
    /// How the engine calls a body of so many fields, and what the client's would be called.
    names: [Vec<u8>; 2],
    /// Where the field stands, of a body that is broken behind it.
    first: Option<Range<usize>>,
    held: Vec<u8>,
    is_long: bool,
}

/// The number of an object's fields, equal ones counted once.
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

/// How many fields a body has, if it is an object and nothing in it is broken, and it has not too many.
pub fn fields_if_sound(body: &[u8]) -> Option<usize> {
    serde_json::from_slice::<FieldCount>(body).ok().map(|fields| fields.0)
}

/// How many fields a body has; `None` for one that cannot be followed, which is not counted.
pub fn fields(body: &[u8]) -> Option<usize> {
    let object = json::document(body)?;
    Some(object.members.iter().map(|member| &member.key).collect::<HashSet<_>>().len())
}

impl RefusalEditor {
    /// Of a body of so many fields of the client's, and one more.
    pub fn new(fields: usize) -> Self {
        RefusalEditor::with_added(fields, 1)
    }

    /// Of a body of so many fields of the client's, and so many that were added.
    pub fn with_added(fields: usize, added: usize) -> Self {
        let names = [fields + added, fields].map(|count| format!("<dict of {count} items>").into_bytes());
        RefusalEditor { names, first: None, held: Vec::new(), is_long: false }
    }

    /// The body is broken, and that field stands here, before those of the client.
    pub fn broken_behind(self, field: Range<usize>) -> Self {
        RefusalEditor { first: Some(field), ..self }
    }

    /// Whether the refusal is as long as it was.
    pub fn keeps_length(&self) -> bool {
        self.names[0].len() == self.names[1].len() && self.first.is_none()
    }

    /// Takes the next piece, and gives what can go on; `end`: it is the last.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Vec<u8> {
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

/// Whether it is a refusal of what is no JSON, in which no fields are counted.
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

/// The text with its offsets as they are in a body without the field.
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
    fn places_are_those_in_the_clients_body() {
        let broken =
            |at: u32| format!("1 validation error:\\n  {{'type': 'json_invalid', 'loc': 'body.{at}', 'x'");
        // What the client has sent is no word of the engine's.
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
    fn fields_are_counted_once_each_where_they_can_be() {
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
