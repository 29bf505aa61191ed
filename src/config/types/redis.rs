//! What balancers exchange on a Redis, and how often.

use std::time::Duration;

use super::redis_access::{RedisTls, SentinelAccess};
use crate::config::setting::{SettingRow, SettingsTable, duration, integer, row, section, text, value};
use crate::config::values::{HOUR, MINUTE, plain, show_duration};

/// The least number of messages of a balancer within `gauge_ttl`.
const MIN_MESSAGES_PER_TTL: u32 = 3;

/// The settings of the exchange with siblings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisOptions {
    /// The shortest time between two messages.
    pub interval: Duration,
    /// The beginning of all keys.
    pub prefix: String,
    /// How long the load that a silent sibling reported counts.
    pub gauge_ttl: Duration,
    /// About how many messages are kept for balancers that start.
    pub stream_length: u64,
    pub tls: RedisTls,
    pub sentinel: SentinelAccess,
}

impl Default for RedisOptions {
    fn default() -> Self {
        RedisOptions {
            interval: Duration::from_millis(20),
            prefix: "vllm-lb:".into(),
            gauge_ttl: Duration::from_secs(3),
            stream_length: 100_000,
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
            "Approximate number of messages that Redis keeps for balancers that start.",
            &value(|options: &mut Self| &mut options.stream_length, integer(100, 100_000_000)),
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
    }
}
