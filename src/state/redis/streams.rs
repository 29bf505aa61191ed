//! The streams in Redis: the urgent one, with small messages that routing needs at once, and the ones of the
//! chains, which are large and may lag.
//!
//! A chain goes to the stream that the hash of its opening selects among the streams that this balancer
//! serves. So all parts of a chain are in one stream, in their order, and balancers that serve the same
//! streams read the same chains.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::reply::StreamId;
use super::stream_sizes::{StreamLimits, StreamSizes};
use crate::config::types::RedisOptions;
use crate::state::exchange::Outbox;

/// The share of the bytes of all streams that the urgent one may take: one part in this number.
const URGENT_SHARE_DIVISOR: u64 = 8;

/// The largest size of the chains that wait to be published, in bytes of memory.
const MAX_WAITING_CHAIN_BYTES: usize = 4 << 20;

/// One stream, and the sizes of its entries.
pub(super) struct SharedStream {
    pub key: String,
    sizes: Mutex<StreamSizes>,
}

/// One stream of chains, and the events that wait to be published there.
pub(super) struct ChainStream {
    pub stream: SharedStream,
    pub waiting: Outbox,
}

/// All streams that this balancer publishes to and reads.
pub(super) struct ExchangeStreams {
    pub urgent: SharedStream,
    /// The served streams of chains, in the order of their numbers; at least one.
    pub chains: Vec<ChainStream>,
}

// === impl SharedStream ===

impl SharedStream {
    fn new(key: String, limits: StreamLimits) -> Self {
        SharedStream { key, sizes: Mutex::new(StreamSizes::new(limits)) }
    }

    /// Counts an entry that was read.
    pub(super) fn count(&self, id: StreamId, bytes: usize) {
        self.sizes().add(id, bytes);
    }

    /// Returns the id of the oldest entry to keep when it is `redis_time` at Redis.
    pub(super) fn oldest_to_keep(&self, redis_time: Duration) -> StreamId {
        self.sizes().oldest_to_keep(redis_time)
    }

    fn sizes(&self) -> MutexGuard<'_, StreamSizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl ExchangeStreams ===

impl ExchangeStreams {
    /// Builds the streams; `key` returns the key of a name.
    pub(super) fn new(options: &RedisOptions, key: impl Fn(&str) -> String) -> Self {
        let count = options.chain_streams.max(1);
        let served = match options.chain_streams_served.as_slice() {
            [] => (0..count).collect(),
            served => served.to_vec(),
        };
        let urgent_bytes = options.stream_bytes / URGENT_SHARE_DIVISOR;
        let chain_bytes = (options.stream_bytes - urgent_bytes) / count as u64;
        let limits = |bytes| StreamLimits { age: options.stream_age, bytes };
        let waiting_bytes = MAX_WAITING_CHAIN_BYTES / served.len();
        let chain_stream = |number: usize| ChainStream {
            stream: SharedStream::new(key(&chain_stream_name(number, count)), limits(chain_bytes)),
            waiting: Outbox::new(waiting_bytes),
        };
        ExchangeStreams {
            urgent: SharedStream::new(key("stream"), limits(urgent_bytes)),
            chains: served.into_iter().map(chain_stream).collect(),
        }
    }

    /// Returns the stream of the chains with this opening.
    pub(super) fn of_opening(&self, opening: u64) -> &ChainStream {
        &self.chains[(opening % self.chains.len() as u64) as usize]
    }

    /// Returns all streams.
    pub(super) fn all(&self) -> impl Iterator<Item = &SharedStream> {
        std::iter::once(&self.urgent).chain(self.chains.iter().map(|chain| &chain.stream))
    }
}

fn chain_stream_name(number: usize, count: usize) -> String {
    match count {
        1 => "chains".into(),
        _ => format!("chains:{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(chain_streams: usize, served: &[usize]) -> Vec<String> {
        let chain_streams_served = served.to_vec();
        let options = RedisOptions { chain_streams, chain_streams_served, ..RedisOptions::default() };
        let streams = ExchangeStreams::new(&options, |name| format!("p:{name}"));
        let keys: Vec<String> = streams.all().map(|stream| stream.key.clone()).collect();
        // Every opening has a stream, and equal openings have the same one.
        for opening in 0..100 {
            let key = &streams.of_opening(opening).stream.key;
            assert!(keys[1..].contains(key) && *key == streams.of_opening(opening).stream.key);
        }
        let used: std::collections::HashSet<&String> =
            (0..100).map(|opening| &streams.of_opening(opening).stream.key).collect();
        assert_eq!(used.len(), keys.len() - 1);
        keys
    }

    #[test]
    fn names_the_streams_and_spreads_openings_over_the_served_ones() {
        assert_eq!(keys(1, &[]), ["p:stream", "p:chains"]);
        assert_eq!(keys(3, &[]), ["p:stream", "p:chains:0", "p:chains:1", "p:chains:2"]);
        assert_eq!(keys(4, &[0, 3]), ["p:stream", "p:chains:0", "p:chains:3"]);
        assert_eq!(keys(4, &[2]), ["p:stream", "p:chains:2"]);
    }

    #[test]
    fn divides_the_bytes_among_the_streams() {
        let options = RedisOptions { stream_bytes: 16 << 20, chain_streams: 2, ..RedisOptions::default() };
        let streams = ExchangeStreams::new(&options, str::to_string);
        let kept = |stream: &SharedStream| {
            for number in 1..20_000 {
                stream.count(StreamId { millis: 1_000, number }, 4096 - 32);
            }
            20_000 - stream.oldest_to_keep(Duration::from_secs(1)).number
        };
        let blocks: Vec<u64> = streams.all().map(|stream| kept(stream) / 256).collect();
        assert_eq!(blocks, [1, 6, 6], "about 2, 7 and 7 MiB");
    }
}
