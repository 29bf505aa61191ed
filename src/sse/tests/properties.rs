//! The framer beside a plain reading of the standard, over any cuts.

use super::*;

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
