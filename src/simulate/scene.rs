//! The facts for a choice: those that a balancer has, and those that only a simulation has.

use super::load::index_parts;
use crate::engine::batch::SimulatedEngine;
use crate::pick::Candidate;
use crate::state::prefix_index::Hits;

/// One request to place.
pub struct Scene<'a> {
    /// The blocks and tokens of its prompt, and the tokens of a block.
    pub prompt: &'a [u64],
    pub tokens: u64,
    pub block: usize,
    pub candidates: &'a [Candidate],
    /// The blocks that each upstream was sent and is believed to hold.
    pub sent: &'a [usize],
    /// The latest metrics of each upstream.
    pub metrics: &'a [ScrapedMetrics],
}

/// The metrics of one engine at the last scrape.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScrapedMetrics {
    pub waiting: usize,
    /// The share of the cache in use.
    pub usage: f64,
}

/// A prompt before or during its prefill.
pub(super) struct PendingPrefill<'a> {
    pub prompt: &'a [u64],
    pub tokens: usize,
    /// The tokens left, once the prefill has started.
    pub left: Option<usize>,
}

// === impl Scene ===

impl Scene<'_> {
    /// Returns the share of the prompt that an upstream is believed to hold, 0 to 1.
    pub fn share_held(&self, at: usize) -> f64 {
        self.candidates[at].hit as f64 * self.block as f64 / self.tokens.max(1) as f64
    }
}

// === the real state of an engine ===

/// Replaces a candidate's estimates by the real cache and the real backlog of its engine. Blocks that an
/// earlier request is about to compute count as held.
pub(super) fn reveal(
    engine: &SimulatedEngine,
    pending: &[PendingPrefill<'_>],
    prompt: &[u64],
    hits: &Hits,
    candidate: &mut Candidate,
) {
    let block = engine.limits().block_size;
    let held = |chain: &[u64], before: &[PendingPrefill<'_>]| {
        let coming = before.iter().map(|other| common(chain, other.prompt)).max().unwrap_or(0);
        engine.held(chain).max(coming)
    };
    let left = |at: usize| {
        let one = &pending[at];
        one.left.unwrap_or_else(|| one.tokens - held(one.prompt, &pending[..at]) * block)
    };
    candidate.backlog = (0..pending.len()).map(left).sum::<usize>() as u64;
    let held = held(prompt, pending);
    let (tokens, parts) = (|blocks: f64| (blocks * block as f64).round() as u64, index_parts(block) as f64);
    candidate.uncached =
        (candidate.uncached + tokens(candidate.hit as f64 / parts)).saturating_sub(tokens(held as f64));
    let charged = hits.charged(held * parts as usize) / parts;
    candidate.missing = candidate.cold.saturating_sub(tokens(charged));
    candidate.hit = held as u64;
}

/// Returns the number of leading blocks that two chains share; a block's hash covers all before it.
fn common(one: &[u64], other: &[u64]) -> usize {
    let (mut low, mut high) = (0, one.len().min(other.len()));
    while low < high {
        let middle = (low + high).div_ceil(2);
        if one[middle - 1] == other[middle - 1] { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::batch::{EngineLimits, EngineRequest, Finish, Timing};
    use crate::pick::forecast::terms::ForecastTerms;

    #[test]
    fn counts_the_shared_leading_blocks_of_two_chains() {
        let chain: Vec<u64> = (1..20).collect();
        for length in 0..19 {
            let mut other = chain.clone();
            (length..19).for_each(|place| other[place] += 100);
            assert_eq!(common(&chain, &other), length);
            assert_eq!(common(&chain, &chain[..length]), length);
        }
    }

    #[test]
    fn reveals_the_real_cache_and_backlog_of_an_engine() {
        let limits =
            EngineLimits { block_size: 10, cache_tokens: 1000, step_tokens: 40, ..EngineLimits::default() };
        let mut engine = SimulatedEngine::new(limits, Timing::instant());
        let chain: Vec<u64> = (1..=10).collect();
        let request = |id| EngineRequest {
            id,
            prompt_tokens: 100,
            output_tokens: 5,
            chain: chain.clone(),
            finish: Finish::Stop,
            use_cache: true,
        };
        engine.submit(0.0, request(0)).expect("there is room");
        engine.submit(0.0, request(1)).expect("there is room");
        let blank = Candidate {
            index: 0,
            backlog: 9999,
            missing: 80,
            active: 0,
            context: 0,
            weight: 1.0,
            session_penalty: 0,
            cold: 100,
            hit: 2,
            uncached: 80,
            own_backlog: 0,
            head_millis: 0,
            terms: ForecastTerms::default(),
        };
        let seen = |engine: &SimulatedEngine, prompt: &[u64]| {
            let pending = |(_, left)| PendingPrefill { prompt: &chain, tokens: 100, left };
            let pending: Vec<PendingPrefill<'_>> = engine.prefills().map(pending).collect();
            let mut candidate = blank;
            reveal(engine, &pending, prompt, &Hits::default(), &mut candidate);
            (candidate.backlog, candidate.hit, candidate.uncached, candidate.missing)
        };
        // The first is in its first step, and the second will find all of it.
        assert_eq!(seen(&engine, &chain), (100, 10, 0, 0));
        assert_eq!(seen(&engine, &[1, 2, 3, 77]), (100, 3, 70, 70));
        while let Some(next) = engine.next_event_time() {
            engine.advance(next);
        }
        assert_eq!(seen(&engine, &chain), (0, 10, 0, 0));
        assert_eq!(seen(&engine, &[78]), (0, 0, 100, 100));
    }
}
