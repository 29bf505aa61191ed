//! What an upstream's answer says while it passes by, chunk by chunk.
//!
//! Never: hold a byte back, copy more of an answer than the beginning of a line, know of connections.

pub mod ending;
pub mod judge;
pub mod sse;
pub mod usage;

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

/// The type that a `content-type` names, without its parameters.
fn media_type(content_type: Option<&str>) -> &str {
    content_type.and_then(|value| value.split(';').next()).unwrap_or_default().trim()
}
