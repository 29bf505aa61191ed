//! The ejection floor: limits how many of the suitable upstreams of a request the breaker may eject.
//!
//! ```text
//! pool     the upstreams that suit the request by its model and its route, and that are either tripped or
//!          admit all requests; upstreams that are down, draining, refused or unknown are not in the pool
//! ejected  the tripped upstreams of the pool with the latest trip ends: at most the share `max_ejected`
//!          of the pool, and at most all but one; none when all of the pool are tripped
//! ```
//!
//! Failing requests of one client can trip one upstream after another; without the floor they would take the
//! whole fleet from all clients. A tripped upstream that is not ejected takes requests as if it were ready:
//! also before its trip ends, and more than one at a time after that.
//!
//! The floor is computed for each request, since upstreams serve several models and routes select some of
//! them.

use std::time::Instant;

use super::{Snapshot, SnapshotEntry, SuitableEntries};
use crate::fleet::breaker::Admits;

/// Which tripped upstreams are ejected for one request.
#[derive(Clone, Copy, Debug)]
pub(super) enum EjectionFloor {
    /// All of them: they are within the limit.
    AllEjected,
    /// Those whose trips end at or after this one; `None`: no upstream is ejected.
    EjectedFrom(Option<TripEnd>),
}

/// The end of a trip and the upstream's id: orders trips, and no two are equal.
type TripEnd = (Instant, usize);

impl SnapshotEntry {
    /// Returns the end of the trip, past or future; `None` when the upstream is not tripped or is gone.
    fn trip_end(&self) -> Option<TripEnd> {
        let end = self.status.trip_end().filter(|_| !self.removing)?;
        Some((end, self.upstream.id))
    }

    /// Whether requests may go to the upstream: it is ready, or tripped and the floor may admit requests.
    pub fn can_serve(&self) -> bool {
        self.is_ready() || self.trip_end().is_some()
    }
}

impl EjectionFloor {
    /// Returns what the upstream admits of a request with this floor.
    pub(super) fn admits(self, entry: &SnapshotEntry, now: Instant) -> Admits {
        match (self, entry.trip_end()) {
            (EjectionFloor::EjectedFrom(first), Some(end)) if first.is_none_or(|first| end < first) => {
                Admits::All
            }
            _ => entry.admits(now),
        }
    }
}

impl Snapshot {
    /// Computes the floor for a request that these entries suit.
    pub(super) fn floor(&self, suitable: &SuitableEntries<'_>) -> EjectionFloor {
        if self.tripped.is_empty() {
            return EjectionFloor::AllEjected;
        }
        let entries = suitable.places_in(&self.tripped).map(|place| &self.entries[place]);
        let mut tripped: Vec<TripEnd> = entries.filter_map(SnapshotEntry::trip_end).collect();
        let steady = suitable.count_in(&self.steady);
        let pool = tripped.len() + steady;
        let share = (self.max_ejected * pool as f64).floor() as usize;
        let max_ejected = if steady == 0 { 0 } else { share.min(pool - 1) };
        if tripped.len() <= max_ejected {
            return EjectionFloor::AllEjected;
        }
        if max_ejected == 0 {
            return EjectionFloor::EjectedFrom(None);
        }
        let latest_first = |one: &TripEnd, other: &TripEnd| other.cmp(one);
        let (_, first, _) = tripped.select_nth_unstable_by(max_ejected - 1, latest_first);
        EjectionFloor::EjectedFrom(Some(*first))
    }
}
