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

use super::{ServingEntries, Snapshot, SnapshotEntry, UpstreamQuery};
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
    pub fn admits(self, entry: &SnapshotEntry, now: Instant) -> Admits {
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
    pub(super) fn floor(
        &self,
        serving: ServingEntries<'_>,
        query: &UpstreamQuery<'_>,
        now: Instant,
    ) -> EjectionFloor {
        if !self.any_tripped {
            return EjectionFloor::AllEjected;
        }
        let all = || self.served(serving).map(|(_, entry)| entry).filter(|entry| query.allows(entry));
        let tripped = || all().filter_map(SnapshotEntry::trip_end);
        let steady = all().filter(|entry| entry.admits(now) == Admits::All).count();
        let (count, pool) = (tripped().count(), tripped().count() + steady);
        let share = (self.max_ejected * pool as f64).floor() as usize;
        let max_ejected = if steady == 0 { 0 } else { share.min(pool - 1) };
        if count <= max_ejected {
            return EjectionFloor::AllEjected;
        }
        let mut first: Option<TripEnd> = None;
        for _ in 0..max_ejected {
            first = tripped().filter(|end| first.is_none_or(|first| *end < first)).max();
        }
        EjectionFloor::EjectedFrom(first)
    }
}
