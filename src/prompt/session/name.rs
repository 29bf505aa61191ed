//! Names of sessions as JSON and header fields have them.

use std::borrow::Cow;

use crate::json::{JsonCursor, RawValue, unescape};

/// A member of an object.
pub(super) fn member<'a>(object: RawValue<'a>, name: &str) -> Option<RawValue<'a>> {
    JsonCursor::new(object.bytes).object(&[name]).get(0).ok().flatten()
}

/// A name without the white space around it, if it is one.
pub(super) fn trimmed_name(name: &[u8]) -> Option<&[u8]> {
    let name = name.trim_ascii();
    (!name.is_empty()).then_some(name)
}

/// The text of a string or a number.
pub(super) fn text(raw: RawValue<'_>) -> Option<Cow<'_, [u8]>> {
    if !raw.whole {
        return None;
    }
    let Some(string) = raw.string() else {
        let is_number = matches!(raw.first(), b'-' | b'0'..=b'9');
        return is_number.then_some(Cow::Borrowed(raw.bytes));
    };
    if memchr::memchr(b'\\', string).is_none() {
        return trimmed_name(string).map(Cow::Borrowed);
    }
    trimmed_name(unescape(string).as_bytes()).map(|name| Cow::Owned(name.to_vec()))
}
