//! The writer of the index, behind its mutex.

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::blocks::{BlockTable, Vacant};
use super::directory::NO_ENTRY;
use super::holdings::{Holdings, Tick, is_after};
use super::{Columns, IndexLeaf, MAX_COLUMNS, Slot};

/// The largest number of pairs that one step evicts, where eviction can be done in steps.
const MAX_HOLDINGS_PER_STEP: usize = 1024;

/// The number of pairs of condemned columns that each `learn` removes, beside twice the length of its chain.
const SWEPT_HOLDINGS: usize = 32;

/// The record of one `learn`, which `take_back` undoes as a whole or not at all.
#[derive(Debug, PartialEq, Eq)]
pub struct Receipt {
    column: usize,
    tick: Tick,
    /// The number of leading blocks that were learned.
    learned: usize,
    /// The number of leading blocks that the upstream held before.
    held: usize,
    end: Option<u64>,
}

/// The state that only writers change.
pub struct Writer {
    limit: usize,
    tick: Tick,
    vacant: Vacant,
    holdings: Holdings,
    /// The column of each slot; `None`: the slot is free.
    slots: Vec<Option<usize>>,
    /// The free columns.
    free: BTreeSet<usize>,
    /// Columns of forgotten upstreams that still have pairs.
    condemned: VecDeque<usize>,
    /// The entries of the present chain; reused, so that `learn` does not allocate.
    path: Vec<u32>,
}

// === impl Receipt ===

impl Receipt {
    /// Returns the number of leading blocks that the upstream was believed to hold before.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Returns the number of leading blocks that the upstream is believed to hold now; limited by its cache.
    pub fn learned(&self) -> usize {
        self.learned
    }

    /// Returns the ending that was learned.
    pub fn end(&self) -> Option<u64> {
        self.end
    }

    /// Returns the new part of a chain, for siblings that received all before: the block that it follows,
    /// and the new blocks.
    pub fn new_part<'c>(&self, chain: &'c [u64]) -> (Option<u64>, &'c [u64]) {
        let learned = &chain[..self.learned.min(chain.len())];
        let (known, new) = learned.split_at(self.held.min(learned.len()));
        (known.last().copied(), new)
    }
}

// === impl Writer ===

impl Writer {
    /// Builds the writer of an empty index.
    pub fn new(limit: usize, max_pairs: usize) -> Self {
        Writer {
            limit,
            tick: 0,
            vacant: Vacant::default(),
            holdings: Holdings::new(max_pairs),
            slots: Vec::new(),
            free: (0..MAX_COLUMNS).collect(),
            condemned: VecDeque::new(),
            path: Vec::new(),
        }
    }

    pub fn pairs(&self) -> usize {
        self.holdings.len()
    }

    pub fn bytes(&self) -> usize {
        self.holdings.bytes()
    }

    pub fn held(&mut self, slot: Slot) -> usize {
        self.column(slot).map_or(0, |column| self.holdings.column(column).blocks)
    }

    fn column(&self, slot: Slot) -> Option<usize> {
        self.slots.get(slot.number()).copied().flatten()
    }

    /// Adds an upstream; `None` when all slots are taken.
    pub fn enter(&mut self, blocks: &BlockTable, columns: &Columns) -> Option<Slot> {
        let number = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let slot = Slot(u16::try_from(number).ok()?);
        let column = self.begin(blocks, columns, slot, usize::MAX)?;
        if number == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[number] = Some(column);
        Some(slot)
    }

    /// Removes an upstream, with all that it holds.
    pub fn leave(&mut self, columns: &Columns, slot: Slot) {
        if let Some(column) = self.column(slot) {
            self.condemn(columns, column);
            self.slots[slot.number()] = None;
        }
    }

    /// Empties the cache of an upstream, which stays.
    pub fn forget(&mut self, blocks: &BlockTable, columns: &Columns, slot: Slot) {
        let Some(old) = self.column(slot) else { return };
        let limit = self.holdings.column(old).limit;
        self.condemn(columns, old);
        self.slots[slot.number()] = self.begin(blocks, columns, slot, limit);
    }

    /// Sets the limit and evicts some blocks beyond it. Returns `true` when more have to be evicted.
    pub fn limit(&mut self, blocks: &BlockTable, slot: Slot, limit: usize) -> bool {
        let Some(column) = self.column(slot) else { return false };
        self.holdings.column(column).limit = limit;
        self.trim(blocks, column, MAX_HOLDINGS_PER_STEP);
        self.holdings.column(column).blocks > limit
    }

