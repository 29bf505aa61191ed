//! Metrics of the exchange with siblings.

use prometheus::{Gauge, IntCounterVec, IntGauge};

use super::builder::MetricsBuilder;

/// The metrics of Redis and the siblings.
pub(in crate::observe) struct ExchangeMetrics {
    pub redis_up: IntGauge,
    pub redis_failures: IntCounterVec,
    pub messages: IntCounterVec,
    pub bytes: IntCounterVec,
    pub lost: IntCounterVec,
    pub found: IntCounterVec,
    pub siblings: IntGauge,
    pub age: Gauge,
}

impl ExchangeMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        ExchangeMetrics {
            redis_up: make.gauge("vllm_lb_redis_up", "1 while Redis accepts messages, else 0."),
            redis_failures: make.counters(
                "vllm_lb_redis_failures_total",
                "What did not work with Redis, by cause.",
                &["cause"],
            ),
            messages: make.counters(
                "vllm_lb_exchange_messages_total",
                "Messages to siblings and from them.",
                &["way"],
            ),
            bytes: make.counters("vllm_lb_exchange_bytes_total", "Bytes of messages.", &["way"]),
            lost: make.counters(
                "vllm_lb_exchange_lost_total",
                "What did not reach a sibling, or could not be used.",
                &["what"],
            ),
            found: make.counters(
                "vllm_lb_responses_found_total",
                "Stored responses that were looked for, by what told where they are.",
                &["by"],
            ),
            siblings: make.gauge("vllm_lb_siblings", "Other balancers on the same Redis."),
            age: make.enter(Gauge::new(
                "vllm_lb_siblings_age_seconds",
                "Age of the oldest message of a sibling with requests in flight.",
            )),
        }
    }
}
