//! Lists of token ids as engines write them.

use std::ops::Range;

use memchr::memmem;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::Xxh3;

/// The key of a list of prompt ids, and the list's first byte.
const PROMPT_KEY: &[u8] = b"\"prompt_token_ids\":[";

/// From this length on, a list is worth a walk of its own.
const MIN_LONG_BYTES: usize = 1 << 10;

/// The bytes of an id and its comma, for room in advance.
const BYTES_PER_ID: usize = 5;

/// A long list of prompt ids that was read, for the one that begins with it: the next turn of its session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KnownPrompt {
    /// Of what stands between the brackets.
    digest: u128,
    length: usize,
    ids: Vec<u32>,
}

impl KnownPrompt {
    /// The memory of its ids.
    pub fn bytes(&self) -> usize {
        size_of::<u32>() * self.ids.capacity()
    }

    #[cfg(test)]
    pub fn of_list(ids: &[u32]) -> Self {
        let list: Vec<String> = ids.iter().map(u32::to_string).collect();
        let mut known = KnownPrompt::default();
        known.read(list.join(",").as_bytes());
        known
    }

    /// Reads what stands between the brackets of a list as engines write it: ids with single commas between
    /// them. What it begins with is not parsed where it is known. `None`: it is another list.
    fn read(&mut self, list: &[u8]) -> Option<Vec<u32>> {
        let KnownPrompt { digest: known, length, ids: mut kept } = std::mem::take(self);
        let begins = length > 0 && matches!(list.get(length), None | Some(b','));
        let (front, behind) = list.split_at_checked(length).filter(|_| begins).unwrap_or((&[], list));
        let mut digest = Xxh3::new();
        digest.update(front);
        if front.is_empty() || digest.digest128() != known {
            kept.clear();
        }
        digest.update(behind);
        let mut ids = Vec::with_capacity(list.len() / BYTES_PER_ID);
        ids.extend_from_slice(&kept);
        let unread = if kept.is_empty() { list } else { behind.strip_prefix(b",").unwrap_or_default() };
        if !unread.is_empty() || kept.is_empty() {
            read_compact(unread, &mut ids)?;
        } else if !behind.is_empty() {
            return None;
        }
        ids.shrink_to_fit();
        kept.reserve_exact(ids.len() - kept.len());
        kept.extend_from_slice(&ids[kept.len()..]);
        *self = KnownPrompt { digest: digest.digest128(), length: list.len(), ids: kept };
        Some(ids)
    }
}

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
pub(super) fn find_ids(bytes: &[u8], known: &mut KnownPrompt) -> Option<(Range<usize>, Vec<u32>)> {
    let start = memmem::find(bytes, PROMPT_KEY)? + PROMPT_KEY.len() - 1;
    let end = start + memchr::memchr(b']', &bytes[start..])? + 1;
    if end - start < MIN_LONG_BYTES || memmem::find(&bytes[end..], PROMPT_KEY).is_some() {
        return None;
    }
    // What is no valid list as engines write it, the parser of the document has to judge.
    Some((start..end, known.read(&bytes[start + 1..end - 1])?))
}

/// Whether the list at `at` stands where `find_ids` looks for it.
pub(super) fn is_behind_key(document: &str, at: usize) -> bool {
    let list = document.as_bytes().get(..=at);
    list.is_some_and(|list| list.ends_with(PROMPT_KEY))
}

/// Reads ids with single commas between them and nothing else.
fn read_compact(list: &[u8], ids: &mut Vec<u32>) -> Option<()> {
    let mut rest = list;
    loop {
        rest = read_run(rest, ids);
        let digits = rest.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(rest.len());
        let (id, behind) = rest.split_at(digits);
        // Of the last id, or of one that is none.
        ids.push(std::str::from_utf8(id).ok()?.parse().ok()?);
        match behind.split_first() {
            Some((b',', behind)) => rest = behind,
            Some(_) => return None,
            None => return Some(()),
        }
    }
}

