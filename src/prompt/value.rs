//! Decodes values of a client's body to their meaning in vLLM.
//!
//! Shared by the JSON and the form scanner. Never panics on any bytes: undecodable bytes become U+FFFD, and
//! the upstream's error explains them.

use std::borrow::Cow;

use crate::json::unescape;
use crate::json::work::spend;
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

/// The model in a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ModelField<'a> {
    /// Missing, null or empty: vLLM then uses its own model.
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

    /// The name, if the request has one.
    pub fn name(&self) -> Option<&str> {
        match self {
            ModelField::Named(name) => Some(name),
            ModelField::Absent | ModelField::NotAString => None,
        }
    }
}

/// Whether pydantic accepts a string as true for a boolean field.
pub(super) fn is_true_word(word: &str) -> bool {
    spend(word.len());
    ["true", "1", "yes", "on", "y", "t"].iter().any(|known| word.eq_ignore_ascii_case(known))
}

/// The longest of these words, every character of it written as `\uXXXX`.
pub(super) const MAX_TRUE_WORD_BYTES: usize = MAX_RAW_PER_BYTE * "true".len();

/// Whether pydantic accepts a number as true: any notation of one.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accepts_booleans_like_pydantic() {
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
    fn cuts_long_names() {
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
    }
}
