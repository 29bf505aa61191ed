//! The blocks that some upstream is believed to hold: the holders of each, its parent, and the number of
//! conversations through it. Of a long chain only some blocks are stored: see `thinning`.
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
//!
//! A new branch counts at every block above it. One call does a bounded part of that: the rest waits in
//! `BranchChanges`, and later calls complete it.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};

use super::branch_changes::BranchChanges;
use super::directory::{Directory, Links, NO_ENTRY, mix};
use crate::prompt::chain::thinning::{stored_count, stored_depth, stored_weight};

/// The number of columns in one word of holders. The first word is part of the block; further words are
/// allocated when there are more upstreams.
pub(super) const WORD_BITS: usize = u64::BITS as usize;

/// The largest number of words of holders.
pub(super) const MAX_HOLDER_WORDS: usize = 64;

/// The number of blocks that are allocated at a time.
const BLOCKS_PER_PART: usize = 1 << 13;

/// The bit of `parent` that marks an ending.
const ENDING_BIT: u32 = 1 << 31;

/// The bits of `place` that hold the depth.
const DEPTH_BITS: u32 = 24;

/// The largest depth of a block.
const MAX_DEPTH: usize = (1 << DEPTH_BITS) - 1;

/// The default of `TableWriter::climb_blocks`: a prompt of 900 KB.
const MAX_CLIMB_BLOCKS: usize = 256;

/// The number of groups of upstreams whose conversations are counted apart.
pub(super) const MAX_GROUPS: usize = 1 << (u32::BITS - DEPTH_BITS);

/// One block, or an ending.
struct Block {
    hash: AtomicU64,
    holders: AtomicU64,
    next: AtomicU32,
    /// The parent, with `ENDING_BIT`; in a vacant entry, the next vacant one.
    parent: AtomicU32,
    /// The depth in the prompt, and behind it the group of the chain's first upstream; 0 in a vacant entry.
    /// An ending has the depth of its parent.
    place: AtomicU32,
    /// Wrapping: while changes wait, the number may be off by them.
    branches: AtomicU32,
    children: AtomicU32,
    endings: AtomicU32,
    /// The endings that no child has replaced.
    open: AtomicU32,
}

/// The place of a new block.
#[derive(Clone, Copy, Debug)]
pub(super) enum BlockParent {
    /// The block is the first of a chain that an upstream of this group was sent.
    None { group: u8 },
    /// The block follows this one.
    Block(u32),
}

/// Parts of an array that are allocated at their first use.
type LazyParts<T> = Box<[OnceLock<Box<[T]>>]>;

/// All blocks, with a directory by hash.
pub(super) struct BlockTable {
    parts: LazyParts<Block>,
    /// The words of holders after the first.
    more: Box<[OnceLock<LazyParts<AtomicU64>>]>,
    directory: Directory,
    /// The sum of the branches of all first blocks of each group.
    conversations: Box<[AtomicU32]>,
    /// The number of endings, and of the blocks that the stored blocks stand for.
    size: AtomicUsize,
    seed: u64,
    /// The number of accesses to blocks.
    #[cfg(test)]
    pub touched: AtomicUsize,
}

/// What the writer of the table owns beside it.
#[derive(Debug)]
pub(super) struct TableWriter {
    /// The first entry that was never used.
    fresh: u32,
    /// The first freed entry.
    freed: u32,
    /// The changes of branches that are not complete.
    changes: BranchChanges,
    /// The largest number of blocks whose branches one new or removed branch changes at once.
    climb_blocks: usize,
}

impl Default for TableWriter {
    fn default() -> Self {
        let changes = BranchChanges::default();
        TableWriter { fresh: 0, freed: NO_ENTRY, changes, climb_blocks: MAX_CLIMB_BLOCKS }
    }
}

/// Returns the depth of a block behind another one.
fn depth_behind(parent: usize) -> usize {
    stored_depth(stored_count(parent) + 1)
}

fn parts<T>(count: usize) -> LazyParts<T> {
    (0..count).map(|_| OnceLock::new()).collect()
}

// === impl BlockTable: for readers ===

impl BlockTable {
    /// Builds a table of at most `max_blocks`. Clients must not know `seed`.
    pub(super) fn new(max_blocks: usize, seed: u64) -> Self {
        BlockTable {
            parts: parts(max_blocks.div_ceil(BLOCKS_PER_PART).max(1)),
            more: parts(MAX_HOLDER_WORDS - 1),
            directory: Directory::new(max_blocks),
            conversations: (0..MAX_GROUPS).map(|_| AtomicU32::new(0)).collect(),
            size: AtomicUsize::new(0),
            seed,
            #[cfg(test)]
            touched: AtomicUsize::new(0),
        }
    }

    /// Returns the number of endings, and of the blocks that the stored blocks stand for.
    pub(super) fn len(&self) -> usize {
        self.size.load(Relaxed)
    }

