//! The single form of a text in the canonical text, independent of the client's escapes.
//!
//! The form is JSON's shortest, which most clients write: only quotes, backslashes and control characters are
//! escaped, with a letter if there is one. So the texts of most clients go to the sink unchanged, and only
//! escapes of another form (`\u00e9`, `\/`) are replaced.
//!
//! Never: take apart a text that already has the form.

use crate::json::work::spend;
use crate::json::{ByteSink, WINDOW_BYTES, escape, is_undecided, lone_unit, windows};

/// Writes a string in the one form that the canonical text has for it, given the bytes between its quotes.
/// Returns how many of them were used: all, unless the string is cut within an escape.
pub(super) fn write_text<S: ByteSink>(raw: &[u8], whole: bool, out: &mut S) -> usize {
    // `at` is never within an escape. What stands from `start` on has not been written.
    let (mut start, mut at) = (0, 0);
    while let Some(escape_at) = next_replaced(raw, at) {
        let rest = &raw[escape_at..];
        if !whole && is_undecided(rest) {
            out.write(&raw[start..escape_at]);
            return escape_at;
        }
        out.write(&raw[start..escape_at]);
        let (character, used) = match lone_unit(rest) {
            Some(character) => (character, 6),
            None => escape(rest),
        };
        write_character(character, out);
        at = escape_at + used;
        start = at;
    }
    let mut end = raw.len();
    if !whole && backslashes_before(&raw[start..], end - start) % 2 == 1 {
        end -= 1;
    }
    out.write(&raw[start..end]);
    end
}

fn write_character<S: ByteSink>(character: char, out: &mut S) {
    let short = match character {
        '"' | '\\' => character as u8,
        '\u{8}' => b'b',
        '\t' => b't',
        '\n' => b'n',
        '\u{c}' => b'f',
        '\r' => b'r',
        '\0'..' ' => {
            let digit = |value: u32| b"0123456789abcdef"[value as usize];
            let code = u32::from(character);
            return out.write(&[b'\\', b'u', b'0', b'0', digit(code >> 4), digit(code & 15)]);
        }
        _ => return out.write(character.encode_utf8(&mut [0; 4]).as_bytes()),
    };
    out.write(&[b'\\', short]);
}

/// The first escape from `from` on that is written in another form: `\uXXXX` or `\/`. No escape goes through
/// `from`.
///
/// Most texts have none, and a window is passed over as a whole while no backslash of it stands before `u`
/// or `/`, in a form that compilers turn into vector instructions.
fn next_replaced(raw: &[u8], from: usize) -> Option<usize> {
    if is_replaced(raw.get(from..)?) {
        return Some(from);
    }
    let mut at = from;
    while let Some([here, next]) = windows(raw, [at, at + 1]) {
        spend(WINDOW_BYTES);
        let mut found = 0;
        for (here, next) in here.iter().zip(next) {
            found |= u8::from((*here == b'\\') & ((*next == b'u') | (*next == b'/')));
        }
        if found != 0
            && let Some(escape_at) = first_replaced(raw, from, at, at + WINDOW_BYTES)
        {
            return Some(escape_at);
        }
        at += WINDOW_BYTES;
    }
    first_replaced(raw, from, at, raw.len())
}

/// The first of these escapes that begins between `begin` and `end`; no escape goes through `floor`.
fn first_replaced(raw: &[u8], floor: usize, begin: usize, end: usize) -> Option<usize> {
    // The first byte may belong to the escape before it.
    let mut at = begin + backslashes_before(&raw[floor..], begin - floor) % 2;
    while let Some(found) = raw.get(at..end).and_then(|rest| memchr::memchr(b'\\', rest)) {
        spend(found + 2);
        at += found;
        if is_replaced(&raw[at..]) {
            return Some(at);
        }
        at += 2;
    }
    spend(end.saturating_sub(at));
    None
}

fn is_replaced(raw: &[u8]) -> bool {
    matches!(raw, [b'\\', b'u' | b'/', ..])
}

/// The number of backslashes that end at `at`.
fn backslashes_before(raw: &[u8], at: usize) -> usize {
    let count = raw[..at].iter().rev().take_while(|byte| **byte == b'\\').count();
    spend(count + 1);
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::json::unescape;

    fn written(raw: &[u8], whole: bool) -> (Vec<u8>, usize) {
        let mut text = Vec::new();
        let used = write_text(raw, whole, &mut text);
        (text, used)
    }

    #[test]
    fn a_text_has_one_form_however_it_is_escaped() {
        let all = r#"\"\\/\b\f\n\r\t\u0000\u001f\u007f\u00e9\ud83d\ude00\ud83d"#;
        let one = "\\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\u{7f}é😀\u{fffd}";
        assert_eq!(String::from_utf8(written(all.as_bytes(), true).0).unwrap(), one);
        let numbers =
            r"\u0022\u005C\u002f\u0008\u000C\u000a\u000D\u0009\u0000\u001F\u007f\u00E9\uD83D\uDE00\ud83d";
        assert_eq!(String::from_utf8(written(numbers.as_bytes(), true).0).unwrap(), one);
        for (raw, used) in
            [(r"a\", 1), (r"a\\", 3), (r"a\\\", 3), (r"a\u00", 1), (r"a\ud83d\", 1), ("a", 1), ("", 0)]
        {
            let expected = raw.as_bytes()[..used].to_vec();
            assert_eq!(written(raw.as_bytes(), false), (expected, used), "{raw}");
        }
    }

    #[test]
    fn an_escaped_backslash_begins_no_escape_wherever_it_stands() {
        for backslashes in 0..150 {
            for before in [0, 1, 62, 63, 64, 65] {
                let raw = "x".repeat(before) + &"\\".repeat(backslashes) + "u0041" + &"y".repeat(70) + r"\/";
                let text = String::from_utf8(written(raw.as_bytes(), true).0).unwrap();
                let expected = if backslashes % 2 == 1 {
                    raw.replacen(r"\u0041", "A", 1).replace(r"\/", "/")
                } else {
                    raw.replace(r"\/", "/")
                };
                assert_eq!(text, expected, "{before} {backslashes}");
            }
        }
    }

    /// What strings consist of.
    fn piece() -> impl Strategy<Value = String> {
        prop_oneof![
            r#"[a-c/uXé😀]|[a-z ]{20}|[a-z]{50,70}|\\[bfnrt/"\\]|(\\\\){1,40}"#,
            r"\\ud83d|\\ude00|\\u00e9|\\u00[01][0-9a-fA-F]|\\u005c",
        ]
    }

    proptest! {
        /// A form means what its string means, and is the form of itself. A cut string has its beginning.
        #[test]
        fn a_written_text_means_what_the_string_means(
            pieces in prop::collection::vec(piece(), 0..16), cut: Index,
        ) {
            let raw = pieces.concat();
            let raw = raw.as_bytes();
            let (whole, used) = written(raw, true);
            prop_assert_eq!(used, raw.len());
            prop_assert_eq!(unescape(&whole), unescape(raw));
            prop_assert_eq!(&written(&whole, true).0, &whole);
            let encoded = serde_json::to_string(&unescape(raw)).unwrap();
            prop_assert_eq!(&encoded.as_bytes()[1..encoded.len() - 1], &whole[..]);
            let (mut text, used) = written(&raw[..cut.index(raw.len() + 1)], false);
            prop_assert!(whole.starts_with(&text));
            text.extend(written(&raw[used..], true).0);
            prop_assert_eq!(text, whole);
        }

        #[test]
        fn any_bytes_are_taken(raw: Vec<u8>) {
            written(&raw, true);
            written(&raw, false);
        }
    }
}
