//! Whether the beginning of an answer is one to give to the client, or a sign that another upstream
//! should be asked.
//!
//! vLLM says three things in answers that are about itself and not about the request: that it is shutting
//! down (500), that it has aborted the request without generating anything (200), and that the engine
//! failed after the head had gone out (an error as the first event). Each is known from a small beginning
//! of the body, and nothing larger is ever held.
//!
//! A stream's prelude says nothing yet: vLLM sends `response.created` before the prompt is read, and a
//! chat's role or a `message_start` right before the first token, or before it gives up. The events of a
//! prelude wait for the one behind them.

use super::media_type;
use super::sse::{is_error, value_of};

/// The most of a body that is looked at.
const MOST: usize = 64 << 10;

/// An answer that is no stream and aborted at once is smaller than this.
const SMALL: u64 = 8 << 10;

/// What vLLM answers to new requests while it shuts down.
const SHUTTING_DOWN: &[u8] = b"cannot schedule new futures after shutdown";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not enough has come to tell.
    Wait,
    /// The client's.
    Accept,
    /// The upstream is shutting down.
    Leaving,
    /// Aborted without a token: the upstream is shutting down too.
    Aborted,
    /// The first event is an error, with this code: below 500 it is of the request.
    Failed(u16),
}

/// Looks at one answer until it has a verdict.
#[derive(Debug)]
pub struct Judge {
    kind: Kind,
    seen: Vec<u8>,
}

#[derive(Debug)]
enum Kind {
    /// A server error, whose whole text is needed.
    Error,
    Stream(Lines),
    /// Small enough to be looked at whole.
    Small,
    /// Its first byte is enough.
    Plain,
}

/// Where the look at the lines of a stream's beginning stands.
#[derive(Debug, Default)]
struct Lines {
    /// The first line that has not come whole.
    next: usize,
    /// The name of the present event.
    name: std::ops::Range<usize>,
}

impl Judge {
    pub fn new(status: u16, content_type: Option<&str>, length: Option<u64>) -> Self {
        let media = media_type(content_type);
        let kind = match (status, media) {
            (500, _) => Kind::Error,
            (200, media) if media.eq_ignore_ascii_case("text/event-stream") => Kind::Stream(Lines::default()),
            (200, media)
                if media.eq_ignore_ascii_case("application/json") && length.is_some_and(|l| l <= SMALL) =>
            {
                Kind::Small
            }
            _ => Kind::Plain,
        };
        Judge { kind, seen: Vec::new() }
    }

    /// Takes the next piece of the body; `end`: it is the last.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Verdict {
        match self.kind {
            Kind::Plain if piece.is_empty() && !end => return Verdict::Wait,
            Kind::Plain => return Verdict::Accept,
            Kind::Error | Kind::Small | Kind::Stream(_) => {}
        }
        let room = MOST - self.seen.len();
        self.seen.extend_from_slice(&piece[..piece.len().min(room)]);
        let over = end || self.seen.len() == MOST;
        match &mut self.kind {
            Kind::Error if has(&self.seen, SHUTTING_DOWN) => Verdict::Leaving,
            Kind::Small if over && gave_up(&self.seen) => Verdict::Aborted,
            Kind::Stream(lines) => match lines.look(&self.seen) {
                Some(verdict) => verdict,
                None if over => Verdict::Accept,
                None => Verdict::Wait,
            },
            _ if over => Verdict::Accept,
            _ => Verdict::Wait,
        }
    }
}

impl Lines {
    /// Looks at what has come whole since the last look: the verdict of the first event that says something.
    fn look(&mut self, seen: &[u8]) -> Option<Verdict> {
        while let Some(length) = memchr::memchr2(b'\n', b'\r', &seen[self.next..]) {
            let (start, end) = (self.next, self.next + length);
            self.next = end + 1;
            let line = &seen[start..end];
            // A mark of the byte order may stand before the first.
            let line = if start == 0 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
            if line.is_empty() {
                // The second half of a line's end is no line.
                let half = seen[end] == b'\n' && seen[..start].last() == Some(&b'\r');
                self.name = if half { self.name.clone() } else { 0..0 };
            } else if let Some(name) = value_of(line, b"event") {
                self.name = end - name.len()..end;
            } else if let Some(data) = value_of(line, b"data") {
                let verdict = event(&seen[self.name.clone()], data);
                if verdict.is_some() {
                    return verdict;
                }
            }
        }
        None
    }
}

