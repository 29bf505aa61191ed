//! One balancer of a replay: the real index and the real formula, over gauges as leases keep them.
//!
//! It uses what a balancer can know: its own requests, and the latest reports of its siblings. Only the
//! policy `Oracle` reads the real state of the engines.

use std::time::Duration;

use super::load::{index_chain, index_parts};
use super::policy::ReplayPolicy;
use super::scene::{Scene, ScrapedMetrics};
use crate::config::types::{Balance, Preset};
use crate::engine::dice::Dice;
use crate::pick::forecast::terms::ForecastTerms;
use crate::pick::forecast::{forecast, tokens_before};
use crate::pick::shortlist::shortlist;
use crate::pick::{Candidate, DrawSeed, jitter, pick};
use crate::state::prefix_index::{Hits, Index, PromptSize, Slot};

/// The largest number of blocks of an index.
const MAX_INDEX_BLOCKS: usize = 4_000_000;

/// The requests in flight on an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ReplayLoad {
    pub active: u64,
    pub backlog: u64,
    pub context: u64,
}

/// A request that is to be placed.
#[derive(Clone, Copy)]
pub(super) struct PlacementRequest<'a> {
    pub prompt: &'a [u64],
    pub end: Option<u64>,
    pub tokens: u64,
    pub block: usize,
}

/// The state of the engines and siblings at one moment.
pub(super) struct EngineView<'a> {
    pub now: f64,
    pub metrics: &'a [ScrapedMetrics],
    /// The gauges that siblings published, and the age of the oldest of them in seconds.
    pub others: &'a [ReplayLoad],
    pub age: f64,
    /// Sets the real state of an engine on a candidate, for policies that may see it.
    pub reveal: &'a dyn Fn(usize, &Hits, &mut Candidate),
}

/// The upstream of a request, and the estimated tokens to prefill there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub upstream: usize,
    pub uncached: u64,
    /// The tokens before the first token, its own included, and the forecast of its time.
    pub tokens: u64,
    pub forecast: Duration,
}

/// What a balancer has learnt of an upstream's first tokens.
#[derive(Clone, Copy, Debug, Default)]
struct LearntPace {
    terms: ForecastTerms,
    answers: u32,
    /// Since when the engine reads the prompt at the head of the backlog.
    head_since: f64,
}

/// One balancer of the replay, with its own index and gauges.
pub(super) struct ReplayBalancer {
    policy: ReplayPolicy,
    index: Index,
    slots: Vec<Slot>,
    own: Vec<ReplayLoad>,
    paces: Vec<LearntPace>,
    dice: Dice,
    turn: u64,
    // Reused, so that a choice allocates nothing.
    chain: Vec<u64>,
    hits: Hits,
    candidates: Vec<Candidate>,
    sent: Vec<usize>,
    costs: Vec<f64>,
}

// === impl ReplayBalancer ===

impl ReplayBalancer {
    /// Builds a balancer; `cache` is the number of the index's blocks in each upstream's cache. Returns
    /// `None` when there are more upstreams than an index has room for.
    pub(super) fn new(policy: ReplayPolicy, upstreams: usize, cache: usize, mut dice: Dice) -> Option<Self> {
        let index = Index::new(MAX_INDEX_BLOCKS, dice.roll());
        let slots: Vec<Slot> = (0..upstreams).map_while(|_| index.enter()).collect();
        slots.iter().for_each(|slot| index.limit(*slot, Some(cache)));
        (slots.len() == upstreams).then(|| ReplayBalancer {
            policy,
            index,
            slots,
            own: vec![ReplayLoad::default(); upstreams],
            paces: vec![LearntPace::default(); upstreams],
            // Round-robin balancers begin at different upstreams.
            turn: dice.roll() >> 32,
            dice,
            chain: Vec::new(),
            hits: Hits::default(),
            candidates: Vec::new(),
            sent: Vec::new(),
            costs: Vec::new(),
        })
    }

    pub(super) fn gauges(&self) -> &[ReplayLoad] {
        &self.own
    }