/// Reads ids that have a comma behind them, eight digits at a time. Returns what follows.
fn read_run<'a>(list: &'a [u8], ids: &mut Vec<u32>) -> &'a [u8] {
    const ONE_PER_BYTE: u64 = u64::MAX / 255;
    const HIGH_BITS: u64 = ONE_PER_BYTE << 7;
    let mut rest = list;
    while let Some(word) = rest.first_chunk() {
        let digits = u64::from_le_bytes(*word) ^ (ONE_PER_BYTE * u64::from(b'0'));
        // The highest bit of each byte that is no digit; the carry of one does not reach those before it.
        let others = (digits.wrapping_add(HIGH_BITS - 10 * ONE_PER_BYTE) | digits) & HIGH_BITS;
        let length = (others.trailing_zeros() / 8) as usize;
        if length == 0 {
            break;
        }
        // Zeros before the digits; then two, four and eight of them become one number.
        let id = (digits << (u64::BITS as usize - 8 * length)).wrapping_mul(10 << 8 | 1) >> 8;
        let id = (id & 0x00ff_00ff_00ff_00ff).wrapping_mul(100 << 16 | 1) >> 16;
        let id = (id & 0x0000_ffff_0000_ffff).wrapping_mul(10_000 << 32 | 1) >> 32;
        let (id, length) = if others == 0 { with_more_digits(id, rest) } else { (id, length) };
        match (u32::try_from(id), rest.get(length)) {
            (Ok(id), Some(b',')) => ids.push(id),
            _ => break,
        }
        rest = &rest[length + 1..];
    }
    rest
}

/// A number whose first eight digits are known, and how many it has of those that a token id can have.
fn with_more_digits(id: u64, text: &[u8]) -> (u64, usize) {
    let (mut id, mut length) = (id, 8);
    while length < 10
        && let Some(digit @ b'0'..=b'9') = text.get(length)
    {
        (id, length) = (10 * id + u64::from(digit - b'0'), length + 1);
    }
    (id, length)
}

/// Reads valid JSON: that a number has a digit, and a list no comma too many, is known.
fn read_ids(list: &[u8], ids: &mut Vec<u32>) -> Option<()> {
    let inside = list.strip_prefix(b"[")?.strip_suffix(b"]")?;
    let mut rest = read_run(inside, ids).iter();
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
            ("[1,22,333,4444,55555,666666,7777777,88888888,999999999]", {
                Some(vec![1, 22, 333, 4444, 55_555, 666_666, 7_777_777, 88_888_888, 999_999_999])
            }),
            ("[9999999,0,10, 3,9999999,12345678,1,23]", {
                Some(vec![9_999_999, 0, 10, 3, 9_999_999, 12_345_678, 1, 23])
            }),
            ("[4294967295,99999999,123456789,1,2,3]", {
                Some(vec![u32::MAX, 99_999_999, 123_456_789, 1, 2, 3])
            }),
            ("[1,2,3,4294967296,5,6,7,8]", None),
            ("[1,2,3,42949672950,5,6,7,8]", None),
            ("[1,2,3,4,5,6,7,8.9]", None),
            ("[1,2,3,-4,5,6,7,8,9]", None),
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
        let find = |text: &str| find_ids(text.as_bytes(), &mut KnownPrompt::default());
        let found = |text: String| find(&text).map(|(list, ids)| (list.start, list.end, ids.len()));
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

    #[test]
    fn the_beginning_of_a_prompt_that_is_known_counts_only_where_it_is_the_same() {
        let text = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let first: Vec<u32> = (0..2_000).map(|id| id * 77).collect();
        let mut changed = first.clone();
        changed[3] += 1;
        let mut known = KnownPrompt::default();
        let lists = [
            first.clone(),
            first.clone(),
            [&first[..], &[1, 22, 333_333_333]].concat(),
            [&first[..], &[1, 22, 333_333_333, 4]].concat(),
            [&first[..], &[1, 2]].concat(),
            [&changed[..], &[1, 2, 3]].concat(),
            first[..1_999].to_vec(),
        ];
        for list in &lists {
            assert_eq!(known.read(text(list).as_bytes()).as_ref(), Some(list));
            assert_eq!(known, KnownPrompt::of_list(list));
        }
        // The last id goes on where the known list ends.
        let last = text(&lists[6]);
        assert_eq!(known.read(format!("{last}7,8").as_bytes()).unwrap().len(), 2_000);
        for wrong in [",", ",,1", ",x", ";1", ",1,", ",-1", ",4294967296"] {
            let mut known = KnownPrompt::of_list(&first);
            assert_eq!(known.read(format!("{}{wrong}", text(&first)).as_bytes()), None, "{wrong}");
            assert_eq!(known, KnownPrompt::default());
        }
    }
}
