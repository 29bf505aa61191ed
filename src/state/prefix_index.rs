//! The prefix index: the blocks of prompts that each upstream is believed to hold in its cache.
//!
//! A prompt is a chain of hashes, each of a block and all blocks before it. `learn` records every request
//! that is sent, and `lookup` returns how many leading blocks of a chain each upstream holds. The index has
//! no prompts, models or clock; recency is counted in calls of `learn`, so that a replay on a virtual clock
//! behaves as a server.
//!
//! # Eviction
//!
//! Two limits apply: one on all pairs of block and upstream, and one on the blocks of each upstream, the
//! capacity of its engine's cache if known. The least recent pair is evicted first, of the upstream or of
//! all. A block is as recent as the latest prompt through it: tails are evicted before heads, and an upstream
//! that holds a block holds all blocks before it. See `holdings`.
//!
//! # Stored blocks
//!
//! Behind the first blocks of a chain one of eight is stored, and stands for eight: see
//! `prompt::chain::thinning`. All counts, sizes and limits are of blocks, stored or not. An upstream that
//! holds a stored block and not the next one of a prompt is believed to hold half of the blocks between.
//! Learning costs the new blocks of a prompt, not its length.
//!
//! # Slots and columns
//!
//! An upstream has a slot while it is in the fleet: a small number that is reused. A slot has a column: one
//! bit in the holders of every block. Forgetting an upstream gives its slot another column, in constant
//! time; later calls of `learn` clear the bits of the old column step by step.
//!
//! # Locks
//!
//! All writers share one mutex: `learn` changes lists across the whole index, takes some microseconds, and
//! runs once a request. Readers take no lock: they read atomics and neither wait for a writer nor delay one.
//! Their view may be slightly stale, which is acceptable for an estimate.

mod blocks;
mod branch_changes;
mod directory;
mod hits;
mod holdings;
mod oldest;
mod receipt;
mod writer;

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::hits::{Hits, PromptSize};
pub use self::receipt::{ChainTail, Receipt};

use self::blocks::{BlockTable, MAX_HOLDER_WORDS, WORD_BITS};
use self::directory::NO_ENTRY;
use self::writer::Writer;
use crate::prompt::chain::thinning::{stored_count, stored_depth};

/// The largest number of upstreams at once, including recently forgotten ones.
const MAX_COLUMNS: usize = WORD_BITS * MAX_HOLDER_WORDS;

/// The largest group of upstreams.
pub const MAX_GROUP: usize = u8::MAX as usize;

/// The number of an upstream in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u16);

/// The prefix index of one balancer.
pub struct Index {
    blocks: BlockTable,
    columns: Columns,
    writer: Mutex<Writer>,
    /// The largest limit that `set_limit` can set.
    max_limit: usize,
}

/// The columns, as readers see them.
struct Columns {
    /// The slot of each column in use.
    slots: Box<[AtomicU16]>,
    /// A bit for each column in use.
    used: Box<[AtomicU64]>,
    /// The number of words of `used` that were ever in use.
    words: AtomicUsize,
    /// The number of slots that were ever in use.
    slot_count: AtomicUsize,
}

/// The size of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// The number of different blocks and endings, stored or not.
    pub blocks: usize,
    /// The number of pairs of block and upstream, stored or not, which `limit` bounds.
    pub pairs: usize,
    /// The memory in bytes.
    pub bytes: usize,
}

/// The last block of a chain that an upstream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLeaf {
    pub hash: u64,
    /// The ending behind the block.
    pub end: Option<u64>,
}

// === impl Slot ===

impl Slot {
    /// Returns the number: from 0, without large gaps.
    pub fn number(self) -> usize {
        usize::from(self.0)
    }
}

// === impl Index ===

