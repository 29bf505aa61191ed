//! The state of one request that the edge keeps from its head to its record.

use std::sync::Arc;
use std::time::Instant;

use super::server::shutdown::{InFlightRequest, Shutdown};
use super::settings::ProxySettings;
use crate::observe::metrics::METRICS;

/// The settings, the id and the start of one request.
pub struct RequestContext {
    pub started: Instant,
    /// The settings at the start of the request; a reload does not change them.
    pub settings: Arc<ProxySettings>,
    /// Counts the request as in flight until the context is dropped.
    _in_flight: (InFlightGauge, InFlightRequest),
    pub id: String,
}

// === impl Context ===

impl RequestContext {
    pub fn new(settings: Arc<ProxySettings>, shutdown: Arc<Shutdown>, id: String) -> Self {
        RequestContext {
            started: Instant::now(),
            settings,
            _in_flight: (InFlightGauge::new(), InFlightRequest::new(shutdown)),
            id,
        }
    }
}

/// Counts the request in the metrics until it is dropped.
struct InFlightGauge;

impl InFlightGauge {
    fn new() -> Self {
        METRICS.in_flight.inc();
        InFlightGauge
    }
}

impl Drop for InFlightGauge {
    fn drop(&mut self) {
        METRICS.in_flight.dec();
    }
}
