//! A first token that is to correct the forecasts of its upstream. A guard: each request that awaits one is
//! counted until the token came or cannot come any more.

use std::sync::Arc;
use std::time::Instant;

use super::millis;
use super::upstream::Upstream;

/// One first token that an upstream has not sent yet.
pub struct AwaitedToken(Arc<Upstream>);

// === impl AwaitedToken ===

impl AwaitedToken {
    /// Begins to wait for a first token of the upstream.
    pub fn new(upstream: Arc<Upstream>, now: Instant) -> Self {
        upstream.live.accuracy.begin_awaiting(millis(now));
        AwaitedToken(upstream)
    }
}

impl Drop for AwaitedToken {
    fn drop(&mut self) {
        self.0.live.accuracy.end_awaiting();
    }
}
