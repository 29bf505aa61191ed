//! Metrics of the export of spans.

use std::sync::Arc;

use super::builder::MetricsBuilder;
use super::series::{Counter, MetricVec};

/// The metrics of the export of spans.
pub(in crate::observe) struct SpanMetrics {
    pub results: MetricVec<Counter>,
    pub failures: Arc<Counter>,
}

impl SpanMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        SpanMetrics {
            results: make.counters(
                "vllm_lb_spans_total",
                "[spans](operating.md#spans): `exported`; or lost, because the queue was `full`, the \
                 `collector` failed for too long, it `rejected` them, the export was turned `off`, or the \
                 balancer had to `stop`",
                &["result"],
            ),
            failures: make.counter(
                "vllm_lb_span_export_failures_total",
                "failed exports of spans; those that may succeed later are repeated",
            ),
        }
    }
}
