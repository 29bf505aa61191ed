//! What an upstream tells of itself: its `/metrics`, read to correct what the balancer cannot see. What other
//! clients have in flight there, whether its process began anew, how much its cache holds.
//!
//! A round of probing that went well starts a reading, at most one an interval, on a connection of its own
//! and in its own time. No verdict on health waits for it or follows from it: an upstream whose metrics are
//! not there, are slow or make no sense is as good as any, and is asked for them ever more rarely.
//!
//! What is foreign is what the engine counts and no balancer sent:
//!
//! ```text
//! ours     = ours in flight a moment before it was asked + ours that were sent until it had answered
//! foreign  = running + waiting - ours, and no more than the reading before found
//! tokens   = foreign * waiting / (running + waiting) * tokens of a usual prompt of ours
//! ```
//!
//! `ours` is the most that the engine can have counted. It counts a request that its client has given up
//! until its present step ends: mostly that is within the moment, and for the rest a foreign request has to
//! be found twice.
//!
//! Loads change all the time and go into atomics; the keeper hears of every reading, and publishes only what
//! is worth a snapshot.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use http::StatusCode;

use super::keeper::Word;
use super::upstream::{Live, Upstream};
use super::{Fleet, now};
use crate::aggregate::{Truth, parse_truth};
use crate::config::types::Health;

/// So many intervals long a page is believed.
const BELIEVED: u32 = 3;

/// And so long at the least: probes may come more often than metrics say anything new.
const BELIEVED_LEAST: Duration = Duration::from_secs(1);

/// Between two questions, at the most, to one that did not answer them.
const RARELY: Duration = Duration::from_secs(30);

/// For so long after its end one of our requests may still be counted.
const MOMENT: Duration = Duration::from_millis(200);

/// Tokens of a prompt, where none of ours has been seen.
const USUAL: u64 = 1000;

/// A prompt weighs one part in so many in what is usual.
const USUAL_OF: u64 = 8;

/// What others have in flight on an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    pub requests: u64,
    /// Prompt tokens of those that wait, estimated.
    pub tokens: u64,
}

/// The latest page, as far as it is about load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Telling {
    pub running: Option<u64>,
    pub waiting: Option<u64>,
    pub kv_usage: Option<f64>,
    /// Requests of others; `None` when the page does not count requests.
    pub foreign: Option<u64>,
}

/// What is known of one upstream, for those who choose and for those who look. Written by its reader alone,
/// but for what leases add. Relaxed: each number is a hint.
pub(super) struct Told {
    requests: AtomicU64,
    tokens: AtomicU64,
    /// Until when the above is believed: milliseconds after `born`; 0 when there is nothing.
    until: AtomicU64,
    latest: ArcSwapOption<Telling>,
    /// Requests of ours that were ever sent.
    sent: AtomicU64,
    /// Tokens of a usual prompt of ours; 0 when there was none.
    usual: AtomicU64,
    born: Instant,
}

// === impl Told ===

impl Told {
    pub fn new(born: Instant) -> Self {
        Told {
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            until: AtomicU64::new(0),
            latest: ArcSwapOption::empty(),
            sent: AtomicU64::new(0),
            usual: AtomicU64::new(0),
            born,
        }
    }

    /// A request of ours is sent. Two at once may both be forgotten in what is usual, which is an estimate.
    pub fn took(&self, tokens: u64) {
        self.sent.fetch_add(1, Relaxed);
        let usual = match self.usual.load(Relaxed) {
            0 => tokens,
            before => (before - before / USUAL_OF).saturating_add(tokens / USUAL_OF),
        };
        self.usual.store(usual, Relaxed);
    }

    pub fn foreign(&self, now: Instant) -> Foreign {
        if !self.is_believed(now) {
            return Foreign::default();
        }
        Foreign { requests: self.requests.load(Relaxed), tokens: self.tokens.load(Relaxed) }
    }

    pub fn telling(&self, now: Instant) -> Option<Telling> {
        let latest = self.latest.load();
        latest.as_deref().filter(|_| self.is_believed(now)).copied()
    }

    fn is_believed(&self, now: Instant) -> bool {
        let until = self.until.load(Relaxed);
        until > 0 && now < self.born + Duration::from_millis(until)
    }

    pub fn set(&self, foreign: Foreign, until: Instant) {
        self.requests.store(foreign.requests, Relaxed);
        self.tokens.store(foreign.tokens, Relaxed);
        let millis = until.saturating_duration_since(self.born).as_millis();
        self.until.store(u64::try_from(millis).unwrap_or(u64::MAX).max(1), Relaxed);
    }

    fn forget(&self) {
        self.until.store(0, Relaxed);
    }

    /// Tokens that so many prompts of others may have.
    fn estimate(&self, prompts: u64) -> u64 {
        let usual = match self.usual.load(Relaxed) {
            0 => USUAL,
            usual => usual,
        };
        prompts.saturating_mul(usual)
    }
}

