//! Events of recorded calls.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{debug, info, warn};

use super::metrics::METRICS;
use super::{counted, gauge};

/// Whether the store's last failure has been reported: of a failing store only its beginning is news.
static FAILING: AtomicBool = AtomicBool::new(false);

/// Traces are stored.
pub fn stored(count: usize) {
    METRICS.traces.calls.with_label_values(&["stored"]).inc_by(counted(count));
    if FAILING.swap(false, Ordering::Relaxed) {
        info!("traces are stored again");
    }
}

/// Traces are lost.
pub fn dropped(count: usize, reason: &'static str) {
    METRICS.traces.calls.with_label_values(&[reason]).inc_by(counted(count));
    debug!(count = count, reason = reason; "traces dropped");
}

/// Traces are lost because the balancer ends before the store takes them.
pub fn lost_at_stop(count: usize) {
    if count > 0 {
        METRICS.traces.calls.with_label_values(&["store"]).inc_by(counted(count));
        warn!(count = count; "traces lost: the store did not take them before the end");
    }
}

/// The store did not take what it was given, or did not answer.
pub fn store_failed(error: &dyn Display) {
    METRICS.traces.failures.inc();
    if !FAILING.swap(true, Ordering::Relaxed) {
        warn!(error:% = error; "traces cannot be stored: they wait, and the oldest are dropped");
    }
}

/// An answer ended before its trace was stored, although it should have waited.
pub fn sync_failed() {
    METRICS.traces.failures.inc();
    warn!("an answer did not wait longer for its trace to be stored");
}

/// Traces were removed because of their age, or of the size of the store.
pub fn expired(count: u64) {
    METRICS.traces.expired.inc_by(count);
    debug!(count = count; "traces expired");
}

/// A turn was served in the cumulative token mode, or why it was not.
pub fn cumulative(how: &'static str) {
    METRICS.traces.cumulative.with_label_values(&[how]).inc();
}

/// The calls that wait to be stored, their bytes, and the bytes of the store.
pub fn sizes(calls: usize, bytes: usize, stored: u64) {
    METRICS.traces.waiting.set(gauge(calls));
    METRICS.traces.waiting_bytes.set(gauge(bytes));
    METRICS.traces.stored_bytes.set(i64::try_from(stored).unwrap_or(i64::MAX));
}
