//! One vLLM server: its settings, its address, and what is in flight on it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;

use super::tls::{self, Secure};
use crate::config::types::UpstreamConfig;

pub struct Upstream {
    /// Place in the configuration; stable for the life of the process.
    pub id: usize,
    pub config: UpstreamConfig,
    /// Whole `authorization` value sent in place of the client's.
    pub authorization: Option<String>,
    /// The authorities of `tls.ca`, read once.
    pub authorities: Vec<CertificateDer<'static>>,
    /// How our own questions talk to it, where its URL is https.
    pub(super) secure: Option<Secure>,
    /// Written by leases only.
    pub(super) gauges: Gauges,
    /// Where its name led when it was last asked; resolving is never on a request's path.
    address: ArcSwapOption<SocketAddr>,
    /// Wakes its prober ahead of time.
    pub(super) doubt: Notify,
}

/// What is in flight. Relaxed everywhere: each is a number of its own, read as a hint.
#[derive(Default)]
pub(super) struct Gauges {
    pub active: AtomicU64,
    pub backlog: AtomicU64,
    pub context: AtomicU64,
}

/// The gauges at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in flight.
    pub active: u64,
    /// Prompt tokens sent whose first byte has not come back.
    pub backlog: u64,
    /// Prompt tokens of the requests in flight.
    pub context: u64,
}

impl Upstream {
    /// Fails when what TLS towards it needs cannot be used.
    pub(super) fn new(id: usize, config: UpstreamConfig) -> Result<Self, String> {
        let say = |error: String| format!("upstream {}: {error}", config.name);
        let authorities = tls::authorities(&config).map_err(say)?;
        let secure = tls::secure(&config, &authorities).map_err(say)?;
        let authorization = config.api_key.as_ref().map(|key| format!("Bearer {}", key.expose()));
        Ok(Upstream {
            id,
            config,
            authorization,
            authorities,
            secure,
            gauges: Gauges::default(),
            address: ArcSwapOption::empty(),
            doubt: Notify::new(),
        })
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    pub fn load(&self) -> Load {
        Load {
            active: self.gauges.active.load(Ordering::Relaxed),
            backlog: self.gauges.backlog.load(Ordering::Relaxed),
            context: self.gauges.context.load(Ordering::Relaxed),
        }
    }

    /// The address that its name led to; `None` before the first answer of the resolver.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address.load().as_deref().copied()
    }

    pub(super) fn set_address(&self, address: SocketAddr) {
        if self.address() != Some(address) {
            self.address.store(Some(Arc::new(address)));
        }
    }

    /// A request could not reach it: ask it now rather than at the next interval.
    pub fn doubt(&self) {
        self.doubt.notify_one();
    }
}
