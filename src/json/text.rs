//! The text of strings: escapes and surrogates, decoded in one way everywhere.
//!
//! Two escaped surrogates make one character as they do in Python. A lone one has no place in UTF-8 and
//! becomes U+FFFD, as does what is no escape. The end of a string that is cut is held back as long as it
//! could still become another character, so that what is written is always the beginning of the whole.
//!
//! Never: a panic on any bytes.

use std::borrow::Cow;

use super::bytes::find_in;
use super::work::spend;

/// Takes bytes one after the other.
pub(crate) trait ByteSink {
    fn write(&mut self, bytes: &[u8]);
}

impl ByteSink for Vec<u8> {
    fn write(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// The longest escape: two halves of a pair, `\ud83d\ude00`.
pub(super) const MAX_ESCAPE_BYTES: usize = 12;

/// The text of a JSON string, given the bytes between its quotes. Borrows where nothing is escaped.
pub(crate) fn unescape(raw: &[u8]) -> Cow<'_, str> {
    if memchr::memchr(b'\\', raw).is_none() {
        spend(raw.len());
        // Making sure that there is nothing to replace is quicker than looking for what to replace.
        return std::str::from_utf8(raw).map_or_else(|_| String::from_utf8_lossy(raw), Cow::Borrowed);
    }
    let mut text = Vec::with_capacity(raw.len());
    decode(raw, true, &mut text);
    match String::from_utf8(text) {
        Ok(text) => Cow::Owned(text),
        Err(error) => Cow::Owned(String::from_utf8_lossy(error.as_bytes()).into_owned()),
    }
}

/// Writes what a string means, given the bytes between its quotes. Returns how many of them were used: all,
/// unless the string is cut within an escape.
#[inline]
pub(crate) fn decode<S: ByteSink>(raw: &[u8], whole: bool, out: &mut S) -> usize {
    let plain = memchr::memchr(b'\\', raw).unwrap_or(raw.len());
    spend(plain);
    if plain > 0 {
        out.write(&raw[..plain]);
    }
    if plain == raw.len() { plain } else { decode_escaped(raw, plain, whole, out) }
}

/// The same from the first backslash on. Prose has an escape in every line, so runs between them are short:
/// they are copied and searched in one go, and handed on many at a time.
fn decode_escaped<S: ByteSink>(raw: &[u8], first: usize, whole: bool, out: &mut S) -> usize {
    let mut stage = SinkBuffer::new(out);
    let mut at = first;
    spend(raw.len() - first);
    while let Some(rest) = raw.get(at..).filter(|rest| !rest.is_empty()) {
        if rest[0] != b'\\' {
            at += stage.run(rest);
            continue;
        }
        let simple = rest.get(1).map_or(0, |byte| SIMPLE[usize::from(*byte)]);
        if simple != 0 {
            stage.push(simple);
            at += 2;
        } else if let Some(character) = lone_unit(rest) {
            stage.write(character.encode_utf8(&mut [0; 4]).as_bytes());
            at += 6;
        } else if !whole && is_undecided(rest) {
            break;
        } else {
            let (character, used) = escape(rest);
            stage.write(character.encode_utf8(&mut [0; 4]).as_bytes());
            at += used;
        }
    }
    stage.flush();
    at
}

/// One escape, which begins at the backslash: its character and its length.
pub(crate) fn escape(raw: &[u8]) -> (char, usize) {
    match raw.get(1).map(|byte| (*byte, SIMPLE[usize::from(*byte)])) {
        Some((b'u', _)) => unicode_escape(raw),
        Some((_, simple)) if simple != 0 => (char::from(simple), 2),
        // Not JSON. Only the backslash is used up, so that no character is cut in two.
        _ => (char::REPLACEMENT_CHARACTER, 1),
    }
}

fn unicode_escape(raw: &[u8]) -> (char, usize) {
    let Some(first) = code_unit(raw) else {
        return (char::REPLACEMENT_CHARACTER, 2);
    };
    if let Some(second) = raw.get(6..).and_then(code_unit)
        && let Some(Ok(character)) = char::decode_utf16([first, second]).next()
        && character.len_utf16() == 2
    {
        return (character, 12);
    }
    (char::from_u32(u32::from(first)).unwrap_or(char::REPLACEMENT_CHARACTER), 6)
}

/// The UTF-16 unit that the escape `\uXXXX` stands for, with which the bytes begin.
#[inline]
pub(crate) fn code_unit(raw: &[u8]) -> Option<u16> {
    let [b'\\', b'u', digits @ ..] = raw.first_chunk::<6>()? else { return None };
    let mut unit = 0;
    for digit in digits {
        unit = unit << 8 | u32::from(HEXADECIMAL[usize::from(*digit)]);
    }
    let packed = (unit >> 12 & 0xf000) | (unit >> 8 & 0xf00) | (unit >> 4 & 0xf0) | unit & 0xf;
    if unit & 0xf0f0_f0f0 == 0 { Some(packed as u16) } else { None }
}

/// The character of an escape `\uXXXX` that is no half of a pair. Clients that write nothing but ASCII
/// write whole languages in it.
#[inline]
pub(crate) fn lone_unit(rest: &[u8]) -> Option<char> {
    code_unit(rest).and_then(|unit| char::from_u32(u32::from(unit)))
}

/// The values of digits; others have a high bit.
const HEXADECIMAL: [u8; 256] = {
    let mut values = [0xf0; 256];
    let mut digit = 0;
    while digit < 16 {
        values[b"0123456789abcdef"[digit] as usize] = digit as u8;
        values[b"0123456789ABCDEF"[digit] as usize] = digit as u8;
        digit += 1;
    }
    values
};

/// What stands behind a backslash, and the character that both are, where it is a single byte.
const SIMPLE: [u8; 256] = {
    let mut simple = [0; 256];
    simple[b'"' as usize] = b'"';
    simple[b'\\' as usize] = b'\\';
    simple[b'/' as usize] = b'/';
    simple[b'b' as usize] = 8;
    simple[b'f' as usize] = 12;
    simple[b'n' as usize] = b'\n';
    simple[b'r' as usize] = b'\r';
    simple[b't' as usize] = b'\t';
    simple
};

/// Short runs on their way to a sink.
struct SinkBuffer<'s, S> {
    out: &'s mut S,
    bytes: [u8; SINK_BUFFER_BYTES + COPIED_BYTES],
    length: usize,
}

