//! The floor under the breaker, by table: what it may keep out of the upstreams that could have a request.

use proptest::prelude::*;

use super::*;
use crate::fleet::lease::Work;

/// A query by the ids that may have the request, the one that may, and those that were tried.
#[derive(Clone, Copy, Default)]
struct Of(Option<&'static [usize]>, Option<usize>, &'static [usize]);

const ANY: Of = Of(None, None, &[]);

#[test]
fn the_breaker_never_ejects_more_than_its_share_and_never_the_last() {
    type Row = (&'static [&'static str], f64, Of, &'static [usize]);
    let among = |ids| Of(Some(ids), None, &[]);
    let table: &[Row] = &[
        (&["ready tripped"], 0.5, ANY, &[0]),
        (&["ready tripped", "ready"], 0.5, ANY, &[1]),
        (&["ready tripped", "ready tripped"], 0.5, ANY, &[0, 1]),
        // Of three one; those whose trips end last stay out.
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
        // What is down by its probes stays out, and is not among those that it is a share of.
        (&["ready tripped", "ready missed missed missed"], 0.5, ANY, &[0]),
        (&["ready tripped missed missed missed", "ready"], 0.5, ANY, &[1]),
        (&["ready tripped missed missed missed", "ready tripped"], 0.5, ANY, &[1]),
        (&["ready tripped missed missed missed", "ready missed missed missed"], 0.5, ANY, &[]),
        (&["ready tripped", ""], 0.5, ANY, &[0]),
        (&["ready tripped", "ready refused"], 0.5, ANY, &[0]),
        (&["ready tripped", "ready missed"], 0.5, ANY, &[1]),
        // So does what drains.
        (&["ready tripped", "ready drained"], 0.5, ANY, &[0]),
        (&["ready tripped", "ready removing"], 0.5, ANY, &[0]),
        (&["ready tripped drained", "ready tripped"], 0.5, ANY, &[1]),
        (&["ready tripped removing", "ready tripped"], 0.5, ANY, &[1]),
        (&["ready tripped drained", "ready tripped", "ready"], 0.5, ANY, &[2]),
        // One that is full is no reason to take one that is ejected.
        (&["ready tripped", "ready taken"], 0.5, ANY, &[]),
        (&["ready tripped taken", "ready tripped"], 0.5, ANY, &[1]),
        // Of the upstreams that the request may go to.
        (&["ready tripped", "ready", "ready"], 0.5, among(&[10]), &[0]),
        (&["ready tripped", "ready", "ready"], 0.5, among(&[10, 11]), &[1]),
        (&["ready tripped", "ready tripped", "ready"], 0.5, among(&[10, 11]), &[0, 1]),
        (&["ready tripped", "ready"], 0.5, Of(None, Some(10), &[]), &[0]),
        // What was tried is another matter.
        (&["ready tripped", "ready tripped"], 0.5, Of(None, None, &[10]), &[1]),
        (&["ready tripped", "ready"], 0.5, Of(None, None, &[11]), &[]),
    ];
    let now = Instant::now();
    for (scripts, share, Of(among, only, tried), wanted) in table {
        let query = Query { model: Some("m"), among: *among, only: *only, tried, ..Query::default() };
        let snapshot = snapshot(&of(scripts), now).ejecting(*share);
        let (_, found) = ask(&snapshot, &query, now);
        assert_eq!(found, wanted.to_vec(), "{scripts:?} with {share}, {among:?}, {only:?}, {tried:?}");
        for (index, entry) in snapshot.entries.iter().enumerate() {
            // Choosing again must not go on for ever.
            let lease = snapshot.take(&query, index, Work::default(), now);
            let tripped = entry.state() == UpstreamState::Tripped;
            let is_candidate = wanted.contains(&index);
            assert!(lease.is_some() || !is_candidate, "{scripts:?}: no lease on {index}");
            let may = is_candidate || !tripped || tried.contains(&entry.upstream.id);
            assert!(lease.is_none() || may || entry.upstream.load().active > 1, "{scripts:?}: {index}");
        }
    }
}

#[test]
fn the_floor_is_of_each_model() {
    let now = Instant::now();
    let given = [("ready tripped", &["a"] as &[_]), ("ready", &["a", "b"]), ("ready tripped", &["b", "c"])];
    let snapshot = snapshot(&given.map(|(script, models)| ScriptedUpstream { script, models }), now);
    for (model, wanted) in [("a", vec![1]), ("b", vec![1]), ("c", vec![2])] {
        let query = Query { model: Some(model), ..Query::default() };
        assert_eq!(ask(&snapshot, &query, now).1, wanted, "{model}");
    }
}

#[test]
fn after_its_trip_an_upstream_that_is_not_ejected_takes_more_than_one_request() {
    let now = Instant::now();
    let later = now + rules().breaker.open;
    let alone = snapshot(&of(&["ready tripped trial"]), now);
    let query = Query::default();
    assert_eq!(ask(&alone, &query, later), (Routing::Candidates, vec![0]));
    let leases = [(); 2].map(|()| alone.take(&query, 0, Work::default(), later));
    assert!(leases.iter().all(Option::is_some));
}

#[test]
fn a_model_is_served_while_all_its_upstreams_are_tripped() {
    let now = Instant::now();
    let all = snapshot(&of(&["ready tripped", "ready tripped"]), now);
    assert!(all.any_ready() && all.is_ready_with("m", None) && all.serves_one_base(None));
    assert_eq!(all.aliases(), ["m"]);
    assert_eq!(all.ready().count(), 2);
    let gone = snapshot(&of(&["ready tripped missed missed missed"]), now);
    assert!(!gone.any_ready() && gone.aliases().is_empty());
}

proptest! {
    /// Whatever the fleet: a request finds an upstream when one answers, and the breaker keeps out no more
    /// than its share.
    #[test]
    fn some_upstream_is_left(
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
        let (_, found) = ask(&snapshot, &Query::default(), now);
        let most = (share * pool as f64) as usize;
        prop_assert!(found.len() + most >= pool, "{} of {}", found.len(), pool);
        prop_assert_eq!(found.is_empty(), pool == 0);
        if !half_open && tripped <= most && tripped < pool {
            prop_assert_eq!(found.len(), pool - tripped);
        }
    }
}
