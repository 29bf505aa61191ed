//! The blocks that some upstream is believed to hold: the holders of each, its parent, and the number of
//! conversations through it.
//!
//! The fields are atomics: readers read them without a lock, and the one writer changes them under its lock
//! (see `prefix_index`). The entry of a freed block is reused, so a reader checks the hash again after the
//! other fields.
//!
//! Blocks form trees: a child is a block that was seen behind its parent. `branches` of a block is the
//! number of conversations that end below it:
//!
//! ```text
//! branches(b) = max(1, open(b) + sum over the children c of b of branches(c))
//! ```
//!
//! `open` counts the open endings of b: openings of conversations that are less than a block longer than b.
//! When such a conversation continues, its next prompt adds a child where its opening added an ending. So a
//! new child replaces an open ending. Thus a conversation counts once, however many turns it has, and a
//! hundred short questions behind one long system prompt count a hundred times.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::directory::{Directory, Links, NO_ENTRY, mix};

/// The number of columns in one word of holders. The first word is part of the block; further words are
/// allocated when there are more upstreams.
pub const WORD_BITS: usize = u64::BITS as usize;

/// The largest number of words of holders.
pub const MAX_HOLDER_WORDS: usize = 64;

/// The number of blocks that are allocated at a time.
const BLOCKS_PER_PART: usize = 1 << 13;

/// The bit of `parent` that marks an ending.
const ENDING_BIT: u32 = 1 << 31;

/// One block, or an ending.
struct Block {
    hash: AtomicU64,
    holders: AtomicU64,
    next: AtomicU32,
    /// The parent, with `ENDING_BIT`; in a vacant entry, the next vacant one.
    parent: AtomicU32,
    /// 0 in a vacant entry.
    branches: AtomicU32,
    children: AtomicU32,
    endings: AtomicU32,
    /// The endings that no child has replaced.
    open: AtomicU32,
}

/// Parts of an array that are allocated at their first use.
type LazyParts<T> = Box<[OnceLock<Box<[T]>>]>;

/// All blocks, with a directory by hash.
pub struct BlockTable {
    parts: LazyParts<Block>,
    /// The words of holders after the first.
    more: Box<[OnceLock<LazyParts<AtomicU64>>]>,
    directory: Directory,
    /// The sum of the branches of all first blocks.
    conversations: AtomicU32,
    seed: u64,
}

/// The vacant entries, owned by the writer.
#[derive(Debug)]
pub struct Vacant {
    /// The first entry that was never used.
    fresh: u32,
    /// The first freed entry.
    freed: u32,
}

impl Default for Vacant {
    fn default() -> Self {
        Vacant { fresh: 0, freed: NO_ENTRY }
    }
}

fn parts<T>(count: usize) -> LazyParts<T> {
    (0..count).map(|_| OnceLock::new()).collect()
}

// === impl BlockTable: for readers ===

impl BlockTable {
    /// Builds a table of at most `max_blocks`. Clients must not know `seed`.
    pub fn new(max_blocks: usize, seed: u64) -> Self {
        BlockTable {
            parts: parts(max_blocks.div_ceil(BLOCKS_PER_PART).max(1)),
            more: parts(MAX_HOLDER_WORDS - 1),
            directory: Directory::new(max_blocks),
            conversations: AtomicU32::new(0),
            seed,
        }
    }

    /// Returns the number of blocks and endings.
    pub fn len(&self) -> usize {
        self.directory.len()
    }

    /// Returns the memory in bytes.
    pub fn bytes(&self) -> usize {
        let made = |count: usize, size: usize| count * BLOCKS_PER_PART * size;
        let blocks = made(self.parts.iter().filter(|part| part.get().is_some()).count(), size_of::<Block>());
        let words = self.more.iter().filter_map(OnceLock::get).flat_map(|word| word.iter());
        let words = made(words.filter(|part| part.get().is_some()).count(), size_of::<AtomicU64>());
        blocks + words + self.directory.bytes()
    }

    /// Finds the block; `NO_ENTRY` when no upstream holds it.
    pub fn find(&self, hash: u64) -> u32 {
        let is = |at: u32| self.at(at).hash.load(Relaxed) == hash;
        match self.directory.glance(self, self.mixed(hash), is) {
            NO_ENTRY => self.directory.find(self, self.mixed(hash), is),
            at => at,
        }
    }

