//! The metrics of one balancer: their names, labels and buckets, documented in docs/metrics.md.
//!
//! Gauges of upstreams are not stored here; each scrape reads them from the leases, so they cannot drift.

mod builder;
mod cache;
mod exchange;
mod forecast;
mod probes;
mod sight;
mod spans;
mod traces;

use prometheus::{Encoder, HistogramVec, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder};

use builder::MetricsBuilder;
use cache::CacheMetrics;
use exchange::ExchangeMetrics;
use forecast::ForecastMetrics;
use probes::ProbeMetrics;
use spans::SpanMetrics;
use traces::TraceMetrics;

use crate::fleet::sight::SightState;

/// All metrics of one balancer, in a registry of their own.
pub(super) struct Metrics {
    registry: Registry,
    pub requests: IntCounterVec,
    pub request_seconds: HistogramVec,
    pub first_byte_seconds: HistogramVec,
    pub rejects: IntCounterVec,
    pub attempt_failures: IntCounterVec,
    pub retries: IntCounterVec,
    pub broken_streams: IntCounterVec,
    pub upstream_changes: IntCounterVec,
    pub probes: ProbeMetrics,
    pub upstream_busy: IntCounterVec,
    pub cache: CacheMetrics,
    pub discovery_failures: IntCounterVec,
    pub exchange: ExchangeMetrics,
    pub forecast: ForecastMetrics,
    pub traces: TraceMetrics,
    pub spans: SpanMetrics,
    pub signs_lost: IntCounter,
    pub queue_ends: IntCounterVec,
    pub reloads: IntCounterVec,
    pub queued: IntGauge,
    pub accept_failures: IntCounter,
    pub handshake_failures: IntCounter,
    pub connections: IntGauge,
    pub in_flight: IntGauge,
    pub peeked_bytes: IntGauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let make = MetricsBuilder::default();
        Metrics {
            requests: make.counters(
                "vllm_lb_requests_total",
                "Requests that ended, by model, upstream, status and outcome.",
                &["model", "upstream", "status", "outcome"],
            ),
            request_seconds: make.histogram("vllm_lb_request_seconds", "From the head to the answer's end."),
            first_byte_seconds: make.histogram(
                "vllm_lb_first_byte_seconds",
                "From the request's head to the first byte of the answer's body.",
            ),
            rejects: make.counters("vllm_lb_rejects_total", "Refusals of the balancer's own.", &["reason"]),
            attempt_failures: make.counters(
                "vllm_lb_attempt_failures_total",
                "Attempts that failed before an answer began.",
                &["upstream", "cause"],
            ),
            retries: make.counters(
                "vllm_lb_retries_total",
                "Attempts that followed a failed one, by its cause.",
                &["cause"],
            ),
            broken_streams: make.counters(
                "vllm_lb_broken_streams_total",
                "Streams that ended with an error event of the balancer's.",
                &["upstream"],
            ),
            upstream_changes: make.counters(
                "vllm_lb_upstream_changes_total",
                "Changes of an upstream's state, by the new one.",
                &["upstream", "state"],
            ),
            probes: ProbeMetrics::new(&make),
            upstream_busy: make.counters(
                "vllm_lb_upstream_busy_total",
                "Answers by which an upstream said that it is full.",
                &["upstream"],
            ),
            signs_lost: make.counter("vllm_lb_signs_lost_total", "Reports on upstreams that were dropped."),
            queue_ends: make.counters(
                "vllm_lb_queue_total",
                "Requests that waited for room, by the end of it.",
                &["end"],
            ),
            reloads: make.counters("vllm_lb_reloads_total", "Reloads of the configuration.", &["result"]),
            queued: make.gauge("vllm_lb_queued", "Requests that wait for room."),
            accept_failures: make
                .counter("vllm_lb_accept_failures_total", "Connections that could not be accepted."),
            handshake_failures: make
                .counter("vllm_lb_handshake_failures_total", "TLS handshakes that failed."),
            connections: make.gauge("vllm_lb_connections", "Connections of clients that are open."),
            in_flight: make.gauge("vllm_lb_in_flight", "Requests of clients that have not ended."),
            peeked_bytes: make.gauge("vllm_lb_peeked_bytes", "Memory reserved for request bodies."),
            cache: CacheMetrics::new(&make),
            discovery_failures: make.counters(
                "vllm_lb_discovery_failures_total",
                "Polls of a source that gave no usable list of upstreams.",
                &["source"],
            ),
            exchange: ExchangeMetrics::new(&make),
            forecast: ForecastMetrics::new(&make),
            traces: TraceMetrics::new(&make),
            spans: SpanMetrics::new(&make),
            registry: make.registry,
        }
    }
}

