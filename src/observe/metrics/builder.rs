//! Creates metrics in a registry.

use prometheus::core::Collector;
use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// Histogram buckets in seconds: a first token takes from a millisecond to ten minutes.
const SECONDS_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

/// Creates and registers metrics. Names and labels are constants of this directory, so a failure is a typing
/// mistake, which the first test run finds.
#[derive(Default)]
pub(super) struct MetricsBuilder {
    pub registry: Registry,
}

impl MetricsBuilder {
    /// Counters with these labels.
    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.enter(IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// A counter.
    pub(super) fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.enter(IntCounter::new(name, help))
    }

    /// A gauge.
    pub(super) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.enter(IntGauge::new(name, help))
    }

    /// Histograms of seconds, one for each model.
    pub(super) fn histogram(&self, name: &str, help: &str) -> HistogramVec {
        self.histogram_by(name, help, &["model"])
    }

    /// Histograms of seconds with these labels.
    pub(super) fn histogram_by(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(SECONDS_BUCKETS.to_vec());
        self.enter(HistogramVec::new(options, labels))
    }

    /// Registers a metric.
    pub(super) fn enter<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("metric names and labels in these files are valid");
        self.registry.register(Box::new(collector.clone())).expect("each metric is registered once");
        collector
    }
}
