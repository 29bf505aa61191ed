//! A chunk of one token in the exact form in which engines write it, which is most of a stream.
//!
//! It is compared with that form member by member, which takes a sixth of the time of a parser. A chunk of
//! any other form, such as one with an escape in its text, is left to the parser of [`super::chunks`], and
//! both read the same from it.
//!
//! Never: accept what is no JSON.

use serde::de::IgnoredAny;

use crate::json::{read_value, string_end};

/// The members of a chunk's delta that are read otherwise than by appending a text.
const OTHER_MEMBERS: &[&str] = &["role", "tool_calls", "function_call"];

/// The choice of a chunk, and what stands behind the choices.
#[derive(Debug, PartialEq)]
pub(super) struct PlainChunk<'a> {
    pub index: u32,
    /// The only member of the delta.
    pub key: &'a str,
    pub text: &'a str,
    pub logprob: Option<f64>,
    pub token_id: Option<u32>,
    /// As it stands.
    pub usage: Option<&'a str>,
}

/// Reads a chunk from behind the bracket of its choices to its end.
pub(super) fn read_plain_chunk(rest: &str) -> Option<PlainChunk<'_>> {
    let (index, rest) = number(rest.strip_prefix("{\"index\":")?)?;
    let (key, rest) = plain_string(rest.strip_prefix(",\"delta\":{\"")?)?;
    let (text, rest) = plain_string(rest.strip_prefix(":\"")?)?;
    let rest = rest.strip_prefix("},\"logprobs\":")?;
    let (logprob, rest) = match rest.strip_prefix("null") {
        Some(rest) => (None, rest),
        None => single_logprob(rest).map(|(value, rest)| (Some(value), rest))?,
    };
    let rest = rest.strip_prefix(",\"finish_reason\":null,\"token_ids\":")?;
    let (token_id, rest) = match rest.strip_prefix("null") {
        Some(rest) => (None, rest),
        None => {
            let (id, rest) = number(rest.strip_prefix('[')?)?;
            (Some(id), rest.strip_prefix(']')?)
        }
    };
    let (usage, end) = usage(rest.strip_prefix("}]")?)?;
    (end == "}" && !OTHER_MEMBERS.contains(&key)).then_some(PlainChunk {
        index,
        key,
        text,
        logprob,
        token_id,
        usage,
    })
}

/// Reads the log-probability of one token without alternatives, and returns what stands behind it.
pub(super) fn single_logprob(json: &str) -> Option<(f64, &str)> {
    let (_, rest) = plain_string(json.strip_prefix("{\"content\":[{\"token\":\"")?)?;
    let rest = rest.strip_prefix(",\"logprob\":")?;
    let (value, rest) = rest.split_at(rest.find(',')?);
    let rest = skip_byte_list(rest.strip_prefix(",\"bytes\":[")?)?;
    let rest = rest.strip_prefix(",\"top_logprobs\":[]}]}")?;
    Some((serde_json::from_str(value).ok()?, rest))
}

/// Reads a string without escapes from behind its quote, and returns what stands behind it.
fn plain_string(json: &str) -> Option<(&str, &str)> {
    let end = string_end(json.as_bytes(), 0, 0)?;
    let (text, rest) = (json.get(..end)?, json.get(end + 1..)?);
    let is_plain = text.bytes().all(|byte| byte >= b' ' && byte != b'\\');
    is_plain.then_some((text, rest))
}

/// Reads a number without a sign and returns what stands behind it.
fn number(json: &str) -> Option<(u32, &str)> {
    let digits = json.bytes().position(|byte| !byte.is_ascii_digit())?;
    let (number, rest) = json.split_at(digits);
    let is_json = number == "0" || !number.starts_with('0');
    Some((number.parse().ok().filter(|_| is_json)?, rest))
}

