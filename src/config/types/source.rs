//! Discovery sources: where upstreams are found, and the settings that discovered upstreams get.

use std::time::Duration;

use super::upstream_tls::UpstreamTls;
use crate::config::url::UpstreamUrl;

/// The interval between two polls, unless the file says another.
pub(super) const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);

/// A server that is polled for the list of upstreams.
#[derive(Clone, Debug, PartialEq)]
pub struct DiscoverySource {
    pub ask: DiscoveryMethod,
    /// The interval between two polls, once the source has answered.
    pub every: Duration,
    /// The weight of each upstream of the source.
    pub weight: f64,
    pub max_active: Option<u32>,
    /// The TLS settings for `https` URLs, both of the upstreams and of the source.
    pub tls: UpstreamTls,
}

/// How a source is polled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiscoveryMethod {
    /// A NeMo Gym model server.
    Gym(UpstreamUrl),
}

/// Where a discovered upstream comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryOrigin {
    /// The label of the source, from `DiscoveryMethod::label`.
    pub source: String,
    /// A model that the upstream serves, as the source reports.
    pub model: Option<String>,
}

// === impl DiscoverySource ===

impl DiscoverySource {
    /// A source with every option at its default.
    pub fn new(ask: DiscoveryMethod) -> Self {
        DiscoverySource {
            ask,
            every: DEFAULT_INTERVAL,
            weight: 1.0,
            max_active: None,
            tls: UpstreamTls::default(),
        }
    }
}

// === impl DiscoveryMethod ===

impl DiscoveryMethod {
    /// The name of the source in logs, metrics and the admin API.
    pub fn label(&self) -> String {
        match self {
            DiscoveryMethod::Gym(url) => format!("gym {}", url.display()),
        }
    }

    /// The address of the source.
    pub fn url(&self) -> &UpstreamUrl {
        match self {
            DiscoveryMethod::Gym(url) => url,
        }
    }
}
