//! The blocks that some upstream is believed to hold: the holders of each, its predecessor, and the number
//! of conversations through it.
//!
//! Readers go straight to the fields, which are atomics, and the one writer changes them under its lock
//! (see `local`). A block's place is used again after it went, so a reader looks at the name once more after
//! it has read the rest.
//!
//! Blocks form trees, a child being what was seen to follow its parent. `branches` of a block is the number
//! of conversations that end below it:
//!
//! ```text
//! branches(b) = max(1, open(b) + sum over the children c of b of branches(c))
//! ```
//!
//! `open` counts the endings of b: openings of conversations that went on for less than a block after it.
//! When such a conversation goes on, its next prompt makes a child where its opening made an ending; so a
//! child takes an open ending's place instead of counting beside it. That way a conversation counts once,
//! however many turns it has, and a hundred short questions behind one long system prompt count a hundred.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::directory::{Directory, Links, NIL, mix};

/// Upstreams that one word of holders has room for. The first words stand in the blocks themselves; more
/// are made when there are more upstreams.
pub const WORD: usize = u64::BITS as usize;

/// Words of holders that there may be.
pub const MAX_HOLDER_WORDS: usize = 64;

/// Blocks that are made at a time.
const BLOCKS_PER_PART: usize = 1 << 13;

/// In the parent's place, the mark of an ending.
const ENDING: u32 = 1 << 31;

struct Block {
    hash: AtomicU64,
    holders: AtomicU64,
    next: AtomicU32,
    /// The parent, and the mark. In a vacant place, the next vacant one.
    parent: AtomicU32,
    /// 0 in a vacant place.
    branches: AtomicU32,
    children: AtomicU32,
    endings: AtomicU32,
    /// Endings that no child took the place of.
    open: AtomicU32,
}

/// Parts of something that are made when they are first used.
type LazyParts<T> = Box<[OnceLock<Box<[T]>>]>;

pub struct BlockTable {
    parts: LazyParts<Block>,
    /// The words of holders after the first.
    more: Box<[OnceLock<LazyParts<AtomicU64>>]>,
    directory: Directory,
    /// Branches of all blocks that nothing comes before.
    conversations: AtomicU32,
    seed: u64,
}

/// Places for blocks; the writer's.
#[derive(Debug)]
pub struct Vacant {
    /// Never used from here on.
    fresh: u32,
    /// The first of those that were used before.
    freed: u32,
}

impl Default for Vacant {
    fn default() -> Self {
        Vacant { fresh: 0, freed: NIL }
    }
}

fn parts<T>(count: usize) -> LazyParts<T> {
    (0..count).map(|_| OnceLock::new()).collect()
}

// === impl Blocks: for readers ===

impl BlockTable {
    /// Makes room for `most` blocks. Clients must not know `seed`.
    pub fn new(most: usize, seed: u64) -> Self {
        BlockTable {
            parts: parts(most.div_ceil(BLOCKS_PER_PART).max(1)),
            more: parts(MAX_HOLDER_WORDS - 1),
            directory: Directory::new(most),
            conversations: AtomicU32::new(0),
            seed,
        }
    }

    pub fn len(&self) -> usize {
        self.directory.len()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        let made = |count: usize, size: usize| count * BLOCKS_PER_PART * size;
        let blocks = made(self.parts.iter().filter(|part| part.get().is_some()).count(), size_of::<Block>());
        let words = self.more.iter().filter_map(OnceLock::get).flat_map(|word| word.iter());
        let words = made(words.filter(|part| part.get().is_some()).count(), size_of::<AtomicU64>());
        blocks + words + self.directory.bytes()
    }

    /// Finds the block; `NIL` when no upstream holds it.
    pub fn find(&self, hash: u64) -> u32 {
        let is = |at: u32| self.at(at).hash.load(Relaxed) == hash;
        match self.directory.glance(self, self.mixed(hash), is) {
            NIL => self.directory.find(self, self.mixed(hash), is),
            at => at,
        }
    }

