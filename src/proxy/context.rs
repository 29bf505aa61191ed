//! The state of one request that the edge keeps from its head to its record.

use std::sync::Arc;
use std::time::Instant;

use http::HeaderMap;

use super::server::shutdown::InFlightRequest;
use super::settings::ProxySettings;
use super::shared::ProxyShared;
use crate::names::TRACEPARENT;
use crate::observe::GaugeGuard;
use crate::otlp::trace_context::RequestTrace;

/// The settings, the id and the start of one request.
pub(super) struct RequestContext {
    pub started: Instant,
    /// The settings at the start of the request; a reload does not change them.
    pub settings: Arc<ProxySettings>,
    /// Counts the request as in flight until the context is dropped.
    _in_flight: (Option<GaugeGuard>, InFlightRequest),
    pub id: String,
    /// The trace that the request is part of; `None` while spans are off, and where the client's trace passes
    /// unchanged. Boxed, so that idle streams without one need no memory for it.
    pub trace: Option<Box<RequestTrace>>,
}

// === impl RequestContext ===

impl RequestContext {
    /// `only_watches`: a call that shows the requests in flight, and is not one of them.
    pub(super) fn new(shared: &ProxyShared, id: String, headers: &HeaderMap, only_watches: bool) -> Self {
        let settings = shared.settings.load_full();
        let in_flight = (!only_watches).then(|| shared.observer.request_in_flight());
        RequestContext {
            started: Instant::now(),
            trace: settings.span_share.and_then(|share| trace(shared, headers, share)).map(Box::new),
            settings,
            _in_flight: (in_flight, InFlightRequest::new(shared.shutdown.clone())),
            id,
        }
    }
}

/// The trace of a request with these headers; `share` of those that begin here is sampled.
fn trace(shared: &ProxyShared, headers: &HeaderMap, share: f64) -> Option<RequestTrace> {
    let fields = headers.get_all(TRACEPARENT).iter().map(|value| value.as_bytes());
    let seed = [shared.random.next(), shared.random.next(), shared.random.next()];
    RequestTrace::begin(fields, share, seed)
}
