//! What serde_json reads, and the texts that are read.

use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue as SerdeRaw;

use super::super::*;

// === the reference ===

/// The text with strings that are empty, and with empty lists in place of what lies deeper than `entered`
/// levels. Python's numbers are written as null.
pub(super) fn outline(text: &[u8], entered: usize) -> Vec<u8> {
    let (mut out, mut depth, mut at) = (Vec::new(), 0, 0);
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    while at < text.len() {
        match text[at] {
            b'"' => {
                out.push(b'"');
                at = naive_string_end(text, at).inspect(|_| out.push(b'"')).unwrap_or(text.len());
            }
            b'{' | b'[' if depth >= entered => {
                out.push(b'[');
                at = naive_container_end(text, at).inspect(|_| out.push(b']')).unwrap_or(text.len());
            }
            byte if is_part(&byte) => {
                let length = text[at..].iter().take_while(|byte| is_part(byte)).count();
                let word = &text[at..at + length];
                let is_python = matches!(word, b"NaN" | b"Infinity" | b"-Infinity");
                out.extend_from_slice(if is_python { b"null" } else { word });
                at += length;
            }
            byte => {
                depth += usize::from(matches!(byte, b'{' | b'['));
                depth -= usize::from(matches!(byte, b'}' | b']') && depth > 0);
                out.push(byte);
                at += 1;
            }
        }
    }
    out
}

/// The offset behind the string that begins at `at`.
pub(super) fn naive_string_end(text: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += 1;
        match text.get(at)? {
            b'\\' => at += 1,
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
}

/// The offset behind the object or array that begins at `at`.
pub(super) fn naive_container_end(text: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 0;
    loop {
        match text.get(at)? {
            b'"' => at = naive_string_end(text, at)? - 1,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return Some(at);
        }
    }
}

/// The text without the white space outside of its strings.
pub(super) fn without_space(text: &[u8]) -> Vec<u8> {
    let (mut out, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let end = if text[at] == b'"' { naive_string_end(text, at).unwrap_or(text.len()) } else { at + 1 };
        if !b" \t\r\n".contains(&text[at]) {
            out.extend_from_slice(&text[at..end]);
        }
        at = end;
    }
    out
}

pub(super) fn serde_takes(text: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(text).is_ok()
}

pub(super) fn is_object(text: &[u8]) -> bool {
    text.get(skip_space(text, 0)) == Some(&b'{')
}

/// The members of an object: their keys, and the values as they stand.
struct SerdeMembers<'a>(Vec<(String, &'a SerdeRaw)>);

impl<'de> Deserialize<'de> for SerdeMembers<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct MembersOf;
        impl<'de> Visitor<'de> for MembersOf {
            type Value = SerdeMembers<'de>;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(SerdeMembers(members))
            }
        }
        from.deserialize_map(MembersOf)
    }
}

/// The members that serde_json finds. `None`: it takes the text for no object.
pub(super) fn serde_members(text: &[u8]) -> Option<Vec<(String, Span)>> {
    let SerdeMembers(members) = serde_json::from_slice(text).ok()?;
    let span = |value: &SerdeRaw| {
        let start = value.get().as_ptr() as usize - text.as_ptr() as usize;
        start..start + value.get().len()
    };
    Some(members.into_iter().map(|(key, value)| (key, span(value))).collect())
}

// === texts ===

pub(super) fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        select(vec!["", "\\", "\\\"", "]}", "é😀", "a", "b\n"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec(-20..200_000, 0..60).prop_map(Value::from),
            prop::collection::vec(("[ab]|\\PC{0,3}", inner), 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// The value with this white space around each token.
pub(super) fn spaced(value: &Value, space: &str, out: &mut String) {
    let (open, close) = match value {
        Value::Array(_) => ("[", "]"),
        Value::Object(_) => ("{", "}"),
        leaf => return out.push_str(&leaf.to_string()),
    };
    out.push_str(open);
    for (number, item) in value.as_array().into_iter().flatten().enumerate() {
        out.push_str(if number == 0 { "" } else { "," });
        out.push_str(space);
        spaced(item, space, out);
        out.push_str(space);
    }
    for (number, (key, item)) in value.as_object().into_iter().flatten().enumerate() {
        out.push_str(if number == 0 { "" } else { "," });
        out.push_str(&format!("{space}{}{space}:{space}", Value::from(key.as_str())));
        spaced(item, space, out);
        out.push_str(space);
    }
    out.push_str(space);
    out.push_str(close);
}

/// JSON as it may be written.
pub(super) fn valid() -> impl Strategy<Value = Vec<u8>> {
    (value(), select(vec!["", " ", "\r\n", "\t  "]), any::<bool>()).prop_map(|(value, space, in_object)| {
        let value = if in_object { serde_json::json!({ "a": value, "b": [1, "c"] }) } else { value };
        let mut text = space.to_owned();
        spaced(&value, space, &mut text);
        text.push_str(space);
        text.into_bytes()
    })
}

/// Bytes that mean something, or only seem to.
const ALPHABET: &[u8] = b"{}[]\",:\\ \t\r\n\x0c\x0b0123456789-+.eEutrfalsn;\x00\x1f\x80\xc3\xa9/";

/// JSON with a few bytes that were put in, replaced or taken out, and perhaps cut.
pub(super) fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<Index>(), 0..3, select(ALPHABET));
    (valid(), prop::collection::vec(change, 0..4), prop::option::of(any::<Index>())).prop_map(
        |(mut text, changes, cut)| {
            for (place, kind, byte) in changes {
                let at = place.index(text.len() + 1);
                match kind {
                    0 => text.insert(at, byte),
                    _ if at == text.len() => {}
                    1 => text[at] = byte,
                    _ => drop(text.remove(at)),
                }
            }
            if let Some(cut) = cut {
                text.truncate(cut.index(text.len() + 1));
            }
            text
        },
    )
}

/// What looks like JSON, and is mostly none.
pub(super) fn soup() -> impl Strategy<Value = Vec<u8>> {
    let pieces = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        " ",
        "\n",
        "\x0c",
        "1",
        "0",
        "-",
        ".",
        "e5",
        ";",
        "true",
        "nul",
        "null",
        "NaN",
        "Infinity",
        "-Infinity",
        "\"a\":",
        "\"a\"",
        "{\"a\":",
        "[1,",
        "\\u00e9",
        "\u{feff}",
        "é",
    ];
    prop::collection::vec(select(pieces.to_vec()), 0..16).prop_map(|all| all.concat().into_bytes())
}

pub(super) fn text() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![3 => valid(), 3 => mutated(), 3 => soup(), 1 => any::<Vec<u8>>()]
}

pub(super) fn cuts(text: &[u8], places: &[Index]) -> Vec<usize> {
    let mut cuts: Vec<usize> = places.iter().map(|place| place.index(text.len() + 1)).collect();
    cuts.sort_unstable();
    cuts
}

pub(super) fn every_byte(text: &[u8]) -> Vec<usize> {
    (0..=text.len()).collect()
}
