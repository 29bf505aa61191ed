//! Turns what stands in a body into what it means: strings into their text, JSON into its shortest form.
//!
//! Everything flows from the body's bytes into a [`TextSink`], run by run; nothing is put together in
//! between. The ends of strings that are cut are held back as long as they could still turn out to be
//! something else, so that what is written is always the beginning of what the whole would be.

use super::super::chain::TextSink;
use super::super::scan::bytes::find_in;
use super::super::value::escape;
use super::super::work::spend;

/// The longest escape: two halves of a pair, `\ud83d\ude00`.
const MAX_ESCAPE_BYTES: usize = 12;

/// Writes what a string means, given the bytes between its quotes. Returns how many of them were used: all,
/// unless the string is cut within an escape.
#[inline]
pub fn decode<S: TextSink>(raw: &[u8], whole: bool, out: &mut S) -> usize {
    let plain = memchr::memchr(b'\\', raw).unwrap_or(raw.len());
    spend(plain);
    if plain > 0 {
        out.write(&raw[..plain]);
    }
    if plain == raw.len() { plain } else { decode_escaped(raw, plain, whole, out) }
}

/// The same from the first backslash on. Prose has an escape in every line, so runs between them are short:
/// they are copied and searched in one go, and handed on many at a time.
fn decode_escaped<S: TextSink>(raw: &[u8], first: usize, whole: bool, out: &mut S) -> usize {
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
            at += write_escape(rest, &mut stage);
        }
    }
    stage.flush();
    at
}

/// The character of an escape `\uXXXX` that is no half of a pair. Clients that write nothing but ASCII
/// write whole languages in it.
#[inline]
pub(super) fn lone_unit(rest: &[u8]) -> Option<char> {
    let [b'\\', b'u', digits @ ..] = rest.first_chunk::<6>()? else { return None };
    let mut unit = 0;
    for digit in digits {
        let value = HEXADECIMAL[usize::from(*digit)];
        unit = unit << 8 | u32::from(value);
    }
    let spread = unit & 0xf0f0_f0f0;
    let packed = (unit >> 12 & 0xf000) | (unit >> 8 & 0xf00) | (unit >> 4 & 0xf0) | unit & 0xf;
    if spread == 0 { char::from_u32(packed) } else { None }
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

impl<'s, S: TextSink> SinkBuffer<'s, S> {
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

impl<S: TextSink> TextSink for SinkBuffer<'_, S> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.push(*byte));
    }
}

fn write_escape<S: TextSink>(rest: &[u8], out: &mut S) -> usize {
    let (character, used) = escape(rest);
    out.write(character.encode_utf8(&mut [0; 4]).as_bytes());
    used
}

