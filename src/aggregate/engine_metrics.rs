//! What one engine's page of metrics says of its load, its cache and its start.
//!
//! Under data parallelism a page has a sample for each engine behind the one address: requests and cache
//! sizes are added, the usage of the caches is their mean. One pass; only the few lines that matter are
//! looked at more closely, and nothing is allocated. What cannot be read, or makes no sense, is absent.
//!
//! Never: a number in place of one that the page does not say.

use std::str::from_utf8;

use memchr::memchr;

use super::metrics::{MetricSample, MetricsLine, next_label};

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
const USAGE: &str = "vllm:kv_cache_usage_perc";
/// How the usage was called until 0.9; for a while both were there.
const OLD_USAGE: &str = "vllm:gpu_cache_usage_perc";
const CACHE: &str = "vllm:cache_config_info";
const STARTED: &str = "process_start_time_seconds";

const NAMES: [&str; 6] = [RUNNING, WAITING, USAGE, OLD_USAGE, CACHE, STARTED];

/// What is more than this is no count of requests, of tokens or of seconds.
const MAX_SAMPLE_VALUE: f64 = 1e15;

/// All of it is absent where the page does not say it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineMetrics {
    /// Requests in the batches of all engines.
    pub running: Option<u64>,
    /// Requests that wait to be scheduled.
    pub waiting: Option<u64>,
    /// The used share of the caches, 0 to 1: the mean over the engines.
    pub kv_usage: Option<f64>,
    /// Tokens that the caches of all engines hold together.
    pub cache_tokens: Option<u64>,
    /// When the process began, seconds since 1970; of several, the latest.
    pub started: Option<f64>,
}

/// Reads a page. A last line without its end may be cut, and says nothing.
pub fn parse_engine_metrics(page: &[u8]) -> EngineMetrics {
    let mut sums = MetricSums::default();
    let mut rest = page;
    while let Some(end) = memchr(b'\n', rest) {
        let line = rest[..end].trim_ascii_start();
        rest = &rest[end + 1..];
        if !NAMES.iter().any(|name| line.starts_with(name.as_bytes())) {
            continue;
        }
        if let Some(MetricsLine::Sample(sample)) = from_utf8(line).ok().and_then(MetricsLine::parse) {
            sums.take_in(&sample);
        }
    }
    EngineMetrics {
        running: sums.running,
        waiting: sums.waiting,
        kv_usage: sums.usage.mean().or(sums.old_usage.mean()),
        cache_tokens: sums.cache.flatten(),
        started: sums.started,
    }
}

#[derive(Default)]
struct MetricSums {
    running: Option<u64>,
    waiting: Option<u64>,
    usage: UsageMean,
    old_usage: UsageMean,
    /// `Some(None)`: an engine does not say its size, so that the sum is not known.
    cache: Option<Option<u64>>,
    started: Option<f64>,
}

#[derive(Default)]
struct UsageMean {
    sum: f64,
    count: u32,
}

impl EngineMetrics {
    /// Whether the page said nothing that is of use here.
    pub fn is_empty(&self) -> bool {
        *self == EngineMetrics::default()
    }
}

// === impl Sums ===

impl MetricSums {
    fn take_in(&mut self, sample: &MetricSample<'_>) {
        let value = sample.value.parse().ok().filter(|value| (0.0..=MAX_SAMPLE_VALUE).contains(value));
        match (sample.name, value) {
            (RUNNING, Some(value)) => add(&mut self.running, value),
            (WAITING, Some(value)) => add(&mut self.waiting, value),
            (USAGE, Some(value)) => self.usage.take_in(value),
            (OLD_USAGE, Some(value)) => self.old_usage.take_in(value),
            (STARTED, Some(value)) => self.started = Some(self.started.map_or(value, |at| at.max(value))),
            // Its value is 1 and says nothing.
            (CACHE, _) => {
                let before = self.cache.unwrap_or(Some(0));
                let sum = before.zip(capacity(sample.labels)).map(|(sum, one)| sum.saturating_add(one));
                self.cache = Some(sum);
            }
            _ => {}
        }
    }
}

impl UsageMean {
    fn take_in(&mut self, share: f64) {
        self.sum += share.min(1.0);
        self.count += 1;
    }

    fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }
}

fn add(sum: &mut Option<u64>, value: f64) {
    *sum = Some(sum.unwrap_or(0).saturating_add(value as u64));
}

/// Tokens that an engine's cache holds, in its own words or as blocks times their size, which is too much
/// for models whose layers share blocks unevenly.
fn capacity(labels: &str) -> Option<u64> {
    let (mut tokens, mut blocks, mut block) = (None, None, None);
    let mut rest = labels;
    while let Some((name, value, after)) = next_label(rest) {
        rest = after;
        let number = || value.trim_matches('"').parse::<u64>().ok().filter(|number| *number > 0);
        match name {
            "kv_cache_size_tokens" => tokens = number(),
            "num_gpu_blocks" => blocks = number(),
            "block_size" => block = number(),
            _ => {}
        }
    }
    tokens.or_else(|| blocks?.checked_mul(block?))
}

#[cfg(test)]
mod tests;
