//! Metrics of tokens: the usage that answers report, the size of the prefix index, and its accuracy.

use std::sync::Arc;

use super::builder::MetricsBuilder;
use super::series::{Counter, IntGauge, MetricVec};

/// The metrics of tokens and of the prefix index.
pub(in crate::observe) struct CacheMetrics {
    pub tokens: MetricVec<Counter>,
    pub prompts: MetricVec<Counter>,
    pub predicted: MetricVec<Counter>,
    pub reported: MetricVec<Counter>,
    pub trimmed: MetricVec<Counter>,
    pub blocks: Arc<IntGauge>,
    pub pairs: Arc<IntGauge>,
    pub bytes: Arc<IntGauge>,
}

impl CacheMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        CacheMetrics {
            tokens: make.counters(
                "vllm_lb_tokens_total",
                "tokens that answers reported: `prompt`, `cached` (of the prompt), `output`, `reasoning` (of \
                 the output). Streams are asked for them",
                &["model", "route", "kind"],
            ),
            prompts: make.counters(
                "vllm_lb_cache_prompt_tokens_total",
                "prompt tokens of the answers that report how many of them were cached; the next two divided \
                 by it are the predicted and the actual share of hits",
                &["upstream"],
            ),
            predicted: make.counters(
                "vllm_lb_cache_predicted_tokens_total",
                "prompt tokens that the balancer believed to be in the upstream's cache, for answers that \
                 report how many were",
                &["upstream"],
            ),
            reported: make.counters(
                "vllm_lb_cache_reported_tokens_total",
                "prompt tokens of the same answers that the upstream reported as cached",
                &["upstream"],
            ),
            trimmed: make.counters(
                "vllm_lb_cache_trimmed_total",
                "how often the upstream held far less than was believed, so that the balancer forgot the \
                 oldest part",
                &["upstream"],
            ),
            blocks: make.gauge("vllm_lb_index_blocks", "blocks of prompts that are remembered"),
            pairs: make.gauge(
                "vllm_lb_index_pairs",
                "the same, counted once for each upstream that holds them; `balance.index_blocks` limits it",
            ),
            bytes: make.gauge("vllm_lb_index_bytes", "the memory of the prefix index"),
        }
    }
}
