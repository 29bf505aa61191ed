//! Events of listeners and clients' connections.

use log::{debug, info, warn};

use super::{GaugeGuard, Observer};

impl Observer {
    /// Counts a client's connection as open until the guard is dropped.
    pub fn connection_open(&self) -> GaugeGuard {
        GaugeGuard::new(&self.metrics().connections)
    }

    /// Records that a listener failed to accept a connection.
    pub fn accept_failed(&self, address: &str, error: &str) {
        self.metrics().accept_failures.inc();
        warn!(address = address, error = error; "cannot accept a connection");
    }

    /// Counts a failed handshake. Logged at debug level: the client causes it, and port scans are frequent.
    pub fn handshake_failed(&self, error: &str) {
        self.metrics().handshake_failures.inc();
        debug!(error = error; "tls handshake failed");
    }

    /// Counts a client that was rejected before its request head was complete.
    pub fn head_refused(&self, reason: &'static str) {
        self.rejected(reason);
        debug!(reason = reason; "request head refused");
    }

    /// Records an HTTP/2 connection that was closed because its client exceeded a limit.
    pub fn connection_ended(&self, reason: &'static str) {
        self.rejected(reason);
        info!(reason = reason; "connection ended because of its client");
    }
}
