//! The floor under the breaker: how many of the upstreams that could have a request it may keep out.
//!
//! ```text
//! pool     the upstreams that could have the request, by its model and its route, and that are either
//!          tripped or take all requests; what is down, draining, refused or unknown is not in the pool
//! ejected  of the tripped upstreams in the pool, those whose trips end last: at most the share
//!          `max_ejected` of the pool, and at most all but one
//!          none, when all of the pool are tripped
//! ```
//!
//! Failing requests of one client trip one upstream after another. Without the floor they take the whole
//! fleet from all clients. A tripped upstream that is not ejected takes requests as if it were ready: also
//! before its trip ends, and more than one at a time after that.
//!
//! The floor is of one request, since upstreams serve several models and routes lead to some of them.

use std::time::Instant;

use super::{Query, Serving, Snapshot, SnapshotEntry};
use crate::fleet::breaker::Admits;

/// Which tripped upstreams are kept from one request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Floor {
    /// All of them.
    Unneeded,
    /// Those that are not before this one, by the end of the trip and then by id; `None`: none is.
    From(Option<TripEnd>),
}

/// Trips in the order in which they end; no two are equal.
type TripEnd = (Instant, usize);

impl SnapshotEntry {
    /// When its trip ends, or has ended without an answer since; `None`: it is not tripped, or gone.
    fn trip_end(&self) -> Option<TripEnd> {
        let end = self.status.trip_end().filter(|_| !self.removing)?;
        Some((end, self.upstream.id))
    }

    /// Requests may go to it, by its own state or, when it is tripped, as far as the floor lets them.
    pub fn can_serve(&self) -> bool {
        self.is_ready() || self.trip_end().is_some()
    }
}

impl Floor {
    /// What the upstream admits of a request with this floor.
    pub fn admits(self, entry: &SnapshotEntry, now: Instant) -> Admits {
        match (self, entry.trip_end()) {
            (Floor::From(first), Some(end)) if first.is_none_or(|first| end < first) => Admits::All,
            _ => entry.admits(now),
        }
    }
}

impl Snapshot {
    /// The floor for a request that these entries could have.
    pub(super) fn floor(&self, serving: Serving<'_>, query: &Query<'_>, now: Instant) -> Floor {
        if !self.any_tripped {
            return Floor::Unneeded;
        }
        let all = || self.served(serving).map(|(_, entry)| entry).filter(|entry| query.allows(entry));
        let tripped = || all().filter_map(SnapshotEntry::trip_end);
        let steady = all().filter(|entry| entry.admits(now) == Admits::All).count();
        let (count, pool) = (tripped().count(), tripped().count() + steady);
        let share = (self.max_ejected * pool as f64).floor() as usize;
        let most = if steady == 0 { 0 } else { share.min(pool - 1) };
        if count <= most {
            return Floor::Unneeded;
        }
        let mut first: Option<TripEnd> = None;
        for _ in 0..most {
            first = tripped().filter(|end| first.is_none_or(|first| *end < first)).max();
        }
        Floor::From(first)
    }
}
