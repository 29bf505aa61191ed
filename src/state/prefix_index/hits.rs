//! What a lookup found: how far each upstream holds a chain, and what it costs not to hold the rest.
//!
//! ```text
//! missing(u) = sum over the blocks b that u does not hold of min(1, share * n / branches(b), spare(b))
//!
//! spare(b)   = max(holders(b) + 1 - needed(b), doubt(b))
//! needed(b)  = n * (branches(b) - 1) / (conversations - 1) * 2 / share
//! doubt(b)   = 1 / 2^(branches(b) - 2) * share / 2
//! ```
//!
//! with `n` candidates, in blocks. A block without holders counts whole, and one that a single conversation
//! goes through always does. Blocks next to each other mostly have the same branches and as many holders, so
//! the sums are kept by run, and an upstream's is one subtraction.
//!
//! # Why a shared block costs less
//!
//! A copy prefilled once on u serves all conversations through it that u will get. Their number is unknown;
//! there are two signs of it, and the larger one counts.
//!
//! - What was, will be: as many conversations again as were seen, `branches / n` of them on each upstream.
//!   This needs hundreds of conversations before it is significant, and until then a long prompt has a
//!   gravity: of a hundred new conversations with one system prompt, three a second, 67 went to the one of 16
//!   upstreams that was warm, and at ten a second the mean time to the first token was 0.7 s, not 0.3.
//! - The share of all: through a block goes a part of all conversations that are known,
//!   `(branches - 1) / (conversations - 1)`, without the one at hand as it is no sign of others.
//!   That part of the traffic needs as large a part of the upstreams. As long as fewer than `needed` hold
//!   the block, another copy will be made anyway, now or in a moment: it costs this conversation nothing.
//!   A copy beyond that is spare, and costs whole by this sign. So a system prompt of all is recognised
//!   within a few conversations, each of two such prompts gets half of the upstreams, and a document that
//!   twenty ask for among thousands of other conversations gets its one.
//!
//! The second sign errs where few conversations are known: a single user who edits a prompt makes a branch
//! each time, and all of them go through what stands before it. So there is a doubt, which every further
//! conversation halves, as it would have gone another way as well; and as there is always some doubt left, a
//! warm upstream is preferred as long as all are idle. With several models in one index the part is too
//! small by the others', and the first sign decides.

use super::Slot;
use crate::pick::Candidate;

/// Made once and filled again for every request, so that a lookup allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Hits {
    /// Blocks of the chain.
    length: usize,
    /// The number of leading blocks with a holder.
    known: usize,
    /// By slot.
    held: Vec<Held>,
    runs: Vec<Run>,
    /// Conversations that the whole index knows.
    conversations: u32,
    /// The cost of all blocks for an upstream that holds none.
    whole: f64,
    /// The holders of all blocks so far, word by word.
    pub(super) leading: Vec<u64>,
}

/// A prompt as tokens, which is what the formula counts in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prompt {
    /// All of it, also what is in no block.
    pub tokens: u64,
    /// Of a block.
    pub block_tokens: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Held {
    blocks: u32,
    /// The run in which they end.
    run: u32,
}

/// Blocks in a row with the same branches and as many holders.
#[derive(Clone, Copy, Debug)]
struct Run {
    from: u32,
    branches: u32,
    holders: u32,
    /// What each of them costs, and all blocks before them together.
    each: f64,
    before: f64,
}

impl Hits {
    /// Blocks of the chain that was looked up.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The number of leading blocks with a holder.
    pub fn known(&self) -> usize {
        self.known
    }

    /// Leading blocks that this upstream is believed to hold.
    pub fn held(&self, slot: Slot) -> usize {
        self.held.get(slot.number()).map_or(0, |held| held.blocks as usize)
    }

    /// The number of conversations that were seen through a block of the chain; 0 when no upstream holds it.
    pub fn branches(&self, block: usize) -> u32 {
        let after = self.runs.partition_point(|run| run.from as usize <= block);
        if block < self.known { self.runs[..after].last().map_or(0, |run| run.branches) } else { 0 }
    }

