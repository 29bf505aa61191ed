//! Events of the queue in which requests wait for an upstream with room.

use super::Observer;

/// The end of a request's wait in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueEnd {
    /// The request has a place on an upstream.
    Admitted,
    /// The client disconnected, or the request was rejected for another reason.
    Left,
    /// The deadline passed.
    WaitedOut,
}

impl Observer {
    /// Counts a request that begins to wait.
    pub fn queue_joined(&self) {
        self.metrics().requests.queued.inc();
    }

    /// Counts a request that stops waiting.
    pub fn queue_left(&self, end: QueueEnd) {
        let label = match end {
            QueueEnd::Admitted => "admitted",
            QueueEnd::Left => "left",
            QueueEnd::WaitedOut => "waited_out",
        };
        self.metrics().requests.queued.dec();
        self.metrics().requests.queue_ends.with_label_values(&[label]).inc();
    }

    /// Counts a request that finds the queue full.
    pub fn queue_full(&self) {
        self.metrics().requests.queue_ends.with_label_values(&["full"]).inc();
    }
}
