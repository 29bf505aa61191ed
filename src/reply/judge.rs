//! Decides by the beginning of an answer whether to forward it to the client or to retry on another upstream.
//!
//! Four answers of vLLM are about the server and not about the request: the server is shutting down (500);
//! its engine has died (500, or an error as the first event); the server aborted the request without
//! generating anything (200); the engine failed after the head was sent (an error as the first event). A
//! small beginning of the body shows each of them, and nothing larger is ever held. A stream that ends before
//! its first event, and JSON without a byte, are no answers at all, however properly they end.
//!
//! A stream's prelude decides nothing: vLLM sends `response.created` before it reads the prompt, and a
//! chat's role or a `message_start` right before the first token, or before it gives up. The events of a
//! prelude wait for the event after them.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use super::sse::is_error;
use super::{is_event_stream, media_type};
use crate::sse::{LineSplitter, SseField, SsePiece, count_work};

/// The longest beginning of a body that is examined.
const MAX_SEEN_BYTES: usize = 64 << 10;

/// The largest answer, other than a stream, to a request that was aborted without a token.
const MAX_ABORTED_BYTES: u64 = 8 << 10;

/// The text of vLLM's answer to new requests during its shutdown.
const SHUTTING_DOWN: &[u8] = b"cannot schedule new futures after shutdown";

/// The message of vLLM's `EngineDeadError`, as a whole JSON string. Quoted in another text, its quotes would
/// be escaped.
const ENGINE_DEAD: &[u8] =
    b"\"EngineCore encountered an issue. See stack trace (above) for the root cause.\"";

/// The verdict on the beginning of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AnswerVerdict {
    /// Too little of the answer has arrived.
    Wait,
    /// The answer goes to the client.
    Accept,
    /// The upstream is shutting down.
    Leaving,
    /// The request was aborted without a token: the upstream is shutting down, too.
    Aborted,
    /// The upstream's engine has died, by an answer of status 500 or the first event of a stream. Every
    /// other request gets the same answer until the upstream's process has restarted.
    EngineDead,
    /// The answer has ended before anything of it came.
    Nothing,
    /// The first event is an error with this code: below 500 the request is the cause.
    Failed(u16),
}

/// Examines one answer until it has a verdict.
#[derive(Debug)]
pub(crate) struct AnswerJudge {
    kind: JudgedAnswer,
    /// The number of bytes of the body that were examined.
    seen_bytes: usize,
}

#[derive(Debug)]
enum JudgedAnswer {
    /// A server error: its whole text is examined.
    Error(Vec<u8>),
    Stream {
        lines: LineSplitter,
        name: EventName,
    },
    /// An answer that is small enough to be examined as a whole.
    Small(Vec<u8>),
    /// JSON of a declared length of 0.
    Empty,
    /// An answer whose first byte suffices.
    Plain,
}

/// The names of events, grouped by their meaning for the verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum EventName {
    #[default]
    None,
    Error,
    /// An event from before the engine has read the prompt, or without a part of the answer.
    Prelude,
    MessageDelta,
    ResponseCompleted,
    Other,
}

impl AnswerJudge {
    pub(crate) fn new(status: u16, content_type: Option<&str>, length: Option<u64>) -> Self {
        let media = media_type(content_type);
        let kind = match (status, media) {
            (500, _) => JudgedAnswer::Error(Vec::new()),
            (200, _) if is_event_stream(content_type) => {
                JudgedAnswer::Stream { lines: LineSplitter::new(MAX_SEEN_BYTES), name: EventName::None }
            }
            (200, media) if media.eq_ignore_ascii_case("application/json") && length == Some(0) => {
                JudgedAnswer::Empty
            }
            (200, media)
                if media.eq_ignore_ascii_case("application/json")
                    && length.is_some_and(|length| length <= MAX_ABORTED_BYTES) =>
            {
                JudgedAnswer::Small(Vec::new())
            }
            _ => JudgedAnswer::Plain,
        };
        AnswerJudge { kind, seen_bytes: 0 }
    }

    /// Examines the next piece of the body; `end`: it is the last.
    pub(crate) fn feed(&mut self, piece: &[u8], end: bool) -> AnswerVerdict {
        let room = MAX_SEEN_BYTES - self.seen_bytes;
        let new = &piece[..piece.len().min(room)];
        self.seen_bytes += new.len();
        let is_over = end || self.seen_bytes == MAX_SEEN_BYTES;
        let verdict = match &mut self.kind {
            JudgedAnswer::Plain if piece.is_empty() && !end => None,
            JudgedAnswer::Plain => Some(AnswerVerdict::Accept),
            JudgedAnswer::Error(text) => server_error(text, new),
            JudgedAnswer::Small(text) => {
                text.extend_from_slice(new);
                (is_over && is_aborted(text)).then_some(AnswerVerdict::Aborted)
            }
            JudgedAnswer::Empty => end.then_some(AnswerVerdict::Nothing),
            JudgedAnswer::Stream { lines, name } => {
                let cut = end && self.seen_bytes < MAX_SEEN_BYTES;
                stream(lines, name, new).or(cut.then_some(AnswerVerdict::Nothing))
            }
        };
        verdict.unwrap_or(if is_over { AnswerVerdict::Accept } else { AnswerVerdict::Wait })
    }
}

