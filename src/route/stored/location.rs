//! Where a request goes that is for a stored response, or that continues from one.
//!
//! The caller reads the sources in the order of `SOURCES` until a report settles the place, and then follows
//! the destination:
//!
//! ```text
//! Memory         what this balancer has learnt, or a sibling has published
//! Id             the tag in the response's id
//! Redis          what stands in Redis
//! OnlyUpstream   the one upstream that the request can reach, if it serves the model
//! Search         what the upstreams answer when all of them are asked
//!
//! place          a request that continues from it     a request for the response itself
//! At             that upstream                        that upstream
//! Lost           404                                  404
//! Nowhere        any upstream, whose answer is        404, or 503 while no upstream is ready
//!                vLLM's own 404
//! Unsure         503                                  503
//! ```
//!
//! Clients choose ids of later responses, and such an id may look like one of the balancer's. So a place that
//! the id alone tells is unproven: when its upstream does not serve the model, or answers 404, Redis is read
//! before the client gets a 404. The upstreams are not searched then, or each request for an expired response
//! would search all of them.
//!
//! Never: a lookup, a wait.

use super::is_id;
use crate::route::resolve::UpstreamView;

/// What can report where a response is, in the order of trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocationSource {
    Memory,
    Id,
    Redis,
    OnlyUpstream,
    Search,
}

/// The order in which the sources are read.
pub const SOURCES: [LocationSource; 5] = [
    LocationSource::Memory,
    LocationSource::Id,
    LocationSource::Redis,
    LocationSource::OnlyUpstream,
    LocationSource::Search,
];

/// What one source reports of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocationReport {
    /// Nothing: the next source is read.
    Silent,
    /// An upstream made it. `lost`: the upstream has left, and its responses with it. `name`: the number of
    /// the model's name, 0 where the source does not tell it.
    MadeAt { upstream: usize, lost: bool, name: u64 },
    /// No upstream has it.
    Nowhere,
    /// An upstream that may have it does not answer now.
    Unsure,
}

/// Where a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponsePlace {
    At(usize),
    /// It was at an upstream that has left.
    Lost,
    Nowhere,
    /// An upstream that may have it does not answer now.
    Unsure,
}

/// What came of looking for a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundResponse {
    source: LocationSource,
    pub place: ResponsePlace,
    /// The number of its model's name; 0: not known.
    pub name: u64,
}

/// What a request does with a stored response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseUse {
    /// It continues from the response.
    Continue,
    /// It is for the response itself, to get it or to cancel it.
    Retrieve { any_ready: bool },
}

/// Where a request with a stored response goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseDestination {
    Upstream(usize),
    AnyUpstream,
    /// 404: the response does not exist.
    NotFound,
    /// 503: the response may be found later.
    NotReady,
}

/// Whether an answer may come from an upstream that does not have the response, so that another upstream, if
/// one is known, is to be asked.
pub fn may_be_elsewhere(status: u16, pinned: bool, replayable: bool) -> bool {
    status == 404 && !pinned && replayable
}

/// Whether an upstream may have made what a request with this model continues from: it serves the model, or
/// what it serves is not known, or no upstream serves the model.
pub fn may_continue(upstreams: &impl UpstreamView, upstream: usize, model: Option<&str>) -> bool {
    let is_elsewhere = |model| upstreams.serves(model, None) && !upstreams.serves(model, Some(&[upstream]));
    !(upstreams.reports_models(upstream) && model.is_some_and(is_elsewhere))
}

/// The report of `OnlyUpstream`: the one upstream that can be reached among these, if it may have made what a
/// request with this model continues from.
pub fn only_upstream(
    upstreams: &impl UpstreamView,
    among: Option<&[usize]>,
    model: Option<&str>,
) -> LocationReport {
    let mut reachable = upstreams.reachable().filter(|id| among.is_none_or(|among| among.contains(id)));
    match (reachable.next(), reachable.next()) {
        (Some(upstream), None) if may_continue(upstreams, upstream, model) => {
            LocationReport::MadeAt { upstream, lost: false, name: 0 }
        }
        _ => LocationReport::Silent,
    }
}

