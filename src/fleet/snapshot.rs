//! The immutable view of the fleet that one decision is made from.

mod common_model;
mod floor;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::breaker::{Admits, BreakerRules, Machine, UpstreamState, UpstreamStatus};
use super::lease::{Lease, Work};
use super::upstream::Upstream;
use crate::aggregate::ModelCard;
use crate::config::types::{Breaker, Health};
use crate::pick::Candidate;
use floor::Floor;

/// One upstream as the keeper last saw it.
#[derive(Clone)]
pub struct SnapshotEntry {
    pub upstream: Arc<Upstream>,
    pub status: UpstreamStatus,
    /// What it serves; remembered while it is down.
    pub models: Arc<Vec<ModelCard>>,
    pub version: Option<Arc<str>>,
    /// Moves when its cache is to be taken for empty: it restarted, or came back from being gone.
    pub incarnation: u64,
    /// Tokens that its cache holds, as it said last.
    pub cache_tokens: Option<u64>,
    /// It goes when its last request has ended.
    pub removing: bool,
    /// It is enough to ask it at each interval.
    pub(super) calm: bool,
}

/// What a request requires of an upstream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// `None`: it names no model, or its model does not matter.
    pub model: Option<&'a str>,
    /// Prompt tokens, estimated.
    pub tokens: u64,
    /// Ids of upstreams that this request has been to already.
    pub tried: &'a [usize],
    /// Tried upstreams may take the request again when no other can.
    pub again: bool,
    /// The ids of tried upstreams that declined this request: used only when no other will become available.
    pub away: &'a [usize],
    /// The id of the only upstream that may take the request.
    pub only: Option<usize>,
    /// The ids of the upstreams that may take the request; `None`: all. An unknown id stands for an upstream
    /// that may still be discovered.
    pub among: Option<&'a [usize]>,
    /// The names that `among` was looked up by: requests with equal names wait in one line, whichever
    /// upstreams the names stand for by then.
    pub names: Option<&'a [String]>,
    /// There are names that no upstream serves under: the error for an unknown model must list them.
    pub has_aliases: bool,
}

/// The result of filtering the fleet for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// These entries, none of them full.
    Candidates,
    /// Those that may have it are at their `max_active`, or full by their own word: until then, at the
    /// latest, for the first of these.
    Full { until: Option<Instant> },
    /// All suitable upstreams were tried.
    Tried,
    /// The model is served, or may still be discovered, and no upstream that serves it is ready.
    NotReady,
    /// None of the allowed upstreams serves the model.
    NoSuchModel,
}

/// For this long an upstream that was never reached counts as one that may serve any model; after that
/// an unknown name is unknown. Loading the largest models takes about as long.
pub(super) const DISCOVERY_GRACE: Duration = Duration::from_secs(600);

pub struct Snapshot {
    pub entries: Vec<SnapshotEntry>,
    /// Taken out of the fleet at once, with requests in flight: those must learn when it is gone.
    departed: Vec<SnapshotEntry>,
    /// Entries that know the model, ready or not.
    by_model: HashMap<String, Vec<usize>>,
    /// Ready upstreams all serve the same names and no upstream with other names may still be discovered, so
    /// that the model does not decide where a request goes and any upstream gives the true answer for an
    /// unknown one.
    uniform: bool,
    /// Names that ready upstreams serve, in the order of the union.
    aliases: Vec<String>,
    /// Until then upstreams may be discovered by sources that have not answered yet.
    awaited: Option<Instant>,
    /// Some upstream is tripped.
    any_tripped: bool,
    /// `breaker.max_ejected`.
    max_ejected: f64,
}

// === impl Query ===

impl Query<'_> {
    /// Whether the request may go to this upstream, whatever its state.
    fn allows(&self, entry: &SnapshotEntry) -> bool {
        self.only.is_none_or(|only| only == entry.upstream.id) && entry.is_among(self.among)
    }
}

// === impl Entry ===

impl SnapshotEntry {
    /// One of which nothing is known yet.
    pub(super) fn unknown(upstream: Arc<Upstream>) -> Self {
        let rules = BreakerRules { health: Health::default(), breaker: Breaker::default() };
        let standing = Machine::new(super::now()).status(&rules);
        SnapshotEntry {
            upstream,
            status: standing,
            models: Arc::default(),
            version: None,
            incarnation: 0,
            cache_tokens: None,
            removing: false,
            calm: false,
        }
    }

