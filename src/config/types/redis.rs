//! What balancers exchange on a Redis, and how often.

use std::time::Duration;

use serde_json::{Value, json};

use super::redis_access::{RedisTls, SentinelAccess};
use crate::config::setting::{
    MapSource, SettingRow, SettingsTable, ValueForm, duration, integer, list, row, section, size, text, value,
};
use crate::config::values::{
    DAY, GIB, HOUR, MIB, MINUTE, ReadResult, SECOND, integer_in, plain, show_duration,
};

/// The least number of messages of a balancer within `gauge_ttl`.
const MIN_MESSAGES_PER_TTL: u32 = 3;

/// The largest number of streams of chains.
const MAX_CHAIN_STREAMS: usize = 64;

/// The settings of the exchange with siblings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisOptions {
    /// The shortest time between two messages.
    pub interval: Duration,
    /// The beginning of all keys.
    pub prefix: String,
    /// How long the load that a silent sibling reported counts.
    pub gauge_ttl: Duration,
    /// About how many messages each stream keeps for balancers that start.
    pub stream_length: u64,
    /// How long a message is kept.
    pub stream_age: Duration,
    /// About how many bytes all streams together keep.
    pub stream_bytes: u64,
    /// The number of streams over which chains are spread.
    pub chain_streams: usize,
    /// The streams of chains that this balancer publishes to and reads; empty: all.
    pub chain_streams_served: Vec<usize>,
    pub tls: RedisTls,
    pub sentinel: SentinelAccess,
}

/// `all`, or a list of numbers.
struct ServedStreamsForm;

impl Default for RedisOptions {
    fn default() -> Self {
        RedisOptions {
            interval: Duration::from_millis(20),
            prefix: "vllm-lb:".into(),
            gauge_ttl: Duration::from_secs(3),
            stream_length: 20_000,
            stream_age: MINUTE,
            stream_bytes: 64 * MIB,
            chain_streams: 1,
            chain_streams_served: Vec::new(),
            tls: RedisTls::default(),
            sentinel: SentinelAccess::default(),
        }
    }
}

// === impl RedisOptions ===

impl SettingsTable for RedisOptions {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "interval",
            "Shortest time between two messages of a balancer; shorter gives better routing.",
            &value(|options: &mut Self| &mut options.interval, duration(Duration::from_millis(1), MINUTE)),
        ),
        row(
            "prefix",
            "Beginning of every key in Redis; balancers with another prefix are not siblings.",
            &value(|options: &mut Self| &mut options.prefix, text("text", plain)),
        ),
        row(
            "gauge_ttl",
            "Time for which the load that a silent sibling reported counts; at least three intervals.",
            &value(|options: &mut Self| &mut options.gauge_ttl, duration(Duration::from_millis(100), HOUR)),
        ),
        row(
            "stream_length",
            "Approximate number of messages that each stream keeps for balancers that start.",
            &value(|options: &mut Self| &mut options.stream_length, integer(100, 100_000_000)),
        ),
        row(
            "stream_age",
            "Time for which Redis keeps a message; longer makes a balancer that starts know more.",
            &value(|options: &mut Self| &mut options.stream_age, duration(SECOND, DAY)),
        ),
        row(
            "stream_bytes",
            "Approximate bytes of the messages that all streams keep together.",
            &value(|options: &mut Self| &mut options.stream_bytes, size(MIB, 64 * GIB)),
        ),
        row(
            "chain_streams",
            "Streams over which the prompts are spread; all balancers on a Redis need the same.",
            &value(|options: &mut Self| &mut options.chain_streams, integer(1, MAX_CHAIN_STREAMS as u64)),
        ),
        row(
            "chain_streams_served",
            "Streams of prompts that this balancer publishes to and reads: all, or numbers from 0.",
            &value(|options: &mut Self| &mut options.chain_streams_served, ServedStreamsForm),
        ),
        row(
            "tls",
            "Certificates of connections to Redis and its sentinels, for a URL with rediss.",
            &section(|options: &mut Self| &mut options.tls),
        ),
        row(
            "sentinel",
            "The user of the sentinels of a URL with +sentinel.",
            &section(|options: &mut Self| &mut options.sentinel),
        ),
    ];

    fn defaults() -> Self {
        RedisOptions::default()
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        if self.interval * MIN_MESSAGES_PER_TTL > self.gauge_ttl {
            let (small, large) = (show_duration(self.interval), show_duration(self.gauge_ttl));
            let what = format!("{small} is more than a third of redis_options.gauge_ttl, which is {large}");
            report("interval", what);
        }
        if let Some(most) = self.chain_streams_served.iter().find(|number| **number >= self.chain_streams) {
            let last = self.chain_streams.saturating_sub(1);
            let what = format!("{most} is no stream of redis_options.chain_streams: write 0 to {last}");
            report("chain_streams_served", what);
        }
    }
}

// === impl ServedStreamsForm ===

impl ValueForm<Vec<usize>> for ServedStreamsForm {
    fn kind(&self) -> &'static str {
        "all, or list of whole numbers"
    }

    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut Vec<usize>) {
        if from.is_list(key) {
            let numbers = list(self.kind(), stream_number, sorted, |all| json!(all));
            return numbers.not_empty("write all, or leave the key out").read(key, from, into);
        }
        from.text(key, &mut |text| {
            *into = if text == "all" { Vec::new() } else { vec![stream_number(text)?] };
            Ok(())
        });
    }

    fn show(&self, served: &Vec<usize>) -> Value {
        if served.is_empty() { json!("all") } else { json!(served) }
    }
}

fn stream_number(text: &str) -> ReadResult<usize> {
    integer_in(0..=MAX_CHAIN_STREAMS - 1)(text)
}

fn sorted(mut numbers: Vec<usize>) -> Vec<usize> {
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}
