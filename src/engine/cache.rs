//! The prefix cache of a simulated vLLM: full blocks of tokens, named by chained hashes, evicted least
//! recently used first.
//!
//! A block's hash covers its own tokens and those of all blocks before it, so holding a block says that the
//! whole prefix up to it is the same. Running requests pin the blocks they use; a finished request frees
//! them tail first, so that beginnings, which are shared, live longest. Two promises are held by tests: the
//! cache never has more blocks than its capacity, and a held block's predecessor is held too.
//!
//! It must never look at tokens, clocks or requests: it knows hashes only.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Chained hash of one full block.
pub type BlockHash = u64;

/// End of the list of free blocks.
const NIL: u32 = u32::MAX;

/// A cache of at most `capacity` blocks.
#[derive(Debug)]
pub struct Cache {
    index: HashMap<BlockHash, u32, BuildHasherDefault<Identity>>,
    slots: Vec<CacheSlot>,
    /// Slots that hold nothing, to be used again.
    vacant: Vec<u32>,
    /// The free list runs from the next victim to the most recently freed block.
    oldest: u32,
    newest: u32,
    pinned: usize,
    capacity: usize,
}

#[derive(Debug)]
struct CacheSlot {
    hash: BlockHash,
    pins: u32,
    older: u32,
    newer: u32,
}

/// The keys are hashes already, so hashing them again would only cost time.
#[derive(Debug, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        // Block hashes of a test or a trace may be small numbers; the table wants its high bits filled.
        self.0 = value.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

// === impl Cache ===

