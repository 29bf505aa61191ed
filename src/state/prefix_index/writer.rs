//! The writer of the index, behind its mutex.

use std::collections::{BTreeSet, VecDeque};

use super::blocks::{BlockParent, BlockTable, MAX_GROUPS, TableWriter};
use super::directory::NO_ENTRY;
use super::holdings::{Holdings, PairWeight, Tick, is_after};
use super::oldest::OldestColumns;
use super::receipt::Receipt;
use super::{Columns, IndexLeaf, MAX_COLUMNS, Slot};
use crate::prompt::chain::thinning::{last_stored, stored, stored_count, stored_depth, stored_weight};

/// The largest number of pairs that one step evicts, where eviction can be done in steps.
const MAX_HOLDINGS_PER_STEP: usize = 1024;

/// The largest weight of a pair.
const MAX_PAIR_WEIGHT: usize = stored_weight(usize::MAX);

/// The number of pairs of condemned columns that each `learn` removes, beside twice its new pairs.
const SWEPT_HOLDINGS: usize = 32;

/// The largest number of blocks whose branches each `learn` changes for earlier calls.
const SETTLED_BLOCKS: usize = 256;

/// A chain to learn: stored blocks behind an entry.
struct NewChain {
    /// The entry that the blocks follow; `NO_ENTRY`: they begin the chain.
    above: u32,
    end: Option<u64>,
    /// The number of blocks of the whole chain, stored or not.
    length: usize,
}

/// The state that only writers change.
pub(super) struct Writer {
    limit: usize,
    tick: Tick,
    table: TableWriter,
    holdings: Holdings,
    /// The column of each slot; `None`: the slot is free.
    slots: Vec<Option<usize>>,
    /// The free ones of `slots`.
    free_slots: BTreeSet<usize>,
    /// The group of each column.
    groups: Vec<u8>,
    /// The free columns.
    free: BTreeSet<usize>,
    /// Columns of forgotten upstreams that still have pairs.
    condemned: VecDeque<usize>,
    oldest: OldestColumns,
    /// The stored blocks of the present chain; reused, so that `learn` does not allocate.
    hashes: Vec<u64>,
    /// The entries that are new in the column of the present chain, the last first; reused.
    path: Vec<u32>,
}

// === impl Writer ===

impl Writer {
    /// Builds the writer of an empty index.
    pub(super) fn new(limit: usize, max_pairs: usize) -> Self {
        Writer {
            limit,
            tick: 0,
            table: TableWriter::default(),
            holdings: Holdings::new(max_pairs),
            slots: Vec::new(),
            free_slots: BTreeSet::new(),
            groups: vec![0; MAX_COLUMNS],
            free: (0..MAX_COLUMNS).collect(),
            condemned: VecDeque::new(),
            oldest: OldestColumns::default(),
            hashes: Vec::new(),
            path: Vec::new(),
        }
    }

    pub(super) fn pairs(&self) -> usize {
        self.holdings.weight()
    }

    pub(super) fn bytes(&self) -> usize {
        self.holdings.bytes()
    }

    /// Returns the number of accesses to pairs, and the limit of all pairs.
    #[cfg(test)]
    pub(super) fn touched_and_limit(&self) -> (usize, usize) {
        (self.holdings.touched(), self.limit)
    }

    pub(super) fn held(&mut self, slot: Slot) -> usize {
        self.column(slot).map_or(0, |column| self.holdings.column(column).blocks)
    }

    fn column(&self, slot: Slot) -> Option<usize> {
        self.slots.get(slot.number()).copied().flatten()
    }

    /// Adds an upstream; `None` when all slots are taken.
    pub(super) fn enter(&mut self, blocks: &BlockTable, columns: &Columns) -> Option<Slot> {
        let number = self.free_slots.first().copied().unwrap_or(self.slots.len());
        let slot = Slot(u16::try_from(number).ok()?);
        let column = self.begin(blocks, columns, slot, usize::MAX, 0)?;
        if !self.free_slots.remove(&number) {
            self.slots.push(None);
        }
        self.slots[number] = Some(column);
        Some(slot)
    }

    /// Removes an upstream, with all that it holds.
    pub(super) fn leave(&mut self, columns: &Columns, slot: Slot) {
        if let Some(column) = self.column(slot) {
            self.condemn(columns, column);
            self.slots[slot.number()] = None;
            self.free_slots.insert(slot.number());
        }
    }

