//! Tells the state which upstreams there are: fleet and state do not know each other.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::fleet::{Fleet, Snapshot};
use crate::state::{Present, State};

/// How often it is told even when nothing changes: what a token weighs is learnt all the time, and whoever
/// looks at the metrics wants to see how full the index is, not how full it was.
const EVERY: Duration = Duration::from_secs(1);

/// Runs until `stopped` says so.
pub async fn follow(fleet: Arc<Fleet>, state: Arc<State>, mut stopped: watch::Receiver<bool>) {
    let mut changes = fleet.changes();
    loop {
        tell(&fleet.snapshot(), &state);
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => return,
            changed = timeout(EVERY, changes.changed()) => {
                if matches!(changed, Ok(Err(_))) {
                    return;
                }
            }
        }
    }
}

pub fn tell(snapshot: &Snapshot, state: &State) {
    let present: Vec<Present<'_>> = snapshot
        .entries
        .iter()
        .map(|entry| Present {
            id: entry.upstream.id,
            name: entry.upstream.name(),
            incarnation: entry.incarnation,
            cache_tokens: entry.cache_tokens,
            model: entry.models.first().map(|card| card.id.as_str()),
        })
        .collect();
    state.follow(&present);
}