    /// Records that an upstream holds a chain from its beginning.
    pub fn learn(&mut self, blocks: &BlockTable, chain: &[u64], end: Option<u64>, slot: Slot) -> Receipt {
        self.path.clear();
        self.learn_behind(blocks, chain, end, slot)
    }

    /// Records that an upstream holds a chain behind a known parent.
    pub fn learn_after(
        &mut self,
        blocks: &BlockTable,
        parent: u64,
        hashes: &[u64],
        end: Option<u64>,
        slot: Slot,
    ) -> Option<Receipt> {
        let at = blocks.find(parent);
        if at == NO_ENTRY || blocks.is_ending(at) {
            return None;
        }
        self.path.clear();
        blocks.above(at, &mut self.path);
        self.path.reverse();
        Some(self.learn_behind(blocks, hashes, end, slot))
    }

    /// The chain up to a block, where the upstream holds all of it.
    pub fn chain_to(&mut self, blocks: &BlockTable, hash: u64, slot: Slot) -> Option<Vec<u64>> {
        let (at, column) = (blocks.find(hash), self.column(slot)?);
        if at == NO_ENTRY || blocks.is_ending(at) || !blocks.is_held_by(at, column) {
            return None;
        }
        self.path.clear();
        blocks.above(at, &mut self.path);
        Some(self.path.iter().rev().map(|at| blocks.block_hash(*at)).collect())
    }

    /// The ends of the chains of an upstream. A block is more recent than the blocks behind it, so these come
    /// before it.
    pub fn leaves(&self, blocks: &BlockTable, slot: Slot) -> Vec<IndexLeaf> {
        let Some(column) = self.column(slot) else { return Vec::new() };
        let (mut leaves, mut inner) = (Vec::new(), HashSet::new());
        for at in self.holdings.in_order(column) {
            let (parent, is_leaf) = (blocks.parent(at), !inner.contains(&at));
            inner.extend(parent);
            if is_leaf {
                let hash = blocks.block_hash(at);
                leaves.push(match parent.filter(|_| blocks.is_ending(at)) {
                    Some(parent) => IndexLeaf { hash: blocks.block_hash(parent), end: Some(hash) },
                    None => IndexLeaf { hash, end: None },
                });
            }
        }
        leaves
    }

    /// Learns the blocks in `path`, and `chain` behind them.
    fn learn_behind(&mut self, blocks: &BlockTable, chain: &[u64], end: Option<u64>, slot: Slot) -> Receipt {
        self.tick = self.tick.wrapping_add(1);
        let nothing = Receipt { column: MAX_COLUMNS, tick: self.tick, learned: 0, held: 0, end: None };
        let Some(column) = self.column(slot) else { return nothing };
        let max_blocks = self.holdings.column(column).limit.min(self.limit);
        let whole = self.path.len() + chain.len() < max_blocks;
        self.path.truncate(max_blocks);
        let room = max_blocks - self.path.len();
        let end = self.follow(blocks, &chain[..chain.len().min(room)], end.filter(|_| whole));
        let learned = self.path.len() - usize::from(end.is_some());
        let mut held = learned;
        for place in (0..self.path.len()).rev() {
            let at = self.path[place];
            if blocks.is_held_by(at, column) {
                self.holdings.touch(at, column, self.tick);
            } else {
                self.holdings.add(at, column, blocks.is_ending(at), self.tick);
                blocks.hold(at, column);
                held = held.min(place);
            }
        }
        // A lowered limit is reached in steps, so that no request waits for all of them.
        self.trim(blocks, column, 2 * self.path.len() + MAX_HOLDINGS_PER_STEP);
        self.sweep(blocks, 2 * self.path.len() + SWEPT_HOLDINGS);
        self.trim_all(blocks);
        Receipt { column, tick: self.tick, learned, held, end }
    }

    /// Removes what one `learn` added.
    pub fn take_back(&mut self, blocks: &BlockTable, chain: &[u64], slot: Slot, receipt: &Receipt) {
        // After a later eviction, blocks of this chain may have been evicted and learned again.
        let current = self.column(slot).filter(|column| *column == receipt.column);
        let whole = |column: &usize| is_after(receipt.tick, self.holdings.column(*column).evicted);
        let Some(column) = current.filter(whole) else { return };
        let learned = &chain[..receipt.learned.min(chain.len())];
        for hash in receipt.end.iter().chain(learned.iter().rev()) {
            let at = blocks.find(*hash);
            if at != NO_ENTRY && blocks.is_held_by(at, column) && self.holdings.unclaim(at, column) {
                self.release(blocks, at, column);
            }
        }
    }

