//! Events of the queue in which requests wait for room.

use super::Observer;

/// How a request's wait in the queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueEnd {
    /// The request has a place on an upstream.
    Admitted,
    /// The client disconnected, or the request was refused for another reason.
    Left,
    /// The deadline passed.
    WaitedOut,
}

impl Observer {
    /// A request begins to wait.
    pub fn queue_joined(&self) {
        self.metrics().queued.inc();
    }

    /// A request has stopped waiting.
    pub fn queue_left(&self, end: QueueEnd) {
        let label = match end {
            QueueEnd::Admitted => "admitted",
            QueueEnd::Left => "left",
            QueueEnd::WaitedOut => "waited_out",
        };
        self.metrics().queued.dec();
        self.metrics().queue_ends.with_label_values(&[label]).inc();
    }

    /// A request could not wait: the queue is full.
    pub fn queue_full(&self) {
        self.metrics().queue_ends.with_label_values(&["full"]).inc();
    }
}
