//! A gauge that counts what exists now.

use std::sync::Arc;

use super::metrics::IntGauge;

/// Adds one to a gauge until it is dropped.
pub struct GaugeGuard(Arc<IntGauge>);

impl GaugeGuard {
    pub(super) fn new(gauge: &Arc<IntGauge>) -> Self {
        gauge.inc();
        GaugeGuard(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}