    /// Removes one claim of each block of a tail, and the blocks without further claims.
    pub fn release_tail(&mut self, blocks: &BlockTable, hashes: &[u64], end: Option<u64>, slot: Slot) {
        let Some(column) = self.column(slot) else { return };
        for hash in end.iter().chain(hashes.iter().rev()) {
            let at = blocks.find(*hash);
            if at != NO_ENTRY && blocks.is_held_by(at, column) && self.holdings.unclaim(at, column) {
                self.release(blocks, at, column);
            }
        }
    }

    /// Appends the entries of a chain and its end to `path`, and adds missing ones. Stops where the chain
    /// contradicts the index or there is no room. Returns `end` when it was reached.
    fn follow(&mut self, blocks: &BlockTable, chain: &[u64], end: Option<u64>) -> Option<u64> {
        let mut parent = self.path.last().copied().unwrap_or(NO_ENTRY);
        for &hash in chain {
            parent = self.place(blocks, hash, parent, false)?;
            self.path.push(parent);
        }
        if parent == NO_ENTRY {
            return None;
        }
        let place = self.place(blocks, end?, parent, true)?;
        self.path.push(place);
        end
    }

    fn place(&mut self, blocks: &BlockTable, hash: u64, parent: u32, ending: bool) -> Option<u32> {
        match blocks.find_after(parent, hash) {
            NO_ENTRY => blocks.add(&mut self.vacant, hash, parent, ending),
            at => blocks.follows(at, parent, ending).then_some(at),
        }
    }

    /// Evicts at most `max_pairs` beyond the limit of a column.
    fn trim(&mut self, blocks: &BlockTable, column: usize, max_pairs: usize) {
        let mut left = max_pairs;
        while left > 0 && self.holdings.column(column).blocks > self.holdings.column(column).limit {
            self.drop_oldest(blocks, column);
            left -= 1;
        }
    }

    /// Evicts pairs beyond the limit of all columns, the least recent first.
    fn trim_all(&mut self, blocks: &BlockTable) {
        while self.holdings.len() > self.limit {
            if !self.condemned.is_empty() {
                self.sweep(blocks, self.holdings.len() - self.limit);
                continue;
            }
            let used = self.slots.iter().flatten();
            let oldest = used.filter_map(|column| Some((*column, self.holdings.oldest(*column)?.1)));
            let oldest = oldest.reduce(|one, other| if is_after(one.1, other.1) { other } else { one });
            let Some((column, tick)) = oldest else { return };
            // All pairs of that tick, so that columns are compared once for each `learn`.
            let same = |holdings: &Holdings| holdings.oldest(column).is_some_and(|oldest| oldest.1 == tick);
            while self.holdings.len() > self.limit && same(&self.holdings) {
                self.drop_oldest(blocks, column);
            }
        }
    }

    /// Removes at most `max_pairs` of condemned columns, and frees the columns without pairs.
    fn sweep(&mut self, blocks: &BlockTable, max_pairs: usize) {
        let mut left = max_pairs;
        while let Some(&column) = self.condemned.front() {
            while self.holdings.oldest(column).is_some() {
                if left == 0 {
                    return;
                }
                self.drop_oldest(blocks, column);
                left -= 1;
            }
            self.condemned.pop_front();
            self.free.insert(column);
        }
    }

    fn drop_oldest(&mut self, blocks: &BlockTable, column: usize) {
        if let Some((at, tick)) = self.holdings.oldest(column) {
            self.holdings.column(column).evicted = tick;
            self.release(blocks, at, column);
        }
    }

    /// Removes a pair.
    fn release(&mut self, blocks: &BlockTable, at: u32, column: usize) {
        self.holdings.remove(at, column, blocks.is_ending(at));
        blocks.release(&mut self.vacant, at, column);
    }

    /// Starts an empty column for a slot.
    fn begin(&mut self, blocks: &BlockTable, columns: &Columns, slot: Slot, limit: usize) -> Option<usize> {
        if self.free.is_empty() {
            self.sweep(blocks, usize::MAX);
        }
        let column = self.free.pop_first()?;
        self.holdings.begin(column, limit, self.tick);
        columns.open(column, slot);
        Some(column)
    }

    fn condemn(&mut self, columns: &Columns, column: usize) {
        columns.close(column);
        self.condemned.push_back(column);
    }
}
