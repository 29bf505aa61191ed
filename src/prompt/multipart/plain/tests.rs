//! Tests of what makes a form plain, in the scanner and in the tail behind each of its bytes.

use super::super::FormScanner;
use super::super::tail::FormTail;

const TYPE: &str = "multipart/form-data; boundary=B";
const FIRST: &str = "--B\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n";
const FILE: &str = "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\
    Content-Type: audio/wav\r\n\r\nRIFF\r\n--b\r\n\r\n";

fn part(disposition: &str) -> String {
    format!("--B\r\nContent-Disposition: {disposition}\r\n\r\nsecret\r\n")
}

fn form(part: &str) -> Vec<u8> {
    format!("{FIRST}{FILE}{part}--B--\r\n").into_bytes()
}

fn scanned(content_type: &str, body: &[u8]) -> FormScanner {
    let mut scanner = FormScanner::new(content_type).expect("it is a form");
    scanner.scan(body);
    scanner
}

/// The tail behind so many bytes, once it has read the rest by pieces of this length.
fn tail_behind(body: &[u8], cut: usize, piece: usize) -> FormTail {
    let mut tail = scanned(TYPE, &body[..cut]).tail(&body[..cut]);
    body[cut..].chunks(piece).for_each(|piece| tail.read(piece));
    tail
}

/// That the form is refused, or not, wherever the scanner hands it to the tail.
#[track_caller]
fn assert_lost(body: &[u8], expected: bool) {
    let text = String::from_utf8_lossy(body);
    assert_eq!(scanned(TYPE, body).is_lost(), expected, "{text}");
    // Here the model is known, and the rest may be left to the tail.
    let first = FIRST.len() + 5;
    let whole = (first..=body.len()).map(|cut| (cut, body.len()));
    for (cut, piece) in whole.chain([(first, 1), (first, 7)]) {
        let tail = tail_behind(body, cut, piece);
        // A second model is refused as such, before the rest is read.
        let is_refused = tail.is_lost() || tail.names_model();
        assert_eq!(is_refused, expected, "cut at {cut}, by {piece}: {text}");
    }
}

#[test]
fn a_part_that_parsers_read_differently_is_not_followed() {
    for disposition in [
        r#"form-data; name="model"; x="a\\"; filename="b""#,
        r#"form-data; x=\"; name="model"; y=";filename=z""#,
        r#"form-data; name="model"; x="a\"; filename=c""#,
        r#"form-data; name="mo\del""#,
        r#"form-data; name="model"; x=a"b; filename="c""#,
        r#"form-data; name="model"#,
        r#"form-data; name="mo"del"#,
        "form-data; name*=utf-8''model",
        r#"form-data; name*0="mo"; name*1="del""#,
        r#"form-data; name="x"; name*=utf-8''model"#,
        r#"form-data; name="file"; filename*0=a; filename*1=b"#,
        "form-data; name=<model>",
        "form-data; name=mo del",
        "form-data; name=",
        "form-data; name",
        "form-data; name=mod\u{e9}l",
        r#"form-data; name="x"; name="model""#,
        r#"form-data; name="model"; NAME="x""#,
        r#"form-data; name="file"; filename="a"; filename="b""#,
        r#"form-data; name="model"; filename*=utf-8''x"#,
        r#"form-data; name="file"; filename*="utf-8''x"; filename*=utf-8''x"#,
        "form-data, x; name=file",
        "form-data; name=\"file\tname\"",
        "form-data;\r\n name=\"model\"",
        "form-data; name=\"file\"\r\nContent-Disposition: form-data; name=\"model\"",
        "form-data; name=\"file\"\nContent-Disposition: form-data; name=\"model\"",
        "form-data; name=\"file\"\rContent-Disposition: form-data; name=\"model\"",
        "form-data; name=\"file\"\r\nContent-Disposition : form-data; name=\"model\"",
        "form-data; name=\"file\"\r\nno header",
    ] {
        assert_lost(&form(&part(disposition)), true);
    }
}

