//! The attempts of one request so far: the upstreams that were tried, and what the next attempt must know.

use std::time::Instant;

use super::placement::Placement;
use super::request::{ClientRequest, RequestScope};
use super::settings::ProxySettings;
use crate::fleet::UpstreamQuery;
use crate::reject::Reject;
use crate::retry::{AttemptFailure, EndReason};
use crate::route::upstreams::RouteUpstreams;

/// The attempts of one request.
#[derive(Default)]
pub(super) struct Attempts {
    pub count: u32,
    /// The ids of the upstreams that were tried.
    pub tried: Vec<usize>,
    /// Upstreams that declined it.
    pub declined: Vec<usize>,
    /// The deadline of the wait for room.
    pub wait_until: Option<Instant>,
    /// The rejection for the client when no upstream is left.
    pub failed: Option<Reject>,
    /// An attempt found a pooled connection that had ended.
    pub stale: bool,
    /// Another attempt follows the one that failed.
    pub retry_follows: bool,
}

// === impl Attempts ===

impl Attempts {
    /// The query for the next attempt's candidates.
    pub(super) fn query<'a>(
        &'a self,
        request: &'a ClientRequest,
        settings: &ProxySettings,
        among: Option<&'a RouteUpstreams>,
    ) -> UpstreamQuery<'a> {
        let (tried, declined, again) = (&self.tried, &self.declined, self.count > 0);
        let query = request.query(settings, among);
        // Another attempt is late already, and a late answer is better than an error.
        let slo = query.slo.filter(|_| !again);
        UpstreamQuery { tried, declined, again, slo, ..query }
    }

    /// Records the beginning of an attempt on this upstream.
    pub(super) fn begin(&mut self, upstream: usize) {
        self.count += 1;
        self.tried.push(upstream);
    }

    /// Permits another attempt on the same upstream, with another body.
    pub(super) fn try_again(&mut self, placement: &Placement) {
        self.tried.retain(|id| *id != placement.upstream().id);
        self.retry_follows = true;
    }

    /// Records a failed attempt, and the rejection that follows when it was the last one.
    pub(super) fn record_failure(
        &mut self,
        scope: &RequestScope<'_>,
        placement: &Placement,
        failure: AttemptFailure,
    ) {
        let upstream = placement.upstream();
        self.stale |= failure == AttemptFailure::Stale;
        if failure.declines() {
            self.declined.push(upstream.id);
        }
        let name = scope.settings.expose.then(|| upstream.name().to_string());
        self.failed = Some(match failure {
            AttemptFailure::Ended(EndReason::Gone) => Reject::Upstream { name },
            AttemptFailure::Ended(_) => Reject::Timeout { name },
            _ => Reject::Upstream { name },
        });
    }
}
