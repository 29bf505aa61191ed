//! A hash table of entries in an arena, for concurrent readers and one writer.
//!
//! The buckets are linked lists, and the table grows by one bucket at a time (linear hashing), so that an
//! insert moves the entries of one bucket at most. The arena stores the entries with one link each; the table
//! stores one number for each bucket.
//!
//! There is no lock between the writer and the readers. A reader compares what it finds. An entry that it
//! does not find may have been moved meanwhile, so "not found" is valid only when no entry moved during the
//! search: `moves` is odd during a move and has another value afterwards.

use std::hint::spin_loop;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

/// The number that means "no entry".
pub(super) const NO_ENTRY: u32 = u32::MAX;

/// The number of buckets that are allocated at a time.
const BUCKETS_PER_PART: usize = 4096;

/// The largest number of attempts of a reader, which then returns "not found": the index is a hint, and the
/// time of a lookup is bounded.
const MAX_READ_ATTEMPTS: usize = 64;

/// The arena of the entries.
pub(super) trait Links {
    fn hash(&self, entry: u32) -> u64;
    fn next(&self, entry: u32) -> u32;
    fn link(&self, entry: u32, next: u32);
}

/// The hash table.
pub(super) struct Directory {
    parts: Box<[OnceLock<Box<[AtomicU32]>>]>,
    buckets: AtomicU32,
    entries: AtomicU32,
    moves: AtomicU64,
}

/// Spreads a hash over all bits with a secret seed: clients choose texts and thereby hashes, but cannot put
/// them into one bucket.
pub(super) fn mix(hash: u64, seed: u64) -> u64 {
    let spread = (hash ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    spread ^ (spread >> 32)
}

// === impl Directory ===

impl Directory {
    /// Builds a table that grows up to one bucket for each of `max_entries`.
    pub(super) fn new(max_entries: usize) -> Self {
        let parts = max_entries.div_ceil(BUCKETS_PER_PART).max(1);
        Directory {
            parts: (0..parts).map(|_| OnceLock::new()).collect(),
            buckets: AtomicU32::new(BUCKETS_PER_PART as u32),
            entries: AtomicU32::new(0),
            moves: AtomicU64::new(0),
        }
    }

    /// Finds the entry of this hash for which `is` returns true. May miss an entry that is being moved.
    pub(super) fn glance(&self, links: &impl Links, hash: u64, is: impl Fn(u32) -> bool) -> u32 {
        let mut at = self.head(place(hash, self.buckets.load(Acquire))).load(Acquire);
        while at != NO_ENTRY && !is(at) {
            at = links.next(at);
        }
        at
    }

    /// As `glance`, but returns `NO_ENTRY` only when there is no such entry.
    pub(super) fn find(&self, links: &impl Links, hash: u64, is: impl Fn(u32) -> bool) -> u32 {
        for _ in 0..MAX_READ_ATTEMPTS {
            let moves = self.moves.load(Acquire);
            let at = self.glance(links, hash, &is);
            if at != NO_ENTRY {
                return at;
            }
            fence(Acquire);
            if moves.is_multiple_of(2) && self.moves.load(Relaxed) == moves {
                return NO_ENTRY;
            }
            spin_loop();
        }
        NO_ENTRY
    }

    /// Adds an entry that is not in the table. For the writer only.
    pub(super) fn add(&self, links: &impl Links, hash: u64, entry: u32) {
        let head = self.head(place(hash, self.buckets.load(Relaxed)));
        links.link(entry, head.load(Relaxed));
        head.store(entry, Release);
        let entries = self.entries.load(Relaxed) + 1;
        self.entries.store(entries, Relaxed);
        let buckets = self.buckets.load(Relaxed);
        if entries > buckets && (buckets as usize) < self.parts.len() * BUCKETS_PER_PART {
            self.split(links, buckets);
        }
    }

    /// Removes an entry. For the writer only.
    pub(super) fn remove(&self, links: &impl Links, hash: u64, entry: u32) {
        let head = self.head(place(hash, self.buckets.load(Relaxed)));
        let (mut before, mut at) = (NO_ENTRY, head.load(Relaxed));
        while at != NO_ENTRY && at != entry {
            (before, at) = (at, links.next(at));
        }
        if at == NO_ENTRY {
            return;
        }
        self.moving(|| unlink(links, head, before, links.next(entry)));
        self.entries.store(self.entries.load(Relaxed) - 1, Relaxed);
    }

    /// Returns the number of entries.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.load(Relaxed) as usize
    }

    /// Returns the memory in bytes.
    pub(super) fn bytes(&self) -> usize {
        let made = self.parts.iter().filter(|part| part.get().is_some()).count();
        size_of_val(&*self.parts) + made * BUCKETS_PER_PART * size_of::<AtomicU32>()
    }

    /// Adds one bucket, and moves its entries from the bucket that stood for it.
    fn split(&self, links: &impl Links, buckets: u32) {
        let old = self.head(buckets & ((buckets + 1).next_power_of_two() / 2 - 1));
        let new = self.head(buckets);
        self.moving(|| {
            let (mut before, mut at) = (NO_ENTRY, old.load(Relaxed));
            while at != NO_ENTRY {
                let next = links.next(at);
                if place(links.hash(at), buckets + 1) == buckets {
                    unlink(links, old, before, next);
                    links.link(at, new.load(Relaxed));
                    new.store(at, Release);
                } else {
                    before = at;
                }
                at = next;
            }
            self.buckets.store(buckets + 1, Release);
        });
    }

    fn moving(&self, work: impl FnOnce()) {
        let moves = self.moves.load(Relaxed);
        // Every change that readers can see is a release store, and so is ordered after this store.
        self.moves.store(moves + 1, Relaxed);
        work();
        self.moves.store(moves + 2, Release);
    }

    fn head(&self, bucket: u32) -> &AtomicU32 {
        let part = &self.parts[bucket as usize / BUCKETS_PER_PART];
        &part.get_or_init(|| (0..BUCKETS_PER_PART).map(|_| AtomicU32::new(NO_ENTRY)).collect())
            [bucket as usize % BUCKETS_PER_PART]
    }
}

