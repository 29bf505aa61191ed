//! Events of recorded calls.

use std::fmt::Display;
use std::sync::atomic::Ordering;

use log::{debug, info, warn};

use super::{Observer, counted, gauge};

impl Observer {
    /// Records that traces were stored.
    pub fn traces_stored(&self, count: usize) {
        self.count_traces("stored", count);
        if self.0.is_trace_store_failing.swap(false, Ordering::Relaxed) {
            info!("traces are stored again");
        }
    }

    /// Logs the store of traces at the start: its kind and its location.
    pub fn trace_store_started(&self, store: &str) {
        info!(store = store; "store of traces");
    }

    /// Counts dropped traces.
    pub fn traces_dropped(&self, count: usize, reason: &'static str) {
        self.count_traces(reason, count);
        debug!(count = count, reason = reason; "traces dropped");
    }

    /// Records traces that are lost because the balancer ends before the store accepts them.
    pub fn traces_lost_at_stop(&self, count: usize) {
        if count > 0 {
            self.count_traces("store", count);
            warn!(count = count; "traces lost: the store did not take them before the end");
        }
    }

    fn count_traces(&self, result: &'static str, count: usize) {
        let traffic = self.traffic();
        let counter = if result == "stored" { &traffic.traces_stored } else { &traffic.traces_lost };
        counter.fetch_add(counted(count), Ordering::Relaxed);
        self.metrics().traces.calls.with_label_values(&[result]).inc_by(counted(count));
    }

    /// Records a failure of the store, as a warning once until the store works again.
    pub fn trace_store_failed(&self, error: &dyn Display) {
        self.metrics().traces.failures.inc();
        if !self.0.is_trace_store_failing.swap(true, Ordering::Relaxed) {
            warn!(error:% = error; "traces cannot be stored: they wait, and the oldest are dropped");
        }
    }

    /// Records an answer that `traces.sync` held back and that ended before its trace was stored.
    pub fn trace_sync_failed(&self) {
        self.metrics().traces.failures.inc();
        warn!("an answer did not wait longer for its trace to be stored");
    }

    /// Counts traces that were removed because of their age or of the size of the store.
    pub fn traces_expired(&self, count: u64) {
        self.metrics().traces.expired.inc_by(count);
        debug!(count = count; "traces expired");
    }

    /// Counts a turn of the cumulative token mode by the way in which it was served.
    pub fn cumulative_turn(&self, how: &'static str) {
        self.metrics().traces.cumulative.with_label_values(&[how]).inc();
    }

    /// Sets the number of calls that wait to be stored, their bytes, and the bytes of the store.
    pub fn trace_sizes(&self, calls: usize, bytes: usize, stored: u64) {
        self.metrics().traces.waiting.set(gauge(calls));
        self.metrics().traces.waiting_bytes.set(gauge(bytes));
        self.metrics().traces.stored_bytes.set(i64::try_from(stored).unwrap_or(i64::MAX));
    }
}
