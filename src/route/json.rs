//! Where things stand in a piece of JSON that is whole: spans, never values.
//!
//! Laxer than a parser: inside what is skipped only quotes and brackets are looked at, and the upstream
//! refuses what is wrong there. What cannot be followed is `None`, and then nothing is edited.
//!
//! Never: recursion, a copy of a value, a panic.

use std::borrow::Cow;
use std::ops::Range;

use crate::prompt::{string_end, unescape};

pub type Span = Range<usize>;

/// The most members that an object may have: vLLM's requests have less than a hundred.
pub const MAX_MEMBERS: usize = 10_000;

/// The longest key, with its quotes and as it is written, in bytes.
pub const MAX_KEY_BYTES: usize = 1024;

/// Why an object or a list is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFault {
    /// It is none, or cannot be followed.
    Syntax,
    /// An object has more than [`MAX_MEMBERS`].
    ManyMembers,
    /// A key is longer than [`MAX_KEY_BYTES`].
    LongKey,
    /// The reader has found more to do than it may.
    ManyChanges,
}

pub type JsonResult<T> = Result<T, ReadFault>;

/// One key of an object and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonMember<'a> {
    pub key: Cow<'a, str>,
    /// Where the key's first quote stands.
    pub start: usize,
    /// Quotes and brackets included.
    pub value: Span,
}

/// What an object holds, and where it ends. Equal keys are all there.
pub struct JsonObject<'a> {
    pub members: Vec<JsonMember<'a>>,
    pub span: Span,
}

/// The first byte at or after `at` that is no white space.
pub fn skip_space(bytes: &[u8], mut at: usize) -> usize {
    while bytes.get(at).is_some_and(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')) {
        at += 1;
    }
    at
}

/// Whether Python would read this body as UTF-16 or UTF-32, by a mark or by the zeros in its first four
/// bytes. Such a body is not followed here. In UTF-8 no JSON has a zero there.
pub fn is_wide(body: &[u8]) -> bool {
    body.starts_with(b"\xff\xfe")
        || body.starts_with(b"\xfe\xff")
        || body.iter().take(4).any(|byte| *byte == 0)
}

/// The object that is all there is, but for white space and a byte-order mark.
pub fn document(body: &[u8]) -> Option<JsonObject<'_>> {
    document_with(body, |_, at| read_value(body, at)).ok()
}

/// As `document`, with a reader that is given every key and where its value begins, and says where that
/// ends: what has to be walked is then walked once.
pub fn document_with<'a>(
    body: &'a [u8],
    read: impl FnMut(&str, usize) -> JsonResult<usize>,
) -> JsonResult<JsonObject<'a>> {
    let mark = if body.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let object = object_with(body, skip_space(body, mark), read)?;
    if skip_space(body, object.span.end) == body.len() { Ok(object) } else { Err(ReadFault::Syntax) }
}

/// The object that begins at `at`.
pub fn object(bytes: &[u8], start: usize) -> Option<JsonObject<'_>> {
    read_object(bytes, start).ok()
}

/// As `object`, with the reason why there is none.
pub fn read_object(bytes: &[u8], start: usize) -> JsonResult<JsonObject<'_>> {
    object_with(bytes, start, |_, at| read_value(bytes, at))
}

fn object_with<'a>(
    bytes: &'a [u8],
    start: usize,
    mut read: impl FnMut(&str, usize) -> JsonResult<usize>,
) -> JsonResult<JsonObject<'a>> {
    let mut members = Vec::new();
    let end = walk(bytes, start, |key, start, value| {
        let end = read(&key, value)?;
        members.push(JsonMember { key, start, value: value..end });
        Ok(end)
    })?;
    Ok(JsonObject { members, span: start..end })
}

/// Goes from member to member of the object that begins at `at`, to its end. `read` is given a key, where
/// the key stands and where its value begins, and says where that ends.
pub fn walk<'a>(
    bytes: &'a [u8],
    start: usize,
    mut read: impl FnMut(Cow<'a, str>, usize, usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    walk_raw(bytes, start, |key, start, value| read(unescape(key), start, value))
}

/// As `walk`, with what stands between the quotes of a key: escapes are left in it.
pub fn walk_raw<'a>(
    bytes: &'a [u8],
    start: usize,
    mut read: impl FnMut(&'a [u8], usize, usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    if bytes.get(start) != Some(&b'{') {
        return Err(ReadFault::Syntax);
    }
    let mut at = skip_space(bytes, start + 1);
    if bytes.get(at) == Some(&b'}') {
        return Ok(at + 1);
    }
    for _ in 0..MAX_MEMBERS {
        let key_end = key_end(bytes, at).ok_or(ReadFault::Syntax)?;
        if key_end - at > MAX_KEY_BYTES {
            return Err(ReadFault::LongKey);
        }
        let key = &bytes[at + 1..key_end - 1];
        let colon = skip_space(bytes, key_end);
        if bytes.get(colon) != Some(&b':') {
            return Err(ReadFault::Syntax);
        }
        let end = read(key, at, skip_space(bytes, colon + 1))?;
        work::count(key_end - at);
        at = skip_space(bytes, end);
        match bytes.get(at) {
            Some(b',') => at = skip_space(bytes, at + 1),
            Some(b'}') => return Ok(at + 1),
            _ => return Err(ReadFault::Syntax),
        }
    }
    Err(ReadFault::ManyMembers)
}

