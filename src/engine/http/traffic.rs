//! The counts of HTTP requests by route, method and class of status, as in vLLM's instrumentation.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Route, method, class of status (`2xx`).
pub(super) type TrafficKey = (&'static str, String, &'static str);

/// Counts of requests by route, method and status.
#[derive(Debug, Default)]
pub(super) struct Traffic(Mutex<BTreeMap<TrafficKey, u64>>);

impl Traffic {
    /// Counts a request; `route` is the pattern of the route, so that the number of keys is bounded.
    pub(super) fn count(&self, route: &'static str, method: &str, status: u16) {
        let class = match status {
            100..200 => "1xx",
            200..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            _ => "5xx",
        };
        // Clients may send any method: only known ones get a line of their own.
        let method = if matches!(method, "GET" | "POST" | "DELETE") { method } else { "OTHER" };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((route, method.to_owned(), class)).or_default() += 1;
    }

    pub(super) fn all(&self) -> BTreeMap<TrafficKey, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
