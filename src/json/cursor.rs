//! Walks over a piece of JSON that may be cut at any byte, and hands out its values as they stand.
//!
//! An object is read into one slot for each name that is asked for, so that the order of its keys does
//! not matter and the last of two equal keys counts. Nothing is decoded, copied or allocated.
//!
//! Never: recursion, a panic. What is no JSON is the same as what is cut: from there on no value is returned.

use super::slice::{JsonResult, ReadFault, ValueEnd, find_end, walk_members};
use super::space::skip_space;
use super::text::{ShortText, decode};
use super::work::spend;

/// The bytes end here, or they are no JSON from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndOfJson;

/// A value as it stands in the body, brackets and quotes included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawValue<'a> {
    pub bytes: &'a [u8],
    /// Its end has been seen.
    pub whole: bool,
}

/// The values of the requested keys, in the order of the names.
pub(crate) struct ObjectSlots<'a, const N: usize> {
    values: [Option<RawValue<'a>>; N],
    pub whole: bool,
}

/// A position in a document.
pub(crate) struct JsonCursor<'a> {
    bytes: &'a [u8],
    pub at: usize,
}

/// The elements of an array; the caller reads each one from the cursor.
pub(crate) struct JsonList<'a> {
    pub cursor: JsonCursor<'a>,
    begun: bool,
}

impl From<EndOfJson> for ReadFault {
    fn from(_: EndOfJson) -> Self {
        ReadFault::Syntax
    }
}

// === impl RawValue ===

impl<'a> RawValue<'a> {
    /// The value that begins at `at`, as far as it is there; an error where nothing of one is.
    fn at(bytes: &'a [u8], at: usize) -> Result<Self, EndOfJson> {
        let (end, whole) = match find_end(bytes, at) {
            ValueEnd::At(end) => (end, true),
            ValueEnd::WithSlice | ValueEnd::Cut => (bytes.len(), false),
            ValueEnd::Malformed => return Err(EndOfJson),
        };
        let bytes = bytes.get(at..end).filter(|bytes| !bytes.is_empty()).ok_or(EndOfJson)?;
        Ok(RawValue { bytes, whole })
    }

    pub(crate) fn first(self) -> u8 {
        self.bytes.first().copied().unwrap_or(0)
    }

    /// The bytes between the quotes of a string, as far as they are there.
    pub(crate) fn string(self) -> Option<&'a [u8]> {
        let inner = self.bytes.strip_prefix(b"\"")?;
        if self.whole { inner.strip_suffix(b"\"") } else { Some(inner) }
    }

    /// What was cut ends what can be said, however much of it has been used.
    pub(crate) fn end(self) -> Result<(), EndOfJson> {
        if self.whole { Ok(()) } else { Err(EndOfJson) }
    }
}

// === impl ObjectSlots ===

impl<'a, const N: usize> ObjectSlots<'a, N> {
    /// The value in a slot; none where it is null, or where the object is over and had none.
    pub(crate) fn get(&self, slot: usize) -> Result<Option<RawValue<'a>>, EndOfJson> {
        match self.values[slot] {
            None if self.whole => Ok(None),
            None => Err(EndOfJson),
            Some(raw) if raw.whole && raw.bytes == b"null" => Ok(None),
            Some(raw) if raw.whole || matches!(raw.first(), b'"' | b'{' | b'[') => Ok(Some(raw)),
            Some(_) => Err(EndOfJson),
        }
    }

    /// The first of several slots that has a value.
    pub(crate) fn first_of(&self, slots: &[usize]) -> Result<Option<RawValue<'a>>, EndOfJson> {
        let present = slots.iter().find_map(|slot| self.get(*slot).ok().flatten());
        if present.is_some() || self.whole { Ok(present) } else { Err(EndOfJson) }
    }
}

// === impl JsonCursor ===

impl<'a> JsonCursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        JsonCursor { bytes, at: 0 }
    }

    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The next byte that is no white space, at which the cursor then stands.
    #[inline]
    pub(crate) fn byte(&mut self) -> Result<u8, EndOfJson> {
        let at = skip_space(self.bytes, self.at);
        spend(1);
        self.at = at;
        self.bytes.get(at).copied().ok_or(EndOfJson)
    }

    fn eat(&mut self, expected: u8) -> Result<(), EndOfJson> {
        if self.byte()? != expected {
            return Err(EndOfJson);
        }
        self.at += 1;
        Ok(())
    }

    /// The next value; an error where nothing of one is there.
    pub(crate) fn value(&mut self) -> Result<RawValue<'a>, EndOfJson> {
        self.byte()?;
        let value = RawValue::at(self.bytes, self.at)?;
        self.at += value.bytes.len();
        Ok(value)
    }

    /// Reads an object, as far as it is there.
    pub(crate) fn object<const N: usize>(&mut self, names: &[&str; N]) -> ObjectSlots<'a, N> {
        let mut values = [None; N];
        let (bytes, start) = (self.bytes, skip_space(self.bytes, self.at));
        let end = walk_members(bytes, start, |key, _, at| {
            let slot = slot_of(key, names);
            let value = RawValue::at(bytes, at)?;
            if let Some(slot) = slot {
                values[slot] = Some(value);
            }
            value.end()?;
            Ok(at + value.bytes.len())
        });
        self.at = end.unwrap_or(start);
        ObjectSlots { values, whole: end.is_ok() }
    }
}

/// Which of the names a key is, given the bytes between its quotes.
fn slot_of(key: &[u8], names: &[&str]) -> Option<usize> {
    spend(key.len());
    let position = |key: &[u8]| names.iter().position(|name| name.as_bytes() == key);
    // No name has an escape.
    let plain = position(key);
    if plain.is_some() || memchr::memchr(b'\\', key).is_none() {
        return plain;
    }
    let mut short = ShortText::default();
    decode(key, true, &mut short);
    position(short.text()?)
}

// === impl JsonList ===

impl<'a> JsonList<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        JsonList::at(bytes, 0)
    }

    /// The array that begins at `start`.
    pub(crate) fn at(bytes: &'a [u8], start: usize) -> Self {
        JsonList { cursor: JsonCursor { bytes, at: start }, begun: false }
    }

    /// Whether the cursor now stands before an element; false at the end of the array.
    pub(crate) fn next(&mut self) -> Result<bool, EndOfJson> {
        let cursor = &mut self.cursor;
        if !self.begun {
            cursor.eat(b'[')?;
            let byte = cursor.byte()?;
            self.begun = true;
            cursor.at += usize::from(byte == b']');
            return Ok(byte != b']');
        }
        let byte = cursor.byte()?;
        cursor.at += 1;
        match byte {
            b',' => Ok(true),
            b']' => Ok(false),
            _ => Err(EndOfJson),
        }
    }
}

/// Goes from value to value of the array that begins at `at`, as `read` says where each ends, to its end.
pub(crate) fn each(
    bytes: &[u8],
    start: usize,
    mut read: impl FnMut(usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    if bytes.get(start) != Some(&b'[') {
        return Err(ReadFault::Syntax);
    }
    let mut list = JsonList::at(bytes, start);
    while list.next()? {
        let at = skip_space(bytes, list.cursor.at);
        list.cursor.at = read(at)?;
    }
    Ok(list.cursor.at)
}