/// Whether bytes that begin with a backslash could become another character if more came after them.
pub(super) fn is_undecided(rest: &[u8]) -> bool {
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

/// How many of the bytes between a string's quotes lead up to a character and include it, however it is
/// written.
pub fn after(raw: &[u8], character: u8) -> Option<usize> {
    let mut at = 0;
    loop {
        let rest = raw.get(at..)?;
        let found = memchr::memchr2(character, b'\\', rest);
        spend(found.unwrap_or(rest.len()) + 1);
        at += found?;
        if raw[at] == character {
            return Some(at + 1);
        }
        let (decoded, used) = escape(&raw[at..]);
        at += used;
        if decoded == char::from(character) {
            return Some(at);
        }
    }
}

/// Whether the text of a string begins with `prefix`; none where a cut string is too short to tell.
pub fn begins_with(raw: &[u8], whole: bool, prefix: &str) -> Option<bool> {
    let mut short = ShortText::default();
    let reach = raw.len().min(6 * prefix.len());
    decode(&raw[..reach], whole && reach == raw.len(), &mut short);
    let text = short.begin();
    let all = text.starts_with(prefix.as_bytes());
    let may = prefix.as_bytes().starts_with(text) && !whole;
    if may && !all { None } else { Some(all) }
}

/// A text that is only compared with short names: what does not fit is none of them.
#[derive(Default)]
pub struct ShortText {
    bytes: [u8; 32],
    length: usize,
    over: bool,
}

impl ShortText {
    /// All of it.
    pub fn text(&self) -> Option<&[u8]> {
        (!self.over).then(|| self.begin())
    }

    fn begin(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl TextSink for ShortText {
    fn write(&mut self, bytes: &[u8]) {
        let room = &mut self.bytes[self.length..];
        let fits = bytes.len().min(room.len());
        spend(fits);
        room[..fits].copy_from_slice(&bytes[..fits]);
        self.length += fits;
        self.over |= fits < bytes.len();
    }
}

/// Writes JSON without the white space between its tokens, and without escapes in its strings.
///
/// It takes JSON in whatever pieces it comes, so that it can stand behind [`decode`]: the arguments of a
/// call are JSON in one interface and a string that holds JSON in others. What is no JSON comes out as
/// something, and always as the same.
pub struct Minifier<'s, S> {
    out: &'s mut S,
    place: MinifierState,
}

#[derive(Clone, Copy)]
enum MinifierState {
    Between,
    InString,
    InEscape { held: [u8; MAX_ESCAPE_BYTES], length: usize },
}

impl<'s, S: TextSink> Minifier<'s, S> {
    pub fn new(out: &'s mut S) -> Self {
        Minifier { out, place: MinifierState::Between }
    }

    fn between<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let stops = |byte: &u8| matches!(byte, b'"' | b' ' | b'\n' | b'\r' | b'\t');
        let run = bytes.iter().position(stops).unwrap_or(bytes.len());
        match bytes.get(run) {
            Some(b'"') => {
                self.out.write(&bytes[..=run]);
                self.place = MinifierState::InString;
            }
            _ => self.out.write(&bytes[..run]),
        }
        bytes.get(run + 1..).unwrap_or_default()
    }

    fn in_string<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let run = memchr::memchr2(b'"', b'\\', bytes).unwrap_or(bytes.len());
        match bytes.get(run) {
            Some(b'"') => {
                self.out.write(&bytes[..=run]);
                self.place = MinifierState::Between;
            }
            Some(_) => {
                self.out.write(&bytes[..run]);
                let mut held = [0; MAX_ESCAPE_BYTES];
                held[0] = b'\\';
                self.place = MinifierState::InEscape { held, length: 1 };
            }
            None => self.out.write(bytes),
        }
        bytes.get(run + 1..).unwrap_or_default()
    }

    /// Takes one byte, or none when it does not belong to the escape that it decides.
    fn in_escape<'b>(
        &mut self,
        mut held: [u8; MAX_ESCAPE_BYTES],
        length: usize,
        bytes: &'b [u8],
    ) -> &'b [u8] {
        held[length] = bytes[0];
        let seen = &held[..=length];
        if is_undecided(seen) {
            self.place = MinifierState::InEscape { held, length: length + 1 };
            return &bytes[1..];
        }
        let used = write_escape(seen, self.out);
        self.place = MinifierState::InString;
        if used > length {
            return &bytes[1..];
        }
        if used < length {
            // A lone half of a pair, with the beginning of another escape behind it.
            held.copy_within(used..length, 0);
            self.place = MinifierState::InEscape { held, length: length - used };
        }
        bytes
    }
}

