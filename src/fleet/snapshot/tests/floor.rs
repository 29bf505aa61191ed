//! The ejection floor, by table: how many of the suitable upstreams the breaker may eject.

use proptest::prelude::*;

use super::*;
use crate::fleet::lease::RequestWork;

/// A query: the allowed upstreams, the required one, and the tried ones.
#[derive(Clone, Copy, Default)]
struct FloorQuery(Option<&'static [usize]>, Option<usize>, &'static [usize]);

const ANY: FloorQuery = FloorQuery(None, None, &[]);

#[test]
fn never_ejects_more_than_max_ejected_and_never_the_last_upstream() {
    type Row = (&'static [&'static str], f64, FloorQuery, &'static [usize]);
    let among = |ids| FloorQuery(Some(ids), None, &[]);
    let table: &[Row] = &[
        (&["ready tripped"], 0.5, ANY, &[0]),
        (&["ready tripped", "ready"], 0.5, ANY, &[1]),
        (&["ready tripped", "ready tripped"], 0.5, ANY, &[0, 1]),
        // One of three; the upstreams with the latest trip ends stay ejected.
        (&["ready tripped", "ready", "ready"], 0.5, ANY, &[1, 2]),
        (&["ready tripped", "ready tripped-later", "ready"], 0.5, ANY, &[0, 2]),
        (&["ready tripped-later", "ready tripped", "ready"], 0.5, ANY, &[1, 2]),
        (&["ready tripped", "ready tripped", "ready tripped"], 0.5, ANY, &[0, 1, 2]),
        (&["ready tripped", "ready tripped", "ready", "ready"], 0.5, ANY, &[2, 3]),
        (&["ready tripped", "ready tripped-later", "ready tripped", "ready"], 0.5, ANY, &[0, 3]),
        // Other shares.
        (&["ready tripped", "ready"], 0.0, ANY, &[0, 1]),
        (&["ready tripped", "ready tripped", "ready", "ready"], 0.3, ANY, &[0, 2, 3]),
        (&["ready tripped", "ready tripped", "ready"], 1.0, ANY, &[2]),
        (&["ready tripped", "ready tripped"], 1.0, ANY, &[0, 1]),
        // An upstream that is down by its probes stays out, and is not part of the pool.
        (&["ready tripped", "ready missed missed missed"], 0.5, ANY, &[0]),
        (&["ready tripped missed missed missed", "ready"], 0.5, ANY, &[1]),
        (&["ready tripped missed missed missed", "ready tripped"], 0.5, ANY, &[1]),
        (&["ready tripped missed missed missed", "ready missed missed missed"], 0.5, ANY, &[]),
        (&["ready tripped", ""], 0.5, ANY, &[0]),
        (&["ready tripped", "ready refused"], 0.5, ANY, &[0]),
        (&["ready tripped", "ready missed"], 0.5, ANY, &[1]),
        // So does a draining upstream.
        (&["ready tripped", "ready drained"], 0.5, ANY, &[0]),
        (&["ready tripped", "ready removing"], 0.5, ANY, &[0]),
        (&["ready tripped drained", "ready tripped"], 0.5, ANY, &[1]),
        (&["ready tripped removing", "ready tripped"], 0.5, ANY, &[1]),
        (&["ready tripped drained", "ready tripped", "ready"], 0.5, ANY, &[2]),
        // A full upstream does not bring an ejected one back.
        (&["ready tripped", "ready taken"], 0.5, ANY, &[]),
        (&["ready tripped taken", "ready tripped"], 0.5, ANY, &[1]),
        // The pool has only upstreams that the request may go to.
        (&["ready tripped", "ready", "ready"], 0.5, among(&[10]), &[0]),
        (&["ready tripped", "ready", "ready"], 0.5, among(&[10, 11]), &[1]),
        (&["ready tripped", "ready tripped", "ready"], 0.5, among(&[10, 11]), &[0, 1]),
        (&["ready tripped", "ready"], 0.5, FloorQuery(None, Some(10), &[]), &[0]),
        // Tried upstreams are part of the pool.
        (&["ready tripped", "ready tripped"], 0.5, FloorQuery(None, None, &[10]), &[1]),
        (&["ready tripped", "ready"], 0.5, FloorQuery(None, None, &[11]), &[]),
    ];
    let now = Instant::now();
    for (scripts, share, FloorQuery(among, only, tried), wanted) in table {
        let route = among.map(RouteUpstreams::of);
        let query = UpstreamQuery {
            model: Some("m"),
            among: route.as_ref(),
            only: *only,
            tried,
            ..UpstreamQuery::default()
        };
        let snapshot = snapshot(&of(scripts), now).ejecting(*share);
        let (_, found) = search(&snapshot, &query, now);
        assert_eq!(found, wanted.to_vec(), "{scripts:?} with {share}, {among:?}, {only:?}, {tried:?}");
        for (index, entry) in snapshot.entries.iter().enumerate() {
            // Every candidate yields a lease, so that choosing again ends.
            let lease = snapshot.take(&query, index, RequestWork::default(), now);
            let tripped = entry.state() == UpstreamState::Tripped;
            let is_candidate = wanted.contains(&index);
            assert!(lease.is_some() || !is_candidate, "{scripts:?}: no lease on {index}");
            let may = is_candidate || !tripped || tried.contains(&entry.upstream.id);
            assert!(lease.is_none() || may || entry.upstream.load().active > 1, "{scripts:?}: {index}");
        }
    }
}

