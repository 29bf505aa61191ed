//! The lengths of prompts beyond the part that was read before the choice.
//!
//! A body longer than `peek.bytes` is hashed to its end while it streams past, but the choice for the next
//! one like it is made by its first part only. So this table keeps how much each upstream has received
//! behind the last block of such a part.
//!
//! Two generations bound the memory: when the present one is full it becomes the past one, and the past one
//! is dropped. Entries found in the past move to the present, so entries in use stay.

use std::collections::HashMap;

use super::prefix_index::Slot;

/// The most entries of one generation.
const MAX_GENERATION_ENTRIES: usize = 16_384;

#[derive(Default)]
pub struct PromptTails {
    present: HashMap<(u64, Slot), u64>,
    past: HashMap<(u64, Slot), u64>,
}

impl PromptTails {
    /// The largest number of tokens that this upstream was sent behind the block.
    pub fn find(&mut self, block: u64, slot: Slot) -> u64 {
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

    pub fn learn(&mut self, block: u64, slot: Slot, tokens: u64) {
        let longest = self.find(block, slot).max(tokens);
        self.put((block, slot), longest);
    }

    /// The upstream's cache is empty, or its slot is another's.
    pub fn forget(&mut self, slot: Slot) {
        self.present.retain(|(_, held), _| *held != slot);
        self.past.retain(|(_, held), _| *held != slot);
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
    fn the_longest_rest_is_kept_for_each_upstream() {
        let index = Index::new(10, 1);
        let (one, other) = (index.enter().unwrap(), index.enter().unwrap());
        let mut beyond = PromptTails::default();
        for tokens in [500, 900, 700] {
            beyond.learn(7, one, tokens);
        }
        assert_eq!((beyond.find(7, one), beyond.find(7, other), beyond.find(8, one)), (900, 0, 0));
        beyond.learn(7, other, 300);
        beyond.forget(one);
        assert_eq!((beyond.find(7, one), beyond.find(7, other)), (0, 300));
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let slot = Index::new(10, 1).enter().unwrap();
        let mut beyond = PromptTails::default();
        beyond.learn(u64::MAX, slot, 5);
        for block in 0..5 * MAX_GENERATION_ENTRIES as u64 {
            beyond.learn(block, slot, 1);
            if block % 1_000 == 0 {
                assert_eq!(beyond.find(u64::MAX, slot), 5);
            }
        }
        assert!(beyond.present.len() + beyond.past.len() <= 2 * MAX_GENERATION_ENTRIES);
        assert_eq!(beyond.find(0, slot), 0);
    }
}
