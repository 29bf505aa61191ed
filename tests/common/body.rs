//! Bodies of requests.

use bytes::Bytes;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::Recorded;

/// A short chat.
pub fn chat(model: &str) -> String {
    json!({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}).to_string()
}

/// A chat whose answer is a stream of so many tokens.
pub fn stream(model: &str, tokens: usize) -> String {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": tokens,
        "stream": true,
    })
    .to_string()
}

/// Where a padded body names its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    First,
    /// Behind everything else, the padding too.
    Last,
}

/// A valid chat of exactly `size` bytes; one that is too small for that is raw bytes.
pub fn padded(size: usize, model: &str, place: Place) -> Bytes {
    let chat = r#""messages":[{"role":"user","content":"hi"}],"max_tokens":1"#;
    let make = |padding: &str| match place {
        Place::First => format!(r#"{{"model":"{model}",{chat},"padding":"{padding}"}}"#),
        Place::Last => format!(r#"{{{chat},"padding":"{padding}","model":"{model}"}}"#),
    };
    match size.checked_sub(make("").len()) {
        // Not one byte over and over, so that a piece in a wrong place is seen.
        Some(room) => Bytes::from(make(&letters(room))),
        None => Bytes::from(letters(size)),
    }
}

fn letters(count: usize) -> String {
    let mut random: u32 = 1;
    let mut letter = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (random >> 24) as u8 % 26)
    };
    (0..count).map(|_| letter()).collect()
}

/// A form for a transcription; `model` comes where the order says.
pub fn form(boundary: &str, parts: &[(&str, &str)]) -> Vec<u8> {
    let mut form = String::new();
    for (name, value) in parts {
        let file = if *name == "file" { "; filename=\"a.wav\"\r\ncontent-type: audio/wav" } else { "" };
        form.push_str(&format!(
            "--{boundary}\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n{value}\r\n"
        ));
    }
    form.push_str(&format!("--{boundary}--\r\n"));
    form.into_bytes()
}

/// The texts of the events of a stream.
pub fn events(body: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(body).into_owned();
    text.split("\n\n").filter(|event| !event.is_empty()).map(str::to_string).collect()
}

/// Takes from an answer what differs from one answer to the next: ids and times.
pub fn normal(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    match serde_json::from_str::<Value>(&text) {
        Ok(mut value) if value.is_object() || value.is_array() => {
            strip(&mut value);
            value.to_string()
        }
        _ => text.lines().map(normal_line).collect::<Vec<_>>().join("\n"),
    }
}

/// A line of an event keeps its prefix; its document is normalised.
fn normal_line(line: &str) -> String {
    let document = line.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok());
    match document {
        Some(mut value) => {
            strip(&mut value);
            format!("data: {value}")
        }
        None => line.to_string(),
    }
}

fn strip(value: &mut Value) {
    const VARY: [&str; 7] =
        ["id", "created", "created_at", "completed_at", "item_id", "call_id", "request_id"];
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if VARY.contains(&name.as_str()) && (field.is_string() || field.is_number()) {
                    *field = Value::from("varies");
                } else {
                    strip(field);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

/// Whether an engine received exactly these bytes.
#[track_caller]
pub fn assert_arrived(recorded: &Recorded, body: &[u8]) {
    assert_eq!(
        (recorded.body_length, recorded.body_hash),
        (body.len(), xxh3_64(body)),
        "{} {}",
        recorded.method,
        recorded.path
    );
}