    /// Whether it takes requests, by its state; it may still be full.
    pub fn is_ready(&self) -> bool {
        !self.removing && matches!(self.status.state, UpstreamState::Ready | UpstreamState::Suspect)
    }

    /// Takes no requests, and is there.
    pub(super) fn drains(&self) -> bool {
        !self.removing && self.status.state == UpstreamState::Draining && !self.status.gone
    }

    pub fn admits(&self, now: Instant) -> Admits {
        if self.removing { Admits::None } else { self.status.admits(now) }
    }

    /// As a person is told; what is being removed drains.
    pub fn state(&self) -> UpstreamState {
        if self.removing { UpstreamState::Draining } else { self.status.state }
    }

    /// The model that it serves when none is named.
    fn base(&self) -> Option<&str> {
        self.models.iter().find(|card| card.parent.is_none()).map(|card| card.id.as_str())
    }

    pub fn serves(&self, model: &str) -> bool {
        self.models.iter().any(|card| card.id == model)
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

    /// The same while upstreams may be discovered that serve any model.
    pub(super) fn awaiting(self, until: Option<Instant>) -> Self {
        Snapshot { uniform: self.uniform && until.is_none(), awaited: until, ..self }
    }

    /// The same with another `breaker.max_ejected`.
    pub(super) fn ejecting(self, max_ejected: f64) -> Self {
        Snapshot { max_ejected, ..self }
    }

    /// Whether some source has not said yet which upstreams there are.
    pub fn awaits(&self) -> bool {
        self.awaited.is_some()
    }

    pub fn any_ready(&self) -> bool {
        self.ready().next().is_some()
    }

    /// The upstreams that requests go to. Tripped ones are among them: of those that serve a model, one at
    /// the least takes requests.
    pub fn ready(&self) -> impl Iterator<Item = &SnapshotEntry> {
        self.entries.iter().filter(|entry| entry.can_serve())
    }

    /// The upstreams that can answer for what only they hold: the ready and the draining ones.
    pub fn reachable(&self) -> impl Iterator<Item = &SnapshotEntry> {
        self.entries.iter().filter(|entry| entry.can_serve() || entry.drains())
    }

    pub fn by_id(&self, id: usize) -> Option<&SnapshotEntry> {
        self.entries.iter().find(|entry| entry.upstream.id == id)
    }

    pub fn by_name(&self, name: &str) -> Option<&SnapshotEntry> {
        self.entries.iter().find(|entry| entry.upstream.name() == name)
    }

    /// Whether an upstream is known to be gone, so that nothing comes from it any more.
    pub fn is_gone(&self, id: usize) -> bool {
        self.watched(id).is_some_and(|entry| entry.status.gone)
    }

    /// As `by_id`, also for one that was taken out and is asked for as long as requests are in flight.
    pub(super) fn watched(&self, id: usize) -> Option<&SnapshotEntry> {
        self.by_id(id).or_else(|| self.departed.iter().find(|entry| entry.upstream.id == id))
    }

    /// Names for vLLM's "Valid aliases".
    pub fn aliases(&self) -> &[String] {
        &self.aliases
    }

    /// Whether the name of the model can change where a request goes.
    pub fn model_decides(&self) -> bool {
        !self.uniform
    }

    /// The base model of all ready upstreams among these, where it is known and the same.
    pub fn base_of_ready(&self, among: Option<&[usize]>) -> Option<&str> {
        let mut bases = self.ready().filter(|entry| entry.is_among(among)).map(SnapshotEntry::base);
        let first = bases.next()??;
        bases.all(|other| other == Some(first)).then_some(first)
    }

    /// Whether a request that names no model has one to take: all ready upstreams, among those that may have
    /// it, have the same base.
    pub fn serves_one_base(&self, among: Option<&[usize]>) -> bool {
        let mut bases = self.ready().filter(|entry| entry.is_among(among)).map(SnapshotEntry::base);
        let first = bases.next().flatten();
        bases.all(|other| other == first)
    }

    /// Whether a name is one that some upstream serves, so that it may label a metric.
    pub fn serves_model(&self, model: &str) -> bool {
        self.by_model.contains_key(model)
    }

    /// Fills `out` with the candidates for a request. The one place that filters: by readiness, breaker,
    /// room, and earlier attempts.
    pub fn candidates(&self, query: &Query<'_>, now: Instant, out: &mut Vec<Candidate>) -> Routing {
        out.clear();
        let Some(served) = self.serving(query) else {
            let may_come = self.may_still_come(query.among, now) || !self.any_ready_of(query.among);
            return if may_come { Routing::NotReady } else { Routing::NoSuchModel };
        };
        let floor = self.floor(served, query, now);
        let mut sieve = Sieve { query, now, floor, out, rank: Rank::Worst, full: None, tried: false };
        self.served(served).for_each(|(index, entry)| sieve.consider(index, entry));
        sieve.routing()
    }

    /// Takes a lease on one of the `candidates` of the same query. `None` when another request has taken the
    /// last place meanwhile: choose again.
    pub fn take(&self, query: &Query<'_>, index: usize, work: Work, now: Instant) -> Option<Lease> {
        let entry = &self.entries[index];
        let floor = match entry.status.state {
            UpstreamState::Tripped => {
                self.serving(query).map_or(Floor::Unneeded, |at| self.floor(at, query, now))
            }
            _ => Floor::Unneeded,
        };
        Lease::take_as(entry, floor.admits(entry, now), work, now)
    }

    /// The entries that serve the query's model, whatever their state; `None`: no entry does.
    fn serving(&self, query: &Query<'_>) -> Option<Serving<'_>> {
        let Some(model) = query.model else { return Some(Serving::All) };
        let indices = self.by_model.get(model).map(Vec::as_slice).unwrap_or_default();
        if indices.iter().any(|index| self.entries[*index].is_among(query.among)) {
            return Some(Serving::These(indices));
        }
        let decides = query.has_aliases || query.among.is_some() || self.model_decides();
        (!decides).then_some(Serving::All)
    }

    /// These entries, with their places.
    fn served<'s>(&'s self, serving: Serving<'s>) -> impl Iterator<Item = (usize, &'s SnapshotEntry)> {
        let indices = match serving {
            Serving::All => None,
            Serving::These(indices) => Some(indices),
        };
        let count = indices.map_or(self.entries.len(), <[usize]>::len);
        (0..count).map(move |at| {
            let index = indices.map_or(at, |indices| indices[at]);
            (index, &self.entries[index])
        })
    }

    /// Whether one of these may yet say that it serves any model.
    fn may_still_come(&self, among: Option<&[usize]>, now: Instant) -> bool {
        let waited = |standing: &UpstreamStatus| now.saturating_duration_since(standing.since);
        let may = |entry: &SnapshotEntry| {
            let is_new = entry.status.state == UpstreamState::Unknown && entry.is_among(among);
            is_new && waited(&entry.status) < DISCOVERY_GRACE
        };
        self.awaits_any_of(among, now) || self.entries.iter().any(may)
    }
}

/// The entries that serve a query's model.
#[derive(Clone, Copy)]
enum Serving<'s> {
    /// Its model does not matter.
    All,
    /// By their places.
    These(&'s [usize]),
}

/// The preference for an upstream. The upstreams of the best rank are candidates, the rest are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    First,
    /// Doubtful, and for a request that has failed once already: on trial.
    Second,
    /// Tried already.
    Again,
    /// Tried already, and it declined the request.
    Away,
    Worst,
}