fn unlink(links: &impl Links, head: &AtomicU32, before: u32, next: u32) {
    match before {
        NO_ENTRY => head.store(next, Release),
        before => links.link(before, next),
    }
}

/// Returns the bucket of a hash among `buckets`.
fn place(hash: u64, buckets: u32) -> u32 {
    let mask = buckets.next_power_of_two() - 1;
    let at = hash as u32 & mask;
    if at < buckets { at } else { at & (mask >> 1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;

    /// Entry `i` has hash `i`, mixed.
    struct Arena(Vec<AtomicU32>);

    impl Arena {
        fn new(size: usize) -> Self {
            Arena((0..size).map(|_| AtomicU32::new(NO_ENTRY)).collect())
        }
    }

    impl Links for Arena {
        fn hash(&self, entry: u32) -> u64 {
            mix(u64::from(entry), 7)
        }
        fn next(&self, entry: u32) -> u32 {
            self.0[entry as usize].load(Acquire)
        }
        fn link(&self, entry: u32, next: u32) {
            self.0[entry as usize].store(next, Release);
        }
    }

    fn holds(directory: &Directory, arena: &Arena, entry: u32) -> bool {
        directory.find(arena, arena.hash(entry), |at| at == entry) == entry
    }

    #[test]
    fn maps_every_hash_to_one_bucket_below_the_count() {
        for buckets in 1..70 {
            for hash in 0..300 {
                let (now, grown) = (place(hash, buckets), place(hash, buckets + 1));
                assert!(now < buckets);
                let old = buckets & ((buckets + 1).next_power_of_two() / 2 - 1);
                assert!(grown == now || (grown == buckets && now == old), "{hash} of {buckets}");
            }
        }
    }

    #[test]
    fn grows_without_losing_entries() {
        let (directory, arena) = (Directory::new(1 << 15), Arena::new(1 << 15));
        for entry in 0..1 << 15 {
            directory.add(&arena, arena.hash(entry), entry);
        }
        assert!((0..1 << 15).all(|entry| holds(&directory, &arena, entry)));
        assert_eq!(directory.buckets.load(Relaxed), 1 << 15);
    }

    /// While the table grows and shrinks, readers always find the entries that stay.
    #[test]
    fn readers_never_miss_a_present_entry() {
        const STAYING: u32 = 500;
        let (directory, arena) = (Directory::new(1 << 15), Arena::new(1 << 15));
        for entry in 0..STAYING {
            directory.add(&arena, arena.hash(entry), entry);
        }
        let done = AtomicBool::new(false);
        let missed = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut missed = 0;
                        while !done.load(Relaxed) {
                            missed += (0..STAYING).filter(|at| !holds(&directory, &arena, *at)).count();
                        }
                        missed
                    })
                })
                .collect();
            for round in 0..6 {
                let others = STAYING..4000 * (round + 1);
                others.clone().for_each(|entry| directory.add(&arena, arena.hash(entry), entry));
                others.for_each(|entry| directory.remove(&arena, arena.hash(entry), entry));
            }
            done.store(true, Relaxed);
            readers.into_iter().map(|reader| reader.join().expect("a reader end_hit")).sum::<usize>()
        });
        assert_eq!(missed, 0);
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(steps in prop::collection::vec((0u32..64, any::<bool>()), 0..300)) {
            let (directory, arena) = (Directory::new(64), Arena::new(64));
            let mut model = std::collections::BTreeSet::new();
            for (entry, add) in steps {
                if add && model.insert(entry) {
                    directory.add(&arena, arena.hash(entry), entry);
                } else if !add {
                    model.remove(&entry);
                    directory.remove(&arena, arena.hash(entry), entry);
                }
                prop_assert_eq!(directory.len(), model.len());
            }
            for entry in 0..64 {
                prop_assert_eq!(holds(&directory, &arena, entry), model.contains(&entry));
            }
        }
    }
}
