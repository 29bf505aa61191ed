//! The pairs of block and upstream, in the order of eviction of each upstream.
//!
//! A column is one upstream's bit among the holders of every block. Its pairs form a list from the least to
//! the most recent. Owned by the writer, under its lock.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use super::directory::{Directory, Links, NO_ENTRY};

/// The number of pairs that are allocated at a time.
const HOLDINGS_PER_PART: usize = 1 << 13;

/// The count of calls of `learn`, in place of a clock. It wraps after four billion; then a pair that was
/// idle for two billion counts as recent once, and another pair is evicted first.
pub type Tick = u32;

/// Whether the first tick is later.
pub fn is_after(one: Tick, other: Tick) -> bool {
    one.wrapping_sub(other).cast_signed() > 0
}

/// One pair of block and column.
struct Holding {
    block: u32,
    column: u16,
    /// How often the pair was learned and not undone.
    claims: u16,
    /// When the pair was last learned.
    tick: Tick,
    older: u32,
    newer: u32,
    next: AtomicU32,
}

/// The pairs of one column.
#[derive(Clone, Debug)]
pub struct Column {
    oldest: u32,
    newest: u32,
    /// The number of pairs without endings, which take no room in an engine's cache.
    pub blocks: usize,
    /// The largest number of blocks.
    pub limit: usize,
    /// The tick of the latest evicted pair.
    pub evicted: Tick,
}

/// All pairs of all columns.
pub struct Holdings {
    pairs: HoldingTable,
    freed: u32,
    fresh: u32,
    directory: Directory,
    columns: Vec<Column>,
    /// The pair that was found last. Pairs that were added together are adjacent, so the next one is likely
    /// the next entry.
    last: u32,
}

/// The arena of pairs, in parts, so that growing never copies.
struct HoldingTable(Vec<Box<[Holding]>>);

// === impl Holdings ===

impl Holdings {
    /// Builds an arena for about `max_pairs`.
    pub fn new(max_pairs: usize) -> Self {
        Holdings {
            pairs: HoldingTable(Vec::new()),
            freed: NO_ENTRY,
            fresh: 0,
            directory: Directory::new(max_pairs),
            columns: Vec::new(),
            last: NO_ENTRY,
        }
    }

    /// Returns the number of all pairs, including endings.
    pub fn len(&self) -> usize {
        self.directory.len()
    }

    /// Returns the memory in bytes.
    pub fn bytes(&self) -> usize {
        self.pairs.0.len() * HOLDINGS_PER_PART * size_of::<Holding>() + self.directory.bytes()
    }

    /// Starts an empty column at this tick.
    pub fn begin(&mut self, column: usize, limit: usize, tick: Tick) {
        let empty = Column { oldest: NO_ENTRY, newest: NO_ENTRY, blocks: 0, limit, evicted: tick };
        if self.columns.len() <= column {
            self.columns.resize(column + 1, empty.clone());
        }
        self.columns[column] = empty;
    }

    /// Returns a column.
    pub fn column(&mut self, column: usize) -> &mut Column {
        &mut self.columns[column]
    }

    /// Returns the least recent pair of a column, and its tick.
    pub fn oldest(&self, column: usize) -> Option<(u32, Tick)> {
        let at = self.columns[column].oldest;
        (at != NO_ENTRY).then(|| (self.pairs.at(at).block, self.pairs.at(at).tick))
    }

    /// Returns the blocks of a column, the least recent first.
    pub fn in_order(&self, column: usize) -> impl Iterator<Item = u32> {
        let present = |at: u32| (at != NO_ENTRY).then_some(at);
        let pairs = std::iter::successors(present(self.columns[column].oldest), move |at| {
            present(self.pairs.at(*at).newer)
        });
        pairs.map(|at| self.pairs.at(at).block)
    }

