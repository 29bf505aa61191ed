//! Limits of clients' connections.

use std::time::Duration;

/// How long a connection of a client may take over what is not a request under way. No setting: tests
/// shorten them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// From the connection's begin, or the end of an answer, to the first byte of the next request; on
    /// HTTP/2 the time without a stream.
    pub idle: Duration,
    /// From the first byte of a request's head to its last; on HTTP/2 the connection's preface.
    pub head: Duration,
    /// A TLS handshake.
    pub handshake: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        ConnectionLimits {
            idle: Duration::from_secs(60),
            head: Duration::from_secs(10),
            handshake: Duration::from_secs(10),
        }
    }
}
