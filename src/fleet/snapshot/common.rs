//! What those who may have a request serve together: whether it is a certain name, and which model it is
//! where there is only one.
//!
//! It is asked only of what sources name: they say which model there is, and mean it. An upstream that the
//! file names may serve anything by the time it is up, and nobody's request must be answered by another model
//! because of that. What is remembered of one that is down counts.
//!
//! Never: a route, a guess while somebody has yet to say what it serves.

use std::time::Instant;

use super::{Entry, Snapshot};

/// The model that an upstream serves when none is named, as far as that is known.
enum Base<'a> {
    One(&'a str),
    Several,
    Unknown,
}

// === impl Entry ===

impl Entry {
    fn only_base(&self) -> Base<'_> {
        let discovered = self.upstream.config.discovered.as_ref();
        let told = discovered.and_then(|discovered| discovered.model.as_deref());
        if let Some(told) = told.filter(|told| self.models.is_empty() || self.serves(told)) {
            return Base::One(told);
        }
        let mut bases = self.models.iter().filter(|card| card.parent.is_none()).map(|card| card.id.as_str());
        match bases.next() {
            Some(first) if bases.all(|other| other == first) => Base::One(first),
            Some(_) => Base::Several,
            None => Base::Unknown,
        }
    }

    /// Whether it is one of these, by their ids; `None`: anybody is.
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
    /// Those who stay, of these. An id that nobody has is one who may yet come.
    fn staying<'s>(&'s self, among: Option<&[usize]>) -> impl Iterator<Item = &'s Entry> {
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
        let (mut found, mut unknown): (Vec<(&Entry, &'s str)>, Vec<&Entry>) = (Vec::new(), Vec::new());
        for entry in self.staying(among) {
            entry.source()?;
            match entry.only_base() {
                Base::One(base) => {
                    match found.iter_mut().find(|(other, _)| is_of_same_source(entry, other)) {
                        Some(latest) if latest.0.rank() < entry.rank() => *latest = (entry, base),
                        Some(_) => {}
                        None => found.push((entry, base)),
                    }
                }
                Base::Several => return None,
                Base::Unknown => unknown.push(entry),
            }
        }
        let is_told = |entry: &&Entry| found.iter().any(|(other, _)| is_of_same_source(entry, other));
        let first = found.first()?.1;
        let is_one = unknown.iter().all(is_told) && found.iter().all(|(_, other)| *other == first);
        is_one.then_some(first)
    }
}

fn is_of_same_source(one: &Entry, other: &Entry) -> bool {
    one.source().is_some() && one.source() == other.source()
}
