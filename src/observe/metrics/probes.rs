//! Metrics of upstreams' health: probes, changes of state, and reports of siblings.

use std::sync::Arc;

use super::builder::MetricsBuilder;
use super::series::{Counter, MetricVec};

/// The metrics of this balancer's probes, of those of its siblings, and of what follows from both.
pub(in crate::observe) struct ProbeMetrics {
    pub changes: MetricVec<Counter>,
    pub made: MetricVec<Counter>,
    pub reports: MetricVec<Counter>,
    pub failed: MetricVec<Counter>,
    pub busy: MetricVec<Counter>,
    pub signs_lost: Arc<Counter>,
}

impl ProbeMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        ProbeMetrics {
            changes: make.counters(
                "vllm_lb_upstream_changes_total",
                "changes of an upstream's state, by the new state \
                 ([states](operating.md#states-of-an-upstream))",
                &["upstream", "state"],
            ),
            made: make.counters(
                "vllm_lb_probes_total",
                "probes of an upstream by this balancer",
                &["upstream"],
            ),
            reports: make.counters(
                "vllm_lb_probe_reports_total",
                "reports of siblings on an upstream that were applied in place of own probes",
                &["upstream"],
            ),
            failed: make.counters(
                "vllm_lb_probe_failures_total",
                "failed probes of an upstream",
                &["upstream"],
            ),
            busy: make.counters(
                "vllm_lb_upstream_busy_total",
                "answers by which an upstream reported that it is full",
                &["upstream"],
            ),
            signs_lost: make.counter(
                "vllm_lb_signs_lost_total",
                "reports of requests about upstreams that came faster than they could be processed",
            ),
        }
    }
}
