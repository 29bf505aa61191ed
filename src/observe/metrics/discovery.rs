//! Metrics of discovery sources.

use super::builder::MetricsBuilder;
use super::series::{Counter, FloatGauge, IntGauge, MetricVec};

/// The metrics of discovery sources, by their labels.
pub(in crate::observe) struct DiscoveryMetrics {
    pub upstreams: MetricVec<IntGauge>,
    pub answered: MetricVec<FloatGauge>,
    pub failures: MetricVec<Counter>,
}

impl DiscoveryMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        DiscoveryMetrics {
            upstreams: make.gauges(
                "vllm_lb_discovery_upstreams",
                "upstreams in the latest list of a source, such as `dns http://vllm:8000`",
                &["source"],
            ),
            answered: make.float_gauges(
                "vllm_lb_discovery_last_list_time_seconds",
                "when a source last gave a list, in seconds since 1970: `time()` less this is the list's age",
                &["source"],
            ),
            failures: make.counters(
                "vllm_lb_discovery_failures_total",
                "failed questions to a source of upstreams, such as `gym http://policy-model:11000`: no \
                 answer (`unreachable`, `timeout`), a refusal (`refused`), an answer that is no list \
                 (`invalid`) or lists no upstream (`empty`), or a listed upstream that cannot be used \
                 (`unusable`)",
                &["source", "reason"],
            ),
        }
    }
}
