//! Tracks the progress of a stream of events: its first event, and the number of complete events.
//!
//! A line that begins with a colon is a comment. vLLM sends comments to keep a connection open before the
//! first token, so they are not progress of the request. An event counts from its first complete `data` line
//! on, since the client can act on it then.
//!
//! The state is a few flags and the first bytes of one line.

use super::FirstContent;
use crate::json::skip_space;
use crate::sse::{LineSplitter, SseField, SseLine, SsePiece};

/// The bytes of a line that suffice to recognise its field, and an error by the beginning of its data.
const MAX_HEAD_BYTES: usize = 64;

/// Tracks one stream of events.
#[derive(Clone, Debug)]
pub struct EventTracker {
    lines: LineSplitter,
    /// The meaning of the line in progress, when the line is longer than its head.
    long: LineSign,
    /// The event in progress has data.
    has_data: bool,
    /// The event in progress is called `error`.
    is_error: bool,
    first: Option<FirstContent>,
    whole: u64,
}

/// The meaning of a line for the event in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LineSign {
    Nothing,
    End,
    Name { is_error: bool },
    Data { is_error: bool },
}

impl Default for EventTracker {
    fn default() -> Self {
        EventTracker::new()
    }
}

impl EventTracker {
    pub fn new() -> Self {
        EventTracker {
            lines: LineSplitter::new(MAX_HEAD_BYTES),
            long: LineSign::Nothing,
            has_data: false,
            is_error: false,
            first: None,
            whole: 0,
        }
    }

    /// The first event, as soon as its first `data` line has ended.
    pub fn first(&self) -> Option<FirstContent> {
        self.first
    }

    /// The number of events that have ended with their empty line.
    pub fn whole(&self) -> u64 {
        self.whole
    }

    /// Whether the stream is between two events, where it can be cut or an event of our own be inserted.
    pub fn between_events(&self) -> bool {
        self.lines.is_between_lines() && !self.has_data && !self.is_error
    }

    /// Reads the next chunk.
    pub fn feed(&mut self, chunk: &[u8]) {
        let mut rest = chunk;
        while let Some(piece) = self.lines.next(&mut rest) {
            let sign = match piece {
                SsePiece::LineFeed => continue,
                SsePiece::Line(line) => LineSign::of(&line),
                SsePiece::Long { part, begins, ends } => {
                    if begins {
                        self.long = LineSign::of(&part);
                    }
                    if !ends {
                        continue;
                    }
                    self.long
                }
            };
            match sign {
                LineSign::Nothing => {}
                LineSign::End => {
                    self.whole += u64::from(self.has_data);
                    self.has_data = false;
                    self.is_error = false;
                }
                LineSign::Name { is_error } => self.is_error = is_error,
                LineSign::Data { is_error } => {
                    self.has_data = true;
                    let is_error = self.is_error || is_error;
                    self.first.get_or_insert(if is_error {
                        FirstContent::Error
                    } else {
                        FirstContent::Event
                    });
                }
            }
        }
    }
}

impl LineSign {
    /// Recognises a line by its beginning.
    fn of(line: &SseLine<'_>) -> Self {
        match line.field() {
            SseField::Empty => LineSign::End,
            SseField::Comment | SseField::Other => LineSign::Nothing,
            SseField::Event(name) => LineSign::Name { is_error: name == b"error" },
            SseField::Data(data) => {
                // Only the head of the line, so that the result does not depend on the chunks.
                let kept = MAX_HEAD_BYTES.saturating_sub(line.text().len() - data.len());
                LineSign::Data { is_error: is_error(&data[..data.len().min(kept)]) }
            }
        }
    }
}

/// Whether data begins like vLLM's errors, `{"error":`, or like Anthropic's, `{"type":"error"`.
pub fn is_error(data: &[u8]) -> bool {
    let mut rest = data;
    let mut next = |token: &[u8]| {
        rest = &rest[skip_space(rest, 0)..];
        let found = rest.strip_prefix(token);
        rest = found.unwrap_or(rest);
        found.is_some()
    };
    if !next(b"{") {
        return false;
    }
    if next(b"\"error\"") {
        // A chunk of an answer may carry `"error":null`.
        return next(b":") && !next(b"null");
    }
    next(b"\"type\"") && next(b":") && next(b"\"error\"")
}

#[cfg(test)]
mod tests {
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
            (include_bytes!("../../tests/data/vllm-0.32/chat_stream.body").as_slice(), 9),
            (include_bytes!("../../tests/data/vllm-0.32/responses_stream.body"), 23),
            (include_bytes!("../../tests/data/vllm-0.32/messages_stream.body"), 8),
        ] {
            let events = fed(stream);
            assert_eq!((events.first(), events.whole()), (Some(FirstContent::Event), whole));
            assert!(events.between_events());
        }
    }

    #[test]
    fn is_between_events_only_after_an_empty_line() {
        for (stream, between) in [
            ("", true),
            ("data: 1\n\n", true),
            ("data: 1\n", false),
            ("da", false),
            ("event: error\n", false),
        ] {
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
}
