//! Tells the state which upstreams there are: fleet and state do not know each other.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::fleet::{Fleet, Snapshot};
use crate::state::{State, TrackedUpstream};

/// How often the state is updated even when nothing changes: the ratio of bytes to tokens is learnt all the
/// time, and the metrics should show how full the index is now.
const REPUBLISH_INTERVAL: Duration = Duration::from_secs(1);

/// Runs until `stopped` says so.
pub async fn follow(fleet: Arc<Fleet>, state: Arc<State>, mut stopped: watch::Receiver<bool>) {
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

pub fn publish(snapshot: &Snapshot, state: &State) {
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