    /// As `find`, for the block behind another one in a chain. Blocks that were learned together are mostly
    /// adjacent, so this checks the next entry first, which the processor has fetched already.
    pub fn find_after(&self, before: u32, hash: u64) -> u32 {
        let next = before.wrapping_add(1);
        let part = self.parts.get(next as usize / BLOCKS_PER_PART).and_then(OnceLock::get);
        // A vacant entry keeps its old hash, but has no branches.
        match part.map(|part| &part[next as usize % BLOCKS_PER_PART]) {
            Some(block) if block.hash.load(Acquire) == hash && block.branches.load(Acquire) != 0 => next,
            _ => self.find(hash),
        }
    }

    /// Returns one word of the holders of an entry.
    pub fn holders(&self, at: u32, word: usize) -> u64 {
        match word.checked_sub(1) {
            None => self.at(at).holders.load(Acquire),
            Some(more) => self.more[more].get().map_or(0, |parts| {
                parts[at as usize / BLOCKS_PER_PART]
                    .get()
                    .map_or(0, |part| part[at as usize % BLOCKS_PER_PART].load(Acquire))
            }),
        }
    }

    /// Returns the number of all conversations.
    pub fn conversations(&self) -> u32 {
        self.conversations.load(Relaxed)
    }

    /// Returns the number of conversations through a block.
    pub fn branches(&self, at: u32) -> u32 {
        self.at(at).branches.load(Relaxed)
    }

    /// Whether the entry still has this hash.
    pub fn is(&self, at: u32, hash: u64) -> bool {
        self.at(at).hash.load(Relaxed) == hash
    }

    fn at(&self, at: u32) -> &Block {
        let part = &self.parts[at as usize / BLOCKS_PER_PART];
        &part.get_or_init(|| (0..BLOCKS_PER_PART).map(|_| Block::vacant()).collect())
            [at as usize % BLOCKS_PER_PART]
    }

    fn mixed(&self, hash: u64) -> u64 {
        mix(hash, self.seed)
    }
}

// === impl BlockTable: for the writer ===

impl BlockTable {
    /// Adds a block behind its parent; `None` when there is no room.
    pub fn add(&self, vacant: &mut Vacant, hash: u64, parent: u32, ending: bool) -> Option<u32> {
        let at = self.take(vacant)?;
        let block = self.at(at);
        block.hash.store(hash, Relaxed);
        block.parent.store(if ending { parent | ENDING_BIT } else { parent }, Relaxed);
        block.branches.store(1, Release);
        self.directory.add(self, self.mixed(hash), at);
        if parent == NO_ENTRY {
            self.conversations.fetch_add(1, Relaxed);
        } else {
            self.add_below(parent, ending);
        }
        Some(at)
    }

    /// Whether this block follows that parent. A hash covers all blocks before it, so another parent means an
    /// invalid chain.
    pub fn follows(&self, at: u32, parent: u32, ending: bool) -> bool {
        self.at(at).parent.load(Relaxed) == if ending { parent | ENDING_BIT } else { parent }
    }

    /// Whether the entry is an ending.
    pub fn is_ending(&self, at: u32) -> bool {
        let parent = self.at(at).parent.load(Relaxed);
        parent != NO_ENTRY && parent & ENDING_BIT != 0
    }

    /// Returns the block that an entry follows.
    pub fn parent(&self, at: u32) -> Option<u32> {
        match self.at(at).parent.load(Relaxed) {
            NO_ENTRY => None,
            parent => Some(parent & !ENDING_BIT),
        }
    }

    /// Returns the hash of a block.
    pub fn block_hash(&self, at: u32) -> u64 {
        self.at(at).hash.load(Relaxed)
    }

    /// Appends the entries from a block up to the first of its chain. A block stays while another follows
    /// it, so none is missing.
    pub fn above(&self, at: u32, path: &mut Vec<u32>) {
        let mut at = at;
        while at != NO_ENTRY {
            path.push(at);
            at = self.at(at).parent.load(Relaxed);
        }
    }

    /// Whether the column holds the block.
    pub fn is_held_by(&self, at: u32, column: usize) -> bool {
        self.holders(at, column / WORD_BITS) & (1 << (column % WORD_BITS)) != 0
    }

    /// Adds a holder.
    pub fn hold(&self, at: u32, column: usize) {
        self.word(at, column / WORD_BITS).fetch_or(1 << (column % WORD_BITS), Release);
    }

