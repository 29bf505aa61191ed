//! The retry budget: limits retries to a share of the requests, so that an outage causes no retry storm.
//!
//! A bucket of tokens in thousandths: each request adds its `budget`, of its route or the general one, and
//! each retry takes a whole token. All routes share one bucket, so that retries never exceed the sum of the
//! shares. The bucket holds at most a small reserve, which lets a quiet balancer retry at once.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// The cost of one retry.
const UNITS_PER_ATTEMPT: i64 = 1000;

/// The size of the bucket: the most retries that quiet times save up.
const RESERVE_UNITS: i64 = 100 * UNITS_PER_ATTEMPT;

/// Limits retries to a share of the requests, so that an outage is not multiplied.
pub(super) struct RetryBudget {
    tokens: AtomicI64,
}

impl RetryBudget {
    pub(super) fn new() -> Self {
        RetryBudget { tokens: AtomicI64::new(RESERVE_UNITS) }
    }

    /// Adds the share of one request; the configuration keeps it between 0 and 10.
    pub(super) fn request(&self, share: f64) {
        let share = (share * UNITS_PER_ATTEMPT as f64) as i64;
        let add = |tokens: i64| (tokens < RESERVE_UNITS).then(|| (tokens + share).min(RESERVE_UNITS));
        // A full bucket stays full.
        let _ = self.tokens.fetch_update(Relaxed, Relaxed, add);
    }

    /// Takes the cost of one retry for a request with this share. False when the bucket has too little.
    pub(super) fn take(&self, share: f64) -> bool {
        // A share of 0 disables retries.
        let pay =
            |tokens: i64| (share > 0.0 && tokens >= UNITS_PER_ATTEMPT).then_some(tokens - UNITS_PER_ATTEMPT);
        self.tokens.fetch_update(Relaxed, Relaxed, pay).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_retries_to_the_share_after_the_reserve() {
        let budget = RetryBudget::new();
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
    fn saves_no_more_than_the_reserve() {
        let budget = RetryBudget::new();
        (0..100_000).for_each(|_| budget.request(1.0));
        assert_eq!((0..1000).filter(|_| budget.take(1.0)).count(), 100);
    }

    #[test]
    fn share_of_zero_disables_retries() {
        let budget = RetryBudget::new();
        (0..1000).for_each(|_| budget.request(0.0));
        assert!(!budget.take(0.0));
        assert!(budget.take(0.1), "who has a share may try all the same");
    }
}
