//! The prefix cache of a simulated vLLM: full blocks of tokens, identified by chained hashes, evicted least
//! recently used first.
//!
//! A block's hash covers its tokens and those of all blocks before it, so equal blocks have equal prefixes.
//! Running requests pin the blocks that they use; a finished request frees them tail first, so that shared
//! beginnings stay longest. Two invariants are tested: the cache never has more blocks than its capacity,
//! and the predecessor of a held block is held too.
//!
//! Pure: sees hashes only, no tokens, clocks or requests.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// The chained hash of one full block.
pub(crate) type BlockHash = u64;

/// The end of the list of free blocks.
const NO_BLOCK: u32 = u32::MAX;

/// A cache of at most `capacity` blocks.
#[derive(Debug)]
pub(crate) struct Cache {
    index: HashMap<BlockHash, u32, BuildHasherDefault<Identity>>,
    slots: Vec<CacheSlot>,
    /// Vacant slots, to be reused.
    vacant: Vec<u32>,
    /// The ends of the free list: from the next block to evict to the most recently freed one.
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
        // Block hashes of a test or a trace may be small numbers; the hash table uses the high bits.
        self.0 = value.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

// === impl Cache ===

impl Cache {
    /// Builds an empty cache of `capacity` blocks.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            index: HashMap::default(),
            slots: Vec::new(),
            vacant: Vec::new(),
            oldest: NO_BLOCK,
            newest: NO_BLOCK,
            pinned: 0,
            capacity,
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the number of held blocks, pinned or free.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Returns the number of blocks that running requests use, which cannot be evicted.
    pub(crate) fn pinned(&self) -> usize {
        self.pinned
    }

    /// Returns the number of leading blocks of `chain` that are held.
    pub(crate) fn held(&self, chain: &[BlockHash]) -> usize {
        chain.iter().take_while(|hash| self.index.contains_key(hash)).count()
    }

    /// Returns how many of these held blocks are free: pinning them takes that much room.
    pub(crate) fn free_among(&self, held: &[BlockHash]) -> usize {
        held.iter().filter(|hash| self.index.get(hash).is_some_and(|&at| self.slot(at).pins == 0)).count()
    }

    /// Pins one block; adds it when it is not held, and evicts the block that was free longest if needed.
    /// Returns `false`, without a change, when every block is pinned.
    pub(crate) fn pin(&mut self, hash: BlockHash) -> bool {
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
        let slot = CacheSlot { hash, pins: 1, older: NO_BLOCK, newer: NO_BLOCK };
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

    /// Removes the pins of one request on `chain`, tail first.
    pub(crate) fn release(&mut self, chain: &[BlockHash]) {
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

    /// Removes every block; returns `false` while one is pinned, as vLLM does while requests run.
    pub(crate) fn clear(&mut self) -> bool {
        if self.pinned > 0 {
            return false;
        }
        *self = Self::new(self.capacity);
        true
    }

    fn evict(&mut self) -> bool {
        let victim = self.oldest;
        if victim == NO_BLOCK {
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
            NO_BLOCK => self.oldest = newer,
            older => self.slot_mut(older).newer = newer,
        }
        match newer {
            NO_BLOCK => self.newest = older,
            newer => self.slot_mut(newer).older = older,
        }
        let slot = self.slot_mut(at);
        slot.older = NO_BLOCK;
        slot.newer = NO_BLOCK;
    }

    fn link_newest(&mut self, at: u32) {
        let newest = self.newest;
        let slot = self.slot_mut(at);
        slot.older = newest;
        slot.newer = NO_BLOCK;
        match newest {
            NO_BLOCK => self.oldest = at,
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
mod tests;
