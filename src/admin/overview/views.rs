//! The document of an overview, as it is written.

use serde::Serialize;
use serde_json::Value;

/// An overview without its choices.
#[derive(Serialize)]
pub(super) struct OverviewDocument<'a> {
    pub time: f64,
    pub balancer: BalancerView<'a>,
    pub totals: TotalsView,
    pub upstreams: Vec<UpstreamOverview<'a>>,
    pub models: Vec<ModelView<'a>>,
    pub routes: Vec<RouteView>,
    pub siblings: SiblingsView,
    pub traces: TracesView,
}

/// This process.
#[derive(Serialize)]
pub(super) struct BalancerView<'a> {
    pub id: &'a str,
    pub name: &'a str,
    pub identity: &'a str,
    pub version: &'static str,
    pub started: f64,
    pub ready: bool,
    pub leaving: bool,
}

/// The numbers of the whole balancer.
#[derive(Serialize)]
pub(super) struct TotalsView {
    pub requests: u64,
    pub errors: u64,
    pub rejects: u64,
    pub retries: u64,
    pub broken_streams: u64,
    pub in_flight: u64,
    pub queued: u64,
    pub connections: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    pub predicted_tokens: u64,
    pub reported_tokens: u64,
    pub compared_tokens: u64,
    pub first_byte_ms: Option<TotalTimes>,
    pub peeked_bytes: u64,
    pub index_blocks: usize,
    pub index_bytes: usize,
    pub memory_bytes: Option<u64>,
}

/// Times in milliseconds.
#[derive(Serialize)]
pub(super) struct TotalTimes {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

/// Times in milliseconds.
#[derive(Serialize)]
pub(super) struct UpstreamTimes {
    pub p50: f64,
    pub p90: f64,
}

/// One upstream.
#[derive(Serialize)]
pub(super) struct UpstreamOverview<'a> {
    pub name: &'a str,
    pub url: String,
    pub state: &'static str,
    pub reason: Option<String>,
    pub drained: bool,
    pub removing: bool,
    pub full: bool,
    pub since_seconds: u64,
    pub weight: f64,
    pub models: Vec<&'a str>,
    pub version: Option<&'a str>,
    pub source: Option<&'a str>,
    pub active: u64,
    pub active_elsewhere: u64,
    pub max_active: Option<u32>,
    pub foreign: Option<u64>,
    pub queued: Option<u64>,
    pub backlog: u64,
    pub context: u64,
    pub kv_usage: Option<f64>,
    pub cache_tokens: Option<u64>,
    pub requests: u64,
    pub failures: u64,
    pub predicted_tokens: u64,
    pub reported_tokens: u64,
    pub compared_tokens: u64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub first_byte_ms: Option<UpstreamTimes>,
    pub forecast_error_ms: Option<f64>,
    pub sight: Option<&'static str>,
    pub sight_reason: Option<String>,
    pub incarnation: u64,
}

/// One model.
#[derive(Serialize)]
pub(super) struct ModelView<'a> {
    pub name: &'a str,
    pub upstreams: usize,
    pub ready: usize,
    pub requests: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
}

/// One configured route.
#[derive(Serialize)]
pub(super) struct RouteView {
    pub name: String,
    pub model: Option<String>,
    pub requests: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
}

/// The exchange with other balancers.
#[derive(Serialize)]
pub(super) struct SiblingsView {
    pub enabled: bool,
    pub redis_up: bool,
    pub balancers: Vec<Value>,
}

/// The store of recorded calls.
#[derive(Serialize)]
pub(super) struct TracesView {
    pub enabled: bool,
    pub stored_bytes: u64,
    pub waiting: usize,
    pub stored: u64,
    pub lost: u64,
}
