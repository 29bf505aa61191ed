//! The destination of a request that is for a stored response, or that continues from one.
//!
//! The caller reads the sources in the order of `SOURCES` until a report decides the place, and then uses the
//! destination:
//!
//! ```text
//! Memory         bindings that this balancer has learnt, or a sibling has published
//! Id             the tag in the response's id
//! Redis          the binding in Redis
//! OnlyUpstream   the one upstream that the request can reach, if it serves the model
//! Search         the answers of all upstreams to a request for the response
//!
//! place          a request that continues from it     a request for the response itself
//! At             that upstream                        that upstream
//! Lost           404                                  404
//! Nowhere        any upstream, whose answer is        404, or 503 while no upstream is ready
//!                vLLM's own 404
//! Unsure         503                                  503
//! ```
//!
//! Clients may choose the ids of responses, and such an id may look like one of the balancer's. So a place
//! known from the id alone is unproven: when its upstream does not serve the model, or answers 404, Redis is
//! read before the client gets a 404. The upstreams are not searched then: otherwise each request for an
//! expired response would search all of them.
//!
//! Never: a lookup, a wait.

use super::is_id;
use crate::route::resolve::UpstreamView;

/// The sources that report the place of a response, in the order of trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LocationSource {
    Memory,
    Id,
    Redis,
    OnlyUpstream,
    Search,
}

/// The order in which the sources are read.
pub(crate) const SOURCES: [LocationSource; 5] = [
    LocationSource::Memory,
    LocationSource::Id,
    LocationSource::Redis,
    LocationSource::OnlyUpstream,
    LocationSource::Search,
];

/// The report of one source on a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LocationReport {
    /// Nothing: the next source is read.
    Silent,
    /// An upstream made the response. `lost`: the upstream has left, and its responses with it. `name`: the
    /// number of the model's name, 0 if the source does not report one.
    MadeAt { upstream: usize, lost: bool, name: u64 },
    /// No upstream has it.
    Nowhere,
    /// An upstream that may have the response does not answer now.
    Unsure,
}

/// The place of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponsePlace {
    At(usize),
    /// The response was at an upstream that has left.
    Lost,
    Nowhere,
    /// An upstream that may have it does not answer now.
    Unsure,
}

/// The result of the search for a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FoundResponse {
    source: LocationSource,
    pub place: ResponsePlace,
    /// The number of its model's name; 0: not known.
    pub name: u64,
}

/// The use of a stored response by a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponseUse {
    /// It continues from the response.
    Continue,
    /// It is for the response itself, to get it or to cancel it.
    Retrieve { any_ready: bool },
}

/// The destination of a request with a stored response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponseDestination {
    Upstream(usize),
    AnyUpstream,
    /// 404: the response does not exist.
    NotFound,
    /// 503: the response may be found later.
    NotReady,
}

/// Whether an answer may be due to an upstream without the response, so that another known upstream should be
/// tried.
pub(crate) fn may_be_elsewhere(status: u16, pinned: bool, replayable: bool) -> bool {
    status == 404 && !pinned && replayable
}

/// Whether an upstream may have made the response that a request with this model continues from: it serves
/// the model, or its models are unknown, or no upstream serves the model.
pub(crate) fn may_continue(upstreams: &impl UpstreamView, upstream: usize, model: Option<&str>) -> bool {
    let is_elsewhere = |model| upstreams.serves(model, None) && !upstreams.serves(model, Some(&[upstream]));
    !(upstreams.reports_models(upstream) && model.is_some_and(is_elsewhere))
}

/// The report of `OnlyUpstream`: the one reachable upstream, if it may have made the response that a request
/// with this model continues from.
pub(crate) fn only_upstream(
    upstreams: &impl UpstreamView,
    among: Option<&[usize]>,
    model: Option<&str>,
) -> LocationReport {
    let mut reachable =
        upstreams.reachable().filter(|id| among.is_none_or(|among| among.binary_search(id).is_ok()));
    match (reachable.next(), reachable.next()) {
        (Some(upstream), None) if may_continue(upstreams, upstream, model) => {
            LocationReport::MadeAt { upstream, lost: false, name: 0 }
        }
        _ => LocationReport::Silent,
    }
}

