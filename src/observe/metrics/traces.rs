//! Metrics of recorded calls.

use std::sync::Arc;

use super::builder::MetricsBuilder;
use super::series::{Counter, IntGauge, MetricVec};

/// The metrics of recorded calls.
pub(in crate::observe) struct TraceMetrics {
    pub calls: MetricVec<Counter>,
    pub failures: Arc<Counter>,
    pub expired: Arc<Counter>,
    pub cumulative: MetricVec<Counter>,
    pub waiting: Arc<IntGauge>,
    pub waiting_bytes: Arc<IntGauge>,
    pub stored_bytes: Arc<IntGauge>,
}

impl TraceMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        TraceMetrics {
            calls: make.counters(
                "vllm_lb_traces_total",
                "captured calls: `stored`; or lost, because the queue was `full`, answers took too much \
                 `memory`, or the `store` could not take them",
                &["result"],
            ),
            failures: make.counter("vllm_lb_trace_store_failures_total", "failures of the store of traces"),
            expired: make.counter(
                "vllm_lb_traces_expired_total",
                "traces removed because of their age, or of the size of the store",
            ),
            cumulative: make.counters(
                "vllm_lb_cumulative_turns_total",
                "turns in the cumulative token mode: `continued`, `first`, or the reason for which a turn \
                 was sent as a chat: `history`, `settings`, `tools`, `reasoning`, `structured`, `media`, \
                 `choices`, `logprobs`, `fields`, `size`, `ids`, `late`, `tokenizer`, `template`, `refused`",
                &["way"],
            ),
            waiting: make.gauge(
                "vllm_lb_traces_waiting",
                "captured calls in the queue, without the batch that is being stored",
            ),
            waiting_bytes: make.gauge("vllm_lb_traces_waiting_bytes", "the memory that these calls take"),
            stored_bytes: make.gauge(
                "vllm_lb_traces_stored_bytes",
                "the bytes that stored traces take, in memory or on disk",
            ),
        }
    }
}
