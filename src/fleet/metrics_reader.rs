//! Reads the load of an engine from its own `/metrics`, which show what the balancer cannot see: the requests
//! of other clients, restarts of the process, the size of the cache.
//!
//! A successful probe starts a reading, at most one an interval, on a connection and in a task of its own. Of
//! several balancers one probes and reads for all: see `shared_probes`.
//! Health never depends on metrics: an upstream whose metrics are missing, slow or invalid stays healthy, and
//! is read less and less often.
//!
//! Foreign requests are the requests that the engine counts and no balancer sent:
//!
//! ```text
//! own      = own requests in flight a moment before the reading + own requests sent until the page came
//!            + the most requests that siblings reported in that time and a moment after it
//! foreign  = running + waiting - own, and no more than the previous reading found
//! tokens   = foreign * waiting / (running + waiting) * the average tokens of our own prompts
//! ```
//!
//! `own` is an upper bound of our requests that the engine can have counted. An engine counts an aborted
//! request until its present step ends, mostly within `OWN_REQUEST_LINGER`; to exclude the rest, a foreign
//! request has to be found twice.
//!
//! Loads change all the time and are stored in atomics; the keeper receives every reading and publishes a
//! snapshot only when more than the load changes.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use http::StatusCode;

use super::client::MAX_SCRAPE_BYTES;
use super::engine_load::{ForeignLoad, GaugeReport};
use super::keeper_message::KeeperMessage;
use super::probe_connection::ProbeConnection;
use super::upstream::{Live, Upstream};
use super::{Fleet, now};
use crate::aggregate::{EngineMetrics, parse_engine_metrics};
use crate::config::types::Health;

/// The number of probe intervals for which a page is valid.
const REPORT_LIFETIME_INTERVALS: u32 = 3;

/// The least time for which a page is valid: probes may come more often than the metrics change.
const MIN_REPORT_LIFETIME: Duration = Duration::from_secs(1);

/// The longest pause between two readings of an upstream without usable metrics.
const MAX_READ_PAUSE: Duration = Duration::from_secs(30);

/// The time after its end for which an engine may still count one of our requests.
const OWN_REQUEST_LINGER: Duration = Duration::from_millis(200);

/// The time after which siblings have reported the requests that a page may count.
const SIBLING_REPORT_DELAY: Duration = Duration::from_millis(100);

/// The counts of our own requests at one moment.
struct OwnCounts {
    active: u64,
    sent: u64,
}

impl OwnCounts {
    fn now(live: &Live) -> Self {
        // In this order a request that is sent in between is counted twice; the other order would miss it.
        let sent = live.engine_load.sent.load(Relaxed);
        live.siblings_peak.store(live.siblings.active.load(Relaxed), Relaxed);
        OwnCounts { active: live.gauges.active.load(Relaxed), sent }
    }

    /// Returns an upper bound of the balancers' requests in flight since these counts were taken: our own,
    /// and the most that siblings reported in that span. The one place that defines which requests are not
    /// foreign.
    fn upper_bound(&self, live: &Live) -> u64 {
        let sent = live.engine_load.sent.load(Relaxed).saturating_sub(self.sent);
        let siblings = live.siblings_peak.load(Relaxed).max(live.siblings.active.load(Relaxed));
        self.active.saturating_add(sent).saturating_add(siblings)
    }
}

/// The result of one reading.
enum MetricsReading {
    Page(EngineMetrics),
    /// The upstream has no metrics, or none of the known ones.
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
    /// The foreign requests of the previous page.
    before: u64,
    /// Our own requests in flight when the page came.
    active: u64,
    /// When the previous page was read; `None` before the first.
    read_at: Option<Instant>,
    connection: ProbeConnection,
}

/// Reads an upstream's metrics after each successful probe. Runs until dropped.
pub(super) async fn read_metrics_forever(fleet: &Fleet, first: &Upstream) {
    let live = &first.live;
    let mut reader = MetricsReader::new();
    loop {
        live.well.notified().await;
        let health = &fleet.rules.load_full().health;
        if !health.metrics {
            live.engine_load.invalidate();
            continue;
        }
        if now() < reader.due {
            continue;
        }
        // The settings may have changed. The metrics of an upstream that has left the fleet are not needed.
        let upstream = fleet.snapshot().by_id(first.id).map(|entry| entry.upstream.clone());
        let Some(upstream) = upstream else { continue };
        if let Some(metrics) = reader.read(fleet, &upstream, health).await
            && fleet.keeper.send(KeeperMessage::Metrics { id: first.id, metrics }).await.is_err()
        {
            return;
        }
    }
}

