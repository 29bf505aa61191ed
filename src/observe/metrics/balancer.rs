//! Metrics of the balancer's process: its version, its start and its memory.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use super::exposition::{ExpositionWriter, label_pairs};
use super::spec::{MetricKind, MetricSpec};
use crate::logging;

const BUILD: MetricSpec = MetricSpec {
    name: "vllm_lb_build_info",
    kind: MetricKind::Info,
    labels: &["version", "os", "arch"],
    help: "1, with the version of the balancer and the system that it was built for",
    buckets: &[],
};

const START: MetricSpec =
    MetricSpec::gauge("vllm_lb_start_time_seconds", "when the balancer started, in seconds since 1970", &[]);

const RESIDENT: MetricSpec = MetricSpec::gauge(
    "vllm_lb_resident_bytes",
    "the memory that the process takes, by `/proc`; absent where there is none",
    &[],
);

const LOG_DROPPED: MetricSpec = MetricSpec {
    name: "vllm_lb_log_records_dropped_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "log records that were dropped because standard output did not take them in time \
           ([logs](operating.md#logs))",
    buckets: &[],
};

/// The facts of the process that a page of metrics shows.
pub(super) struct BalancerFacts {
    /// When the balancer started, in seconds since 1970.
    started: f64,
}

impl Default for BalancerFacts {
    fn default() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        BalancerFacts { started: started.as_secs_f64() }
    }
}

impl BalancerFacts {
    /// Writes the metrics.
    pub(super) fn write(&self, page: &mut ExpositionWriter) {
        let labels = [
            ("arch", std::env::consts::ARCH),
            ("os", std::env::consts::OS),
            ("version", env!("CARGO_PKG_VERSION")),
        ];
        page.family(&BUILD);
        page.sample(&BUILD, &label_pairs(labels.into_iter()), 1);
        page.family(&START);
        page.sample(&START, "", self.started);
        if let Some(bytes) = resident_bytes() {
            page.family(&RESIDENT);
            page.sample(&RESIDENT, "", bytes);
        }
        page.family(&LOG_DROPPED);
        page.sample(&LOG_DROPPED, "", logging::dropped());
    }
}

/// The descriptions of these metrics.
#[cfg(test)]
pub(super) fn specs() -> [MetricSpec; 4] {
    [BUILD, START, RESIDENT, LOG_DROPPED]
}

/// The memory that the process takes, in bytes; `None` where the system does not report it.
pub fn resident_bytes() -> Option<u64> {
    resident_of(&fs::read_to_string("/proc/self/status").ok()?)
}

/// Reads the memory from the text of `/proc/self/status`: unlike `statm` it does not count in pages, whose
/// size is the system's.
fn resident_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_status_of_the_process() {
        assert_eq!(resident_of("Name:\tx\nVmRSS:\t    2048 kB\nRssAnon:\t 1 kB\n"), Some(2 << 20));
        assert_eq!(resident_of("Name:\tx\n"), None);
    }
}
