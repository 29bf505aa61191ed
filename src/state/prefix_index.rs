//! The prefix index: which upstream is believed to hold which blocks of which prompts.
//!
//! A prompt is a chain of hashes, each naming a block and all before it. `learn` is told of every request
//! that is sent, and `lookup` says of a chain how many leading blocks each upstream holds. Neither knows a
//! prompt, a model or a clock; "recent" is counted in what was learnt, so that a replay on a virtual clock
//! sees what a server sees.
//!
//! # What is forgotten
//!
//! Everything is bounded: the pairs of block and upstream altogether, and the blocks of each upstream by what
//! its engine's cache holds, when that is known. The least recent pair goes first, of the upstream or of
//! all. A chain is touched from its tail to its head, so that a head is always more recent than what follows
//! it: tails go before heads, and an upstream that holds a block holds all before it.
//!
//! # Slots and columns
//!
//! An upstream has a slot for as long as it is there, a small number that is used again. Inside, the slot has
//! a column: one bit in every block's holders. To forget an upstream is to give its slot another column,
//! which takes no time; what the old column held goes bit by bit with what is learnt afterwards.
//!
//! # Locks
//!
//! One mutex for all writers: learning changes lists that run through the whole index, takes some
//! microseconds, and happens once a request. Readers take no lock at all: they walk over atomics, never wait
//! for a writer, and never make one wait. What they read may be a moment old; it is a belief in any case.

mod blocks;
mod directory;
mod hits;
mod holdings;
mod writer;

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::hits::{Hits, Prompt};
pub use self::writer::Receipt;

use self::blocks::{BlockTable, MAX_HOLDER_WORDS, WORD};
use self::directory::NIL;
use self::writer::Writer;

/// The most upstreams that there may be at once, those included that were forgotten a moment ago.
const COLUMNS: usize = WORD * MAX_HOLDER_WORDS;

/// An upstream's place in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u16);

pub struct Index {
    blocks: BlockTable,
    columns: Columns,
    writer: Mutex<Writer>,
}

/// What readers know of columns.
struct Columns {
    /// Whose column it is; of those in use.
    slots: Box<[AtomicU16]>,
    /// A bit for each column in use.
    used: Box<[AtomicU64]>,
    /// Words of `used`, and slots, that there ever was a use for.
    words: AtomicUsize,
    most: AtomicUsize,
}

/// How full the index is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Different blocks, and endings.
    pub blocks: usize,
    /// Pairs of block and upstream; what `limit` bounds.
    pub pairs: usize,
    /// Of memory.
    pub bytes: usize,
}

// === impl Slot ===

impl Slot {
    /// From 0, without large gaps.
    pub fn number(self) -> usize {
        usize::from(self.0)
    }
}

// === impl Index ===

impl Index {
    /// An index of at most `limit` blocks, counted once for each upstream that holds them. `seed` is random,
    /// so that clients cannot choose prompts that are slow to look up.
    pub fn new(limit: usize, seed: u64) -> Self {
        // What is learnt goes in before the oldest goes out.
        let most = limit.saturating_mul(2).clamp(1, 1 << 30);
        Index {
            blocks: BlockTable::new(most, seed),
            columns: Columns::new(),
            writer: Mutex::new(Writer::new(limit, most)),
        }
    }

    /// A slot for an upstream that comes; `None` when there are thousands already.
    pub fn enter(&self) -> Option<Slot> {
        self.writer().enter(&self.blocks, &self.columns)
    }

    /// The upstream is gone, and its slot may be given to another. Nothing may use the slot any more.
    pub fn leave(&self, slot: Slot) {
        self.writer().leave(&self.columns, slot);
    }

    /// The upstream's cache is empty, after a restart.
    pub fn forget(&self, slot: Slot) {
        self.writer().forget(&self.blocks, &self.columns, slot);
    }

    /// At most so many blocks of this upstream, as many as its engine's cache has; `None` is no limit of its
    /// own.
    pub fn limit(&self, slot: Slot, blocks: Option<usize>) {
        // A lower limit may cost many blocks: between pieces of work others have their turn.
        while self.writer().limit(&self.blocks, slot, blocks.unwrap_or(usize::MAX)) {}
    }

