//! Counts the open connections of each simulated process.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::connection_state::{ConnectionState, Control};
use super::shared::EngineShared;

/// Counts a connection of the process that accepted it, until dropped.
pub(super) struct AcceptedConnection {
    pub shared: Arc<EngineShared>,
    /// The commands since the connection was accepted.
    pub control: watch::Receiver<Control>,
    /// The state of the commands when the connection was accepted.
    pub(super) accepted: Control,
    connection: Arc<ConnectionState>,
    _process: Arc<()>,
}

impl AcceptedConnection {
    pub(super) fn new(shared: Arc<EngineShared>, connection: Arc<ConnectionState>) -> Self {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        shared.used.fetch_add(1, Ordering::SeqCst);
        let control = shared.control.subscribe();
        let accepted = *control.borrow();
        let process = shared.process();
        Self { shared, control, accepted, connection, _process: process }
    }

    /// Waits until all connections of that time have to end.
    pub(super) async fn ends(&mut self) {
        let before = self.accepted.close_all;
        // An error means that the server is gone.
        let _ = self.control.wait_for(|now| now.close_all != before).await;
    }
}

impl Drop for AcceptedConnection {
    fn drop(&mut self) {
        self.shared.connections.fetch_sub(1, Ordering::SeqCst);
        if !self.connection.is_poller() {
            self.shared.used.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
