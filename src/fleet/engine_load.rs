//! The load of an engine by its own `/metrics`, as its metrics reader last stored it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use arc_swap::ArcSwapOption;

use super::millis;

/// The assumed length of a prompt before our first request, in tokens.
pub(super) const DEFAULT_PROMPT_TOKENS: u64 = 1000;

/// The weight of the newest prompt in the moving average is one in this many.
const PROMPT_AVERAGE_WINDOW: u64 = 8;

/// The requests of other clients on an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForeignLoad {
    pub requests: u64,
    /// The estimated prompt tokens of the waiting requests.
    pub tokens: u64,
}

/// The load by the latest page of metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GaugeReport {
    pub running: Option<u64>,
    pub waiting: Option<u64>,
    pub kv_usage: Option<f64>,
    /// Requests of other clients; `None` when the page does not count requests.
    pub foreign: Option<u64>,
    /// The requests of the page, less those that this balancer and its siblings had in flight then; `None` of
    /// a page that a sibling has read.
    pub unaccounted: Option<i64>,
}

/// The load of one upstream by its metrics, for the choice and for the admin API. Written by its metrics
/// reader only, except for the counts that leases add. Relaxed: each number is a hint. Every choice reads the
/// first three.
#[repr(C)]
pub(super) struct EngineLoad {
    requests: AtomicU64,
    tokens: AtomicU64,
    /// The end of validity of the two above, by `fleet::millis`; 0: nothing was read.
    valid_until: AtomicU64,
    pub latest: ArcSwapOption<GaugeReport>,
    /// The number of all requests that this balancer has sent.
    pub sent: AtomicU64,
    /// The moving average of our prompts' tokens; 0 before the first.
    average_prompt: AtomicU64,
}

// === impl EngineLoad ===

impl EngineLoad {
    pub(super) fn new() -> Self {
        EngineLoad {
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            valid_until: AtomicU64::new(0),
            latest: ArcSwapOption::empty(),
            sent: AtomicU64::new(0),
            average_prompt: AtomicU64::new(0),
        }
    }

    /// Counts a request that is sent. The average may miss one of two concurrent calls, which is acceptable
    /// for an estimate.
    pub(super) fn count_sent(&self, tokens: u64) {
        self.sent.fetch_add(1, Relaxed);
        let average = match self.average_prompt.load(Relaxed) {
            0 => tokens,
            before => {
                (before - before / PROMPT_AVERAGE_WINDOW).saturating_add(tokens / PROMPT_AVERAGE_WINDOW)
            }
        };
        self.average_prompt.store(average, Relaxed);
    }

    /// Returns the requests of other clients at `now`, by `fleet::millis`; none when no valid reading exists.
    pub(super) fn foreign(&self, now: u64) -> ForeignLoad {
        if !self.is_valid(now) {
            return ForeignLoad::default();
        }
        ForeignLoad { requests: self.requests.load(Relaxed), tokens: self.tokens.load(Relaxed) }
    }

    /// Returns the latest page's load while it is valid.
    pub(super) fn gauge_report(&self, now: Instant) -> Option<GaugeReport> {
        let latest = self.latest.load();
        latest.as_deref().filter(|_| self.is_valid(millis(now))).copied()
    }

    fn is_valid(&self, now: u64) -> bool {
        now < self.valid_until.load(Relaxed)
    }

    /// Stores the foreign load, valid until `until`.
    pub(super) fn set(&self, foreign: ForeignLoad, until: Instant) {
        self.requests.store(foreign.requests, Relaxed);
        self.tokens.store(foreign.tokens, Relaxed);
        self.valid_until.store(millis(until), Relaxed);
    }

    /// Invalidates the stored load.
    pub(super) fn invalidate(&self) {
        self.valid_until.store(0, Relaxed);
    }

    /// Estimates the tokens of `prompts` foreign prompts.
    pub(super) fn estimate(&self, prompts: u64) -> u64 {
        let average = match self.average_prompt.load(Relaxed) {
            0 => DEFAULT_PROMPT_TOKENS,
            average => average,
        };
        prompts.saturating_mul(average)
    }
}