impl EventName {
    fn of(name: &[u8]) -> Self {
        match name {
            b"" => EventName::None,
            b"error" => EventName::Error,
            b"response.created"
            | b"response.queued"
            | b"response.in_progress"
            | b"message_start"
            | b"ping" => EventName::Prelude,
            b"message_delta" => EventName::MessageDelta,
            b"response.completed" => EventName::ResponseCompleted,
            _ => EventName::Other,
        }
    }
}

/// The verdict on the text of a 500, after appending `new`.
fn server_error(text: &mut Vec<u8>, new: &[u8]) -> Option<AnswerVerdict> {
    let old = text.len();
    text.extend_from_slice(new);
    // Only a prefix of the words may stand in the part that was searched before.
    let not_seen = |words: &[u8]| old.saturating_sub(words.len() - 1);
    if has(&text[not_seen(SHUTTING_DOWN)..], SHUTTING_DOWN) {
        return Some(AnswerVerdict::Leaving);
    }
    let start = not_seen(ENGINE_DEAD);
    is_engine_dead(text, start).then_some(AnswerVerdict::EngineDead)
}

/// The verdict of the first event after the prelude, once the next piece contains it.
fn stream(lines: &mut LineSplitter, name: &mut EventName, piece: &[u8]) -> Option<AnswerVerdict> {
    let mut rest = piece;
    while let Some(piece) = lines.next(&mut rest) {
        // A line beyond the cap is not examined.
        let SsePiece::Line(line) = piece else { continue };
        match line.field() {
            SseField::Empty => *name = EventName::None,
            SseField::Event(value) => *name = EventName::of(value),
            SseField::Data(data) => {
                let verdict = event(*name, data);
                if verdict.is_some() {
                    return verdict;
                }
            }
            SseField::Comment | SseField::Other => {}
        }
    }
    None
}

/// The verdict of an event; `None` for an event of the prelude.
fn event(name: EventName, data: &[u8]) -> Option<AnswerVerdict> {
    let role = || has(data, b"\"role\":\"assistant\"") && has(data, b"\"content\":\"\"");
    match name {
        EventName::Error => Some(failed(data)),
        _ if is_error(data) => Some(failed(data)),
        EventName::Prelude => None,
        EventName::None if role() && has(data, b"\"finish_reason\":null") => None,
        EventName::MessageDelta if has(data, b"\"stop_reason\":null") => Some(AnswerVerdict::Aborted),
        EventName::None if has(data, ABORT_REASON) && !has_text(data) => Some(AnswerVerdict::Aborted),
        EventName::ResponseCompleted if is_aborted(data) => Some(AnswerVerdict::Aborted),
        _ => Some(AnswerVerdict::Accept),
    }
}

const ABORT_REASON: &[u8] = b"\"finish_reason\":\"abort\"";

/// Every small answer is searched for these: preparing a search costs more than searching a short text.
static NO_COMPLETION: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("\"completion_tokens\":0"));
static NO_OUTPUT: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("\"output_tokens\":0"));

/// Whether a whole answer was aborted before its first token.
fn is_aborted(text: &[u8]) -> bool {
    count_work(2 * text.len());
    if NO_COMPLETION.find(text).is_some() {
        return has(text, ABORT_REASON);
    }
    // Anthropic's interface has no name for this reason, and the answer omits it.
    let message = || text.starts_with(b"{") && has(text, b"\"type\":\"message\"");
    let unfinished =
        || message() && !has(text, b"\"stop_reason\":\"") && !has(text, b"\"object\":\"response\"");
    NO_OUTPUT.find(text).is_some() && (has(text, b"\"status\":\"cancelled\"") || unfinished())
}

fn has(text: &[u8], what: &[u8]) -> bool {
    count_work(text.len());
    memchr::memmem::find(text, what).is_some()
}

/// Whether a chunk of a chat or a completion holds any text.
fn has_text(data: &[u8]) -> bool {
    let holds =
        |key: &[u8]| memchr::memmem::find_iter(data, key).any(|at| data.get(at + key.len()) != Some(&b'"'));
    holds(b"\"content\":\"") || holds(b"\"text\":\"")
}

/// The verdict of an error event: the upstream is the cause unless the code is below 500.
fn failed(text: &[u8]) -> AnswerVerdict {
    let code = memchr::memmem::find(text, b"\"code\":").map(|at| &text[at + 7..]);
    let digits = code.map(|rest| {
        let rest = rest.trim_ascii_start();
        &rest[..rest.iter().take(3).take_while(|byte| byte.is_ascii_digit()).count()]
    });
    let code = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(500);
    // An error of the request may quote the client's own words.
    match code {
        500.. if has(text, SHUTTING_DOWN) => AnswerVerdict::Leaving,
        500.. if is_engine_dead(text, 0) => AnswerVerdict::EngineDead,
        _ => AnswerVerdict::Failed(code),
    }
}

/// Whether the message after `start` is that of an engine that has died.
fn is_engine_dead(text: &[u8], start: usize) -> bool {
    count_work(text.len() - start);
    memchr::memmem::find_iter(&text[start..], ENGINE_DEAD).any(|at| {
        let before = text[..start + at].trim_ascii_end();
        let key = before.strip_suffix(b":").map(<[u8]>::trim_ascii_end);
        key.is_some_and(|key| key.ends_with(b"\"message\""))
    })
}

#[cfg(test)]
mod tests;
