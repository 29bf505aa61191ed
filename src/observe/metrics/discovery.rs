//! Metrics of sources, which are asked for upstreams.

use prometheus::IntCounterVec;

use super::MetricsBuilder;

pub struct DiscoveryMetrics {
    pub failures: IntCounterVec,
}

impl DiscoveryMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        DiscoveryMetrics {
            failures: make.counters(
                "vllm_lb_discovery_failures_total",
                "Questions for upstreams that a source did not answer well.",
                &["source"],
            ),
        }
    }
}
