//! Lists of token ids as engines write them.

use std::ops::Range;

use memchr::memmem;
use serde_json::value::RawValue;

/// The key of a list of prompt ids, and the list's first byte.
const PROMPT_KEY: &[u8] = b"\"prompt_token_ids\":[";

/// From this length on, a list is worth a walk of its own.
const MIN_LONG_BYTES: usize = 1 << 10;

/// The bytes of an id and its comma, for room in advance.
const BYTES_PER_ID: usize = 5;

/// The ids of a JSON list that holds nothing else.
pub(super) fn parse_ids(list: &RawValue) -> Option<Vec<u32>> {
    let mut ids = Vec::with_capacity(list.get().len() / BYTES_PER_ID);
    append_ids(list, &mut ids).then(|| {
        ids.shrink_to_fit();
        ids
    })
}

/// Appends the ids of a list. `false`: it holds something else, and nothing is appended.
pub(super) fn append_ids(list: &RawValue, ids: &mut Vec<u32>) -> bool {
    let before = ids.len();
    let is_read = read_ids(list.get().as_bytes(), ids).is_some();
    if !is_read {
        ids.truncate(before);
    }
    is_read
}

/// The only long list of prompt ids in a document, and where it stands. No text of the document can look like
/// its key: a quote in a text has a backslash before it.
pub(super) fn find_ids(document: &str) -> Option<(Range<usize>, Vec<u32>)> {
    let bytes = document.as_bytes();
    let mut found = memmem::find_iter(bytes, PROMPT_KEY);
    let start = found.next()? + PROMPT_KEY.len() - 1;
    if found.next().is_some() {
        return None;
    }
    let end = start + memchr::memchr(b']', &bytes[start..])? + 1;
    if end - start < MIN_LONG_BYTES {
        return None;
    }
    let mut ids = Vec::with_capacity((end - start) / BYTES_PER_ID);
    // What is no valid list as engines write it, the parser of the document has to judge.
    let inside = &bytes[start + 1..end - 1];
    let is_plain = inside.iter().all(|byte| byte.is_ascii_digit() || *byte == b',');
    let is_plain = is_plain && inside.last() != Some(&b',');
    (is_plain && read_ids(&bytes[start..end], &mut ids).is_some()).then(|| {
        ids.shrink_to_fit();
        (start..end, ids)
    })
}

/// Reads valid JSON: that a number has a digit, and a list no comma too many, is known.
fn read_ids(list: &[u8], ids: &mut Vec<u32>) -> Option<()> {
    let mut rest = list.strip_prefix(b"[")?.strip_suffix(b"]")?.iter();
    let (mut id, mut has_digit) = (0u32, false);
    loop {
        match rest.next() {
            Some(digit @ b'0'..=b'9') => {
                id = id.checked_mul(10)?.checked_add(u32::from(digit - b'0'))?;
                has_digit = true;
            }
            Some(b',') if has_digit => {
                ids.push(id);
                (id, has_digit) = (0, false);
            }
            Some(b' ' | b'\n' | b'\r' | b'\t') => {}
            None => {
                if has_digit {
                    ids.push(id);
                }
                return Some(());
            }
            Some(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Option<Vec<u32>> {
        parse_ids(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn reads_lists_of_ids_and_nothing_else() {
        for (text, expected) in [
            ("[]", Some(vec![])),
            ("[ ]", Some(vec![])),
            ("[0]", Some(vec![0])),
            ("[1,22,4294967295]", Some(vec![1, 22, u32::MAX])),
            ("[ 1 ,\n2\t]", Some(vec![1, 2])),
            ("[4294967296]", None),
            ("[99999999999]", None),
            ("[-1]", None),
            ("[1.0]", None),
            ("[1e3]", None),
            ("[1,null]", None),
            ("[[1]]", None),
            ("[\"1\"]", None),
            ("null", None),
            ("{}", None),
            ("1", None),
        ] {
            assert_eq!(ids(text), expected, "{text}");
        }
    }

    #[test]
    fn the_only_long_list_of_prompt_ids_is_found() {
        let long = (0..600).map(|id| id.to_string()).collect::<Vec<_>>().join(",");
        let found = |text: String| find_ids(&text).map(|(list, ids)| (list.start, list.end, ids.len()));
        let (before, behind) = (r#"{"a":1,"prompt_token_ids":"#, r#","b":[2]}"#);
        let (start, end) = (before.len(), before.len() + long.len() + 2);
        assert_eq!(found(format!("{before}[{long}]{behind}")), Some((start, end, 600)));
        for text in [
            format!(r#"{{"prompt_token_ids":[{long},]}}"#),
            format!(r#"{{"prompt_token_ids":[{long},,1]}}"#),
            format!(r#"{{"prompt_token_ids":[{long} 1]}}"#),
            format!(r#"{{"prompt_token_ids":[{long},null]}}"#),
            format!(r#"{{"prompt_token_ids":[{long}"#),
            format!(r#"{{"prompt_token_ids":[{long}],"c":{{"prompt_token_ids":[1]}}}}"#),
            format!(r#"{{"text":"\"prompt_token_ids\":[{long}]"}}"#),
            r#"{"prompt_token_ids":[1,2,3]}"#.into(),
        ] {
            assert_eq!(found(text.clone()), None, "{}", &text[text.len().saturating_sub(60)..]);
        }
    }

    #[test]
    fn a_list_of_something_else_appends_nothing() {
        let mut ids = vec![7];
        assert!(!append_ids(serde_json::from_str("[1,2,\"x\"]").unwrap(), &mut ids));
        assert_eq!(ids, [7]);
    }
}
