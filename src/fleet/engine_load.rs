//! The load of an engine by its own `/metrics`, as its metrics reader last stored it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

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
}

/// The load of one upstream by its metrics, for the choice and for the admin API. Written by its metrics
/// reader only, except for the counts that leases add. Relaxed: each number is a hint.
pub(super) struct EngineLoad {
    requests: AtomicU64,
    tokens: AtomicU64,
    /// The end of validity of the two above, in milliseconds after `born`; 0: nothing was read.
    valid_until: AtomicU64,
    pub latest: ArcSwapOption<GaugeReport>,
    /// The number of all requests that this balancer has sent.
    pub sent: AtomicU64,
    /// The moving average of our prompts' tokens; 0 before the first.
    average_prompt: AtomicU64,
    born: Instant,
}

// === impl EngineLoad ===

impl EngineLoad {
    pub fn new(born: Instant) -> Self {
        EngineLoad {
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            valid_until: AtomicU64::new(0),
            latest: ArcSwapOption::empty(),
            sent: AtomicU64::new(0),
            average_prompt: AtomicU64::new(0),
            born,
        }
    }

    /// Counts a request that is sent. The average may miss one of two concurrent calls, which is acceptable
    /// for an estimate.
    pub fn count_sent(&self, tokens: u64) {
        self.sent.fetch_add(1, Relaxed);
        let average = match self.average_prompt.load(Relaxed) {
            0 => tokens,
            before => {
                (before - before / PROMPT_AVERAGE_WINDOW).saturating_add(tokens / PROMPT_AVERAGE_WINDOW)
            }
        };
        self.average_prompt.store(average, Relaxed);
    }

    /// Returns the requests of other clients; none when no valid reading exists.
    pub fn foreign(&self, now: Instant) -> ForeignLoad {
        if !self.is_valid(now) {
            return ForeignLoad::default();
        }
        ForeignLoad { requests: self.requests.load(Relaxed), tokens: self.tokens.load(Relaxed) }
    }

    /// Returns the latest page's load while it is valid.
    pub fn gauge_report(&self, now: Instant) -> Option<GaugeReport> {
        let latest = self.latest.load();
        latest.as_deref().filter(|_| self.is_valid(now)).copied()
    }

    fn is_valid(&self, now: Instant) -> bool {
        let until = self.valid_until.load(Relaxed);
        until > 0 && now < self.born + Duration::from_millis(until)
    }

    /// Stores the foreign load, valid until `until`.
    pub fn set(&self, foreign: ForeignLoad, until: Instant) {
        self.requests.store(foreign.requests, Relaxed);
        self.tokens.store(foreign.tokens, Relaxed);
        let millis = until.saturating_duration_since(self.born).as_millis();
        self.valid_until.store(u64::try_from(millis).unwrap_or(u64::MAX).max(1), Relaxed);
    }

    /// Invalidates the stored load.
    pub fn invalidate(&self) {
        self.valid_until.store(0, Relaxed);
    }

    /// Estimates the tokens of `prompts` foreign prompts.
    pub fn estimate(&self, prompts: u64) -> u64 {
        let average = match self.average_prompt.load(Relaxed) {
            0 => DEFAULT_PROMPT_TOKENS,
            average => average,
        };
        prompts.saturating_mul(average)
    }
}