    /// Adds a pair as the most recent one of its column.
    pub fn add(&mut self, block: u32, column: usize, ending: bool, tick: Tick) {
        let at = self.take();
        let pair = self.pairs.at_mut(at);
        (pair.block, pair.column, pair.claims, pair.tick) = (block, column as u16, 1, tick);
        self.directory.add(&self.pairs, pair_key(block, column as u16), at);
        self.link_newest(at, column);
        self.columns[column].blocks += usize::from(!ending);
    }

    /// Makes a pair the most recent one, with one more claim.
    pub fn touch(&mut self, block: u32, column: usize, tick: Tick) {
        let at = self.find(block, column);
        if at == NO_ENTRY {
            return;
        }
        let pair = self.pairs.at_mut(at);
        pair.tick = tick;
        pair.claims = pair.claims.saturating_add(1);
        self.unlink(at, column);
        self.link_newest(at, column);
    }

    /// Removes one claim. Returns `true` when it was the last. A saturated count stays.
    pub fn unclaim(&mut self, block: u32, column: usize) -> bool {
        let at = self.find(block, column);
        if at == NO_ENTRY {
            return false;
        }
        let pair = self.pairs.at_mut(at);
        if pair.claims < u16::MAX {
            pair.claims = pair.claims.saturating_sub(1);
        }
        pair.claims == 0
    }

    /// Removes a pair.
    pub fn remove(&mut self, block: u32, column: usize, ending: bool) {
        let at = self.find(block, column);
        if at == NO_ENTRY {
            return;
        }
        self.unlink(at, column);
        self.directory.remove(&self.pairs, pair_key(block, column as u16), at);
        let pair = self.pairs.at_mut(at);
        (pair.block, pair.newer) = (NO_ENTRY, self.freed);
        self.freed = at;
        self.columns[column].blocks -= usize::from(!ending);
    }

    fn find(&mut self, block: u32, column: usize) -> u32 {
        let column = column as u16;
        let is = |at: u32| self.pairs.at(at).block == block && self.pairs.at(at).column == column;
        let next = self.last.wrapping_add(1);
        self.last = match next < self.fresh && is(next) {
            true => next,
            false => self.directory.glance(&self.pairs, pair_key(block, column), is),
        };
        self.last
    }

    fn take(&mut self) -> u32 {
        if self.freed != NO_ENTRY {
            let at = self.freed;
            self.freed = self.pairs.at(at).newer;
            return at;
        }
        let at = self.fresh;
        if at as usize == self.pairs.0.len() * HOLDINGS_PER_PART {
            self.pairs.0.push((0..HOLDINGS_PER_PART).map(|_| Holding::vacant()).collect());
        }
        self.fresh += 1;
        at
    }

    fn unlink(&mut self, at: u32, column: usize) {
        let (older, newer) = (self.pairs.at(at).older, self.pairs.at(at).newer);
        match older {
            NO_ENTRY => self.columns[column].oldest = newer,
            older => self.pairs.at_mut(older).newer = newer,
        }
        match newer {
            NO_ENTRY => self.columns[column].newest = older,
            newer => self.pairs.at_mut(newer).older = older,
        }
    }

    fn link_newest(&mut self, at: u32, column: usize) {
        let newest = std::mem::replace(&mut self.columns[column].newest, at);
        let pair = self.pairs.at_mut(at);
        (pair.older, pair.newer) = (newest, NO_ENTRY);
        match newest {
            NO_ENTRY => self.columns[column].oldest = at,
            newest => self.pairs.at_mut(newest).newer = at,
        }
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
        &self.0[at as usize / HOLDINGS_PER_PART][at as usize % HOLDINGS_PER_PART]
    }

    fn at_mut(&mut self, at: u32) -> &mut Holding {
        &mut self.0[at as usize / HOLDINGS_PER_PART][at as usize % HOLDINGS_PER_PART]
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
        let next = AtomicU32::new(NO_ENTRY);
        Holding { block: 0, column: 0, claims: 0, tick: 0, older: NO_ENTRY, newer: NO_ENTRY, next }
    }
}
