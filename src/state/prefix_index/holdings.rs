//! The pairs of block and upstream, and the order in which each upstream's pairs are evicted.
//!
//! A column is one upstream's bit among the holders of every block. A column that holds a block holds its
//! parent too. So only leaves can be evicted: pairs without a child in the column. A list orders them from
//! the least to the most recent. When the last child of a pair is removed, the pair becomes a leaf and takes
//! the child's place in the list, unless it was learned itself later: then it is in the list already.
//!
//! Thus learning a longer prompt touches its new pairs and the one before them, and the order of eviction is
//! the same as if every pair of the prompt had become the most recent one, the first last.
//!
//! Owned by the writer, under its lock.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use super::directory::{Directory, Links, NO_ENTRY};

/// The number of pairs that are allocated at a time.
const HOLDINGS_PER_PART: usize = 1 << 13;

/// The count of calls of `learn`, in place of a clock. It wraps after four billion; then a pair that was
/// idle for two billion counts as recent once, and another pair is evicted first.
pub(super) type Tick = u32;

/// Whether the first tick is later.
pub(super) fn is_after(one: Tick, other: Tick) -> bool {
    one.wrapping_sub(other).cast_signed() > 0
}

/// The value of `older` in a pair that is not in the list.
const NOT_LISTED: u32 = NO_ENTRY - 1;

/// One pair of block and column.
struct Holding {
    block: u32,
    column: u16,
    /// How often a prompt that ends here was learned and not undone. A removed child adds its own.
    claims: u16,
    /// When the pair got its place in the list.
    tick: Tick,
    older: u32,
    newer: u32,
    next: AtomicU32,
    /// The pair of the block's parent; `NO_ENTRY`: the block is the first of its chain.
    parent: u32,
    /// The number of pairs of the column whose parent is this one.
    children: u32,
}

/// The pairs of one column.
#[derive(Clone, Debug)]
pub(super) struct Column {
    oldest: u32,
    newest: u32,
    /// The number of blocks that the pairs stand for; endings take no room in an engine's cache.
    pub blocks: usize,
    /// The largest number of blocks.
    pub limit: usize,
    /// The tick of the latest evicted pair.
    pub evicted: Tick,
}

/// The blocks that a pair stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PairWeight {
    /// Towards the limit of all pairs.
    pub all: usize,
    /// Towards the capacity of the upstream's cache: 0 for an ending.
    pub cached: usize,
}

/// All pairs of all columns.
pub(super) struct Holdings {
    pairs: HoldingTable,
    freed: u32,
    fresh: u32,
    directory: Directory,
    columns: Vec<Column>,
    /// The sum of the weights of all pairs.
    weight: usize,
    /// The pair that was found last. Pairs that were added together are adjacent, so the next one is likely
    /// the next entry.
    last: u32,
}

/// The arena of pairs, in parts, so that growing never copies.
struct HoldingTable {
    parts: Vec<Box<[Holding]>>,
    /// The number of accesses to pairs.
    #[cfg(test)]
    touched: std::cell::Cell<usize>,
}

// === impl Holdings ===

impl Holdings {
    /// Builds an arena for about `max_pairs`.
    pub(super) fn new(max_pairs: usize) -> Self {
        Holdings {
            pairs: HoldingTable {
                parts: Vec::new(),
                #[cfg(test)]
                touched: std::cell::Cell::new(0),
            },
            freed: NO_ENTRY,
            fresh: 0,
            directory: Directory::new(max_pairs),
            columns: Vec::new(),
            weight: 0,
            last: NO_ENTRY,
        }
    }

