//! Values in a slice, which may be cut at any byte: where they end, member by member, element by element.
//!
//! A number or a literal that the slice ends with is whole only if nothing follows. Readers of whole
//! documents take it for whole ([`value_end`]), readers of cut ones do not (`RawValue`).

use std::borrow::Cow;
use std::ops::Range;

use super::bytes::{plain_prefix, string_end};
use super::scalar::ScalarState;
use super::space::skip_space;
use super::text::unescape;
use super::work::spend;

/// Where something stands in a text.
pub(crate) type Span = Range<usize>;

/// The most members that an object may have: vLLM's requests have less than a hundred.
pub(crate) const MAX_MEMBERS: usize = 10_000;

/// The longest key, with its quotes and as it is written, in bytes.
pub(crate) const MAX_KEY_BYTES: usize = 1024;

/// Why an object or a list is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadFault {
    /// It is none, or cannot be followed.
    Syntax,
    /// An object has more than [`MAX_MEMBERS`].
    ManyMembers,
    /// A key is longer than [`MAX_KEY_BYTES`].
    LongKey,
    /// The reader has found more to do than it may.
    ManyChanges,
}

/// The result of reading a part of a document.
pub(crate) type JsonResult<T> = Result<T, ReadFault>;

/// Where a value ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueEnd {
    /// Before this offset.
    At(usize),
    /// With the slice, unless more follows: a number or a literal.
    WithSlice,
    /// Behind the slice.
    Cut,
    /// No value begins here.
    Malformed,
}

/// Where the value ends that begins at `at`. Of objects, arrays and strings only quotes and brackets are
/// examined.
pub(super) fn find_end(bytes: &[u8], at: usize) -> ValueEnd {
    let Some(&first) = bytes.get(at) else { return ValueEnd::Cut };
    let end = match first {
        b'"' => string_end(bytes, at + 1, at + 1).map(|quote| quote + 1),
        b'{' | b'[' => container_end(bytes, at),
        _ => return scalar_end(bytes, at, first),
    };
    end.map_or(ValueEnd::Cut, ValueEnd::At)
}

fn scalar_end(bytes: &[u8], at: usize, first: u8) -> ValueEnd {
    let Some(begun) = ScalarState::begin(first) else { return ValueEnd::Malformed };
    let (length, state) = begun.run(&bytes[at + 1..]);
    let end = at + 1 + length;
    match state.kind() {
        Some(_) if end == bytes.len() => ValueEnd::WithSlice,
        Some(_) => ValueEnd::At(end),
        None if end == bytes.len() => ValueEnd::Cut,
        None => ValueEnd::Malformed,
    }
}

fn container_end(bytes: &[u8], start: usize) -> Option<usize> {
    let (mut at, mut depth) = (start, 0_u64);
    loop {
        match bytes.get(at)? {
            b'"' => at = string_end(bytes, at + 1, at + 1)?,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 1 => return Some(at + 1),
            b'}' | b']' => depth -= 1,
            _ => {
                let plain = plain_prefix(&bytes[at + 1..]);
                spend(plain);
                at += plain;
            }
        }
        spend(1);
        at += 1;
    }
}

/// Where the value that begins at `at` ends, in a slice that is whole.
pub(crate) fn value_end(bytes: &[u8], at: usize) -> Option<usize> {
    match find_end(bytes, at) {
        ValueEnd::At(end) => Some(end),
        ValueEnd::WithSlice => Some(bytes.len()),
        ValueEnd::Cut | ValueEnd::Malformed => None,
    }
}

/// As `value_end`, for readers of objects and lists.
pub(crate) fn read_value(bytes: &[u8], at: usize) -> JsonResult<usize> {
    value_end(bytes, at).ok_or(ReadFault::Syntax)
}

/// Goes from member to member of the object that begins at `at`, to its end. `read` is given a key, where
/// the key stands and where its value begins, and says where that ends.
pub(crate) fn walk<'a>(
    bytes: &'a [u8],
    start: usize,
    mut read: impl FnMut(Cow<'a, str>, usize, usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    walk_raw(bytes, start, |key, start, value| read(unescape(key), start, value))
}

/// As `walk`, with what stands between the quotes of a key: escapes are left in it.
pub(crate) fn walk_raw<'a>(
    bytes: &'a [u8],
    start: usize,
    read: impl FnMut(&'a [u8], usize, usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    if bytes.get(start) != Some(&b'{') {
        return Err(ReadFault::Syntax);
    }
    walk_rest(bytes, start, read)
}

/// As `walk_raw`, from the comma at `comma` on, which stands behind members of the object that were read.
pub(crate) fn walk_rest<'a>(
    bytes: &'a [u8],
    comma: usize,
    mut read: impl FnMut(&'a [u8], usize, usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    let mut members = 0;
    walk_behind(bytes, comma, |key, start, value| {
        members += 1;
        if members > MAX_MEMBERS {
            return Err(ReadFault::ManyMembers);
        }
        if key.len() + 2 > MAX_KEY_BYTES {
            return Err(ReadFault::LongKey);
        }
        read(key, start, value)
    })
}

/// As `walk_raw`, of any number of members with keys of any length.
pub(super) fn walk_members<'a>(
    bytes: &'a [u8],
    start: usize,
    read: impl FnMut(&'a [u8], usize, usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    if bytes.get(start) != Some(&b'{') {
        return Err(ReadFault::Syntax);
    }
    walk_behind(bytes, start, read)
}

/// As `walk_members`, behind the brace or the comma at `before`.
fn walk_behind<'a>(
    bytes: &'a [u8],
    before: usize,
    mut read: impl FnMut(&'a [u8], usize, usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    let mut at = skip_space(bytes, before + 1);
    if bytes.get(at) == Some(&b'}') {
        return Ok(at + 1);
    }
    loop {
        if bytes.get(at) != Some(&b'"') {
            return Err(ReadFault::Syntax);
        }
        let quote = string_end(bytes, at + 1, at + 1).ok_or(ReadFault::Syntax)?;
        let colon = skip_space(bytes, quote + 1);
        if bytes.get(colon) != Some(&b':') {
            return Err(ReadFault::Syntax);
        }
        let end = read(&bytes[at + 1..quote], at, skip_space(bytes, colon + 1))?;
        at = skip_space(bytes, end);
        match bytes.get(at) {
            Some(b',') => at = skip_space(bytes, at + 1),
            Some(b'}') => return Ok(at + 1),
            _ => return Err(ReadFault::Syntax),
        }
    }
}

/// Gives each byte outside of strings to `visit`, as long as that returns true. Whether it always did; a
/// string that does not end is the end.
pub(crate) fn visit_structure(bytes: &[u8], mut visit: impl FnMut(u8) -> bool) -> bool {
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if !visit(byte) {
            return false;
        }
        if byte == b'"' {
            match string_end(bytes, at + 1, at + 1) {
                Some(end) => at = end,
                None => return true,
            }
        }
        at += 1;
    }
    true
}

/// Whether a document has at the most so many values. Counted are commas, colons and opening brackets: every
/// value but the first stands behind one.
pub(crate) fn has_at_most(bytes: &[u8], values: usize) -> bool {
    let mut seen = 1_usize;
    values > 0
        && visit_structure(bytes, |byte| {
            seen += usize::from(matches!(byte, b',' | b':' | b'[' | b'{'));
            seen <= values
        })
}

#[cfg(test)]
mod tests;
