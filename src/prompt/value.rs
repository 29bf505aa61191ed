//! Values as a client wrote them, turned into what vLLM understands by them.
//!
//! Shared by the JSON and the form scanner. Must never panic on any bytes: what cannot be decoded
//! becomes U+FFFD, and the upstream is left to refuse it in its own words.

use std::borrow::Cow;

use super::work::spend;
use crate::names::MAX_MODEL_BYTES;

/// The longest name of a model, in bytes. A longer name is one that nothing serves: it is kept as its
/// beginning and [`CUT_MARK`], which is never the name of a model that is short enough.
pub const MAX_MODEL_NAME_BYTES: usize = MAX_MODEL_BYTES;

/// The longest id of a stored response, in bytes: what is longer is cut likewise, and no response has it.
pub(super) const MAX_RESPONSE_ID_BYTES: usize = 256;

/// Ends a text that is longer than it may be.
const CUT_MARK: &str = "…(cut)";

/// The longest form of a character in a JSON string, for a byte of its text: `\u0061`.
const MAX_RAW_PER_BYTE: usize = 6;

/// What a request says about its model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ModelField<'a> {
    /// Missing, null or empty: vLLM then takes its own model.
    #[default]
    Absent,
    /// At most [`MAX_MODEL_NAME_BYTES`] long, or marked as cut.
    Named(Cow<'a, str>),
    /// A number, a list, ...: vLLM answers 400.
    NotAString,
}

impl<'a> ModelField<'a> {
    /// The empty name means the same as no name. What is too long for a name is cut.
    pub fn named(name: Cow<'a, str>) -> Self {
        if name.is_empty() {
            ModelField::Absent
        } else {
            ModelField::Named(shortened(name, MAX_MODEL_NAME_BYTES))
        }
    }

    pub fn name(&self) -> Option<&str> {
        match self {
            ModelField::Named(name) => Some(name),
            ModelField::Absent | ModelField::NotAString => None,
        }
    }
}

/// The strings that pydantic takes for true where a boolean is asked for.
pub(super) fn is_true_word(word: &str) -> bool {
    spend(word.len());
    ["true", "1", "yes", "on", "y", "t"].iter().any(|known| word.eq_ignore_ascii_case(known))
}

/// The longest of these words, every character of it written as `\uXXXX`.
pub(super) const MAX_TRUE_WORD_BYTES: usize = MAX_RAW_PER_BYTE * "true".len();

/// The numbers that pydantic takes for true: whatever equals one.
pub(super) fn is_true_number(number: &[u8]) -> bool {
    spend(number.len());
    std::str::from_utf8(number).ok().and_then(|text| text.parse::<f64>().ok()) == Some(1.0)
}

/// A text of at most `most` bytes, or its beginning and the mark of a cut, which is longer than `most`.
pub(super) fn shortened(text: Cow<'_, str>, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return text;
    }
    let mut end = most;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Cow::Owned([&text[..end], CUT_MARK].concat())
}

/// The text of a JSON string as [`shortened`] makes it. Of a long one only the beginning is looked at.
pub(super) fn unescape_short(raw: &[u8], most: usize) -> Cow<'_, str> {
    // So many bytes have more text than that, whatever the escape is that this cuts.
    let reach = MAX_RAW_PER_BYTE * (most + 2);
    shortened(unescape(raw.get(..reach).unwrap_or(raw)), most)
}

/// The text of bytes as [`shortened`] makes it. Of many only the beginning is looked at.
pub(super) fn lossy_short(bytes: &[u8], most: usize) -> Cow<'_, str> {
    // What is no UTF-8 takes no less room as text.
    let reach = most + 4;
    let seen = bytes.get(..reach).unwrap_or(bytes);
    spend(seen.len());
    shortened(String::from_utf8_lossy(seen), most)
}

/// The text of a JSON string, given the bytes between its quotes. Borrows where nothing is escaped.
///
/// Two escaped surrogates make one character as they do in Python. A lone one has no place in UTF-8
/// and becomes U+FFFD, which no served model is called.
pub(crate) fn unescape(raw: &[u8]) -> Cow<'_, str> {
    spend(raw.len());
    if memchr::memchr(b'\\', raw).is_none() {
        // Making sure that there is nothing to replace is quicker than looking for what to replace.
        return std::str::from_utf8(raw).map_or_else(|_| String::from_utf8_lossy(raw), Cow::Borrowed);
    }
    let mut text = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = memchr::memchr(b'\\', rest) {
        text.extend_from_slice(&rest[..at]);
        let (decoded, used) = escape(&rest[at..]);
        text.extend_from_slice(decoded.encode_utf8(&mut [0; 4]).as_bytes());
        rest = &rest[at + used..];
    }
    text.extend_from_slice(rest);
    match String::from_utf8(text) {
        Ok(text) => Cow::Owned(text),
        Err(error) => Cow::Owned(String::from_utf8_lossy(error.as_bytes()).into_owned()),
    }
}

