//! Estimates when a prefill without a visible end has finished.
//!
//! A streaming answer shows by its first event that the prompt has been read; it teaches the upstream's
//! pace. The first byte of an answer that does not stream is its last, so its prefill counts as done at the
//! estimated time, if no byte came before. No task waits for that time: every reader of the gauges first
//! removes the prefills that are over.
//!
//! The lock is a plain mutex: it is taken once or twice for each request that does not stream, for a few
//! instructions, and by readers only when something is over.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::rate::Rate;

/// The pace before the first observation.
const INITIAL_TOKENS_PER_SECOND: f32 = 8_000.0;

/// Tokens after which earlier observations count half.
const PACE_WINDOW_TOKENS: f32 = 65_536.0;

/// The shortest prompt that teaches the pace: a shorter one takes a step of the engine, however fast that
/// is.
const MIN_LEARNT_TOKENS: u64 = 256;

/// The longest estimate.
const MAX_ESTIMATE: Duration = Duration::from_secs(600);

const NEVER: u64 = u64::MAX;

pub struct PrefillPace {
    born: Instant,
    rate: Rate,
    /// Milliseconds after `born` at which the next prefill must be over.
    next: AtomicU64,
    running: Mutex<RunningPrefills>,
}

#[derive(Default)]
struct RunningPrefills {
    count: u64,
    prefills: Vec<RunningPrefill>,
}

struct RunningPrefill {
    ticket: PrefillTicket,
    tokens: u64,
    over: u64,
}

/// Identifies a prefill whose end is estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillTicket(u64);

impl PrefillPace {
    pub fn new(now: Instant) -> Self {
        PrefillPace {
            born: now,
            rate: Rate::new(INITIAL_TOKENS_PER_SECOND, 1.0),
            next: AtomicU64::new(NEVER),
            running: Mutex::default(),
        }
    }

    /// Tokens a second.
    pub fn tokens(&self) -> f64 {
        self.rate.value().max(1.0)
    }

    /// So many tokens were ahead of a first event, its own included, and it came after `time`.
    pub fn learn(&self, tokens: u64, time: Duration) {
        if tokens >= MIN_LEARNT_TOKENS && !time.is_zero() {
            self.rate.add(
                tokens as f32,
                time.as_secs_f32(),
                PACE_WINDOW_TOKENS / (PACE_WINDOW_TOKENS + tokens as f32),
            );
        }
    }

    /// A prefill of `tokens` begins behind `ahead` others, and will be over when it should.
    pub fn begin(&self, tokens: u64, ahead: u64, now: Instant) -> PrefillTicket {
        let seconds = (ahead + tokens) as f64 / self.tokens();
        let time = Duration::try_from_secs_f64(seconds).unwrap_or(MAX_ESTIMATE).min(MAX_ESTIMATE);
        let over = self.millis(now + time) + 1;
        let mut running = self.running();
        running.count += 1;
        let ticket = PrefillTicket(running.count);
        running.prefills.push(RunningPrefill { ticket, tokens, over });
        self.next.fetch_min(over, Relaxed);
        ticket
    }

    /// The prefill has ended: its tokens, unless it was over before.
    pub fn end(&self, ticket: PrefillTicket) -> Option<u64> {
        let mut running = self.running();
        let at = running.prefills.iter().position(|prefill| prefill.ticket == ticket)?;
        let prefill = running.prefills.swap_remove(at);
        self.publish_next(&running);
        Some(prefill.tokens)
    }

    /// Takes out the prefills that are over by now and returns their tokens.
    pub fn over(&self, now: Instant) -> u64 {
        if self.next.load(Relaxed) == NEVER {
            return 0;
        }
        let now = self.millis(now);
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
        self.next.store(next.unwrap_or(NEVER), Relaxed);
    }

    fn running(&self) -> MutexGuard<'_, RunningPrefills> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.born).as_millis()).unwrap_or(NEVER - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_pace_is_learnt_from_what_was_long_enough_to_tell() {
        let pace = PrefillPace::new(Instant::now());
        assert_eq!(pace.tokens(), 8_000.0);
        (0..10_000).for_each(|_| pace.learn(MIN_LEARNT_TOKENS - 1, SECOND));
        assert_eq!(pace.tokens(), 8_000.0);
        (0..100).for_each(|_| pace.learn(10_000, SECOND / 2));
        assert!((19_900.0..20_100.0).contains(&pace.tokens()), "{}", pace.tokens());
    }

    #[test]
    fn a_prefill_is_over_when_it_should_be_and_only_once() {
        let now = Instant::now();
        let pace = PrefillPace::new(now);
        let first = pace.begin(8_000, 0, now);
        let second = pace.begin(8_000, 8_000, now);
        assert_eq!(pace.over(now + SECOND / 2), 0);
        assert_eq!(pace.over(now + SECOND * 11 / 10), 8_000);
        assert_eq!(pace.over(now + SECOND * 11 / 10), 0);
        assert_eq!((pace.end(first), pace.end(second), pace.end(second)), (None, Some(8_000), None));
        assert_eq!(pace.over(now + SECOND * 100), 0);
    }

    #[test]
    fn the_largest_numbers_are_over_some_day() {
        let now = Instant::now();
        let pace = PrefillPace::new(now);
        pace.begin(u64::MAX / 2, u64::MAX / 2, now);
        assert_eq!(pace.over(now + MAX_ESTIMATE - SECOND), 0);
        assert_eq!(pace.over(now + MAX_ESTIMATE + SECOND), u64::MAX / 2);
    }
}