    /// Returns the number of blocks and endings that all pairs stand for.
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    /// Returns the memory in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.pairs.parts.len() * HOLDINGS_PER_PART * size_of::<Holding>() + self.directory.bytes()
    }

    /// Starts an empty column at this tick.
    pub(super) fn begin(&mut self, column: usize, limit: usize, tick: Tick) {
        let empty = Column { oldest: NO_ENTRY, newest: NO_ENTRY, blocks: 0, limit, evicted: tick };
        if self.columns.len() <= column {
            self.columns.resize(column + 1, empty.clone());
        }
        self.columns[column] = empty;
    }

    /// Returns a column.
    pub(super) fn column(&mut self, column: usize) -> &mut Column {
        &mut self.columns[column]
    }

    /// Returns the least recent leaf of a column, and its tick.
    pub(super) fn oldest(&mut self, column: usize) -> Option<(u32, Tick)> {
        loop {
            let at = self.columns[column].oldest;
            if at == NO_ENTRY {
                return None;
            }
            let pair = self.pairs.at(at);
            if pair.children == 0 {
                return Some((at, pair.tick));
            }
            // The pair was learned itself before its children were: their places count.
            self.unlink(at);
        }
    }

    /// Returns the blocks of the leaves of a column, the least recent first.
    pub(super) fn leaves(&self, column: usize) -> impl Iterator<Item = u32> {
        let present = |at: u32| (at != NO_ENTRY).then(|| self.pairs.at(at));
        let listed =
            std::iter::successors(present(self.columns[column].oldest), move |pair| present(pair.newer));
        listed.filter(|pair| pair.children == 0).map(|pair| pair.block)
    }

    /// Adds a pair behind the pair of its parent. The caller adds a child or claims the pair, which puts it
    /// into the list.
    pub(super) fn add(&mut self, block: u32, column: usize, parent: u32, weight: PairWeight) -> u32 {
        let at = self.take();
        let pair = self.pairs.at_mut(at);
        (pair.block, pair.column, pair.claims, pair.tick) = (block, column as u16, 0, 0);
        (pair.parent, pair.children) = (parent, 0);
        (pair.older, pair.newer) = (NOT_LISTED, NO_ENTRY);
        self.directory.add(&self.pairs, pair_key(block, column as u16), at);
        if parent != NO_ENTRY {
            // The child will be more recent.
            self.unlink(parent);
            self.pairs.at_mut(parent).children += 1;
        }
        self.weight += weight.all;
        self.columns[column].blocks += weight.cached;
        at
    }

    /// Adds a claim of a pair and makes it the most recent one.
    pub(super) fn claim(&mut self, at: u32, tick: Tick) {
        self.unlink(at);
        let pair = self.pairs.at_mut(at);
        pair.tick = tick;
        pair.claims = pair.claims.saturating_add(1);
        let column = usize::from(pair.column);
        let newest = self.columns[column].newest;
        self.link(at, newest);
    }

    /// Removes one claim. A saturated count stays.
    pub(super) fn unclaim(&mut self, at: u32) {
        let pair = self.pairs.at_mut(at);
        if pair.claims < u16::MAX {
            pair.claims = pair.claims.saturating_sub(1);
        }
    }

    /// Whether no prompt needs the pair: it has neither claims nor children.
    pub(super) fn is_unclaimed(&self, at: u32) -> bool {
        let pair = self.pairs.at(at);
        pair.claims == 0 && pair.children == 0
    }

    /// Returns the block of a pair.
    pub(super) fn block(&self, at: u32) -> u32 {
        self.pairs.at(at).block
    }

    /// Removes a leaf, and returns the pair of its parent; `NO_ENTRY`: none. The parent takes over its
    /// claims, and its place in the list if that is more recent than its own.
    pub(super) fn remove(&mut self, at: u32, weight: PairWeight) -> u32 {
        let pair = self.pairs.at(at);
        let (block, column, claims, tick) = (pair.block, pair.column, pair.claims, pair.tick);
        let (parent, older) = (pair.parent, pair.older);
        self.unlink(at);
        if parent != NO_ENTRY {
            let above = self.pairs.at_mut(parent);
            above.children -= 1;
            above.claims = above.claims.saturating_add(claims);
            let later = above.older == NOT_LISTED || is_after(tick, above.tick);
            if later && older != NOT_LISTED {
                // The parent may stand right before the child.
                let behind = if older == parent { self.pairs.at(parent).older } else { older };
                self.unlink(parent);
                self.pairs.at_mut(parent).tick = tick;
                self.link(parent, behind);
            }
        }
        self.directory.remove(&self.pairs, pair_key(block, column), at);
        let pair = self.pairs.at_mut(at);
        (pair.block, pair.newer) = (NO_ENTRY, self.freed);
        self.freed = at;
        self.weight -= weight.all;
        self.columns[usize::from(column)].blocks -= weight.cached;
        parent
    }

    /// Finds a pair; `NO_ENTRY`: the column does not hold the block.
    pub(super) fn find(&mut self, block: u32, column: usize) -> u32 {
        let column = column as u16;
        let is = |at: u32| self.pairs.at(at).block == block && self.pairs.at(at).column == column;
        let next = self.last.wrapping_add(1);
        self.last = match next < self.fresh && is(next) {
            true => next,
            false => self.directory.glance(&self.pairs, pair_key(block, column), is),
        };
        self.last
    }

    /// Returns the number of accesses to pairs.
    #[cfg(test)]
    pub(super) fn touched(&self) -> usize {
        self.pairs.touched.get()
    }

    fn take(&mut self) -> u32 {
        if self.freed != NO_ENTRY {
            let at = self.freed;
            self.freed = self.pairs.at(at).newer;
            return at;
        }
        let at = self.fresh;
        if at as usize == self.pairs.parts.len() * HOLDINGS_PER_PART {
            self.pairs.parts.push((0..HOLDINGS_PER_PART).map(|_| Holding::vacant()).collect());
        }
        self.fresh += 1;
        at
    }

    /// Removes a pair from the list, if it is there.
    fn unlink(&mut self, at: u32) {
        let pair = self.pairs.at_mut(at);
        let (older, newer, column) = (pair.older, pair.newer, usize::from(pair.column));
        if older == NOT_LISTED {
            return;
        }
        pair.older = NOT_LISTED;
        match older {
            NO_ENTRY => self.columns[column].oldest = newer,
            older => self.pairs.at_mut(older).newer = newer,
        }
        match newer {
            NO_ENTRY => self.columns[column].newest = older,
            newer => self.pairs.at_mut(newer).older = older,
        }
    }

    /// Puts a pair into the list behind another one; `NO_ENTRY`: as the least recent one.
    fn link(&mut self, at: u32, older: u32) {
        let column = usize::from(self.pairs.at(at).column);
        let newer = match older {
            NO_ENTRY => std::mem::replace(&mut self.columns[column].oldest, at),
            older => std::mem::replace(&mut self.pairs.at_mut(older).newer, at),
        };
        match newer {
            NO_ENTRY => self.columns[column].newest = at,
            newer => self.pairs.at_mut(newer).older = at,
        }
        let pair = self.pairs.at_mut(at);
        (pair.older, pair.newer) = (older, newer);
    }
}

