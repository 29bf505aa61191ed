//! Objects of a whole document as spans: the edits of requests and answers are made of them.
//!
//! What cannot be followed is `None`, and then nothing is edited.

use std::borrow::Cow;

use super::cursor::each;
use super::slice::{JsonResult, ReadFault, Span, read_value, walk};
use super::space::{BYTE_ORDER_MARK, skip_space};
use super::text::unescape;

/// One key of an object and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JsonMember<'a> {
    pub key: Cow<'a, str>,
    /// Where the key's first quote stands.
    pub start: usize,
    /// Quotes and brackets included.
    pub value: Span,
}

/// What an object holds, and where it ends. Equal keys are all there.
pub(crate) struct JsonObject<'a> {
    pub members: Vec<JsonMember<'a>>,
    pub span: Span,
}

/// The object that is all there is, but for white space and a byte-order mark.
pub(crate) fn document(body: &[u8]) -> Option<JsonObject<'_>> {
    document_with(body, |_, at| read_value(body, at)).ok()
}

/// As `document`, with a reader that is given every key and where its value begins, and says where that
/// ends: what has to be walked is then walked once.
pub(crate) fn document_with<'a>(
    body: &'a [u8],
    read: impl FnMut(&str, usize) -> JsonResult<usize>,
) -> JsonResult<JsonObject<'a>> {
    let mark = if body.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
    let object = object_with(body, skip_space(body, mark), read)?;
    if skip_space(body, object.span.end) == body.len() { Ok(object) } else { Err(ReadFault::Syntax) }
}

/// The object that begins at `at`.
pub(crate) fn object(bytes: &[u8], start: usize) -> Option<JsonObject<'_>> {
    read_object(bytes, start).ok()
}

/// As `object`, with the reason why there is none.
pub(crate) fn read_object(bytes: &[u8], start: usize) -> JsonResult<JsonObject<'_>> {
    object_with(bytes, start, |_, at| read_value(bytes, at))
}

fn object_with<'a>(
    bytes: &'a [u8],
    start: usize,
    mut read: impl FnMut(&str, usize) -> JsonResult<usize>,
) -> JsonResult<JsonObject<'a>> {
    let mut members = Vec::new();
    let end = walk(bytes, start, |key, start, value| {
        let end = read(&key, value)?;
        members.push(JsonMember { key, start, value: value..end });
        Ok(end)
    })?;
    Ok(JsonObject { members, span: start..end })
}

/// The values of the array that begins at `at`, each where `read` says that it ends, and the array's end.
pub(crate) fn items<T>(
    bytes: &[u8],
    start: usize,
    mut read: impl FnMut(usize) -> Option<(T, usize)>,
) -> Option<(Vec<T>, usize)> {
    let mut items = Vec::new();
    let end = each(bytes, start, |at| {
        let (item, end) = read(at).ok_or(ReadFault::Syntax)?;
        items.push(item);
        Ok(end)
    });
    Some((items, end.ok()?))
}

impl<'a> JsonObject<'a> {
    /// The value that counts for a key: Python takes the last of equal ones.
    pub(crate) fn get(&self, key: &str) -> Option<Span> {
        self.members.iter().rfind(|member| member.key == key).map(|member| member.value.clone())
    }

    /// As `get`, with the object that the value is.
    pub(crate) fn object(&self, bytes: &'a [u8], key: &str) -> Option<JsonObject<'a>> {
        object(bytes, self.get(key)?.start)
    }

    /// The text of a key with a string as its value.
    pub(crate) fn text(&self, bytes: &'a [u8], key: &str) -> Option<Cow<'a, str>> {
        text(bytes.get(self.get(key)?)?)
    }

    /// Whether the value of a key is written exactly so.
    pub(crate) fn is(&self, bytes: &[u8], key: &str, written: &str) -> bool {
        self.get(key).is_some_and(|span| &bytes[span] == written.as_bytes())
    }
}

/// Whether this value is a list without anything in it.
pub(crate) fn is_empty_list(bytes: &[u8], span: &Span) -> bool {
    is_empty(&bytes[span.clone()], b"[", b"]")
}

/// Whether this value is an object without anything in it.
pub(crate) fn is_empty_object(value: &[u8]) -> bool {
    is_empty(value, b"{", b"}")
}

fn is_empty(value: &[u8], open: &[u8], close: &[u8]) -> bool {
    let inside = value.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    inside.is_some_and(|inside| skip_space(inside, 0) == inside.len())
}

/// What stands between the quotes of a string.
pub(crate) fn inside(value: &[u8]) -> Option<&[u8]> {
    value.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

/// The text of a value that is a string.
pub(crate) fn text(value: &[u8]) -> Option<Cow<'_, str>> {
    inside(value).map(unescape)
}
