//! Reads an upstream's answer chunk by chunk, while the answer streams to the client.
//!
//! Never: delay a byte, copy more of an answer than the beginning of a line, use a connection.

pub(crate) mod ending;
pub(crate) mod judge;
pub mod sse;
pub mod token_event;
pub mod usage;

/// The first content of an answer's body. Headers do not count: vLLM sends them before it reads the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstContent {
    /// The first byte of an answer other than a stream of events.
    Byte,
    /// The first event of a stream.
    Event,
    /// The first event of a stream, which reports an error.
    Error,
}

/// Whether an answer of this type is a stream of server-sent events.
pub(crate) fn is_event_stream(content_type: Option<&str>) -> bool {
    media_type(content_type).eq_ignore_ascii_case("text/event-stream")
}

/// The media type in a `content-type`, without its parameters.
fn media_type(content_type: Option<&str>) -> &str {
    content_type.and_then(|value| value.split(';').next()).unwrap_or_default().trim()
}
