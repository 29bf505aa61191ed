//! An event of one token in the exact form in which engines write it, which is most of a chat's stream.
//!
//! It is compared with that form member by member, which takes a small part of the time of a parser. An event
//! of any other form, such as one with an escape in its text, is left to the parser of its reader, and both
//! read the same from it.
//!
//! Never: accept what is no JSON. The front of the event, up to the choices, is not read here: its reader
//! compares it with that of an event before.

use std::ops::Range;

use serde::de::IgnoredAny;

use crate::json::read_value;

/// The members of a delta that are read otherwise than by appending a text.
const OTHER_MEMBERS: &[&str] = &["role", "tool_calls", "function_call"];

/// The choice of an event of one token, and what stands behind the choices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenEvent<'a> {
    pub index: u32,
    /// The only member of the delta.
    pub key: &'a str,
    pub text: &'a str,
    pub logprob: Option<f64>,
    pub token_id: Option<u32>,
    /// As it stands.
    pub usage: Option<&'a str>,
}

/// Where the values of an event stand that a client gets only if they are requested.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSpans {
    pub logprobs: Range<usize>,
    pub token_ids: Range<usize>,
}

/// Reads an event's data from behind the bracket of its choices to its end.
pub fn read_token_event(json: &[u8]) -> Option<(TokenEvent<'_>, TokenSpans)> {
    let at = |rest: &[u8]| json.len() - rest.len();
    let (index, rest) = number(behind(json, b"{\"index\":")?)?;
    let rest = behind(rest, b",\"delta\":{\"")?;
    let (key, rest) = match behind(rest, b"content\"") {
        Some(rest) => ("content", rest),
        None => plain_string(rest)?,
    };
    let (text, rest) = plain_string(behind(rest, b":\"")?)?;
    let rest = behind(rest, b"},\"logprobs\":")?;
    let start = at(rest);
    let (logprob, rest) = match behind(rest, b"null") {
        Some(rest) => (None, rest),
        None => single_logprob(rest).map(|(value, rest)| (Some(value), rest))?,
    };
    let logprobs = start..at(rest);
    let rest = behind(rest, b",\"finish_reason\":null,\"token_ids\":")?;
    let start = at(rest);
    let (token_id, rest) = match behind(rest, b"null") {
        Some(rest) => (None, rest),
        None => {
            let (id, rest) = number(behind(rest, b"[")?)?;
            (Some(id), behind(rest, b"]")?)
        }
    };
    let token_ids = start..at(rest);
    let (usage, end) = match behind(rest, b"}]")? {
        end @ b"}" => (None, end),
        rest => usage(rest)?,
    };
    let is_read = end == b"}" && !OTHER_MEMBERS.contains(&key);
    let event = TokenEvent { index, key, text, logprob, token_id, usage };
    is_read.then_some((event, TokenSpans { logprobs, token_ids }))
}

/// Reads the log-probability of one token without alternatives, and returns what stands behind it.
pub fn single_logprob(json: &[u8]) -> Option<(f64, &[u8])> {
    let rest = behind(json, b"{\"content\":[{\"token\":\"")?;
    let (value, rest) = float(behind(&rest[plain_end(rest)?..], b"\",\"logprob\":")?)?;
    let rest = skip_byte_list(behind(rest, b",\"bytes\":[")?)?;
    Some((value, behind(rest, b",\"top_logprobs\":[]}]}")?))
}

/// What stands behind these bytes.
#[inline]
fn behind<'a, const N: usize>(json: &'a [u8], front: &[u8; N]) -> Option<&'a [u8]> {
    json.split_first_chunk().filter(|(found, _)| *found == front).map(|(_, rest)| rest)
}

/// Where a string ends that has no escape, from behind its quote.
#[inline]
fn plain_end(json: &[u8]) -> Option<usize> {
    let end = json.iter().position(|byte| matches!(byte, b'"' | b'\\' | ..b' '))?;
    (json[end] == b'"').then_some(end)
}

/// Reads a string without escapes from behind its quote, and returns what stands behind it.
fn plain_string(json: &[u8]) -> Option<(&str, &[u8])> {
    let (text, rest) = json.split_at(plain_end(json)?);
    Some((std::str::from_utf8(text).ok()?, &rest[1..]))
}

/// Reads a number without a sign and returns what stands behind it.
fn number(json: &[u8]) -> Option<(u32, &[u8])> {
    let (digits, rest) = json.split_at(digits(json));
    let is_json = digits == b"0" || !matches!(digits, [] | [b'0', ..]);
    // More digits than these fit no token id.
    let value = (is_json && digits.len() <= 10)
        .then(|| digits.iter().fold(0, |value, digit| 10 * value + u64::from(digit - b'0')))?;
    Some((u32::try_from(value).ok()?, rest))
}

/// How many digits stand at the front.
#[inline]
fn digits(json: &[u8]) -> usize {
    json.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(json.len())
}

