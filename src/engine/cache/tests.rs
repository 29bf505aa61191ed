//! Tests of the cache of blocks: pins, evictions, and any schedule of requests.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

/// Pins the blocks of `chain` one by one, as the engine does; returns how many were pinned.
fn take(cache: &mut Cache, chain: &[BlockHash]) -> usize {
    chain.iter().take_while(|&&hash| cache.pin(hash)).count()
}

#[test]
fn finds_the_held_part_of_a_prefix() {
    let mut cache = Cache::new(8);
    assert_eq!(take(&mut cache, &[1, 2, 3]), 3);
    assert_eq!(cache.held(&[1, 2, 9, 3]), 2);
    assert_eq!(cache.held(&[9, 1]), 0);
    cache.release(&[1, 2, 3]);
    assert_eq!(cache.held(&[1, 2, 3]), 3, "freed blocks stay until their room is needed");
}

#[test]
fn evicts_the_tail_first_and_pinned_blocks_never() {
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
fn frees_a_shared_block_when_both_requests_released_it() {
    let mut cache = Cache::new(2);
    take(&mut cache, &[1]);
    take(&mut cache, &[1]);
    cache.release(&[1]);
    assert_eq!(cache.pinned(), 1);
    assert!(!cache.clear(), "a pinned block cannot be removed");
    cache.release(&[1]);
    assert_eq!(cache.free_among(&[1]), 1);
    assert!(cache.clear());
    assert!(cache.is_empty());
}

proptest! {
    /// Any order of requests that start and end keeps the two invariants of the header.
    #[test]
    fn keeps_capacity_and_prefixes_in_any_order(
        capacity in 1usize..24,
        steps in prop::collection::vec((0u64..6, 1usize..9, any::<bool>()), 1..120),
    ) {
        let mut cache = Cache::new(capacity);
        let mut running: Vec<Vec<BlockHash>> = Vec::new();
        let mut parent: HashMap<BlockHash, BlockHash> = HashMap::new();
        for (family, length, begins) in steps {
            if begins {
                // Chains of a family share their beginning and then differ by length.
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
