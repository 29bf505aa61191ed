//! Events of the export of spans.

use std::fmt::Display;
use std::sync::atomic::Ordering;

use log::{info, warn};

use super::{Observer, counted};

impl Observer {
    /// Records an export: the spans that the collector took, and those that it rejected of it.
    pub fn spans_exported(&self, taken: usize, rejected: usize) {
        self.count_spans("exported", taken);
        self.count_spans("rejected", rejected);
        let drops = self.0.has_dropped_spans.swap(false, Ordering::Relaxed);
        if !drops && self.0.is_span_export_failing.swap(false, Ordering::Relaxed) {
            info!("spans are exported again");
        }
    }

    /// Counts spans that are not exported. The first of an outage are logged.
    pub fn spans_dropped(&self, count: usize, reason: &'static str) {
        self.count_spans(reason, count);
        self.0.has_dropped_spans.store(true, Ordering::Relaxed);
        if !self.0.is_span_export_failing.swap(true, Ordering::Relaxed) {
            warn!(reason = reason; "spans are dropped: the collector is too slow");
        }
    }

    /// Records a failed export, as a warning once until an export succeeds.
    pub fn span_export_failed(&self, error: &dyn Display) {
        self.metrics().spans.failures.inc();
        if !self.0.is_span_export_failing.swap(true, Ordering::Relaxed) {
            warn!(error:% = error; "spans cannot be exported: they wait, and further ones are dropped");
        }
    }

    /// Records spans that are lost because the balancer ends before the collector takes them.
    pub fn spans_lost_at_stop(&self, count: usize) {
        if count > 0 {
            self.count_spans("stop", count);
            warn!(count = count; "spans lost: the collector did not take them before the end");
        }
    }

    fn count_spans(&self, result: &'static str, count: usize) {
        if count > 0 {
            self.metrics().spans.results.with_label_values(&[result]).inc_by(counted(count));
        }
    }
}
