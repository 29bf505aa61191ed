//! Which upstream holds which block, in the order in which each of them will let go: one entry a pair.
//!
//! A column is one upstream's place among every block's holders. Its pairs form a list from the next to go
//! to the most recent. All of it is the writer's, under its lock.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use super::directory::{Directory, Links, NIL};

/// Pairs that are made at a time.
const HOLDINGS_PER_PART: usize = 1 << 13;

/// The count of what was learnt, in place of a clock. It wraps after four billion; then a pair that was not
/// used for two billion passes for recent once, which only makes another pair go first.
pub type Tick = u32;

pub fn is_after(one: Tick, other: Tick) -> bool {
    one.wrapping_sub(other).cast_signed() > 0
}

struct Holding {
    block: u32,
    column: u16,
    /// How often it was learnt and not taken back.
    claims: u16,
    /// When it was learnt last.
    tick: Tick,
    older: u32,
    newer: u32,
    next: AtomicU32,
}

#[derive(Clone, Debug)]
pub struct Column {
    oldest: u32,
    newest: u32,
    /// Pairs, endings not counted: an engine has no block for them.
    pub blocks: usize,
    /// The most blocks there may be.
    pub limit: usize,
    /// Of what was learnt up to this tick, some was let go.
    pub settled: Tick,
}

pub struct Holdings {
    pairs: HoldingTable,
    freed: u32,
    fresh: u32,
    directory: Directory,
    columns: Vec<Column>,
    /// The pair that was looked at last. Pairs that were made at once lie side by side, so the next to be
    /// looked at is likely the next place.
    last: u32,
}

/// In parts, so that growing never copies.
struct HoldingTable(Vec<Box<[Holding]>>);

// === impl Holdings ===

impl Holdings {
    /// Made for `most` pairs; for a moment there may be more.
    pub fn new(most: usize) -> Self {
        Holdings {
            pairs: HoldingTable(Vec::new()),
            freed: NIL,
            fresh: 0,
            directory: Directory::new(most),
            columns: Vec::new(),
            last: NIL,
        }
    }

    /// All pairs of all columns, endings included.
    pub fn len(&self) -> usize {
        self.directory.len()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.pairs.0.len() * HOLDINGS_PER_PART * size_of::<Holding>() + self.directory.bytes()
    }

    /// Begins a column with nothing in it, at this tick.
    pub fn begin(&mut self, column: usize, limit: usize, tick: Tick) {
        let empty = Column { oldest: NIL, newest: NIL, blocks: 0, limit, settled: tick };
        if self.columns.len() <= column {
            self.columns.resize(column + 1, empty.clone());
        }
        self.columns[column] = empty;
    }

    pub fn column(&mut self, column: usize) -> &mut Column {
        &mut self.columns[column]
    }

    /// The next to go, and when it was learnt last.
    pub fn oldest(&self, column: usize) -> Option<(u32, Tick)> {
        let at = self.columns[column].oldest;
        (at != NIL).then(|| (self.pairs.at(at).block, self.pairs.at(at).tick))
    }

    /// Makes a pair, the most recent one of its column.
    pub fn add(&mut self, block: u32, column: usize, ending: bool, tick: Tick) {
        let at = self.take();
        let pair = self.pairs.at_mut(at);
        (pair.block, pair.column, pair.claims, pair.tick) = (block, column as u16, 1, tick);
        self.directory.add(&self.pairs, name(block, column as u16), at);
        self.link_newest(at, column);
        self.columns[column].blocks += usize::from(!ending);
    }

    /// Learns a pair once more.
    pub fn touch(&mut self, block: u32, column: usize, tick: Tick) {
        let at = self.find(block, column);
        if at == NIL {
            return;
        }
        let pair = self.pairs.at_mut(at);
        pair.tick = tick;
        pair.claims = pair.claims.saturating_add(1);
        self.unlink(at, column);
        self.link_newest(at, column);
    }

    /// Takes one claim back; `true` when it was the last. Claims that were too many to count stay.
    pub fn unclaim(&mut self, block: u32, column: usize) -> bool {
        let at = self.find(block, column);
        if at == NIL {
            return false;
        }
        let pair = self.pairs.at_mut(at);
        if pair.claims < u16::MAX {
            pair.claims = pair.claims.saturating_sub(1);
        }
        pair.claims == 0
    }

    pub fn remove(&mut self, block: u32, column: usize, ending: bool) {
        let at = self.find(block, column);
        if at == NIL {
            return;
        }
        self.unlink(at, column);
        self.directory.remove(&self.pairs, name(block, column as u16), at);
        let pair = self.pairs.at_mut(at);
        (pair.block, pair.newer) = (NIL, self.freed);
        self.freed = at;
        self.columns[column].blocks -= usize::from(!ending);
    }

    fn find(&mut self, block: u32, column: usize) -> u32 {
        let column = column as u16;
        let is = |at: u32| self.pairs.at(at).block == block && self.pairs.at(at).column == column;
        let next = self.last.wrapping_add(1);
        self.last = match next < self.fresh && is(next) {
            true => next,
            false => self.directory.glance(&self.pairs, name(block, column), is),
        };
        self.last
    }

    fn take(&mut self) -> u32 {
        if self.freed != NIL {
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
            NIL => self.columns[column].oldest = newer,
            older => self.pairs.at_mut(older).newer = newer,
        }
        match newer {
            NIL => self.columns[column].newest = older,
            newer => self.pairs.at_mut(newer).older = older,
        }
    }

    fn link_newest(&mut self, at: u32, column: usize) {
        let newest = std::mem::replace(&mut self.columns[column].newest, at);
        let pair = self.pairs.at_mut(at);
        (pair.older, pair.newer) = (newest, NIL);
        match newest {
            NIL => self.columns[column].oldest = at,
            newest => self.pairs.at_mut(newest).newer = at,
        }
    }
}

/// What the directory knows a pair by. Not scattered: places of blocks are dense, and neighbours among them
/// are learnt together, so they are to be found together. Columns start far from each other.
fn name(block: u32, column: u16) -> u64 {
    u64::from(block.wrapping_add(u32::from(column).wrapping_mul(0x9E37_79B1)))
}

// === impl Pairs ===

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
        name(self.at(at).block, self.at(at).column)
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
        let next = AtomicU32::new(NIL);
        Holding { block: 0, column: 0, claims: 0, tick: 0, older: NIL, newer: NIL, next }
    }
}
