//! Metrics of tokens: the usage that answers report, the size of the prefix index, and its accuracy.

use prometheus::{IntCounterVec, IntGauge};

use super::builder::MetricsBuilder;

/// The metrics of tokens and of the prefix index.
pub(in crate::observe) struct CacheMetrics {
    pub tokens: IntCounterVec,
    pub predicted: IntCounterVec,
    pub reported: IntCounterVec,
    pub trimmed: IntCounterVec,
    pub blocks: IntGauge,
    pub pairs: IntGauge,
    pub bytes: IntGauge,
}

impl CacheMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        CacheMetrics {
            tokens: make.counters(
                "vllm_lb_tokens_total",
                "Tokens that answers reported.",
                &["model", "route", "kind"],
            ),
            predicted: make.counters(
                "vllm_lb_cache_predicted_tokens_total",
                "Prompt tokens believed to be in the upstream's cache, of answers that tell.",
                &["upstream"],
            ),
            reported: make.counters(
                "vllm_lb_cache_reported_tokens_total",
                "Prompt tokens that the upstream said it had in its cache.",
                &["upstream"],
            ),
            trimmed: make.counters(
                "vllm_lb_cache_trimmed_total",
                "Times that the upstream held far less than was believed.",
                &["upstream"],
            ),
            blocks: make.gauge("vllm_lb_index_blocks", "Blocks of prompts that are remembered."),
            pairs: make
                .gauge("vllm_lb_index_pairs", "Blocks in the index, once for each upstream with them."),
            bytes: make.gauge("vllm_lb_index_bytes", "Memory of the prefix index."),
        }
    }
}
