//! The session that a cookie names.
//!
//! Starlette keeps a session in a signed cookie, which it signs anew with each answer:
//!
//! ```text
//! VLLMModel___policy_model=eyJzZXNzaW9uX2lkIjogIjFmIn0=.aQ3x0A.6vVh…   JSON in base64, time, signature
//! ```
//!
//! Of such a value the `session_id` in its JSON is the session. The signature is not checked, since a name
//! of a session grants nothing.

use std::borrow::Cow;

use base64::alphabet::URL_SAFE;
use base64::engine::{Engine, GeneralPurpose, general_purpose};
use http::{HeaderMap, header};

use super::name::{member, text, trimmed_name};
use crate::json::RawValue;

/// How a JSON object begins in base64.
const OBJECT_IN_BASE64: &[u8] = b"ey";

/// A name of cookies in which `*` stands for any text.
#[derive(Clone, Debug)]
pub(super) struct CookiePattern {
    pattern: Vec<u8>,
}

// === impl CookiePattern ===

impl CookiePattern {
    pub(super) fn new(text: &str) -> Self {
        CookiePattern { pattern: text.as_bytes().to_vec() }
    }

    fn fits(&self, name: &[u8]) -> bool {
        let mut parts = self.pattern.split(|byte| *byte == b'*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            let Some(at) = memchr::memmem::find(rest, part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

/// The session in the first cookie that fits the first of these patterns.
pub(super) fn session<'a>(headers: &'a HeaderMap, patterns: &[CookiePattern]) -> Option<Cow<'a, [u8]>> {
    if !headers.contains_key(header::COOKIE) {
        return None;
    }
    patterns.iter().find_map(|pattern| {
        let lines = headers.get_all(header::COOKIE).iter();
        let mut pairs = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';'));
        pairs.find_map(|pair| {
            let at = memchr::memchr(b'=', pair)?;
            let value = trimmed_name(&pair[at + 1..]).filter(|_| pattern.fits(pair[..at].trim_ascii()))?;
            Some(signed_session(value).map_or(Cow::Borrowed(value), Cow::Owned))
        })
    })
}

/// The session in a value that Starlette has signed.
fn signed_session(value: &[u8]) -> Option<Vec<u8>> {
    // Python's client libraries put values with `=` into quotes.
    let value = value.strip_prefix(b"\"").and_then(|inner| inner.strip_suffix(b"\"")).unwrap_or(value);
    let payload = value.split(|byte| *byte == b'.').next()?;
    if !payload.starts_with(OBJECT_IN_BASE64) {
        return None;
    }
    let json = base64(payload)?;
    let session = member(RawValue { bytes: &json, whole: true }, "session_id")?;
    text(session).map(Cow::into_owned)
}

/// Decodes base64 of either alphabet, with padding or without.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    const DIGITS: GeneralPurpose =
        GeneralPurpose::new(&URL_SAFE, general_purpose::NO_PAD.with_decode_allow_trailing_bits(true));
    let end = text.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let one_alphabet = |byte: &u8| match byte {
        b'+' => b'-',
        b'/' => b'_',
        byte => *byte,
    };
    DIGITS.decode(text[..end].iter().map(one_alphabet).collect::<Vec<_>>()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, fitting, other) in [
            ("a", &["a"][..], &["", "b", "aa"][..]),
            ("*___*", &["VLLMModel___policy_model", "___", "a___", "a____b"], &["a__b", "", "_a_a_"]),
            ("a*", &["a", "ab"], &["ba", ""]),
            ("*a", &["a", "ba", "aa"], &["ab", ""]),
            ("a*b*c", &["abc", "a1b2c", "abbc"], &["acb", "ac", "abcd"]),
            ("a*a", &["aa", "aba"], &["a"]),
            ("*", &["", "x"], &[]),
        ] {
            let pattern = CookiePattern::new(pattern);
            for name in fitting {
                assert!(pattern.fits(name.as_bytes()), "{name:?} for {pattern:?}");
            }
            for name in other {
                assert!(!pattern.fits(name.as_bytes()), "{name:?} for {pattern:?}");
            }
        }
    }

    #[test]
    fn base64_is_decoded_in_both_alphabets() {
        for (text, bytes) in [
            ("", Some(&b""[..])),
            ("Zg==", Some(b"f")),
            ("Zg", Some(b"f")),
            ("Zm8=", Some(b"fo")),
            ("Zm9v", Some(b"foo")),
            ("Zm9vYmE=", Some(b"fooba")),
            ("+/+/", Some(b"\xfb\xff\xbf")),
            ("-_-_", Some(b"\xfb\xff\xbf")),
            ("Z", None),
            ("Zm9vY", None),
            ("Zm!v", None),
            ("Zg=v", None),
        ] {
            assert_eq!(base64(text.as_bytes()).as_deref(), bytes, "{text:?}");
        }
    }

    /// The values were signed by itsdangerous 2.2.0 as Starlette does it.
    #[test]
    fn a_value_that_starlette_signed_names_its_session() {
        for (value, session) in [
            ("eyJzZXNzaW9uX2lkIjogIjBiNWMtNDEifQ==.awIqzQ.x2_yA8KmJEEFNTIVFLtaVmdzKVk", Some("0b5c-41")),
            ("\"eyJzZXNzaW9uX2lkIjogIjBiNWMtNDEifQ==.awIqzQ.x2_yA8KmJEEFNTIVFLtaVmdzKVk\"", Some("0b5c-41")),
            ("eyJzZXNzaW9uX2lkIjogIjBiNWMtNDEifQ==", Some("0b5c-41")),
            ("eyJvdGhlciI6IDF9.awIqzQ.1nZt-2mDv5B_zAk3Mkj5G9e0M6o", None),
            ("eyJzZXNzaW9u.aQ3x0A.x", None),
            ("eye", None),
            ("0b5c-41", None),
            ("", None),
        ] {
            let found = signed_session(value.as_bytes());
            assert_eq!(found.as_deref(), session.map(str::as_bytes), "{value}");
        }
    }
}
