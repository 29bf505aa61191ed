//! Estimates when a prefill without a visible end has finished.
//!
//! The first event of a streaming answer shows the end of the prefill and teaches the upstream's pace. An
//! answer that does not stream shows nothing before the generation has ended, so its prefill counts as done
//! at the estimated time, or at the first byte if that comes earlier. No task waits for that time: every
//! reader of the gauges first removes the prefills that are over.
//!
//! The lock is a plain mutex: each request that does not stream takes it twice, for a few instructions, and
//! readers take it only when a prefill is over.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::millis;
use crate::rate::Rate;

/// The pace before the first observation.
const INITIAL_TOKENS_PER_SECOND: f32 = 8_000.0;

/// The number of tokens after which earlier observations count half.
const PACE_WINDOW_TOKENS: f32 = 65_536.0;

/// The shortest prompt that teaches the pace: a shorter one takes one step of the engine at any pace.
const MIN_LEARNED_TOKENS: u64 = 256;

/// The longest estimate of a prefill.
const MAX_ESTIMATE: Duration = Duration::from_secs(600);

/// The value of `next` while no prefill runs.
const NO_PREFILL: u64 = u64::MAX;

/// The prefill pace of one upstream, and its prefills whose ends are estimated. `next` comes first: every
/// choice reads it.
#[repr(C)]
pub(super) struct PrefillPace {
    /// The next estimated end of a prefill, by `fleet::millis`.
    next: AtomicU64,
    rate: Rate,
    running: Mutex<RunningPrefills>,
}

/// The prefills whose ends are estimated.
#[derive(Default)]
struct RunningPrefills {
    /// The number of tickets that were given out.
    count: u64,
    prefills: Vec<RunningPrefill>,
}

struct RunningPrefill {
    ticket: PrefillTicket,
    tokens: u64,
    /// The estimated end, by `fleet::millis`.
    over: u64,
}

/// Identifies a prefill whose end is estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrefillTicket(u64);

impl PrefillPace {
    /// Builds the pace of a new upstream.
    pub(super) fn new() -> Self {
        PrefillPace {
            next: AtomicU64::new(NO_PREFILL),
            rate: Rate::new(INITIAL_TOKENS_PER_SECOND, 1.0),
            running: Mutex::default(),
        }
    }

    /// Returns the pace in tokens a second, at least 1.
    pub(super) fn tokens_per_second(&self) -> f64 {
        self.rate.value().max(1.0)
    }

    /// Learns from a first event that came after `time`, with `tokens` ahead of it, its own included.
    pub(super) fn learn(&self, tokens: u64, time: Duration) {
        if tokens >= MIN_LEARNED_TOKENS && !time.is_zero() {
            self.rate.add(
                tokens as f32,
                time.as_secs_f32(),
                PACE_WINDOW_TOKENS / (PACE_WINDOW_TOKENS + tokens as f32),
            );
        }
    }

    /// Begins a prefill of `tokens` behind `ahead` other tokens, and estimates its end.
    pub(super) fn begin(&self, tokens: u64, ahead: u64, now: Instant) -> PrefillTicket {
        let seconds = (ahead + tokens) as f64 / self.tokens_per_second();
        let time = Duration::try_from_secs_f64(seconds).unwrap_or(MAX_ESTIMATE).min(MAX_ESTIMATE);
        let over = millis(now + time) + 1;
        let mut running = self.running();
        running.count += 1;
        let ticket = PrefillTicket(running.count);
        running.prefills.push(RunningPrefill { ticket, tokens, over });
        self.next.fetch_min(over, Relaxed);
        ticket
    }

    /// Ends a prefill and returns its tokens; `None` when its estimated end has passed already.
    pub(super) fn end(&self, ticket: PrefillTicket) -> Option<u64> {
        let mut running = self.running();
        let at = running.prefills.iter().position(|prefill| prefill.ticket == ticket)?;
        let prefill = running.prefills.swap_remove(at);
        self.publish_next(&running);
        Some(prefill.tokens)
    }

    /// Removes the prefills that are over at `now`, by `fleet::millis`, and returns their tokens.
    pub(super) fn take_over_at(&self, now: u64) -> u64 {
        if now < self.next.load(Relaxed) {
            return 0;
        }
        let mut running = self.running();
        let mut tokens = 0;
        running.prefills.retain(|prefill| {
            let over = prefill.over <= now;
            tokens += if over { prefill.tokens } else { 0 };
            !over
        });
        self.publish_next(&running);
        tokens
    }

    fn publish_next(&self, running: &RunningPrefills) {
        let next = running.prefills.iter().map(|prefill| prefill.over).min();
        self.next.store(next.unwrap_or(NO_PREFILL), Relaxed);
    }

    fn running(&self) -> MutexGuard<'_, RunningPrefills> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn learns_the_pace_from_long_prompts_only() {
        let pace = PrefillPace::new();
        assert_eq!(pace.tokens_per_second(), 8_000.0);
        (0..10_000).for_each(|_| pace.learn(MIN_LEARNED_TOKENS - 1, SECOND));
        assert_eq!(pace.tokens_per_second(), 8_000.0);
        (0..100).for_each(|_| pace.learn(10_000, SECOND / 2));
        assert!((19_900.0..20_100.0).contains(&pace.tokens_per_second()), "{}", pace.tokens_per_second());
    }

    #[test]
    fn ends_a_prefill_once_at_its_estimated_time() {
        let now = Instant::now();
        let pace = PrefillPace::new();
        let first = pace.begin(8_000, 0, now);
        let second = pace.begin(8_000, 8_000, now);
        assert_eq!(pace.take_over_at(millis(now + SECOND / 2)), 0);
        assert_eq!(pace.take_over_at(millis(now + SECOND * 11 / 10)), 8_000);
        assert_eq!(pace.take_over_at(millis(now + SECOND * 11 / 10)), 0);
        assert_eq!((pace.end(first), pace.end(second), pace.end(second)), (None, Some(8_000), None));
        assert_eq!(pace.take_over_at(millis(now + SECOND * 100)), 0);
    }

    #[test]
    fn limits_the_estimate_of_the_largest_prompts() {
        let now = Instant::now();
        let pace = PrefillPace::new();
        pace.begin(u64::MAX / 2, u64::MAX / 2, now);
        assert_eq!(pace.take_over_at(millis(now + MAX_ESTIMATE - SECOND)), 0);
        assert_eq!(pace.take_over_at(millis(now + MAX_ESTIMATE + SECOND)), u64::MAX / 2);
    }
}
