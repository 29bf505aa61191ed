//! What one `learn` did: to be undone, and to be published.

use super::holdings::Tick;
use crate::prompt::chain::thinning::{stored, stored_count};

/// The record of one `learn`, which `take_back` undoes as a whole or not at all.
#[derive(Debug, PartialEq, Eq)]
pub struct Receipt {
    pub(super) column: usize,
    pub(super) tick: Tick,
    /// The number of leading blocks that were learned.
    pub(super) learned: usize,
    /// The depth of the last stored block that the upstream held before.
    pub(super) held: usize,
    pub(super) end: Option<u64>,
}

/// The part of a chain that an upstream did not hold before, for siblings that received all before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainTail {
    /// The stored block that the part follows; `None`: the part begins the chain.
    pub parent: Option<u64>,
    /// The number of blocks up to and including `parent`.
    pub depth: u64,
    /// The stored blocks of the part.
    pub hashes: Vec<u64>,
    pub end: Option<u64>,
}

// === impl Receipt ===

impl Receipt {
    /// Returns the number of leading blocks that the upstream was believed to hold before.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Returns the number of leading blocks that the upstream is believed to hold now; limited by its cache.
    pub fn learned(&self) -> usize {
        self.learned
    }

    /// Returns the ending that was learned.
    pub fn end(&self) -> Option<u64> {
        self.end
    }

    /// Returns the new part of the chain that was learned.
    pub fn new_part(&self, chain: &[u64]) -> ChainTail {
        let parent = self.held.checked_sub(1).and_then(|last| chain.get(last)).copied();
        let depth = if parent.is_some() { self.held as u64 } else { 0 };
        ChainTail { parent, depth, hashes: self.new_hashes(chain), end: self.end }
    }

    /// Returns the stored blocks of the chain that the upstream did not hold before: what a sibling needs to
    /// undo the same `learn`, beside `end`.
    pub fn new_hashes(&self, chain: &[u64]) -> Vec<u64> {
        let learned = &chain[..self.learned.min(chain.len())];
        stored(learned).skip(stored_count(self.held)).collect()
    }
}
