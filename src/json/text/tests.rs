//! Tests of `text`.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn decoded(raw: &[u8], whole: bool) -> (Vec<u8>, usize) {
    let mut text = Vec::new();
    let used = decode(raw, whole, &mut text);
    (text, used)
}

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
fn a_long_name_is_no_short_one() {
    let mut short = ShortText::default();
    decode(&[b'a'; 33], true, &mut short);
    assert_eq!((short.text(), short.begin().len()), (None, 32));
}

/// Escape by escape, as plainly as can be.
fn plainly(raw: &[u8]) -> Vec<u8> {
    let (mut text, mut at) = (Vec::new(), 0);
    while at < raw.len() {
        if raw[at] == b'\\' {
            let (character, used) = escape(&raw[at..]);
            text.extend_from_slice(character.to_string().as_bytes());
            at += used;
        } else {
            text.push(raw[at]);
            at += 1;
        }
    }
    text
}

proptest! {
    #[test]
    fn decoding_is_unescaping(
        raw in r#"([a-c"é😀]|[a-z ]{20}|\\[nu"x\\]|\\ud83d|\\ude00|\\u00e9){0,12}"#, cut: Index,
    ) {
        let raw = raw.as_bytes();
        let whole = decoded(raw, true);
        prop_assert_eq!(&whole.0, &plainly(raw));
        prop_assert_eq!(String::from_utf8_lossy(&whole.0), unescape(raw));
        prop_assert_eq!(whole.1, raw.len());
        // A cut string gives a beginning, and the rest follows from where it stopped.
        let (mut text, used) = decoded(&raw[..cut.index(raw.len() + 1)], false);
        prop_assert!(whole.0.starts_with(&text));
        text.extend(decoded(&raw[used..], true).0);
        prop_assert_eq!(text, whole.0);
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
        decoded(&raw, true);
        decoded(&raw, false);
    }
}
