//! Passes the upstreams of the fleet to the state: the two rooms do not depend on each other.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::fleet::{Fleet, Snapshot};
use crate::state::{State, TrackedUpstream};

/// The interval of updates without a change of the fleet: the bytes per token change all the time, and the
/// metrics should show the present size of the index.
const REPUBLISH_INTERVAL: Duration = Duration::from_secs(1);

/// Updates the state with every snapshot until `stopped`.
pub(super) async fn follow(fleet: Arc<Fleet>, state: Arc<State>, mut stopped: watch::Receiver<bool>) {
    let mut changes = fleet.changes();
    loop {
        publish(&fleet.snapshot(), &state);
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => return,
            changed = timeout(REPUBLISH_INTERVAL, changes.changed()) => {
                if matches!(changed, Ok(Err(_))) {
                    return;
                }
            }
        }
    }
}

/// Passes the upstreams of a snapshot to the state.
pub(super) fn publish(snapshot: &Snapshot, state: &State) {
    let present: Vec<TrackedUpstream<'_>> = snapshot
        .entries
        .iter()
        .map(|entry| TrackedUpstream {
            id: entry.upstream.id,
            name: entry.upstream.name(),
            incarnation: entry.incarnation,
            cache_tokens: entry.cache_tokens,
            model: entry.models.first().map(|card| card.id.as_str()),
        })
        .collect();
    state.follow_fleet(&present);
}
