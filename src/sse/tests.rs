//! Tests of `sse`: any chunks give the lines of the standard, at linear cost.

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

/// The lines of the whole stream by the algorithm of the standard; the last one has no end.
fn plain_lines(stream: &[u8]) -> Vec<Vec<u8>> {
    let stream = stream.strip_prefix(b"\xef\xbb\xbf").unwrap_or(stream);
    let (mut lines, mut line, mut at) = (Vec::new(), Vec::new(), 0);
    while at < stream.len() {
        match stream[at] {
            b'\r' | b'\n' => {
                if stream[at..].starts_with(b"\r\n") {
                    at += 1;
                }
                lines.push(std::mem::take(&mut line));
            }
            byte => line.push(byte),
        }
        at += 1;
    }
    lines.push(line);
    lines
}

/// Name and data of every event that the standard dispatches.
fn plain_events(stream: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let lines = plain_lines(stream);
    let (mut events, mut name, mut data) = (Vec::new(), Vec::new(), Vec::new());
    for line in &lines[..lines.len() - 1] {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..colon] {
            _ if line.is_empty() => {
                let name = std::mem::take(&mut name);
                if !data.is_empty() {
                    data.pop();
                    events.push((name, std::mem::take(&mut data)));
                }
            }
            b"event" => name = value.to_vec(),
            b"data" => {
                data.extend_from_slice(value);
                data.push(b'\n');
            }
            _ => {}
        }
    }
    events
}

/// The same by the fields of the lines.
fn events<'c>(chunks: impl IntoIterator<Item = &'c [u8]>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut lines = LineSplitter::new(1 << 20);
    let (mut events, mut name, mut data) = (Vec::new(), Vec::new(), Vec::new());
    for chunk in chunks {
        let mut rest = chunk;
        while let Some(piece) = lines.next(&mut rest) {
            let SsePiece::Line(line) = piece else { continue };
            match line.field() {
                SseField::Empty => {
                    let name = std::mem::take(&mut name);
                    if !data.is_empty() {
                        events.push((name, std::mem::take(&mut data).join(&b'\n')));
                    }
                }
                SseField::Event(value) => name = value.to_vec(),
                SseField::Data(value) => {
                    assert_eq!(&line.raw()[line.data().unwrap()], value);
                    data.push(value.to_vec());
                }
                SseField::Comment | SseField::Other => assert_eq!(line.data(), None),
            }
        }
    }
    events
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let pieces = [
        "\n",
        "\n\n",
        "\r",
        "\r\r",
        "\r\n",
        "\r\n\r\n",
        ":",
        ": c",
        "data",
        "data:",
        "data: ",
        "data: {\"a\":1}",
        "event",
        "event: error",
        "id: 7",
        "database: 1",
        " ",
        "\u{feff}",
        "\u{2028}",
        "\u{85}",
        "\u{b}",
        "é",
    ];
    let piece = prop_oneof![
        8 => select(pieces.to_vec()).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn yields_the_lines_of_the_standard_for_any_chunks(
        stream in stream(),
        cuts in prop::collection::vec(any::<Index>(), 0..10),
        cap in select(vec![3, 8, 20, 1 << 20]),
    ) {
        let (lines, raw) = read(cap, [&stream[..]]);
        prop_assert_eq!(&raw, &stream);
        prop_assert_eq!(&read(cap, chunks(&stream, &cuts)), &(lines.clone(), raw.clone()));
        prop_assert_eq!(&read(cap, stream.chunks(1)), &(lines.clone(), raw));
        let mut plain = plain_lines(&stream);
        if lines.last().is_none_or(|line| line.is_ended) {
            prop_assert_eq!(plain.pop(), Some(Vec::new()));
        }
        let texts: Vec<&Vec<u8>> = lines.iter().map(|line| &line.text).collect();
        prop_assert_eq!(texts, plain.iter().collect::<Vec<_>>());
        let marks = if stream.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        for (at, line) in lines.iter().enumerate() {
            let length = line.text.len() + if at == 0 { marks } else { 0 };
            prop_assert_eq!(line.is_long, length > cap, "{:?}", line);
        }
    }

    #[test]
    fn yields_the_events_of_the_standard_for_any_chunks(
        stream in stream(),
        cuts in prop::collection::vec(any::<Index>(), 0..10),
    ) {
        let plain = plain_events(&stream);
        prop_assert_eq!(events(chunks(&stream, &cuts)), plain.clone());
        prop_assert_eq!(events(stream.chunks(1)), plain);
    }

    #[test]
    fn skipping_a_chunk_changes_nothing_after_it(
        stream in stream(),
        cuts in prop::collection::vec(any::<Index>(), 0..10),
    ) {
        let mut skipping = LineSplitter::new(16);
        let mut reading = LineSplitter::new(16);
        for chunk in chunks(&stream, &cuts) {
            if skipping.are_whole_in(chunk) {
                skipping.skip(chunk);
            } else {
                let mut rest = chunk;
                while skipping.next(&mut rest).is_some() {}
            }
            let mut rest = chunk;
            while reading.next(&mut rest).is_some() {}
            prop_assert_eq!(skipping.position, reading.position);
            prop_assert_eq!(skipping.is_first, reading.is_first);
            prop_assert_eq!(skipping.held_bytes(), reading.held_bytes());
        }
    }

    #[test]
    fn tail_is_between_events_after_an_empty_line(
        stream in stream(),
        cuts in prop::collection::vec(any::<Index>(), 0..10),
    ) {
        // The tail cannot distinguish a stream that consists of a byte-order mark only.
        let mut stream = &stream[..];
        while let Some(rest) = stream.strip_prefix(BYTE_ORDER_MARK) {
            stream = rest;
        }
        let mut tail = StreamTail::default();
        let mut read = 0;
        for chunk in chunks(stream, &cuts) {
            tail.feed(chunk);
            read += chunk.len();
            let lines = plain_lines(&stream[..read]);
            let ended = match &lines[..] {
                [.., before, last] => before.is_empty() && last.is_empty(),
                _ => read == 0,
            };
            let is_half = stream[..read].ends_with(b"\r") && !stream[..read].ends_with(b"\r\r");
            prop_assert_eq!(tail.between_events(), ended && !is_half, "{:?}", &stream[..read]);
        }
    }
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
