//! The model that the upstreams of a query have in common: whether they serve a name, and the model that a
//! request without a model gets.
//!
//! Only discovered upstreams are considered: their source states the model. An upstream of the file may
//! serve any model by the time it is up, and a request must not be answered by another model because of
//! that. The last known models of an upstream that is down count.
//!
//! Never guesses while the models of an upstream are unknown.

use std::time::Instant;

use super::{Snapshot, SnapshotEntry};

/// The model that an upstream serves when none is named, as far as that is known.
enum BaseModel<'a> {
    One(&'a str),
    Several,
    Unknown,
}

// === impl Entry ===

impl SnapshotEntry {
    fn only_base(&self) -> BaseModel<'_> {
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

    /// Whether the upstream is one of these ids; `None`: always.
    pub fn is_among(&self, among: Option<&[usize]>) -> bool {
        among.is_none_or(|among| among.contains(&self.upstream.id))
    }

    /// The source that it was discovered by.
    fn source(&self) -> Option<&str> {
        self.upstream.config.discovered.as_ref().map(|discovered| discovered.source.as_str())
    }

    /// Of what one source names, the one with the greatest of these says what all of them serve: while other
    /// engines take over, both are there.
    fn rank(&self) -> (bool, usize) {
        (self.is_ready(), self.upstream.id)
    }
}

// === impl Snapshot ===

impl Snapshot {
    /// The upstreams among these ids that are not being removed. An unknown id stands for one that may still
    /// be discovered.
    fn staying<'s>(&'s self, among: Option<&[usize]>) -> impl Iterator<Item = &'s SnapshotEntry> {
        self.entries.iter().filter(move |entry| !entry.removing && entry.is_among(among))
    }

    /// Whether one of these serves the model, ready or not.
    pub fn serves(&self, model: &str, among: Option<&[usize]>) -> bool {
        let known = self.by_model.get(model);
        known.is_some_and(|known| known.iter().any(|index| self.entries[*index].is_among(among)))
    }

    /// Whether one of these serves the model and takes requests.
    pub fn is_ready_with(&self, model: &str, among: Option<&[usize]>) -> bool {
        let known = self.by_model.get(model).into_iter().flatten().map(|index| &self.entries[*index]);
        known.filter(|entry| entry.can_serve()).any(|entry| entry.is_among(among))
    }

    /// Whether one of these is ready.
    pub(super) fn any_ready_of(&self, among: Option<&[usize]>) -> bool {
        self.ready().any(|entry| entry.is_among(among))
    }

    /// Whether a source that has not answered may yet name one of these.
    pub(super) fn awaits_any_of(&self, among: Option<&[usize]>, now: Instant) -> bool {
        let is_there = |id: &usize| self.by_id(*id).is_some();
        let all_there = among.is_some_and(|among| among.iter().all(is_there));
        !all_there && self.awaited.is_some_and(|until| now < until)
    }

    /// The base model of all of these, where it is one and the same and sources have named them all.
    pub fn only_base<'s>(&'s self, among: Option<&[usize]>, now: Instant) -> Option<&'s str> {
        if self.awaits_any_of(among, now) {
            return None;
        }
        let (mut found, mut unknown): (Vec<(&SnapshotEntry, &'s str)>, Vec<&SnapshotEntry>) =
            (Vec::new(), Vec::new());
        for entry in self.staying(among) {
            entry.source()?;
            match entry.only_base() {
                BaseModel::One(base) => {
                    match found.iter_mut().find(|(other, _)| is_of_same_source(entry, other)) {
                        Some(latest) if latest.0.rank() < entry.rank() => *latest = (entry, base),
                        Some(_) => {}
                        None => found.push((entry, base)),
                    }
                }
                BaseModel::Several => return None,
                BaseModel::Unknown => unknown.push(entry),
            }
        }
        let is_told = |entry: &&SnapshotEntry| found.iter().any(|(other, _)| is_of_same_source(entry, other));
        let first = found.first()?.1;
        let is_one = unknown.iter().all(is_told) && found.iter().all(|(_, other)| *other == first);
        is_one.then_some(first)
    }
}

fn is_of_same_source(one: &SnapshotEntry, other: &SnapshotEntry) -> bool {
    one.source().is_some() && one.source() == other.source()
}
