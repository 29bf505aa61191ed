//! The immutable view of the fleet on which one routing decision is based.

mod common_model;
mod directory;
mod filter;
mod floor;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::breaker::UpstreamState;
use super::lease::{Lease, RequestWork};
use super::query::UpstreamQuery;
use super::snapshot_entry::SnapshotEntry;
use super::upstream::Upstream;
use crate::config::types::Breaker;
use crate::pick::Candidate;
use crate::route::upstreams::{PlaceSet, RouteUpstreams};
use directory::FleetDirectory;
use filter::{CandidateFilter, FilterRow, SuitableEntries};
use floor::EjectionFloor;

/// The result of filtering the fleet for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterResult {
    /// There are candidates.
    Candidates,
    /// The suitable upstreams are at their `max_active`, or reported that they are full; the first of the
    /// latter takes requests again at `until`.
    Full { until: Option<Instant> },
    /// All suitable upstreams were tried.
    Tried,
    /// The model is served, or may still be discovered, and no upstream that serves it is ready.
    NotReady,
    /// None of the allowed upstreams serves the model.
    NoSuchModel,
}

/// The time for which an upstream that was never reached may serve any model; after that an unknown model is
/// rejected. Loading the largest models takes about as long.
pub(super) const DISCOVERY_GRACE: Duration = Duration::from_secs(600);

/// The immutable view of the fleet.
pub struct Snapshot {
    /// The upstreams of the fleet.
    pub entries: Vec<SnapshotEntry>,
    /// Upstreams that were removed by force and have requests in flight, which end when the upstream is gone.
    departed: Vec<SnapshotEntry>,
    directory: Arc<FleetDirectory>,
    /// What the filter reads of each entry.
    rows: Vec<FilterRow>,
    all: PlaceSet,
    /// The entries that admit all requests at any time.
    steady: PlaceSet,
    tripped: PlaceSet,
    /// The entries that serve each model, ready or not.
    by_model: HashMap<String, PlaceSet>,
    /// All upstreams serve the same names, and no upstream with other names may still be discovered. Then the
    /// model does not affect routing, and any upstream can answer a request for an unknown one.
    uniform: bool,
    /// The names that ready upstreams serve, in the order of the entries.
    aliases: Vec<String>,
    /// Until when sources that have not answered yet may list upstreams.
    awaited: Option<Instant>,
    /// `breaker.max_ejected`.
    max_ejected: f64,
}

// === impl Snapshot ===

impl Snapshot {
    /// Builds a snapshot; `before` is the one that it replaces, for what has not changed.
    pub(super) fn new(
        entries: Vec<SnapshotEntry>,
        departed: Vec<SnapshotEntry>,
        before: Option<&Snapshot>,
    ) -> Self {
        let mut by_model: HashMap<String, PlaceSet> = HashMap::new();
        let (mut aliases, mut known_aliases): (Vec<String>, HashSet<&str>) = Default::default();
        let staying = || entries.iter().enumerate().filter(|(_, entry)| !entry.removing);
        for (index, entry) in staying() {
            for card in entry.models.iter() {
                match by_model.get_mut(&card.id) {
                    Some(known) => known.insert(index),
                    None => drop(by_model.insert(card.id.clone(), PlaceSet::from_iter([index]))),
                }
                if entry.can_serve() && known_aliases.insert(&card.id) {
                    aliases.push(card.id.clone());
                }
            }
        }
        let all_known = staying().all(|(_, entry)| entry.status.state != UpstreamState::Unknown);
        let count = staying().count();
        let by_all = |model: &String| by_model.get(model).is_some_and(|serving| serving.count() == count);
        let uniform = all_known && by_model.len() == aliases.len() && aliases.iter().all(by_all);
        let those = |is: fn(&SnapshotEntry) -> bool| -> PlaceSet {
            entries.iter().enumerate().filter(|(_, entry)| is(entry)).map(|(index, _)| index).collect()
        };
        Snapshot {
            directory: FleetDirectory::of(&entries, before.map(|before| &before.directory)),
            rows: entries.iter().map(FilterRow::of).collect(),
            all: those(|_| true),
            steady: those(SnapshotEntry::is_steady),
            tripped: those(|entry| entry.status.state == UpstreamState::Tripped),
            departed,
            by_model,
            uniform,
            aliases,
            awaited: None,
            max_ejected: Breaker::default().max_ejected,
            entries,
        }
    }

