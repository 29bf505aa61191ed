//! The beginnings of the texts of JSON strings, with any escapes.

use crate::json::work::spend;
use crate::json::{EndOfJson, ShortText, decode, escape};

/// Claude Code's first system text, which changes with every request; vLLM omits it as well.
const BILLING: &str = "x-anthropic-billing-header";

/// The number of bytes between a string's quotes up to and including a character, escaped or not.
pub(super) fn after(raw: &[u8], character: u8) -> Option<usize> {
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

/// Whether the text of a string begins with `prefix`; `None` when a cut string is too short to decide.
pub(super) fn begins_with(raw: &[u8], whole: bool, prefix: &str) -> Option<bool> {
    let mut short = ShortText::default();
    let reach = raw.len().min(6 * prefix.len());
    decode(&raw[..reach], whole && reach == raw.len(), &mut short);
    let text = short.begin();
    let all = text.starts_with(prefix.as_bytes());
    let may = prefix.as_bytes().starts_with(text) && !whole;
    if may && !all { None } else { Some(all) }
}

/// A system text without the line that changes with every request.
pub(super) fn without_billing(text: &[u8], whole: bool) -> Result<&[u8], EndOfJson> {
    match begins_with(text, whole, BILLING) {
        Some(false) => Ok(text),
        None => Err(EndOfJson),
        Some(true) => match after(text, b'\n') {
            Some(line) => Ok(&text[line..]),
            None if whole => Ok(b""),
            None => Err(EndOfJson),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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

    proptest! {
        #[test]
        fn any_bytes_are_taken(raw: Vec<u8>) {
            after(&raw, b',');
            begins_with(&raw, true, "data:");
        }
    }
}