impl Cache {
    /// An empty cache; `capacity` counts blocks.
    pub fn new(capacity: usize) -> Self {
        Self {
            index: HashMap::default(),
            slots: Vec::new(),
            vacant: Vec::new(),
            oldest: NIL,
            newest: NIL,
            pinned: 0,
            capacity,
        }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks held, pinned or free.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Blocks that running requests use and that cannot be evicted.
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    /// How many leading blocks of `chain` are held. Changes nothing.
    pub fn held(&self, chain: &[BlockHash]) -> usize {
        chain.iter().take_while(|hash| self.index.contains_key(hash)).count()
    }

    /// How many of the leading `held` blocks of `chain` are free: pinning them would take that much room.
    pub fn free_among(&self, held: &[BlockHash]) -> usize {
        held.iter().filter(|hash| self.index.get(hash).is_some_and(|&at| self.slot(at).pins == 0)).count()
    }

    /// Pins one block, taking it in when it is not held, at the cost of the block that was free longest.
    ///
    /// `false`: every block is pinned, so there is no room, and nothing changed.
    pub fn pin(&mut self, hash: BlockHash) -> bool {
        if let Some(&at) = self.index.get(&hash) {
            if self.slot(at).pins == 0 {
                self.unlink(at);
                self.pinned += 1;
            }
            self.slot_mut(at).pins += 1;
            return true;
        }
        if self.index.len() >= self.capacity && !self.evict() {
            return false;
        }
        let slot = CacheSlot { hash, pins: 1, older: NIL, newer: NIL };
        let at = match self.vacant.pop() {
            Some(at) => {
                *self.slot_mut(at) = slot;
                at
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.index.insert(hash, at);
        self.pinned += 1;
        true
    }

    /// Gives back the pins that one request holds on `chain`, tail first.
    pub fn release(&mut self, chain: &[BlockHash]) {
        for hash in chain.iter().rev() {
            let Some(&at) = self.index.get(hash) else { continue };
            let slot = self.slot_mut(at);
            if slot.pins == 0 {
                continue;
            }
            slot.pins -= 1;
            if slot.pins == 0 {
                self.pinned -= 1;
                self.link_newest(at);
            }
        }
    }

    /// Forgets every block; refused while one is pinned, as vLLM refuses it while requests run.
    pub fn clear(&mut self) -> bool {
        if self.pinned > 0 {
            return false;
        }
        *self = Self::new(self.capacity);
        true
    }

    fn evict(&mut self) -> bool {
        let victim = self.oldest;
        if victim == NIL {
            return false;
        }
        self.unlink(victim);
        let hash = self.slot(victim).hash;
        self.index.remove(&hash);
        self.vacant.push(victim);
        true
    }

    fn unlink(&mut self, at: u32) {
        let (older, newer) = (self.slot(at).older, self.slot(at).newer);
        match older {
            NIL => self.oldest = newer,
            older => self.slot_mut(older).newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            newer => self.slot_mut(newer).older = older,
        }
        let slot = self.slot_mut(at);
        slot.older = NIL;
        slot.newer = NIL;
    }

    fn link_newest(&mut self, at: u32) {
        let newest = self.newest;
        let slot = self.slot_mut(at);
        slot.older = newest;
        slot.newer = NIL;
        match newest {
            NIL => self.oldest = at,
            newest => self.slot_mut(newest).newer = at,
        }
        self.newest = at;
    }

    fn slot(&self, at: u32) -> &CacheSlot {
        &self.slots[at as usize]
    }

    fn slot_mut(&mut self, at: u32) -> &mut CacheSlot {
        &mut self.slots[at as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    /// Pins what `chain` needs, as the engine does block by block; returns how many it got.
    fn take(cache: &mut Cache, chain: &[BlockHash]) -> usize {
        chain.iter().take_while(|&&hash| cache.pin(hash)).count()
    }

    #[test]
    fn a_prefix_is_found_as_far_as_it_is_held() {
        let mut cache = Cache::new(8);
        assert_eq!(take(&mut cache, &[1, 2, 3]), 3);
        assert_eq!(cache.held(&[1, 2, 9, 3]), 2);
        assert_eq!(cache.held(&[9, 1]), 0);
        cache.release(&[1, 2, 3]);
        assert_eq!(cache.held(&[1, 2, 3]), 3, "freed blocks stay until their room is needed");
    }

    #[test]
    fn the_tail_is_evicted_first_and_pinned_blocks_never() {
        let mut cache = Cache::new(4);
        take(&mut cache, &[1, 2, 3]);
        cache.release(&[1, 2, 3]);
        assert_eq!(take(&mut cache, &[7, 8]), 2);
        assert_eq!(cache.held(&[1, 2, 3]), 2, "block 3, the tail, made room");
        assert_eq!(take(&mut cache, &[9, 10, 11]), 2, "then 2 and 1; 7 and 8 are in use");
        assert_eq!(cache.held(&[1]), 0);
        assert_eq!((cache.len(), cache.pinned()), (4, 4));
    }

    #[test]
    fn a_block_of_two_requests_is_free_only_when_both_gave_it_back() {
        let mut cache = Cache::new(2);
        take(&mut cache, &[1]);
        take(&mut cache, &[1]);
        cache.release(&[1]);
        assert_eq!(cache.pinned(), 1);
        assert!(!cache.clear(), "a pinned block cannot be forgotten");
        cache.release(&[1]);
        assert_eq!(cache.free_among(&[1]), 1);
        assert!(cache.clear());
        assert!(cache.is_empty());
    }

    proptest! {
        /// Any order of requests beginning and ending keeps the two promises of the header.
        #[test]
        fn capacity_and_prefixes_hold(
            capacity in 1usize..24,
            steps in prop::collection::vec((0u64..6, 1usize..9, any::<bool>()), 1..120),
        ) {
            let mut cache = Cache::new(capacity);
            let mut running: Vec<Vec<BlockHash>> = Vec::new();
            let mut parent: HashMap<BlockHash, BlockHash> = HashMap::new();
            for (family, length, begins) in steps {
                if begins {
                    // Chains of a family share their beginning, then part ways by length.
                    let mut chain: Vec<BlockHash> = Vec::new();
                    for place in 0..length {
                        let fork = if place > 3 { length as u64 } else { 0 };
                        let hash = 1 + family * 1_000 + fork * 100 + place as u64;
                        if let Some(&last) = chain.last() {
                            parent.insert(hash, last);
                        }
                        chain.push(hash);
                    }
                    let got = take(&mut cache, &chain);
                    chain.truncate(got);
                    running.push(chain);
                } else if !running.is_empty() {
                    let done = running.remove(family as usize % running.len());
                    cache.release(&done);
                }
                prop_assert!(cache.len() <= capacity);
                let in_use: HashSet<BlockHash> = running.iter().flatten().copied().collect();
                prop_assert_eq!(cache.pinned(), in_use.len());
                for chain in &running {
                    prop_assert_eq!(cache.held(chain), chain.len());
                }
                for (child, parent) in &parent {
                    prop_assert!(cache.held(&[*child]) <= cache.held(&[*parent]));
                }
            }
        }
    }
}