/// Whether the place of a response with this id must be learnt. `own`: the id that the balancer gave the
/// request at this upstream, which carries the place. Other ids do not carry it, even if they look like ids
/// of the balancer.
pub(crate) fn is_learnt(own: Option<&str>, id: &str) -> bool {
    own != Some(id) && is_id(id)
}

// === impl LocationSource ===

impl LocationSource {
    /// The value of the metric's label.
    fn label(self) -> &'static str {
        match self {
            LocationSource::Memory => "memory",
            LocationSource::Id => "id",
            LocationSource::Redis => "redis",
            LocationSource::OnlyUpstream => "alone",
            LocationSource::Search => "asked",
        }
    }
}

// === impl FoundResponse ===

impl FoundResponse {
    /// A response that no source knows.
    pub(crate) fn nowhere() -> Self {
        FoundResponse { source: LocationSource::Search, place: ResponsePlace::Nowhere, name: 0 }
    }

    /// The result by the report of a source; `None`: the next source is read.
    pub(crate) fn from_report(source: LocationSource, report: LocationReport) -> Option<Self> {
        let (place, name) = match report {
            LocationReport::Silent => return None,
            LocationReport::MadeAt { lost: true, name, .. } => (ResponsePlace::Lost, name),
            LocationReport::MadeAt { upstream, name, .. } => (ResponsePlace::At(upstream), name),
            LocationReport::Nowhere => (ResponsePlace::Nowhere, 0),
            LocationReport::Unsure => (ResponsePlace::Unsure, 0),
        };
        Some(FoundResponse { source, place, name })
    }

    /// The source of the place, as the metric's label.
    pub(crate) fn label(&self) -> &'static str {
        match self.place {
            ResponsePlace::At(_) | ResponsePlace::Lost => self.source.label(),
            ResponsePlace::Nowhere => "nowhere",
            ResponsePlace::Unsure => "unsure",
        }
    }

    /// Whether the place is known from the response's id alone.
    pub(crate) fn is_unproven(&self) -> bool {
        self.source == LocationSource::Id
    }

    /// The upstream of the response, if a request with this model cannot continue there because the upstream
    /// does not serve the model.
    pub(crate) fn misplaced(&self, upstreams: &impl UpstreamView, model: Option<&str>) -> Option<usize> {
        match self.place {
            ResponsePlace::At(upstream) if !may_continue(upstreams, upstream, model) => Some(upstream),
            _ => None,
        }
    }

    /// The upstream that a second source reports instead of `first`, if a request with this model may
    /// continue there.
    pub(crate) fn in_place_of(
        &self,
        first: usize,
        upstreams: &impl UpstreamView,
        model: Option<&str>,
    ) -> Option<usize> {
        let ResponsePlace::At(other) = self.place else { return None };
        (other != first && may_continue(upstreams, other, model)).then_some(other)
    }

    /// The same response at another upstream, or lost.
    pub(crate) fn moved(self, other: Option<usize>) -> Self {
        FoundResponse { place: other.map_or(ResponsePlace::Lost, ResponsePlace::At), ..self }
    }

    /// The destination of a request.
    pub(crate) fn destination(&self, response_use: ResponseUse) -> ResponseDestination {
        match (self.place, response_use) {
            (ResponsePlace::At(upstream), _) => ResponseDestination::Upstream(upstream),
            (ResponsePlace::Lost, _) => ResponseDestination::NotFound,
            (ResponsePlace::Unsure, _) => ResponseDestination::NotReady,
            (ResponsePlace::Nowhere, ResponseUse::Continue) => ResponseDestination::AnyUpstream,
            // The upstream with the response may come back.
            (ResponsePlace::Nowhere, ResponseUse::Retrieve { any_ready: false }) => {
                ResponseDestination::NotReady
            }
            (ResponsePlace::Nowhere, ResponseUse::Retrieve { any_ready: true }) => {
                ResponseDestination::NotFound
            }
        }
    }
}

#[cfg(test)]
mod tests;