    /// Sets the group of an upstream, in which the conversations of new chains are counted.
    pub(super) fn set_group(&mut self, slot: Slot, group: usize) {
        if let (Some(column), Ok(group)) = (self.column(slot), u8::try_from(group.min(MAX_GROUPS - 1))) {
            self.groups[column] = group;
        }
    }

    /// Empties the cache of an upstream, which stays.
    pub(super) fn forget(&mut self, blocks: &BlockTable, columns: &Columns, slot: Slot) {
        let Some(old) = self.column(slot) else { return };
        let (limit, group) = (self.holdings.column(old).limit, self.groups[old]);
        self.condemn(columns, old);
        self.slots[slot.number()] = self.begin(blocks, columns, slot, limit, group);
    }

    /// Sets the limit and evicts some blocks beyond it. Returns `true` when more have to be evicted.
    pub(super) fn limit(&mut self, blocks: &BlockTable, slot: Slot, limit: usize) -> bool {
        let Some(column) = self.column(slot) else { return false };
        self.holdings.column(column).limit = limit;
        self.trim(blocks, column, MAX_HOLDINGS_PER_STEP);
        self.holdings.column(column).blocks > limit
    }

    /// Sets the limit of all pairs and evicts some beyond it. Returns `true` when more have to be evicted.
    pub(super) fn limit_all(&mut self, blocks: &BlockTable, limit: usize) -> bool {
        self.limit = limit;
        self.trim_all(blocks, MAX_HOLDINGS_PER_STEP);
        self.holdings.weight() > limit
    }

    /// Records that an upstream holds a chain from its beginning.
    pub(super) fn learn(
        &mut self,
        blocks: &BlockTable,
        chain: &[u64],
        end: Option<u64>,
        slot: Slot,
    ) -> Receipt {
        self.hashes.clear();
        self.hashes.extend(stored(chain));
        self.learn_chain(blocks, NewChain { above: NO_ENTRY, end, length: chain.len() }, slot)
    }

    /// As `learn`, given the stored blocks, behind a known one if `parent` is not `None`.
    pub(super) fn learn_stored(
        &mut self,
        blocks: &BlockTable,
        parent: Option<u64>,
        hashes: &[u64],
        end: Option<u64>,
        slot: Slot,
    ) -> Option<Receipt> {
        let above = parent.map_or(NO_ENTRY, |parent| blocks.find(parent));
        if parent.is_some() && (above == NO_ENTRY || blocks.is_ending(above)) {
            return None;
        }
        self.hashes.clear();
        self.hashes.extend_from_slice(hashes);
        let before = if above == NO_ENTRY { 0 } else { stored_count(blocks.depth(above)) };
        let length = stored_depth(before + hashes.len());
        Some(self.learn_chain(blocks, NewChain { above, end, length }, slot))
    }

    /// The stored blocks of the chain up to one of them, where the upstream holds it.
    pub(super) fn chain_to(&self, blocks: &BlockTable, hash: u64, slot: Slot) -> Option<Vec<u64>> {
        let (mut at, column) = (blocks.find(hash), self.column(slot)?);
        if at == NO_ENTRY || blocks.is_ending(at) || !blocks.is_held_by(at, column) {
            return None;
        }
        let mut hashes = Vec::with_capacity(stored_count(blocks.depth(at)));
        while at != NO_ENTRY {
            hashes.push(blocks.block_hash(at));
            at = blocks.parent(at);
        }
        hashes.reverse();
        Some(hashes)
    }

    /// The ends of the chains of an upstream, the least recent first.
    pub(super) fn leaves(&self, blocks: &BlockTable, slot: Slot) -> Vec<IndexLeaf> {
        let Some(column) = self.column(slot) else { return Vec::new() };
        let leaf = |at: u32| match blocks.is_ending(at) {
            true => {
                IndexLeaf { hash: blocks.block_hash(blocks.parent(at)), end: Some(blocks.block_hash(at)) }
            }
            false => IndexLeaf { hash: blocks.block_hash(at), end: None },
        };
        self.holdings.leaves(column).map(leaf).collect()
    }

