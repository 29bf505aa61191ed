//! The series of a metric: one value for each combination of the values of its labels.
//!
//! A series is found by a hash of its labels' values, which are compared then: two combinations never share a
//! series. The text of its labels is written once. A series is removed when its upstream or its model has
//! gone, so that a fleet that changes for months does not fill the memory.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use super::exposition::{ExpositionWriter, label_pairs};
use super::spec::MetricSpec;

/// A value that rises.
#[derive(Default)]
pub(in crate::observe) struct Counter(AtomicU64);

/// A whole number that rises and falls.
#[derive(Default)]
pub(in crate::observe) struct IntGauge(AtomicI64);

/// A number that rises and falls.
#[derive(Default)]
pub(in crate::observe) struct FloatGauge(AtomicU64);

/// A distribution of times.
pub(in crate::observe) struct SecondsHistogram {
    bounds: &'static [f64],
    /// One more than the bounds: the last is of the values above all of them.
    counts: Box<[AtomicU64]>,
    /// A whole number, so that a sum costs one addition.
    nanoseconds: AtomicU64,
}

/// The value of one series.
pub(in crate::observe) trait SeriesValue: Send + Sync {
    /// A value before the first event.
    fn begin(spec: &MetricSpec) -> Self;

    /// Writes the samples.
    fn write(&self, spec: &MetricSpec, labels: &str, page: &mut ExpositionWriter);
}

/// One series.
struct LabelledSeries<V> {
    /// In the order of the metric's labels.
    values: Box<[Box<str>]>,
    value: Arc<V>,
}

/// The series of one metric. Clones are the same metric.
pub(in crate::observe) struct MetricVec<V>(Arc<SeriesTable<V>>);

struct SeriesTable<V> {
    spec: MetricSpec,
    hasher: RandomState,
    /// Read by every event; written by the first event of a series.
    index: RwLock<SeriesIndex<V>>,
}

struct SeriesIndex<V> {
    /// Mostly one series a hash.
    by_hash: HashMap<u64, Vec<Arc<LabelledSeries<V>>>>,
    /// By the text of the labels, the order in which the series are written.
    ordered: BTreeMap<String, Arc<LabelledSeries<V>>>,
}

/// A metric whose kind of value does not matter.
pub(super) trait RegisteredMetric: Send + Sync {
    #[cfg(test)]
    fn spec(&self) -> &MetricSpec;

    /// Writes the metric, if it has a series.
    fn write(&self, page: &mut ExpositionWriter);

    /// Removes the series with a label that has a value for which `is_gone` is true.
    fn forget(&self, is_gone: &dyn Fn(&str, &str) -> bool);
}

// === values ===

impl Counter {
    pub(in crate::observe) fn inc(&self) {
        self.inc_by(1);
    }

    pub(in crate::observe) fn inc_by(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }
}

impl SeriesValue for Counter {
    fn begin(_: &MetricSpec) -> Self {
        Counter::default()
    }

    fn write(&self, spec: &MetricSpec, labels: &str, page: &mut ExpositionWriter) {
        page.sample(spec, labels, self.0.load(Relaxed));
    }
}

impl IntGauge {
    pub(in crate::observe) fn inc(&self) {
        self.add(1);
    }

    pub(in crate::observe) fn dec(&self) {
        self.sub(1);
    }

    pub(in crate::observe) fn add(&self, count: i64) {
        self.0.fetch_add(count, Relaxed);
    }

    pub(in crate::observe) fn sub(&self, count: i64) {
        self.0.fetch_sub(count, Relaxed);
    }

    pub(in crate::observe) fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    pub(in crate::observe) fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

impl SeriesValue for IntGauge {
    fn begin(_: &MetricSpec) -> Self {
        IntGauge::default()
    }

    fn write(&self, spec: &MetricSpec, labels: &str, page: &mut ExpositionWriter) {
        page.sample(spec, labels, self.0.load(Relaxed));
    }
}

impl FloatGauge {
    pub(in crate::observe) fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Relaxed);
    }
}

impl SeriesValue for FloatGauge {
    fn begin(_: &MetricSpec) -> Self {
        FloatGauge::default()
    }

    fn write(&self, spec: &MetricSpec, labels: &str, page: &mut ExpositionWriter) {
        page.sample(spec, labels, f64::from_bits(self.0.load(Relaxed)));
    }
}

