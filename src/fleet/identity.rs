//! The facts by which the queue matches waiting requests to an upstream.

use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};

use crate::aggregate::ModelCard;
use crate::config::types::UpstreamConfig;
use crate::route::upstreams::RouteNames;

/// The id, the names and the models of one server.
pub(super) struct UpstreamIdentity {
    pub id: usize,
    name: String,
    /// The source that discovered the server, once the keeper has applied the settings.
    source: ArcSwapOption<String>,
    /// The models that the server serves, by the latest probe.
    pub serves: ArcSwap<Vec<ModelCard>>,
}

impl UpstreamIdentity {
    pub(super) fn new(id: usize, config: &UpstreamConfig) -> Self {
        let source = ArcSwapOption::new(source(config));
        UpstreamIdentity { id, name: config.name.clone(), source, serves: ArcSwap::default() }
    }

    /// Sets the source that discovered the server.
    pub(super) fn set_source(&self, config: &UpstreamConfig) {
        self.source.store(source(config));
    }

    /// Whether a route with these names means this server: by its own name, or by the source that discovered
    /// it.
    pub(super) fn is_among(&self, names: &RouteNames) -> bool {
        names.contains(&self.name)
            || self.source.load().as_deref().is_some_and(|source| names.contains(source))
    }
}

fn source(config: &UpstreamConfig) -> Option<Arc<String>> {
    config.discovered.as_ref().map(|discovered| Arc::new(discovered.source.clone()))
}