    /// Sets until when sources that have not answered may list upstreams with any model.
    pub(super) fn awaiting(self, until: Option<Instant>) -> Self {
        Snapshot { uniform: self.uniform && until.is_none(), awaited: until, ..self }
    }

    /// Sets `breaker.max_ejected`.
    pub(super) fn ejecting(self, max_ejected: f64) -> Self {
        Snapshot { max_ejected, ..self }
    }

    /// Whether some source has not answered yet.
    pub fn awaits(&self) -> bool {
        self.awaited.is_some()
    }

    /// Whether some upstream takes requests.
    pub fn any_ready(&self) -> bool {
        self.ready().next().is_some()
    }

    /// Returns the upstreams that requests go to. Includes tripped ones: of the upstreams that serve a
    /// model, at least one takes requests.
    pub fn ready(&self) -> impl Iterator<Item = &SnapshotEntry> {
        self.entries.iter().filter(|entry| entry.can_serve())
    }

    /// Returns the upstreams that can answer for data that only they hold: the ready and the draining ones.
    pub fn reachable(&self) -> impl Iterator<Item = &SnapshotEntry> {
        self.entries.iter().filter(|entry| entry.can_serve() || entry.drains())
    }

    /// Returns the entry of an upstream of the fleet.
    pub fn by_id(&self, id: usize) -> Option<&SnapshotEntry> {
        self.place_of(id).map(|place| &self.entries[place])
    }

    /// Returns the place of the entry of an upstream, which is the `index` of its candidate.
    pub fn place_of(&self, id: usize) -> Option<usize> {
        self.directory.by_id(id)
    }

    /// Returns the id of the upstream of a candidate.
    pub fn id_at(&self, index: usize) -> usize {
        self.rows[index].id()
    }

    /// Identifies the list of upstreams with their settings: equal in snapshots that have the same.
    pub fn version(&self) -> u64 {
        self.directory.version
    }

    /// Returns the entry of the upstream with this name.
    pub fn by_name(&self, name: &str) -> Option<&SnapshotEntry> {
        self.directory.by_name(name).map(|place| &self.entries[place])
    }

    /// Whether an upstream is known to be gone, so that its requests in flight must end.
    pub fn is_gone(&self, id: usize) -> bool {
        self.watched(id).is_some_and(|entry| entry.status.gone)
    }

    /// As `by_id`, but also finds an upstream that was removed by force and is still probed.
    pub(super) fn watched(&self, id: usize) -> Option<&SnapshotEntry> {
        self.by_id(id).or_else(|| self.departed.iter().find(|entry| entry.upstream.id == id))
    }

    /// Returns the names for vLLM's "Valid aliases".
    pub fn aliases(&self) -> &[String] {
        &self.aliases
    }

    /// Whether the model affects routing.
    pub fn model_decides(&self) -> bool {
        !self.uniform
    }

    /// Returns the base model of all ready upstreams among these, if it is known and the same.
    pub fn base_of_ready(&self, among: Option<&[usize]>) -> Option<&str> {
        let mut bases = self.ready().filter(|entry| entry.is_among(among)).map(SnapshotEntry::base);
        let first = bases.next()??;
        bases.all(|other| other == Some(first)).then_some(first)
    }

    /// Whether all ready upstreams among these have the same base model, for requests that name no model.
    pub fn serves_one_base(&self, among: Option<&[usize]>) -> bool {
        let mut bases = self.ready().filter(|entry| entry.is_among(among)).map(SnapshotEntry::base);
        let first = bases.next().flatten();
        bases.all(|other| other == first)
    }

    /// Whether some upstream serves the model, so that the name may label a metric.
    pub fn serves_model(&self, model: &str) -> bool {
        self.by_model.contains_key(model)
    }