fn key_end(bytes: &[u8], start: usize) -> Option<usize> {
    if bytes.get(start) != Some(&b'"') {
        return None;
    }
    Some(string_end(bytes, start + 1, start + 1)? + 1)
}

/// The values of the array that begins at `at`, each where `read` says that it ends, and the array's end.
pub fn items<T>(
    bytes: &[u8],
    start: usize,
    mut read: impl FnMut(usize) -> Option<(T, usize)>,
) -> Option<(Vec<T>, usize)> {
    let mut items = Vec::new();
    let end = each(bytes, start, |at| {
        let (item, end) = read(at).ok_or(ReadFault::Syntax)?;
        items.push(item);
        Ok(end)
    });
    Some((items, end.ok()?))
}

/// Goes from value to value of the array that begins at `at`, as `read` says where each ends, to its end.
pub fn each(
    bytes: &[u8],
    start: usize,
    mut read: impl FnMut(usize) -> JsonResult<usize>,
) -> JsonResult<usize> {
    if bytes.get(start) != Some(&b'[') {
        return Err(ReadFault::Syntax);
    }
    let mut at = skip_space(bytes, start + 1);
    if bytes.get(at) == Some(&b']') {
        return Ok(at + 1);
    }
    loop {
        at = skip_space(bytes, read(at)?);
        match bytes.get(at) {
            Some(b',') => at = skip_space(bytes, at + 1),
            Some(b']') => return Ok(at + 1),
            _ => return Err(ReadFault::Syntax),
        }
    }
}

/// As `value_end`, for readers of objects and lists.
pub fn read_value(bytes: &[u8], at: usize) -> JsonResult<usize> {
    value_end(bytes, at).ok_or(ReadFault::Syntax)
}

/// Whether a document has at the most so many values. Counted are commas, colons and opening brackets: every
/// value but the first stands behind one.
pub fn has_at_most(bytes: &[u8], values: usize) -> bool {
    let (mut at, mut seen) = (0, 1_usize);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => match string_end(bytes, at + 1, at + 1) {
                Some(end) => at = end,
                None => return true,
            },
            b',' | b':' | b'[' | b'{' => seen += 1,
            _ => {}
        }
        if seen > values {
            return false;
        }
        at += 1;
    }
    true
}

/// Where the value that begins at `at` ends.
pub fn value_end(bytes: &[u8], at: usize) -> Option<usize> {
    let end = find_value_end(bytes, at);
    work::count(end.unwrap_or(bytes.len()).saturating_sub(at));
    end
}

fn find_value_end(bytes: &[u8], at: usize) -> Option<usize> {
    match bytes.get(at)? {
        b'"' => Some(string_end(bytes, at + 1, at + 1)? + 1),
        b'{' | b'[' => container_end(bytes, at),
        b'-' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
            let part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
            let length = bytes[at..].iter().position(|byte| !part(byte)).unwrap_or(bytes.len() - at);
            Some(at + length)
        }
        _ => None,
    }
}

fn container_end(bytes: &[u8], start: usize) -> Option<usize> {
    let (mut at, mut depth) = (start, 0_u64);
    loop {
        match bytes.get(at)? {
            b'"' => at = string_end(bytes, at + 1, at + 1)?,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 1 => return Some(at + 1),
            b'}' | b']' => depth -= 1,
            _ => at += plain_prefix(&bytes[at + 1..]),
        }
        at += 1;
    }
}