    /// The same, for the block that comes after another in a chain. What is learnt at once mostly lies side
    /// by side, so it is most likely the next place, which the processor has fetched already.
    pub fn find_after(&self, before: u32, hash: u64) -> u32 {
        let next = before.wrapping_add(1);
        let part = self.parts.get(next as usize / BLOCKS_PER_PART).and_then(OnceLock::get);
        // A vacant place has its old name still, and no branches.
        match part.map(|part| &part[next as usize % BLOCKS_PER_PART]) {
            Some(block) if block.hash.load(Acquire) == hash && block.branches.load(Acquire) != 0 => next,
            _ => self.find(hash),
        }
    }

    /// A word of the holders of what was found at a place.
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

    /// Conversations that go through any block at all.
    pub fn conversations(&self) -> u32 {
        self.conversations.load(Relaxed)
    }

    pub fn branches(&self, at: u32) -> u32 {
        self.at(at).branches.load(Relaxed)
    }

    /// Whether the place is still that block's.
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

// === impl Blocks: for the writer ===

impl BlockTable {
    /// Takes in a block that is not there, behind its parent; `None` when there is no room.
    pub fn add(&self, vacant: &mut Vacant, hash: u64, parent: u32, ending: bool) -> Option<u32> {
        let at = self.take(vacant)?;
        let block = self.at(at);
        block.hash.store(hash, Relaxed);
        block.parent.store(if ending { parent | ENDING } else { parent }, Relaxed);
        block.branches.store(1, Release);
        self.directory.add(self, self.mixed(hash), at);
        if parent == NIL {
            self.conversations.fetch_add(1, Relaxed);
        } else {
            self.born(parent, ending);
        }
        Some(at)
    }

    /// Whether this block follows that parent. Chains name a block after all before it, so anything else is
    /// a mistake in the chain.
    pub fn follows(&self, at: u32, parent: u32, ending: bool) -> bool {
        self.at(at).parent.load(Relaxed) == if ending { parent | ENDING } else { parent }
    }

    pub fn is_ending(&self, at: u32) -> bool {
        let parent = self.at(at).parent.load(Relaxed);
        parent != NIL && parent & ENDING != 0
    }

    /// The block's name.
    pub fn name(&self, at: u32) -> u64 {
        self.at(at).hash.load(Relaxed)
    }

    /// All places from a block up to the first of its chain. Blocks stay while something follows them, so
    /// none of them is missing.
    pub fn above(&self, at: u32, path: &mut Vec<u32>) {
        let mut at = at;
        while at != NIL {
            path.push(at);
            at = self.at(at).parent.load(Relaxed);
        }
    }

    pub fn is_held_by(&self, at: u32, column: usize) -> bool {
        self.holders(at, column / WORD) & (1 << (column % WORD)) != 0
    }

    pub fn hold(&self, at: u32, column: usize) {
        self.word(at, column / WORD).fetch_or(1 << (column % WORD), Release);
    }

    /// Removes a holder. A block without holders is freed, unless another block follows it.
    pub fn release(&self, vacant: &mut Vacant, at: u32, column: usize) {
        self.word(at, column / WORD).fetch_and(!(1 << (column % WORD)), Release);
        let mut at = at;
        while at != NIL && self.is_forlorn(at) {
            let (block, ending) = (self.at(at), self.is_ending(at));
            let parent = match block.parent.load(Relaxed) {
                NIL => NIL,
                parent => parent & !ENDING,
            };
            self.directory.remove(self, self.hash(at), at);
            block.branches.store(0, Release);
            block.parent.store(vacant.freed, Relaxed);
            vacant.freed = at;
            if parent == NIL {
                self.conversations.fetch_sub(1, Relaxed);
            } else {
                self.died(parent, ending);
            }
            at = parent;
        }
    }

    fn is_forlorn(&self, at: u32) -> bool {
        let block = self.at(at);
        let alone = block.children.load(Relaxed) + block.endings.load(Relaxed) == 0;
        let words = 1 + self.more.iter().take_while(|word| word.get().is_some()).count();
        alone && (0..words).all(|word| self.holders(at, word) == 0)
    }