    /// Says what shared blocks cost, for `missing`: `share` is the knob, `candidates` their number.
    pub fn charge(&mut self, share: f64, candidates: usize) {
        let candidates = candidates as f64;
        let others = f64::from(self.conversations.max(2) - 1);
        let mut sum = 0.0;
        for at in 0..self.runs.len() {
            let end = self.runs.get(at + 1).map_or(self.known as u32, |next| next.from);
            let run = &mut self.runs[at];
            run.before = sum;
            let branches = f64::from(run.branches.max(1));
            let needed = candidates * (branches - 1.0) / others * 2.0 / share;
            let doubt = 0.5f64.powf(branches - 2.0) * share / 2.0;
            let spare = (f64::from(run.holders + 1) - needed).max(doubt);
            run.each = (share * candidates / branches).min(spare).min(1.0);
            sum = run.until(end);
        }
        self.whole = sum + (self.length - self.known) as f64;
    }

    /// What an upstream without any of the blocks would have to prefill, charged in the same way.
    pub fn whole(&self) -> f64 {
        self.whole
    }

    /// What this upstream would have to prefill, in blocks, shared ones charged as `charge` was told.
    pub fn missing(&self, slot: Slot) -> f64 {
        let held = self.held.get(slot.number()).copied().unwrap_or_default();
        let paid = self.runs.get(held.run as usize).map_or(0.0, |run| run.until(held.blocks));
        self.whole - paid
    }

    /// What so many leading blocks cost together, held or not.
    pub fn charged(&self, blocks: usize) -> f64 {
        let known = blocks.min(self.known);
        let after = self.runs.partition_point(|run| (run.from as usize) < known);
        let within = self.runs[..after].last().map_or(0.0, |run| run.until(known as u32));
        within + (blocks - known) as f64
    }

    /// Puts on a candidate what it holds of the prompt and what it lacks, after `charge`. What is in no
    /// block is missing everywhere.
    pub fn weigh(&self, slot: Option<Slot>, prompt: Prompt, candidate: &mut Candidate) {
        let held = slot.map_or(0, |slot| self.held(slot));
        let tokens = |blocks: f64| (blocks * prompt.block_tokens).round() as u64;
        let rest = prompt.tokens.saturating_sub(tokens(self.length as f64));
        candidate.hit = held as u64;
        candidate.uncached = tokens((self.length - held) as f64) + rest;
        candidate.cold = tokens(self.whole) + rest;
        candidate.missing = slot.map_or(candidate.cold, |slot| tokens(self.missing(slot)) + rest);
    }

    /// Room that it has without allocating.
    #[cfg(test)]
    pub(super) fn room(&self) -> (usize, usize, usize) {
        (self.held.capacity(), self.runs.capacity(), self.leading.capacity())
    }

    pub(super) fn begin(&mut self, length: usize, slots: usize, conversations: u32) {
        self.conversations = conversations;
        (self.length, self.known, self.whole) = (length, 0, length as f64);
        self.runs.clear();
        self.held.clear();
        self.held.resize(slots, Held::default());
    }

    /// The next block is held by so many.
    pub(super) fn saw(&mut self, branches: u32, holders: u32) {
        if self.runs.last().is_none_or(|run| (run.branches, run.holders) != (branches, holders)) {
            let from = self.known as u32;
            self.runs.push(Run { from, branches, holders, each: 1.0, before: f64::from(from) });
        }
        self.known += 1;
    }

    /// This upstream holds what was seen so far, and no more.
    pub(super) fn ends(&mut self, slot: usize) {
        let held = Held { blocks: self.known as u32, run: (self.runs.len() as u32).saturating_sub(1) };
        if let Some(place) = self.held.get_mut(slot) {
            *place = held;
        }
    }
}

impl Run {
    /// What the blocks cost up to this one of the run, or to its end.
    fn until(&self, block: u32) -> f64 {
        self.before + f64::from(block.saturating_sub(self.from)) * self.each
    }
}
