//! What the API server writes, and what a broken or foreign server may.

use super::*;

const OBJECT: &str =
    r#"{"metadata": {"name": "a", "resourceVersion": "12"}, "endpoints": null, "ports": null}"#;

#[test]
fn reads_pages_of_a_list() {
    let text = format!(
        r#"{{"kind": "L", "metadata": {{"resourceVersion": "9", "continue": "k"}}, "items": [{OBJECT}]}}"#
    );
    let first = page(text.as_bytes()).expect("is valid");
    assert_eq!(first.metadata.resource_version, "9");
    let (slices, next) = first.into_parts();
    assert_eq!((slices.len(), slices[0].metadata.name.as_str(), next.as_deref()), (1, "a", Some("k")));
    let last = page(br#"{"metadata": {"resourceVersion": "9"}, "items": null}"#).expect("is valid");
    assert_eq!(last.into_parts(), (Vec::new(), None));
    for text in ["", "<html>", "{}", "[]", r#"{"metadata": {}, "items": [{"metadata": {}}]}"#] {
        assert!(page(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn reads_events_of_a_watch() {
    let of =
        |kind: &str, object: &str| event(format!(r#"{{"type": "{kind}", "object": {object}}}"#).as_bytes());
    for kind in ["ADDED", "MODIFIED"] {
        let read = of(kind, OBJECT).expect("is valid");
        assert!(matches!(&read, SliceEvent::Put(slice) if slice.metadata.name == "a"), "{read:?}");
        assert_eq!(read.resource_version(), "12");
    }
    assert!(matches!(of("DELETED", OBJECT), Ok(SliceEvent::Delete(_))));
    let bookmark =
        r#"{"kind": "EndpointSlice", "metadata": {"resourceVersion": "34", "creationTimestamp": null}}"#;
    assert_eq!(of("BOOKMARK", bookmark).expect("is valid").resource_version(), "34");
    let gone =
        r#"{"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}"#;
    assert!(matches!(of("ERROR", gone), Ok(SliceEvent::Failed(status)) if status.code == GONE_STATUS));
    // The members of an object have no order.
    let turned = format!(r#"{{"object": {OBJECT}, "type": "ADDED"}}"#);
    assert!(matches!(event(turned.as_bytes()), Ok(SliceEvent::Put(_))));
    assert!(of("RENAMED", OBJECT).is_err());
    assert!(of("ADDED", r#"{"metadata": {}}"#).is_err(), "it has no name");
    assert!(event(br#"{"type": "ADDED", "obj"#).is_err());
}

#[test]
fn names_the_rule_that_a_refused_account_lacks() {
    let said =
        br#"{"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot list"}"#;
    let text = ApiStatus::parse(403, said).explain("team-a");
    for part in
        ["status 403", "cannot list", "team-a", "discovery.k8s.io", "endpointslices", "get, list, watch"]
    {
        assert!(text.contains(part), "{text}");
    }
    assert!(ApiStatus::parse(401, b"").explain("a").contains("credentials"));
    assert_eq!(ApiStatus::parse(500, b"oh\n").explain("a"), "status 500: oh");
    assert_eq!(
        ApiStatus::parse(503, br#"{"reason": "Unavailable"}"#).explain("a"),
        "status 503: Unavailable"
    );
    let long = "x".repeat(5000);
    assert!(ApiStatus::parse(500, long.as_bytes()).explain("a").len() < 400);
}

#[test]
fn reads_retry_after_in_seconds() {
    let read = ["5", " 1 ", "0", "Wed, 21 Oct 2026 07:28:00 GMT", "-1", ""].map(retry_after);
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    assert_eq!(read, [seconds(5), seconds(1), seconds(0), None, None, None]);
}

#[test]
fn collects_lines_that_come_in_pieces() {
    let text = b"one\ntwo\r\n\n \nthree\nrest";
    for size in 1..=text.len() {
        let (mut buffer, mut lines) = (LineBuffer::default(), Vec::new());
        for piece in text.chunks(size) {
            lines.extend(buffer.push(piece, 8).expect("the lines are short"));
        }
        let lines: Vec<_> = lines.iter().map(|line| line.trim_ascii()).collect();
        assert_eq!(lines, [&b"one"[..], b"two", b"three"], "pieces of {size}");
    }
    let mut buffer = LineBuffer::default();
    assert!(buffer.push(b"1234", 8).is_ok());
    assert!(buffer.push(b"56789", 8).is_err_and(|why| why.contains("8 bytes")));
}
