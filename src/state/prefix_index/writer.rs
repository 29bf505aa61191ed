//! What changes the index, one at a time.

use std::collections::{BTreeSet, VecDeque};

use super::blocks::{BlockTable, Vacant};
use super::directory::NIL;
use super::holdings::{Holdings, Tick, is_after};
use super::{COLUMNS, Columns, Slot};

/// Pairs that go in one piece of work at most, where the work can be done in pieces.
const MAX_HOLDINGS_PER_PIECE: usize = 1024;

/// Pairs of columns that were given up that go with everything that is learnt, beside twice its own length.
const SWEPT_HOLDINGS: usize = 32;

/// What was learnt, to be taken back as a whole or not at all.
#[derive(Debug, PartialEq, Eq)]
pub struct Receipt {
    column: usize,
    tick: Tick,
    /// Leading blocks that were learnt, and how many of them the upstream held before.
    learnt: usize,
    held: usize,
    end: Option<u64>,
}

pub struct Writer {
    limit: usize,
    tick: Tick,
    vacant: Vacant,
    holdings: Holdings,
    /// The column of each slot; `None`: the slot is free.
    slots: Vec<Option<usize>>,
    /// The free columns.
    free: BTreeSet<usize>,
    /// Columns that were given up and still hold something.
    condemned: VecDeque<usize>,
    /// The places of the chain at hand; kept, so that learning allocates nothing either.
    path: Vec<u32>,
}

// === impl Receipt ===

impl Receipt {
    /// Leading blocks that the upstream was believed to hold before.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Leading blocks that it is believed to hold now; fewer than the chain has when its cache is smaller.
    pub fn learnt(&self) -> usize {
        self.learnt
    }

    /// The ending that was learnt.
    pub fn end(&self) -> Option<u64> {
        self.end
    }

    /// Splits off the new part of a chain for siblings that received all before: the block that it follows,
    /// and the blocks after it.
    pub fn news<'c>(&self, chain: &'c [u64]) -> (Option<u64>, &'c [u64]) {
        let learnt = &chain[..self.learnt.min(chain.len())];
        let (known, new) = learnt.split_at(self.held.min(learnt.len()));
        (known.last().copied(), new)
    }
}

// === impl Writer ===