    /// Returns the memory in bytes.
    pub(super) fn bytes(&self) -> usize {
        let made = |count: usize, size: usize| count * BLOCKS_PER_PART * size;
        let blocks = made(self.parts.iter().filter(|part| part.get().is_some()).count(), size_of::<Block>());
        let words = self.more.iter().filter_map(OnceLock::get).flat_map(|word| word.iter());
        let words = made(words.filter(|part| part.get().is_some()).count(), size_of::<AtomicU64>());
        blocks + words + self.directory.bytes() + size_of_val(&*self.conversations)
    }

    /// Finds the block; `NO_ENTRY` when no upstream holds it.
    pub(super) fn find(&self, hash: u64) -> u32 {
        let is = |at: u32| self.at(at).hash.load(Relaxed) == hash;
        match self.directory.glance(self, self.mixed(hash), is) {
            NO_ENTRY => self.directory.find(self, self.mixed(hash), is),
            at => at,
        }
    }

    /// As `find`, for the block behind another one in a chain. Blocks that were learned together are mostly
    /// adjacent, so this checks the next entry first, which the processor has fetched already.
    pub(super) fn find_after(&self, before: u32, hash: u64) -> u32 {
        let next = before.wrapping_add(1);
        let part = self.parts.get(next as usize / BLOCKS_PER_PART).and_then(OnceLock::get);
        // A vacant entry keeps its old hash, but has no place.
        match part.map(|part| &part[next as usize % BLOCKS_PER_PART]) {
            Some(block) if block.hash.load(Acquire) == hash && block.place.load(Acquire) != 0 => next,
            _ => self.find(hash),
        }
    }

    /// Returns one word of the holders of an entry.
    pub(super) fn holders(&self, at: u32, word: usize) -> u64 {
        match word.checked_sub(1) {
            None => self.at(at).holders.load(Acquire),
            Some(more) => self.more[more].get().map_or(0, |parts| {
                parts[at as usize / BLOCKS_PER_PART]
                    .get()
                    .map_or(0, |part| part[at as usize % BLOCKS_PER_PART].load(Acquire))
            }),
        }
    }

    /// Returns the number of conversations in the group of a block's chain.
    pub(super) fn conversations(&self, at: u32) -> u32 {
        self.conversations_of(self.at(at).place.load(Relaxed)).load(Relaxed)
    }

    /// Returns the number of conversations through a block.
    pub(super) fn branches(&self, at: u32) -> u32 {
        self.at(at).branches.load(Relaxed).cast_signed().max(1).cast_unsigned()
    }

    /// Returns the number of blocks in the prompt up to and including this one.
    pub(super) fn depth(&self, at: u32) -> usize {
        (self.at(at).place.load(Relaxed) as usize) & MAX_DEPTH
    }

    /// Returns the number of blocks that the entry stands for; an ending counts as one.
    pub(super) fn weight(&self, at: u32) -> usize {
        if self.is_ending(at) { 1 } else { stored_weight(self.depth(at)) }
    }

    fn conversations_of(&self, place: u32) -> &AtomicU32 {
        &self.conversations[(place >> DEPTH_BITS) as usize]
    }

    /// Whether the entry still has this hash.
    pub(super) fn is(&self, at: u32, hash: u64) -> bool {
        self.at(at).hash.load(Relaxed) == hash
    }

