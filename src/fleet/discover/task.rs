//! What is done for each kind of source: one question, or a task that follows it.

use std::sync::Arc;
use std::time::Duration;

use super::super::client::UpstreamClient;
use super::engine::DiscoveredEngine;
#[cfg(feature = "kubernetes")]
use super::kubernetes;
use super::source::{PlannedSource, SourceFailure, SourceReporter};
use super::{dns, file, gym};
use crate::config::types::DiscoveryMethod;

/// Returns the engines that a source lists now.
pub(in crate::fleet) async fn poll(
    source: &PlannedSource,
    client: &UpstreamClient,
    limit: Duration,
) -> Result<Vec<DiscoveredEngine>, SourceFailure> {
    match &source.source.ask {
        DiscoveryMethod::Gym(_) => gym::poll(source, client, limit).await,
        DiscoveryMethod::File(listed) => file::poll(listed).await,
        DiscoveryMethod::Dns(lookup) => dns::poll(lookup, limit).await,
        #[cfg(feature = "kubernetes")]
        DiscoveryMethod::Kubernetes(service) => kubernetes::poll(service, limit).await,
        #[cfg(not(feature = "kubernetes"))]
        DiscoveryMethod::Kubernetes(_) => Err(SourceFailure::without_kubernetes()),
    }
}

/// Follows a source until dropped: reports its list, and reports again whenever the list may have changed.
pub(super) async fn follow(source: Arc<PlannedSource>, reporter: SourceReporter) {
    let every = source.source.every;
    match &source.source.ask {
        DiscoveryMethod::Gym(_) => gym::follow(&source, reporter).await,
        DiscoveryMethod::File(listed) => file::follow(listed, every, reporter).await,
        DiscoveryMethod::Dns(lookup) => dns::follow(lookup, every, reporter).await,
        #[cfg(feature = "kubernetes")]
        DiscoveryMethod::Kubernetes(service) => kubernetes::follow(service, reporter).await,
        #[cfg(not(feature = "kubernetes"))]
        DiscoveryMethod::Kubernetes(_) => {
            let mut reporter = reporter;
            reporter.failed(&SourceFailure::without_kubernetes());
        }
    }
}