/// Whether the place of a response with this id is to be learnt. `own`: the id that its request was given at
/// this upstream, which tells the place itself. An id of another form, or one that only looks like the
/// balancer's, does not.
pub fn is_learnt(own: Option<&str>, id: &str) -> bool {
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
    pub fn nowhere() -> Self {
        FoundResponse { source: LocationSource::Search, place: ResponsePlace::Nowhere, name: 0 }
    }

    /// What the report of a source settles; `None`: the next source is read.
    pub fn from_report(source: LocationSource, report: LocationReport) -> Option<Self> {
        let (place, name) = match report {
            LocationReport::Silent => return None,
            LocationReport::MadeAt { lost: true, name, .. } => (ResponsePlace::Lost, name),
            LocationReport::MadeAt { upstream, name, .. } => (ResponsePlace::At(upstream), name),
            LocationReport::Nowhere => (ResponsePlace::Nowhere, 0),
            LocationReport::Unsure => (ResponsePlace::Unsure, 0),
        };
        Some(FoundResponse { source, place, name })
    }

    /// What told the place, as the metric has it.
    pub fn label(&self) -> &'static str {
        match self.place {
            ResponsePlace::At(_) | ResponsePlace::Lost => self.source.label(),
            ResponsePlace::Nowhere => "nowhere",
            ResponsePlace::Unsure => "unsure",
        }
    }

    /// Whether only the response's id tells the place.
    pub fn is_unproven(&self) -> bool {
        self.source == LocationSource::Id
    }

    /// The upstream where it should be and where a request with this model cannot continue from it, because
    /// the upstream does not serve the model.
    pub fn misplaced(&self, upstreams: &impl UpstreamView, model: Option<&str>) -> Option<usize> {
        match self.place {
            ResponsePlace::At(upstream) if !may_continue(upstreams, upstream, model) => Some(upstream),
            _ => None,
        }
    }

    /// The upstream that a second source names in place of `first`, where a request with this model may
    /// continue from it.
    pub fn in_place_of(
        &self,
        first: usize,
        upstreams: &impl UpstreamView,
        model: Option<&str>,
    ) -> Option<usize> {
        let ResponsePlace::At(other) = self.place else { return None };
        (other != first && may_continue(upstreams, other, model)).then_some(other)
    }

    /// The same at another upstream, or lost.
    pub fn moved(self, other: Option<usize>) -> Self {
        FoundResponse { place: other.map_or(ResponsePlace::Lost, ResponsePlace::At), ..self }
    }

    /// Where the request goes.
    pub fn destination(&self, response_use: ResponseUse) -> ResponseDestination {
        match (self.place, response_use) {
            (ResponsePlace::At(upstream), _) => ResponseDestination::Upstream(upstream),
            (ResponsePlace::Lost, _) => ResponseDestination::NotFound,
            (ResponsePlace::Unsure, _) => ResponseDestination::NotReady,
            (ResponsePlace::Nowhere, ResponseUse::Continue) => ResponseDestination::AnyUpstream,
            // The upstream that has it may come back.
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
mod tests {
    use super::*;
    use crate::route::resolve::tests::StandIns;

    const MADE: LocationReport = LocationReport::MadeAt { upstream: 11, lost: false, name: 7 };
    const LOST: LocationReport = LocationReport::MadeAt { upstream: 11, lost: true, name: 7 };

    /// The place by the first of the reports, one of each source, that settles it, and what told it.
    fn found(reports: [LocationReport; SOURCES.len()]) -> (ResponsePlace, &'static str, bool, u64) {
        let mut settled = SOURCES.into_iter().zip(reports);
        let settled = settled.find_map(|(source, report)| FoundResponse::from_report(source, report));
        let found = settled.unwrap_or_else(FoundResponse::nowhere);
        (found.place, found.label(), found.is_unproven(), found.name)
    }

    #[test]
    fn the_first_source_that_is_not_silent_settles_the_place() {
        use LocationReport::{Nowhere, Silent, Unsure};
        let other = LocationReport::MadeAt { upstream: 12, lost: false, name: 0 };
        let at = ResponsePlace::At(11);
        for (reports, place, label, unproven, name) in [
            ([MADE, other, other, other, other], at, "memory", false, 7),
            ([Silent, MADE, other, other, other], at, "id", true, 7),
            ([Silent, Silent, MADE, other, other], at, "redis", false, 7),
            ([Silent, Silent, Silent, MADE, other], at, "alone", false, 7),
            ([Silent, Silent, Silent, Silent, MADE], at, "asked", false, 7),
            ([Silent, Silent, Silent, Silent, Nowhere], ResponsePlace::Nowhere, "nowhere", false, 0),
            ([Silent, Silent, Silent, Silent, Unsure], ResponsePlace::Unsure, "unsure", false, 0),
            ([Silent; 5], ResponsePlace::Nowhere, "nowhere", false, 0),
            // What was lost with its upstream is not looked for elsewhere.
            ([LOST, other, other, other, other], ResponsePlace::Lost, "memory", false, 7),
            ([Silent, LOST, other, other, other], ResponsePlace::Lost, "id", true, 7),
        ] {
            assert_eq!(found(reports), (place, label, unproven, name), "{reports:?}");
        }
    }

    #[test]
    fn a_place_and_a_use_make_a_destination() {
        use ResponseDestination::{AnyUpstream, NotFound, NotReady, Upstream};
        let ready = ResponseUse::Retrieve { any_ready: true };
        let none_ready = ResponseUse::Retrieve { any_ready: false };
        for (report, continues, retrieves, retrieves_from_none) in [
            (MADE, Upstream(11), Upstream(11), Upstream(11)),
            (LOST, NotFound, NotFound, NotFound),
            (LocationReport::Nowhere, AnyUpstream, NotFound, NotReady),
            (LocationReport::Unsure, NotReady, NotReady, NotReady),
        ] {
            let found = FoundResponse::from_report(LocationSource::Search, report).unwrap();
            let to = [ResponseUse::Continue, ready, none_ready]
                .map(|response_use| found.destination(response_use));
            assert_eq!(to, [continues, retrieves, retrieves_from_none], "{report:?}");
        }
    }

    #[test]
    fn an_upstream_continues_with_models_that_no_other_upstream_alone_serves() {
        let upstreams = StandIns::new(&["one big", "two small", "three"]);
        for (upstream, model, may) in [
            (10, Some("big"), true),
            (10, None, true),
            (10, Some("small"), false),
            // No upstream serves it: any of them answers for that.
            (10, Some("huge"), true),
            // What it serves is not known yet, or it is not there any more.
            (12, Some("small"), true),
            (99, Some("small"), true),
        ] {
            assert_eq!(may_continue(&upstreams, upstream, model), may, "{upstream} {model:?}");
            let found =
                FoundResponse { source: LocationSource::Id, place: ResponsePlace::At(upstream), name: 0 };
            let misplaced = (!may).then_some(upstream);
            assert_eq!(found.misplaced(&upstreams, model), misplaced, "{upstream} {model:?}");
        }
        for report in [LOST, LocationReport::Nowhere, LocationReport::Unsure] {
            let found = FoundResponse::from_report(LocationSource::Redis, report).unwrap();
            assert_eq!(found.misplaced(&upstreams, Some("big")), None, "{report:?} is at no upstream");
        }
    }

    #[test]
    fn a_second_source_counts_where_it_names_another_upstream_that_may_continue() {
        let upstreams = StandIns::new(&["one big", "two small", "three big"]);
        for (first, report, model, other) in [
            (10, MADE, None, Some(11)),
            (10, MADE, Some("small"), Some(11)),
            (10, MADE, Some("big"), None),
            (11, MADE, Some("small"), None),
            (10, LOST, None, None),
            (10, LocationReport::Nowhere, None, None),
        ] {
            let found = FoundResponse::from_report(LocationSource::Redis, report).unwrap();
            assert_eq!(found.in_place_of(first, &upstreams, model), other, "{first} {report:?} {model:?}");
        }
    }

    #[test]
    fn the_one_reachable_upstream_has_the_response_if_it_may_serve_the_model() {
        let at = |upstream| LocationReport::MadeAt { upstream, lost: false, name: 0 };
        for (upstreams, among, model, report) in [
            (&["one big"][..], None, Some("big"), at(10)),
            (&["one drains big", "two down big"], None, None, at(10)),
            (&["one big", "two big"], None, None, LocationReport::Silent),
            (&["one big", "two drains big"], None, None, LocationReport::Silent),
            (&["one big", "two big"], Some(&[11][..]), None, at(11)),
            (&["one big", "two big"], Some(&[99]), None, LocationReport::Silent),
            (&["one down big"], None, None, LocationReport::Silent),
            (&["one big", "two down small"], None, Some("small"), LocationReport::Silent),
            (&[], None, None, LocationReport::Silent),
        ] {
            let found = only_upstream(&StandIns::new(upstreams), among, model);
            assert_eq!(found, report, "{upstreams:?} {among:?} {model:?}");
        }
    }

    #[test]
    fn only_an_answer_404_that_can_be_asked_for_again_may_be_elsewhere() {
        for (status, pinned, replayable, may) in [
            (404, false, true, true),
            (200, false, true, false),
            (503, false, true, false),
            (404, true, true, false),
            (404, false, false, false),
        ] {
            assert_eq!(may_be_elsewhere(status, pinned, replayable), may, "{status} {pinned} {replayable}");
        }
    }

    #[test]
    fn the_place_of_an_id_is_learnt_unless_the_id_tells_it() {
        for (own, id, learnt) in [
            (None, "resp_1", true),
            (Some("resp_1"), "resp_1", false),
            // The client or the upstream has another id for it, which may look like the balancer's.
            (Some("resp_1"), "resp_2", true),
            (None, "a/b", false),
        ] {
            assert_eq!(is_learnt(own, id), learnt, "{own:?} {id}");
        }
    }
}
