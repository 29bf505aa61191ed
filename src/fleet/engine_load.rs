//! The load of an engine by its own `/metrics`, which corrects what the balancer cannot see: the requests of
//! other clients, restarts of its process, the size of its cache.
//!
//! A successful probe starts a reading, at most one an interval, on a connection and in a task of its own.
//! Health never depends on it: an upstream whose metrics are missing, slow or unusable stays healthy, and is
//! read ever more rarely.
//!
//! Foreign requests are those that the engine counts and that no balancer sent:
//!
//! ```text
//! ours     = ours in flight a moment before it was asked + ours that were sent until it had answered
//! foreign  = running + waiting - ours, and no more than the reading before found
//! tokens   = foreign * waiting / (running + waiting) * tokens of a usual prompt of ours
//! ```
//!
//! `ours` is an upper bound of what the engine can have counted. An engine counts an aborted request until
//! its present step ends. Mostly that is within `OWN_REQUEST_LINGER`; for the rest, a foreign request has to
//! be found twice.
//!
//! Loads change all the time and go into atomics; the keeper receives every reading, and publishes a
//! snapshot only when it changes more than the load.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use http::StatusCode;

use super::keeper::KeeperMessage;
use super::upstream::{Live, Upstream};
use super::{Fleet, now};
use crate::aggregate::{EngineMetrics, parse_engine_metrics};
use crate::config::types::Health;

/// How many probe intervals a page is valid.
const REPORT_LIFETIME_INTERVALS: u32 = 3;

/// The least time that a page is valid: probes may come more often than the metrics change.
const MIN_REPORT_LIFETIME: Duration = Duration::from_secs(1);

/// The longest pause between two readings of an upstream that did not answer them.
const MAX_READ_PAUSE: Duration = Duration::from_secs(30);

/// How long after its end an engine may still count one of our requests.
const OWN_REQUEST_LINGER: Duration = Duration::from_millis(200);

/// The assumed prompt length before the first request of ours.
const DEFAULT_PROMPT_TOKENS: u64 = 1000;

/// The weight of the newest prompt in the moving average is one in this many.
const PROMPT_AVERAGE_WINDOW: u64 = 8;

/// The requests of other clients on an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForeignLoad {
    pub requests: u64,
    /// The prompt tokens of the waiting ones, estimated.
    pub tokens: u64,
}

/// The load by the latest page of metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GaugeReport {
    pub running: Option<u64>,
    pub waiting: Option<u64>,
    pub kv_usage: Option<f64>,
    /// Requests of others; `None` when the page does not count requests.
    pub foreign: Option<u64>,
}

/// The load of one upstream by its metrics, for the choice and for the admin interface. Only its reader
/// writes it, except for what leases add. Relaxed: each number is a hint.
pub(super) struct EngineLoad {
    requests: AtomicU64,
    tokens: AtomicU64,
    /// Until when the above is valid: milliseconds after `born`; 0 when there is nothing.
    until: AtomicU64,
    latest: ArcSwapOption<GaugeReport>,
    /// All requests that this balancer has sent.
    sent: AtomicU64,
    /// The moving average of our prompts' tokens; 0 before the first.
    usual: AtomicU64,
    born: Instant,
}

// === impl Told ===

impl EngineLoad {
    pub fn new(born: Instant) -> Self {
        EngineLoad {
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            until: AtomicU64::new(0),
            latest: ArcSwapOption::empty(),
            sent: AtomicU64::new(0),
            usual: AtomicU64::new(0),
            born,
        }
    }

    /// Counts a request that is sent. Of two concurrent calls the average may lose one, which is acceptable
    /// for an estimate.
    pub fn took(&self, tokens: u64) {
        self.sent.fetch_add(1, Relaxed);
        let usual = match self.usual.load(Relaxed) {
            0 => tokens,
            before => {
                (before - before / PROMPT_AVERAGE_WINDOW).saturating_add(tokens / PROMPT_AVERAGE_WINDOW)
            }
        };
        self.usual.store(usual, Relaxed);
    }

    pub fn foreign(&self, now: Instant) -> ForeignLoad {
        if !self.is_believed(now) {
            return ForeignLoad::default();
        }
        ForeignLoad { requests: self.requests.load(Relaxed), tokens: self.tokens.load(Relaxed) }
    }

    pub fn gauge_report(&self, now: Instant) -> Option<GaugeReport> {
        let latest = self.latest.load();
        latest.as_deref().filter(|_| self.is_believed(now)).copied()
    }

    fn is_believed(&self, now: Instant) -> bool {
        let until = self.until.load(Relaxed);
        until > 0 && now < self.born + Duration::from_millis(until)
    }

    pub fn set(&self, foreign: ForeignLoad, until: Instant) {
        self.requests.store(foreign.requests, Relaxed);
        self.tokens.store(foreign.tokens, Relaxed);
        let millis = until.saturating_duration_since(self.born).as_millis();
        self.until.store(u64::try_from(millis).unwrap_or(u64::MAX).max(1), Relaxed);
    }

    fn forget(&self) {
        self.until.store(0, Relaxed);
    }

    /// Estimates the tokens of so many foreign prompts.
    fn estimate(&self, prompts: u64) -> u64 {
        let usual = match self.usual.load(Relaxed) {
            0 => DEFAULT_PROMPT_TOKENS,
            usual => usual,
        };
        prompts.saturating_mul(usual)
    }
}

