//! The retry budget: tries beyond the first may be no more than a share of the requests, so that an
//! outage is not answered with a storm.
//!
//! A bucket of tokens in thousandths: each request puts in the `budget` that holds for it, its route's or the
//! general one, and each further try takes a whole one. There is one bucket for all, so that tries never are
//! more than what was put in, however many routes there are. It never holds more than a small reserve, which
//! lets a quiet balancer try again at once.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// A try costs this much.
const WHOLE: i64 = 1000;

/// Tries that are free at any time, and the most that a calm saves up.
const RESERVE: i64 = 100 * WHOLE;

pub struct Budget {
    tokens: AtomicI64,
}

impl Budget {
    pub fn new() -> Self {
        Budget { tokens: AtomicI64::new(RESERVE) }
    }

    /// A request came in that puts in this share; the configuration keeps it between 0 and 10.
    pub fn request(&self, share: f64) {
        let share = (share * WHOLE as f64) as i64;
        let add = |tokens: i64| (tokens < RESERVE).then(|| (tokens + share).min(RESERVE));
        // A full bucket stays as it is, which is no failure.
        let _ = self.tokens.fetch_update(Relaxed, Relaxed, add);
    }

    /// Whether a request that put in this share may make one more try; it is paid for if so.
    pub fn take(&self, share: f64) -> bool {
        // No share is no tries at all.
        let pay = |tokens: i64| (share > 0.0 && tokens >= WHOLE).then_some(tokens - WHOLE);
        self.tokens.fetch_update(Relaxed, Relaxed, pay).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_a_share_of_requests_once_the_reserve_is_gone() {
        let budget = Budget::new();
        let free = (0..1000).filter(|_| budget.take(0.2)).count();
        assert_eq!(free, 100);
        let mut tries = 0;
        for _ in 0..1000 {
            budget.request(0.2);
            tries += usize::from(budget.take(0.2));
        }
        assert_eq!(tries, 200);
    }

    #[test]
    fn a_calm_saves_up_no_more_than_the_reserve() {
        let budget = Budget::new();
        (0..100_000).for_each(|_| budget.request(1.0));
        assert_eq!((0..1000).filter(|_| budget.take(1.0)).count(), 100);
    }

    #[test]
    fn no_share_is_no_tries() {
        let budget = Budget::new();
        (0..1000).for_each(|_| budget.request(0.0));
        assert!(!budget.take(0.0));
        assert!(budget.take(0.1), "who has a share may try all the same");
    }
}