/// What an event says; `None` for one of the prelude.
fn event(name: &[u8], data: &[u8]) -> Option<Verdict> {
    let role = || has(data, b"\"role\":\"assistant\"") && has(data, b"\"content\":\"\"");
    match name {
        b"error" => Some(failed(data)),
        _ if is_error(data) => Some(failed(data)),
        b"response.created" | b"response.queued" | b"response.in_progress" | b"message_start" | b"ping" => {
            None
        }
        b"" if role() && has(data, b"\"finish_reason\":null") => None,
        b"message_delta" if has(data, b"\"stop_reason\":null") => Some(Verdict::Aborted),
        b"" if has(data, ABORT) && !has_text(data) => Some(Verdict::Aborted),
        b"response.completed" if gave_up(data) => Some(Verdict::Aborted),
        _ => Some(Verdict::Accept),
    }
}

const ABORT: &[u8] = b"\"finish_reason\":\"abort\"";

/// Whether a whole answer is one that was aborted before its first token.
fn gave_up(text: &[u8]) -> bool {
    if has(text, b"\"completion_tokens\":0") {
        return has(text, ABORT);
    }
    // Anthropic's interface has no word for it, and leaves the reason out.
    let message = || text.starts_with(b"{") && has(text, b"\"type\":\"message\"");
    let unfinished =
        || message() && !has(text, b"\"stop_reason\":\"") && !has(text, b"\"object\":\"response\"");
    has(text, b"\"output_tokens\":0") && (has(text, b"\"status\":\"cancelled\"") || unfinished())
}

fn has(text: &[u8], what: &[u8]) -> bool {
    memchr::memmem::find(text, what).is_some()
}

/// Whether a chunk of a chat or a completion holds any text.
fn has_text(data: &[u8]) -> bool {
    let holds =
        |key: &[u8]| memchr::memmem::find_iter(data, key).any(|at| data.get(at + key.len()) != Some(&b'"'));
    holds(b"\"content\":\"") || holds(b"\"text\":\"")
}