#[test]
fn a_boundary_that_parsers_read_differently_is_not_followed() {
    let second = part("form-data; name=\"other\"");
    for behind in [" ", "\t", " \t ", "\n", "\r", "x", "-", "-x"] {
        let odd = second.replacen("--B", &format!("--B{behind}"), 1);
        assert_lost(&form(&odd), true);
    }
    let body = form(&second);
    for before in ["\n", "\r", "\r\n", "\n\r\n", " ", "preamble\r\n", "--\r\n", "--Bx\r\n", "--B \r\n"] {
        let odd = [before.as_bytes(), &body].concat();
        assert!(scanned(TYPE, &odd).is_lost(), "{before:?}");
        let mut by_bytes = scanned(TYPE, b"");
        (0..=odd.len()).for_each(|end| by_bytes.scan(&odd[..end]));
        assert!(by_bytes.is_lost(), "{before:?} by bytes");
    }
}

#[test]
fn a_content_type_that_parsers_read_differently_is_not_followed() {
    for (parameters, expected) in [
        ("boundary=B", false),
        ("Boundary = \"B\" ; charset=UTF-8;", false),
        ("charset=ISO-8859-1; boundary=B", false),
        ("boundary=\"--=_Part_1 (2):3/4?5'6,7+8\"", false),
        ("boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW", false),
        ("boundary=<B>", true),
        ("boundary=a=b", true),
        ("boundary=\"<B>\"", true),
        ("boundary=\"B \"", true),
        ("boundary=\"a\\\"b\"", true),
        ("boundary=\"B", true),
        ("boundary=B, application/json", true),
        ("boundary=X; boundary=B", true),
        ("boundary=B; Boundary=B", true),
        ("boundary=X; boundary*=utf-8''B", true),
        ("boundary=X; boundary*0=B", true),
        ("boundary=B; charset=utf-7", true),
        ("boundary=B; charset=utf-16", true),
        ("boundary=B; charset=utf-8; charset=cp037", true),
        ("boundary=B; charset*=utf-8''utf-7", true),
    ] {
        let scanner = FormScanner::new(&format!("multipart/form-data; {parameters}"));
        assert_eq!(scanner.map(|scanner| scanner.is_lost()), Some(expected), "{parameters}");
    }
}

#[test]
fn a_name_in_another_encoding_is_not_followed() {
    let named = |bytes: &[u8]| [b"--B\r\nContent-Disposition: form-data; name=model\r\n\r\n", bytes].concat();
    let form = |bytes: &[u8]| [named(bytes).as_slice(), b"\r\n--B--\r\n"].concat();
    let latin = format!("{TYPE}; charset=iso-8859-1");
    for (content_type, name, expected) in [
        (TYPE, "m\u{e9}".as_bytes(), false),
        (TYPE, b"m\xe9", true),
        (&latin, b"m", false),
        (&latin, "m\u{e9}".as_bytes(), true),
    ] {
        assert_eq!(scanned(content_type, &form(name)).is_lost(), expected, "{content_type} {name:?}");
    }
}

/// As curl, requests, httpx, browsers, Node and .NET write them; urllib3 before 1.25 has but the last.
#[test]
fn forms_of_common_clients_are_followed() {
    for disposition in [
        r#"form-data; name="file"; filename="a;b %22c%22 *.wav""#,
        r#"form-data; name="timestamp_granularities[]""#,
        "form-data; name=\"file\"; filename=\"M\u{fc}ller \u{65e5}\u{672c}.wav\"",
        "form-data; name=\"n\u{e4}me\"",
        "form-data; name=file; filename=a.wav; filename*=utf-8''a.wav",
        r#"form-data; name=file; filename="=?utf-8?B?w7wud2F2?="; filename*=utf-8''%C3%BC.wav"#,
        "form-data; name=\"file\"; filename*=utf-8''M%C3%BCller.wav",
        "form-data; name=\"model\"; filename=\"x\"; filename*=utf-8''x",
        "form-data;name=\"file\" ;filename=\"\";",
        "form-data; name=\"language\"\r\nContent-Type: text/plain; charset=\"a\\b\"\r\nContent-Length: 6",
    ] {
        assert_lost(&form(&part(disposition)), false);
    }
    assert_lost(&form("--B\r\n\r\nnameless\r\n"), false);
}