/// One escape, which begins at the backslash: its character and its length.
pub(super) fn escape(raw: &[u8]) -> (char, usize) {
    let character = match raw.get(1) {
        Some(b'u') => return unicode_escape(raw),
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(&plain @ (b'"' | b'\\' | b'/')) => char::from(plain),
        // Not JSON. Only the backslash is used up, so that no character is cut in two.
        _ => return (char::REPLACEMENT_CHARACTER, 1),
    };
    (character, 2)
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

/// The four hexadecimal digits of `\uXXXX`.
fn code_unit(raw: &[u8]) -> Option<u16> {
    let digits = raw.strip_prefix(b"\\u")?.get(..4)?;
    digits.iter().try_fold(0, |unit: u16, digit| {
        let value = char::from(*digit).to_digit(16)?;
        Some(unit << 4 | u16::try_from(value).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn escapes_are_decoded_as_python_does() {
        for (raw, text) in [
            ("plain", "plain"),
            ("", ""),
            (r#"a\"b\\c\/d"#, "a\"b\\c/d"),
            (r"\b\f\n\r\t", "\u{8}\u{c}\n\r\t"),
            (r"caf\u00e9 \u00E9", "café é"),
            (r"\ud83d\ude00!", "😀!"),
            (r"\ud83d", "\u{fffd}"),
            (r"\ude00\ud83d", "\u{fffd}\u{fffd}"),
            (r"\ud83d\u0041", "\u{fffd}A"),
            (r"\ud83dx", "\u{fffd}x"),
            (r"\u00", "\u{fffd}00"),
            (r"\u+0041", "\u{fffd}+0041"),
            (r"\x", "\u{fffd}x"),
            ("\\", "\u{fffd}"),
            ("\\é", "\u{fffd}é"),
        ] {
            assert_eq!(unescape(raw.as_bytes()), text, "{raw}");
        }
        assert!(matches!(unescape(b"plain"), Cow::Borrowed(_)));
        assert_eq!(unescape(b"\xff\\n"), "\u{fffd}\n");
    }

    #[test]
    fn truth_is_pydantics() {
        for word in ["true", "TRUE", "1", "yes", "On", "y", "T"] {
            assert!(is_true_word(word), "{word}");
        }
        for word in ["", "false", "0", "2", "no", "off", "truth"] {
            assert!(!is_true_word(word), "{word}");
        }
        for (number, truth) in [("1", true), ("1.0", true), ("10e-1", true), ("0", false), ("2", false)] {
            assert_eq!(is_true_number(number.as_bytes()), truth, "{number}");
        }
    }

    #[test]
    fn a_long_name_is_cut_and_is_no_short_one() {
        let longest = "x".repeat(MAX_MODEL_NAME_BYTES);
        assert_eq!(ModelField::named(longest.as_str().into()).name(), Some(longest.as_str()));
        for long in [longest.clone() + "y", "é".repeat(3000), "x".repeat(1 << 20), "😀".repeat(1100)] {
            let model = ModelField::named(long.as_str().into());
            let name = model.name().unwrap();
            assert!(name.len() > MAX_MODEL_NAME_BYTES && name.len() <= MAX_MODEL_NAME_BYTES + CUT_MARK.len());
            let begin = name.strip_suffix(CUT_MARK).unwrap();
            assert!(long.starts_with(begin) && begin.len() + 4 > MAX_MODEL_NAME_BYTES);
            let escaped: String = long.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            assert_eq!(unescape_short(escaped.as_bytes(), MAX_MODEL_NAME_BYTES), name);
            assert_eq!(lossy_short(long.as_bytes(), MAX_MODEL_NAME_BYTES), name);
        }
    }

    proptest! {
        #[test]
        fn what_is_read_of_a_long_text_is_the_cut_of_all_of_it(
            raw in r#"([a-c"é😀]|\\[nu"x\\]|\\ud83d|\\ude00|\\u00e9|\\u00){0,40}"#, most in 0..40_usize,
        ) {
            let raw = raw.as_bytes();
            prop_assert_eq!(unescape_short(raw, most), shortened(unescape(raw), most));
            prop_assert_eq!(lossy_short(raw, most), shortened(String::from_utf8_lossy(raw), most));
        }

        #[test]
        fn bytes_that_are_no_text_are_cut_alike(bytes in any::<Vec<u8>>(), most in 0..40_usize) {
            prop_assert_eq!(lossy_short(&bytes, most), shortened(String::from_utf8_lossy(&bytes), most));
        }

        #[test]
        fn any_text_survives_a_round_trip(text in any::<String>()) {
            let json = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(unescape(&json.as_bytes()[1..json.len() - 1]), text);
        }

        #[test]
        fn any_text_survives_escaped_to_the_last_character(text in any::<String>()) {
            let raw: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            prop_assert_eq!(unescape(raw.as_bytes()), text);
        }

        #[test]
        fn any_bytes_are_taken(raw in any::<Vec<u8>>()) {
            unescape(&raw);
        }
    }
}
