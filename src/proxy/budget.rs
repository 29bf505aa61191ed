//! The retry budget: tries beyond the first may be no more than a share of the requests, so that an
//! outage is not answered with a storm.
//!
//! A bucket of tokens in thousandths: each request puts in `budget`, each further try takes a whole one.
//! It never holds more than a small reserve, which lets a quiet balancer try again at once.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// A try costs this much.
const WHOLE: i64 = 1000;

/// Tries that are free at any time, and the most that a calm saves up.
const RESERVE: i64 = 100 * WHOLE;

pub struct Budget {
    tokens: AtomicI64,
    /// What a request puts in.
    share: AtomicI64,
}

impl Budget {
    pub fn new(share: f64) -> Self {
        let budget = Budget { tokens: AtomicI64::new(RESERVE), share: AtomicI64::new(0) };
        budget.set(share);
        budget
    }

    /// Changes the share; the configuration keeps it between 0 and 10.
    pub fn set(&self, share: f64) {
        self.share.store((share * WHOLE as f64) as i64, Relaxed);
    }

    /// A request came in.
    pub fn request(&self) {
        let share = self.share.load(Relaxed);
        let add = |tokens: i64| (tokens < RESERVE).then(|| (tokens + share).min(RESERVE));
        // A full bucket stays as it is, which is no failure.
        let _ = self.tokens.fetch_update(Relaxed, Relaxed, add);
    }

    /// Whether one more try may be made; it is paid for if so.
    pub fn take(&self) -> bool {
        let pay = |tokens: i64| (tokens >= WHOLE).then_some(tokens - WHOLE);
        self.tokens.fetch_update(Relaxed, Relaxed, pay).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_a_share_of_requests_once_the_reserve_is_gone() {
        let budget = Budget::new(0.2);
        let free = (0..1000).filter(|_| budget.take()).count();
        assert_eq!(free, 100);
        let mut tries = 0;
        for _ in 0..1000 {
            budget.request();
            tries += usize::from(budget.take());
        }
        assert_eq!(tries, 200);
    }

    #[test]
    fn a_calm_saves_up_no_more_than_the_reserve() {
        let budget = Budget::new(1.0);
        (0..100_000).for_each(|_| budget.request());
        assert_eq!((0..1000).filter(|_| budget.take()).count(), 100);
    }

    #[test]
    fn no_share_leaves_the_reserve_alone() {
        let budget = Budget::new(0.0);
        (0..1000).for_each(|_| budget.request());
        assert_eq!((0..1000).filter(|_| budget.take()).count(), 100);
    }
}