impl SecondsHistogram {
    /// Adds a time in seconds.
    pub(in crate::observe) fn observe(&self, seconds: f64) {
        // A bucket has the values up to its bound.
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[bucket].fetch_add(1, Relaxed);
        // Negative values and those beyond the range are cut to it.
        self.nanoseconds.fetch_add((seconds * 1e9) as u64, Relaxed);
    }
}

impl SeriesValue for SecondsHistogram {
    fn begin(spec: &MetricSpec) -> Self {
        SecondsHistogram {
            bounds: spec.buckets,
            counts: (0..=spec.buckets.len()).map(|_| AtomicU64::new(0)).collect(),
            nanoseconds: AtomicU64::new(0),
        }
    }

    fn write(&self, spec: &MetricSpec, labels: &str, page: &mut ExpositionWriter) {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        page.histogram(spec, labels, &counts, self.nanoseconds.load(Relaxed) as f64 / 1e9);
    }
}

// === impl MetricVec ===

impl<V> Clone for MetricVec<V> {
    fn clone(&self) -> Self {
        MetricVec(self.0.clone())
    }
}

impl<V: SeriesValue> MetricVec<V> {
    pub(super) fn new(spec: MetricSpec) -> Self {
        let index = SeriesIndex { by_hash: HashMap::new(), ordered: BTreeMap::new() };
        MetricVec(Arc::new(SeriesTable { spec, hasher: RandomState::new(), index: RwLock::new(index) }))
    }

    /// The value of the series with these labels, in the order of the metric's labels. The first event of a
    /// series makes it.
    pub(in crate::observe) fn with_label_values(&self, values: &[&str]) -> Arc<V> {
        let SeriesTable { hasher, index, .. } = &*self.0;
        let hash = hasher.hash_one(values);
        let found = index.read().unwrap_or_else(PoisonError::into_inner).find(hash, values);
        found.unwrap_or_else(|| self.add(hash, values))
    }

    fn add(&self, hash: u64, values: &[&str]) -> Arc<V> {
        let SeriesTable { spec, index, .. } = &*self.0;
        let mut pairs: Vec<(&str, &str)> = spec.labels.iter().copied().zip(values.iter().copied()).collect();
        pairs.sort_unstable();
        let mut index = index.write().unwrap_or_else(PoisonError::into_inner);
        // Another event may have been the first.
        if let Some(found) = index.find(hash, values) {
            return found;
        }
        let value = Arc::new(V::begin(spec));
        let values = values.iter().map(|value| Box::from(*value)).collect();
        let series = Arc::new(LabelledSeries { values, value: value.clone() });
        index.by_hash.entry(hash).or_default().push(series.clone());
        index.ordered.insert(label_pairs(pairs.into_iter()), series);
        value
    }
}

impl<V> SeriesIndex<V> {
    fn find(&self, hash: u64, values: &[&str]) -> Option<Arc<V>> {
        let mut series = self.by_hash.get(&hash)?.iter();
        let same = |known: &[Box<str>]| known.iter().map(|known| &**known).eq(values.iter().copied());
        Some(series.find(|series| same(&series.values))?.value.clone())
    }
}

impl<V: SeriesValue> RegisteredMetric for MetricVec<V> {
    #[cfg(test)]
    fn spec(&self) -> &MetricSpec {
        &self.0.spec
    }

    fn write(&self, page: &mut ExpositionWriter) {
        let SeriesTable { spec, index, .. } = &*self.0;
        let index = index.read().unwrap_or_else(PoisonError::into_inner);
        if index.ordered.is_empty() {
            return;
        }
        page.family(spec);
        for (labels, series) in &index.ordered {
            series.value.write(spec, labels, page);
        }
    }

    fn forget(&self, is_gone: &dyn Fn(&str, &str) -> bool) {
        let SeriesTable { spec, index, .. } = &*self.0;
        let gone = |series: &LabelledSeries<V>| {
            spec.labels.iter().zip(&series.values).any(|(label, value)| is_gone(label, value))
        };
        if !index.read().unwrap_or_else(PoisonError::into_inner).ordered.values().any(|series| gone(series)) {
            return;
        }
        let mut index = index.write().unwrap_or_else(PoisonError::into_inner);
        index.ordered.retain(|_, series| !gone(series));
        index.by_hash.retain(|_, same| {
            same.retain(|series| !gone(series));
            !same.is_empty()
        });
    }
}

#[cfg(test)]
mod tests;
