//! What a balancer sees when it chooses, and what only a simulation can see.

use crate::pick::Candidate;
use crate::sim::engine::Engine;
use crate::state::local::Hits;

/// One request to place.
pub struct Scene<'a> {
    /// The blocks and tokens of its prompt, and the tokens of a block.
    pub prompt: &'a [u64],
    pub tokens: u64,
    pub block: usize,
    pub candidates: &'a [Candidate],
    /// Blocks that each upstream was sent and is believed to hold.
    pub sent: &'a [usize],
    /// What each upstream told of itself when it was last asked.
    pub metrics: &'a [Metrics],
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Metrics {
    pub waiting: usize,
    /// Share of the cache in use.
    pub usage: f64,
}

/// A prompt that waits for its prefill, or is in the middle of it.
pub struct Pending<'a> {
    pub prompt: &'a [u64],
    pub tokens: usize,
    /// What is left of it, once it has begun.
    pub left: Option<usize>,
}

// === impl Scene ===

impl Scene<'_> {
    /// How much of the prompt an upstream is believed to hold, 0 to 1.
    pub fn share_held(&self, at: usize) -> f64 {
        self.candidates[at].hit as f64 * self.block as f64 / self.tokens.max(1) as f64
    }
}

// === the truth ===

/// Lays over a candidate what its engine really holds of the prompt and really has to prefill, in place of
/// what is believed. What a request before it is about to compute counts as held, since it will be.
pub fn reveal(
    engine: &Engine,
    pending: &[Pending<'_>],
    prompt: &[u64],
    hits: &Hits,
    candidate: &mut Candidate,
) {
    let block = engine.limits().block_size;
    let held = |chain: &[u64], before: &[Pending<'_>]| {
        let coming = before.iter().map(|other| common(chain, other.prompt)).max().unwrap_or(0);
        engine.held(chain).max(coming)
    };
    let left = |at: usize| {
        let one = &pending[at];
        one.left.unwrap_or_else(|| one.tokens - held(one.prompt, &pending[..at]) * block)
    };
    candidate.backlog = (0..pending.len()).map(left).sum::<usize>() as u64;
    let held = held(prompt, pending);
    let tokens = |blocks: f64| (blocks * block as f64).round() as u64;
    candidate.uncached =
        (candidate.uncached + tokens(candidate.hit as f64)).saturating_sub(tokens(held as f64));
    candidate.missing = candidate.cold.saturating_sub(tokens(hits.charged(held)));
    candidate.hit = held as u64;
}

/// Leading blocks that two chains have in common; a block names all before it.
fn common(one: &[u64], other: &[u64]) -> usize {
    let (mut low, mut high) = (0, one.len().min(other.len()));
    while low < high {
        let middle = (low + high).div_ceil(2);
        if one[middle - 1] == other[middle - 1] { low = middle } else { high = middle - 1 }
    }
    low
}
