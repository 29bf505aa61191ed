//! The records of all upstreams, found by id and by name without a search.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use super::upstream_record::UpstreamRecord;

/// The records of the fleet, in the order in which the upstreams entered, and of departed upstreams.
#[derive(Default)]
pub(super) struct UpstreamRecords {
    present: Vec<UpstreamRecord>,
    /// Upstreams that have left the fleet and still have requests in flight.
    departed: Vec<UpstreamRecord>,
    /// The places in `present` by the upstreams' ids.
    by_id: HashMap<usize, usize>,
    /// The places in `present` by the upstreams' names.
    by_name: HashMap<String, usize>,
    /// The ends of the trips of tripped upstreams, and the upstreams' ids.
    trips: BTreeSet<(Instant, usize)>,
    trip_ends: HashMap<usize, Instant>,
}

// === impl UpstreamRecords ===

impl UpstreamRecords {
    /// Returns the records of the fleet.
    pub(super) fn present(&self) -> &[UpstreamRecord] {
        &self.present
    }

    /// Returns the records of upstreams that have left the fleet.
    pub(super) fn departed(&self) -> &[UpstreamRecord] {
        &self.departed
    }

    /// Returns all records.
    pub(super) fn all(&mut self) -> impl Iterator<Item = &mut UpstreamRecord> {
        self.present.iter_mut().chain(&mut self.departed)
    }

    /// Returns the record of an upstream of the fleet.
    pub(super) fn find(&mut self, id: usize) -> Option<&mut UpstreamRecord> {
        self.by_id.get(&id).map(|at| &mut self.present[*at])
    }

    /// Returns the record of an upstream, in the fleet or departed.
    pub(super) fn find_probed(&mut self, id: usize) -> Option<&mut UpstreamRecord> {
        match self.by_id.get(&id) {
            Some(at) => Some(&mut self.present[*at]),
            None => self.departed.iter_mut().find(|record| record.upstream().id == id),
        }
    }

    /// Returns the record of the upstream with this name.
    pub(super) fn named(&self, name: &str) -> Option<&UpstreamRecord> {
        self.by_name.get(name).map(|at| &self.present[*at])
    }

    /// Adds a record behind the others.
    pub(super) fn push(&mut self, record: UpstreamRecord) {
        self.by_id.insert(record.upstream().id, self.present.len());
        self.by_name.entry(record.upstream().name().to_string()).or_insert(self.present.len());
        self.present.push(record);
    }

    /// Puts a record in the place of another one with the same name, which is returned. Adds the record where
    /// there is none.
    pub(super) fn replace(&mut self, before: usize, record: UpstreamRecord) -> Option<UpstreamRecord> {
        let Some(at) = self.by_id.remove(&before) else {
            self.push(record);
            return None;
        };
        self.by_id.insert(record.upstream().id, at);
        Some(std::mem::replace(&mut self.present[at], record))
    }

    /// Removes an upstream from the fleet.
    pub(super) fn remove(&mut self, id: usize) -> Option<UpstreamRecord> {
        let at = *self.by_id.get(&id)?;
        let record = self.present.remove(at);
        self.index();
        Some(record)
    }

    /// Keeps the record of an upstream that has left the fleet.
    pub(super) fn depart(&mut self, record: UpstreamRecord) {
        self.departed.push(record);
    }

    /// Removes the record of an upstream, wherever it is. Returns it with whether it was in the fleet.
    pub(super) fn forget(&mut self, id: usize) -> Option<(UpstreamRecord, bool)> {
        self.set_trip(id, None);
        if let Some(record) = self.remove(id) {
            return Some((record, true));
        }
        let at = self.departed.iter().position(|record| record.upstream().id == id)?;
        Some((self.departed.remove(at), false))
    }

    /// Writes the tables anew: places have shifted.
    fn index(&mut self) {
        // Of equal names the first one counts.
        let places = || self.present.iter().enumerate().rev();
        self.by_id = places().map(|(at, record)| (record.upstream().id, at)).collect();
        self.by_name = places().map(|(at, record)| (record.upstream().name().to_string(), at)).collect();
    }

    // === trips ===

    /// Sets when the trip of an upstream ends; `None`: the upstream is not tripped.
    pub(super) fn set_trip(&mut self, id: usize, ends: Option<Instant>) {
        let before = match ends {
            Some(ends) => self.trip_ends.insert(id, ends),
            None => self.trip_ends.remove(&id),
        };
        if before == ends {
            return;
        }
        before.map(|before| self.trips.remove(&(before, id)));
        self.trips.extend(ends.map(|ends| (ends, id)));
    }

    /// Returns when the next trip after this time ends, which may be past.
    pub(super) fn next_trip_end(&self, after: Instant) -> Option<Instant> {
        self.trips.range((after, usize::MAX)..).next().map(|(ends, _)| *ends)
    }

    /// Returns the tripped upstreams whose trips have ended.
    pub(super) fn tripped_until(&self, now: Instant) -> Vec<usize> {
        self.trips.range(..=(now, usize::MAX)).map(|(_, id)| *id).collect()
    }
}
