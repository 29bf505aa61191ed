//! One upstream in a snapshot.

use std::sync::Arc;
use std::time::Instant;

use super::breaker::{Admits, BreakerMachine, BreakerRules, UpstreamState, UpstreamStatus};
use super::probe_duty::UpstreamCondition;
use super::upstream::Upstream;
use crate::aggregate::ModelCard;
use crate::config::types::{Breaker, Health};

/// One upstream in a snapshot.
#[derive(Clone)]
pub struct SnapshotEntry {
    pub upstream: Arc<Upstream>,
    pub status: UpstreamStatus,
    /// The models that the upstream serves; kept while it is down.
    pub models: Arc<Vec<ModelCard>>,
    pub version: Option<Arc<str>>,
    /// Increases when the cache is assumed to be empty: the upstream restarted, or came back after it was
    /// gone.
    pub incarnation: u64,
    /// The capacity of the cache in tokens, by the latest metrics.
    pub cache_tokens: Option<u64>,
    /// The upstream leaves the fleet when its last request has ended.
    pub removing: bool,
    /// The upstream is probed once an interval; otherwise more often.
    pub(super) calm: bool,
    /// The error of the latest probe, if it failed.
    pub probe_error: Option<Arc<str>>,
}

impl SnapshotEntry {
    /// Builds the entry of an upstream that was not probed yet.
    pub(super) fn unknown(upstream: Arc<Upstream>) -> Self {
        let rules = BreakerRules { health: Health::default(), breaker: Breaker::default() };
        let status = BreakerMachine::new(super::now()).status(&rules);
        SnapshotEntry {
            upstream,
            status,
            models: Arc::default(),
            version: None,
            incarnation: 0,
            cache_tokens: None,
            removing: false,
            calm: false,
            probe_error: None,
        }
    }

    /// Whether the upstream takes requests by its state; it may still be full.
    pub fn is_ready(&self) -> bool {
        !self.removing && matches!(self.status.state, UpstreamState::Ready | UpstreamState::Suspect)
    }

    /// Returns the condition by which the duty to probe is decided.
    pub(super) fn condition(&self) -> UpstreamCondition {
        match () {
            () if self.status.gone || self.status.missing => UpstreamCondition::Fails,
            () if self.calm => UpstreamCondition::Works,
            () => UpstreamCondition::Unsure,
        }
    }

    /// Whether the upstream is drained but still works.
    pub(super) fn drains(&self) -> bool {
        !self.removing && self.status.state == UpstreamState::Draining && !self.status.gone
    }

    /// Whether the upstream admits all requests, whatever the time. A tripped upstream never does.
    pub(super) fn is_steady(&self) -> bool {
        !self.removing && self.status.is_steady()
    }

    /// Returns which requests the upstream admits.
    pub fn admits(&self, now: Instant) -> Admits {
        if self.removing { Admits::None } else { self.status.admits(now) }
    }

    /// Returns the state for people; an upstream that is being removed shows as draining.
    pub fn state(&self) -> UpstreamState {
        if self.removing { UpstreamState::Draining } else { self.status.state }
    }

    /// Returns the model that serves requests without a model.
    pub(super) fn base(&self) -> Option<&str> {
        self.models.iter().find(|card| card.parent.is_none()).map(|card| card.id.as_str())
    }

    /// Whether the upstream serves the model.
    pub fn serves(&self, model: &str) -> bool {
        self.models.iter().any(|card| card.id == model)
    }
}
