//! Metrics of requests: how they ended, what they cost in time, and what the balancer added.

use std::sync::Arc;
use std::time::Duration;

use super::builder::MetricsBuilder;
use super::series::{Counter, IntGauge, MetricVec, SecondsHistogram};

/// The metrics of requests.
pub(in crate::observe) struct RequestMetrics {
    pub ended: MetricVec<Counter>,
    pub seconds: MetricVec<SecondsHistogram>,
    pub first_byte_seconds: MetricVec<SecondsHistogram>,
    pub upstream_first_byte_seconds: MetricVec<SecondsHistogram>,
    pub queue_seconds: MetricVec<SecondsHistogram>,
    pub inter_token_seconds: MetricVec<SecondsHistogram>,
    pub stream_gap_seconds: MetricVec<SecondsHistogram>,
    pub added_seconds: Arc<SecondsHistogram>,
    pub choices: MetricVec<Counter>,
    pub rejects: MetricVec<Counter>,
    pub attempt_failures: MetricVec<Counter>,
    pub retries: MetricVec<Counter>,
    pub broken_streams: MetricVec<Counter>,
    pub queue_ends: MetricVec<Counter>,
    pub queued: Arc<IntGauge>,
    pub in_flight: Arc<IntGauge>,
    pub peeked_bytes: Arc<IntGauge>,
}

/// The histograms of requests, in the order of their rows.
struct RequestTimeMetrics {
    seconds: MetricVec<SecondsHistogram>,
    first_byte: MetricVec<SecondsHistogram>,
    upstream_first_byte: MetricVec<SecondsHistogram>,
    queue: MetricVec<SecondsHistogram>,
    inter_token: MetricVec<SecondsHistogram>,
    stream_gap: MetricVec<SecondsHistogram>,
    added: Arc<SecondsHistogram>,
}

// === impl SecondsHistogram ===

impl SecondsHistogram {
    /// Adds a time.
    pub(in crate::observe) fn observe_time(&self, time: Duration) {
        self.observe(time.as_secs_f64());
    }
}

// === impl RequestMetrics ===

impl RequestMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        let ended = make.counters(
            "vllm_lb_requests_total",
            "requests that ended. `outcome` is `ok`, `client_error` or `server_error`, by the status of the \
             answer or by the error that a stream reported behind a status of 200; `client_gone` when the \
             client left; `unreached` when no upstream was reached; `broken` when the answer was cut off; or \
             the reason of a refusal",
            &["model", "route", "upstream", "status", "outcome"],
        );
        let times = RequestTimeMetrics::new(make);
        RequestMetrics {
            ended,
            seconds: times.seconds,
            first_byte_seconds: times.first_byte,
            upstream_first_byte_seconds: times.upstream_first_byte,
            queue_seconds: times.queue,
            inter_token_seconds: times.inter_token,
            stream_gap_seconds: times.stream_gap,
            added_seconds: times.added,
            choices: make.counters(
                "vllm_lb_choices_total",
                "choices of an upstream by what decided: `only` (there was one candidate), `prefix`, \
                 `session`, `load`, `turn` (round robin), or `retry` of every choice behind a failed attempt",
                &["reason"],
            ),
            rejects: make.counters(
                "vllm_lb_rejects_total",
                "refusals of the balancer's own ([reasons](troubleshooting.md))",
                &["reason"],
            ),
            attempt_failures: make.counters(
                "vllm_lb_attempt_failures_total",
                "attempts that failed before an answer began \
                 ([causes](troubleshooting.md#the-client-sees-502))",
                &["upstream", "cause"],
            ),
            retries: make.counters(
                "vllm_lb_retries_total",
                "attempts that followed a failed one, by the cause of the failure",
                &["cause"],
            ),
            broken_streams: make.counters(
                "vllm_lb_broken_streams_total",
                "streams that the balancer ended with an error event",
                &["upstream"],
            ),
            queue_ends: make.counters(
                "vllm_lb_queue_total",
                "requests that had to wait for room: `admitted`, `left`, `waited_out`, or `full` when the \
                 queue had no room either",
                &["end"],
            ),
            queued: make.gauge("vllm_lb_queued", "requests that wait for room"),
            in_flight: make.gauge("vllm_lb_in_flight", "requests of clients that have not ended"),
            peeked_bytes: make.gauge(
                "vllm_lb_peeked_bytes",
                "memory that is reserved for bodies and for held answers; `peek.memory` limits it",
            ),
        }
    }
}

// === impl RequestTimeMetrics ===

impl RequestTimeMetrics {
    fn new(make: &MetricsBuilder) -> Self {
        let by_model = |name, help| make.histogram_by(name, help, &["model"]);
        RequestTimeMetrics {
            seconds: by_model(
                "vllm_lb_request_seconds",
                "the time from the request's head to the end of the answer",
            ),
            first_byte: by_model(
                "vllm_lb_first_byte_seconds",
                "the time from the request's head to the first byte of the answer's body; for a stream the \
                 time to the first token",
            ),
            upstream_first_byte: make.histogram_by(
                "vllm_lb_upstream_first_byte_seconds",
                "the upstream's part of it: the time from the choice of the upstream to the first byte",
                &["upstream"],
            ),
            queue: by_model(
                "vllm_lb_queue_seconds",
                "the time in the queue, of requests that had to wait for room",
            ),
            inter_token: by_model(
                "vllm_lb_inter_token_seconds",
                "the mean time between two tokens of a stream, one value for each stream: from its first \
                 byte to its last piece, divided by its tokens but one. Only of streams that report two or \
                 more",
            ),
            stream_gap: by_model(
                "vllm_lb_stream_gap_seconds",
                "the longest time that the balancer waited for the next piece of a stream, one value for \
                 each stream of more than one piece",
            ),
            added: make.short_histogram(
                "vllm_lb_added_latency_seconds",
                "the time that the balancer added to an answer, see \
                 [what the balancer adds](#what-the-balancer-adds)",
            ),
        }
    }
}