const SINK_BUFFER_BYTES: usize = 1024;

/// Copied at a time, whether all of it is needed or not.
const COPIED_BYTES: usize = 16;

impl<'s, S: ByteSink> SinkBuffer<'s, S> {
    fn new(out: &'s mut S) -> Self {
        SinkBuffer { out, bytes: [0; SINK_BUFFER_BYTES + COPIED_BYTES], length: 0 }
    }

    #[inline]
    fn push(&mut self, byte: u8) {
        self.bytes[self.length] = byte;
        self.length += 1;
        self.flush_when_full();
    }

    #[inline]
    fn flush_when_full(&mut self) {
        if self.length >= SINK_BUFFER_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.out.write(&self.bytes[..self.length]);
        self.length = 0;
    }

    /// Takes what stands before the next backslash, and says how much that was.
    #[inline]
    fn run(&mut self, raw: &[u8]) -> usize {
        let (mut at, mut length) = (0, self.length);
        while let Some(chunk) = raw.get(at..).and_then(|rest| rest.first_chunk::<COPIED_BYTES>()) {
            self.bytes[length..length + COPIED_BYTES].copy_from_slice(chunk);
            if let Some(run) = find_in(chunk, b'\\') {
                self.length = length + run;
                self.flush_when_full();
                return at + run;
            }
            at += COPIED_BYTES;
            length += COPIED_BYTES;
            if length >= SINK_BUFFER_BYTES {
                self.length = length;
                self.flush();
                length = 0;
            }
        }
        self.length = length;
        for &byte in &raw[at..] {
            if byte == b'\\' {
                break;
            }
            self.push(byte);
            at += 1;
        }
        at
    }
}

impl<S: ByteSink> ByteSink for SinkBuffer<'_, S> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.push(*byte));
    }
}

/// Whether bytes that begin with a backslash could become another character if more came after them.
pub(crate) fn is_undecided(rest: &[u8]) -> bool {
    let hexadecimal = |digits: &[u8]| digits.iter().all(u8::is_ascii_hexdigit);
    let Some(rest) = rest.get(1..).filter(|rest| !rest.is_empty()) else {
        return true;
    };
    let Some(digits) = rest.strip_prefix(b"u") else {
        return false;
    };
    let Some((unit, second)) = digits.split_at_checked(4) else {
        return hexadecimal(digits);
    };
    if !matches!(unit, [b'd' | b'D', b'8' | b'9' | b'a' | b'A' | b'b' | b'B', ..]) || !hexadecimal(unit) {
        return false;
    }
    match second {
        [] | [b'\\'] => true,
        [b'\\', b'u', digits @ ..] => digits.len() < 4 && hexadecimal(digits),
        _ => false,
    }
}

/// A text that is only compared with short names: what does not fit is none of them.
#[derive(Default)]
pub(crate) struct ShortText {
    bytes: [u8; 32],
    length: usize,
    over: bool,
}

impl ShortText {
    /// All of it.
    pub(crate) fn text(&self) -> Option<&[u8]> {
        (!self.over).then(|| self.begin())
    }

    /// The beginning that fits.
    pub(crate) fn begin(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl ByteSink for ShortText {
    fn write(&mut self, bytes: &[u8]) {
        let room = &mut self.bytes[self.length..];
        let fits = bytes.len().min(room.len());
        spend(fits);
        room[..fits].copy_from_slice(&bytes[..fits]);
        self.length += fits;
        self.over |= fits < bytes.len();
    }
}

#[cfg(test)]
mod tests;
