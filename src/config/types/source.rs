//! Upstreams that nobody lists: who is asked which there are, and what those get besides.

use std::time::Duration;

use super::{UpstreamTls, UpstreamUrl};

/// Somebody who is asked, again and again, which upstreams there are.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    pub ask: Discover,
    /// Between two questions, once there was an answer.
    pub every: Duration,
    /// Of each upstream that it names, as all that follows.
    pub weight: f64,
    pub max_active: Option<u32>,
    /// Where a URL is https: the upstreams', and that of who is asked.
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

impl Source {
    /// A source with every option at its default.
    pub fn new(ask: Discover) -> Self {
        Source {
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