/// Skips a list of numbers from behind its bracket.
fn skip_byte_list(json: &str) -> Option<&str> {
    let (mut digits, mut is_zero) = (0_u32, false);
    for (at, byte) in json.bytes().enumerate() {
        match byte {
            b'0'..=b'9' if digits == 0 || !is_zero => {
                is_zero = digits == 0 && byte == b'0';
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
fn usage(json: &str) -> Option<(Option<&str>, &str)> {
    let Some(rest) = json.strip_prefix(",\"usage\":") else { return Some((None, json)) };
    let end = read_value(rest.as_bytes(), 0).ok()?;
    let (usage, behind) = (rest.get(..end)?, rest.get(end..)?);
    serde_json::from_str::<IgnoredAny>(usage).ok()?;
    Some(((usage != "null").then_some(usage), behind))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{AnswerAssembler, AssembledAnswer};
    use super::*;
    use crate::traces::record::TraceApi;

    const PLAIN: &str = "{\"index\":0,\"delta\":{\"content\":\" a\"},\"logprobs\":{\"content\":[{\
                         \"token\":\" a\",\"logprob\":-0.5,\"bytes\":[32,97],\"top_logprobs\":[]}]},\
                         \"finish_reason\":null,\"token_ids\":[17]}],\
                         \"usage\":{\"prompt_tokens\":1}}";

    #[test]
    fn reads_a_chunk_of_one_token() {
        let usage = Some("{\"prompt_tokens\":1}");
        let read = read_plain_chunk(PLAIN).expect("the form of engines");
        let expected = PlainChunk {
            index: 0,
            key: "content",
            text: " a",
            logprob: Some(-0.5),
            token_id: Some(17),
            usage,
        };
        assert_eq!(read, expected);
        for at in 0..PLAIN.len() {
            assert_eq!(read_plain_chunk(&PLAIN[..at]), None, "cut at {at}");
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
            ("-0.5", "0.5.5"),
            ("-0.5", "nan"),
            ("null", "\"stop\""),
            ("{\"prompt_tokens\":1}", "{\"prompt_tokens\":}"),
            ("[32,97]", "[32,]"),
        ] {
            let other = PLAIN.replacen(from, to, 1);
            assert_ne!(other, PLAIN, "{from}");
            assert_eq!(read_plain_chunk(&other), None, "{to}");
        }
    }

    fn assembled(events: &[String], list: &str) -> AssembledAnswer {
        let mut assembler = AnswerAssembler::new(TraceApi::Chat, true, 200);
        for event in events {
            let head = "{\"id\":\"c\",\"created\":1,\"model\":\"m\",\"choices\":";
            assembler.feed(format!("data: {head}{list}{event}\n\n").as_bytes());
        }
        assembler.feed(b"data: [DONE]\n\n");
        assembler.finish()
    }

    prop_compose! {
        fn event()(
            index in 0u32..3,
            key in prop::sample::select(vec!["content", "reasoning", "role", "x"]),
            text in "[a-zé\"\\\\\n]{0,4}",
            logprob in prop::option::of(-20.0f64..0.0),
            id in prop::option::of(any::<u64>().prop_map(|id| id >> (id % 64))),
            usage in prop::option::of(prop::sample::select(vec!["null", "{\"prompt_tokens\":7}", "{"])),
        ) -> String {
            let text = serde_json::to_string(&text).expect("a string");
            let bytes = "1,2";
            let logprobs = logprob.map_or("null".into(), |value| format!(
                "{{\"content\":[{{\"token\":{text},\"logprob\":{value:?},\"bytes\":[{bytes}],\
                 \"top_logprobs\":[]}}]}}"
            ));
            let ids = id.map_or("null".into(), |id| format!("[{id}]"));
            let usage = usage.map_or(String::new(), |usage| format!(",\"usage\":{usage}"));
            format!(
                "{{\"index\":{index},\"delta\":{{\"{key}\":{text}}},\"logprobs\":{logprobs},\
                 \"finish_reason\":null,\"token_ids\":{ids}}}]{usage}}}"
            )
        }
    }

    proptest! {
        /// A space before the bracket of the choices sends every chunk to the parser.
        #[test]
        fn reads_what_the_parser_reads(events in prop::collection::vec(event(), 0..12)) {
            prop_assert_eq!(assembled(&events, "["), assembled(&events, " ["));
        }
    }
}
