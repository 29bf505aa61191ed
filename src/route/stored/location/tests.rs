//! Tests of the location of a stored response, as tables over reports.

use super::*;
use crate::route::resolve::tests::StandIns;

const MADE: LocationReport = LocationReport::MadeAt { upstream: 11, lost: false, name: 7 };
const LOST: LocationReport = LocationReport::MadeAt { upstream: 11, lost: true, name: 7 };

/// The result by the first decisive report, one report of each source.
fn found(reports: [LocationReport; SOURCES.len()]) -> (ResponsePlace, &'static str, bool, u64) {
    let mut settled = SOURCES.into_iter().zip(reports);
    let settled = settled.find_map(|(source, report)| FoundResponse::from_report(source, report));
    let found = settled.unwrap_or_else(FoundResponse::nowhere);
    (found.place, found.label(), found.is_unproven(), found.name)
}

#[test]
fn first_report_decides_the_place() {
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
fn maps_place_and_use_to_a_destination() {
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
        let to =
            [ResponseUse::Continue, ready, none_ready].map(|response_use| found.destination(response_use));
        assert_eq!(to, [continues, retrieves, retrieves_from_none], "{report:?}");
    }
}

#[test]
fn continues_at_an_upstream_unless_others_alone_serve_the_model() {
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
        let found = FoundResponse { source: LocationSource::Id, place: ResponsePlace::At(upstream), name: 0 };
        let misplaced = (!may).then_some(upstream);
        assert_eq!(found.misplaced(&upstreams, model), misplaced, "{upstream} {model:?}");
    }
    for report in [LOST, LocationReport::Nowhere, LocationReport::Unsure] {
        let found = FoundResponse::from_report(LocationSource::Redis, report).unwrap();
        assert_eq!(found.misplaced(&upstreams, Some("big")), None, "{report:?} is at no upstream");
    }
}

#[test]
fn uses_a_second_source_that_names_another_usable_upstream() {
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
fn assumes_the_one_reachable_upstream_that_may_serve_the_model() {
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
fn retries_elsewhere_only_replayable_answers_404() {
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
fn learns_the_place_of_ids_that_do_not_carry_it() {
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
