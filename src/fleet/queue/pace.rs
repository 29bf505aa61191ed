//! Measures the pace of admissions from the queue, for Retry-After.

use std::time::{Duration, Instant};

/// The weight of the newest interval between two admissions in the moving average.
const NEWEST_WEIGHT: f64 = 0.2;

/// The least Retry-After, in seconds.
const MIN_RETRY_AFTER: f64 = 1.0;

/// The greatest Retry-After, in seconds.
const MAX_RETRY_AFTER: f64 = 60.0;

/// The pace of admissions from the queue.
#[derive(Default)]
pub(super) struct AdmissionPace {
    /// The moving average of the seconds between two admissions.
    interval: Option<f64>,
    /// The last admission, or the time when the queue was last joined while empty.
    last: Option<Instant>,
}

impl AdmissionPace {
    /// Records that a request joined the empty queue.
    pub(super) fn begin(&mut self, now: Instant) {
        self.last = Some(now);
    }

    /// Records an admission.
    pub(super) fn admitted(&mut self, now: Instant) {
        let newest = self.idle(now);
        self.last = Some(now);
        self.interval = Some(match self.interval {
            Some(interval) => interval + NEWEST_WEIGHT * (newest - interval),
            None => newest,
        });
    }

    /// Estimates the time until `position` requests have been admitted.
    pub(super) fn wait(&self, position: usize, now: Instant) -> Duration {
        // A pause longer than the average is the better estimate: the queue is at least that slow.
        let interval = self.interval.unwrap_or(0.0).max(self.idle(now));
        Duration::from_secs_f64((interval * position as f64).ceil().clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER))
    }

    /// Returns the seconds since the last admission.
    fn idle(&self, now: Instant) -> f64 {
        self.last.map_or(0.0, |last| now.saturating_duration_since(last).as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_the_wait_by_the_pace_of_admissions() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let wait = |pace: &AdmissionPace, position, seconds| pace.wait(position, at(seconds)).as_secs();
        let mut pace = AdmissionPace::default();
        assert_eq!(wait(&pace, 100, 0.0), 1, "no admission yet");
        pace.begin(at(0.0));
        assert_eq!(wait(&pace, 10, 0.5), 5, "no admission since the first request joined");
        for second in 1..50 {
            pace.admitted(at(f64::from(second) * 0.5));
        }
        assert_eq!((wait(&pace, 1, 24.5), wait(&pace, 10, 24.5), wait(&pace, 100, 24.5)), (1, 5, 50));
        assert_eq!(wait(&pace, 1000, 24.5), 60, "capped");
        assert_eq!(wait(&pace, 10, 26.5), 20, "no admission for two seconds");
    }
}
