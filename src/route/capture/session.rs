//! Sets the parameters of a session in the body of a request: the session wins over the client.
//!
//! Each parameter replaces the whole value of its key, objects included, or is added behind all members. A
//! parameter that is null is sent as null. Of equal keys the last one counts, as for Python: it is the one
//! that is replaced. Keys are compared unescaped.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::json::{self, JsonMember, MAX_KEY_BYTES, MAX_MEMBERS, ReadFault, Span};
use crate::reject::Reject;
use crate::route::edit::wide;
use crate::route::rewrite::{is_wide, too_large};
use crate::route::splice::{ObjectEdit, Splices, member, write};

/// The field that names the model.
const MODEL: &str = "model";

/// The shortest member, in bytes.
const MIN_MEMBER_BYTES: usize = 5;

/// What one member of the body may take; the list of them is copied as it grows.
const MEMBER_BYTES: usize = 3 * size_of::<JsonMember<'_>>();

/// What one byte of parameters may take: written twice, and in lists of keys and changes.
const PARAM_FACTOR: usize = 64;

/// The body with the parameters of its session, and with the model of the session unless a parameter names
/// one. `None`: it goes on as it is, because nothing changes or because it is no JSON object.
///
/// `Err`: the body is too large to be edited, or in an encoding that engines read and this does not.
pub fn session_edit(
    body: &[u8],
    params: &Map<String, Value>,
    model: Option<&str>,
) -> Result<Option<Vec<u8>>, Reject> {
    let model = model.filter(|_| !params.contains_key(MODEL)).map(Value::from);
    let pinned = model.as_ref().map(|model| (MODEL, model));
    let settings: Vec<(&str, &Value)> =
        params.iter().map(|(key, value)| (key.as_str(), value)).chain(pinned).collect();
    if settings.is_empty() {
        return Ok(None);
    }
    if is_wide(body) {
        return Err(wide());
    }
    let object = match json::document_with(body, |_, at| json::read_value(body, at)) {
        Ok(object) => object,
        Err(ReadFault::Syntax) => return Ok(None),
        Err(fault) => return Err(too_large(fault, "session")),
    };
    let places: HashMap<&str, usize> = settings.iter().enumerate().map(|(at, (key, _))| (*key, at)).collect();
    let mut spans: Vec<Option<&Span>> = vec![None; settings.len()];
    for member in &object.members {
        json::work::spend(1);
        if let Some(place) = places.get(member.key.as_ref()) {
            spans[*place] = Some(&member.value);
        }
    }
    let (mut edit, mut out) = (ObjectEdit::new(body, &object), Splices::default());
    for ((key, value), span) in settings.iter().zip(spans) {
        let written = write(value);
        match span {
            Some(span) if body[span.clone()] == *written => {}
            Some(span) => out.replace(span.clone(), written),
            None => edit.add(&member(key, &written)),
        }
    }
    edit.finish(&mut out);
    Ok((!out.is_empty()).then(|| out.apply(body)))
}

/// The most memory that an edit takes beside the body, the new body included: of a body of so many bytes, by
/// parameters and a model that are so many bytes when written as JSON.
pub fn memory_needed(body_len: usize, params_len: usize) -> u64 {
    let members = (body_len / MIN_MEMBER_BYTES + 1).min(MAX_MEMBERS);
    // Unescaping may make three bytes of one, in twice the room.
    let keys = 6 * body_len.min(members * MAX_KEY_BYTES);
    (body_len + members * MEMBER_BYTES + keys + PARAM_FACTOR * params_len + 4096) as u64
}
