//! Parses the settings that an engine's page of metrics reports: what an operator compares between engines.
//!
//! Under data parallelism the engines of a page have the same settings, and the first one counts.

use std::str::from_utf8;

use super::metrics::{MetricSample, MetricsLine, next_label};

/// The longest value of a setting, in characters.
const MAX_VALUE_CHARS: usize = 64;

/// The settings of an engine; each is `None` when the page does not have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EngineInfo {
    /// Whether the page has any metric of vLLM's.
    pub has_engine: bool,
    /// Tokens in a block of the cache.
    pub block_size: Option<u64>,
    /// How blocks are hashed.
    pub hash_algo: Option<String>,
    /// Whether the engine sleeps.
    pub asleep: Option<bool>,
}

/// Parses a page. Invalid lines are ignored.
pub(crate) fn parse_engine_info(page: &[u8]) -> EngineInfo {
    let mut info = EngineInfo::default();
    for line in page.split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        if !line.starts_with(b"vllm:") {
            continue;
        }
        if let Some(MetricsLine::Sample(sample)) = from_utf8(line).ok().and_then(MetricsLine::parse) {
            info.has_engine = true;
            info.take_in(&sample);
        }
    }
    info
}

// === impl EngineInfo ===

impl EngineInfo {
    fn take_in(&mut self, sample: &MetricSample<'_>) {
        match sample.name {
            "vllm:cache_config_info" => {
                let block_size = label(sample.labels, "block_size").and_then(|size| size.parse::<u64>().ok());
                self.block_size = self.block_size.or(block_size.filter(|size| *size > 0));
                let algorithm = label(sample.labels, "prefix_caching_hash_algo");
                let algorithm = algorithm.filter(|name| name.chars().count() <= MAX_VALUE_CHARS);
                self.hash_algo = self.hash_algo.take().or(algorithm.map(str::to_string));
            }
            "vllm:engine_sleep_state" if label(sample.labels, "sleep_state") == Some("awake") => {
                let asleep = sample.value.parse::<f64>().ok().map(|awake| awake == 0.0);
                self.asleep = self.asleep.or(asleep);
            }
            _ => {}
        }
    }
}

/// Returns the value of a label, without its quotes.
fn label<'p>(labels: &'p str, wanted: &str) -> Option<&'p str> {
    let mut rest = labels;
    while let Some((name, value, after)) = next_label(rest) {
        if name == wanted {
            return Some(value.trim_matches('"'));
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_the_settings_of_a_real_server() {
        let page = include_bytes!("../../tests/data/vllm-0.32/metrics.body");
        let expected = EngineInfo {
            has_engine: true,
            block_size: Some(32),
            hash_algo: Some("sha256".into()),
            asleep: Some(false),
        };
        assert_eq!(parse_engine_info(page), expected);
    }

    #[test]
    fn what_is_not_reported_is_absent() {
        for page in ["", "process_start_time_seconds 1\n", "# TYPE vllm:x gauge\n", "vllm:\n", "vllm:x{ 1\n"]
        {
            assert_eq!(parse_engine_info(page.as_bytes()), EngineInfo::default(), "{page}");
        }
        let page = "vllm:cache_config_info{block_size=\"None\",engine=\"0\"} 1.0\n\
                    vllm:engine_sleep_state{sleep_state=\"awake\"} 0.0\n\
                    vllm:engine_sleep_state{sleep_state=\"discard_all\"} 1.0\n";
        let expected = EngineInfo { has_engine: true, asleep: Some(true), ..EngineInfo::default() };
        assert_eq!(parse_engine_info(page.as_bytes()), expected);
    }

    proptest! {
        #[test]
        fn accepts_any_page(page in prop::collection::vec(any::<u8>(), 0..200)) {
            parse_engine_info(&page);
        }
    }
}
