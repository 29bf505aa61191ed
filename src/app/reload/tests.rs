//! Tests of a reload beside changes of the fleet.

use std::cell::Cell;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::block_in_place;

use super::*;
use crate::config::check::check;
use crate::observe::Observer;

fn config(text: &str) -> Config {
    check(text, &|_| None).unwrap_or_else(|problems| panic!("{text}: {problems:?}"))
}

/// A fleet of the upstreams `a` and `b`, with its keeper.
fn fleet() -> (Config, Arc<Fleet>, watch::Sender<bool>) {
    let old =
        config("upstreams: [{url: 'http://127.0.0.1:9', name: a}, {url: 'http://127.0.0.2:9', name: b}]");
    let (fleet, keeper) = Fleet::new(&old, Observer::default()).expect("the upstreams are usable");
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(keeper.run(stopped));
    (old, fleet, stop)
}

/// An operator removes `b` by force between the snapshot of a reload without `b` and its changes.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_leaves_during_a_reload_does_not_fail_it() {
    let (old, fleet, _stop) = fleet();
    let new = config("upstreams: [{url: 'http://127.0.0.1:9', name: a, weight: 2}]");
    let (diff, snapshots) = (diff::diff(&old, &new), Cell::new(0));
    let done = change_fleet(&fleet, |snapshot| {
        snapshots.set(snapshots.get() + 1);
        let changes = fleet_changes(&old, &new, &diff, snapshot, &ClearedRecords::default());
        if snapshots.get() == 1 {
            let removal = FleetChange::Remove { name: "b".into(), force: true };
            let removed = async { fleet.apply(vec![removal]).await };
            block_in_place(|| Handle::current().block_on(removed)).expect("it is present");
        }
        ((), changes)
    });
    assert_eq!((done.await, snapshots.get()), (Ok(()), 2));
    let snapshot = fleet.snapshot();
    assert!(snapshot.by_name("b").is_none());
    assert_eq!(snapshot.by_name("a").map(|entry| entry.upstream.config.weight), Some(2.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_does_not_retry_for_ever() {
    let (_, fleet, _stop) = fleet();
    let mut snapshots = 0;
    let done = change_fleet(&fleet, |_| {
        snapshots += 1;
        ((), vec![FleetChange::Drain { name: "gone".into(), drain: true }])
    });
    assert!(done.await.is_err_and(|problems| problems[0].contains("gone")));
    assert_eq!(snapshots, MAX_FLEET_ATTEMPTS);
}