    /// Removes a holder. A block without holders is freed, unless another block follows it.
    pub fn release(&self, vacant: &mut Vacant, at: u32, column: usize) {
        self.word(at, column / WORD_BITS).fetch_and(!(1 << (column % WORD_BITS)), Release);
        let mut at = at;
        while at != NO_ENTRY && self.is_unused(at) {
            let (block, ending) = (self.at(at), self.is_ending(at));
            let parent = match block.parent.load(Relaxed) {
                NO_ENTRY => NO_ENTRY,
                parent => parent & !ENDING_BIT,
            };
            self.directory.remove(self, self.hash(at), at);
            block.branches.store(0, Release);
            block.parent.store(vacant.freed, Relaxed);
            vacant.freed = at;
            if parent == NO_ENTRY {
                self.conversations.fetch_sub(1, Relaxed);
            } else {
                self.remove_below(parent, ending);
            }
            at = parent;
        }
    }

    /// Whether a block has neither holders nor followers.
    fn is_unused(&self, at: u32) -> bool {
        let block = self.at(at);
        let alone = block.children.load(Relaxed) + block.endings.load(Relaxed) == 0;
        let words = 1 + self.more.iter().take_while(|word| word.get().is_some()).count();
        alone && (0..words).all(|word| self.holders(at, word) == 0)
    }

    /// Counts a new entry behind `parent`. The first one changes no count: the conversation continues.
    fn add_below(&self, parent: u32, ending: bool) {
        let block = self.at(parent);
        let (children, open) = (block.children.load(Relaxed), block.open.load(Relaxed));
        if ending {
            block.endings.fetch_add(1, Relaxed);
            block.open.store(open + 1, Relaxed);
        } else {
            block.children.store(children + 1, Relaxed);
        }
        if children + open == 0 {
            return;
        }
        if !ending && open > 0 {
            block.open.store(open - 1, Relaxed);
        } else {
            self.conversations.fetch_add(1, Relaxed);
            self.climb(parent, |branches| branches + 1);
        }
    }

    /// Counts the removal of an entry behind `parent` that had no followers.
    fn remove_below(&self, parent: u32, ending: bool) {
        let block = self.at(parent);
        let (endings, open) = (block.endings.load(Relaxed), block.open.load(Relaxed));
        // Which ending a child replaced is unknown: the first removed one counts as replaced.
        let taken = endings > open;
        match (ending, taken) {
            (true, true) => return block.endings.store(endings - 1, Relaxed),
            (true, false) => {
                block.endings.store(endings - 1, Relaxed);
                block.open.store(open - 1, Relaxed);
            }
            (false, taken) => {
                block.children.fetch_sub(1, Relaxed);
                if taken {
                    // The conversation end_hit again where its opening ended.
                    return block.open.store(open + 1, Relaxed);
                }
            }
        }
        if block.children.load(Relaxed) + block.open.load(Relaxed) > 0 {
            self.conversations.fetch_sub(1, Relaxed);
            self.climb(parent, |branches| branches - 1);
        }
    }

    /// Changes the branches of a block and of all blocks above it. The cost is the length of the path, as for
    /// `learn`, once for each branch.
    fn climb(&self, at: u32, change: impl Fn(u32) -> u32) {
        let mut at = at;
        while at != NO_ENTRY {
            let block = self.at(at);
            block.branches.store(change(block.branches.load(Relaxed)), Relaxed);
            at = block.parent.load(Relaxed);
        }
    }

    fn take(&self, vacant: &mut Vacant) -> Option<u32> {
        if vacant.freed != NO_ENTRY {
            let at = vacant.freed;
            vacant.freed = self.at(at).parent.load(Relaxed);
            return Some(at);
        }
        let at = vacant.fresh;
        ((at as usize) < self.parts.len() * BLOCKS_PER_PART).then(|| {
            vacant.fresh += 1;
            at
        })
    }

    fn word(&self, at: u32, word: usize) -> &AtomicU64 {
        let Some(more) = word.checked_sub(1) else { return &self.at(at).holders };
        // In order, so that a reader may stop at the first part that does not exist yet.
        let mut words = self.more[..=more].iter().map(|word| word.get_or_init(|| parts(self.parts.len())));
        let Some(parts) = words.nth(more) else { return &self.at(at).holders };
        let part = &parts[at as usize / BLOCKS_PER_PART];
        &part.get_or_init(|| (0..BLOCKS_PER_PART).map(|_| AtomicU64::new(0)).collect())
            [at as usize % BLOCKS_PER_PART]
    }
}