    /// Chooses an upstream and sends the request there.
    pub(super) fn place(&mut self, ask: PlacementRequest<'_>, view: &EngineView<'_>) -> Placed {
        let knobs = match self.policy {
            ReplayPolicy::Preset(preset) => preset.balance(),
            ReplayPolicy::Oracle | ReplayPolicy::Rival(_) => Preset::Work.balance(),
        };
        self.fill_candidates(ask, view, &knobs);
        let upstream = match self.policy {
            ReplayPolicy::Rival(rival) => {
                self.sent.clear();
                let parts = index_parts(ask.block);
                self.sent.extend(self.slots.iter().map(|slot| self.index.held(*slot) / parts));
                let (prompt, candidates) = (ask.prompt, &self.candidates[..]);
                let (sent, metrics) = (&self.sent[..], view.metrics);
                let (tokens, block) = (ask.tokens, ask.block);
                rival.costs(&Scene { prompt, tokens, block, candidates, sent, metrics }, &mut self.costs);
                self.least()
            }
            ReplayPolicy::Preset(_) | ReplayPolicy::Oracle => {
                self.turn += 1;
                let jitter = jitter(view.age);
                let prompt = ask.end.or(self.chain.last().copied());
                let seed = DrawSeed::for_prompt(prompt, self.dice.roll(), self.turn, jitter);
                shortlist(&mut self.candidates, &knobs, seed, None);
                pick(&self.candidates, &knobs, seed).map_or(0, |choice| choice.index)
            }
        };
        let chosen = self.candidates.iter().find(|candidate| candidate.index == upstream);
        let uncached = chosen.map_or(ask.tokens, |chosen| chosen.uncached);
        let tokens = chosen.map_or(ask.tokens, tokens_before);
        let forecast = chosen.map_or(Duration::ZERO, forecast);
        self.learn(ask, upstream);
        let gauges = &mut self.own[upstream];
        if gauges.backlog == 0 {
            self.paces[upstream].head_since = view.now;
        }
        gauges.active += 1;
        gauges.context += ask.tokens;
        gauges.backlog += uncached;
        Placed { upstream, uncached, tokens, forecast }
    }

    /// Learns a request that this balancer or a sibling sent to an upstream.
    pub(super) fn learn(&mut self, ask: PlacementRequest<'_>, upstream: usize) {
        index_chain(ask.prompt, index_parts(ask.block), &mut self.chain);
        self.index.learn(&self.chain, ask.end, self.slots[upstream]);
    }

    /// Records the first byte of an answer, which came at `now`, so long after the choice.
    pub(super) fn first_byte(&mut self, placed: Placed, now: f64, time: Duration) {
        self.own[placed.upstream].backlog -= placed.uncached;
        let pace = &mut self.paces[placed.upstream];
        pace.terms = pace.terms.corrected(placed.tokens, time, pace.answers);
        pace.answers += 1;
        pace.head_since = now;
    }

    /// Records that an engine refused a request.
    pub(super) fn refused(&mut self, placed: Placed, tokens: u64) {
        self.own[placed.upstream].backlog -= placed.uncached;
        self.ended(placed, tokens);
    }

    /// Records the end of an answer.
    pub(super) fn ended(&mut self, placed: Placed, tokens: u64) {
        let gauges = &mut self.own[placed.upstream];
        gauges.active -= 1;
        gauges.context -= tokens;
    }

    /// Fills the candidates for a request.
    fn fill_candidates(&mut self, ask: PlacementRequest<'_>, view: &EngineView<'_>, knobs: &Balance) {
        let parts = index_parts(ask.block);
        index_chain(ask.prompt, parts, &mut self.chain);
        self.index.lookup(&self.chain, &mut self.hits);
        self.hits.charge(knobs.share, self.slots.len());
        self.candidates.clear();
        let block_tokens = ask.block as f64 / parts as f64;
        let terms = self.hits.terms(PromptSize { tokens: ask.tokens, block_tokens });
        for (index, slot) in self.slots.iter().enumerate() {
            let own = self.own[index];
            let all = own.and(view.others[index]);
            let LearntPace { terms: pace, head_since, .. } = self.paces[index];
            let mut candidate = Candidate {
                index,
                backlog: all.backlog,
                missing: 0,
                active: all.active,
                context: all.context,
                weight: 1.0,
                session_penalty: 0,
                cold: 0,
                hit: 0,
                uncached: 0,
                own_backlog: own.backlog,
                head_millis: ((view.now - head_since) * 1e3) as u32,
                terms: pace,
            };
            self.hits.weigh(Some(*slot), &terms, &mut candidate);
            if self.policy == ReplayPolicy::Oracle {
                (view.reveal)(index, &self.hits, &mut candidate);
                // What is left of it.
                candidate.own_backlog = 0;
            } else {
                // Rivals count in the blocks of the load.
                candidate.hit /= parts as u64;
            }
            self.candidates.push(candidate);
        }
    }

    /// Returns one of the upstreams with the least cost, at random.
    fn least(&mut self) -> usize {
        let least = self.costs.iter().copied().fold(f64::MAX, f64::min);
        let equals = || (0..self.costs.len()).filter(|at| self.costs[*at] <= least);
        let count = equals().count().max(1);
        let at = self.dice.between(0, count - 1);
        equals().nth(at).unwrap_or(0)
    }
}

// === impl ReplayLoad ===

impl ReplayLoad {
    /// The sum of two loads.
    pub(super) fn and(self, other: ReplayLoad) -> ReplayLoad {
        ReplayLoad {
            active: self.active + other.active,
            backlog: self.backlog + other.backlog,
            context: self.context + other.context,
        }
    }
}
