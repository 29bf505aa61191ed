//! The state of one connection, and the commands of the server to all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The commands of the server to its connections; the numbers count commands, so that each is applied once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Control {
    pub listening: bool,
    pub close_idle: u64,
    pub close_all: u64,
}

/// The state of one connection.
#[derive(Debug, Default)]
pub(super) struct ConnectionState {
    /// The number of requests with an incomplete answer.
    busy: AtomicUsize,
    /// The number of requests so far.
    served: AtomicUsize,
    /// Whether the connection ends with a reset.
    reset: AtomicBool,
    /// Whether the connection has carried polls and nothing else.
    poller: AtomicBool,
}

/// The effect of one more request on what a connection is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectionUse {
    Same,
    /// The first request is a poll.
    BecamePoller,
    /// The first request that is no poll, behind polls.
    BecameUsed,
}

/// Marks a connection busy until dropped.
#[derive(Debug)]
pub(super) struct BusyGuard(Arc<ConnectionState>);

// === impl ConnectionState ===

impl ConnectionState {
    /// Marks the connection busy until the guard is dropped.
    pub(super) fn busy(self: &Arc<Self>) -> BusyGuard {
        self.busy.fetch_add(1, Ordering::SeqCst);
        self.served.fetch_add(1, Ordering::SeqCst);
        BusyGuard(Arc::clone(self))
    }

    pub(super) fn end_with_reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
    }

    /// Whether the connection ends with a reset.
    pub(super) fn ends_with_reset(&self) -> bool {
        self.reset.load(Ordering::SeqCst)
    }

    /// Records a request after `busy`.
    pub(super) fn carries(&self, poll: bool) -> ConnectionUse {
        if poll && self.served() == 1 {
            self.poller.store(true, Ordering::SeqCst);
            return ConnectionUse::BecamePoller;
        }
        match !poll && self.poller.swap(false, Ordering::SeqCst) {
            true => ConnectionUse::BecameUsed,
            false => ConnectionUse::Same,
        }
    }

    /// Whether the connection has carried polls and nothing else.
    pub(super) fn is_poller(&self) -> bool {
        self.poller.load(Ordering::SeqCst)
    }

    /// Whether no request is in progress.
    pub(super) fn is_idle(&self) -> bool {
        self.busy.load(Ordering::SeqCst) == 0
    }

    /// Returns the number of requests so far.
    pub(super) fn served(&self) -> usize {
        self.served.load(Ordering::SeqCst)
    }
}

impl BusyGuard {
    pub(super) fn connection(&self) -> &Arc<ConnectionState> {
        &self.0
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}
