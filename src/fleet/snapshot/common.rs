//! What those who may have a request serve together. An id that nobody has is that of one who may yet come.
//!
//! Never: a route.

use std::time::Instant;

use super::{Entry, Snapshot};

// === impl Entry ===

impl Entry {
    pub(super) fn is_among(&self, among: Option<&[usize]>) -> bool {
        among.is_none_or(|among| among.contains(&self.upstream.id))
    }
}

// === impl Snapshot ===

impl Snapshot {
    /// Whether one of these serves the model, ready or not.
    pub fn serves(&self, model: &str, among: Option<&[usize]>) -> bool {
        let known = self.by_model.get(model);
        known.is_some_and(|known| known.iter().any(|index| self.entries[*index].is_among(among)))
    }

    /// Whether one of these serves the model and is ready.
    pub fn is_ready_with(&self, model: &str, among: Option<&[usize]>) -> bool {
        let known = self.by_model.get(model).into_iter().flatten().map(|index| &self.entries[*index]);
        known.filter(|entry| entry.is_ready()).any(|entry| entry.is_among(among))
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
}
