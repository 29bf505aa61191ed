//! Tests of the tail of a form: what is found behind a cut is what a scan of the whole form finds there.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

const TYPE: &str = "multipart/form-data; boundary=AbC";

fn scan_of(body: &[u8]) -> FormScanner {
    let mut scanner = FormScanner::new(TYPE).expect("it is a form");
    scanner.scan(body);
    scanner
}

fn tail_behind(body: &[u8], cut: usize, piece: usize) -> FormTail {
    let mut tail = scan_of(&body[..cut]).tail(&body[..cut]);
    for piece in body[cut..].chunks(piece) {
        tail.read(piece);
        assert!(tail.kept.len() <= super::super::MAX_PART_HEADER_BYTES + piece.len() + 4);
    }
    tail
}

fn form(parts: &[(&str, &str)]) -> Vec<u8> {
    let part = |(head, content): &(&str, &str)| {
        format!("--AbC\r\nContent-Disposition: form-data; {head}\r\n\r\n{content}\r\n")
    };
    let parts: String = parts.iter().map(part).collect();
    format!("{parts}--AbC--\r\n").into_bytes()
}

#[test]
fn a_second_model_is_found_wherever_the_form_is_cut() {
    let long = "sound".repeat(100);
    for (second, expected) in [("name=\"model\"", true), ("name=\"model\"; filename=\"x\"", false)] {
        let file = ("name=\"file\"; filename=\"a.wav\"", long.as_str());
        let body = form(&[("name=model", "a"), file, (second, "b"), ("name=stream", "true")]);
        let whole = scan_of(&body).model_span();
        let first = (0..).find(|cut| scan_of(&body[..*cut]).model_span().is_some()).expect("a model");
        for cut in first..=body.len() {
            for piece in [1, 2, 3, 50, body.len()] {
                let expected = expected && whole != scan_of(&body[..cut]).model_span();
                let tail = tail_behind(&body, cut, piece);
                assert_eq!(tail.names_model(), expected, "cut at {cut}, by {piece}");
                assert!(!tail.is_lost());
            }
        }
    }
}

#[test]
fn a_form_that_cannot_be_followed_is_lost_and_not_kept() {
    let head = b"--AbC\r\nContent-Disposition: form-data; name=model\r\n\r\na\r\n--AbC\r\nx: ";
    let body = [&head[..], &vec![b'y'; 1 << 20]].concat();
    for piece in [1 << 10, 1 << 16] {
        let tail = tail_behind(&body, head.len(), piece);
        assert!(tail.is_lost() && !tail.names_model());
    }
}

proptest! {
    #[test]
    fn any_form_in_any_pieces(
        parts in prop::collection::vec(
            (
                select(vec!["name=model", "name=\"file\"; filename=x", "name=stream", "name=\"mod\\\"el\""]),
                select(vec!["a", "", "\r\n--AbX", "\r\n", "--AbC--", "\r\n--AbCx\r\n\r\n"]),
            ),
            0..6,
        ),
        cut: Index, piece in 1..60_usize,
    ) {
        let body = form(&[vec![("name=model", "a")], parts].concat());
        let first = form(&[("name=model", "a")]).len() - 4;
        let cut = first + cut.index(body.len() + 1 - first);
        let expected = scan_of(&body).model_span() != scan_of(&body[..cut]).model_span();
        prop_assert_eq!(tail_behind(&body, cut, piece).names_model(), expected);
    }
}
