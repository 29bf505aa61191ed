//! The metrics of one balancer: their names, labels, buckets and descriptions.
//!
//! `docs/metrics.md` has a table of them that a test generates from the descriptions: see `table`.
//!
//! Gauges of upstreams are not stored here; each scrape reads them from the leases, so they cannot drift.

mod balancer;
mod builder;
mod cache;
mod discovery;
mod exchange;
mod exposition;
mod forecast;
mod probes;
mod requests;
mod series;
mod spans;
mod spec;
#[cfg(test)]
mod table;
mod traces;
mod upstreams;

use std::sync::Arc;

pub use balancer::resident_bytes;
pub use exposition::ExpositionFormat;
pub(super) use series::{Counter, IntGauge};
pub use upstreams::UpstreamGauges;

use balancer::BalancerFacts;
use builder::MetricsBuilder;
use cache::CacheMetrics;
use discovery::DiscoveryMetrics;
use exchange::ExchangeMetrics;
use exposition::ExpositionWriter;
use forecast::ForecastMetrics;
use probes::ProbeMetrics;
use requests::RequestMetrics;
use series::{MetricVec, RegisteredMetric};
use spans::SpanMetrics;
use traces::TraceMetrics;

/// All metrics of one balancer.
pub(super) struct Metrics {
    registered: Vec<Box<dyn RegisteredMetric>>,
    facts: BalancerFacts,
    pub requests: RequestMetrics,
    pub probes: ProbeMetrics,
    pub discovery: DiscoveryMetrics,
    pub cache: CacheMetrics,
    pub exchange: ExchangeMetrics,
    pub forecast: ForecastMetrics,
    pub traces: TraceMetrics,
    pub spans: SpanMetrics,
    pub reloads: MetricVec<Counter>,
    pub accept_failures: Arc<Counter>,
    pub handshake_failures: Arc<Counter>,
    pub connections: Arc<IntGauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let make = MetricsBuilder::default();
        Metrics {
            requests: RequestMetrics::new(&make),
            probes: ProbeMetrics::new(&make),
            discovery: DiscoveryMetrics::new(&make),
            cache: CacheMetrics::new(&make),
            exchange: ExchangeMetrics::new(&make),
            forecast: ForecastMetrics::new(&make),
            traces: TraceMetrics::new(&make),
            spans: SpanMetrics::new(&make),
            reloads: make.counters(
                "vllm_lb_reloads_total",
                "reloads: `ok`, or `failed` when the configuration had problems",
                &["result"],
            ),
            accept_failures: make
                .counter("vllm_lb_accept_failures_total", "connections that could not be accepted"),
            handshake_failures: make
                .counter("vllm_lb_handshake_failures_total", "TLS handshakes that failed"),
            connections: make.gauge("vllm_lb_connections", "open connections of clients"),
            facts: BalancerFacts::default(),
            registered: make.finish(),
        }
    }
}

impl Metrics {
    /// The page of all metrics, with the gauges of these upstreams.
    pub(super) fn render(&self, format: ExpositionFormat, upstreams: &[UpstreamGauges<'_>]) -> Vec<u8> {
        let mut page = ExpositionWriter::new(format);
        self.facts.write(&mut page);
        self.registered.iter().for_each(|metric| metric.write(&mut page));
        upstreams::write(upstreams, &mut page);
        page.finish()
    }

    /// Removes the series with a label that has a value for which `is_gone` is true.
    pub(super) fn forget(&self, is_gone: &dyn Fn(&str, &str) -> bool) {
        self.registered.iter().for_each(|metric| metric.forget(is_gone));
    }
}

/// The value of the label `model` where no served model is named.
pub(super) const OTHER_MODEL: &str = "other";

/// The value of the label `status`: a frequent status itself, the class of other statuses.
pub(super) fn status_label(status: u16) -> &'static str {
    match status {
        200 => "200",
        400 => "400",
        401 => "401",
        404 => "404",
        405 => "405",
        408 => "408",
        413 => "413",
        422 => "422",
        429 => "429",
        500 => "500",
        502 => "502",
        503 => "503",
        504 => "504",
        0 => "none",
        _ => match status / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        },
    }
}
