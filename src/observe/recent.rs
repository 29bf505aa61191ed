//! The times of the last minute, for display: a histogram whose memory is fixed.
//!
//! ```text
//! buckets     8 to each doubling, from 64 µs to 18 minutes: a percentile is off by an eighth at the most
//! intervals   6 whole ones of 10 s and the present one; the oldest is emptied for the next
//! ```
//!
//! Recording is one relaxed increment. The first recording in an interval also empties its buckets; a time
//! that another thread records in the same microsecond may be lost.
//!
//! Never: a clock, a lock, a number by which anything is decided.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The length of an interval in seconds.
const INTERVAL_SECONDS: u64 = 10;

/// The number of intervals that are held: those of a minute, and the present one.
const HELD_INTERVALS: usize = 7;

/// Times below so many microseconds, as a power of two, share the first bucket.
const FIRST_OCTAVE: u32 = 6;

/// The number of doublings with buckets of their own.
const COUNTED_OCTAVES: usize = 24;

/// The number of buckets of a doubling, as a power of two.
const OCTAVE_BITS: u32 = 3;

const BUCKET_COUNT: usize = 1 + (COUNTED_OCTAVES << OCTAVE_BITS);

/// The times of one interval.
#[derive(Debug)]
struct TimesInterval {
    /// Intervals are counted from 1; 0 is one that was never used.
    number: AtomicU64,
    buckets: [AtomicU32; BUCKET_COUNT],
}

/// The times of the last minute.
#[derive(Debug)]
pub(super) struct RecentTimes(Box<[TimesInterval]>);

/// The first microsecond of a bucket.
fn bucket_start(bucket: usize) -> u64 {
    let Some(place) = bucket.checked_sub(1) else { return 0 };
    let (octave, part) = (place >> OCTAVE_BITS, place & ((1 << OCTAVE_BITS) - 1));
    ((1 << OCTAVE_BITS) + part as u64) << (octave as u32 + FIRST_OCTAVE - OCTAVE_BITS)
}

/// The bucket of a time in microseconds; longer times than are counted share the last one.
fn bucket_of(micros: u64) -> usize {
    let Some(octave) = micros.checked_ilog2().and_then(|log| log.checked_sub(FIRST_OCTAVE)) else { return 0 };
    let part = (micros >> (octave + FIRST_OCTAVE - OCTAVE_BITS)) & ((1 << OCTAVE_BITS) - 1);
    (1 + ((octave as usize) << OCTAVE_BITS) + part as usize).min(BUCKET_COUNT - 1)
}

/// The number of the interval that has a time since the start.
fn interval_at(at: Duration) -> u64 {
    at.as_secs() / INTERVAL_SECONDS + 1
}

// === impl RecentTimes ===

impl Default for RecentTimes {
    fn default() -> Self {
        let interval = || TimesInterval {
            number: AtomicU64::new(0),
            buckets: std::array::from_fn(|_| AtomicU32::new(0)),
        };
        RecentTimes((0..HELD_INTERVALS).map(|_| interval()).collect())
    }
}

impl RecentTimes {
    /// Records a time; `at` is the time since the start.
    pub(super) fn record(&self, time: Duration, at: Duration) {
        let number = interval_at(at);
        let interval = &self.0[(number % HELD_INTERVALS as u64) as usize];
        let held = interval.number.load(Relaxed);
        if held > number {
            // This thread was delayed for more than a minute.
            return;
        }
        if held < number && interval.number.compare_exchange(held, number, Relaxed, Relaxed).is_ok() {
            interval.buckets.iter().for_each(|bucket| bucket.store(0, Relaxed));
        }
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        interval.buckets[bucket_of(micros)].fetch_add(1, Relaxed);
    }

