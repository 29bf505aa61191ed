//! Metrics of probes.

use prometheus::IntCounterVec;

use super::builder::MetricsBuilder;

/// The metrics of this balancer's probes, and of those of its siblings.
pub(in crate::observe) struct ProbeMetrics {
    pub made: IntCounterVec,
    pub failed: IntCounterVec,
    pub reports: IntCounterVec,
}

impl ProbeMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        ProbeMetrics {
            made: make.counters(
                "vllm_lb_probes_total",
                "Probes of an upstream by this balancer.",
                &["upstream"],
            ),
            failed: make.counters(
                "vllm_lb_probe_failures_total",
                "Probes that an upstream did not answer well.",
                &["upstream"],
            ),
            reports: make.counters(
                "vllm_lb_probe_reports_total",
                "Reports of siblings on an upstream that were applied.",
                &["upstream"],
            ),
        }
    }
}
