//! Metrics of recorded calls.

use prometheus::{IntCounter, IntCounterVec, IntGauge};

use super::builder::MetricsBuilder;

/// The metrics of recorded calls.
pub(in crate::observe) struct TraceMetrics {
    pub calls: IntCounterVec,
    pub failures: IntCounter,
    pub expired: IntCounter,
    pub cumulative: IntCounterVec,
    pub waiting: IntGauge,
    pub waiting_bytes: IntGauge,
    pub stored_bytes: IntGauge,
}

impl TraceMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        TraceMetrics {
            calls: make.counters(
                "vllm_lb_traces_total",
                "Captured calls, by what became of them.",
                &["result"],
            ),
            failures: make.counter("vllm_lb_trace_store_failures_total", "Failures of the store of traces."),
            expired: make.counter("vllm_lb_traces_expired_total", "Traces removed by age or size."),
            cumulative: make.counters(
                "vllm_lb_cumulative_turns_total",
                "Turns in the cumulative token mode, by how they were served.",
                &["way"],
            ),
            waiting: make.gauge("vllm_lb_traces_waiting", "Captured calls that wait to be stored."),
            waiting_bytes: make.gauge("vllm_lb_traces_waiting_bytes", "Memory of captured calls that wait."),
            stored_bytes: make.gauge("vllm_lb_traces_stored_bytes", "Bytes that stored traces take."),
        }
    }
}