    /// One more follows `parent`: at its only end nothing changes, the conversation just goes on.
    fn born(&self, parent: u32, ending: bool) {
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

    /// One that followed `parent`, and that nothing followed, went.
    fn died(&self, parent: u32, ending: bool) {
        let block = self.at(parent);
        let (endings, open) = (block.endings.load(Relaxed), block.open.load(Relaxed));
        // Which ending a child took the place of is not known: it is said of the first to go.
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
                    // The conversation ends again where it did before.
                    return block.open.store(open + 1, Relaxed);
                }
            }
        }
        if block.children.load(Relaxed) + block.open.load(Relaxed) > 0 {
            self.conversations.fetch_sub(1, Relaxed);
            self.climb(parent, |branches| branches - 1);
        }
    }

    /// Changes the branches of a block and of all above it. As long as the path, and once in the life of a
    /// branch; the path itself was walked to learn it.
    fn climb(&self, at: u32, change: impl Fn(u32) -> u32) {
        let mut at = at;
        while at != NIL {
            let block = self.at(at);
            block.branches.store(change(block.branches.load(Relaxed)), Relaxed);
            at = block.parent.load(Relaxed);
        }
    }

    fn take(&self, vacant: &mut Vacant) -> Option<u32> {
        if vacant.freed != NIL {
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

// === impl Links for Blocks ===

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
        let [next, parent, branches, children, endings, open] = [NIL, NIL, 0, 0, 0, 0].map(AtomicU32::new);
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

    /// What the header says, from the fields.
    fn told(blocks: &BlockTable, at: u32, alive: &[u32]) -> u32 {
        let children = alive.iter().filter(|child| blocks.at(**child).parent.load(Relaxed) == at);
        let below: u32 = children.map(|child| told(blocks, *child, alive)).sum();
        (blocks.at(at).open.load(Relaxed) + below).max(1)
    }

    proptest! {
        #[test]
        fn branches_are_what_the_header_says(
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
                        // Its parents are held, and stay.
                        blocks.release(&mut vacant, leaf, 3);
                        alive.retain(|at| *at != leaf);
                    }
                    (3..5, Some(parent), _) => alive.extend(blocks.add(&mut vacant, number, parent, true)),
                    _ => alive.extend(blocks.add(&mut vacant, number, parent.unwrap_or(NIL), false)),
                }
                alive.iter().for_each(|at| blocks.hold(*at, 3));
                for &at in alive.iter().filter(|at| !blocks.is_ending(**at)) {
                    let full: Vec<u32> =
                        alive.iter().copied().filter(|at| !blocks.is_ending(*at)).collect();
                    prop_assert_eq!(blocks.branches(at), told(&blocks, at, &full));
                }
            }
            prop_assert_eq!(blocks.len(), alive.len());
            let first = alive.iter().filter(|at| blocks.at(**at).parent.load(Relaxed) == NIL);
            prop_assert_eq!(blocks.conversations(), first.map(|at| blocks.branches(*at)).sum::<u32>());
        }
    }

    #[test]
    fn a_block_goes_with_its_last_holder_in_any_word() {
        let (blocks, mut vacant) = (BlockTable::new(10, 1), Vacant::default());
        let at = blocks.add(&mut vacant, 9, NIL, false).expect("there is room");
        blocks.hold(at, 5);
        blocks.hold(at, 64 * 3 + 1);
        blocks.release(&mut vacant, at, 5);
        assert_eq!(blocks.find(9), at);
        assert!(blocks.is_held_by(at, 193) && !blocks.is_held_by(at, 5) && !blocks.is_held_by(at, 65));
        blocks.release(&mut vacant, at, 193);
        assert_eq!((blocks.find(9), blocks.len()), (NIL, 0));
    }

    #[test]
    fn a_parent_outlives_its_holders_while_something_follows_it() {
        let (blocks, mut vacant) = (BlockTable::new(10, 1), Vacant::default());
        let parent = blocks.add(&mut vacant, 1, NIL, false).expect("there is room");
        let child = blocks.add(&mut vacant, 2, parent, false).expect("there is room");
        blocks.hold(parent, 0);
        blocks.hold(child, 0);
        blocks.release(&mut vacant, parent, 0);
        assert_eq!(blocks.len(), 2);
        blocks.release(&mut vacant, child, 0);
        assert_eq!(blocks.len(), 0);
    }
}