/// The counts of our own requests at one moment.
struct OwnCounts {
    active: u64,
    sent: u64,
    siblings: u64,
}

impl OwnCounts {
    fn now(live: &Live) -> Self {
        // In this order: a request that is sent in between is counted twice rather than not at all.
        let sent = live.engine_load.sent.load(Relaxed);
        let siblings = live.siblings.active.load(Relaxed);
        OwnCounts { active: live.gauges.active.load(Relaxed), sent, siblings }
    }

    /// An upper bound of the balancers' requests in flight since the mark: our own, and the last reported
    /// ones of siblings, which report many times in that span. The one place that defines what is not
    /// foreign.
    fn ours(&self, live: &Live) -> u64 {
        let sent = live.engine_load.sent.load(Relaxed).saturating_sub(self.sent);
        let siblings = self.siblings.max(live.siblings.active.load(Relaxed));
        self.active.saturating_add(sent).saturating_add(siblings)
    }
}

/// The result of one reading.
enum MetricsReading {
    Page(EngineMetrics),
    /// The upstream has no metrics, or none that are usable.
    Absent,
    /// No answer, or one that cannot be parsed.
    Failed,
}

/// Reads the metrics of one upstream.
struct MetricsReader {
    /// The earliest time of the next reading.
    due: Instant,
    /// The pause after a reading that found nothing.
    pause: Duration,
    /// The foreign requests of the page before.
    before: u64,
}

/// Reads an upstream's metrics after each successful probe. Runs until dropped.
pub(super) async fn read_metrics_forever(fleet: &Fleet, first: &Upstream) {
    let live = &first.live;
    let mut reader = MetricsReader { due: now(), pause: Duration::ZERO, before: 0 };
    loop {
        live.well.notified().await;
        let health = &fleet.rules.load_full().health;
        if !health.metrics {
            live.engine_load.forget();
            continue;
        }
        if now() < reader.due {
            continue;
        }
        // The settings may have changed. An upstream that has left the fleet gets no new requests.
        let upstream = fleet.snapshot().by_id(first.id).map(|entry| entry.upstream.clone());
        let Some(upstream) = upstream else { continue };
        if let Some(metrics) = reader.read(fleet, &upstream, health).await
            && fleet.keeper.send(KeeperMessage::Metrics { id: first.id, metrics }).await.is_err()
        {
            return;
        }
    }
}

// === impl Reader ===

impl MetricsReader {
    async fn read(&mut self, fleet: &Fleet, upstream: &Upstream, health: &Health) -> Option<EngineMetrics> {
        let (live, begun) = (&upstream.live, now());
        let mark = OwnCounts::now(live);
        tokio::time::sleep(OWN_REQUEST_LINGER).await;
        match fetch_metrics(fleet, upstream, health.timeout).await {
            MetricsReading::Page(metrics) => {
                // Half an interval: the next round of probing is never a little too early.
                (self.due, self.pause) = (begun + health.interval / 2, Duration::ZERO);
                let took = now().saturating_duration_since(begun);
                let believed = (health.interval * REPORT_LIFETIME_INTERVALS).max(MIN_REPORT_LIFETIME) + took;
                self.take_in(&metrics, mark.ours(live), live, now() + believed);
                return Some(metrics);
            }
            MetricsReading::Absent => {
                live.engine_load.forget();
                self.before = 0;
            }
            // What was said before grows old by itself.
            MetricsReading::Failed => {}
        }
        self.pause = (self.pause * 2).max(health.interval * 2).min(MAX_READ_PAUSE.max(health.interval));
        self.due = now() + self.pause;
        None
    }

    fn take_in(&mut self, metrics: &EngineMetrics, ours: u64, live: &Live, until: Instant) {
        let EngineMetrics { running, waiting, kv_usage, .. } = *metrics;
        let counted = running.map(|running| running.saturating_add(waiting.unwrap_or(0)));
        let found = counted.unwrap_or(0).saturating_sub(ours);
        let requests = found.min(std::mem::replace(&mut self.before, found));
        let waits = share(requests, waiting.unwrap_or(0), counted.unwrap_or(0));
        let foreign = ForeignLoad { requests, tokens: live.engine_load.estimate(waits) };
        let telling = GaugeReport { running, waiting, kv_usage, foreign: counted.map(|_| requests) };
        live.engine_load.latest.store(Some(telling.into()));
        live.engine_load.set(foreign, until);
    }
}

/// The part of `whole` that `count` has in it, rounded down.
fn share(count: u64, part: u64, whole: u64) -> u64 {
    let part = u128::from(count) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(part).unwrap_or(u64::MAX)
}

async fn fetch_metrics(fleet: &Fleet, upstream: &Upstream, limit: Duration) -> MetricsReading {
    let Ok(answer) = fleet.client().scrape(upstream, "/metrics", limit).await else {
        return MetricsReading::Failed;
    };
    if answer.status() != StatusCode::OK {
        return MetricsReading::Absent;
    }
    let metrics = parse_engine_metrics(answer.body());
    if metrics.is_empty() { MetricsReading::Absent } else { MetricsReading::Page(metrics) }
}

#[cfg(test)]
mod tests;
