//! Parses an engine's page of metrics: its load, its cache and its start.
//!
//! Under data parallelism a page has a sample for each engine behind the address: requests and cache sizes
//! are added, the usage of the caches is their mean. The parser makes one pass, parses only the few relevant
//! lines, and allocates nothing. Invalid and implausible values count as absent; absent values are never
//! replaced by a number.

use std::str::from_utf8;

use memchr::memchr;

use super::metrics::{MetricSample, MetricsLine, next_label};

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
const USAGE: &str = "vllm:kv_cache_usage_perc";
/// The name of the usage until vLLM 0.9; some versions have both.
const OLD_USAGE: &str = "vllm:gpu_cache_usage_perc";
const CACHE: &str = "vllm:cache_config_info";
const STARTED: &str = "process_start_time_seconds";

const NAMES: [&str; 6] = [RUNNING, WAITING, USAGE, OLD_USAGE, CACHE, STARTED];

/// The largest plausible count of requests, tokens or seconds.
const MAX_SAMPLE_VALUE: f64 = 1e15;

/// The values of a page; each is `None` when the page does not have it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct EngineMetrics {
    /// Requests in the batches of all engines.
    pub running: Option<u64>,
    /// Requests that wait to be scheduled.
    pub waiting: Option<u64>,
    /// The used share of the caches, 0 to 1: the mean over the engines.
    pub kv_usage: Option<f64>,
    /// The capacity of the caches of all engines together, in tokens.
    pub cache_tokens: Option<u64>,
    /// The start of the process, in seconds since 1970; of several, the latest.
    pub started: Option<f64>,
    /// Whether all engines cache prompts.
    pub prefix_caching: Option<bool>,
}

/// Parses a page. A last line without a line end may be cut and is ignored.
pub(crate) fn parse_engine_metrics(page: &[u8]) -> EngineMetrics {
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
        prefix_caching: sums.prefix_caching,
    }
}

#[derive(Default)]
struct MetricSums {
    running: Option<u64>,
    waiting: Option<u64>,
    usage: UsageMean,
    old_usage: UsageMean,
    /// `Some(None)`: an engine does not report its size, so the sum is unknown.
    cache: Option<Option<u64>>,
    started: Option<f64>,
    prefix_caching: Option<bool>,
}

#[derive(Default)]
struct UsageMean {
    sum: f64,
    count: u32,
}

impl EngineMetrics {
    /// Whether the page has none of these values.
    pub(crate) fn is_empty(&self) -> bool {
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
            // The value is always 1.
            (CACHE, _) => {
                let before = self.cache.unwrap_or(Some(0));
                let sum = before.zip(capacity(sample.labels)).map(|(sum, one)| sum.saturating_add(one));
                self.cache = Some(sum);
                if let Some(caches) = prefix_caching(sample.labels) {
                    self.prefix_caching = Some(caches && self.prefix_caching != Some(false));
                }
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

/// Returns the capacity of an engine's cache in tokens, as reported or as blocks times their size. The
/// latter is too large for models with layers that share blocks unevenly.
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

/// Returns whether an engine caches prompts, as Python writes it.
fn prefix_caching(labels: &str) -> Option<bool> {
    let mut rest = labels;
    while let Some((name, value, after)) = next_label(rest) {
        rest = after;
        if name == "enable_prefix_caching" {
            return match value.trim_matches('"') {
                "True" => Some(true),
                "False" => Some(false),
                _ => None,
            };
        }
    }
    None
}

#[cfg(test)]
mod tests;
