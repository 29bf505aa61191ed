//! The changes of branches that wait to reach the blocks above.
//!
//! A branch counts at all blocks above it, and a chain can be long. A change that was not carried to the
//! first block of its chain waits here at the next block to change. Changes at one block are summed, so that
//! a burst of branches below one block climbs once.

use std::collections::BTreeMap;

/// The waiting changes by block: each applies to the block and to all blocks above it.
#[derive(Debug, Default)]
pub(super) struct BranchChanges(BTreeMap<u32, i32>);

impl BranchChanges {
    /// Adds a change that waits at this block.
    pub(super) fn put(&mut self, at: u32, change: i32) {
        if change != 0 {
            *self.0.entry(at).or_default() += change;
        }
    }

    /// Removes and returns the change that waits at a block; 0: none does.
    pub(super) fn take(&mut self, at: u32) -> i32 {
        if self.0.is_empty() { 0 } else { self.0.remove(&at).unwrap_or(0) }
    }

    /// Removes and returns some waiting change, with its block.
    pub(super) fn pop(&mut self) -> Option<(u32, i32)> {
        self.0.pop_first()
    }

    /// Returns the number of blocks with a waiting change.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
