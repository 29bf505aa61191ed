//! An engine that a source lists, and the upstream that it becomes.

use crate::config::secret::Secret;
use crate::config::types::{DiscoveryOrigin, DiscoverySource, UpstreamConfig, UpstreamUrl};

/// An engine that a source lists.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::fleet) enum DiscoveredEngine {
    /// An engine with the settings that its source gives to all, except for its own.
    Found(Box<FoundEngine>),
    /// An engine with settings of its own alone.
    Configured(Box<UpstreamConfig>),
}

/// The address of an engine, and what its source says of it alone.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::fleet) struct FoundEngine {
    pub url: UpstreamUrl,
    /// Host, port and path of the URL unless given.
    pub name: Option<String>,
    /// Multiplies the weight of the source.
    pub weight: f64,
    pub max_active: Option<u32>,
    pub api_key: Option<Secret>,
    /// A model that the engine serves.
    pub model: Option<String>,
    /// The host that requests and certificates name, where the URL has the address it stands for.
    pub host: Option<String>,
}

// === impl FoundEngine ===

impl FoundEngine {
    /// An engine of which its source says nothing else.
    pub(super) fn at(url: UpstreamUrl) -> Self {
        FoundEngine { url, name: None, weight: 1.0, max_active: None, api_key: None, model: None, host: None }
    }
}

// === impl DiscoveredEngine ===

impl DiscoveredEngine {
    /// Returns the upstream with the settings of the source and of the engine.
    pub(super) fn upstream(&self, source: &DiscoverySource) -> UpstreamConfig {
        match self {
            DiscoveredEngine::Found(engine) => found(engine, source),
            DiscoveredEngine::Configured(config) => {
                let discovered = Some(DiscoveryOrigin { source: source.ask.label(), model: None });
                UpstreamConfig { discovered, ..(**config).clone() }
            }
        }
    }

    /// The model that the source named.
    pub(super) fn model(&self) -> Option<&str> {
        match self {
            DiscoveredEngine::Found(engine) => engine.model.as_deref(),
            DiscoveredEngine::Configured(_) => None,
        }
    }
}

impl From<FoundEngine> for DiscoveredEngine {
    fn from(engine: FoundEngine) -> Self {
        DiscoveredEngine::Found(Box::new(engine))
    }
}

impl From<UpstreamConfig> for DiscoveredEngine {
    fn from(config: UpstreamConfig) -> Self {
        DiscoveredEngine::Configured(Box::new(config))
    }
}

fn found(engine: &FoundEngine, source: &DiscoverySource) -> UpstreamConfig {
    let url = engine.url.clone();
    let config = UpstreamConfig {
        // Several engines may share an address, below paths of their own.
        name: engine.name.clone().unwrap_or_else(|| format!("{}{}", url.authority(), url.prefix)),
        models: source.models.clone(),
        weight: UpstreamConfig::bounded_weight(source.weight * engine.weight),
        max_active: engine.max_active.or(source.max_active),
        discovered: Some(DiscoveryOrigin { source: source.ask.label(), model: engine.model.clone() }),
        ..UpstreamConfig::new(url)
    };
    let mut config = match &engine.api_key {
        Some(key) => UpstreamConfig { api_key: Some(key.clone()), ..config },
        None => UpstreamConfig {
            api_key: source.api_key.clone(),
            api_key_env: source.api_key_env.clone(),
            ..config
        },
    };
    if config.url.https {
        config.tls = source.tls.clone();
    }
    if let Some(host) = &engine.host {
        let named = UpstreamUrl { host: host.clone(), ..config.url.clone() };
        config.host = Some(named.authority());
        if config.url.https {
            config.tls.sni.get_or_insert_with(|| host.clone());
        }
    }
    config
}
