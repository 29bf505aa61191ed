//! A source of the present configuration, and where its task reports.

use std::path::Path;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::mpsc;

use super::super::Fleet;
use super::super::client::UpstreamClient;
use super::super::upstream::Upstream;
use super::engine::DiscoveredEngine;
use crate::config::types::{DiscoveryMethod, DiscoverySource, UpstreamConfig, UpstreamTls};

/// A discovery source, and the connection settings for it.
pub(in crate::fleet) struct PlannedSource {
    pub source: DiscoverySource,
    pub label: String,
    /// The connection settings of a source with a URL: those for requests to a model server, and a check of
    /// the TLS settings for the upstreams of a DNS name.
    pub server: Option<Arc<Upstream>>,
}

/// The kubeconfig, the context and the namespace of a service.
pub(super) type PodsPlace<'a> = (Option<&'a Path>, Option<&'a str>, Option<&'a str>);

/// The engines that a source lists at one moment.
pub(in crate::fleet) struct SourceList {
    /// The label of the source.
    pub source: String,
    pub engines: Vec<DiscoveredEngine>,
}

/// Why a source gave no list. Its last list stays in effect.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{text}")]
pub(in crate::fleet) struct SourceFailure {
    pub reason: FailureReason,
    pub text: String,
}

/// The kinds of failures, as the metrics name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fleet) enum FailureReason {
    /// No connection, or no such file.
    Unreachable,
    /// No answer within the time limit.
    Timeout,
    /// The source refused: a status of HTTP, an answer code of DNS, a file that may not be read.
    Refused,
    /// The answer is not a list of upstreams.
    Invalid,
    /// The answer lists no upstream.
    Empty,
}

/// Reports what the task of one source finds: lists to the discoverer, failures to the log and the metrics.
/// Of successive failures only the first is logged as a warning; of a file every other one.
pub(in crate::fleet) struct SourceReporter {
    fleet: Arc<Fleet>,
    source: Arc<PlannedSource>,
    answers: mpsc::Sender<SourceList>,
    /// What the last report was.
    last: LastReport,
}

#[derive(PartialEq)]
enum LastReport {
    None,
    Listed,
    Failed(String),
}

// === impl PlannedSource ===

impl PlannedSource {
    /// Builds the planned form of `source`; `server` holds the connection settings.
    pub(in crate::fleet) fn new(source: DiscoverySource, server: Option<Arc<Upstream>>) -> Self {
        PlannedSource { label: source.ask.label(), source, server }
    }

    /// Describes a source with a URL as an upstream, so that `UpstreamClient` can connect to it.
    pub(in crate::fleet) fn server(source: &DiscoverySource) -> Option<UpstreamConfig> {
        let url = source.ask.url()?.clone();
        Some(UpstreamConfig {
            name: source.ask.label(),
            tls: if url.https { source.tls.clone() } else { UpstreamTls::default() },
            ..UpstreamConfig::new(url)
        })
    }

    /// Returns what tells apart the pods of one name; `None` for a source without pods.
    pub(super) fn pods_place(&self) -> Option<PodsPlace<'_>> {
        match &self.source.ask {
            DiscoveryMethod::Kubernetes(service) => Some((
                service.kubeconfig.as_deref(),
                service.context.as_deref(),
                service.namespace.as_deref(),
            )),
            _ => None,
        }
    }

    /// Whether both name the same source with the same settings, certificates included.
    pub(super) fn has_settings_of(&self, other: &PlannedSource) -> bool {
        let authorities = |of: &PlannedSource| {
            of.server.as_ref().map(|server| server.authorities.clone()).unwrap_or_default()
        };
        self.source == other.source && authorities(self) == authorities(other)
    }

    /// Returns the upstreams of these engines.
    pub(in crate::fleet) fn upstreams(&self, engines: &[DiscoveredEngine]) -> Vec<UpstreamConfig> {
        engines.iter().map(|engine| engine.upstream(&self.source)).collect()
    }
}

// === impl SourceFailure ===

impl SourceFailure {
    pub(super) fn new(reason: FailureReason, text: impl Into<String>) -> Self {
        SourceFailure { reason, text: text.into() }
    }

    /// The failure of a source that this program cannot follow.
    #[cfg(not(feature = "kubernetes"))]
    pub(super) fn without_kubernetes() -> Self {
        Self::new(FailureReason::Refused, "this vllm-lb was built without the feature kubernetes")
    }
}

// === impl FailureReason ===

impl FailureReason {
    fn label(self) -> &'static str {
        match self {
            FailureReason::Unreachable => "unreachable",
            FailureReason::Timeout => "timeout",
            FailureReason::Refused => "refused",
            FailureReason::Invalid => "invalid",
            FailureReason::Empty => "empty",
        }
    }
}

// === impl SourceReporter ===

impl SourceReporter {
    pub(super) fn new(
        fleet: Arc<Fleet>,
        source: Arc<PlannedSource>,
        answers: mpsc::Sender<SourceList>,
    ) -> Self {
        SourceReporter { fleet, source, answers, last: LastReport::None }
    }

    pub(super) fn client(&self) -> &UpstreamClient {
        self.fleet.client()
    }

    /// Reports the list of the source. Returns whether the discoverer still runs.
    pub(super) async fn listed(&mut self, engines: Vec<DiscoveredEngine>) -> bool {
        let (label, observer) = (&self.source.label, &self.fleet.observer);
        if std::mem::replace(&mut self.last, LastReport::Listed) != LastReport::Listed {
            observer.source_answers(label, engines.len(), engines.first().and_then(DiscoveredEngine::model));
        }
        observer.source_listed(label, engines.len());
        self.answers.send(SourceList { source: label.clone(), engines }).await.is_ok()
    }

    /// Reports why the list that comes now has no engine.
    #[cfg(feature = "kubernetes")]
    pub(super) fn empty(&self, why: &str) {
        self.fleet.observer.source_is_empty(&self.source.label, why);
    }

    /// Reports that the source lists so many engines without an IP address.
    #[cfg(feature = "kubernetes")]
    pub(super) fn unaddressed(&self, engines: usize) {
        self.fleet.observer.source_lists_names(&self.source.label, engines);
    }

    /// Returns a random number in 0..1.
    #[cfg(feature = "kubernetes")]
    pub(super) fn draw(&self) -> f64 {
        self.fleet.draw()
    }

    /// Reports that the source gave the same list again, with so many engines.
    pub(super) fn confirmed(&self, engines: usize) {
        self.fleet.observer.source_listed(&self.source.label, engines);
    }

    /// Reports that the source gave no list.
    pub(super) fn failed(&mut self, failure: &SourceFailure) {
        // An editor of a file corrects one mistake after the other. An API server that is reached may refuse.
        let seen = match self.source.source.ask {
            DiscoveryMethod::File(_) => failure.text.clone(),
            DiscoveryMethod::Kubernetes(_) => failure.reason.label().into(),
            _ => String::new(),
        };
        let before = std::mem::replace(&mut self.last, LastReport::Failed(seen));
        let first = before != self.last;
        let (label, reason) = (&self.source.label, failure.reason.label());
        self.fleet.observer.source_failed(label, reason, &failure.text, first);
    }
}