    /// Learns the blocks in `hashes`.
    fn learn_chain(&mut self, blocks: &BlockTable, chain: NewChain, slot: Slot) -> Receipt {
        self.tick = self.tick.wrapping_add(1);
        let nothing = Receipt { column: MAX_COLUMNS, tick: self.tick, learned: 0, held: 0, end: None };
        let Some(column) = self.column(slot) else { return nothing };
        let max_blocks = self.holdings.column(column).limit.min(self.limit);
        let (last, end) = self.place_all(blocks, &chain, max_blocks, self.groups[column]);
        let (learned, held) = self.hold_all(blocks, last, column);
        // The blocks behind the last stored one belong to it.
        let complete = learned == last_stored(chain.length) && chain.length <= max_blocks;
        let learned = if complete { chain.length } else { learned };
        // A lowered limit is reached in steps, so that no request waits for all of them.
        let new = self.path.len();
        self.trim(blocks, column, 2 * new + MAX_HOLDINGS_PER_STEP);
        self.sweep(blocks, 2 * new + SWEPT_HOLDINGS);
        // A pair weighs at least one block, so at least what is new here is evicted.
        self.trim_all(blocks, MAX_PAIR_WEIGHT * new + MAX_HOLDINGS_PER_STEP);
        blocks.settle(&mut self.table, SETTLED_BLOCKS);
        Receipt { column, tick: self.tick, learned, held, end }
    }

    /// Finds or adds the entries of a chain, as far as the chain agrees with the index and there is room.
    /// Returns the last entry, and the ending if that is the one.
    fn place_all(
        &mut self,
        blocks: &BlockTable,
        chain: &NewChain,
        max_blocks: usize,
        group: u8,
    ) -> (u32, Option<u64>) {
        let mut above = chain.above;
        while above != NO_ENTRY && blocks.depth(above) > max_blocks {
            above = blocks.parent(above);
        }
        let before = if above == NO_ENTRY { 0 } else { stored_count(blocks.depth(above)) };
        let room = if above == chain.above { stored_count(max_blocks) - before } else { 0 };
        let placed = room.min(self.hashes.len());
        let (known, mut last) = self.find_known(blocks, above, before, placed);
        for number in known..placed {
            let parent =
                if last == NO_ENTRY { BlockParent::None { group } } else { BlockParent::Block(last) };
            match self.place(blocks, self.hashes[number], last, parent, false) {
                Some(at) => last = at,
                None => return (last, None),
            }
        }
        let whole = placed == self.hashes.len() && above == chain.above && chain.length < max_blocks;
        let Some(end) = chain.end.filter(|_| whole && last != NO_ENTRY) else { return (last, None) };
        match self.place(blocks, end, last, BlockParent::Block(last), true) {
            Some(at) => (at, Some(end)),
            None => (last, None),
        }
    }

    /// Returns how many of the first `placed` hashes have entries, and the last of these entries. A block has
    /// an entry while one behind it has, so a few blocks are looked at, from the last one on.
    fn find_known(&self, blocks: &BlockTable, above: u32, before: usize, placed: usize) -> (usize, u32) {
        let find = |number: usize| {
            let at = blocks.find(self.hashes[number - 1]);
            let is = |at: &u32| {
                *at != NO_ENTRY
                    && !blocks.is_ending(*at)
                    && blocks.depth(*at) == stored_depth(before + number)
            };
            Some(at).filter(is)
        };
        let (mut known, mut unknown, mut step) = ((0, above), placed + 1, 1);
        let mut number = placed;
        while number > known.0 {
            match find(number) {
                Some(at) => known = (number, at),
                None => unknown = number,
            }
            number = match known.0 {
                // Mostly the new blocks are few.
                0 => number.saturating_sub(step),
                known => known + (unknown - known) / 2,
            };
            step *= 2;
            if number == 0 && unknown > 1 {
                number = unknown / 2;
            }
        }
        known
    }

    fn place(
        &mut self,
        blocks: &BlockTable,
        hash: u64,
        above: u32,
        parent: BlockParent,
        ending: bool,
    ) -> Option<u32> {
        match blocks.find_after(above, hash) {
            NO_ENTRY => blocks.add(&mut self.table, hash, parent, ending),
            at => blocks.follows(at, above, ending).then_some(at),
        }
    }

    /// Adds the pairs of an entry and of those above it that the column lacks, and makes the entry the most
    /// recent one of the column. Returns the depth of the entry, and the depth down to which the column held
    /// the chain before. Leaves the entries with new pairs in `path`.
    fn hold_all(&mut self, blocks: &BlockTable, last: u32, column: usize) -> (usize, usize) {
        self.path.clear();
        let mut at = last;
        while at != NO_ENTRY && !blocks.is_held_by(at, column) {
            self.path.push(at);
            at = blocks.parent(at);
        }
        if last == NO_ENTRY {
            return (0, 0);
        }
        let held = if at == NO_ENTRY { 0 } else { blocks.depth(at) };
        let mut pair = if at == NO_ENTRY { NO_ENTRY } else { self.holdings.find(at, column) };
        for &at in self.path.iter().rev() {
            pair = self.holdings.add(at, column, pair, weight(blocks, at));
            blocks.hold(at, column);
        }
        self.holdings.claim(pair, self.tick);
        self.oldest.enter(column, self.tick);
        (blocks.depth(last), held)
    }

