//! What all connections of a listener share.

use std::sync::Arc;

use crate::config::types::ConnectionLimits;
use crate::observe::Observer;
use crate::proxy::Balancer;

/// Serves the connections of a listener: the balancer and the limits of a connection.
pub(crate) struct ConnectionServer {
    pub balancer: Balancer,
    pub limits: ConnectionLimits,
}

/// The server that all listeners share.
pub(crate) type SharedServer = Arc<ConnectionServer>;

pub(crate) fn shared_server(balancer: Balancer, limits: ConnectionLimits) -> SharedServer {
    Arc::new(ConnectionServer { balancer, limits })
}

impl ConnectionServer {
    pub(crate) fn observer(&self) -> &Observer {
        &self.balancer.shared.observer
    }

    /// The limit of a request's head, as it is configured now.
    pub(crate) fn header_bytes(&self) -> u64 {
        self.balancer.shared.settings.load().header_bytes
    }
}
