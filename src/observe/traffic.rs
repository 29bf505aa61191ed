//! The traffic of the balancer and of each upstream in numbers, for the overview of the admin API.
//!
//! Counters begin at 0 with the process, those of an upstream when it enters the fleet. An upstream has a row
//! from its first change of state to its removal, so that rows are bounded by the fleet. A reader and the
//! requests share no lock: a change of the fleet replaces the table of rows.
//!
//! Never: read to decide something.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::recent::RecentTimes;
use crate::reply::usage::Usage;

/// The largest number of upstreams that have a row.
const MAX_UPSTREAM_ROWS: usize = 10_000;

/// The numbers of one upstream at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpstreamTraffic {
    /// Requests that ended and whose last attempt was on the upstream.
    pub requests: u64,
    /// Attempts that failed, and answers with a status of 500 or more.
    pub failures: u64,
    /// Prompt tokens believed to be in the upstream's cache, of answers that report cached tokens.
    pub predicted_tokens: u64,
    /// Prompt tokens that the upstream reported to be in its cache.
    pub reported_tokens: u64,
    /// All prompt tokens of the answers that report cached tokens.
    pub compared_tokens: u64,
    /// Prompt tokens by the answers' usage.
    pub prompt_tokens: u64,
    /// Output tokens by the answers' usage.
    pub output_tokens: u64,
    /// Times to the first byte in the last minute in milliseconds: the median and the 90th percentile.
    pub first_byte_ms: Option<[f64; 2]>,
}

/// The numbers of the balancer at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BalancerTraffic {
    /// Requests of clients that ended.
    pub requests: u64,
    /// Requests that ended with a status of 500 or more, or with a broken answer.
    pub errors: u64,
    /// Refusals of the balancer's own.
    pub rejects: u64,
    /// Attempts that followed a failed one.
    pub retries: u64,
    /// Streams that ended with an error event of the balancer's.
    pub broken_streams: u64,
    /// Requests of clients that have not ended.
    pub in_flight: u64,
    /// Requests that wait for room.
    pub queued: u64,
    /// Connections of clients that are open.
    pub connections: u64,
    /// Memory reserved for request bodies.
    pub peeked_bytes: u64,
    /// Prompt tokens believed to be in an upstream's cache, of answers that report cached tokens.
    pub predicted_tokens: u64,
    /// Prompt tokens that an upstream reported to be in its cache.
    pub reported_tokens: u64,
    /// All prompt tokens of the answers that report cached tokens.
    pub compared_tokens: u64,
    /// Captured calls that are stored, and those that were lost.
    pub traces_stored: u64,
    pub traces_lost: u64,
    /// Times to the first byte in the last minute in milliseconds: the median, the 90th and the 99th
    /// percentile.
    pub first_byte_ms: Option<[f64; 3]>,
}

/// The end of a request of a client, as far as it is counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndedRequest<'a> {
    pub upstream: Option<&'a str>,
    pub status: u16,
    pub outcome: &'static str,
    pub first_byte: Option<Duration>,
    pub usage: Option<Usage>,
}

/// The counters of one upstream.
#[derive(Debug, Default)]
struct UpstreamCounters {
    requests: AtomicU64,
    failures: AtomicU64,
    predicted: AtomicU64,
    reported: AtomicU64,
    compared: AtomicU64,
    prompt: AtomicU64,
    output: AtomicU64,
    first_byte: RecentTimes,
}

type CounterRows = HashMap<Box<str>, Arc<UpstreamCounters>>;

/// The counters of one balancer.
#[derive(Debug)]
pub(super) struct TrafficCounters {
    started: Instant,
    requests: AtomicU64,
    errors: AtomicU64,
    pub(super) rejects: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) broken_streams: AtomicU64,
    predicted: AtomicU64,
    reported: AtomicU64,
    compared: AtomicU64,
    pub(super) traces_stored: AtomicU64,
    pub(super) traces_lost: AtomicU64,
    first_byte: RecentTimes,
    upstreams: ArcSwap<CounterRows>,
}

// === impl TrafficCounters ===

impl Default for TrafficCounters {
    fn default() -> Self {
        TrafficCounters {
            started: Instant::now(),
            requests: AtomicU64::default(),
            errors: AtomicU64::default(),
            rejects: AtomicU64::default(),
            retries: AtomicU64::default(),
            broken_streams: AtomicU64::default(),
            predicted: AtomicU64::default(),
            reported: AtomicU64::default(),
            compared: AtomicU64::default(),
            traces_stored: AtomicU64::default(),
            traces_lost: AtomicU64::default(),
            first_byte: RecentTimes::default(),
            upstreams: ArcSwap::default(),
        }
    }
}