impl Index {
    /// Builds an index of at most `limit` pairs of block and upstream. `seed` is random, so that clients
    /// cannot choose prompts that are slow to look up.
    pub fn new(limit: usize, seed: u64) -> Self {
        // New pairs are added before the oldest are evicted.
        let most = limit.saturating_mul(2).clamp(1, 1 << 30);
        Index {
            blocks: BlockTable::new(most, seed),
            columns: Columns::new(),
            writer: Mutex::new(Writer::new(limit, most)),
            max_limit: limit,
        }
    }

    /// Returns a slot for a new upstream; `None` when all are in use.
    pub fn enter(&self) -> Option<Slot> {
        self.writer().enter(&self.blocks, &self.columns)
    }

    /// Frees the slot of an upstream that has left. The caller must not use the slot any more.
    pub fn leave(&self, slot: Slot) {
        self.writer().leave(&self.columns, slot);
    }

    /// Forgets all blocks of an upstream: its cache is empty after a restart.
    pub fn forget(&self, slot: Slot) {
        self.writer().forget(&self.blocks, &self.columns, slot);
    }

    /// Limits the blocks of an upstream to the capacity of its engine's cache; `None`: no own limit.
    pub fn limit(&self, slot: Slot, blocks: Option<usize>) {
        // A lower limit may evict many blocks; the lock is released between steps.
        while self.writer().limit(&self.blocks, slot, blocks.unwrap_or(usize::MAX)) {}
    }

    /// Limits all pairs of block and upstream, up to the limit that the index was built with.
    pub fn set_limit(&self, limit: usize) {
        let limit = limit.min(self.max_limit);
        while self.writer().limit_all(&self.blocks, limit) {}
    }

    /// Sets the group of an upstream, at most `MAX_GROUP`: conversations of different groups are no evidence
    /// for one another. A chain belongs to the group of the first upstream that was sent it.
    pub fn set_group(&self, slot: Slot, group: usize) {
        self.writer().set_group(slot, group);
    }

    /// Learns that a request with this chain is sent to the upstream.
    ///
    /// `end` distinguishes conversations with equal stored blocks. When the opening of a conversation, all up
    /// to its first user message, ends behind the last stored block, `end` is the hash of the opening;
    /// otherwise `None`. The opening is equal in every turn, so that short turns count once. An ending is not
    /// a block of a cache.
    pub fn learn(&self, chain: &[u64], end: Option<u64>, slot: Slot) -> Receipt {
        self.writer().learn(&self.blocks, chain, end, slot)
    }

    /// As `learn`, given the stored blocks of a chain only.
    pub fn learn_stored(&self, hashes: &[u64], end: Option<u64>, slot: Slot) -> Option<Receipt> {
        self.writer().learn_stored(&self.blocks, None, hashes, end, slot)
    }

    /// As `learn_stored`, for blocks that follow a known one: an upstream that holds a block holds all before
    /// it. Learns nothing and returns `None` when no upstream holds `parent`.
    pub fn learn_after(&self, parent: u64, hashes: &[u64], end: Option<u64>, slot: Slot) -> Option<Receipt> {
        self.writer().learn_stored(&self.blocks, Some(parent), hashes, end, slot)
    }

    /// Returns the stored blocks of the chain up to one that the upstream holds.
    pub fn chain_to(&self, hash: u64, slot: Slot) -> Option<Vec<u64>> {
        self.writer().chain_to(&self.blocks, hash, slot)
    }

    /// Returns the ends of the chains that an upstream holds, the least recent first.
    pub fn leaves(&self, slot: Slot) -> Vec<IndexLeaf> {
        self.writer().leaves(&self.blocks, slot)
    }

    /// Undoes `learn` of the same chain for a request that never reached the engine, except for blocks that
    /// other requests have learned since.
    pub fn take_back(&self, chain: &[u64], slot: Slot, receipt: Receipt) {
        self.writer().take_back(&self.blocks, chain, slot, &receipt);
    }

