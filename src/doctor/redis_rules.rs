//! The rules for Redis.

use super::facts::{RedisFacts, RedisServer};
use super::finding::Finding;
use super::upstream_rules::MAX_CLOCK_DIFFERENCE;
use crate::config::types::Config;
use crate::config::values::MIB;

/// The first release with all commands that the exchange uses.
const MIN_VERSION: (u64, u64) = (6, 2);

/// What Redis needs beside the streams, in bytes.
const BESIDE_STREAMS_BYTES: u64 = 64 * MIB;

const SUBJECT: &str = "redis";

/// Adds the findings of a Redis.
pub(super) fn add(redis: &RedisFacts, config: &Config, found: &mut Vec<Finding>) {
    let server = match &redis.server {
        Ok(server) => server,
        Err(refusal) if refusal.denies_access => {
            let seen = format!("{}: {}", redis.url, refusal.text);
            let remedy = "correct user and password in redis, or the user's permissions (docs/operating.md)";
            found.push(Finding::error("redis_password", SUBJECT, seen, remedy));
            return;
        }
        Err(refusal) => {
            let seen = format!("{}: {}", redis.url, refusal.text);
            let remedy = "start Redis there, or correct redis; without it each balancer decides alone";
            found.push(Finding::error("redis_unreachable", SUBJECT, seen, remedy));
            return;
        }
    };
    found.extend(version(server));
    found.extend(role(server));
    found.extend(memory(server, config.redis_options.stream_bytes));
    if let Some(clock) = server.clock.filter(|clock| clock.differs_by(MAX_CLOCK_DIFFERENCE)) {
        let direction = if clock.ahead > 0.0 { "ahead of" } else { "behind" };
        let seen = format!("its clock is {:.0} s {direction} this machine's", clock.ahead.abs());
        let remedy =
            "synchronise the clocks (chrony, systemd-timesyncd); the exchange itself does not need it";
        found.push(Finding::note("redis_clock", SUBJECT, seen, remedy));
    }
    if let Some(refusal) = &server.info_refused {
        let seen = format!("INFO is refused, so version, role and memory are unknown: {refusal}");
        let remedy = "allow the user +info to have them checked; the balancer does not need it";
        found.push(Finding::note("redis_info_refused", SUBJECT, seen, remedy));
    }
}

fn version(server: &RedisServer) -> Option<Finding> {
    let version = server.version.as_deref()?;
    let mut numbers = version.split('.').map(|part| part.parse::<u64>().ok());
    let release = (numbers.next()??, numbers.next().flatten().unwrap_or(0));
    if release >= MIN_VERSION {
        return None;
    }
    let seen = format!("its version is {version}, and {}.{} is needed", MIN_VERSION.0, MIN_VERSION.1);
    Some(Finding::error("redis_version", SUBJECT, seen, "update Redis"))
}

fn role(server: &RedisServer) -> Option<Finding> {
    if server.role.as_deref()? == "master" {
        return None;
    }
    let seen = "it is a replica, and accepts no writes";
    let remedy = "name the master in redis, or the sentinels: redis+sentinel://host,host/master";
    Some(Finding::error("redis_replica", SUBJECT, seen, remedy))
}

fn memory(server: &RedisServer, stream_bytes: u64) -> Vec<Finding> {
    let mut found = Vec::new();
    // Without a limit Redis neither evicts nor refuses.
    let Some(most) = server.max_memory.filter(|most| *most > 0) else { return found };
    if let Some(policy) = server.memory_policy.as_deref().filter(|policy| *policy != "noeviction") {
        let seen = format!("maxmemory-policy is {policy}: Redis may evict the exchange's streams");
        let remedy = "set maxmemory-policy noeviction, in a Redis of its own";
        found.push(Finding::warning("redis_evicts", SUBJECT, seen, remedy));
    }
    let needed = stream_bytes.saturating_add(BESIDE_STREAMS_BYTES);
    if most < needed {
        let seen = format!(
            "maxmemory is {} MiB, and stream_bytes and 64 MiB more are {} MiB",
            most / MIB,
            needed / MIB
        );
        let remedy = "raise maxmemory, or lower redis_options.stream_bytes";
        found.push(Finding::warning("redis_memory", SUBJECT, seen, remedy));
    }
    found
}