/// Reads a number and returns what stands behind it.
fn float(json: &[u8]) -> Option<(f64, &[u8])> {
    let mut at = usize::from(json.first() == Some(&b'-'));
    let whole = digits(&json[at..]);
    if whole == 0 || (whole > 1 && json[at] == b'0') {
        return None;
    }
    at += whole;
    if json.get(at) == Some(&b'.') {
        let fraction = digits(&json[at + 1..]);
        at += 1 + fraction;
        if fraction == 0 {
            return None;
        }
    }
    if matches!(json.get(at), Some(b'e' | b'E')) {
        at += 1 + usize::from(matches!(json.get(at + 1), Some(b'+' | b'-')));
        let exponent = digits(&json[at..]);
        at += exponent;
        if exponent == 0 {
            return None;
        }
    }
    let (text, rest) = json.split_at(at);
    let value: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    value.is_finite().then_some((value, rest))
}

/// Skips a list of numbers from behind its bracket.
fn skip_byte_list(json: &[u8]) -> Option<&[u8]> {
    let (mut digits, mut is_zero) = (0_u32, false);
    for (at, byte) in json.iter().enumerate() {
        match byte {
            b'0'..=b'9' if digits == 0 || !is_zero => {
                is_zero = digits == 0 && *byte == b'0';
                digits += 1;
            }
            b',' if digits > 0 => digits = 0,
            b']' if digits > 0 || at == 0 => return json.get(at + 1..),
            _ => return None,
        }
    }
    None
}

/// Reads the usage, if there is one, and returns what stands behind it.
fn usage(json: &[u8]) -> Option<(Option<&str>, &[u8])> {
    let Some(rest) = behind(json, b",\"usage\":") else { return Some((None, json)) };
    let end = read_value(rest, 0).ok()?;
    let (usage, behind) = (std::str::from_utf8(rest.get(..end)?).ok()?, rest.get(end..)?);
    serde_json::from_str::<IgnoredAny>(usage).ok()?;
    Some(((usage != "null").then_some(usage), behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "{\"index\":0,\"delta\":{\"content\":\" a\"},\"logprobs\":{\"content\":[{\
                         \"token\":\" a\",\"logprob\":-0.5,\"bytes\":[32,97],\"top_logprobs\":[]}]},\
                         \"finish_reason\":null,\"token_ids\":[17]}],\
                         \"usage\":{\"prompt_tokens\":1}}";

    #[test]
    fn reads_an_event_of_one_token() {
        let usage = Some("{\"prompt_tokens\":1}");
        let (read, spans) = read_token_event(PLAIN.as_bytes()).expect("the form of engines");
        let expected = TokenEvent {
            index: 0,
            key: "content",
            text: " a",
            logprob: Some(-0.5),
            token_id: Some(17),
            usage,
        };
        assert_eq!(read, expected);
        assert!(PLAIN[spans.logprobs].starts_with("{\"content\":[{") && &PLAIN[spans.token_ids] == "[17]");
        for at in 0..PLAIN.len() {
            assert_eq!(read_token_event(&PLAIN.as_bytes()[..at]), None, "cut at {at}");
        }
    }

    #[test]
    fn leaves_other_forms_to_the_parser() {
        for (from, to) in [
            ("{\"content\":\" a\"}", "{\"content\":\" \\n\"}"),
            ("{\"content\":\" a\"}", "{\"content\":\" \u{1}\"}"),
            ("\"content\":\" a\"", "\"role\":\" a\""),
            ("\"content\":\" a\"", "\"content\":\" a\",\"x\":1"),
            ("\"index\":0", "\"index\":00"),
            ("[17]", "[17,18]"),
            ("[17]", "[4294967296]"),
            ("[17]", "[99999999999]"),
            ("[17]", "[]"),
            ("-0.5", "0.5.5"),
            ("-0.5", "nan"),
            ("-0.5", "inf"),
            ("-0.5", "+0.5"),
            ("-0.5", "-.5"),
            ("-0.5", "-0."),
            ("-0.5", "-00.5"),
            ("-0.5", "-1e"),
            ("-0.5", "-1e999"),
            ("-0.5", "-"),
            ("-0.5", " -0.5"),
            ("null", "\"stop\""),
            ("{\"prompt_tokens\":1}", "{\"prompt_tokens\":}"),
            ("[32,97]", "[32,]"),
        ] {
            let other = PLAIN.replacen(from, to, 1);
            assert_ne!(other, PLAIN, "{from}");
            assert_eq!(read_token_event(other.as_bytes()), None, "{to}");
        }
    }

    #[test]
    fn reads_numbers_as_the_parser_does() {
        for text in
            ["0", "-0", "-0.0", "-0.5", "-1.1920928955078125e-07", "1E+2", "5e-324", "-9999.0", "1e308"]
        {
            let json = format!("{text},");
            let (value, rest) = float(json.as_bytes()).expect(text);
            let parsed: f64 = serde_json::from_str(text).unwrap();
            assert_eq!((value.to_bits(), rest), (parsed.to_bits(), &b","[..]), "{text}");
        }
    }
}
