//! The immutable view of the fleet on which one routing decision is based.

mod common_model;
mod floor;

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::breaker::{Admits, UpstreamState};
use super::lease::{Lease, RequestWork};
use super::query::UpstreamQuery;
use super::snapshot_entry::SnapshotEntry;
use crate::config::types::Breaker;
use crate::pick::Candidate;
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
    /// The entries that serve each model, ready or not.
    by_model: HashMap<String, Vec<usize>>,
    /// All upstreams serve the same names, and no upstream with other names may still be discovered. Then the
    /// model does not affect routing, and any upstream can answer a request for an unknown one.
    uniform: bool,
    /// The names that ready upstreams serve, in the order of the entries.
    aliases: Vec<String>,
    /// Until when sources that have not answered yet may list upstreams.
    awaited: Option<Instant>,
    /// Some upstream is tripped.
    any_tripped: bool,
    /// `breaker.max_ejected`.
    max_ejected: f64,
}

// === impl UpstreamQuery ===

impl UpstreamQuery<'_> {
    /// Whether the request may go to this upstream, regardless of its state.
    fn allows(&self, entry: &SnapshotEntry) -> bool {
        self.only.is_none_or(|only| only == entry.upstream.id) && entry.is_among(self.among)
    }
}

// === impl Snapshot ===

impl Snapshot {
    pub(super) fn new(entries: Vec<SnapshotEntry>, departed: Vec<SnapshotEntry>) -> Self {
        let mut by_model: HashMap<String, Vec<usize>> = HashMap::new();
        let mut aliases: Vec<String> = Vec::new();
        let staying = || entries.iter().enumerate().filter(|(_, entry)| !entry.removing);
        for (index, entry) in staying() {
            for card in entry.models.iter() {
                let known = by_model.entry(card.id.clone()).or_default();
                if known.last() != Some(&index) {
                    known.push(index);
                }
                if entry.can_serve() && !aliases.contains(&card.id) {
                    aliases.push(card.id.clone());
                }
            }
        }
        let serves_all = |entry: &SnapshotEntry| aliases.iter().all(|alias| entry.serves(alias));
        let known = |entry: &SnapshotEntry| entry.status.state != UpstreamState::Unknown && serves_all(entry);
        let uniform = staying().all(|(_, entry)| known(entry)) && by_model.len() == aliases.len();
        let any_tripped = entries.iter().any(|entry| entry.status.state == UpstreamState::Tripped);
        let max_ejected = Breaker::default().max_ejected;
        Snapshot { entries, departed, by_model, uniform, aliases, awaited: None, any_tripped, max_ejected }
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
        self.entries.iter().find(|entry| entry.upstream.id == id)
    }

    /// Returns the entry of the upstream with this name.
    pub fn by_name(&self, name: &str) -> Option<&SnapshotEntry> {
        self.entries.iter().find(|entry| entry.upstream.name() == name)
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
        let Some(served) = self.serving(query) else {
            let may_appear = self.may_still_appear(query, now) || !self.any_ready_of(query.among);
            return if may_appear { FilterResult::NotReady } else { FilterResult::NoSuchModel };
        };
        let floor = self.floor(served, query, now);
        let mut filter =
            CandidateFilter { query, now, floor, out, rank: Rank::Worst, full: None, tried: false };
        self.served(served).for_each(|(index, entry)| filter.consider(index, entry));
        filter.result()
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
                self.serving(query).map_or(EjectionFloor::AllEjected, |at| self.floor(at, query, now))
            }
            _ => EjectionFloor::AllEjected,
        };
        Lease::take_as(entry, floor.admits(entry, now), work, now)
    }

    /// Returns the entries that serve the query's model, in any state; `None`: no entry does.
    fn serving(&self, query: &UpstreamQuery<'_>) -> Option<ServingEntries<'_>> {
        let Some(model) = query.model else { return Some(ServingEntries::All) };
        let indices = self.by_model.get(model).map(Vec::as_slice).unwrap_or_default();
        if indices.iter().any(|index| self.entries[*index].is_among(query.among)) {
            return Some(ServingEntries::At(indices));
        }
        let decides = query.has_aliases || query.among.is_some() || self.model_decides();
        (!decides).then_some(ServingEntries::All)
    }

    /// Returns these entries with their indices.
    fn served<'s>(&'s self, serving: ServingEntries<'s>) -> impl Iterator<Item = (usize, &'s SnapshotEntry)> {
        let indices = match serving {
            ServingEntries::All => None,
            ServingEntries::At(indices) => Some(indices),
        };
        let count = indices.map_or(self.entries.len(), <[usize]>::len);
        (0..count).map(move |at| {
            let index = indices.map_or(at, |indices| indices[at]);
            (index, &self.entries[index])
        })
    }

    /// Whether one of the query's upstreams was not reached yet and may serve its model. An upstream with
    /// configured models serves no others.
    fn may_still_appear(&self, query: &UpstreamQuery<'_>, now: Instant) -> bool {
        let may = |entry: &SnapshotEntry| {
            let is_new = entry.status.state == UpstreamState::Unknown && entry.is_among(query.among);
            let lists =
                |names: &Vec<String>| query.model.is_none_or(|model| names.iter().any(|name| name == model));
            is_new
                && entry.upstream.config.models.as_ref().is_none_or(lists)
                && now.saturating_duration_since(entry.status.since) < DISCOVERY_GRACE
        };
        self.awaits_any_of(query.among, now) || self.entries.iter().any(may)
    }
}

