//! Makes metrics, and keeps them in the order in which they are written and documented.

use std::cell::RefCell;
use std::sync::Arc;

use super::series::{
    Counter, FloatGauge, IntGauge, MetricVec, RegisteredMetric, SecondsHistogram, SeriesValue,
};
use super::spec::{MetricKind, MetricSpec};

/// The bounds of histograms of requests in seconds: a first token takes from a millisecond to ten minutes.
const REQUEST_BOUNDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

/// The bounds of histograms of short times in seconds: the balancer's own work takes less than a millisecond.
const SHORT_BOUNDS: &[f64] =
    &[0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

/// Makes metrics, and keeps them in the order in which they were made.
#[derive(Default)]
pub(super) struct MetricsBuilder {
    made: RefCell<Vec<Box<dyn RegisteredMetric>>>,
}

impl MetricsBuilder {
    /// Counters with these labels.
    pub(super) fn counters(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> MetricVec<Counter> {
        self.enter(MetricSpec { name, kind: MetricKind::Counter, labels, help, buckets: &[] })
    }

    /// A counter without labels.
    pub(super) fn counter(&self, name: &'static str, help: &'static str) -> Arc<Counter> {
        self.counters(name, help, &[]).with_label_values(&[])
    }

    /// Gauges of whole numbers with these labels.
    pub(super) fn gauges(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> MetricVec<IntGauge> {
        self.enter(MetricSpec::gauge(name, help, labels))
    }

    /// Gauges with these labels.
    pub(super) fn float_gauges(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> MetricVec<FloatGauge> {
        self.enter(MetricSpec::gauge(name, help, labels))
    }

    /// A gauge of whole numbers without labels.
    pub(super) fn gauge(&self, name: &'static str, help: &'static str) -> Arc<IntGauge> {
        self.enter(MetricSpec::gauge(name, help, &[])).with_label_values(&[])
    }

    /// A gauge without labels.
    pub(super) fn float_gauge(&self, name: &'static str, help: &'static str) -> Arc<FloatGauge> {
        self.enter(MetricSpec::gauge(name, help, &[])).with_label_values(&[])
    }

    /// Histograms of the times of requests, with these labels.
    pub(super) fn histogram_by(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> MetricVec<SecondsHistogram> {
        self.enter(MetricSpec { name, kind: MetricKind::Histogram, labels, help, buckets: REQUEST_BOUNDS })
    }

    /// A histogram of short times without labels.
    pub(super) fn short_histogram(&self, name: &'static str, help: &'static str) -> Arc<SecondsHistogram> {
        let kind = MetricKind::Histogram;
        self.enter(MetricSpec { name, kind, labels: &[], help, buckets: SHORT_BOUNDS }).with_label_values(&[])
    }

    fn enter<V: SeriesValue + 'static>(&self, spec: MetricSpec) -> MetricVec<V> {
        let metric = MetricVec::new(spec);
        self.made.borrow_mut().push(Box::new(metric.clone()));
        metric
    }

    /// All metrics that were made.
    pub(super) fn finish(self) -> Vec<Box<dyn RegisteredMetric>> {
        self.made.into_inner()
    }
}
