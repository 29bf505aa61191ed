//! The filter of candidates: by readiness, breaker, room, and earlier attempts. The one place that filters.
//!
//! With a thousand upstreams, what a choice costs is the memory that it reads. So the numbers that decide for
//! nearly all upstreams lie side by side in rows, and the sets by which a request excludes upstreams, its
//! model and its route, are intersected 64 upstreams at a time.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::floor::EjectionFloor;
use super::{FilterResult, Snapshot, SnapshotEntry, UpstreamQuery};
use crate::fleet::breaker::Admits;
use crate::fleet::millis;
use crate::fleet::upstream::Live;
use crate::pick::Candidate;
use crate::route::upstreams::PlaceSet;

/// The parts of an entry that the filter reads for every request.
pub(super) struct FilterRow {
    id: usize,
    live: Arc<Live>,
    weight: f64,
    /// The largest number for an upstream without a limit.
    max_active: u64,
    /// The time at which the upstream has its full weight, by `fleet::millis`.
    warm_at: u64,
    /// The upstream admits all requests at any time.
    is_steady: bool,
}

/// The entries that suit a query by its model, its route and its only upstream, in any state.
pub(super) struct SuitableEntries<'s> {
    /// The entries that serve the model.
    pub serving: &'s PlaceSet,
    /// The entries of the route; `None`: all.
    pub route: Option<Cow<'s, PlaceSet>>,
    /// The place of the only entry; `None`: any.
    pub only: Option<usize>,
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
pub(super) struct CandidateFilter<'a, 'q> {
    snapshot: &'a Snapshot,
    query: &'a UpstreamQuery<'q>,
    now: Instant,
    /// `now`, by `fleet::millis`.
    millis: u64,
    floor: EjectionFloor,
    out: &'a mut Vec<Candidate>,
    /// The rank of the candidates in `out`.
    rank: Rank,
    /// The best rank among the full upstreams, and the time at which the first of them has room again.
    full: Option<(Rank, Option<Instant>)>,
    /// Some suitable upstream was tried already.
    tried: bool,
}

// === impl FilterRow ===

impl FilterRow {
    /// Builds the row of an entry.
    pub(super) fn of(entry: &SnapshotEntry) -> Self {
        let (upstream, status) = (&entry.upstream, &entry.status);
        FilterRow {
            id: upstream.id,
            live: upstream.live.clone(),
            weight: upstream.config.weight,
            max_active: upstream.config.max_active.map_or(u64::MAX, u64::from),
            // A millisecond more, since it is rounded down.
            warm_at: status.warm_at().map_or(0, |at| millis(at) + 1),
            is_steady: entry.is_steady(),
        }
    }

    pub(super) fn id(&self) -> usize {
        self.id
    }
}

// === impl SuitableEntries ===

impl SuitableEntries<'_> {
    /// Returns the entries of one word.
    fn word(&self, word: usize) -> u64 {
        let route = self.route.as_ref().map_or(u64::MAX, |route| route.word(word));
        self.serving.word(word) & route
    }

    /// Returns the places of the entries that are also in `set`, in ascending order.
    pub(super) fn places_in<'a>(&'a self, set: &'a PlaceSet) -> impl Iterator<Item = usize> + 'a {
        let words = 0..set.words().min(self.serving.words());
        let places = words.flat_map(|word| PlaceSet::places_in(word, self.word(word) & set.word(word)));
        places.filter(|place| self.only.is_none_or(|only| only == *place))
    }

    /// Returns the number of the entries that are also in `set`.
    pub(super) fn count_in(&self, set: &PlaceSet) -> usize {
        match self.only {
            Some(only) => usize::from(set.contains(only) && self.contains(only)),
            None => {
                (0..set.words()).map(|word| (self.word(word) & set.word(word)).count_ones() as usize).sum()
            }
        }
    }

    fn contains(&self, place: usize) -> bool {
        self.serving.contains(place) && self.route.as_ref().is_none_or(|route| route.contains(place))
    }

    /// Calls `visit` with the places of all entries, in ascending order.
    fn each(&self, mut visit: impl FnMut(usize)) {
        match self.only {
            Some(only) if self.contains(only) => visit(only),
            Some(_) => {}
            None => (0..self.serving.words())
                .for_each(|word| PlaceSet::places_in(word, self.word(word)).for_each(&mut visit)),
        }
    }
}

// === impl CandidateFilter ===

impl<'a, 'q> CandidateFilter<'a, 'q> {
    pub(super) fn new(
        snapshot: &'a Snapshot,
        query: &'a UpstreamQuery<'q>,
        now: Instant,
        floor: EjectionFloor,
        out: &'a mut Vec<Candidate>,
    ) -> Self {
        let (millis, rank) = (millis(now), Rank::Worst);
        CandidateFilter { snapshot, query, now, millis, floor, out, rank, full: None, tried: false }
    }

    /// Fills `out` with the candidates among these entries.
    pub(super) fn run(mut self, suitable: &SuitableEntries<'_>) -> FilterResult {
        suitable.each(|place| self.consider(place));
        self.result()
    }

    fn consider(&mut self, index: usize) {
        let (snapshot, query) = (self.snapshot, self.query);
        let row = &snapshot.rows[index];
        let mut rank = if row.is_steady { Rank::First } else { self.rank_of(&snapshot.entries[index]) };
        if rank == Rank::Worst {
            return;
        }
        if query.tried.contains(&row.id) {
            self.tried = true;
            if !query.again {
                return;
            }
            rank = if query.declined.contains(&row.id) { Rank::Declined } else { Rank::Tried };
        }
        let load = row.live.load_at(self.millis);
        let busy = row.live.busy_until(self.millis);
        if (busy.is_some() || load.active >= row.max_active) && !query.even_full {
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
        let (siblings, foreign) = (row.live.siblings.read(), row.live.engine_load.foreign(self.millis));
        let sum =
            |own: u64, siblings: u64, foreign: u64| own.saturating_add(siblings).saturating_add(foreign);
        let active = sum(load.active, siblings.active, foreign.requests);
        let weight = match self.millis < row.warm_at {
            true => row.weight * snapshot.entries[index].status.weight_share(active, self.now),
            false => row.weight,
        };
        self.out.push(Candidate {
            index,
            backlog: sum(load.backlog, siblings.backlog, foreign.tokens),
            missing: query.tokens,
            active,
            context: sum(load.context, siblings.context, foreign.tokens),
            weight,
            session_penalty: 0,
            cold: query.tokens,
            hit: 0,
            uncached: query.tokens,
            own_backlog: load.backlog,
            head_millis: row.live.forecast.head_millis(self.millis),
            terms: row.live.forecast.terms(),
        });
    }

    /// Returns the rank by the upstream's state; `Worst`: it takes no request.
    fn rank_of(&self, entry: &SnapshotEntry) -> Rank {
        match self.floor.admits(entry, self.now) {
            // A drained upstream still answers requests that only it can answer, such as for a stored
            // response.
            Admits::None if self.query.only.is_some() && entry.drains() => Rank::First,
            Admits::None => Rank::Worst,
            Admits::One if entry.upstream.live.trial.load(Relaxed) => Rank::Worst,
            Admits::One if self.query.tried.is_empty() => Rank::First,
            Admits::One | Admits::Last => Rank::Second,
            Admits::All => Rank::First,
        }
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