    fn at(&self, at: u32) -> &Block {
        #[cfg(test)]
        self.touched.fetch_add(1, Relaxed);
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
    /// Adds a block behind its parent, or the first one of a chain of a group; `None` when there is no room.
    pub(super) fn add(
        &self,
        writer: &mut TableWriter,
        hash: u64,
        parent: BlockParent,
        ending: bool,
    ) -> Option<u32> {
        let (above, place) = match parent {
            BlockParent::None { group } => (NO_ENTRY, u32::from(group) << DEPTH_BITS | 1),
            BlockParent::Block(above) => {
                let (depth, place) = (self.depth(above), self.at(above).place.load(Relaxed));
                let own = if ending { depth } else { depth_behind(depth) };
                (above, place - depth as u32 + own as u32)
            }
        };
        let at = self.take(writer).filter(|_| (place as usize & MAX_DEPTH) < MAX_DEPTH)?;
        let block = self.at(at);
        block.hash.store(hash, Relaxed);
        block.parent.store(if ending { above | ENDING_BIT } else { above }, Relaxed);
        block.branches.store(1, Relaxed);
        block.place.store(place, Release);
        self.directory.add(self, self.mixed(hash), at);
        self.size.fetch_add(self.weight(at), Relaxed);
        if above == NO_ENTRY {
            self.conversations_of(place).fetch_add(1, Relaxed);
        } else {
            self.add_below(writer, above, ending);
        }
        Some(at)
    }

    /// Whether this block follows that parent. A hash covers all blocks before it, so another parent means an
    /// invalid chain.
    pub(super) fn follows(&self, at: u32, parent: u32, ending: bool) -> bool {
        self.at(at).parent.load(Relaxed) == if ending { parent | ENDING_BIT } else { parent }
    }

    /// Whether the entry is an ending.
    pub(super) fn is_ending(&self, at: u32) -> bool {
        let parent = self.at(at).parent.load(Relaxed);
        parent != NO_ENTRY && parent & ENDING_BIT != 0
    }

    /// Returns the hash of a block.
    pub(super) fn block_hash(&self, at: u32) -> u64 {
        self.at(at).hash.load(Relaxed)
    }

    /// Returns the block before this one; a block stays while another follows it. `NO_ENTRY`: it is the
    /// first of its chain.
    pub(super) fn parent(&self, at: u32) -> u32 {
        match self.at(at).parent.load(Relaxed) {
            NO_ENTRY => NO_ENTRY,
            parent => parent & !ENDING_BIT,
        }
    }

    /// Whether the column holds the block.
    pub(super) fn is_held_by(&self, at: u32, column: usize) -> bool {
        self.holders(at, column / WORD_BITS) & (1 << (column % WORD_BITS)) != 0
    }

    /// Adds a holder.
    pub(super) fn hold(&self, at: u32, column: usize) {
        self.word(at, column / WORD_BITS).fetch_or(1 << (column % WORD_BITS), Release);
    }

    /// Removes a holder. A block without holders is freed, unless another block follows it.
    pub(super) fn release(&self, writer: &mut TableWriter, at: u32, column: usize) {
        self.word(at, column / WORD_BITS).fetch_and(!(1 << (column % WORD_BITS)), Release);
        let mut at = at;
        while at != NO_ENTRY && self.is_unused(at) {
            let (block, ending, parent) = (self.at(at), self.is_ending(at), self.parent(at));
            let place = block.place.load(Relaxed);
            self.directory.remove(self, self.hash(at), at);
            self.size.fetch_sub(self.weight(at), Relaxed);
            block.place.store(0, Release);
            block.parent.store(writer.freed, Relaxed);
            writer.freed = at;
            let waiting = writer.changes.take(at);
            if parent == NO_ENTRY {
                self.conversations_of(place).fetch_sub(1, Relaxed);
            } else {
                writer.changes.put(parent, waiting);
                self.remove_below(writer, parent, ending);
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
    fn add_below(&self, writer: &mut TableWriter, parent: u32, ending: bool) {
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
            self.conversations_of(block.place.load(Relaxed)).fetch_add(1, Relaxed);
            self.climb(writer, parent, 1, writer.climb_blocks);
        }
    }

    /// Counts the removal of an entry behind `parent` that had no followers.
    fn remove_below(&self, writer: &mut TableWriter, parent: u32, ending: bool) {
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
            self.conversations_of(block.place.load(Relaxed)).fetch_sub(1, Relaxed);
            self.climb(writer, parent, -1, writer.climb_blocks);
        }
    }

    /// Completes waiting changes of branches, of at most `max_blocks` blocks.
    pub(super) fn settle(&self, writer: &mut TableWriter, max_blocks: usize) {
        let mut left = max_blocks;
        while left > 0 {
            let Some((at, change)) = writer.changes.pop() else { return };
            left = self.climb(writer, at, change, left);
        }
    }

    /// Changes the branches of a block and of the blocks above it, at most `max_blocks`; the rest waits.
    /// Takes waiting changes along. Returns how many more blocks could have been changed.
    fn climb(&self, writer: &mut TableWriter, at: u32, change: i32, max_blocks: usize) -> usize {
        let (mut at, mut change, mut left) = (at, change, max_blocks);
        while at != NO_ENTRY {
            change += writer.changes.take(at);
            if change == 0 {
                break;
            }
            if left == 0 {
                writer.changes.put(at, change);
                break;
            }
            let block = self.at(at);
            block.branches.store(block.branches.load(Relaxed).wrapping_add_signed(change), Relaxed);
            at = block.parent.load(Relaxed);
            left -= 1;
        }
        left
    }

    fn take(&self, writer: &mut TableWriter) -> Option<u32> {
        if writer.freed != NO_ENTRY {
            let at = writer.freed;
            writer.freed = self.at(at).parent.load(Relaxed);
            return Some(at);
        }
        let at = writer.fresh;
        ((at as usize) < self.parts.len() * BLOCKS_PER_PART).then(|| {
            writer.fresh += 1;
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
        let [next, parent, place, branches, children, endings, open] =
            [NO_ENTRY, NO_ENTRY, 0, 0, 0, 0, 0].map(AtomicU32::new);
        Block {
            hash: AtomicU64::new(0),
            holders: AtomicU64::new(0),
            next,
            parent,
            place,
            branches,
            children,
            endings,
            open,
        }
    }
}

#[cfg(test)]
mod tests;
