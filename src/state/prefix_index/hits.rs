//! The result of a lookup: how many leading blocks of a chain each upstream holds, and the cost of the
//! missing rest.
//!
//! ```text
//! missing(u) = sum over the blocks b that u does not hold of min(1, share * n / branches(b), spare(b))
//!
//! spare(b)   = max(holders(b) + 1 - needed(b), doubt(b))
//! needed(b)  = n * (branches(b) - 1) / (conversations - 1) * 2 / share
//! doubt(b)   = 1 / 2^(branches(b) - 2) * share / 2
//! ```
//!
//! in blocks, with `n` candidates. A block without holders costs 1, and so does a block of a single
//! conversation. Adjacent blocks mostly have equal branches and holders, so the sums are kept by run, and
//! the cost of an upstream is one subtraction.
//!
//! # Why a shared block costs less
//!
//! A block prefilled once on u serves all later conversations through the block that u gets. Their number is
//! unknown; two estimates of it exist, and the larger one counts.
//!
//! - By history: as many conversations again as were seen, `branches / n` of them on each upstream. This
//!   estimate needs hundreds of conversations; until then a long prompt attracts too much traffic: of a
//!   hundred new conversations with one system prompt, at three a second, 67 went to the one warm upstream
//!   of 16, and at ten a second the mean time to the first token was 0.7 s instead of 0.3 s.
//! - By share: `(branches - 1) / (conversations - 1)` of all known conversations go through the block, not
//!   counting the one at hand, which is no evidence of others. That share of the traffic needs the same
//!   share of the upstreams. While fewer than `needed` upstreams hold the block, another copy will be made
//!   soon anyway, and costs this conversation nothing. Any copy beyond that is spare and costs 1 by this
//!   estimate. So a system prompt of all conversations is recognised within a few of them, each of two such
//!   prompts gets half of the upstreams, and a document of twenty among thousands of other conversations
//!   gets one.
//!
//! The second estimate errs when few conversations are known: a single client that edits a prompt adds a
//! branch each time, and all branches share the part before the edit. Therefore `doubt`, which every further
//! conversation halves. Some doubt always remains, so that a warm upstream is preferred while all are idle.
//! Conversations are counted for each group of upstreams, one for each model: another model's conversations
//! would make the share too small.
//!
//! # Blocks between stored ones
//!
//! The index stores one of eight blocks of a long chain. The blocks between two stored ones have the holders
//! and branches of the second. An upstream that holds the first and not the second, or the last one of the
//! prompt, is believed to hold some blocks more: see `thinning::expected_beyond`.

use super::Slot;
use crate::pick::Candidate;
use crate::prompt::chain::thinning::expected_beyond;

/// The result of a lookup; reused for every request, so that a lookup allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Hits {
    /// The number of blocks in the chain.
    length: usize,
    /// The number of leading blocks with a holder.
    known: usize,
    /// The held blocks by slot.
    held: Vec<HeldBlocks>,
    runs: Vec<BlockRun>,
    /// The number of conversations in the group of the chain.
    conversations: u32,
    /// The cost of all blocks for an upstream that holds none.
    whole: f64,
    /// The columns that hold all blocks so far, word by word.
    pub(super) leading: Vec<u64>,
}

/// The size of a prompt in tokens, the unit of the cost formula.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PromptSize {
    /// The tokens of the whole prompt, including the part behind the last block.
    pub tokens: u64,
    /// The tokens of a block.
    pub block_tokens: f64,
}

/// The terms of a prompt for all candidates, as far as they do not depend on what each of them holds.
#[derive(Clone, Copy, Debug)]
pub struct PromptTerms {
    block_tokens: f64,
    /// The tokens behind the last block, which are missing everywhere.
    rest: u64,
    /// `missing` and `uncached` of a candidate that holds nothing.
    cold: u64,
    uncached: u64,
}

/// The leading blocks that an upstream holds.
#[derive(Clone, Copy, Debug, Default)]
struct HeldBlocks {
    /// Up to the last stored one.
    blocks: u32,
    /// The run of the last one.
    run: u32,
    /// The blocks behind it that the upstream is believed to hold.
    beyond: u32,
}

/// Adjacent blocks with equal branches and holders.
#[derive(Clone, Copy, Debug)]
struct BlockRun {
    from: u32,
    branches: u32,
    holders: u32,
    /// The cost of each block of the run.
    each: f64,
    /// The cost of all blocks before the run.
    before: f64,
}

impl Hits {
    /// Returns the number of blocks in the chain.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Returns the number of leading blocks with a holder.
    pub fn known(&self) -> usize {
        self.known
    }