    /// Returns percentiles in milliseconds, each given as a share; `None` without a time in the last minute.
    pub(super) fn percentiles<const N: usize>(&self, shares: [f64; N], at: Duration) -> Option<[f64; N]> {
        let now = interval_at(at);
        let is_recent = |number: u64| number > 0 && number + HELD_INTERVALS as u64 > now;
        let mut counts = [0_u64; BUCKET_COUNT];
        for interval in self.0.iter().filter(|interval| is_recent(interval.number.load(Relaxed))) {
            for (count, bucket) in counts.iter_mut().zip(&interval.buckets) {
                *count += u64::from(bucket.load(Relaxed));
            }
        }
        let total: u64 = counts.iter().sum();
        (total > 0).then(|| shares.map(|share| percentile(&counts, share * total as f64) / 1e3))
    }
}

/// The time in microseconds below which `rank` of the counted times lie, interpolated within its bucket.
fn percentile(counts: &[u64; BUCKET_COUNT], rank: f64) -> f64 {
    let mut below = 0;
    let mut last = 0.0;
    for (bucket, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (start, end) = (bucket_start(bucket) as f64, bucket_start(bucket + 1) as f64);
        if rank <= (below + count) as f64 {
            return start + (end - start) * (rank - below as f64) / *count as f64;
        }
        (below, last) = (below + count, end);
    }
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for bucket in 0..BUCKET_COUNT {
            let (start, end) = (bucket_start(bucket), bucket_start(bucket + 1));
            assert!(start < end, "bucket {bucket}");
            assert_eq!((bucket_of(start), bucket_of(end - 1)), (bucket, bucket), "from {start} to {end}");
        }
        assert_eq!(bucket_start(1), 64);
        assert_eq!(bucket_of(u64::MAX), BUCKET_COUNT - 1, "longer times share the last bucket");
        assert!(bucket_start(BUCKET_COUNT - 1) > 1_000_000_000, "a quarter of an hour has its own bucket");
    }

    #[test]
    fn a_time_counts_for_a_minute() {
        let times = RecentTimes::default();
        assert_eq!(times.percentiles([0.5], seconds(0)), None);
        times.record(seconds(1), seconds(5));
        for at in [5, 9, 10, 65] {
            let [median] = times.percentiles([0.5], seconds(at)).expect("it is recent");
            assert!((940.0..1060.0).contains(&median), "{median} at {at}");
        }
        assert_eq!(times.percentiles([0.5], seconds(70)), None, "its interval is over for a minute");
    }

    #[test]
    fn an_interval_is_emptied_for_the_one_that_replaces_it() {
        let times = RecentTimes::default();
        (0..100).for_each(|_| times.record(seconds(1), seconds(0)));
        times.record(seconds(8), seconds(70));
        let [least] = times.percentiles([0.01], seconds(70)).expect("one is recent");
        assert!(least > 7000.0, "{least}: the times of the first interval are gone");
        times.record(seconds(1), seconds(0));
        assert_eq!(times.percentiles([0.01], seconds(70)), Some([least]), "a late thread adds nothing");
    }

    #[test]
    fn recording_threads_lose_no_time_within_an_interval() {
        let times = RecentTimes::default();
        times.record(seconds(1), seconds(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| times.record(seconds(1), seconds(1))));
            }
        });
        let count: u32 = times.0.iter().flat_map(|one| &one.buckets).map(|count| count.load(Relaxed)).sum();
        assert_eq!(count, 40_001);
    }

    proptest! {
        /// Compares with the sorted list of all times.
        #[test]
        fn percentiles_are_close(
            mut micros in prop::collection::vec(64..1_000_000_000_u64, 1..300),
            share in 0.01..1.0,
        ) {
            let times = RecentTimes::default();
            micros.iter().for_each(|time| times.record(Duration::from_micros(*time), seconds(3)));
            micros.sort_unstable();
            let place = (f64::ceil(micros.len() as f64 * share) as usize).clamp(1, micros.len()) - 1;
            let exact = micros[place] as f64 / 1e3;
            let [found] = times.percentiles([share], seconds(3)).unwrap();
            prop_assert!((found / exact - 1.0).abs() <= 0.13, "{found} for {exact}");
        }
    }
}
