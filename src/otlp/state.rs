//! What the exporter's two sides share: requests, which bring spans, and the worker, which sends them.

use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::config::types::OtlpConfig;
use crate::observe::Observer;

/// What requests and the worker share.
pub(super) struct ExportState {
    pub settings: ArcSwap<OtlpConfig>,
    /// The spans that were taken and are neither exported nor dropped yet.
    pub open_spans: AtomicUsize,
    /// Wakes the worker before its time when a batch is waiting.
    pub batch_waits: Notify,
    pub observer: Observer,
}

// === impl ExportState ===

impl ExportState {
    pub(super) fn new(config: &OtlpConfig, observer: Observer) -> Self {
        ExportState {
            settings: ArcSwap::from_pointee(config.clone()),
            open_spans: AtomicUsize::new(0),
            batch_waits: Notify::new(),
            observer,
        }
    }

    /// Counts spans that are not exported.
    pub(super) fn drop_spans(&self, spans: usize, reason: &'static str) {
        self.open_spans.fetch_sub(spans, Ordering::Relaxed);
        self.observer.spans_dropped(spans, reason);
    }
}
