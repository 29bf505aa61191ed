//! A message in the form that most clients write: a role and a text, in this order, and nothing else.
//!
//! Finding its two values by their places needs no slots for keys, and compares no key with all names.
//!
//! Never: a message that another form of it would be read as differently.

use crate::json::{JsonCursor, RawValue, string_end};

/// Reads a message of this form and moves the cursor behind it. `None`: the message has another form or is
/// cut, and the cursor stays.
pub(super) fn read<'a>(cursor: &mut JsonCursor<'a>) -> Option<(RawValue<'a>, RawValue<'a>)> {
    let bytes = cursor.bytes();
    let at = after(bytes, cursor.at, b"{\"role\":")?;
    let role = string_at(bytes, at)?;
    let at = after(bytes, at + role.bytes.len(), b",")?;
    let at = after(bytes, at, b"\"content\":")?;
    let content = string_at(bytes, at)?;
    let end = at + content.bytes.len();
    (bytes.get(end) == Some(&b'}')).then(|| {
        cursor.at = end + 1;
        (role, content)
    })
}

/// The offset behind a text and the space that some clients write behind it.
fn after(bytes: &[u8], at: usize, text: &[u8]) -> Option<usize> {
    let rest = bytes.get(at..)?.strip_prefix(text)?;
    Some(at + text.len() + usize::from(rest.first() == Some(&b' ')))
}

/// The string that begins at `at`, if it is whole.
fn string_at(bytes: &[u8], at: usize) -> Option<RawValue<'_>> {
    if bytes.get(at) != Some(&b'"') {
        return None;
    }
    let end = string_end(bytes, at + 1, at + 1)?;
    Some(RawValue { bytes: &bytes[at..=end], whole: true })
}
