//! Tests of `slice`.

use proptest::prelude::*;

use super::super::{
    EndOfJson, JsonCursor, JsonList, JsonMember, document, is_wide, items, object, read_object,
};
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
    let quad =
        |marked: &str, order: fn(u32) -> [u8; 4]| marked.chars().flat_map(|one| order(one as u32)).collect();
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

fn read<const N: usize>(text: &str, names: &[&str; N]) -> (Vec<Result<Option<String>, EndOfJson>>, bool) {
    let object = JsonCursor::new(text.as_bytes()).object(names);
    let value =
        |slot| object.get(slot).map(|raw| raw.map(|raw| String::from_utf8_lossy(raw.bytes).into_owned()));
    ((0..N).map(value).collect(), object.whole)
}

#[test]
fn slots_are_filled_in_whatever_order_the_keys_come() {
    let some = |text: &str| Ok(Some(text.to_owned()));
    for (text, role, content, whole) in [
        (r#"{"role":"a","content":"b"}"#, some(r#""a""#), some(r#""b""#), true),
        (r#" { "content" : [1, {"]":"\"}"}] , "role" : 7 } "#, some("7"), some(r#"[1, {"]":"\"}"}]"#), true),
        (r#"{"r\u006fle":"a","x":{"role":"no"}}"#, some(r#""a""#), Ok(None), true),
        (r#"{"role":"a","role":"b","content":null}"#, some(r#""b""#), Ok(None), true),
        (r#"{"role":"a","cont"#, some(r#""a""#), Err(EndOfJson), false),
        (r#"{"role":"a","content":["b","#, some(r#""a""#), some(r#"["b","#), false),
        (r#"{"role":"a","content":nu"#, some(r#""a""#), Err(EndOfJson), false),
        (r#"{"role":"a" "content":"b"}"#, some(r#""a""#), Err(EndOfJson), false),
        (r#"{}"#, Ok(None), Ok(None), true),
        ("", Err(EndOfJson), Err(EndOfJson), false),
        ("]", Err(EndOfJson), Err(EndOfJson), false),
    ] {
        let (values, is_whole) = read(text, &["role", "content"]);
        assert_eq!((values, is_whole), (vec![role, content], whole), "{text}");
    }
}

#[test]
fn the_elements_of_a_list_come_one_after_the_other() {
    for (text, elements, end) in [
        ("[]", vec![], Ok(false)),
        (" [ ] ", vec![], Ok(false)),
        (r#"[1 ,"a]", [2,[3]],{"b":[]}]"#, vec!["1", r#""a]""#, "[2,[3]]", r#"{"b":[]}"#], Ok(false)),
        ("[1,2", vec!["1", "2"], Err(EndOfJson)),
        ("[1;2]", vec!["1"], Err(EndOfJson)),
        ("[[1],", vec!["[1]"], Err(EndOfJson)),
        ("{}", vec![], Err(EndOfJson)),
    ] {
        let mut list = JsonList::new(text.as_bytes());
        let mut found = Vec::new();
        let last = loop {
            match list.next() {
                Ok(true) => {}
                end => break end,
            }
            match list.cursor.value() {
                Ok(raw) => found.push(std::str::from_utf8(raw.bytes).unwrap()),
                Err(cut) => break Err(cut),
            }
        };
        assert_eq!((found, last), (elements, end), "{text}");
    }
}
