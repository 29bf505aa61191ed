//! Logs and metrics: one [`Observer`] for each balancer, with one method for each event, which writes the
//! log record and updates the metrics together. No other module names a metric or logs an event.
//!
//! The assembly makes the observer and hands it down; clones share what is counted. Two balancers of one
//! process share nothing but the log. Events of the process itself (`process`) have no metric.
//!
//! Messages are fixed texts; values are fields. Label values are bounded: models that no upstream serves
//! are counted as `other`.
//!
//! Never: read a metric to decide something. Code that needs a count keeps its own.

pub(crate) mod decisions;
mod discovery;
mod gauge_guard;
mod listeners;
mod metrics;
pub(crate) mod process;
pub(crate) mod queue;
mod recent;
pub mod request;
mod siblings;
mod spans;
mod traces;
pub(crate) mod traffic;
mod upstreams;
pub(crate) mod usage;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use log::{error, info, warn};

pub use gauge_guard::GaugeGuard;
pub use metrics::{ExpositionFormat, UpstreamGauges, resident_bytes};

use decisions::Decisions;
use metrics::Metrics;
use traffic::{BalancerTraffic, TrafficCounters, UpstreamTraffic};
use usage::UsageTotals;

/// How long the series of what has gone are kept for a page of metrics that no caller requests.
const MAX_UNSEEN_TIME: Duration = Duration::from_secs(3600);

/// The log and the metrics of one balancer. Clones are the same observer.
#[derive(Clone, Default)]
pub struct Observer(Arc<Observed>);

/// Everything that one balancer counts and keeps for display.
#[derive(Default)]
struct Observed {
    metrics: Metrics,
    decisions: Decisions,
    usage: UsageTotals,
    traffic: TrafficCounters,
    /// When the series of what has gone were last removed, in seconds since the start.
    series_forgotten_at: AtomicU64,
    /// Whether the trace store fails: only the first failure in a row is logged as a warning.
    is_trace_store_failing: AtomicBool,
    /// Whether exports of spans fail, or spans are dropped: only the changes are logged.
    is_span_export_failing: AtomicBool,
    /// Whether spans were dropped since the last export.
    has_dropped_spans: AtomicBool,
}

impl Observer {
    /// The latest choices of upstreams, for display.
    pub fn decisions(&self) -> &Decisions {
        &self.0.decisions
    }

    /// The token usage of all answers, for display.
    pub fn usage(&self) -> &UsageTotals {
        &self.0.usage
    }

    /// The page of all metrics, and of the upstreams' gauges as they are now.
    pub fn render(&self, format: ExpositionFormat, upstreams: &[UpstreamGauges<'_>]) -> Vec<u8> {
        self.metrics().render(format, upstreams)
    }

    /// Removes the series of upstreams and models that have gone.
    pub fn forget_series(&self, has_upstream: impl Fn(&str) -> bool, serves_model: impl Fn(&str) -> bool) {
        self.0.series_forgotten_at.store(self.traffic().age().as_secs(), Relaxed);
        self.metrics().forget(&|label, value| match label {
            "upstream" => !value.is_empty() && !has_upstream(value),
            "model" => value != metrics::OTHER_MODEL && !serves_model(value),
            _ => false,
        });
    }

    /// Does the same after a long time without a request for the page of metrics. Cheap otherwise.
    pub fn forget_unseen_series(
        &self,
        has_upstream: impl Fn(&str) -> bool,
        serves_model: impl Fn(&str) -> bool,
    ) {
        self.forget_unseen_series_at(self.traffic().age(), has_upstream, serves_model);
    }

    fn forget_unseen_series_at(
        &self,
        age: Duration,
        has_upstream: impl Fn(&str) -> bool,
        serves_model: impl Fn(&str) -> bool,
    ) {
        let since = age.as_secs().saturating_sub(self.0.series_forgotten_at.load(Relaxed));
        if since >= MAX_UNSEEN_TIME.as_secs() {
            self.forget_series(has_upstream, serves_model);
        }
    }

    /// The numbers of an upstream, for display.
    pub fn upstream_traffic(&self, name: &str) -> UpstreamTraffic {
        self.traffic().upstream(name)
    }

    /// The numbers of the balancer, for display.
    pub fn balancer_traffic(&self) -> BalancerTraffic {
        let (metrics, level) = (self.metrics(), |gauge: i64| u64::try_from(gauge).unwrap_or(0));
        BalancerTraffic {
            in_flight: level(metrics.requests.in_flight.get()),
            queued: level(metrics.requests.queued.get()),
            connections: level(metrics.connections.get()),
            peeked_bytes: level(metrics.requests.peeked_bytes.get()),
            ..self.traffic().balancer()
        }
    }

    fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn traffic(&self) -> &TrafficCounters {
        &self.0.traffic
    }

    /// Records a reload that was applied.
    pub fn reloaded(&self, changed: &[String], restart: &[String], warnings: &[String]) {
        self.metrics().reloads.with_label_values(&["ok"]).inc();
        let changed = if changed.is_empty() { "nothing".into() } else { changed.join(", ") };
        info!(changed = changed; "reloaded");
        if !restart.is_empty() {
            warn!(keys = restart.join(", "); "these changes need a restart");
        }
        for warning in warnings {
            warn!("{warning}");
        }
    }

    /// Records a reload that found problems; the running configuration stays.
    pub fn reload_failed(&self, problems: &[String]) {
        self.metrics().reloads.with_label_values(&["failed"]).inc();
        for problem in problems {
            error!(problem = problem.as_str(); "reload failed");
        }
    }
}

/// The value of a counter's increment.
fn counted(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// The value of a gauge.
fn gauge(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(observer: &Observer) -> String {
        String::from_utf8(observer.render(ExpositionFormat::Text, &[])).unwrap()
    }

    #[test]
    fn clones_share_their_metrics_and_other_observers_do_not() {
        let (one, other) = (Observer::default(), Observer::default());
        one.clone().rejected("path");
        let line = "vllm_lb_rejects_total{reason=\"path\"} 1\n";
        assert!(page(&one).contains(line));
        assert!(!page(&other).contains(line), "two balancers of one process count apart");
    }

    /// Regression: only a request for the page removed series, so that a changing fleet without such requests
    /// filled the memory.
    #[test]
    fn series_of_what_has_gone_are_removed_though_nobody_asks_for_the_page() {
        let observer = Observer::default();
        ["gone", "stays"].iter().for_each(|name| observer.probed(name));
        let forget = |age| observer.forget_unseen_series_at(age, |name| name == "stays", |_| true);
        forget(MAX_UNSEEN_TIME - Duration::from_secs(1));
        assert!(page(&observer).contains("probes_total{upstream=\"gone\"} 1\n"), "a page may come yet");
        forget(MAX_UNSEEN_TIME);
        assert!(!page(&observer).contains("gone"));
        assert!(page(&observer).contains("probes_total{upstream=\"stays\"} 1\n"));
    }

    #[test]
    fn a_gauge_falls_when_its_guard_is_dropped() {
        let observer = Observer::default();
        let guards = [observer.request_in_flight(), observer.request_in_flight()];
        assert!(page(&observer).contains("vllm_lb_in_flight 2\n"));
        drop(guards);
        assert!(page(&observer).contains("vllm_lb_in_flight 0\n"));
    }
}