/// The entries that serve a query's model.
#[derive(Clone, Copy)]
enum ServingEntries<'s> {
    /// All entries: the model does not matter.
    All,
    /// The entries with these indices.
    At(&'s [usize]),
}

/// The preference for an upstream. The upstreams of the best rank are candidates, the rest are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    First,
    /// A doubtful upstream; for a request that has failed once, also an upstream that needs a trial.
    Second,
    /// Tried already.
    Tried,
    /// Tried already, and the upstream declined the request.
    Declined,
    Worst,
}

/// Collects the candidates of one query.
struct CandidateFilter<'a, 'q> {
    query: &'a UpstreamQuery<'q>,
    now: Instant,
    floor: EjectionFloor,
    out: &'a mut Vec<Candidate>,
    /// The rank of the candidates in `out`.
    rank: Rank,
    /// The best rank among the full upstreams, and the time at which the first of them has room again.
    full: Option<(Rank, Option<Instant>)>,
    /// Some suitable upstream was tried already.
    tried: bool,
}

impl CandidateFilter<'_, '_> {
    fn consider(&mut self, index: usize, entry: &SnapshotEntry) {
        let (query, upstream) = (self.query, &entry.upstream);
        if !query.allows(entry) {
            return;
        }
        let mut rank = match self.floor.admits(entry, self.now) {
            // A drained upstream still answers requests that only it can answer, such as for a stored
            // response.
            Admits::None if query.only.is_some() && entry.drains() => Rank::First,
            Admits::None => return,
            Admits::One if upstream.live.trial.load(Relaxed) => return,
            Admits::One if query.tried.is_empty() => Rank::First,
            Admits::One | Admits::Last => Rank::Second,
            Admits::All => Rank::First,
        };
        if query.tried.contains(&upstream.id) {
            self.tried = true;
            if !query.again {
                return;
            }
            rank = if query.declined.contains(&upstream.id) { Rank::Declined } else { Rank::Tried };
        }
        let load = upstream.load_at(self.now);
        let busy = upstream.busy_until(self.now);
        if busy.is_some() || upstream.config.max_active.is_some_and(|most| load.active >= u64::from(most)) {
            let (best, until) = self.full.unwrap_or((rank, None));
            let until = until.into_iter().chain(busy).min();
            self.full = Some((best.min(rank), until));
            return;
        }
        if rank > self.rank {
            return;
        }
        if rank < self.rank {
            self.rank = rank;
            self.out.clear();
        }
        // Requests of siblings and other clients count as load, but `max_active` limits only our own.
        let (siblings, foreign) = (upstream.siblings(), upstream.foreign(self.now));
        let sum =
            |own: u64, siblings: u64, foreign: u64| own.saturating_add(siblings).saturating_add(foreign);
        let active = sum(load.active, siblings.active, foreign.requests);
        self.out.push(Candidate {
            index,
            backlog: sum(load.backlog, siblings.backlog, foreign.tokens),
            missing: query.tokens,
            active,
            context: sum(load.context, siblings.context, foreign.tokens),
            weight: upstream.config.weight * entry.status.weight_share(active, self.now),
            session_penalty: 0,
            cold: query.tokens,
            hit: 0,
            uncached: query.tokens,
        });
    }

    fn result(self) -> FilterResult {
        let none = self.out.is_empty();
        match self.full {
            // Waiting for a good upstream is better than taking a doubtful one.
            Some((Rank::First, until)) if none || self.rank == Rank::Second => {
                self.out.clear();
                FilterResult::Full { until }
            }
            Some((best, until)) if none || best < Rank::Declined && self.rank == Rank::Declined => {
                self.out.clear();
                FilterResult::Full { until }
            }
            _ if !none => FilterResult::Candidates,
            _ if self.tried => FilterResult::Tried,
            _ => FilterResult::NotReady,
        }
    }
}

#[cfg(test)]
mod tests;
