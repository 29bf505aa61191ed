//! Tests of `tail`: what is found behind a cut is what a scan of the whole document finds there.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::prompt::scan::ScanProgress;

/// Whether the document names its model once more behind `cut`, in pieces of so many bytes.
fn names_model_behind(body: &[u8], cut: usize, piece: usize) -> bool {
    let mut scanner = Scanner::new();
    scanner.scan(&body[..cut]);
    let mut tail = scanner.tail(&body[..cut]);
    body[cut..].chunks(piece).for_each(|piece| tail.read(piece));
    tail.names_model()
}

fn assert_found(body: &str, expected: bool) {
    let first = r#"{"model":"a""#.len();
    for cut in first..=body.len() {
        for piece in [1, 2, 3, 7, body.len()] {
            let found = names_model_behind(body.as_bytes(), cut, piece);
            let whole = scan_of(body.as_bytes()).span(BodyField::Model);
            let before = scan_of(&body.as_bytes()[..cut]).span(BodyField::Model);
            assert_eq!(found, expected && whole != before, "{body} cut at {cut}, by {piece}");
        }
    }
}

fn scan_of(body: &[u8]) -> Scanner {
    let mut scanner = Scanner::new();
    scanner.scan(body);
    scanner
}

#[test]
fn a_second_model_is_found_wherever_the_document_is_cut() {
    for body in [
        r#"{"model":"a","messages":[{"model":"x"}],"model":"b"}"#,
        r#"{"model":"a","mod\u0065l":"b"}"#,
        r#"{"model":"a","\u006D\u006f\u0064\u0065\u006C":"b"}"#,
        "{\"model\":\"a\" , \"x\" : -1.5e3 ,\r\n\t\"model\" : null }",
        r#"{"model":"a","x":"\\","model":{"b":["c"]}}"#,
        r#"{"model":"a","x":"\\\"","y":"\"","model":["b"]}"#,
        r#"{"model":"a","x":[[["}]","{",{"y":"\""}]]],"model":7}"#,
        r#"{"model":"a","\\":1,"\"":"model","model":"b"}"#,
        r#"{"model":"a","x":[1,22,333,4444,55555,666666,7777777,88888888,999999999],"model":"b"}"#,
    ] {
        assert_found(body, true);
    }
}

#[test]
fn what_is_no_second_model_is_not_taken_for_one() {
    for body in [
        r#"{"model":"a"}"#,
        r#"{"model":"a","x":"model","y":["model",{"model":"b"}],"z":{"model":{"model":"c"}}}"#,
        r#"{"model":"a","x":"\",\"model\":\"b\"","models":1,"Model":2,"mode":3,"model ":4}"#,
        r#"{"model":"a","mod\u0065\u006cmod\u0065\u006cmodelmodelmodelmodel":1,"\\u006dodel":2}"#,
        r#"{"model":"a","x":1} {"model":"b"}"#,
    ] {
        assert_found(body, false);
    }
}

#[test]
fn a_second_model_whose_value_is_cut_counts() {
    for body in [
        r#"{"model":"a","model""#,
        r#"{"model":"a","model": "#,
        r#"{"model":"a","model":"b"#,
        r#"{"model":"a","model":nul"#,
        r#"{"model":"a","model":[1,"x"#,
    ] {
        assert!(names_model_behind(body.as_bytes(), body.len(), 1), "{body}");
    }
}

fn member() -> impl Strategy<Value = String> {
    let keys = ["model", "mod\\u0065l", "x", "messages", "\\\"model", "mode\\\\l", ""];
    let values = [
        "\"b\"",
        "null",
        "[]",
        "{\"model\":\"c\"}",
        "[1,-2,3.5]",
        "\"\\\\\"",
        "\"\\\"model\\\":\"",
        "true",
        "\"a text that is longer than the window of bytes without structure\"",
        "[1,22,333,4444,55555,666666,7777777,88888888,999999999,{\"a\":[]}]",
    ];
    let spaces = select(vec!["", " ", "\n"]);
    (select(keys.to_vec()), select(values.to_vec()), spaces)
        .prop_map(|(key, value, space)| format!("{space}\"{key}\"{space}:{space}{value}{space}"))
}

proptest! {
    #[test]
    fn any_document_in_any_pieces(
        members in prop::collection::vec(member(), 0..8), cut: Index, piece in 1..40_usize,
    ) {
        let body = format!("{{{}}}", [vec!["\"model\":\"a\"".to_string()], members].concat().join(","));
        let first = r#"{"model":"a""#.len();
        let cut = first + cut.index(body.len() + 1 - first);
        let (before, whole) = (scan_of(&body.as_bytes()[..cut]), scan_of(body.as_bytes()));
        prop_assert_eq!(whole.progress(), ScanProgress::Complete);
        let expected = whole.span(BodyField::Model) != before.span(BodyField::Model);
        prop_assert_eq!(names_model_behind(body.as_bytes(), cut, piece), expected, "{} at {}", body, cut);
    }

    #[test]
    fn any_bytes_are_taken(body in any::<Vec<u8>>(), cut: Index, piece in 1..9_usize) {
        names_model_behind(&body, cut.index(body.len() + 1), piece);
    }
}
