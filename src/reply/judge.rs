//! Whether the beginning of an answer is one to give to the client, or a sign that another upstream
//! should be asked.
//!
//! vLLM says three things in answers that are about itself and not about the request: that it is shutting
//! down (500), that it has aborted the request without generating anything (200), and that the engine
//! failed after the head had gone out (an error as the first event). Each is known from a small beginning
//! of the body, and nothing larger is ever held.

use super::First;
use super::sse::Events;

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
    /// The first event is an error of the upstream's, with this code.
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
    Stream(Events),
    /// Small enough to be looked at whole.
    Small,
    /// Its first byte is enough.
    Plain,
}

impl Judge {
    pub fn new(status: u16, content_type: Option<&str>, length: Option<u64>) -> Self {
        let media = content_type.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
        let kind = match (status, media) {
            (500, _) => Kind::Error,
            (200, media) if media.eq_ignore_ascii_case("text/event-stream") => Kind::Stream(Events::new()),
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
        match &mut self.kind {
            Kind::Plain if piece.is_empty() && !end => return Verdict::Wait,
            Kind::Plain => return Verdict::Accept,
            Kind::Stream(events) => events.feed(piece),
            Kind::Error | Kind::Small => {}
        }
        let room = MOST - self.seen.len();
        self.seen.extend_from_slice(&piece[..piece.len().min(room)]);
        let full = self.seen.len() == MOST;
        match &self.kind {
            Kind::Error if has(&self.seen, SHUTTING_DOWN) => Verdict::Leaving,
            Kind::Small
                if (end || full) && aborted(&self.seen) && has(&self.seen, b"\"completion_tokens\":0") =>
            {
                Verdict::Aborted
            }
            Kind::Stream(events) => match events.first() {
                Some(First::Error) => failed(&self.seen),
                Some(_) if aborted(&self.seen) && !has(&self.seen, b"\"content\":\"") => Verdict::Aborted,
                Some(_) if aborted(&self.seen) && has(&self.seen, b"\"content\":\"\"") => Verdict::Aborted,
                Some(_) => Verdict::Accept,
                None if end || full => Verdict::Accept,
                None => Verdict::Wait,
            },
            _ if end || full => Verdict::Accept,
            _ => Verdict::Wait,
        }
    }
}

fn has(text: &[u8], what: &[u8]) -> bool {
    memchr::memmem::find(text, what).is_some()
}

fn aborted(text: &[u8]) -> bool {
    has(text, b"\"finish_reason\":\"abort\"")
}

/// An error event: the upstream's fault when its code says so, or when it has none.
fn failed(text: &[u8]) -> Verdict {
    if has(text, SHUTTING_DOWN) {
        return Verdict::Leaving;
    }
    let code = memchr::memmem::find(text, b"\"code\":").map(|at| &text[at + 7..]);
    let digits = code.map(|rest| {
        let rest = rest.trim_ascii_start();
        &rest[..rest.iter().take(3).take_while(|byte| byte.is_ascii_digit()).count()]
    });
    let code = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(500);
    if code >= 500 { Verdict::Failed(code) } else { Verdict::Accept }
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
            (404, "application/json", leaving, Verdict::Accept),
            (200, SSE, "data: {\"error\":{\"message\":\"dead\",\"code\":500}}\n\n", Verdict::Failed(500)),
            (200, SSE, "data: {\"error\":{\"message\":\"bad\",\"code\":400}}\n\n", Verdict::Accept),
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

    #[test]
    fn comments_and_cut_events_wait_and_nothing_large_is_held() {
        let mut judge = Judge::new(200, Some(SSE), None);
        assert_eq!(judge.feed(b": keep-alive\n\n", false), Verdict::Wait);
        assert_eq!(judge.feed(b"data: {\"x\"", false), Verdict::Wait);
        assert_eq!(judge.feed(b":1}\n", false), Verdict::Accept);

        let mut judge = Judge::new(500, Some("text/plain"), None);
        assert_eq!(judge.feed(&vec![b'x'; MOST - 1], false), Verdict::Wait);
        assert_eq!(judge.feed(b"xx", false), Verdict::Accept);
        assert!(judge.seen.capacity() <= 2 * MOST);

        let mut judge = Judge::new(200, Some("application/json"), Some(1 << 20));
        assert_eq!(judge.feed(b"", false), Verdict::Wait);
        assert_eq!(judge.feed(b"{", false), Verdict::Accept, "a large answer is not held");
    }
}
