//! Fingerprints of JSON that do not depend on how it is written.

use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

/// The members that hold a model's reasoning.
pub(super) const REASONING_MEMBERS: [&str; 2] = ["reasoning", "reasoning_content"];

/// The fingerprint of a message. A member that is null or an empty list of calls counts as absent, and a list
/// of one text as the text: clients send answers back in any of these forms.
pub(super) fn of_message(message: &Value) -> u128 {
    of_members(message, &[])
}

/// The fingerprint of an answer without its reasoning.
pub(super) fn of_reply(message: &Value) -> u128 {
    of_members(message, &REASONING_MEMBERS)
}

/// The fingerprint of any value.
pub(super) fn of_value(value: &Value) -> u128 {
    let mut digest = Xxh3::new();
    feed(value, &mut digest);
    digest.digest128()
}

fn of_members(message: &Value, without: &[&str]) -> u128 {
    let Value::Object(members) = message else { return of_value(message) };
    let counts = |key: &str, value: &Value| {
        !(value.is_null() || without.contains(&key) || key == "tool_calls" && is_empty_list(value))
    };
    let mut digest = Xxh3::new();
    feed_members(members, counts, &mut digest);
    digest.digest128()
}

fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

/// The text of a content that consists of one text.
fn lone_text(content: &Value) -> Option<&Value> {
    let [Value::Object(part)] = content.as_array()?.as_slice() else { return None };
    let text = part.get("text").filter(|text| text.is_string())?;
    (part.len() == 2 && part.get("type").is_some_and(|kind| kind == "text")).then_some(text)
}

fn feed_members(members: &Map<String, Value>, counts: impl Fn(&str, &Value) -> bool, digest: &mut Xxh3) {
    let mut sorted: Vec<(&String, &Value)> =
        members.iter().filter(|(key, value)| counts(key, value)).collect();
    sorted.sort_unstable_by_key(|(key, _)| *key);
    digest.update(b"{");
    feed_length(sorted.len(), digest);
    for (key, value) in sorted {
        feed_text(key, digest);
        let value = if key == "content" { lone_text(value).unwrap_or(value) } else { value };
        feed(value, digest);
    }
}

/// Each value begins with its kind and, where that varies, its length, so that no two are fed alike.
fn feed(value: &Value, digest: &mut Xxh3) {
    match value {
        Value::Null => digest.update(b"n"),
        Value::Bool(true) => digest.update(b"t"),
        Value::Bool(false) => digest.update(b"f"),
        Value::Number(number) => {
            digest.update(b"#");
            feed_text(&number.to_string(), digest);
        }
        Value::String(text) => {
            digest.update(b"\"");
            feed_text(text, digest);
        }
        Value::Array(items) => {
            digest.update(b"[");
            feed_length(items.len(), digest);
            items.iter().for_each(|item| feed(item, digest));
        }
        Value::Object(members) => feed_members(members, |_, _| true, digest),
    }
}

fn feed_text(text: &str, digest: &mut Xxh3) {
    feed_length(text.len(), digest);
    digest.update(text.as_bytes());
}

fn feed_length(length: usize, digest: &mut Xxh3) {
    digest.update(&(length as u64).to_le_bytes());
}
