//! The sizes of the entries of one stream as this balancer has seen them, from which the oldest entry to keep
//! follows.
//!
//! All balancers read the same entries, so they trim at about the same entry, and trimming twice is harmless.

use std::collections::VecDeque;
use std::time::Duration;

use super::reply::StreamId;

/// The memory that an entry takes in Redis beside its message, in bytes.
const ENTRY_OVERHEAD_BYTES: u64 = 32;

/// The number of spans into which the limits are divided; the stream exceeds them by about one span.
const SPANS_PER_LIMIT: u32 = 32;

/// The limits of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamLimits {
    /// The largest age of an entry.
    pub age: Duration,
    /// The largest size of all entries.
    pub bytes: u64,
}

/// The sizes of successive entries.
#[derive(Debug)]
pub(super) struct StreamSizes {
    limits: StreamLimits,
    spans: VecDeque<StreamSpan>,
    bytes: u64,
    last: StreamId,
    /// The first entry to keep by the size.
    kept_from: StreamId,
}

/// Some successive entries.
#[derive(Clone, Copy, Debug)]
struct StreamSpan {
    first: StreamId,
    bytes: u64,
}

// === impl StreamSizes ===

impl StreamSizes {
    /// Builds the sizes of a stream without known entries.
    pub(super) fn new(limits: StreamLimits) -> Self {
        let (last, kept_from) = (StreamId::default(), StreamId::default());
        StreamSizes { limits, spans: VecDeque::new(), bytes: 0, last, kept_from }
    }

    /// Adds an entry with a message of `bytes`; entries come in the order of their ids.
    pub(super) fn add(&mut self, id: StreamId, bytes: usize) {
        if id < self.last {
            // The stream was emptied or replaced.
            *self = StreamSizes::new(self.limits);
        }
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_add(ENTRY_OVERHEAD_BYTES);
        let max_time = self.limits.age / SPANS_PER_LIMIT;
        let max_bytes = self.limits.bytes / u64::from(SPANS_PER_LIMIT);
        let has_room = |span: &&mut StreamSpan| {
            span.bytes.saturating_add(bytes) <= max_bytes
                && u128::from(id.millis - span.first.millis) < max_time.as_millis()
        };
        match self.spans.back_mut().filter(has_room) {
            Some(span) => span.bytes += bytes,
            None => self.spans.push_back(StreamSpan { first: id, bytes }),
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.last = id;
    }

    /// Returns the id of the oldest entry to keep when it is `redis_time` at Redis, and forgets the entries
    /// before it.
    pub(super) fn oldest_to_keep(&mut self, redis_time: Duration) -> StreamId {
        let oldest = redis_time.saturating_sub(self.limits.age).as_millis();
        let oldest = StreamId { millis: u64::try_from(oldest).unwrap_or(0), number: 0 };
        while let (Some(first), Some(second)) = (self.spans.front(), self.spans.get(1)) {
            let is_too_much = self.bytes > self.limits.bytes;
            if !is_too_much && second.first > oldest {
                break;
            }
            if is_too_much {
                self.kept_from = second.first;
            }
            self.bytes -= first.bytes;
            self.spans.pop_front();
        }
        oldest.max(self.kept_from)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: StreamLimits = StreamLimits { age: Duration::from_secs(60), bytes: 1 << 20 };

    fn id(millis: u64) -> StreamId {
        StreamId { millis, number: 0 }
    }

    #[test]
    fn keeps_entries_by_age_and_by_size() {
        let mut sizes = StreamSizes::new(LIMITS);
        assert_eq!(sizes.oldest_to_keep(Duration::from_secs(100)), id(40_000));
        assert_eq!(sizes.oldest_to_keep(Duration::from_secs(5)), id(0));
        for second in 100..130 {
            sizes.add(id(second * 1_000), 30 << 10);
        }
        assert_eq!(
            sizes.oldest_to_keep(Duration::from_secs(130)),
            id(70_000),
            "900 KiB are no more than 1 MiB"
        );
        for second in 130..140 {
            sizes.add(id(second * 1_000), 30 << 10);
        }
        let oldest = sizes.oldest_to_keep(Duration::from_secs(140));
        assert!(oldest > id(104_000) && oldest < id(109_000), "{oldest}");
        assert_eq!(sizes.oldest_to_keep(Duration::from_secs(141)), oldest, "nothing was added");
        assert_eq!(sizes.oldest_to_keep(Duration::from_secs(300)), id(240_000));
        // An emptied stream begins with lower ids, in case the clock was set back.
        sizes.add(id(90_000), 1);
        assert_eq!(sizes.oldest_to_keep(Duration::from_secs(91)), id(31_000));
    }

    proptest! {
        /// At most one span more than the limit is kept, and never less than half of it is.
        #[test]
        fn keeps_about_the_limit(
            entries in prop::collection::vec((0u64..300, 0usize..20_000), 1..600),
            looks in 1usize..50,
        ) {
            let mut sizes = StreamSizes::new(LIMITS);
            let (mut time, mut all) = (1_000_000, Vec::new());
            for (number, (pause, bytes)) in entries.into_iter().enumerate() {
                time += pause;
                all.push((id(time), bytes as u64 + ENTRY_OVERHEAD_BYTES));
                sizes.add(id(time), bytes);
                if number % looks == 0 {
                    sizes.oldest_to_keep(Duration::from_millis(time));
                }
            }
            let oldest = sizes.oldest_to_keep(Duration::from_millis(time));
            let size = |from: StreamId| -> u64 {
                all.iter().filter(|(id, _)| *id >= from).map(|(_, bytes)| *bytes).sum()
            };
            let young = id(time - 60_000);
            let kept = size(oldest);
            prop_assert!(kept <= LIMITS.bytes + 2 * LIMITS.bytes / u64::from(SPANS_PER_LIMIT));
            prop_assert!(oldest >= young && kept >= size(young).min(LIMITS.bytes / 2));
        }
    }
}