impl<S: TextSink> TextSink for Minifier<'_, S> {
    #[inline]
    fn write(&mut self, mut bytes: &[u8]) {
        spend(bytes.len());
        while !bytes.is_empty() {
            bytes = match self.place {
                MinifierState::Between => self.between(bytes),
                MinifierState::InString => self.in_string(bytes),
                MinifierState::InEscape { held, length } => self.in_escape(held, length, bytes),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::super::super::value::unescape;
    use super::*;

    fn decoded(raw: &[u8], whole: bool) -> (Vec<u8>, usize) {
        let mut text = Vec::new();
        let used = decode(raw, whole, &mut text);
        (text, used)
    }

    fn minified(pieces: &[&[u8]]) -> String {
        let mut text = Vec::new();
        let mut minifier = Minifier::new(&mut text);
        for piece in pieces {
            minifier.write(piece);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn what_is_cut_within_an_escape_waits() {
        for (raw, text, used) in [
            (r"a\", "a", 1),
            (r"a\n", "a\n", 3),
            (r"a\u00", "a", 1),
            (r"a\u00e9", "aé", 7),
            (r"a\ud83d", "a", 1),
            (r"a\ud83d\", "a", 1),
            (r"a\ud83d\ude0", "a", 1),
            (r"a\ud83d\ude00", "a😀", 13),
            (r"a\ud83d\n", "a\u{fffd}\n", 9),
            (r"a\ud83dx", "a\u{fffd}x", 8),
        ] {
            assert_eq!(decoded(raw.as_bytes(), false), (text.as_bytes().to_vec(), used), "{raw}");
        }
    }

    #[test]
    fn the_shortest_form_keeps_the_order_and_the_strings() {
        for (json, short) in [
            (r#" { "b" : [ 1 , 2.50 ] , "a" : "x  y" } "#, r#"{"b":[1,2.50],"a":"x  y"}"#),
            (r#"["\u00e9\n\ud83d\ude00"]"#, "[\"é\n😀\"]"),
            (r#"["\ud83d", "\ud83d\u0041\ud83dx"]"#, "[\"\u{fffd}\",\"\u{fffd}A\u{fffd}x\"]"),
            (r#"["\ud83d\\ "]"#, "[\"\u{fffd}\\ \"]"),
            (r#"["\x\ud83d\x"]"#, "[\"\u{fffd}x\u{fffd}\u{fffd}x\"]"),
            ("no json at all", "nojsonatall"),
            ("", ""),
        ] {
            assert_eq!(minified(&[json.as_bytes()]), short, "{json}");
        }
    }

    #[test]
    fn beginnings_are_told_however_they_are_written() {
        for (raw, whole, begins) in [
            ("data:x", true, Some(true)),
            (r"\u0064at\u0061:x", true, Some(true)),
            ("dat", false, None),
            (r"dat\u00", false, None),
            ("dat", true, Some(false)),
            ("date:x", false, Some(false)),
            (r"\u0064\u0061\u0074\u0061\u003a\u0078", false, Some(true)),
            ("", false, None),
            ("", true, Some(false)),
        ] {
            assert_eq!(begins_with(raw.as_bytes(), whole, "data:"), begins, "{raw}");
        }
        for (raw, offset) in
            [("ab,c", Some(3)), (r"a\n\u002c,", Some(9)), (r"a\\u002c", None), ("", None), (r"\", None)]
        {
            assert_eq!(after(raw.as_bytes(), b','), offset, "{raw}");
        }
    }

    #[test]
    fn a_long_name_is_no_short_one() {
        let mut short = ShortText::default();
        decode(&[b'a'; 33], true, &mut short);
        assert_eq!((short.text(), short.begin().len()), (None, 32));
    }

    proptest! {
        #[test]
        fn decoding_is_unescaping(
            raw in r#"([a-c"é😀]|[a-z ]{20}|\\[nu"x\\]|\\ud83d|\\ude00|\\u00e9){0,12}"#, cut: Index,
        ) {
            let raw = raw.as_bytes();
            let whole = decoded(raw, true);
            prop_assert_eq!(String::from_utf8_lossy(&whole.0), unescape(raw));
            prop_assert_eq!(whole.1, raw.len());
            // A cut string gives a beginning, and the rest follows from where it stopped.
            let (mut text, used) = decoded(&raw[..cut.index(raw.len() + 1)], false);
            prop_assert!(whole.0.starts_with(&text));
            text.extend(decoded(&raw[used..], true).0);
            prop_assert_eq!(text, whole.0);
        }

        #[test]
        fn any_pieces_give_the_shortest_form_of_the_whole(
            json in r#"([ab,: {}]|"|\\[nu"x\\]|\\ud83d|\\ude00|\\u00e9){0,16}"#, cut: Index, other: Index,
        ) {
            let json = json.as_bytes();
            let (head, tail) = json.split_at(cut.index(json.len() + 1));
            let (middle, tail) = tail.split_at(other.index(tail.len() + 1));
            prop_assert_eq!(minified(&[head, middle, tail]), minified(&[json]));
            prop_assert!(minified(&[json]).starts_with(&minified(&[head])));
        }

        #[test]
        fn any_bytes_are_taken(raw: Vec<u8>) {
            decoded(&raw, true);
            decoded(&raw, false);
            after(&raw, b',');
            minified(&[&raw]);
        }
    }
}