struct Sieve<'a, 'q> {
    query: &'a Query<'q>,
    now: Instant,
    floor: Floor,
    out: &'a mut Vec<Candidate>,
    /// Of what is in `out`.
    rank: Rank,
    /// The best rank among the full upstreams, and when the first of them has room again.
    full: Option<(Rank, Option<Instant>)>,
    tried: bool,
}

impl Sieve<'_, '_> {
    fn consider(&mut self, index: usize, entry: &SnapshotEntry) {
        let (query, upstream) = (self.query, &entry.upstream);
        if !query.allows(entry) {
            return;
        }
        let mut rank = match self.floor.admits(entry, self.now) {
            // What only it can answer, such as for a response that it keeps, it answers while it drains.
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
            rank = if query.away.contains(&upstream.id) { Rank::Away } else { Rank::Again };
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
        // Others' requests are work like ours; a place is only what ours take.
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

    fn routing(self) -> Routing {
        let none = self.out.is_empty();
        match self.full {
            // Better to wait for a good place than to take a doubtful one.
            Some((Rank::First, until)) if none || self.rank == Rank::Second => {
                self.out.clear();
                Routing::Full { until }
            }
            Some((best, until)) if none || best < Rank::Away && self.rank == Rank::Away => {
                self.out.clear();
                Routing::Full { until }
            }
            _ if !none => Routing::Candidates,
            _ if self.tried => Routing::Tried,
            _ => Routing::NotReady,
        }
    }
}

#[cfg(test)]
mod tests;
