//! Bodies of requests.

use bytes::Bytes;
use serde_json::json;
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

/// Fields that differ from one answer to the next: ids and times.
const VARY: [&str; 8] =
    ["id", "created", "created_at", "completed_at", "item_id", "call_id", "request_id", "response_id"];

/// A body without the values of fields that vary; every other byte stays.
pub fn normal(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body).into_owned();
    VARY.iter().fold(text, |text, name| blank(&text, &format!("\"{name}\":")))
}

/// A body as [`normal`] gives it. In a refusal, numbers that describe the body of the request are blank, too:
/// vLLM reports the number of its fields (`<dict of 3 items>`) and the offset of a syntax error (`body.40`).
/// The client gets the refusal of the body as the engine received it, where the balancer had added a field:
/// in front of all others to a request for a response, behind them to other requests.
pub fn normal_refusal(status: u16, path: &str, body: &[u8]) -> String {
    let text = normal(body);
    if status != 400 {
        return text;
    }
    let text = blank(&text, "<dict of ");
    // An offset changes only by a field in front of it.
    let is_moved = path.starts_with("/v1/responses") && text.contains("'type': 'json_invalid'");
    if is_moved { blank(&text, "body.") } else { text }
}

fn blank(text: &str, key: &str) -> String {
    let mut blanked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(key) {
        let (before, value) = rest.split_at(at + key.len());
        blanked.push_str(before);
        let spaces = value.len() - value.trim_start_matches(' ').len();
        blanked.push_str(&value[..spaces]);
        let value = &value[spaces..];
        let (blank, length) = match value.strip_prefix('"') {
            Some(string) => ("\"varies\"", string.find('"').map_or(value.len(), |end| end + 2)),
            None => {
                ("0", value.len() - value.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len())
            }
        };
        if length > 0 {
            blanked.push_str(blank);
        }
        rest = &value[length..];
    }
    blanked + rest
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