    /// Removes what one `learn` added.
    pub(super) fn take_back(&mut self, blocks: &BlockTable, chain: &[u64], slot: Slot, receipt: &Receipt) {
        // After a later eviction, blocks of this chain may have been evicted and learned again.
        let current = self.column(slot).filter(|column| *column == receipt.column);
        let whole = |column: &usize| is_after(receipt.tick, self.holdings.column(*column).evicted);
        let Some(column) = current.filter(whole) else { return };
        let last = last_stored(receipt.learned.min(chain.len())).checked_sub(1).map(|last| chain[last]);
        if let Some(hash) = receipt.end.or(last) {
            self.remove_claim(blocks, hash, column, usize::MAX);
        }
    }

    /// Removes one claim of the last of these blocks, and those without further claims.
    pub(super) fn release_stored(
        &mut self,
        blocks: &BlockTable,
        hashes: &[u64],
        end: Option<u64>,
        slot: Slot,
    ) {
        let (Some(column), Some(hash)) = (self.column(slot), end.or(hashes.last().copied())) else { return };
        self.remove_claim(blocks, hash, column, hashes.len() + usize::from(end.is_some()));
    }

    /// Removes one claim of a block, and from it upwards at most `max_pairs` blocks without further claims.
    fn remove_claim(&mut self, blocks: &BlockTable, hash: u64, column: usize, max_pairs: usize) {
        let at = blocks.find(hash);
        if at == NO_ENTRY || !blocks.is_held_by(at, column) {
            return;
        }
        let mut pair = self.holdings.find(at, column);
        self.holdings.unclaim(pair);
        let mut left = max_pairs;
        while pair != NO_ENTRY && left > 0 && self.holdings.is_unclaimed(pair) {
            pair = self.release(blocks, pair, column);
            left -= 1;
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

    /// Evicts at most `max_pairs` beyond the limit of all columns, the least recent first.
    fn trim_all(&mut self, blocks: &BlockTable, max_pairs: usize) {
        let mut left = max_pairs;
        while self.holdings.weight() > self.limit && left > 0 {
            if !self.condemned.is_empty() {
                let swept = left.min(self.holdings.weight() - self.limit);
                self.sweep(blocks, swept);
                left -= swept;
                continue;
            }
            let Some((column, tick)) = self.oldest.first(&mut self.holdings, self.tick) else { return };
            // All pairs of that tick, so that columns are compared once for each `learn`.
            while self.holdings.weight() > self.limit && left > 0 {
                match self.holdings.oldest(column) {
                    Some((_, oldest)) if oldest == tick => self.drop_oldest(blocks, column),
                    _ => break,
                }
                left -= 1;
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
        if let Some((pair, tick)) = self.holdings.oldest(column) {
            self.holdings.column(column).evicted = tick;
            self.release(blocks, pair, column);
        }
    }

    /// Removes a pair. Returns the pair of the block before.
    fn release(&mut self, blocks: &BlockTable, pair: u32, column: usize) -> u32 {
        let at = self.holdings.block(pair);
        let removed = self.holdings.remove(pair, weight(blocks, at));
        blocks.release(&mut self.table, at, column);
        removed
    }

    /// Starts an empty column for a slot.
    fn begin(
        &mut self,
        blocks: &BlockTable,
        columns: &Columns,
        slot: Slot,
        limit: usize,
        group: u8,
    ) -> Option<usize> {
        if self.free.is_empty() {
            self.sweep(blocks, usize::MAX);
        }
        let column = self.free.pop_first()?;
        self.holdings.begin(column, limit, self.tick);
        self.groups[column] = group;
        columns.open(column, slot);
        Some(column)
    }

    fn condemn(&mut self, columns: &Columns, column: usize) {
        columns.close(column);
        self.condemned.push_back(column);
    }
}

fn weight(blocks: &BlockTable, at: u32) -> PairWeight {
    let all = blocks.weight(at);
    PairWeight { all, cached: if blocks.is_ending(at) { 0 } else { all } }
}
