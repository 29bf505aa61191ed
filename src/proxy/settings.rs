//! The settings of requests. A request loads them once and keeps them until its end, also over a reload.

use std::sync::Arc;
use std::time::Duration;

use pingora::protocols::l4::socket::SocketAddr;

use super::fleet_routes::FleetRoutes;
use super::memory::PeekMemory;
use crate::config::types::{Balance, Config, Peek, Retry, SloRule, Timeouts, TrustedProxies};
use crate::fleet::Fleet;
use crate::prompt::chain::BlockLayout;
use crate::prompt::session::SessionPlaces;
use crate::route::api_paths;

/// What a request needs of the configuration, loaded once at its beginning.
pub(super) struct ProxySettings {
    pub table: api_paths::PathTable,
    pub knobs: Balance,
    pub slo: SloRule,
    pub peeker: Peeker,
    pub timeouts: Timeouts,
    pub retry: Retry,
    /// How long a request waits while all its upstreams are full.
    pub wait: Duration,
    pub header_bytes: u64,
    pub expose: bool,
    pub trusted_proxies: TrustedProxies,
    /// Bytes of bodies that are logged.
    pub sample: Option<usize>,
    /// The share of new traces that is sampled; `None` while no spans are exported.
    pub span_share: Option<f64>,
    /// Whether the record of each request is logged at Info.
    pub logs_requests: bool,
}

/// The settings of what is read of a request before an upstream is chosen.
pub(super) struct Peeker {
    pub limits: Peek,
    pub memory: Arc<PeekMemory>,
    /// How prompts are cut; none are read where it does not matter what an upstream holds.
    pub blocks: Option<BlockLayout>,
    /// Where requests name their session.
    pub sessions: SessionPlaces,
    /// See `SessionConfig::bonus`.
    pub session_bonus: f64,
    pub routes: FleetRoutes,
}

impl ProxySettings {
    /// Whether a client's `x-forwarded-…` fields are trusted.
    pub(super) fn trusts(&self, address: Option<&SocketAddr>) -> bool {
        match address {
            Some(SocketAddr::Inet(address)) => self.trusted_proxies.contains(address.ip()),
            Some(SocketAddr::Unix(_)) | None => self.trusted_proxies.contains_unix(),
        }
    }

    /// `memory` is what all requests share, also those that began with other settings. `blocks`: how prompts
    /// are cut, where they are remembered.
    pub(super) fn new(
        config: &Config,
        fleet: Arc<Fleet>,
        memory: Arc<PeekMemory>,
        blocks: Option<BlockLayout>,
    ) -> Arc<Self> {
        Arc::new(ProxySettings {
            table: api_paths::PathTable::new(&config.passthrough),
            knobs: config.balance,
            slo: config.slo,
            // Without a cost for missing tokens, prompts need not be read.
            peeker: Peeker {
                limits: config.peek,
                memory,
                blocks: blocks.filter(|_| config.balance.missing > 0.0),
                sessions: SessionPlaces::new(&config.sessions),
                session_bonus: config.sessions.bonus,
                routes: FleetRoutes::new(&config.routes, fleet),
            },
            timeouts: config.timeouts,
            retry: config.retry,
            wait: config.queue.wait,
            header_bytes: config.limits.header_bytes,
            expose: config.expose,
            trusted_proxies: config.trusted_proxies.clone(),
            sample: config.log.bodies.then_some(config.log.truncate),
            span_share: config.otlp.endpoint.as_ref().map(|_| config.otlp.sample),
            logs_requests: config.log.requests,
        })
    }
}
