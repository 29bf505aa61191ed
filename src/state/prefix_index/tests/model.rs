//! The index as plain lists: slow but simple.

use std::collections::BTreeSet;

use super::{Hits, Slot};
use crate::prompt::chain::thinning::{expected_beyond, stored_count, stored_depth, stored_weight};

/// The facts of a lookup: the leading blocks of each upstream, and the branches of each known block.
pub(super) type LookupFacts = (Vec<usize>, Vec<u32>);

pub(super) fn facts(hits: &Hits, at: &[Slot]) -> LookupFacts {
    let held = at.iter().map(|slot| hits.held(*slot)).collect();
    (held, (0..hits.known()).map(|block| hits.branches(block)).collect())
}

/// Returns every chain of four blocks, each with one of two texts.
pub(super) fn chains() -> impl Iterator<Item = Vec<u8>> {
    (0u8..16).map(|number| [3, 2, 1, 0].map(|place| number >> place & 1).to_vec())
}

/// Returns the hashes of a chain, each of a block and all before it.
pub(super) fn name(text: &[u8]) -> Vec<u64> {
    let step = |hash: &mut u64, text: &u8| {
        *hash = (*hash ^ u64::from(*text)).wrapping_mul(0x0000_0100_0000_01B3);
        Some(*hash)
    };
    text.iter().scan(0xCBF2_9CE4_8422_2325, step).collect()
}

struct Pair {
    text: Vec<u8>,
    claims: usize,
    tick: usize,
}

struct ModelCache {
    limit: usize,
    /// The pairs, the least recent first.
    pairs: Vec<Pair>,
    /// The tick of the latest evicted pair.
    evicted: usize,
}

pub(super) struct IndexModel {
    limit: usize,
    tick: usize,
    caches: Vec<ModelCache>,
}

impl IndexModel {
    pub(super) fn new(limit: usize, caches: usize) -> Self {
        let cache = || ModelCache { limit: usize::MAX, pairs: Vec::new(), evicted: 0 };
        IndexModel { limit, tick: 0, caches: (0..caches).map(|_| cache()).collect() }
    }

    /// Returns the number of blocks that all pairs stand for.
    pub(super) fn pairs(&self) -> usize {
        self.caches.iter().map(ModelCache::blocks).sum()
    }

    pub(super) fn learn(&mut self, text: &[u8], slot: usize) {
        self.tick += 1;
        let cache = &mut self.caches[slot];
        let stored = stored_count(text.len().min(cache.limit).min(self.limit));
        for length in (1..=stored).rev().map(stored_depth) {
            let old = cache.pairs.iter().position(|pair| pair.text == text[..length]);
            let claims = old.map_or(0, |old| cache.pairs.remove(old).claims) + 1;
            cache.pairs.push(Pair { text: text[..length].to_vec(), claims, tick: self.tick });
        }
        cache.trim();
        self.trim();
    }

    fn trim(&mut self) {
        while self.pairs() > self.limit {
            let oldest = self.caches.iter_mut().filter(|cache| !cache.pairs.is_empty());
            let oldest = oldest.min_by_key(|cache| cache.pairs[0].tick).expect("some cache has pairs");
            oldest.drop_oldest();
        }
    }

    /// Undoes the latest `learn`.
    pub(super) fn take_back(&mut self, text: &[u8], slot: usize) {
        let cache = &mut self.caches[slot];
        if cache.evicted == self.tick {
            return;
        }
        for pair in
            cache.pairs.iter_mut().filter(|pair| text.starts_with(&pair.text) && pair.tick == self.tick)
        {
            pair.claims -= 1;
        }
        cache.pairs.retain(|pair| pair.claims > 0);
    }

    pub(super) fn limit(&mut self, slot: usize, limit: usize) {
        self.caches[slot].limit = limit;
        self.caches[slot].trim();
    }

    pub(super) fn limit_all(&mut self, limit: usize) {
        self.limit = limit;
        self.trim();
    }

    pub(super) fn facts(&self, text: &[u8]) -> LookupFacts {
        let holds =
            |cache: &ModelCache, length: usize| cache.pairs.iter().any(|pair| pair.text == text[..length]);
        let stored = || (1..=stored_count(text.len())).map(stored_depth);
        let leading =
            |cache: &ModelCache| stored().take_while(|length| holds(cache, *length)).last().unwrap_or(0);
        let stored_held: Vec<usize> = self.caches.iter().map(leading).collect();
        let known = stored_held.iter().copied().max().unwrap_or(0);
        let leaves = self.leaves();
        let through = |length: usize| leaves.iter().filter(|leaf| leaf.starts_with(&text[..length])).count();
        let beyond = |held: &usize| held + expected_beyond(*held, text.len() - held);
        let held = stored_held.iter().map(beyond).collect();
        // A block between stored ones has the branches of the next of them.
        let next = |length: usize| stored().find(|stored| *stored >= length).unwrap_or(known);
        (held, (1..=known).map(|length| through(next(length)) as u32).collect())
    }

    /// Returns the texts that no other text follows. In sorted order a following text is the next one.
    fn leaves(&self) -> Vec<&[u8]> {
        let all: BTreeSet<&[u8]> =
            self.caches.iter().flat_map(|cache| &cache.pairs).map(|pair| &pair.text[..]).collect();
        let next = all.iter().skip(1).map(Some).chain([None]);
        let pairs = all.iter().zip(next);
        pairs
            .filter(|(text, next)| next.is_none_or(|next| !next.starts_with(text)))
            .map(|(text, _)| *text)
            .collect()
    }
}

impl ModelCache {
    fn blocks(&self) -> usize {
        self.pairs.iter().map(|pair| stored_weight(pair.text.len())).sum()
    }

    fn trim(&mut self) {
        while self.blocks() > self.limit {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        self.evicted = self.pairs.remove(0).tick;
    }
}
