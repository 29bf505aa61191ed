//! Forms in whole and in pieces, and what is no form.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

const TYPE: &str = "multipart/form-data; boundary=AbC";

fn scanned(body: &[u8]) -> FormScanner {
    let mut scanner = FormScanner::new(TYPE).unwrap();
    scanner.scan(body);
    scanner
}

fn part(disposition: &str, content: &[u8]) -> Vec<u8> {
    let head =
        format!("\r\n--AbC\r\nContent-Type: x/y\r\nContent-Disposition: form-data; {disposition}\r\n\r\n");
    [head.as_bytes(), content].concat()
}

fn form(parts: &[Vec<u8>]) -> Vec<u8> {
    [&parts.concat()[2..], b"\r\n--AbC--\r\n"].concat()
}

fn named(name: &str) -> ModelField<'_> {
    ModelField::Named(name.into())
}

#[test]
fn reads_the_boundary_from_the_header() {
    for (header, boundary) in [
        ("multipart/form-data; boundary=AbC", Some("AbC")),
        ("Multipart/Form-Data;charset=utf-8; Boundary = \"a b;c\\\"d\" ", Some("a b;c\"d")),
        ("multipart/form-data; boundary=one; boundary=two", Some("two")),
        ("multipart/form-data; boundary=\"\"", None),
        ("multipart/form-data; boundary*=AbC", None),
        ("multipart/form-data", None),
        ("multipart/mixed; boundary=AbC", None),
        ("multipart/form-data; boundary=Ab\u{fffd}", None),
        ("application/json", None),
        ("", None),
    ] {
        let scanner = FormScanner::new(header);
        let found = scanner.as_ref().map(|scanner| &scanner.delimiter.needle()[4..]);
        assert_eq!(found, boundary.map(str::as_bytes), "{header}");
    }
    assert!(FormScanner::new(&format!("{TYPE}{}", "x".repeat(253))).is_some());
    assert!(FormScanner::new(&format!("{TYPE}{}", "x".repeat(254))).is_none());
}

#[test]
fn finds_fields_after_files() {
    let file = part("name=\"model\"; filename=\"a;b.wav\"", b"not\r\n--AbX\r\n--AbCno\r\n--AbC-\r\n\r\n--");
    for (parts, model, stream) in [
        (vec![file.clone(), part("name=\"model\"", b"whisper")], named("whisper"), false),
        (vec![part("name=model", b"whisper"), file.clone()], named("whisper"), false),
        (vec![part("name=\"model\"", b"")], ModelField::Absent, false),
        (vec![part("name=\"model\"", b"a"), part("name=\"model\"", b"b")], named("b"), false),
        (vec![file, part("name=\"stream\"", b"True")], ModelField::Absent, true),
        (vec![part("name=\"mod\\\"el\"", b"no")], ModelField::Absent, false),
        (vec![part("name=\"model\"", "é\r\n".as_bytes())], named("é\r\n"), false),
    ] {
        let body = form(&parts);
        let facts = scanned(&body).facts(&body).clone();
        assert_eq!(facts, FormFacts { model, stream, state: ScanProgress::Complete });
    }
}

#[test]
fn accepts_parts_without_headers_and_a_preamble() {
    let body = b"hello\r\n--AbC\r\n\r\nnameless\r\n--AbC\r\n\
        content-disposition:form-data;name=model\r\n\r\nm\r\n--AbC--";
    assert_eq!(scanned(body).facts(body).model, named("m"));
}

#[test]
fn enforces_limits() {
    let long = [b"--AbC\r\nx: ".as_slice(), &vec![b'y'; 2 * MAX_PART_HEADER_BYTES]].concat();
    assert_eq!(scanned(&long).facts(&long).state, ScanProgress::Malformed(5));
    let many = form(&vec![part("name=a", b""); MAX_PARTS + 1]);
    assert!(matches!(scanned(&many).facts(&many).state, ScanProgress::Malformed(_)));
    let most = form(&vec![part("name=a", b""); MAX_PARTS]);
    assert_eq!(scanned(&most).facts(&most).state, ScanProgress::Complete);
    let none = vec![b'-'; 100_000];
    assert_eq!(scanned(&none).facts(&none).state, ScanProgress::Cut);
}

/// Binary data with much in it that looks like a boundary, and never is one.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let pieces = ["\r\n", "\r", "\n", "--", "AbC", "\r\n--Ab", "\r\n--AbCx", "--AbC--", "\r\n\r\n", "\0"];
    let piece = prop_oneof![
        3 => select(pieces.to_vec()).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => any::<Vec<u8>>(),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat()).prop_filter(
        "a boundary",
        |bytes| {
            let whole = [bytes.as_slice(), b"\r\n--AbC\r\n"].concat();
            ["\r\n--AbC\r\n", "\r\n--AbC--"]
                .iter()
                .filter_map(|line| memmem::find(&whole, line.as_bytes()))
                .min()
                == Some(bytes.len())
        },
    )
}

prop_compose! {
    fn any_form()(
        parts in prop::collection::vec((0..4usize, content()), 1..6),
    ) -> (Vec<u8>, Option<Vec<u8>>) {
        let names = ["name=\"model\"", "name=\"file\"; filename=\"x\"", "name=stream", "name=\"other\""];
        let model = parts.iter().rfind(|(which, _)| *which == 0).map(|(_, content)| content.clone());
        let parts: Vec<_> = parts.iter().map(|(which, content)| part(names[*which], content)).collect();
        (form(&parts), model)
    }
}

proptest! {
    #[test]
    fn finds_the_model_of_any_form((body, model) in any_form()) {
        let scanner = scanned(&body);
        prop_assert_eq!(scanner.model.clone().map(|span| body[span].to_vec()), model);
        prop_assert_eq!(scanner.facts(&body).state, ScanProgress::Complete);
        let end = scanner.end().map(|end| (&body[end.clone()], &body[end.end..]));
        prop_assert_eq!(end, Some((&b"--AbC"[..], &b"--\r\n"[..])));
    }

    #[test]
    fn facts_do_not_depend_on_the_pieces(
        (body, _) in any_form(),
        cuts in prop::collection::vec(any::<Index>(), 0..9),
    ) {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len())).collect();
        ends.sort_unstable();
        let mut scanner = FormScanner::new(TYPE).unwrap();
        for end in ends {
            scanner.scan(&body[..end]);
            prop_assert_eq!(scanner.facts(&body[..end]), scanned(&body[..end]).facts(&body[..end]));
        }
        scanner.scan(&body);
        prop_assert_eq!(scanner.facts(&body), scanned(&body).facts(&body));
    }

    #[test]
    fn any_bytes_are_taken(
        body in any::<Vec<u8>>(), header in any::<String>(), shrunk in any::<Index>(),
    ) {
        FormScanner::new(&format!("multipart/form-data;{header}"));
        let mut scanner = FormScanner::new(TYPE).unwrap();
        for end in 0..=body.len() {
            scanner.scan(&body[..end]);
        }
        let shorter = &body[..shrunk.index(body.len() + 1)];
        scanner.scan(shorter);
        scanner.facts(shorter);
    }
}
