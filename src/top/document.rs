//! The overview of the admin API, as far as `vllm-lb top` shows it. Unknown keys are ignored; a missing or
//! null value is unknown.

use serde::Deserialize;

/// The overview of one balancer.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct TopDocument {
    /// Seconds since 1970.
    pub time: f64,
    pub balancer: TopBalancer,
    pub totals: TopTotals,
    pub upstreams: Vec<TopUpstream>,
    #[serde(default)]
    pub models: Vec<TopModel>,
    #[serde(default)]
    pub siblings: TopSiblings,
    /// The latest choices, newest first.
    #[serde(default)]
    pub decisions: Vec<TopDecision>,
}

/// The process that the overview shows.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct TopBalancer {
    pub name: Option<String>,
    pub version: String,
    /// Seconds since 1970.
    pub started: f64,
    pub ready: bool,
    #[serde(default)]
    pub leaving: bool,
}

/// The numbers of the whole balancer; counters only grow.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct TopTotals {
    pub requests: u64,
    #[serde(default)]
    pub errors: u64,
    #[serde(default)]
    pub rejects: u64,
    #[serde(default)]
    pub retries: u64,
    #[serde(default)]
    pub in_flight: u64,
    #[serde(default)]
    pub queued: u64,
    #[serde(default)]
    pub connections: u64,
    #[serde(default)]
    pub prompt_tokens: u64,
    #[serde(default)]
    pub output_tokens: u64,
    #[serde(default)]
    pub predicted_tokens: u64,
    #[serde(default)]
    pub reported_tokens: u64,
    #[serde(default)]
    pub compared_tokens: u64,
    pub first_byte_ms: Option<TopTimes>,
    pub memory_bytes: Option<u64>,
}

/// Percentiles in milliseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct TopTimes {
    pub p50: f64,
    pub p90: f64,
    pub p99: Option<f64>,
}

/// One upstream.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct TopUpstream {
    pub name: String,
    pub state: String,
    #[serde(default)]
    pub drained: bool,
    #[serde(default)]
    pub models: Vec<String>,
    #[serde(default)]
    pub active: u64,
    #[serde(default)]
    pub active_elsewhere: u64,
    pub queued: Option<u64>,
    #[serde(default)]
    pub backlog: u64,
    pub kv_usage: Option<f64>,
    #[serde(default)]
    pub requests: u64,
    #[serde(default)]
    pub failures: u64,
    #[serde(default)]
    pub predicted_tokens: u64,
    #[serde(default)]
    pub reported_tokens: u64,
    #[serde(default)]
    pub compared_tokens: u64,
    #[serde(default)]
    pub prompt_tokens: u64,
    pub first_byte_ms: Option<TopTimes>,
    pub sight: Option<String>,
}

/// One model.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct TopModel {
    pub name: String,
    pub upstreams: u64,
    pub ready: u64,
    #[serde(default)]
    pub requests: u64,
    #[serde(default)]
    pub prompt_tokens: u64,
    #[serde(default)]
    pub cached_tokens: u64,
    #[serde(default)]
    pub output_tokens: u64,
}

/// The other balancers on the same Redis.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct TopSiblings {
    #[serde(default)]
    pub enabled: bool,
    #[serde(default)]
    pub redis_up: bool,
    #[serde(default)]
    pub balancers: Vec<TopSibling>,
}

/// One other balancer.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct TopSibling {
    pub id: String,
    pub name: Option<String>,
    pub age_ms: f64,
    #[serde(default)]
    pub in_flight: u64,
}

/// One choice of an upstream.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub(crate) struct TopDecision {
    pub time: f64,
    pub id: String,
    pub model: Option<String>,
    pub route: Option<String>,
    #[serde(default)]
    pub attempt: u64,
    pub reason: String,
    pub upstream: Option<String>,
    #[serde(default)]
    pub blocks: u64,
    #[serde(default)]
    pub of: u64,
    #[serde(default)]
    pub candidates: Vec<TopCandidate>,
}

/// One candidate of a choice, with the terms of its cost.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub(crate) struct TopCandidate {
    pub upstream: String,
    pub cost: f64,
    #[serde(default)]
    pub hit: u64,
    #[serde(default)]
    pub missing: u64,
    #[serde(default)]
    pub backlog: u64,
    #[serde(default)]
    pub active: u64,
    #[serde(default)]
    pub context: u64,
    #[serde(default)]
    pub session_penalty: u64,
    /// The forecast of the time to the first token.
    pub forecast_ms: Option<f64>,
}

// === impl TopDecision ===

impl TopDecision {
    /// The candidate that was chosen.
    pub(crate) fn chosen(&self) -> Option<&TopCandidate> {
        self.candidates.iter().find(|candidate| Some(&candidate.upstream) == self.upstream.as_ref())
    }

    /// The best candidate that was not chosen.
    pub(crate) fn runner_up(&self) -> Option<&TopCandidate> {
        let others =
            self.candidates.iter().filter(|candidate| Some(&candidate.upstream) != self.upstream.as_ref());
        others.min_by(|one, other| one.cost.total_cmp(&other.cost))
    }
}
