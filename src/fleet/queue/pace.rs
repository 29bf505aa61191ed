//! How fast the queue moves, for an honest Retry-After.

use std::time::{Duration, Instant};

/// The weight of the newest time between two admissions.
const NEWEST_WEIGHT: f64 = 0.2;

/// The least and the greatest Retry-After.
const RETRY_AFTER_SECONDS: (f64, f64) = (1.0, 60.0);

#[derive(Default)]
pub(super) struct AdmissionPace {
    /// Seconds between two admissions, smoothed.
    between: Option<f64>,
    /// The last admission, or the time when the queue was last joined while empty.
    last: Option<Instant>,
}

impl AdmissionPace {
    /// The queue is no longer empty.
    pub fn begin(&mut self, now: Instant) {
        self.last = Some(now);
    }

    pub fn admitted(&mut self, now: Instant) {
        let newest = self.idle(now);
        self.last = Some(now);
        self.between = Some(match self.between {
            Some(between) => between + NEWEST_WEIGHT * (newest - between),
            None => newest,
        });
    }

    /// How long, about, until so many have been admitted.
    pub fn wait(&self, position: usize, now: Instant) -> Duration {
        // A queue that has not moved for longer than usual is that slow at least.
        let between = self.between.unwrap_or(0.0).max(self.idle(now));
        Duration::from_secs_f64(
            (between * position as f64).ceil().clamp(RETRY_AFTER_SECONDS.0, RETRY_AFTER_SECONDS.1),
        )
    }

    fn idle(&self, now: Instant) -> f64 {
        self.last.map_or(0.0, |last| now.saturating_duration_since(last).as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_how_long_so_many_took() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let told = |pace: &AdmissionPace, position, seconds| pace.wait(position, at(seconds)).as_secs();
        let mut pace = AdmissionPace::default();
        assert_eq!(told(&pace, 100, 0.0), 1, "nothing is known");
        pace.begin(at(0.0));
        assert_eq!(told(&pace, 10, 0.5), 5, "it has not moved since");
        for second in 1..50 {
            pace.admitted(at(f64::from(second) * 0.5));
        }
        assert_eq!((told(&pace, 1, 24.5), told(&pace, 10, 24.5), told(&pace, 100, 24.5)), (1, 5, 50));
        assert_eq!(told(&pace, 1000, 24.5), 60, "capped");
        assert_eq!(told(&pace, 10, 26.5), 20, "it stands still");
    }
}