/// The counts of our own requests at one moment.
struct Mark {
    active: u64,
    sent: u64,
    siblings: u64,
}

impl Mark {
    fn now(live: &Live) -> Self {
        // In this order: one that is sent in between is counted twice rather than not at all.
        let sent = live.told.sent.load(Relaxed);
        let siblings = live.siblings.active.load(Relaxed);
        Mark { active: live.gauges.active.load(Relaxed), sent, siblings }
    }

    /// The most requests in flight since the mark that are nobody else's: ours, and what siblings say of
    /// theirs, which they say again many times in a moment. The one place that says what is not foreign.
    fn ours(&self, live: &Live) -> u64 {
        let sent = live.told.sent.load(Relaxed).saturating_sub(self.sent);
        let siblings = self.siblings.max(live.siblings.active.load(Relaxed));
        self.active.saturating_add(sent).saturating_add(siblings)
    }
}

/// What one reading found.
enum Read {
    Page(Truth),
    /// It has no metrics, or none that are of use.
    Absent,
    /// No answer, or none that can be read.
    Failed,
}

/// Reads the metrics of one upstream.
struct Reader {
    /// Not before this.
    due: Instant,
    /// After a reading that found nothing.
    pause: Duration,
    /// Foreign requests by the page before.
    before: u64,
}

/// Reads an upstream's metrics after rounds of probing that went well. Ends only by being dropped.
pub(super) async fn listen_forever(fleet: &Fleet, first: &Upstream) {
    let live = &first.live;
    let mut reader = Reader { due: now(), pause: Duration::ZERO, before: 0 };
    loop {
        live.well.notified().await;
        let health = &fleet.rules.load_full().health;
        if !health.metrics {
            live.told.forget();
            continue;
        }
        if now() < reader.due {
            continue;
        }
        // Its settings may be others by now; one that has left the fleet gets no requests to choose.
        let upstream = fleet.snapshot().by_id(first.id).map(|entry| entry.upstream.clone());
        let Some(upstream) = upstream else { continue };
        if let Some(truth) = reader.read(fleet, &upstream, health).await
            && fleet.keeper.send(Word::Told { id: first.id, truth }).await.is_err()
        {
            return;
        }
    }
}

// === impl Reader ===

impl Reader {
    async fn read(&mut self, fleet: &Fleet, upstream: &Upstream, health: &Health) -> Option<Truth> {
        let (live, begun) = (&upstream.live, now());
        let mark = Mark::now(live);
        tokio::time::sleep(MOMENT).await;
        match ask(fleet, upstream, health.timeout).await {
            Read::Page(truth) => {
                // Half an interval: the next round of probing is never a little too early.
                (self.due, self.pause) = (begun + health.interval / 2, Duration::ZERO);
                let took = now().saturating_duration_since(begun);
                let believed = (health.interval * BELIEVED).max(BELIEVED_LEAST) + took;
                self.take_in(&truth, mark.ours(live), live, now() + believed);
                return Some(truth);
            }
            Read::Absent => {
                live.told.forget();
                self.before = 0;
            }
            // What was said before grows old by itself.
            Read::Failed => {}
        }
        self.pause = (self.pause * 2).max(health.interval * 2).min(RARELY.max(health.interval));
        self.due = now() + self.pause;
        None
    }

    fn take_in(&mut self, truth: &Truth, ours: u64, live: &Live, until: Instant) {
        let Truth { running, waiting, kv_usage, .. } = *truth;
        let counted = running.map(|running| running.saturating_add(waiting.unwrap_or(0)));
        let found = counted.unwrap_or(0).saturating_sub(ours);
        let requests = found.min(std::mem::replace(&mut self.before, found));
        let waits = share(requests, waiting.unwrap_or(0), counted.unwrap_or(0));
        let foreign = Foreign { requests, tokens: live.told.estimate(waits) };
        let telling = Telling { running, waiting, kv_usage, foreign: counted.map(|_| requests) };
        live.told.latest.store(Some(telling.into()));
        live.told.set(foreign, until);
    }
}

/// The part of `whole` that `count` has in it, rounded down.
fn share(count: u64, part: u64, whole: u64) -> u64 {
    let part = u128::from(count) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(part).unwrap_or(u64::MAX)
}

async fn ask(fleet: &Fleet, upstream: &Upstream, limit: Duration) -> Read {
    let Ok(answer) = fleet.client().scrape(upstream, "/metrics", limit).await else { return Read::Failed };
    if answer.status() != StatusCode::OK {
        return Read::Absent;
    }
    let truth = parse_truth(answer.body());
    if truth.is_empty() { Read::Absent } else { Read::Page(truth) }
}

#[cfg(test)]
mod tests;
