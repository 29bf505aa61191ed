//! Which upstreams a route leads to: by places in the snapshot that it was resolved for, by ids in any other.

use proptest::prelude::*;

use super::*;
use crate::fleet::lease::RequestWork;

/// A query that each of these upstreams may take, as far as its route is concerned.
fn routed(route: &RouteUpstreams) -> UpstreamQuery<'_> {
    UpstreamQuery { model: Some("m"), among: Some(route), ..UpstreamQuery::default() }
}

/// Resolves the ids of a route for this snapshot.
fn resolved(snapshot: &Snapshot, ids: &[usize]) -> RouteUpstreams {
    RouteUpstreams::new(ids.to_vec(), snapshot.version(), |id| snapshot.place_of(id))
}

proptest! {
    /// With fewer and with more upstreams than fit into a word.
    #[test]
    fn places_and_ids_give_the_same_candidates(
        scripts in prop::collection::vec(
            prop::sample::select(vec!["ready", "ready", "ready taken", "ready drained", "ready tripped", ""]),
            1..150,
        ),
        ids in prop::collection::vec(5usize..170, 0..150),
        tried in prop::collection::vec(10usize..160, 0..3),
        only in prop::option::weighted(0.2, 5usize..170),
    ) {
        let now = Instant::now();
        let snapshot = snapshot(&of(&scripts), now);
        let (by_places, by_ids) = (resolved(&snapshot, &ids), RouteUpstreams::of(&ids));
        prop_assert!(by_places.places(snapshot.version()).is_some());
        let query = |route| UpstreamQuery { tried: &tried, only, ..routed(route) };
        let found = search(&snapshot, &query(&by_places), now);
        prop_assert_eq!(&found, &search(&snapshot, &query(&by_ids), now));
        // Another snapshot of as many upstreams, in which the places are not valid.
        let other = super::snapshot(&of(&scripts), now);
        prop_assert!(by_places.places(other.version()).is_none());
        prop_assert_eq!(&found, &search(&other, &query(&by_places), now));
        for index in found.1 {
            let id = snapshot.entries[index].upstream.id;
            prop_assert_eq!(snapshot.id_at(index), id);
            prop_assert!(ids.contains(&id) && !tried.contains(&id) && only.is_none_or(|only| only == id));
            prop_assert!(snapshot.take(&query(&by_places), index, RequestWork::default(), now).is_some());
        }
    }
}

#[test]
fn snapshots_share_the_directory_until_an_upstream_changes() {
    let now = Instant::now();
    let first = snapshot(&of(&["ready", "ready", "ready"]), now);
    let entries = || first.entries.clone();
    let next = |entries| Snapshot::new(entries, Vec::new(), Some(&first));
    let mut down = entries();
    down[1].status = BreakerMachine::new(now).status(&rules());
    assert_eq!(next(down).version(), first.version(), "a state is no part of it");
    let mut renewed = entries();
    let config = renewed[1].upstream.config.clone();
    renewed[1].upstream = Arc::new(renewed[1].upstream.renewed(config).expect("it needs no file"));
    for other in [renewed, entries()[1..].to_vec(), Vec::new()] {
        let other = next(other);
        assert_ne!(other.version(), first.version());
        for (place, entry) in other.entries.iter().enumerate().take(3) {
            assert_eq!(other.place_of(entry.upstream.id), Some(place));
            let named = other.by_name(entry.upstream.name());
            assert_eq!(named.map(|named| named.upstream.id), Some(entry.upstream.id));
        }
    }
}