/// An error event: the upstream's fault unless its code says something else.
fn failed(text: &[u8]) -> Verdict {
    let code = memchr::memmem::find(text, b"\"code\":").map(|at| &text[at + 7..]);
    let digits = code.map(|rest| {
        let rest = rest.trim_ascii_start();
        &rest[..rest.iter().take(3).take_while(|byte| byte.is_ascii_digit()).count()]
    });
    let code = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(500);
    // The words may be a client's own, said back to it in an error of its request.
    if code >= 500 && has(text, SHUTTING_DOWN) { Verdict::Leaving } else { Verdict::Failed(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(status: u16, kind: &str, body: &str) -> Verdict {
        let mut judge = Judge::new(status, Some(kind), Some(body.len() as u64));
        judge.feed(body.as_bytes(), true)
    }

    const SSE: &str = "text/event-stream; charset=utf-8";

    #[test]
    fn an_answer_about_the_upstream_is_told_from_one_to_the_client() {
        let leaving = r#"{"error":{"message":"cannot schedule new futures after shutdown","code":500}}"#;
        let aborted = r#"{"choices":[{"finish_reason":"abort"}],"usage":{"completion_tokens":0}}"#;
        let partial = r#"{"choices":[{"finish_reason":"abort"}],"usage":{"completion_tokens":4}}"#;
        for (status, kind, body, verdict) in [
            (500, "application/json", leaving, Verdict::Leaving),
            (500, "application/json", r#"{"error":{"message":"other"}}"#, Verdict::Accept),
            (200, "application/json", aborted, Verdict::Aborted),
            (200, "application/json", partial, Verdict::Accept),
            (
                200,
                "application/json",
                r#"{"status":"cancelled","usage":{"output_tokens":0}}"#,
                Verdict::Aborted,
            ),
            (
                200,
                "application/json",
                r#"{"status":"cancelled","usage":{"output_tokens":9}}"#,
                Verdict::Accept,
            ),
            (200, "application/json", r#"{"type":"message","usage":{"output_tokens":0}}"#, Verdict::Aborted),
            (200, "application/json", r#"{"type":"message","usage":{"output_tokens":3}}"#, Verdict::Accept),
            (404, "application/json", leaving, Verdict::Accept),
            (200, SSE, "data: {\"error\":{\"message\":\"dead\",\"code\":500}}\n\n", Verdict::Failed(500)),
            (200, SSE, "data: {\"error\":{\"message\":\"bad\",\"code\":400}}\n\n", Verdict::Failed(400)),
            (200, SSE, "data: {\"error\":{\"message\":\"no code\"}}\n\n", Verdict::Failed(500)),
            (200, SSE, "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n", Verdict::Accept),
            (
                200,
                SSE,
                "data: {\"choices\":[{\"delta\":{\"content\":\"\"},\"finish_reason\":\"abort\"}]}\n\n",
                Verdict::Aborted,
            ),
            (200, SSE, "", Verdict::Accept),
        ] {
            assert_eq!(whole(status, kind, body), verdict, "{status} {body}");
        }
    }

    const ROLE: &str = r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
    const STARTS: &str = r#"{"type":"message_start","message":{"stop_reason":null}}"#;

    fn events(events: &[(&str, &str)]) -> String {
        let event = |(name, data): &(&str, &str)| match *name {
            "" => format!("data: {data}\n\n"),
            name => format!("event: {name}\ndata: {data}\n\n"),
        };
        events.iter().map(event).collect()
    }

    #[test]
    fn the_prelude_of_a_stream_waits_for_what_follows() {
        let text = r#"{"choices":[{"delta":{"content":"a"},"finish_reason":null}]}"#;
        let abort = r#"{"choices":[{"delta":{"content":""},"finish_reason":"abort"}]}"#;
        let empty = r#"{"choices":[{"text":"","finish_reason":"abort"}]}"#;
        let late = r#"{"choices":[{"text":"a","finish_reason":"abort"}]}"#;
        let gave_up = r#"{"delta":{"stop_reason":null},"usage":{"output_tokens":0}}"#;
        let ended = r#"{"delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":0}}"#;
        let cancelled = r#"{"response":{"status":"cancelled","usage":{"output_tokens":0,"x":{}}}}"#;
        let dead = r#"{"error":{"message":"EngineCore encountered an issue","code":500}}"#;
        for (prelude, last, verdict) in [
            (&[("", ROLE), ("", ROLE)][..], ("", text), Verdict::Accept),
            (&[("", ROLE)], ("", abort), Verdict::Aborted),
            (&[("", ROLE)], ("", dead), Verdict::Failed(500)),
            (&[], ("", empty), Verdict::Aborted),
            (&[], ("", late), Verdict::Accept),
            (&[("message_start", STARTS)], ("content_block_start", "{}"), Verdict::Accept),
            (&[("message_start", STARTS), ("ping", "{}")], ("message_delta", gave_up), Verdict::Aborted),
            (&[("message_start", STARTS)], ("message_delta", ended), Verdict::Accept),
            (&[("message_start", STARTS)], ("error", "{}"), Verdict::Failed(500)),
            (&[("response.created", "{}"), ("response.in_progress", "{}")], ("x", "{}"), Verdict::Accept),
            (&[("response.created", "{}")], ("response.completed", cancelled), Verdict::Aborted),
            (&[("response.created", "{}")], ("response.completed", "{}"), Verdict::Accept),
            (&[("response.created", "{}")], ("", dead), Verdict::Failed(500)),
        ] {
            for line_end in ["\n", "\r\n", "\r"] {
                let mut judge = Judge::new(200, Some(SSE), None);
                for byte in events(prelude).replace('\n', line_end).as_bytes() {
                    assert_eq!(judge.feed(&[*byte], false), Verdict::Wait, "{prelude:?}");
                }
                let last = events(&[last]).replace('\n', line_end);
                assert_eq!(judge.feed(last.as_bytes(), false), verdict, "{prelude:?} {last}");
            }
        }
    }

    #[test]
    fn comments_and_cut_events_wait_and_nothing_large_is_held() {
        let mut judge = Judge::new(200, Some(SSE), None);
        assert_eq!(judge.feed(b": keep-alive\n\n", false), Verdict::Wait);
        assert_eq!(judge.feed(b"data: {\"x\"", false), Verdict::Wait);
        assert_eq!(judge.feed(b":1}\n", false), Verdict::Accept);

        // What begins an answer may be as long as the request that it repeats.
        let mut judge = Judge::new(200, Some(SSE), None);
        let long = format!("event: response.created\ndata: {}\n\n", "x".repeat(MOST));
        assert_eq!(judge.feed(long.as_bytes(), false), Verdict::Accept);

        let mut judge = Judge::new(500, Some("text/plain"), None);
        assert_eq!(judge.feed(&vec![b'x'; MOST - 1], false), Verdict::Wait);
        assert_eq!(judge.feed(b"xx", false), Verdict::Accept);
        assert!(judge.seen.capacity() <= 2 * MOST);

        let mut judge = Judge::new(200, Some("application/json"), Some(1 << 20));
        assert_eq!(judge.feed(b"", false), Verdict::Wait);
        assert_eq!(judge.feed(b"{", false), Verdict::Accept, "a large answer is not held");
    }
}
