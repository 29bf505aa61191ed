//! Events of real answers in any chunks.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::sse::tests::assert_linear;

/// The verdict on an error after blanks once depended on the chunks in which its line arrived.
#[test]
fn recognises_an_error_by_the_head_of_its_line_in_any_chunks() {
    for blanks in 0..70 {
        let stream = format!("data: {}{{\"error\":{{}}}}\n\n", " ".repeat(blanks));
        let whole = fed(stream.as_bytes()).first();
        for size in [1, 7, 63, 64, 65] {
            let mut events = EventTracker::new();
            stream.as_bytes().chunks(size).for_each(|chunk| events.feed(chunk));
            assert_eq!(events.first(), whole, "{blanks} blanks, in chunks of {size}");
        }
    }
    assert_eq!(fed(b"data: {\"error\":{}}\n\n").first(), Some(FirstContent::Error));
}

fn fed(stream: &[u8]) -> EventTracker {
    let mut events = EventTracker::new();
    events.feed(stream);
    events
}

#[test]
fn first_event_is_the_first_complete_data_line() {
    for (stream, first) in [
        ("", None),
        (": keep-alive\n\n: keep-alive\n\n", None),
        ("event: message\nid: 7\nretry: 1\n", None),
        ("data: {\"id\":1}", None),
        ("data: {\"id\":1}\n", Some(FirstContent::Event)),
        ("data: {\"id\":1}\r", Some(FirstContent::Event)),
        ("\u{feff}data:x\n", Some(FirstContent::Event)),
        ("data\n", Some(FirstContent::Event)),
        ("database: no\n\n", None),
        (" data: no\n\n", None),
        (": ping\n\ndata: {\"error\":{\"code\":503}}\n", Some(FirstContent::Error)),
        ("data:{ \"error\" : {\"code\":503}}\n", Some(FirstContent::Error)),
        ("data: {\"error\":null,\"id\":1}\n", Some(FirstContent::Event)),
        ("data: {\"errors\":1}\n", Some(FirstContent::Event)),
        ("data: \"error\"\n", Some(FirstContent::Event)),
        ("event: error\ndata: {}\n\n", Some(FirstContent::Error)),
        ("event:error\r\ndata: {}\r\n\r\n", Some(FirstContent::Error)),
        ("data: {\"type\": \"error\"}\n", Some(FirstContent::Error)),
        ("data: {\"type\":\"errors\"}\n", Some(FirstContent::Event)),
        ("event: error\n\ndata: {}\n\n", Some(FirstContent::Event)),
        ("event: error\nevent: message\ndata: {}\n\n", Some(FirstContent::Event)),
        ("data: 1\n\nevent: error\ndata: {\"error\":{}}\n\n", Some(FirstContent::Event)),
    ] {
        assert_eq!(fed(stream.as_bytes()).first(), first, "{stream:?}");
    }
}

#[test]
fn events_end_at_an_empty_line_of_the_three_kinds() {
    for (stream, whole) in [
        ("data: 1\n\ndata: 2\r\n\r\ndata: 3\r\rdata: 4", 3),
        ("data: 1\ndata: 2\n\n", 1),
        ("data: a\u{2028}\u{85}\u{b}\u{c}b\n\n", 1),
        ("\n\n\n: comment\n\nevent: empty\n\n", 0),
        ("data: 1\n\r\n", 1),
        ("data: 1\r\n", 0),
    ] {
        assert_eq!(fed(stream.as_bytes()).whole(), whole, "{stream:?}");
    }
}

#[test]
fn reads_streams_of_vllm() {
    for (stream, whole) in [
        (include_bytes!("../../../tests/data/vllm-0.32/chat_stream.body").as_slice(), 9),
        (include_bytes!("../../../tests/data/vllm-0.32/responses_stream.body"), 23),
        (include_bytes!("../../../tests/data/vllm-0.32/messages_stream.body"), 8),
    ] {
        let events = fed(stream);
        assert_eq!((events.first(), events.whole()), (Some(FirstContent::Event), whole));
        assert!(events.between_events());
    }
}

#[test]
fn is_between_events_only_after_an_empty_line() {
    for (stream, between) in
        [("", true), ("data: 1\n\n", true), ("data: 1\n", false), ("da", false), ("event: error\n", false)]
    {
        assert_eq!(fed(stream.as_bytes()).between_events(), between, "{stream:?}");
    }
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let pieces = [
        "\n",
        "\r",
        "\r\n",
        ":",
        "data",
        "data:",
        "data: ",
        "event",
        "event: error",
        "{\"error\"",
        ":{",
        " ",
        "null",
        "\u{feff}",
        "é",
    ];
    let piece = prop_oneof![
        8 => select(pieces.to_vec()).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..100),
    ];
    prop::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat())
}

/// The algorithm of the standard, over the whole stream at once.
fn plainly(stream: &[u8]) -> (Option<FirstContent>, u64) {
    let stream = stream.strip_prefix(b"\xef\xbb\xbf").unwrap_or(stream);
    let text = String::from_utf8_lossy(stream).replace("\r\n", "\n").replace('\r', "\n");
    let (mut first, mut whole, mut name, mut data) = (None, 0, String::new(), 0);
    let lines: Vec<&str> = text.split('\n').collect();
    for line in &lines[..lines.len() - 1] {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" if line.is_empty() => {
                whole += u64::from(data > 0);
                (name, data) = (String::new(), 0);
            }
            "event" => name = value.to_owned(),
            "data" => {
                data += 1;
                let error = name == "error" || is_error(value.as_bytes());
                first = first.or(Some(if error { FirstContent::Error } else { FirstContent::Event }));
            }
            _ => {}
        }
    }
    (first, whole)
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    assert_linear(4, || {
        let mut events = EventTracker::new();
        Box::new(move |chunk| events.feed(chunk))
    });
}

proptest! {
    #[test]
    fn agrees_for_any_chunks(stream in stream(), cuts in prop::collection::vec(any::<Index>(), 0..10)) {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        ends.extend([0, stream.len()]);
        ends.sort_unstable();
        let mut events = EventTracker::new();
        for pair in ends.windows(2) {
            events.feed(&stream[pair[0]..pair[1]]);
            let prefix = fed(&stream[..pair[1]]);
            prop_assert_eq!((events.first(), events.whole()), (prefix.first(), prefix.whole()));
            prop_assert_eq!(events.between_events(), prefix.between_events());
        }
        prop_assert_eq!((events.first(), events.whole()), plainly(&stream));
    }
}