    /// As `take_back`, for a `learn_stored` or `learn_after` of the same blocks.
    pub fn release(&self, hashes: &[u64], end: Option<u64>, slot: Slot) {
        self.writer().release_stored(&self.blocks, hashes, end, slot);
    }

    /// Looks up how many leading blocks of the chain each upstream holds.
    pub fn lookup(&self, chain: &[u64], out: &mut Hits) {
        let columns = &self.columns;
        let words = columns.words.load(Acquire);
        out.begin(chain.len(), columns.slot_count.load(Acquire));
        let mut leading = std::mem::take(&mut out.leading);
        leading.clear();
        leading.extend(columns.used[..words].iter().map(|word| word.load(Acquire)));
        let mut at = NO_ENTRY;
        for number in 1..=stored_count(chain.len()) {
            let hash = chain[stored_depth(number) - 1];
            at = self.blocks.find_after(at, hash);
            if at == NO_ENTRY {
                break;
            }
            if number == 1 {
                out.set_conversations(self.blocks.conversations(at));
            }
            let branches = self.blocks.branches(at);
            let mut holding = 0;
            for (word, leads) in leading.iter_mut().enumerate() {
                let holders = self.blocks.holders(at, word);
                // The entry may have been reused for another block meanwhile.
                let holders = if self.blocks.is(at, hash) { holders } else { 0 };
                let ending = *leads & !holders;
                if ending != 0 {
                    // With many upstreams, most hold nothing, and nothing is recorded of these.
                    if out.known() > 0 {
                        columns.each(word, ending, |slot| out.end_hit(slot));
                    }
                    *leads &= holders;
                }
                holding += leads.count_ones();
            }
            if holding == 0 {
                break;
            }
            out.add_blocks(stored_depth(number), branches, holding);
        }
        if out.known() > 0 {
            for (word, leads) in leading.iter().enumerate() {
                columns.each(word, *leads, |slot| out.end_hit(slot));
            }
        }
        out.leading = leading;
    }

    /// Returns the size of the index.
    pub fn size(&self) -> Size {
        let writer = self.writer();
        Size {
            blocks: self.blocks.len(),
            pairs: writer.pairs(),
            bytes: self.blocks.bytes() + writer.bytes() + self.columns.bytes(),
        }
    }

    /// Returns the number of blocks that this upstream is believed to hold.
    pub fn held(&self, slot: Slot) -> usize {
        self.writer().held(slot)
    }

    /// Returns the limit of all pairs.
    #[cfg(test)]
    pub fn limit_of_all(&self) -> usize {
        self.writer().touched_and_limit().1
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A writer that panicked leaves the estimates slightly wrong, which is acceptable.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Columns ===

impl Columns {
    fn new() -> Self {
        Columns {
            slots: (0..MAX_COLUMNS).map(|_| AtomicU16::new(0)).collect(),
            used: (0..MAX_HOLDER_WORDS).map(|_| AtomicU64::new(0)).collect(),
            words: AtomicUsize::new(0),
            slot_count: AtomicUsize::new(0),
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.slots) + size_of_val(&*self.used)
    }

    /// Visits the slots of these columns of a word.
    fn each(&self, word: usize, columns: u64, mut visit: impl FnMut(usize)) {
        let mut columns = columns;
        while columns != 0 {
            let column = word * WORD_BITS + columns.trailing_zeros() as usize;
            visit(usize::from(self.slots[column].load(Relaxed)));
            columns &= columns - 1;
        }
    }

    fn open(&self, column: usize, slot: Slot) {
        self.slots[column].store(slot.0, Relaxed);
        self.slot_count.fetch_max(slot.number() + 1, Release);
        self.used[column / WORD_BITS].fetch_or(1 << (column % WORD_BITS), Release);
        self.words.fetch_max(column / WORD_BITS + 1, Release);
    }

    fn close(&self, column: usize) {
        self.used[column / WORD_BITS].fetch_and(!(1 << (column % WORD_BITS)), Release);
    }
}

#[cfg(test)]
mod tests;