/// How many of the next bytes are no quotes and no brackets: all of them where they are few, and many of
/// them where they are many.
fn plain_prefix(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    let (words, _) = bytes.as_chunks::<8>();
    for (index, word) in words.iter().take(2).enumerate() {
        let word = u64::from_le_bytes(*word);
        // A bracket and a brace differ by this bit.
        let braces = word | (ONES * 0x20);
        let find = |word: u64, wanted: u8| {
            let zero_where_found = word ^ (ONES * u64::from(wanted));
            zero_where_found.wrapping_sub(ONES) & !zero_where_found
        };
        // The lowest bit that is set belongs to the first match; none is set where there is none.
        let found = (find(word, b'"') | find(braces, b'{') | find(braces, b'}')) & (ONES << 7);
        if found != 0 {
            return index * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let near = words.len().min(2) * 8;
    near + plain_run(&bytes[near..])
}

/// How many of the next bytes are no quotes and no brackets, in whole windows: lists of numbers are long.
pub fn plain_run(bytes: &[u8]) -> usize {
    const WINDOW: usize = 32;
    // Bytes of 0 and 1 are compared many at a time, which truth values are not.
    let structure =
        |byte: u8| u8::from(byte == b'"') | u8::from(byte | 0x20 == b'{') | u8::from(byte | 0x20 == b'}');
    let plain = |window: &&[u8; WINDOW]| window.iter().fold(0, |found, byte| found | structure(*byte)) == 0;
    bytes.as_chunks::<WINDOW>().0.iter().take_while(plain).count() * WINDOW
}

impl<'a> JsonObject<'a> {
    /// The value that counts for a key: Python takes the last of equal ones.
    pub fn get(&self, key: &str) -> Option<Span> {
        self.members.iter().rfind(|member| member.key == key).map(|member| member.value.clone())
    }

    /// As `get`, with the object that the value is.
    pub fn object(&self, bytes: &'a [u8], key: &str) -> Option<JsonObject<'a>> {
        object(bytes, self.get(key)?.start)
    }

    /// The text of a key whose value is a string.
    pub fn text(&self, bytes: &'a [u8], key: &str) -> Option<Cow<'a, str>> {
        text(bytes.get(self.get(key)?)?)
    }

    /// Whether the value of a key is written exactly so.
    pub fn is(&self, bytes: &[u8], key: &str, written: &str) -> bool {
        self.get(key).is_some_and(|span| &bytes[span] == written.as_bytes())
    }
}

/// Whether this value is a list without anything in it.
pub fn is_empty_list(bytes: &[u8], span: &Span) -> bool {
    let inside = bytes[span.clone()].strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]"));
    inside.is_some_and(|inside| inside.trim_ascii().is_empty())
}

/// What stands between the quotes of a string.
pub fn inside(value: &[u8]) -> Option<&[u8]> {
    value.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

/// The text of a value that is a string.
pub fn text(value: &[u8]) -> Option<Cow<'_, str>> {
    inside(value).map(unescape)
}

/// How many bytes were walked, for tests that hold that edits take time in proportion to their bodies.
pub mod work {
    #[cfg(test)]
    thread_local! {
        pub static WALKED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    }

    #[cfg(test)]
    pub fn count(bytes: usize) {
        WALKED.set(WALKED.get() + bytes);
    }

    #[cfg(not(test))]
    pub fn count(_bytes: usize) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn outline(body: &str) -> Option<String> {
        let object = document(body.as_bytes())?;
        let pair = |member: &JsonMember<'_>| format!("{}={}", member.key, &body[member.value.clone()]);
        Some(object.members.iter().map(pair).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn members_stand_where_they_stand() {
        for (body, wanted) in [
            ("{}", Some("")),
            (" \u{feff}{}", None),
            ("\u{feff} { }\n", Some("")),
            (
                r#"{"a":1,"b" : [1,"]",{"}":2}] , "c":{"a":"\""},"d":"\\"}"#,
                Some(r#"a=1 b=[1,"]",{"}":2}] c={"a":"\""} d="\\""#),
            ),
            (r#"{"\u0061":null,"a":true}"#, Some("a=null a=true")),
            (r#"{"a":NaN,"b":-Infinity,"c":-1.5E+3}"#, Some("a=NaN b=-Infinity c=-1.5E+3")),
            (r#"{"a":1,}"#, None),
            (r#"{"a":1"#, None),
            (r#"{"a"1}"#, None),
            (r#"{"a":}"#, None),
            (r#"{a:1}"#, None),
            (r#"{"a":1}{"#, None),
            (r#"{"a":"x}"#, None),
            (r#"[1]"#, None),
            ("", None),
        ] {
            assert_eq!(outline(body).as_deref(), wanted, "{body}");
        }
        let ids = format!(r#"{{"a":[{}],"b":2}}"#, "12345,".repeat(100));
        assert!(outline(&ids).is_some_and(|text| text.ends_with("] b=2")));
    }

    #[test]
    fn wide_characters_are_seen() {
        let wide = |units: &[u16], order: fn(u16) -> [u8; 2]| units.iter().copied().flat_map(order).collect();
        let text: Vec<u16> = r#"{"a":1}"#.encode_utf16().collect();
        let marked = [&[0xfeff], &text[..]].concat();
        let four: Vec<u8> = r#"{"a":1}"#.chars().flat_map(|one| (one as u32).to_le_bytes()).collect();
        let quad = |marked: &str, order: fn(u32) -> [u8; 4]| {
            marked.chars().flat_map(|one| order(one as u32)).collect()
        };
        let bodies: [Vec<u8>; 12] = [
            wide(&text, u16::to_le_bytes),
            wide(&text, u16::to_be_bytes),
            wide(&marked, u16::to_le_bytes),
            wide(&marked, u16::to_be_bytes),
            four,
            quad(r#"{"a":1}"#, u32::to_be_bytes),
            quad("\u{feff}{}", u32::to_le_bytes),
            quad("\u{feff}{}", u32::to_be_bytes),
            wide(&[u16::from(b'1')], u16::to_le_bytes),
            wide(&[u16::from(b'1')], u16::to_be_bytes),
            // A character beyond ASCII in the first place, or in the second.
            wide(&[u16::from(b'"'), 0x4e2d, u16::from(b'"')], u16::to_le_bytes),
            wide(&[u16::from(b'"'), 0x4e2d, u16::from(b'"')], u16::to_be_bytes),
        ];
        for body in &bodies {
            assert!(is_wide(body), "{body:?}");
        }
        for body in ["", "1", r#"{"a":1}"#, "\u{feff}{}", "{\"\\u0000\":\"\0\"}", "é"] {
            assert!(!is_wide(body.as_bytes()), "{body:?}");
        }
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let body = br#"{"a":1,"b":{"c":"x\n"},"a":"y"}"#;
        let object = document(body).unwrap();
        assert_eq!(object.text(body, "a").as_deref(), Some("y"));
        assert_eq!(object.object(body, "b").unwrap().text(body, "c").as_deref(), Some("x\n"));
        assert!(object.is(body, "a", "\"y\"") && !object.is(body, "z", ""));
    }

    #[test]
    fn items_come_in_order() {
        let read = |text: &'static str| {
            items(text.as_bytes(), 0, |at| {
                let end = value_end(text.as_bytes(), at)?;
                Some((&text[at..end], end))
            })
            .map(|(items, end)| (items, &text[end..]))
        };
        assert_eq!(read("[1, [2] ,\"]\",{}]x"), Some((vec!["1", "[2]", "\"]\"", "{}"], "x")));
        assert_eq!(read("[ ]"), Some((vec![], "")));
        for text in ["[1", "[1,]", "[1 2]", "{}", "", "[,1]"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn objects_have_a_size() {
        let of = |count: usize| format!("{{{}}}", vec![r#""a":1"#; count].join(","));
        assert_eq!(document(of(MAX_MEMBERS).as_bytes()).map(|all| all.members.len()), Some(MAX_MEMBERS));
        let fault = |text: &str| read_object(text.as_bytes(), 0).err();
        assert_eq!(fault(&of(MAX_MEMBERS + 1)), Some(ReadFault::ManyMembers));
        let key = |bytes: usize| format!(r#"{{"{}":1}}"#, "k".repeat(bytes - 2));
        assert_eq!(fault(&key(MAX_KEY_BYTES)), None);
        assert_eq!(fault(&key(MAX_KEY_BYTES + 1)), Some(ReadFault::LongKey));
        assert_eq!(fault("[1]"), Some(ReadFault::Syntax));
    }

    #[test]
    fn values_are_counted() {
        for (text, values) in [
            ("1", 1),
            (r#"",,::[[""#, 1),
            ("[1,2,3]", 4),
            (r#"{"a":[1,{}],"b":"}"}"#, 6),
            (r#"{"a":{"b":1}}"#, 5),
        ] {
            let counted = (0..).find(|most| has_at_most(text.as_bytes(), *most));
            assert!(
                counted.is_some_and(|counted| counted >= values && counted <= 2 * values),
                "{text} {counted:?}"
            );
        }
    }

    /// Where a value ends that has no strings, byte by byte.
    fn end_of_lists(bytes: &[u8]) -> Option<usize> {
        let mut depth = 0_i64;
        let end = bytes.iter().position(|byte| {
            depth += i64::from(matches!(byte, b'[' | b'{')) - i64::from(matches!(byte, b']' | b'}'));
            depth == 0
        });
        end.map(|end| end + 1)
    }

    proptest! {
        #[test]
        fn lists_end_where_they_end(
            parts in prop::collection::vec("\\[|\\]|\\{|\\}|[,:;Zz\u{1}é0-9.-]{1,9}|[0-9,]{30,80}", 0..20),
            behind in "[0-9\\]]{0,40}",
        ) {
            let text = format!("[{}{behind}", parts.concat());
            prop_assert_eq!(value_end(text.as_bytes(), 0), end_of_lists(text.as_bytes()), "{}", text);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in r#"[\[\]{}",:\\a1 \-\PC]{0,40}"#, at in 0..40_usize) {
            let bytes = bytes.as_bytes();
            let _ = (document(bytes), value_end(bytes, at), object(bytes, at));
            let _ = items(bytes, at, |at| Some(((), value_end(bytes, at)?)));
        }
    }
}
