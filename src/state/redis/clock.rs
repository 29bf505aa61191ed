//! The clock of Redis, by which the age of an entry is measured: the id of an entry is the time of its
//! publication.
//!
//! `TIME` is read every few seconds. The answer belongs to the middle of its round trip, and is wrong by at
//! most half of it. A good reading is kept until the two clocks may have drifted apart by more than the error
//! of a newer one, or until a newer one contradicts it, as after a failover.

use std::time::{Duration, Instant};

use super::reply::StreamId;

/// Two clocks drift apart by at most one part in this number.
const DRIFT_DIVISOR: u32 = 2_000;

/// The present estimate of the clock of Redis.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RedisClock {
    best: Option<ClockReading>,
}

/// One answer to `TIME`.
#[derive(Clone, Copy, Debug)]
struct ClockReading {
    /// The time of Redis, since its epoch.
    redis: Duration,
    /// The same moment here.
    local: Instant,
    /// The largest error.
    error: Duration,
}

// === impl RedisClock ===

impl RedisClock {
    /// Adds the answer `redis` to a `TIME` that was sent and received at these moments.
    pub(super) fn add(&mut self, redis: Duration, sent: Instant, received: Instant) {
        let error = received.saturating_duration_since(sent) / 2;
        let new = ClockReading { redis, local: sent + error, error };
        if self.best.is_none_or(|best| new.is_better_than(&best)) {
            self.best = Some(new);
        }
    }

    /// Returns the present time of Redis, since its epoch; `None` before the first reading.
    pub(super) fn redis_time(&self, now: Instant) -> Option<Duration> {
        let best = self.best?;
        let behind = best.local.saturating_duration_since(now);
        Some((best.redis + now.saturating_duration_since(best.local)).saturating_sub(behind))
    }

    /// Returns the age of an entry; zero before the first reading.
    pub(super) fn age(&self, id: StreamId, now: Instant) -> Duration {
        let published = Duration::from_millis(id.millis);
        self.redis_time(now).map(|time| time.saturating_sub(published)).unwrap_or_default()
    }
}

impl ClockReading {
    fn is_better_than(&self, old: &ClockReading) -> bool {
        let passed = self.local.saturating_duration_since(old.local);
        let old_error = old.error + passed / DRIFT_DIVISOR;
        let contradicts = (old.redis + passed).abs_diff(self.redis) > old_error + self.error;
        contradicts || self.error <= old_error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn id(millis: u64) -> StreamId {
        StreamId { millis, number: 0 }
    }

    /// A clock that read `redis` after `sent`, with a round trip of `trip` milliseconds.
    fn read(clock: &mut RedisClock, redis: u64, start: Instant, sent: u64, trip: u64) {
        let sent = start + MS * u32::try_from(sent).unwrap();
        clock.add(Duration::from_millis(redis), sent, sent + MS * u32::try_from(trip).unwrap());
    }

    #[test]
    fn dates_entries_from_before_and_after_the_reading() {
        let start = Instant::now();
        let mut clock = RedisClock::default();
        assert_eq!(clock.age(id(5), start), Duration::ZERO, "without a clock every entry is new");
        read(&mut clock, 10_000, start, 0, 4);
        let later = start + 7_002 * MS;
        for (millis, age) in [(9_000, 8_000), (10_000, 7_000), (16_000, 1_000), (17_000, 0), (99_000, 0)] {
            assert_eq!(clock.age(id(millis), later), age * MS, "{millis}");
        }
        assert_eq!(clock.redis_time(later), Some(Duration::from_secs(17)));
        assert_eq!(clock.age(id(10_000), start), Duration::ZERO);
        assert_eq!(clock.redis_time(start), Some(9_998 * MS), "before the middle of the round trip");
    }

    #[test]
    fn keeps_the_best_reading_until_it_may_have_drifted() {
        let start = Instant::now();
        let mut clock = RedisClock::default();
        read(&mut clock, 10_000, start, 0, 0);
        // An answer that took 400 ms, 150 of which on the way there.
        read(&mut clock, 12_150, start, 2_000, 400);
        assert_eq!(clock.redis_time(start + 2_200 * MS), Some(12_200 * MS));
        // A bad first reading gives way to a good one.
        let mut clock = RedisClock::default();
        read(&mut clock, 10_100, start, 0, 400);
        read(&mut clock, 12_000, start, 2_000, 2);
        assert_eq!(clock.redis_time(start + 2_001 * MS), Some(12_000 * MS));
        // After 1,000 s the old reading may be wrong by 500 ms.
        let mut clock = RedisClock::default();
        read(&mut clock, 0, start, 0, 0);
        read(&mut clock, 1_000_100, start, 1_000_000, 20);
        assert_eq!(clock.redis_time(start + 1_000_010 * MS), Some(1_000_100 * MS));
    }

    #[test]
    fn follows_a_clock_that_was_set() {
        let start = Instant::now();
        for redis in [1_000, 3_600_000] {
            let mut clock = RedisClock::default();
            read(&mut clock, 100_000, start, 0, 0);
            read(&mut clock, redis, start, 2_000, 100);
            assert_eq!(clock.redis_time(start + 2_050 * MS), Some(Duration::from_millis(redis)));
        }
    }
}
