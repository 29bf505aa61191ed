//! Limits of connections, bodies and the queue.

use std::time::Duration;

use crate::config::setting::{SettingRow, SettingsTable, duration, integer, row, size, value};
use crate::config::values::{GIB, HOUR, KIB, MIB, TIB, show_size};

/// Limits of the connections of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLimits {
    /// The most client connections at once; 0 is no limit.
    pub connections: usize,
    /// The largest request head; a larger one gets 431.
    pub header_bytes: u64,
    pub connection: ConnectionLimits,
}

impl Default for ClientLimits {
    fn default() -> Self {
        ClientLimits { connections: 0, header_bytes: 64 << 10, connection: ConnectionLimits::default() }
    }
}

/// Time limits of a client connection outside of a request. The file cannot set them; tests shorten them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// From the start of the connection, or the end of an answer, to the first byte of the next request; on
    /// HTTP/2 the time without a stream.
    pub idle: Duration,
    /// From the first byte of a request's head to its last; on HTTP/2 for the connection preface.
    pub head: Duration,
    /// For a TLS handshake.
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

/// How much of a request's body is read, and held, before an upstream is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// The part of a body that is read before an upstream is chosen.
    pub bytes: u64,
    /// The largest body; a larger one gets 413.
    pub max_body: u64,
    /// The most memory for held bodies of all requests together.
    pub memory: u64,
}

impl Default for Peek {
    fn default() -> Self {
        Peek { bytes: 2 << 20, max_body: 64 << 20, memory: 2 << 30 }
    }
}

/// The queue of requests whose candidates are all full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// The most requests that wait, of all models together; 0 is no queue.
    pub size: usize,
    /// The longest time that a request waits.
    pub wait: Duration,
}

impl Default for QueueConfig {
    fn default() -> Self {
        QueueConfig { size: 1024, wait: Duration::from_secs(30) }
    }
}

// === impl ClientLimits ===

impl SettingsTable for ClientLimits {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "connections",
            "Client connections at once, idle ones included; further ones wait. 0 is no limit.",
            &value(|limits: &mut Self| &mut limits.connections, integer(0, 10_000_000)),
        ),
        row(
            "header_bytes",
            "Largest head of a request; a larger one is answered with 431.",
            &value(|limits: &mut Self| &mut limits.header_bytes, size(KIB, MIB)),
        ),
    ];

    fn defaults() -> Self {
        ClientLimits::default()
    }
}

// === impl Peek ===

impl SettingsTable for Peek {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "bytes",
            "Part of a body that is read before an upstream is chosen.",
            &value(|peek: &mut Self| &mut peek.bytes, size(KIB, 64 * GIB)),
        ),
        row(
            "max_body",
            "Largest body; a larger one is answered with 413.",
            &value(|peek: &mut Self| &mut peek.max_body, size(KIB, 64 * GIB)),
        ),
        row(
            "memory",
            "Memory for the held bodies of all requests together, and for answers that a route holds whole.",
            &value(|peek: &mut Self| &mut peek.memory, size(KIB, TIB)),
        ),
    ];

    fn defaults() -> Self {
        Peek::default()
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        let order = [
            ("bytes", self.bytes, "max_body", self.max_body),
            ("max_body", self.max_body, "memory", self.memory),
        ];
        for (smaller, small, larger, large) in order {
            if small > large {
                let (small, large) = (show_size(small), show_size(large));
                report(smaller, format!("{small} is more than peek.{larger}, which is {large}"));
            }
        }
    }
}

// === impl QueueConfig ===

impl SettingsTable for QueueConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "size",
            "Requests that may wait at once; further ones are answered with 429. 0 is no queue.",
            &value(|queue: &mut Self| &mut queue.size, integer(0, 1_000_000)),
        ),
        row(
            "wait",
            "Time after which a waiting request is answered with 429.",
            &value(|queue: &mut Self| &mut queue.wait, duration(Duration::ZERO, HOUR)),
        ),
    ];

    fn defaults() -> Self {
        QueueConfig::default()
    }
}
