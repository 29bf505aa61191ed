//! Lists of token ids as engines write them.

use serde_json::value::RawValue;

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
    fn a_list_of_something_else_appends_nothing() {
        let mut ids = vec![7];
        assert!(!append_ids(serde_json::from_str("[1,2,\"x\"]").unwrap(), &mut ids));
        assert_eq!(ids, [7]);
    }
}
