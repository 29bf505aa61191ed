//! The state of one request that the edge keeps from its head to its record.

use std::sync::Arc;
use std::time::Instant;

use super::server::shutdown::InFlightRequest;
use super::settings::ProxySettings;
use super::shared::ProxyShared;
use crate::observe::GaugeGuard;

/// The settings, the id and the start of one request.
pub(super) struct RequestContext {
    pub started: Instant,
    /// The settings at the start of the request; a reload does not change them.
    pub settings: Arc<ProxySettings>,
    /// Counts the request as in flight until the context is dropped.
    _in_flight: (GaugeGuard, InFlightRequest),
    pub id: String,
}

// === impl RequestContext ===

impl RequestContext {
    pub(super) fn new(shared: &ProxyShared, id: String) -> Self {
        RequestContext {
            started: Instant::now(),
            settings: shared.settings.load_full(),
            _in_flight: (shared.observer.request_in_flight(), InFlightRequest::new(shared.shutdown.clone())),
            id,
        }
    }
}