impl TrafficCounters {
    /// The time since the start.
    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Gives the upstream a row, if it has none.
    pub(super) fn enter(&self, upstream: &str) {
        if self.upstreams.load().contains_key(upstream) {
            return;
        }
        let row: Arc<UpstreamCounters> = Arc::default();
        self.upstreams.rcu(|rows| {
            let mut rows = CounterRows::clone(rows);
            if rows.len() < MAX_UPSTREAM_ROWS {
                rows.entry(upstream.into()).or_insert_with(|| row.clone());
            }
            rows
        });
    }

    /// Removes the row of an upstream that has left the fleet.
    pub(super) fn leave(&self, upstream: &str) {
        self.upstreams.rcu(|rows| {
            let mut rows = CounterRows::clone(rows);
            rows.remove(upstream);
            rows
        });
    }

    fn with_row(&self, upstream: &str, count: impl FnOnce(&UpstreamCounters)) {
        if let Some(row) = self.upstreams.load().get(upstream) {
            count(row);
        }
    }

    /// Counts a request of a client that has ended.
    pub(super) fn request_done(&self, ended: EndedRequest<'_>) {
        self.requests.fetch_add(1, Relaxed);
        let is_broken = matches!(ended.outcome, "broken" | "unreached");
        if is_broken || ended.status >= 500 {
            self.errors.fetch_add(1, Relaxed);
        }
        let at = self.started.elapsed();
        if let Some(first) = ended.first_byte {
            self.first_byte.record(first, at);
        }
        let Some(upstream) = ended.upstream else { return };
        self.with_row(upstream, |row| {
            row.requests.fetch_add(1, Relaxed);
            // Failed attempts are counted where they fail.
            if ended.outcome == "server_error" {
                row.failures.fetch_add(1, Relaxed);
            }
            if let Some(first) = ended.first_byte {
                row.first_byte.record(first, at);
            }
            let usage = ended.usage.unwrap_or_default();
            row.prompt.fetch_add(usage.prompt_tokens.unwrap_or(0), Relaxed);
            row.output.fetch_add(usage.output_tokens.unwrap_or(0), Relaxed);
        });
    }

    /// Counts a failed attempt.
    pub(super) fn attempt_failed(&self, upstream: &str) {
        self.with_row(upstream, |row| {
            row.failures.fetch_add(1, Relaxed);
        });
    }

    /// Counts the tokens of a prompt, and those of them in the cache: by the prediction and by the engine's
    /// report.
    pub(super) fn cache_compared(&self, upstream: &str, prompt: u64, predicted: u64, reported: u64) {
        self.compared.fetch_add(prompt, Relaxed);
        self.predicted.fetch_add(predicted, Relaxed);
        self.reported.fetch_add(reported, Relaxed);
        self.with_row(upstream, |row| {
            row.compared.fetch_add(prompt, Relaxed);
            row.predicted.fetch_add(predicted, Relaxed);
            row.reported.fetch_add(reported, Relaxed);
        });
    }

    /// The numbers of the balancer, but for those that gauges have.
    pub(super) fn balancer(&self) -> BalancerTraffic {
        BalancerTraffic {
            requests: self.requests.load(Relaxed),
            errors: self.errors.load(Relaxed),
            rejects: self.rejects.load(Relaxed),
            retries: self.retries.load(Relaxed),
            broken_streams: self.broken_streams.load(Relaxed),
            predicted_tokens: self.predicted.load(Relaxed),
            reported_tokens: self.reported.load(Relaxed),
            compared_tokens: self.compared.load(Relaxed),
            traces_stored: self.traces_stored.load(Relaxed),
            traces_lost: self.traces_lost.load(Relaxed),
            first_byte_ms: self.first_byte.percentiles([0.5, 0.9, 0.99], self.started.elapsed()),
            ..BalancerTraffic::default()
        }
    }

    /// The numbers of an upstream; 0 for one without a row.
    pub(super) fn upstream(&self, name: &str) -> UpstreamTraffic {
        let rows = self.upstreams.load();
        let Some(row) = rows.get(name) else { return UpstreamTraffic::default() };
        UpstreamTraffic {
            requests: row.requests.load(Relaxed),
            failures: row.failures.load(Relaxed),
            predicted_tokens: row.predicted.load(Relaxed),
            reported_tokens: row.reported.load(Relaxed),
            compared_tokens: row.compared.load(Relaxed),
            prompt_tokens: row.prompt.load(Relaxed),
            output_tokens: row.output.load(Relaxed),
            first_byte_ms: row.first_byte.percentiles([0.5, 0.9], self.started.elapsed()),
        }
    }
}
