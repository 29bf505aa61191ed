//! Tests of unknown models, base models of sources, and upstreams of a route.

use super::*;

/// An unanswered source may still list an upstream with an unknown model.
#[test]
fn waits_for_an_unknown_model_while_a_source_is_unanswered() {
    let now = Instant::now();
    let until = now + DISCOVERY_GRACE;
    let query = |model| UpstreamQuery { model: Some(model), ..UpstreamQuery::default() };
    let table = [
        (None, "x", now, FilterResult::Candidates),
        (Some(until), "x", now, FilterResult::NotReady),
        (Some(until), "m", now, FilterResult::Candidates),
        (Some(until), "x", until, FilterResult::NoSuchModel),
    ];
    for (awaited, model, now, expected) in table {
        let snapshot = snapshot(&of(&["ready"]), now).awaiting(awaited);
        let (routing, _) = search(&snapshot, &query(model), now);
        assert_eq!(routing, expected, "{model}, awaited {}", awaited.is_some());
    }
}

#[test]
fn finds_the_base_model_that_all_discovered_upstreams_share() {
    let now = Instant::now();
    type Row = (&'static [(&'static str, &'static [&'static str])], Option<&'static str>);
    let table: &[Row] = &[
        (&[], None),
        (&[("ready of-gym", &["m"])], Some("m")),
        (&[("ready of-gym", &["m", "+lora"]), ("ready of-other", &["m"])], Some("m")),
        (&[("ready of-gym", &["+lora", "m", "m"])], Some("m")),
        (&[("ready of-gym", &["m", "n"])], None),
        (&[("ready of-gym", &["m"]), ("ready of-other", &["n"])], None),
        // Configured upstreams have no common model, whatever they serve now.
        (&[("ready", &["m"])], None),
        (&[("ready", &["m"]), ("ready", &["m"])], None),
        (&[("ready of-gym", &["m"]), ("ready", &["m"])], None),
        (&[("ready of-gym", &["m"]), ("", &[])], None),
        // The models of an upstream that is down count; those of a removed one do not.
        (&[("ready of-gym", &["m"]), ("ready missed missed missed of-other", &["n"])], None),
        (&[("ready of-gym", &["m"]), ("ready removing of-other", &["n"])], Some("m")),
        // Some upstream has unknown models.
        (&[("ready of-gym", &["m"]), ("ready of-other", &[])], None),
        (&[("ready of-gym", &[])], None),
        (&[("ready of-gym", &["m"]), ("missed of-other", &[])], None),
        // The model that a source states, for engines with several names or that are not up yet.
        (&[("ready of-gym=n", &["m", "n"])], Some("n")),
        (&[("ready of-gym=n", &["m"])], Some("m")),
        (&[(" of-gym=n", &[])], Some("n")),
        (&[("ready of-gym", &["m"]), (" of-gym=m", &[])], Some("m")),
        // Among the upstreams of one source the latest ready one counts.
        (&[("ready of-gym", &["m"]), (" of-gym", &[])], Some("m")),
        (&[("ready of-gym", &["m"]), ("ready of-gym", &["n"])], Some("n")),
        (&[("ready of-gym", &["m"]), (" of-gym=n", &[])], Some("m")),
        (&[("ready missed missed missed of-gym", &["m"]), (" of-gym=n", &[])], Some("n")),
    ];
    for (given, wanted) in table {
        let all: Vec<ScriptedUpstream> =
            given.iter().map(|(script, models)| ScriptedUpstream { script, models }).collect();
        let snapshot = snapshot(&all, now);
        assert_eq!(snapshot.only_base(None, now), *wanted, "{given:?}");
    }
}

#[test]
fn considers_only_the_upstreams_of_a_route() {
    let now = Instant::now();
    let later = now + DISCOVERY_GRACE;
    let given = [("ready of-gym", &["m"] as &[_]), ("ready of-other", &["n"]), ("missed of-other", &[])];
    let make = || snapshot(&given.map(|(script, models)| ScriptedUpstream { script, models }), now);
    let (known, awaiting) = (make(), make().awaiting(Some(now + LATE)));
    for (among, base, waits) in [
        (None, None, true),
        (Some(&[10][..]), Some("m"), false),
        (Some(&[11, 12]), Some("n"), false),
        (Some(&[12]), None, false),
        (Some(&[10, 99]), Some("m"), true),
    ] {
        assert_eq!(known.only_base(among, now), base, "{among:?}");
        let soon = if waits { None } else { base };
        assert_eq!(awaiting.only_base(among, now), soon, "{among:?} while a source is unanswered");
        assert_eq!(awaiting.only_base(among, now + LATE), base, "{among:?} after the source was awaited");
    }
    let routing = |snapshot: &Snapshot, model, among: &[usize], now| {
        let among = RouteUpstreams::of(among);
        search(
            snapshot,
            &UpstreamQuery { model: Some(model), among: Some(&among), ..UpstreamQuery::default() },
            now,
        )
        .0
    };
    use FilterResult::{Candidates, NoSuchModel, NotReady};
    for (model, among, soon, late) in [
        ("m", &[10][..], Candidates, Candidates),
        ("m", &[11], NoSuchModel, NoSuchModel),
        ("m", &[11, 12], NotReady, NoSuchModel),
        ("m", &[12], NotReady, NotReady),
        ("unknown", &[10], NoSuchModel, NoSuchModel),
    ] {
        assert_eq!(routing(&known, model, among, now), soon, "{model} {among:?}");
        assert_eq!(routing(&known, model, among, later), late, "{model} {among:?}, later");
    }
    assert_eq!(routing(&awaiting, "m", &[11, 99], now), NotReady, "the source may list it");
    assert!(known.is_ready_with("n", None) && !known.is_ready_with("n", Some(&[10])));
}