impl Writer {
    pub fn new(limit: usize, most: usize) -> Self {
        Writer {
            limit,
            tick: 0,
            vacant: Vacant::default(),
            holdings: Holdings::new(most),
            slots: Vec::new(),
            free: (0..COLUMNS).collect(),
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

    pub fn leave(&mut self, columns: &Columns, slot: Slot) {
        if let Some(column) = self.column(slot) {
            self.condemn(columns, column);
            self.slots[slot.number()] = None;
        }
    }

    pub fn forget(&mut self, blocks: &BlockTable, columns: &Columns, slot: Slot) {
        let Some(old) = self.column(slot) else { return };
        let limit = self.holdings.column(old).limit;
        self.condemn(columns, old);
        self.slots[slot.number()] = self.begin(blocks, columns, slot, limit);
    }

    /// Sets the limit and lets go of some of what is over it; `true` when there is more to let go.
    pub fn limit(&mut self, blocks: &BlockTable, slot: Slot, limit: usize) -> bool {
        let Some(column) = self.column(slot) else { return false };
        self.holdings.column(column).limit = limit;
        self.trim(blocks, column, MAX_HOLDINGS_PER_PIECE);
        self.holdings.column(column).blocks > limit
    }

    pub fn learn(&mut self, blocks: &BlockTable, chain: &[u64], end: Option<u64>, slot: Slot) -> Receipt {
        self.path.clear();
        self.learn_behind(blocks, chain, end, slot)
    }

    pub fn learn_after(
        &mut self,
        blocks: &BlockTable,
        parent: u64,
        hashes: &[u64],
        end: Option<u64>,
        slot: Slot,
    ) -> Option<Receipt> {
        let at = blocks.find(parent);
        if at == NIL || blocks.is_ending(at) {
            return None;
        }
        self.path.clear();
        blocks.above(at, &mut self.path);
        self.path.reverse();
        Some(self.learn_behind(blocks, hashes, end, slot))
    }

    pub fn chain_to(&mut self, blocks: &BlockTable, hash: u64, slot: Slot) -> Option<Vec<u64>> {
        let (at, column) = (blocks.find(hash), self.column(slot)?);
        if at == NIL || blocks.is_ending(at) || !blocks.is_held_by(at, column) {
            return None;
        }
        self.path.clear();
        blocks.above(at, &mut self.path);
        Some(self.path.iter().rev().map(|at| blocks.name(*at)).collect())
    }

    /// Learns what is in `path` already, and this behind it.
    fn learn_behind(&mut self, blocks: &BlockTable, chain: &[u64], end: Option<u64>, slot: Slot) -> Receipt {
        self.tick = self.tick.wrapping_add(1);
        let nothing = Receipt { column: COLUMNS, tick: self.tick, learnt: 0, held: 0, end: None };
        let Some(column) = self.column(slot) else { return nothing };
        let most = self.holdings.column(column).limit.min(self.limit);
        let whole = self.path.len() + chain.len() < most;
        self.path.truncate(most);
        let room = most - self.path.len();
        let end = self.follow(blocks, &chain[..chain.len().min(room)], end.filter(|_| whole));
        let learnt = self.path.len() - usize::from(end.is_some());
        let mut held = learnt;
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
        // A limit that was lowered is reached in pieces: a request must not wait for all of them.
        self.trim(blocks, column, 2 * self.path.len() + MAX_HOLDINGS_PER_PIECE);
        self.sweep(blocks, 2 * self.path.len() + SWEPT_HOLDINGS);
        self.trim_all(blocks);
        Receipt { column, tick: self.tick, learnt, held, end }
    }

    pub fn take_back(&mut self, blocks: &BlockTable, chain: &[u64], slot: Slot, receipt: &Receipt) {
        // Where something was let go since, it may have been a part of this, and been learnt anew.
        let current = self.column(slot).filter(|column| *column == receipt.column);
        let whole = |column: &usize| is_after(receipt.tick, self.holdings.column(*column).settled);
        let Some(column) = current.filter(whole) else { return };
        let learnt = &chain[..receipt.learnt.min(chain.len())];
        for hash in receipt.end.iter().chain(learnt.iter().rev()) {
            let at = blocks.find(*hash);
            if at != NIL && blocks.is_held_by(at, column) && self.holdings.unclaim(at, column) {
                self.let_go(blocks, at, column);
            }
        }
    }

    /// Goes on in `path` with the places of a chain and its end, made where there are none. Stops where the
    /// chain contradicts what is known, and where there is no room; says whether it came to the end.
    fn follow(&mut self, blocks: &BlockTable, chain: &[u64], end: Option<u64>) -> Option<u64> {
        let mut parent = self.path.last().copied().unwrap_or(NIL);
        for &hash in chain {
            parent = self.place(blocks, hash, parent, false)?;
            self.path.push(parent);
        }
        if parent == NIL {
            return None;
        }
        let place = self.place(blocks, end?, parent, true)?;
        self.path.push(place);
        end
    }

    fn place(&mut self, blocks: &BlockTable, hash: u64, parent: u32, ending: bool) -> Option<u32> {
        match blocks.find_after(parent, hash) {
            NIL => blocks.add(&mut self.vacant, hash, parent, ending),
            at => blocks.follows(at, parent, ending).then_some(at),
        }
    }

    /// Lets go of what a column holds over its limit.
    fn trim(&mut self, blocks: &BlockTable, column: usize, most: usize) {
        let mut left = most;
        while left > 0 && self.holdings.column(column).blocks > self.holdings.column(column).limit {
            self.drop_oldest(blocks, column);
            left -= 1;
        }
    }

    /// Lets go of what all columns hold over the limit of all, the least recent first.
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
            // All of that age, so that columns are compared once for what was learnt at once.
            let same = |holdings: &Holdings| holdings.oldest(column).is_some_and(|oldest| oldest.1 == tick);
            while self.holdings.len() > self.limit && same(&self.holdings) {
                self.drop_oldest(blocks, column);
            }
        }
    }

    /// Lets go of so much of what condemned columns still hold, and frees those that hold nothing.
    fn sweep(&mut self, blocks: &BlockTable, most: usize) {
        let mut left = most;
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
            self.holdings.column(column).settled = tick;
            self.let_go(blocks, at, column);
        }
    }

    fn let_go(&mut self, blocks: &BlockTable, at: u32, column: usize) {
        self.holdings.remove(at, column, blocks.is_ending(at));
        blocks.release(&mut self.vacant, at, column);
    }

    /// A column for a slot, with nothing in it.
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
