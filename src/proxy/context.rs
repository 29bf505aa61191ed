//! What pingora's phases share of one request: what it began with, and what its record tells.

use std::sync::Arc;
use std::time::Instant;

use super::exchange::Report;
use super::leave::{self, Leave};
use super::request::ClientRequest;
use super::settings::Settings;
use crate::observe::metrics::METRICS;

pub struct Context {
    pub started: Instant,
    /// What it began with.
    pub settings: Arc<Settings>,
    /// Counts the request as in flight until the context is dropped, on whatever path.
    _in_flight: (InFlight, leave::InFlight),
    pub id: String,
    /// Once it has ended.
    pub finished: Option<Box<FinishedRequest>>,
    /// What the client still sends is read before the connection ends, so that it gets to read a refusal.
    pub drain: bool,
}

/// A request that has ended, for its record.
pub struct FinishedRequest {
    pub request: ClientRequest,
    pub report: Report,
}

// === impl Context ===

impl Context {
    pub fn new(settings: Arc<Settings>, leave: Arc<Leave>) -> Self {
        Context {
            started: Instant::now(),
            settings,
            _in_flight: (InFlight::new(), leave::InFlight::new(leave)),
            id: String::new(),
            finished: None,
            drain: false,
        }
    }
}

struct InFlight;

impl InFlight {
    fn new() -> Self {
        METRICS.in_flight.inc();
        InFlight
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        METRICS.in_flight.dec();
    }
}
