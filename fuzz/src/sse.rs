//! Streams of events: what is read of one depends on its bytes alone, and not on the chunks they come in.

use vllm_lb::reply::FirstContent;
use vllm_lb::reply::sse::{EventTracker, is_error};
use vllm_lb::reply::usage::UsageMeter;
use vllm_lb::sse::{LineSplitter, SsePiece};

use super::cuts;

/// Caps of a line: one that some lines of a small input exceed, and one that none does.
const CAPS: [usize; 2] = [16, 1 << 20];

/// The bytes of a line by which `EventTracker` reads it.
const HEAD: usize = 64;

const CONTENT_TYPES: [&str; 2] = ["text/event-stream", "application/json"];

pub fn run(data: &[u8]) {
    for cap in CAPS {
        let at_once = lines(&[data], cap);
        assert!(cap < data.len() || at_once == lines_by_the_standard(data));
        for way in cuts::ways(data) {
            let pieces: Vec<&[u8]> = way.into_iter().map(|piece| &data[piece]).collect();
            assert_eq!(lines(&pieces, cap), at_once, "of up to {cap} bytes");
        }
    }
    let mut whole = EventTracker::new();
    whole.feed(data);
    assert_eq!((whole.first(), whole.whole()), by_the_standard(data));
    for way in cuts::ways(data) {
        let mut pieces = EventTracker::new();
        for piece in way.clone() {
            pieces.feed(&data[piece]);
        }
        let of = |events: &EventTracker| (events.first(), events.whole(), events.between_events());
        assert_eq!(of(&pieces), of(&whole));
        for content_type in CONTENT_TYPES {
            let meter = || UsageMeter::of(Some(content_type)).expect("it is metered");
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

/// The texts of the lines, of those beyond the cap none. Fails unless the stream is all there, in order.
fn lines(chunks: &[&[u8]], cap: usize) -> Vec<Option<Vec<u8>>> {
    let mut framer = LineSplitter::new(cap);
    let (mut texts, mut raw) = (Vec::new(), Vec::new());
    for mut chunk in chunks.iter().copied() {
        while let Some(piece) = framer.next(&mut chunk) {
            raw.extend_from_slice(piece.raw());
            match piece {
                SsePiece::Line(line) => texts.push(Some(line.text().to_vec())),
                SsePiece::Long { begins: true, .. } => texts.push(None),
                SsePiece::Long { .. } | SsePiece::LineFeed => {}
            }
        }
        assert!(framer.held_bytes() <= cap, "a line beyond the cap is held");
    }
    if let Some(line) = framer.finish() {
        raw.extend_from_slice(line.raw());
        texts.push(Some(line.text().to_vec()));
    }
    assert_eq!(raw, chunks.concat());
    texts
}

/// The lines of a whole stream, of which the last one counts only when it has a byte.
fn lines_by_the_standard(stream: &[u8]) -> Vec<Option<Vec<u8>>> {
    let (mut lines, mut line) = (Vec::new(), Vec::new());
    let mut bytes = stream.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b'\r' {
            bytes.next_if_eq(&b'\n');
        }
        match byte {
            b'\r' | b'\n' => lines.push(Some(std::mem::take(&mut line))),
            byte => line.push(byte),
        }
    }
    if !line.is_empty() {
        lines.push(Some(line));
    }
    if let Some(Some(first)) = lines.first_mut()
        && first.starts_with(b"\xef\xbb\xbf")
    {
        first.drain(..3);
    }
    lines
}

/// The first event and the number of whole events, over the whole stream and line by line.
fn by_the_standard(stream: &[u8]) -> (Option<FirstContent>, u64) {
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
                // `EventTracker` tells an error from other data by the head of the line that it keeps.
                let kept = HEAD.saturating_sub(line.len() - value.len()).min(value.len());
                let error = name == "error" || is_error(&value.as_bytes()[..kept]);
                first = first.or(Some(if error { FirstContent::Error } else { FirstContent::Event }));
            }
            _ => {}
        }
    }
    (first, whole)
}