    /// Returns the number of leading blocks that this upstream is believed to hold.
    pub fn held(&self, slot: Slot) -> usize {
        self.held.get(slot.number()).map_or(0, |held| (held.blocks + held.beyond) as usize)
    }

    /// Returns the number of conversations through a block of the chain; 0 when no upstream holds the block.
    pub fn branches(&self, block: usize) -> u32 {
        let after = self.runs.partition_point(|run| run.from as usize <= block);
        if block < self.known { self.runs[..after].last().map_or(0, |run| run.branches) } else { 0 }
    }

    /// Computes the costs of shared blocks; `share` is the knob, `candidates` the number of candidates.
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

    /// Returns the cost of all blocks for an upstream that holds none.
    pub fn whole(&self) -> f64 {
        self.whole
    }

    /// Returns the cost of the blocks that this upstream lacks, after `charge`.
    pub fn missing(&self, slot: Slot) -> f64 {
        let held = self.held.get(slot.number()).copied().unwrap_or_default();
        // The blocks beyond are shared as the last one is: a guess must not draw more than what is known.
        let paid = |run: &BlockRun| run.until(held.blocks) + f64::from(held.beyond) * run.each;
        self.whole - self.runs.get(held.run as usize).map_or(0.0, paid)
    }

    /// Returns the cost of `blocks` leading blocks together, held or not.
    pub fn charged(&self, blocks: usize) -> f64 {
        let known = blocks.min(self.known);
        let after = self.runs.partition_point(|run| (run.from as usize) < known);
        let within = self.runs[..after].last().map_or(0.0, |run| run.until(known as u32));
        within + (blocks - known) as f64
    }

    /// Returns the terms of the prompt that was looked up, after `charge`.
    pub fn terms(&self, prompt: PromptSize) -> PromptTerms {
        let block_tokens = prompt.block_tokens;
        let whole = tokens(self.length as f64, block_tokens);
        let rest = prompt.tokens.saturating_sub(whole);
        PromptTerms {
            block_tokens,
            rest,
            cold: tokens(self.whole, block_tokens) + rest,
            uncached: whole + rest,
        }
    }

    /// Sets on a candidate how much of the prompt it holds and lacks.
    pub fn weigh(&self, slot: Option<Slot>, terms: &PromptTerms, candidate: &mut Candidate) {
        candidate.cold = terms.cold;
        let Some((slot, held)) = slot.map(|slot| (slot, self.held(slot))).filter(|(_, held)| *held > 0)
        else {
            (candidate.hit, candidate.uncached, candidate.missing) = (0, terms.uncached, terms.cold);
            return;
        };
        candidate.hit = held as u64;
        candidate.uncached = tokens((self.length - held) as f64, terms.block_tokens) + terms.rest;
        candidate.missing = tokens(self.missing(slot), terms.block_tokens) + terms.rest;
    }

    /// Returns the capacities of the buffers.
    #[cfg(test)]
    pub(super) fn capacities(&self) -> (usize, usize, usize) {
        (self.held.capacity(), self.runs.capacity(), self.leading.capacity())
    }

    /// Starts the result of another lookup.
    pub(super) fn begin(&mut self, length: usize, slots: usize) {
        self.conversations = 0;
        (self.length, self.known, self.whole) = (length, 0, length as f64);
        self.runs.clear();
        self.held.clear();
        self.held.resize(slots, HeldBlocks::default());
    }

    /// Sets the number of conversations in the group of the chain.
    pub(super) fn set_conversations(&mut self, conversations: u32) {
        self.conversations = conversations;
    }

    /// Adds the blocks up to the next stored one, with its branches and its number of holders.
    pub(super) fn add_blocks(&mut self, depth: usize, branches: u32, holders: u32) {
        if self.runs.last().is_none_or(|run| (run.branches, run.holders) != (branches, holders)) {
            let from = self.known as u32;
            self.runs.push(BlockRun { from, branches, holders, each: 1.0, before: f64::from(from) });
        }
        self.known = depth;
    }

    /// Records that this upstream holds the stored blocks so far, and no more.
    pub(super) fn end_hit(&mut self, slot: usize) {
        let beyond = expected_beyond(self.known, self.length - self.known) as u32;
        let run = (self.runs.len() as u32).saturating_sub(1);
        let held = HeldBlocks { blocks: self.known as u32, run, beyond };
        if let Some(place) = self.held.get_mut(slot) {
            *place = held;
        }
    }
}

/// Returns the tokens of so many blocks.
fn tokens(blocks: f64, block_tokens: f64) -> u64 {
    (blocks * block_tokens).round() as u64
}

impl BlockRun {
    /// Returns the cost of all blocks before `block`, which is in the run or its end.
    fn until(&self, block: u32) -> f64 {
        self.before + f64::from(block.saturating_sub(self.from)) * self.each
    }
}
