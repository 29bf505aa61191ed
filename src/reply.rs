//! What an upstream's answer says while it passes by, chunk by chunk.
//!
//! Never: hold a byte back, copy more of an answer than the beginning of a line, know of connections.

pub mod sse;

use self::sse::Events;

/// What came first in an answer's body. Headers alone say nothing: vLLM sends them before the prompt is
/// read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// The first byte of an answer that is no stream of events.
    Byte,
    /// The first event of a stream.
    Event,
    /// The first event of a stream, and it tells of an error.
    Error,
}

/// Watches one answer.
#[derive(Clone, Debug)]
pub enum Reply {
    Events(Events),
    Body { begun: bool },
}

impl Reply {
    /// `content_type` is the answer's header, if it has one.
    pub fn new(content_type: Option<&str>) -> Self {
        let kind = content_type.and_then(|value| value.split(';').next()).unwrap_or_default();
        if kind.trim().eq_ignore_ascii_case("text/event-stream") {
            Reply::Events(Events::new())
        } else {
            Reply::Body { begun: false }
        }
    }

    /// Takes note of the next chunk of the body.
    pub fn feed(&mut self, chunk: &[u8]) {
        match self {
            Reply::Events(events) => events.feed(chunk),
            Reply::Body { begun } => *begun |= !chunk.is_empty(),
        }
    }

    /// What came first, as soon as it is there.
    pub fn first(&self) -> Option<First> {
        match self {
            Reply::Events(events) => events.first(),
            Reply::Body { begun } => begun.then_some(First::Byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_content_type_says_what_comes_first() {
        for (content_type, event) in [
            (Some("text/event-stream; charset=utf-8"), true),
            (Some("Text/Event-Stream"), true),
            (Some("application/json"), false),
            (Some("text/event-streams"), false),
            (None, false),
        ] {
            let mut reply = Reply::new(content_type);
            reply.feed(b"");
            assert_eq!(reply.first(), None);
            reply.feed(b"data: 1\n");
            assert_eq!(reply.first(), Some(if event { First::Event } else { First::Byte }));
        }
    }
}