impl Metrics {
    /// The text exposition of all registered metrics.
    pub(super) fn render(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(8 << 10);
        // Writing to memory fails only for a family without samples, which the registry leaves out.
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            log::error!(error:% = error; "metrics cannot be written");
        }
        text
    }
}

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

/// The lines of the upstreams' gauges: `name{upstream="…"} value`.
pub(super) fn upstream_gauges(rows: &[UpstreamGauges<'_>]) -> String {
    let mut text = String::new();
    type Read = fn(&UpstreamGauges<'_>) -> Option<f64>;
    let families: [(&str, &str, Read); 8] = [
        ("vllm_lb_upstream_ready", "1 while the upstream takes requests.", |row| {
            Some(f64::from(u8::from(row.ready)))
        }),
        ("vllm_lb_upstream_active", "Requests in flight on the upstream.", |row| Some(row.active as f64)),
        ("vllm_lb_upstream_backlog_tokens", "Prompt tokens whose first byte is awaited.", |row| {
            Some(row.backlog as f64)
        }),
        ("vllm_lb_upstream_context_tokens", "Prompt tokens of requests in flight.", |row| {
            Some(row.context as f64)
        }),
        ("vllm_lb_upstream_incarnation", "Number of times its cache was considered empty.", |row| {
            Some(row.incarnation as f64)
        }),
        ("vllm_lb_upstream_foreign_requests", "Requests of others on the upstream.", |row| {
            row.foreign.map(|count| count as f64)
        }),
        ("vllm_lb_upstream_kv_usage", "Used share of the upstream's cache, 0 to 1.", |row| row.kv_usage),
        ("vllm_lb_upstream_cache_tokens", "Tokens that the upstream's cache holds.", |row| {
            row.cache_tokens.map(|tokens| tokens as f64)
        }),
    ];
    for (name, help, read) in families {
        if rows.iter().all(|row| read(row).is_none()) {
            continue;
        }
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        for row in rows {
            let Some(value) = read(row) else { continue };
            let escaped = escaped(row.upstream);
            text.push_str(&format!("{name}{{upstream=\"{escaped}\"}} {value}\n"));
        }
    }
    let sights: Vec<(String, SightState)> =
        rows.iter().map(|row| (escaped(row.upstream), row.sight)).collect();
    text.push_str(&sight::lines(&sights));
    text
}

/// The value of a label in the text format.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The current values of one upstream's gauges; unknown values are `None` and omitted.
#[derive(Clone, Copy)]
pub struct UpstreamGauges<'a> {
    pub upstream: &'a str,
    pub ready: bool,
    pub active: u64,
    pub backlog: u64,
    pub context: u64,
    pub incarnation: u64,
    pub foreign: Option<u64>,
    pub kv_usage: Option<f64>,
    pub cache_tokens: Option<u64>,
    /// How well the balancer sees the upstream's cache.
    pub sight: SightState,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exposition_has_a_type_for_each_family_and_escapes_names() {
        let metrics = Metrics::default();
        metrics.rejects.with_label_values(&["path"]).inc();
        let text = String::from_utf8(metrics.render()).unwrap();
        assert!(text.contains("# TYPE vllm_lb_rejects_total counter"));
        let row = UpstreamGauges {
            upstream: "a\"b\n",
            ready: true,
            active: 2,
            backlog: 3,
            context: 4,
            incarnation: 0,
            foreign: None,
            kv_usage: Some(0.25),
            cache_tokens: None,
            sight: SightState::Learnt,
        };
        let known = UpstreamGauges { upstream: "b", foreign: Some(0), ..row };
        let text = upstream_gauges(&[row, known]);
        assert!(text.contains("vllm_lb_upstream_active{upstream=\"a\\\"b\\n\"} 2\n"), "{text}");
        assert!(text.contains("vllm_lb_upstream_kv_usage{upstream=\"b\"} 0.25\n"), "{text}");
        assert!(text.contains(" gauge\nvllm_lb_upstream_foreign_requests{upstream=\"b\"} 0\n"), "{text}");
        assert!(!text.contains("cache_tokens"), "{text}");
    }
}
