//! Streams of events: what is read of one depends on its bytes alone, and not on the chunks they come in.

use vllm_lb::reply::First;
use vllm_lb::reply::sse::{Events, is_error};
use vllm_lb::reply::usage::Meter;

use super::cuts;

const CONTENT_TYPES: [&str; 2] = ["text/event-stream", "application/json"];

pub fn run(data: &[u8]) {
    let mut whole = Events::new();
    whole.feed(data);
    assert_eq!((whole.first(), whole.whole()), by_the_standard(data));
    for way in cuts::ways(data) {
        let mut pieces = Events::new();
        for piece in way.clone() {
            pieces.feed(&data[piece]);
        }
        let of = |events: &Events| (events.first(), events.whole(), events.between_events());
        assert_eq!(of(&pieces), of(&whole));
        for content_type in CONTENT_TYPES {
            let meter = || Meter::of(Some(content_type)).expect("it is metered");
            let (mut at_once, mut in_pieces) = (meter(), meter());
            at_once.feed(data);
            for piece in way.clone() {
                in_pieces.feed(&data[piece]);
            }
            assert_eq!(format!("{:?}", in_pieces.usage()), format!("{:?}", at_once.usage()));
            assert_eq!(in_pieces.id(), at_once.id());
            assert_eq!(format!("{:?}", in_pieces.failure()), format!("{:?}", at_once.failure()));
        }
    }
}

/// The first event and the number of whole events, over the whole stream and line by line.
fn by_the_standard(stream: &[u8]) -> (Option<First>, u64) {
    let stream = stream.strip_prefix(b"\xef\xbb\xbf").unwrap_or(stream);
    let text = String::from_utf8_lossy(stream).replace("\r\n", "\n").replace('\r', "\n");
    let (mut first, mut whole, mut name, mut has_data) = (None, 0, String::new(), false);
    let lines: Vec<&str> = text.split('\n').collect();
    for line in &lines[..lines.len() - 1] {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" if line.is_empty() => {
                whole += u64::from(has_data);
                (name, has_data) = (String::new(), false);
            }
            "event" => name = value.to_owned(),
            "data" => {
                has_data = true;
                // As much of a line as `Events` keeps tells an error from other data.
                let error = name == "error" || is_error(value.as_bytes());
                first = first.or(Some(if error { First::Error } else { First::Event }));
            }
            _ => {}
        }
    }
    (first, whole)
}
