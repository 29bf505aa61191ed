//! The model that the upstreams of a query have in common: whether they serve a name, and which model serves
//! a request without one.
//!
//! Only discovered upstreams are considered: their source states the model. A configured upstream may serve
//! any model by the time it is up, and then a request would be answered by another model. For an upstream
//! that is down its last known models count.
//!
//! There is no common model while the models of an upstream are unknown.

use std::time::Instant;

use super::{PlaceSet, Snapshot, SnapshotEntry};

/// The model with which an upstream serves requests without a model.
enum BaseModel<'a> {
    One(&'a str),
    Several,
    Unknown,
}

// === impl SnapshotEntry ===

impl SnapshotEntry {
    /// Returns the base model of the upstream.
    fn base_model(&self) -> BaseModel<'_> {
        let discovered = self.upstream.config.discovered.as_ref();
        let named = discovered.and_then(|discovered| discovered.model.as_deref());
        if let Some(named) = named.filter(|named| self.models.is_empty() || self.serves(named)) {
            return BaseModel::One(named);
        }
        let mut bases = self.models.iter().filter(|card| card.parent.is_none()).map(|card| card.id.as_str());
        match bases.next() {
            Some(first) if bases.all(|other| other == first) => BaseModel::One(first),
            Some(_) => BaseModel::Several,
            None => BaseModel::Unknown,
        }
    }

    /// Whether the upstream has one of these ids, which are in ascending order; `None`: always.
    pub fn is_among(&self, among: Option<&[usize]>) -> bool {
        among.is_none_or(|among| among.binary_search(&self.upstream.id).is_ok())
    }

    /// Returns the source that discovered the upstream.
    fn source(&self) -> Option<&str> {
        self.upstream.config.discovered.as_ref().map(|discovered| discovered.source.as_str())
    }

    /// Returns the precedence among the upstreams of one source: the greatest one determines the model of
    /// all. While new engines replace old ones, both are in the fleet.
    fn source_precedence(&self) -> (bool, usize) {
        (self.is_ready(), self.upstream.id)
    }
}

// === impl Snapshot ===

impl Snapshot {
    /// Returns the upstreams among these ids that are not being removed.
    fn staying<'s>(&'s self, among: Option<&[usize]>) -> impl Iterator<Item = &'s SnapshotEntry> {
        self.entries.iter().filter(move |entry| !entry.removing && entry.is_among(among))
    }

    /// Whether one of these upstreams serves the model, ready or not.
    pub fn serves(&self, model: &str, among: Option<&[usize]>) -> bool {
        let known = self.by_model.get(model);
        known.is_some_and(|known| known.iter().any(|index| self.entries[index].is_among(among)))
    }

    /// Whether one of these upstreams serves the model and takes requests.
    pub fn is_ready_with(&self, model: &str, among: Option<&[usize]>) -> bool {
        let known = self.by_model.get(model).into_iter().flat_map(PlaceSet::iter);
        let known = known.map(|index| &self.entries[index]);
        known.filter(|entry| entry.can_serve()).any(|entry| entry.is_among(among))
    }

    /// Whether one of these upstreams is ready.
    pub(super) fn any_ready_of(&self, among: Option<&[usize]>) -> bool {
        self.ready().any(|entry| entry.is_among(among))
    }

    /// Whether a source that has not answered may still list one of these upstreams.
    pub(super) fn awaits_any_of(&self, among: Option<&[usize]>, now: Instant) -> bool {
        let is_there = |id: &usize| self.by_id(*id).is_some();
        let all_there = among.is_some_and(|among| among.iter().all(is_there));
        !all_there && self.awaited.is_some_and(|until| now < until)
    }

    /// Returns the base model of all these upstreams, if it is the same and all of them are discovered.
    pub fn only_base<'s>(&'s self, among: Option<&[usize]>, now: Instant) -> Option<&'s str> {
        if self.awaits_any_of(among, now) {
            return None;
        }
        let (mut found, mut unknown): (Vec<(&SnapshotEntry, &'s str)>, Vec<&SnapshotEntry>) =
            (Vec::new(), Vec::new());
        for entry in self.staying(among) {
            entry.source()?;
            match entry.base_model() {
                BaseModel::One(base) => {
                    match found.iter_mut().find(|(other, _)| is_of_same_source(entry, other)) {
                        Some(latest) if latest.0.source_precedence() < entry.source_precedence() => {
                            *latest = (entry, base)
                        }
                        Some(_) => {}
                        None => found.push((entry, base)),
                    }
                }
                BaseModel::Several => return None,
                BaseModel::Unknown => unknown.push(entry),
            }
        }
        let has_known_source =
            |entry: &&SnapshotEntry| found.iter().any(|(other, _)| is_of_same_source(entry, other));
        let first = found.first()?.1;
        let is_one = unknown.iter().all(has_known_source) && found.iter().all(|(_, other)| *other == first);
        is_one.then_some(first)
    }
}

fn is_of_same_source(one: &SnapshotEntry, other: &SnapshotEntry) -> bool {
    one.source().is_some() && one.source() == other.source()
}
