//! Tests of `sse`: any chunks give the lines of the standard, at linear cost.

mod properties;

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

/// Counts the bytes that readers of streams examine or copy, so that tests of linear cost need no clock.
pub(crate) mod work {
    use std::cell::Cell;

    thread_local! {
        static BYTES: Cell<u64> = const { Cell::new(0) };
    }

    pub(crate) fn add(bytes: usize) {
        BYTES.with(|all| all.set(all.get() + bytes as u64));
    }

    /// The number of bytes that `run` examines or copies.
    pub(crate) fn of(run: impl FnOnce()) -> u64 {
        let before = BYTES.with(Cell::get);
        run();
        BYTES.with(Cell::get) - before
    }
}

/// Streams that cost a naive reader quadratic work, each with its name.
pub(crate) fn costly_streams() -> Vec<(&'static str, Vec<u8>)> {
    const BYTES: usize = 10 << 10;
    let repeated = |text: &str| text.repeat(BYTES / text.len()).into_bytes();
    let endless = |start: &str| [start.as_bytes(), &vec![b'x'; BYTES]].concat();
    vec![
        ("empty lines", repeated("\n")),
        ("empty lines of returns", repeated("\r")),
        ("empty lines of both", repeated("\r\n")),
        ("an endless line", endless("")),
        ("endless data", endless("data: {\"usage\":\"")),
        ("endless spaces", [&b"data: {\"finish_reason\""[..], &vec![b' '; BYTES]].concat()),
        ("a prelude and an endless line", endless("event: response.created\ndata: {}\n\ndata: {\"")),
        ("events", repeated("data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n")),
        ("events of interest", repeated("data: {\"choices\":[],\"usage\":{},\"error\":null}\r\n\r\n")),
        ("ends of choices", repeated("data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n")),
        (
            "an end and comments",
            [&b"data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n"[..], &repeated(": c\n\n")].concat(),
        ),
        ("short lines", repeated("data\n")),
        ("a prelude", repeated("event: ping\ndata: {}\n\n")),
    ]
}

/// Feeds every costly stream in chunks of several sizes to new readers; asserts the bound of work per byte.
pub(crate) fn assert_linear(most_a_byte: u64, mut reader: impl FnMut() -> Box<dyn FnMut(&[u8])>) {
    for (name, stream) in costly_streams() {
        for size in [1, 7, 4096, stream.len()] {
            let mut feed = reader();
            let work = work::of(|| stream.chunks(size).for_each(&mut feed));
            let most = most_a_byte * stream.len() as u64 + 1000;
            assert!(work <= most, "{name} in chunks of {size}: {work} for {} bytes", stream.len());
        }
    }
}

/// The bytes, cut at these places.
pub(crate) fn chunks<'b>(body: &'b [u8], cuts: &[Index]) -> Vec<&'b [u8]> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
    ends.extend([0, body.len()]);
    ends.sort_unstable();
    ends.windows(2).map(|pair| &body[pair[0]..pair[1]]).collect()
}

/// One line as a consumer sees it, long ones put together again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    text: Vec<u8>,
    is_long: bool,
    /// Whether the line has ended.
    is_ended: bool,
}

/// The output for a stream of these chunks: its lines, and the concatenated bytes of all pieces.
fn read<'c>(cap: usize, chunks: impl IntoIterator<Item = &'c [u8]>) -> (Vec<Seen>, Vec<u8>) {
    let (mut lines, mut seen, mut raw) = (LineSplitter::new(cap), Vec::<Seen>::new(), Vec::new());
    for chunk in chunks {
        let mut rest = chunk;
        while let Some(piece) = lines.next(&mut rest) {
            raw.extend_from_slice(piece.raw());
            match piece {
                SsePiece::LineFeed => {}
                SsePiece::Line(line) => {
                    seen.push(Seen { text: line.text().to_vec(), is_long: false, is_ended: true });
                }
                SsePiece::Long { part, begins, ends } => {
                    if begins {
                        assert!(part.raw().len() >= cap, "too little of a long line");
                        seen.push(Seen { is_long: true, ..Seen::default() });
                    }
                    let line = seen.last_mut().unwrap();
                    line.text.extend_from_slice(part.text());
                    line.is_ended = ends;
                }
            }
        }
        assert!(lines.held_bytes() <= cap, "{} bytes are held", lines.held_bytes());
    }
    if let Some(line) = lines.finish() {
        raw.extend_from_slice(line.raw());
        seen.push(Seen { text: line.text().to_vec(), is_long: false, is_ended: false });
    }
    (seen, raw)
}