// === impl Links for BlockTable ===

impl Links for BlockTable {
    fn hash(&self, at: u32) -> u64 {
        self.mixed(self.at(at).hash.load(Relaxed))
    }

    fn next(&self, at: u32) -> u32 {
        self.at(at).next.load(Acquire)
    }

    fn link(&self, at: u32, next: u32) {
        self.at(at).next.store(next, Release);
    }
}

impl Block {
    fn vacant() -> Self {
        let [next, parent, branches, children, endings, open] =
            [NO_ENTRY, NO_ENTRY, 0, 0, 0, 0].map(AtomicU32::new);
        Block {
            hash: AtomicU64::new(0),
            holders: AtomicU64::new(0),
            next,
            parent,
            branches,
            children,
            endings,
            open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Computes the branches by the formula of the module's header.
    fn expected_branches(blocks: &BlockTable, at: u32, alive: &[u32]) -> u32 {
        let children = alive.iter().filter(|child| blocks.at(**child).parent.load(Relaxed) == at);
        let below: u32 = children.map(|child| expected_branches(blocks, *child, alive)).sum();
        (blocks.at(at).open.load(Relaxed) + below).max(1)
    }

    proptest! {
        #[test]
        fn counts_branches_by_the_formula(
            steps in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..60),
        ) {
            let (blocks, mut vacant) = (BlockTable::new(1000, 1), Vacant::default());
            let mut alive: Vec<u32> = Vec::new();
            for (number, (which, what)) in (1u64..).zip(steps) {
                let any = alive.get(which.index(alive.len().max(1))).copied();
                let parent = any.filter(|at| !blocks.is_ending(*at));
                let leaf = any.filter(|at| {
                    let block = blocks.at(*at);
                    block.children.load(Relaxed) + block.endings.load(Relaxed) == 0
                });
                match (what, parent, leaf) {
                    (0..3, _, Some(leaf)) => {
                        // The parents are held, so they stay.
                        blocks.release(&mut vacant, leaf, 3);
                        alive.retain(|at| *at != leaf);
                    }
                    (3..5, Some(parent), _) => alive.extend(blocks.add(&mut vacant, number, parent, true)),
                    _ => alive.extend(blocks.add(&mut vacant, number, parent.unwrap_or(NO_ENTRY), false)),
                }
                alive.iter().for_each(|at| blocks.hold(*at, 3));
                for &at in alive.iter().filter(|at| !blocks.is_ending(**at)) {
                    let full: Vec<u32> =
                        alive.iter().copied().filter(|at| !blocks.is_ending(*at)).collect();
                    prop_assert_eq!(blocks.branches(at), expected_branches(&blocks, at, &full));
                }
            }
            prop_assert_eq!(blocks.len(), alive.len());
            let first = alive.iter().filter(|at| blocks.at(**at).parent.load(Relaxed) == NO_ENTRY);
            prop_assert_eq!(blocks.conversations(), first.map(|at| blocks.branches(*at)).sum::<u32>());
        }
    }

    #[test]
    fn frees_a_block_with_its_last_holder_in_any_word() {
        let (blocks, mut vacant) = (BlockTable::new(10, 1), Vacant::default());
        let at = blocks.add(&mut vacant, 9, NO_ENTRY, false).expect("there is room");
        blocks.hold(at, 5);
        blocks.hold(at, 64 * 3 + 1);
        blocks.release(&mut vacant, at, 5);
        assert_eq!(blocks.find(9), at);
        assert!(blocks.is_held_by(at, 193) && !blocks.is_held_by(at, 5) && !blocks.is_held_by(at, 65));
        blocks.release(&mut vacant, at, 193);
        assert_eq!((blocks.find(9), blocks.len()), (NO_ENTRY, 0));
    }

    #[test]
    fn keeps_a_parent_without_holders_while_a_block_follows_it() {
        let (blocks, mut vacant) = (BlockTable::new(10, 1), Vacant::default());
        let parent = blocks.add(&mut vacant, 1, NO_ENTRY, false).expect("there is room");
        let child = blocks.add(&mut vacant, 2, parent, false).expect("there is room");
        blocks.hold(parent, 0);
        blocks.hold(child, 0);
        blocks.release(&mut vacant, parent, 0);
        assert_eq!(blocks.len(), 2);
        blocks.release(&mut vacant, child, 0);
        assert_eq!(blocks.len(), 0);
    }
}