    /// A request with this chain goes to the upstream.
    ///
    /// `end` distinguishes conversations with equal blocks: where the opening of a conversation, all up to
    /// its first user message, ends behind the last block, it is the hash of the opening; else there is
    /// none. It is the same in every turn, so that short turns count once, and is no block of any cache.
    pub fn learn(&self, chain: &[u64], end: Option<u64>, slot: Slot) -> Receipt {
        self.writer().learn(&self.blocks, chain, end, slot)
    }

    /// Like `learn`, for a chain that follows a known block: an upstream that holds that block holds all
    /// before it. Returns `None`, and learns nothing, when no upstream holds it.
    pub fn learn_after(&self, parent: u64, hashes: &[u64], end: Option<u64>, slot: Slot) -> Option<Receipt> {
        self.writer().learn_after(&self.blocks, parent, hashes, end, slot)
    }

    /// The whole chain up to a block that the upstream holds.
    pub fn chain_to(&self, hash: u64, slot: Slot) -> Option<Vec<u64>> {
        self.writer().chain_to(&self.blocks, hash, slot)
    }

    /// Takes back what was learnt from a request that never reached the engine, except what other requests
    /// taught since. The chain must be the same.
    pub fn take_back(&self, chain: &[u64], slot: Slot, receipt: Receipt) {
        self.writer().take_back(&self.blocks, chain, slot, &receipt);
    }

    /// How much of the chain each upstream holds.
    pub fn lookup(&self, chain: &[u64], out: &mut Hits) {
        let columns = &self.columns;
        let words = columns.words.load(Acquire);
        out.begin(chain.len(), columns.most.load(Acquire), self.blocks.conversations());
        let mut leading = std::mem::take(&mut out.leading);
        leading.clear();
        leading.extend(columns.used[..words].iter().map(|word| word.load(Acquire)));
        let mut at = NIL;
        for &hash in chain {
            at = self.blocks.find_after(at, hash);
            if at == NIL {
                break;
            }
            let branches = self.blocks.branches(at);
            let mut holding = 0;
            for (word, leads) in leading.iter_mut().enumerate() {
                let holders = self.blocks.holders(at, word);
                // The place may have gone to another block meanwhile.
                let holders = if self.blocks.is(at, hash) { holders } else { 0 };
                if *leads & !holders != 0 {
                    columns.each(word, *leads & !holders, |slot| out.ends(slot));
                    *leads &= holders;
                }
                holding += leads.count_ones();
            }
            if holding == 0 {
                break;
            }
            out.saw(branches, holding);
        }
        for (word, leads) in leading.iter().enumerate() {
            columns.each(word, *leads, |slot| out.ends(slot));
        }
        out.leading = leading;
    }

    pub fn size(&self) -> Size {
        let writer = self.writer();
        Size {
            blocks: self.blocks.len(),
            pairs: writer.pairs(),
            bytes: self.blocks.bytes() + writer.bytes() + self.columns.bytes(),
        }
    }

    /// Blocks that this upstream is believed to hold.
    pub fn held(&self, slot: Slot) -> usize {
        self.writer().held(slot)
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A writer that died in the middle leaves a belief somewhat wrong, which is no reason to die too.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Columns ===

impl Columns {
    fn new() -> Self {
        Columns {
            slots: (0..COLUMNS).map(|_| AtomicU16::new(0)).collect(),
            used: (0..MAX_HOLDER_WORDS).map(|_| AtomicU64::new(0)).collect(),
            words: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.slots) + size_of_val(&*self.used)
    }

    /// The slots of these columns of a word.
    fn each(&self, word: usize, columns: u64, mut tell: impl FnMut(usize)) {
        let mut columns = columns;
        while columns != 0 {
            let column = word * WORD + columns.trailing_zeros() as usize;
            tell(usize::from(self.slots[column].load(Relaxed)));
            columns &= columns - 1;
        }
    }

    fn open(&self, column: usize, slot: Slot) {
        self.slots[column].store(slot.0, Relaxed);
        self.most.fetch_max(slot.number() + 1, Release);
        self.used[column / WORD].fetch_or(1 << (column % WORD), Release);
        self.words.fetch_max(column / WORD + 1, Release);
    }

    fn close(&self, column: usize) {
        self.used[column / WORD].fetch_and(!(1 << (column % WORD)), Release);
    }
}

#[cfg(test)]
mod tests;
