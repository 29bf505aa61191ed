//! Metrics of the export of spans.

use prometheus::{IntCounter, IntCounterVec};

use super::builder::MetricsBuilder;

/// The metrics of the export of spans.
pub(in crate::observe) struct SpanMetrics {
    pub results: IntCounterVec,
    pub failures: IntCounter,
}

impl SpanMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        SpanMetrics {
            results: make.counters(
                "vllm_lb_spans_total",
                "Spans of requests, by what became of them.",
                &["result"],
            ),
            failures: make.counter("vllm_lb_span_export_failures_total", "Failed exports of spans."),
        }
    }
}