#[test]
fn computes_the_floor_for_each_model() {
    let now = Instant::now();
    let given = [("ready tripped", &["a"] as &[_]), ("ready", &["a", "b"]), ("ready tripped", &["b", "c"])];
    let snapshot = snapshot(&given.map(|(script, models)| ScriptedUpstream { script, models }), now);
    for (model, wanted) in [("a", vec![1]), ("b", vec![1]), ("c", vec![2])] {
        let query = UpstreamQuery { model: Some(model), ..UpstreamQuery::default() };
        assert_eq!(search(&snapshot, &query, now).1, wanted, "{model}");
    }
}

#[test]
fn admits_several_requests_after_a_trip_to_an_upstream_that_is_not_ejected() {
    let now = Instant::now();
    let later = now + rules().breaker.open;
    let alone = snapshot(&of(&["ready tripped trial"]), now);
    let query = UpstreamQuery::default();
    assert_eq!(search(&alone, &query, later), (FilterResult::Candidates, vec![0]));
    let leases = [(); 2].map(|()| alone.take(&query, 0, RequestWork::default(), later));
    assert!(leases.iter().all(Option::is_some));
}

#[test]
fn serves_a_model_while_all_its_upstreams_are_tripped() {
    let now = Instant::now();
    let all = snapshot(&of(&["ready tripped", "ready tripped"]), now);
    assert!(all.any_ready() && all.is_ready_with("m", None) && all.serves_one_base(None));
    assert_eq!(all.aliases(), ["m"]);
    assert_eq!(all.ready().count(), 2);
    let gone = snapshot(&of(&["ready tripped missed missed missed"]), now);
    assert!(!gone.any_ready() && gone.aliases().is_empty());
}

proptest! {
    /// In any fleet a request finds an upstream when one answers, and the breaker ejects at most its share.
    #[test]
    fn leaves_an_upstream_in_any_fleet(
        scripts in prop::collection::vec(prop::sample::select(vec![
            "ready", "ready tripped", "ready tripped-later", "ready missed missed missed", "ready drained",
        ]), 1..12),
        share in 0.0f64..=1.0,
        half_open: bool,
    ) {
        let now = Instant::now();
        let count = |word: &str| scripts.iter().filter(|script| script.contains(word)).count();
        let tripped = count("tripped");
        let pool = tripped + scripts.iter().filter(|script| **script == "ready").count();
        let snapshot = snapshot(&of(&scripts), now).ejecting(share);
        let now = if half_open { now + rules().breaker.open * 2 } else { now };
        let (_, found) = search(&snapshot, &UpstreamQuery::default(), now);
        let most = (share * pool as f64) as usize;
        prop_assert!(found.len() + most >= pool, "{} of {}", found.len(), pool);
        prop_assert_eq!(found.is_empty(), pool == 0);
        if !half_open && tripped <= most && tripped < pool {
            prop_assert_eq!(found.len(), pool - tripped);
        }
    }
}