    /// Fills `out` with the candidates for a request. The one place that filters: by readiness, breaker,
    /// room, and earlier attempts.
    pub fn candidates(
        &self,
        query: &UpstreamQuery<'_>,
        now: Instant,
        out: &mut Vec<Candidate>,
    ) -> FilterResult {
        out.clear();
        let Some(suitable) = self.suitable(query) else {
            let among = query.among.map(RouteUpstreams::ids);
            let may_appear = self.may_still_appear(query, now) || !self.any_ready_of(among);
            return if may_appear { FilterResult::NotReady } else { FilterResult::NoSuchModel };
        };
        let floor = self.floor(&suitable);
        CandidateFilter::new(self, query, now, floor, out).run(&suitable)
    }

    /// Takes a lease on one of the `candidates` of the same query. Returns `None` when another request has
    /// taken the last place meanwhile; the caller then chooses again.
    pub fn take(
        &self,
        query: &UpstreamQuery<'_>,
        index: usize,
        work: RequestWork,
        now: Instant,
    ) -> Option<Lease> {
        let entry = &self.entries[index];
        let floor = match entry.status.state {
            UpstreamState::Tripped => {
                self.suitable(query).map_or(EjectionFloor::AllEjected, |suitable| self.floor(&suitable))
            }
            _ => EjectionFloor::AllEjected,
        };
        Lease::take_as(entry, floor.admits(entry, now), work, now)
    }

    /// Returns the entries that suit a query; `None`: no entry of its route serves its model.
    fn suitable<'s>(&'s self, query: &UpstreamQuery<'s>) -> Option<SuitableEntries<'s>> {
        let route = query.among.map(|among| self.places_of(among));
        let serving = match query.model {
            None => &self.all,
            Some(model) => self.serving(model, route.as_deref(), query)?,
        };
        // An upstream that is not there has no place, and none behind the last word.
        let only = query.only.map(|only| self.place_of(only).unwrap_or(usize::MAX));
        Some(SuitableEntries { serving, route, only })
    }

    /// Returns the entries that serve a model, in any state; `None`: no entry of the route does.
    fn serving(&self, model: &str, route: Option<&PlaceSet>, query: &UpstreamQuery<'_>) -> Option<&PlaceSet> {
        let serving = self.by_model.get(model);
        let meets = |route: &PlaceSet, serving: &PlaceSet| {
            (0..serving.words()).any(|word| serving.word(word) & route.word(word) != 0)
        };
        if let Some(serving) = serving.filter(|serving| route.is_none_or(|route| meets(route, serving))) {
            return Some(serving);
        }
        let decides = query.has_aliases || query.among.is_some() || self.model_decides();
        (!decides).then_some(&self.all)
    }

    /// Returns the places of a route's upstreams, which were found already unless the fleet has changed.
    fn places_of<'s>(&self, among: &'s RouteUpstreams) -> Cow<'s, PlaceSet> {
        let places = among.places(self.version()).map(Cow::Borrowed);
        places.unwrap_or_else(|| Cow::Owned(among.ids().iter().filter_map(|id| self.place_of(*id)).collect()))
    }

    /// Whether one of the query's upstreams was not reached yet and may serve its model. An upstream with
    /// configured models serves no others.
    fn may_still_appear(&self, query: &UpstreamQuery<'_>, now: Instant) -> bool {
        let among = query.among.map(RouteUpstreams::ids);
        let may = |entry: &SnapshotEntry| {
            let is_new = entry.status.state == UpstreamState::Unknown && entry.is_among(among);
            let lists =
                |names: &Vec<String>| query.model.is_none_or(|model| names.iter().any(|name| name == model));
            is_new
                && entry.upstream.config.models.as_ref().is_none_or(lists)
                && now.saturating_duration_since(entry.status.since) < DISCOVERY_GRACE
        };
        self.awaits_any_of(among, now) || self.entries.iter().any(may)
    }
}

#[cfg(test)]
mod tests;
