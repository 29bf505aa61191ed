//! The load of a replay: conversations, each a sequence of requests that continue one another.

use crate::engine::dice::mix;
use crate::prompt::chain::thinning::last_stored;

/// The tokens of a block of the index, about: 512 bytes.
const INDEX_BLOCK_TOKENS: usize = 128;

/// All conversations of a replay, in any order.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// The tokens of a block.
    pub block: usize,
    pub sessions: Vec<ReplayConversation>,
}

/// A conversation. The prompt of each turn begins with the prompt and the answer of the one before.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplayConversation {
    /// Seconds from the beginning to the first turn.
    pub start: f64,
    /// The hashes of the full blocks of the whole conversation, as far as they are known.
    pub chain: Vec<u64>,
    /// The hash of the opening, which distinguishes conversations with equal blocks.
    pub opening: Option<u64>,
    pub turns: Vec<ConversationTurn>,
    /// The chains of turns that do not continue the turn before, in order.
    pub rewrites: Vec<ChainRewrite>,
}

/// Another chain of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct ChainRewrite {
    /// The first turn with this chain.
    pub from: usize,
    pub chain: Vec<u64>,
}

/// One request of a conversation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConversationTurn {
    /// Seconds after the previous answer, or the previous request, see `Setup::open`; 0 in the first turn.
    pub wait: f64,
    /// Tokens of the whole prompt.
    pub prompt: usize,
    pub output: usize,
}

// === impl Workload ===

impl Workload {
    pub fn requests(&self) -> usize {
        self.sessions.iter().map(|session| session.turns.len()).sum()
    }

    /// Returns the load `rate` times faster.
    pub fn faster(mut self, rate: f64) -> Self {
        for session in &mut self.sessions {
            session.start /= rate;
            session.turns.iter_mut().for_each(|turn| turn.wait /= rate);
        }
        self
    }
}

// === impl ReplayConversation ===

impl ReplayConversation {
    /// Returns the blocks of a turn's prompt.
    pub fn prompt(&self, turn: usize, block: usize) -> &[u64] {
        self.leading(turn, self.turns[turn].prompt / block)
    }

    /// Returns the blocks of a turn's prompt and answer.
    pub fn whole(&self, turn: usize, block: usize) -> &[u64] {
        self.leading(turn, (self.turns[turn].prompt + self.turns[turn].output) / block)
    }

    /// Returns the hash of the opening, if it ends behind the last stored block of the turn's prompt.
    pub fn end(&self, turn: usize, block: usize) -> Option<u64> {
        let parts = index_parts(block);
        let stored = last_stored(self.prompt(turn, block).len() * parts);
        let behind = self.turns[0].prompt * parts >= stored * block;
        self.opening.filter(|_| behind)
    }

    /// Returns the chain of the latest turns.
    pub fn last_chain(&self) -> &[u64] {
        self.rewrites.last().map_or(&self.chain, |rewrite| &rewrite.chain)
    }

    fn leading(&self, turn: usize, blocks: usize) -> &[u64] {
        let rewrites = self.rewrites.partition_point(|rewrite| rewrite.from <= turn);
        let chain = rewrites.checked_sub(1).map_or(&self.chain, |last| &self.rewrites[last].chain);
        &chain[..blocks.min(chain.len())]
    }
}

/// Returns how many blocks of the index a block of a load stands for.
pub fn index_parts(block: usize) -> usize {
    (block / INDEX_BLOCK_TOKENS).max(1)
}

/// Writes the chain of a prompt as the index has it, with `parts` blocks for each of the load.
pub fn index_chain(prompt: &[u64], parts: usize, chain: &mut Vec<u64>) {
    chain.clear();
    let part =
        |block: u64, part: usize| if part == 0 { block } else { mix(mix(block).wrapping_add(part as u64)) };
    chain.extend(prompt.iter().flat_map(|block| (0..parts).map(move |number| part(*block, number))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_has_blocks_of_its_own_size() {
        assert_eq!([10, 128, 512].map(index_parts), [1, 1, 4]);
        let mut chain = vec![9];
        index_chain(&[5, 6], 1, &mut chain);
        assert_eq!(chain, [5, 6]);
        index_chain(&[5, 6, 7], 4, &mut chain);
        let all: std::collections::BTreeSet<u64> = chain.iter().copied().collect();
        assert_eq!((chain.len(), all.len(), chain[4]), (12, 12, 6));
        let mut other = Vec::new();
        index_chain(&[5, 6, 8], 4, &mut other);
        assert_eq!(chain[..8], other[..8]);
    }

    #[test]
    fn turns_are_leading_parts_of_one_chain() {
        let turn = |prompt, output| ConversationTurn { wait: 3.0, prompt, output };
        let turns = vec![turn(25, 4), turn(29, 30), turn(75, 5)];
        let (chain, rewrites) = ((1..9).collect(), Vec::new());
        let session = ReplayConversation { start: 4.0, chain, opening: Some(7), turns, rewrites };
        assert_eq!(session.prompt(0, 10), [1, 2]);
        assert_eq!(session.prompt(1, 10), [1, 2]);
        assert_eq!(session.whole(1, 10), [1, 2, 3, 4, 5]);
        assert_eq!(session.whole(2, 10).len(), 8);
        // The second turn adds no whole block, so the opening still identifies the conversation.
        assert_eq!([0, 1, 2].map(|turn| session.end(turn, 10)), [Some(7), Some(7), None]);
        let load = Workload { block: 10, sessions: vec![session] }.faster(2.0);
        assert_eq!((load.sessions[0].start, load.sessions[0].turns[1].wait), (2.0, 1.5));
        assert_eq!(load.requests(), 3);
    }

    #[test]
    fn a_rewrite_is_the_chain_from_its_turn_on() {
        let turn = ConversationTurn { wait: 0.0, prompt: 20, output: 10 };
        let rewrite = |from, chain: [u64; 3]| ChainRewrite { from, chain: chain.to_vec() };
        let session = ReplayConversation {
            start: 0.0,
            chain: vec![1, 2, 3],
            opening: None,
            turns: vec![turn; 4],
            rewrites: vec![rewrite(1, [1, 5, 6]), rewrite(3, [7, 8, 9])],
        };
        assert_eq!([0, 1, 2, 3].map(|turn| session.whole(turn, 10)[2]), [3, 6, 6, 9]);
        assert_eq!((session.prompt(2, 10), session.last_chain()), (&[1, 5][..], &[7, 8, 9][..]));
    }
}
