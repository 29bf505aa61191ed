//! Metrics of the exchange with siblings.

use std::sync::Arc;

use super::builder::MetricsBuilder;
use super::series::{Counter, FloatGauge, IntGauge, MetricVec, SecondsHistogram};

/// The metrics of Redis and the siblings.
pub(in crate::observe) struct ExchangeMetrics {
    pub redis_up: Arc<IntGauge>,
    pub members_shared: Arc<IntGauge>,
    pub redis_failures: MetricVec<Counter>,
    pub round_trip: Arc<FloatGauge>,
    pub lag: Arc<SecondsHistogram>,
    pub messages: MetricVec<Counter>,
    pub bytes: MetricVec<Counter>,
    pub lost: MetricVec<Counter>,
    pub found: MetricVec<Counter>,
    pub siblings: Arc<IntGauge>,
    pub age: Arc<FloatGauge>,
}

impl ExchangeMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        ExchangeMetrics {
            redis_up: make.gauge("vllm_lb_redis_up", "1 while Redis accepts the balancer's messages"),
            members_shared: make.gauge(
                "vllm_lb_members_shared",
                "1 while changes of upstreams at run time reach the balancers on the same Redis",
            ),
            redis_failures: make.counters(
                "vllm_lb_redis_failures_total",
                "failures with Redis: `lost`, `silent`, `password`, `permission`, `full`, `refused`, \
                 `strange` ([meanings](troubleshooting.md#redis-is-away))",
                &["cause"],
            ),
            round_trip: make.float_gauge(
                "vllm_lb_redis_round_trip_seconds",
                "how long Redis took for the last reading of its clock, which is every two seconds",
            ),
            lag: make.short_histogram(
                "vllm_lb_exchange_lag_seconds",
                "the age of the newest message when it was read, one value for each reading of the stream",
            ),
            messages: make.counters(
                "vllm_lb_exchange_messages_total",
                "messages that were sent to siblings (`said`) and received from them (`heard`)",
                &["way"],
            ),
            bytes: make.counters("vllm_lb_exchange_bytes_total", "the bytes of these messages", &["way"]),
            lost: make.counters(
                "vllm_lb_exchange_lost_total",
                "what was lost: events that were never sent (`unsaid`), messages of other versions \
                 (`unreadable`), ends of chains whose beginning is unknown and was requested (`unplaced`), \
                 chains of siblings with another `block_bytes` or release, which are ignored (`foreign`), \
                 changes of upstreams that cannot be applied here (`member`), and lookups that Redis did not \
                 answer in time (`lookup`)",
                &["what"],
            ),
            found: make.counters(
                "vllm_lb_responses_found_total",
                "searches for stored responses, by what named the upstream: the `id`, the `memory` of this \
                 balancer or of siblings, the fact that there is one upstream (`alone`), `redis`, or all \
                 upstreams that were `asked`; or `nowhere`, or `unsure` when an upstream did not answer",
                &["by"],
            ),
            siblings: make.gauge("vllm_lb_siblings", "other balancers on the same Redis"),
            age: make.float_gauge(
                "vllm_lb_siblings_age_seconds",
                "the age of the oldest message that counts, among siblings with requests in flight",
            ),
        }
    }
}
