//! Discovery sources: where upstreams are found, and the settings that discovered upstreams get.

use std::time::Duration;

use super::{UpstreamTls, UpstreamUrl};

/// A server that is polled for the list of upstreams.
#[derive(Clone, Debug, PartialEq)]
pub struct DiscoverySource {
    pub ask: Discover,
    /// The interval between two polls, once the source has answered.
    pub every: Duration,
    /// Of each upstream that it names, as all that follows.
    pub weight: f64,
    pub max_active: Option<u32>,
    /// The TLS settings for `https` URLs, both of the upstreams and of the source.
    pub tls: UpstreamTls,
}

/// The ways of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discover {
    /// A NeMo Gym model server.
    Gym(UpstreamUrl),
}

/// What an upstream that was discovered is by the word of its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovered {
    /// `Discover::label` of the source.
    pub source: String,
    /// A model that it serves, whether or not it lists its models.
    pub model: Option<String>,
}

// === impl Source ===

impl DiscoverySource {
    /// A source with every option at its default.
    pub fn new(ask: Discover) -> Self {
        DiscoverySource {
            ask,
            every: Duration::from_secs(10),
            weight: 1.0,
            max_active: None,
            tls: UpstreamTls::default(),
        }
    }
}

// === impl Discover ===

impl Discover {
    /// What logs, metrics and the admin interface call it.
    pub fn label(&self) -> String {
        match self {
            Discover::Gym(url) => format!("gym {}", url.display()),
        }
    }

    pub fn url(&self) -> &UpstreamUrl {
        match self {
            Discover::Gym(url) => url,
        }
    }
}