// === impl MetricsReader ===

impl MetricsReader {
    fn new() -> Self {
        let connection = ProbeConnection::default();
        MetricsReader { due: now(), pause: Duration::ZERO, before: 0, active: 0, read_at: None, connection }
    }

    async fn read(
        &mut self,
        fleet: &Fleet,
        upstream: &Arc<Upstream>,
        health: &Health,
    ) -> Option<EngineMetrics> {
        let (live, begun) = (&upstream.live, now());
        let lifetime = report_lifetime(health.interval);
        if self.read_at.is_none_or(|read_at| begun >= read_at + lifetime) {
            // The previous page may have been a sibling's.
            self.before = upstream.foreign(begun).requests;
        }
        let mark = OwnCounts::now(live);
        tokio::time::sleep(OWN_REQUEST_LINGER).await;
        match self.fetch(fleet, upstream, health.timeout).await {
            MetricsReading::Page(metrics) => {
                (self.read_at, self.active) = (Some(now()), live.gauges.active.load(Relaxed));
                let circle = fleet.shared.circle();
                if !circle.live.is_alone() {
                    tokio::time::sleep(SIBLING_REPORT_DELAY).await;
                }
                // Half an interval, so that the next probe never comes slightly too early for a reading.
                (self.due, self.pause) = (begun + health.interval / 2, Duration::ZERO);
                let took = now().saturating_duration_since(begun);
                let foreign = self.store(&metrics, mark.upper_bound(live), live, now() + lifetime + took);
                let view = fleet.duty_view(upstream, None, &circle, now());
                if live.duty().is_prober(&view) {
                    fleet.shared.put_engine(upstream, &metrics, foreign);
                }
                return Some(metrics);
            }
            MetricsReading::Absent => {
                live.engine_load.invalidate();
                self.before = 0;
            }
            // The previous reading expires by itself.
            MetricsReading::Failed => {}
        }
        self.pause = (self.pause * 2).max(health.interval * 2).min(MAX_READ_PAUSE.max(health.interval));
        self.due = now() + self.pause;
        None
    }

    /// Stores the load of a page; `own` is the upper bound of the balancers' requests in it. Returns the load
    /// of other clients, where the page counts requests.
    fn store(
        &mut self,
        metrics: &EngineMetrics,
        own: u64,
        live: &Live,
        until: Instant,
    ) -> Option<ForeignLoad> {
        let EngineMetrics { running, waiting, kv_usage, .. } = *metrics;
        let counted = running.map(|running| running.saturating_add(waiting.unwrap_or(0)));
        let found = counted.unwrap_or(0).saturating_sub(own);
        let requests = found.min(std::mem::replace(&mut self.before, found));
        let foreign_waiting = share(requests, waiting.unwrap_or(0), counted.unwrap_or(0));
        let foreign = ForeignLoad { requests, tokens: live.engine_load.estimate(foreign_waiting) };
        // The siblings' reports have come meanwhile that were on their way with the page.
        let believed = self.active.saturating_add(live.siblings.active.load(Relaxed));
        let unaccounted = counted.map(|counted| counted.cast_signed().saturating_sub_unsigned(believed));
        let foreign_requests = counted.map(|_| requests);
        let report = GaugeReport { running, waiting, kv_usage, foreign: foreign_requests, unaccounted };
        live.engine_load.latest.store(Some(report.into()));
        live.engine_load.set(foreign, until);
        counted.map(|_| foreign)
    }

    async fn fetch(&mut self, fleet: &Fleet, upstream: &Arc<Upstream>, limit: Duration) -> MetricsReading {
        let answer = self.connection.get(fleet.client(), upstream, "/metrics", limit, MAX_SCRAPE_BYTES).await;
        let Ok(answer) = answer else { return MetricsReading::Failed };
        if answer.status() != StatusCode::OK {
            return MetricsReading::Absent;
        }
        let metrics = parse_engine_metrics(answer.body());
        if metrics.is_empty() { MetricsReading::Absent } else { MetricsReading::Page(metrics) }
    }
}

/// Returns the time for which a page is valid.
pub(super) fn report_lifetime(interval: Duration) -> Duration {
    (interval * REPORT_LIFETIME_INTERVALS).max(MIN_REPORT_LIFETIME)
}

/// Returns `count * part / whole`, rounded down.
fn share(count: u64, part: u64, whole: u64) -> u64 {
    let part = u128::from(count) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(part).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