#[test]
fn recognises_fields_of_lines() {
    for (line, field) in [
        ("", SseField::Empty),
        (":", SseField::Comment),
        (": data: x", SseField::Comment),
        ("data", SseField::Data(b"")),
        ("data:", SseField::Data(b"")),
        ("data:x", SseField::Data(b"x")),
        ("data:  x ", SseField::Data(b" x ")),
        ("data: \u{2028}", SseField::Data("\u{2028}".as_bytes())),
        ("database: x", SseField::Other),
        ("Data: x", SseField::Other),
        (" data: x", SseField::Other),
        ("event", SseField::Event(b"")),
        ("event: error", SseField::Event(b"error")),
        ("events: error", SseField::Other),
        ("id: 1", SseField::Other),
    ] {
        for (mark, end) in [("", "\n"), ("", "\r\n"), ("", "\r"), ("\u{feff}", "\n")] {
            let stream = format!("{mark}{line}{end}");
            let (mut lines, mut rest) = (LineSplitter::new(100), stream.as_bytes());
            let Some(SsePiece::Line(whole)) = lines.next(&mut rest) else { panic!("{stream:?}") };
            assert_eq!((whole.field(), whole.raw()), (field, stream.as_bytes()), "{stream:?}");
            assert!(rest.is_empty());
        }
    }
}

#[test]
fn borrows_whole_lines_and_frees_large_buffers() {
    let stream = "event: x\r\ndata: {\"a\":1}\r\n\r\n".repeat(1000);
    let (mut lines, mut rest) = (LineSplitter::new(1 << 20), stream.as_bytes());
    while let Some(piece) = lines.next(&mut rest) {
        let span = stream.as_bytes().as_ptr_range();
        assert!(span.contains(&piece.raw().as_ptr()), "a line was copied");
    }
    assert_eq!(lines.held.capacity(), 0);
    for chunk in [&[b'x'; 100_000][..], b"\n"] {
        let mut rest = chunk;
        while lines.next(&mut rest).is_some() {}
    }
    assert!(lines.held.capacity() <= MAX_KEPT_BUFFER_BYTES);
}

#[test]
fn the_cost_of_a_byte_is_bounded() {
    for cap in [8, 1 << 20] {
        assert_linear(4, || {
            let mut lines = LineSplitter::new(cap);
            Box::new(move |chunk| {
                let mut rest = chunk;
                while lines.next(&mut rest).is_some() {}
            })
        });
    }
}

#[test]
fn is_cut_in_a_line_that_is_no_whole_event() {
    for (stream, cut) in [
        ("", false),
        ("data: 1\n\n", false),
        ("data: {}\r", false),
        ("data: {\"a\":1}", false),
        ("data: [DONE]", false),
        ("data: {\"a\":", true),
        ("data: {}\n\ndata", true),
        (": keep-ali", true),
        ("[", true),
    ] {
        let mut tail = StreamTail::default();
        tail.feed(stream.as_bytes());
        assert_eq!(tail.is_cut(), cut, "{stream:?}");
    }
}

#[test]
fn is_between_events_after_an_empty_line_only() {
    let mut tail = StreamTail::default();
    assert!(tail.between_events());
    for (piece, between) in [
        ("data: 1\n\n", true),
        ("data: 2\n", false),
        ("\n", true),
        ("data: 3\r\n\r\n", true),
        ("data", false),
        ("\n", false),
        ("\r", false),
        ("\n", true),
        ("", true),
        ("data: 4\r", false),
        ("\r", true),
        ("data: 5", false),
    ] {
        tail.feed(piece.as_bytes());
        assert_eq!(tail.between_events(), between, "{piece:?}");
    }
}