/// Returns the key of a pair in the directory. The key is not scattered: adjacent blocks are learned
/// together, so their pairs should be close together. Columns start far from each other.
fn pair_key(block: u32, column: u16) -> u64 {
    u64::from(block.wrapping_add(u32::from(column).wrapping_mul(0x9E37_79B1)))
}

// === impl HoldingTable ===

impl HoldingTable {
    fn at(&self, at: u32) -> &Holding {
        #[cfg(test)]
        self.touched.set(self.touched.get() + 1);
        &self.parts[at as usize / HOLDINGS_PER_PART][at as usize % HOLDINGS_PER_PART]
    }

    fn at_mut(&mut self, at: u32) -> &mut Holding {
        #[cfg(test)]
        self.touched.set(self.touched.get() + 1);
        &mut self.parts[at as usize / HOLDINGS_PER_PART][at as usize % HOLDINGS_PER_PART]
    }
}

impl Links for HoldingTable {
    fn hash(&self, at: u32) -> u64 {
        pair_key(self.at(at).block, self.at(at).column)
    }

    fn next(&self, at: u32) -> u32 {
        self.at(at).next.load(Relaxed)
    }

    fn link(&self, at: u32, next: u32) {
        self.at(at).next.store(next, Relaxed);
    }
}

impl Holding {
    fn vacant() -> Self {
        let (older, newer, next) = (NOT_LISTED, NO_ENTRY, AtomicU32::new(NO_ENTRY));
        Holding { block: 0, column: 0, claims: 0, tick: 0, older, newer, next, parent: NO_ENTRY, children: 0 }
    }
}
