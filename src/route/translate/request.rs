//! The body of a request that is translated: its limits, its fields, and the refusal of one of them.

use serde_json::{Map, Value};

use crate::json;
use crate::reject::Reject;

/// The most values that a request may have which is read as a whole; each takes memory of its own.
pub const MAX_TREE_VALUES: usize = 100_000;

/// What one value, and one byte, of a request may take while it is translated.
const VALUE_BYTES: usize = 1280;
const BYTE_FACTOR: usize = 12;

/// The most bytes that a chat made of a request of so many bytes has: a text alone becomes a part of a
/// message.
pub fn chat_bytes(body_len: usize) -> usize {
    2 * body_len + (body_len / 2 + 1).min(MAX_TREE_VALUES) * 64 + 1024
}

/// The most memory that the translation of a request of so many bytes takes.
pub fn memory_needed(body_len: usize) -> u64 {
    ((body_len / 2 + 1).min(MAX_TREE_VALUES) * VALUE_BYTES + body_len * BYTE_FACTOR) as u64
}

/// The members of a JSON object.
pub(super) type JsonFields = Map<String, Value>;

/// The refusal of what stands at `param`.
pub(super) fn refused(param: impl Into<String>, message: impl Into<String>) -> Reject {
    Reject::Field { param: param.into(), message: message.into() }
}

/// The fields of a body that are not null. `Ok(None)`: the body is no JSON object.
pub(super) fn fields(body: &[u8]) -> Result<Option<JsonFields>, Reject> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    if !json::has_at_most(body, MAX_TREE_VALUES) {
        let message = format!("The body has more than the {MAX_TREE_VALUES} values that can be translated.");
        return Err(refused("body", message));
    }
    let mut given: JsonFields = match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => fields,
        // An object to Python, which takes halves of characters and any depth.
        Err(error) if json::document(body).is_some() => {
            return Err(refused("body", format!("The body cannot be translated: {error}.")));
        }
        Ok(_) | Err(_) => return Ok(None),
    };
    // vLLM reads null as if the field were absent, but for `truncation: null`, which no client intends.
    given.retain(|_, value| !value.is_null());
    Ok(Some(given))
}
