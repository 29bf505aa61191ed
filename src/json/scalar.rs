//! Numbers and literals: their one grammar, byte by byte, so that it holds however the bytes come.
//!
//! It is that of RFC 8259 and of serde_json, and `NaN`, `Infinity` and `-Infinity` beside it, which Python's
//! `json` reads and writes.

use super::work::spend;

/// The kind of a scalar value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScalarKind {
    Number,
    True,
    False,
    Null,
}

/// How much of a number or a literal has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScalarState {
    /// So many bytes of this word of [`WORDS`].
    Word {
        word: u8,
        read: u8,
    },
    Minus,
    /// A first digit that no other may follow.
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

const WORDS: [(&[u8], ScalarKind); 5] = [
    (b"true", ScalarKind::True),
    (b"false", ScalarKind::False),
    (b"null", ScalarKind::Null),
    (b"NaN", ScalarKind::Number),
    (b"Infinity", ScalarKind::Number),
];

/// `Infinity` in [`WORDS`], which may have a sign.
const INFINITY: u8 = 4;

impl ScalarState {
    /// The state behind the first byte; `None`: no number and no literal begins so.
    #[inline]
    pub(super) fn begin(byte: u8) -> Option<Self> {
        match byte {
            b'0' => Some(ScalarState::Zero),
            b'1'..=b'9' => Some(ScalarState::Integer),
            b'-' => Some(ScalarState::Minus),
            _ => {
                let word = WORDS.iter().position(|(word, _)| word[0] == byte)?;
                Some(ScalarState::Word { word: word as u8, read: 1 })
            }
        }
    }

    /// The state behind the next byte; `None`: the byte does not belong to it.
    #[inline]
    fn next(self, byte: u8) -> Option<Self> {
        match (self, byte) {
            (ScalarState::Word { word, read }, _) => {
                let goes_on = WORDS[usize::from(word)].0.get(usize::from(read)) == Some(&byte);
                goes_on.then_some(ScalarState::Word { word, read: read + 1 })
            }
            (ScalarState::Minus, b'I') => Some(ScalarState::Word { word: INFINITY, read: 1 }),
            (ScalarState::Minus, b'0') => Some(ScalarState::Zero),
            (ScalarState::Minus | ScalarState::Integer, b'0'..=b'9') => Some(ScalarState::Integer),
            (ScalarState::Zero | ScalarState::Integer, b'.') => Some(ScalarState::Point),
            (ScalarState::Point | ScalarState::Fraction, b'0'..=b'9') => Some(ScalarState::Fraction),
            (ScalarState::Zero | ScalarState::Integer | ScalarState::Fraction, b'e' | b'E') => {
                Some(ScalarState::Exponent)
            }
            (ScalarState::Exponent, b'+' | b'-') => Some(ScalarState::ExponentSign),
            (
                ScalarState::Exponent | ScalarState::ExponentSign | ScalarState::ExponentDigits,
                b'0'..=b'9',
            ) => Some(ScalarState::ExponentDigits),
            _ => None,
        }
    }

    /// How many of the bytes belong to it, and the state behind those.
    #[inline]
    pub(super) fn run(self, bytes: &[u8]) -> (usize, Self) {
        let mut state = self;
        let mut length = 0;
        for byte in bytes {
            let Some(next) = state.next(*byte) else { break };
            state = next;
            length += 1;
        }
        spend(length + 1);
        (length, state)
    }

    /// What it is if it ends here; `None`: it is not whole.
    pub(super) fn kind(self) -> Option<ScalarKind> {
        match self {
            ScalarState::Word { word, read } => {
                let (word, kind) = WORDS[usize::from(word)];
                (word.len() == usize::from(read)).then_some(kind)
            }
            ScalarState::Zero
            | ScalarState::Integer
            | ScalarState::Fraction
            | ScalarState::ExponentDigits => Some(ScalarKind::Number),
            ScalarState::Minus | ScalarState::Point | ScalarState::Exponent | ScalarState::ExponentSign => {
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kind(text: &str) -> Option<ScalarKind> {
        let (first, rest) = text.as_bytes().split_first()?;
        let (length, state) = ScalarState::begin(*first)?.run(rest);
        state.kind().filter(|_| length == rest.len())
    }

    #[test]
    fn python_has_three_numbers_more() {
        for text in ["NaN", "Infinity", "-Infinity"] {
            assert_eq!(kind(text), Some(ScalarKind::Number), "{text}");
            assert!(serde_json::from_str::<serde::de::IgnoredAny>(text).is_err(), "{text}");
        }
        for text in ["-NaN", "nan", "infinity", "+1", "Inf", "Infinityy"] {
            assert_eq!(kind(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_scalar_is_what_serde_json_takes_for_one(
            text in prop_oneof![
                r"-?[01][0-9]{0,3}(\.[0-9]{0,3})?([eE][+-]?[0-9]{0,3})?[;x.]?",
                r"[-+.0-9eE]{1,6}|true|false|null|[a-z]{1,5}",
            ],
        ) {
            let expected = serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok();
            prop_assert_eq!(kind(&text).is_some(), expected, "{}", text);
            let (first, rest) = text.as_bytes().split_first().unwrap();
            let whole = ScalarState::begin(*first).map(|state| state.run(rest));
            // Byte by byte it is the same.
            let in_bytes = ScalarState::begin(*first).map(|mut state| {
                let mut length = 0;
                for byte in rest.chunks(1) {
                    let (taken, next) = state.run(byte);
                    state = next;
                    length += taken;
                    if taken == 0 { break }
                }
                (length, state)
            });
            prop_assert_eq!(in_bytes, whole);
        }
    }
}
