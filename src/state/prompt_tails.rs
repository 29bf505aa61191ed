//! The lengths of prompts behind the part that was read before the choice.
//!
//! A body longer than `peek.bytes` is hashed to its end while it streams past, but the choice for the next
//! body with the same beginning is made by its first part. This table keeps how many tokens each upstream
//! has received behind the last block of such a part.
//!
//! Two generations bound the memory: when the present one is full it becomes the past one, and the past one
//! is dropped. Entries found in the past move to the present, so entries in use stay.

use std::collections::{HashMap, HashSet};

use super::prefix_index::Slot;

/// The largest number of entries in one generation.
const MAX_GENERATION_ENTRIES: usize = 16_384;

/// The tokens behind a block, by block and upstream.
#[derive(Default)]
pub(super) struct PromptTails {
    present: HashMap<(u64, Slot), u64>,
    past: HashMap<(u64, Slot), u64>,
}

impl PromptTails {
    /// Returns the largest number of tokens that this upstream was sent behind the block.
    pub(super) fn find(&mut self, block: u64, slot: Slot) -> u64 {
        let key = (block, slot);
        if let Some(found) = self.present.get(&key) {
            return *found;
        }
        let found = self.past.remove(&key).unwrap_or(0);
        if found > 0 {
            self.put(key, found);
        }
        found
    }

    /// Learns that the upstream was sent `tokens` behind the block.
    pub(super) fn learn(&mut self, block: u64, slot: Slot, tokens: u64) {
        let longest = self.find(block, slot).max(tokens);
        self.put((block, slot), longest);
    }

    /// Forgets upstreams whose caches are empty or whose slots are reused.
    pub(super) fn forget(&mut self, slots: &HashSet<Slot>) {
        if !slots.is_empty() {
            self.present.retain(|(_, held), _| !slots.contains(held));
            self.past.retain(|(_, held), _| !slots.contains(held));
        }
    }

    fn put(&mut self, key: (u64, Slot), tokens: u64) {
        if self.present.len() >= MAX_GENERATION_ENTRIES {
            self.past = std::mem::take(&mut self.present);
        }
        self.present.insert(key, tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::super::prefix_index::Index;
    use super::*;

    #[test]
    fn keeps_the_longest_tail_for_each_upstream() {
        let index = Index::new(10, 1);
        let (one, other) = (index.enter().unwrap(), index.enter().unwrap());
        let mut tails = PromptTails::default();
        for tokens in [500, 900, 700] {
            tails.learn(7, one, tokens);
        }
        assert_eq!((tails.find(7, one), tails.find(7, other), tails.find(8, one)), (900, 0, 0));
        tails.learn(7, other, 300);
        tails.forget(&HashSet::from([one]));
        assert_eq!((tails.find(7, one), tails.find(7, other)), (0, 300));
    }

    #[test]
    fn bounds_memory_and_keeps_used_entries() {
        let slot = Index::new(10, 1).enter().unwrap();
        let mut tails = PromptTails::default();
        tails.learn(u64::MAX, slot, 5);
        for block in 0..5 * MAX_GENERATION_ENTRIES as u64 {
            tails.learn(block, slot, 1);
            if block % 1_000 == 0 {
                assert_eq!(tails.find(u64::MAX, slot), 5);
            }
        }
        assert!(tails.present.len() + tails.past.len() <= 2 * MAX_GENERATION_ENTRIES);
        assert_eq!(tails.find(0, slot), 0);
    }
}
