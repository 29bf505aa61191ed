//! The chain of a prompt: a hash for each block of its canonical text, each including all blocks before it.
//!
//! `h[0] = xxh3(block[0], seed)`, `h[i] = xxh3(block[i], h[i-1])`: two prompts share exactly the hashes of
//! the blocks that they have in common from the front. The last block, where it is not full, has no hash,
//! since an engine does not keep the piece of a block either; its length counts.
//!
//! Everything that a model reads is counted in bytes of canonical text, an image included: it is written
//! as [`MEDIA_WEIGHT_BYTES`] bytes. So a block always weighs `block_bytes` and no list of weights is needed.
//!
//! Never: more blocks than the layout allows, an allocation after the first prompt.

pub mod thinning;

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::json::ByteSink;
use crate::json::work::spend;

/// The weight of an image, a sound or a video: about 1,000 tokens.
pub const MEDIA_WEIGHT_BYTES: usize = 4096;

/// The size of a chain's blocks and the length of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    /// Bytes of canonical text in a block, not 0.
    pub bytes: usize,
    /// The longest chain; what lies behind it is counted and not hashed.
    pub max_blocks: usize,
}

impl Default for BlockLayout {
    /// Blocks of about 128 tokens, over two megabytes of text.
    fn default() -> Self {
        BlockLayout { bytes: 512, max_blocks: 4096 }
    }
}

/// The kind of a canonical text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptFamily {
    /// A conversation, in whichever interface.
    #[default]
    Chat,
    /// Plain text to go on with.
    Text,
    /// Token ids of four bytes each: here four bytes are one token, whatever the model's ratio.
    Tokens,
}

/// The hashes of a prompt's blocks, and how long it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    pub blocks: Vec<u64>,
    /// Of the canonical text, blocks and rest. Where the body was cut: of what was seen.
    pub bytes: u64,
    pub block_bytes: usize,
    pub family: PromptFamily,
    /// Where the opening of a conversation ends, all up to its first user message, and its hash.
    opening: Option<(u64, u64)>,
}

// === impl Chain ===

impl Chain {
    /// The hash of the opening, the same in every turn, if the opening ends after the last block that is
    /// stored: it distinguishes conversations that the stored blocks do not.
    pub fn end(&self) -> Option<u64> {
        let blocks = (thinning::last_stored(self.blocks.len()) * self.block_bytes) as u64;
        self.opening.filter(|(bytes, _)| *bytes > blocks).map(|(_, hash)| hash)
    }
}

/// Receives the canonical text.
pub(super) trait TextSink: ByteSink {
    /// Counts bytes without reading them, if they cannot matter; false if they must be written.
    fn skip(&mut self, _bytes: usize) -> bool {
        false
    }

    /// Marks the point to which [`ChainHasher::rewind`] returns.
    fn checkpoint(&mut self) {}

    /// Marks the end of the first user message; later calls have no effect.
    fn opened(&mut self) {}
}

#[cfg(test)]
impl TextSink for Vec<u8> {}

/// One hash of the bytes that are written to it, however they are cut.
#[derive(Default)]
pub(super) struct TextDigest(Xxh3);

impl TextDigest {
    pub(super) fn hash(&self) -> u64 {
        self.0.digest()
    }
}

impl TextSink for TextDigest {}

impl ByteSink for TextDigest {
    fn write(&mut self, bytes: &[u8]) {
        spend(bytes.len());
        self.0.update(bytes);
    }
}

/// Makes a chain of the bytes that are written to it, however they are cut.
#[derive(Debug, Default)]
pub(super) struct ChainHasher {
    max_blocks: usize,
    previous: u64,
    /// The block in progress.
    rest: Vec<u8>,
    chain: Chain,
    saved: HasherCheckpoint,
}

#[derive(Debug, Default)]
struct HasherCheckpoint {
    previous: u64,
    rest: Vec<u8>,
    blocks: usize,
    bytes: u64,
}

// === impl ChainHasher ===

impl ChainHasher {
    /// A chain from the front. Buffers are kept.
    pub(super) fn begin(&mut self, seed: u64, family: PromptFamily, blocks: BlockLayout) {
        self.max_blocks = blocks.max_blocks;
        self.previous = seed;
        self.rest.clear();
        self.rest.reserve(blocks.bytes);
        self.chain.blocks.clear();
        self.chain.bytes = 0;
        self.chain.block_bytes = blocks.bytes.max(1);
        self.chain.family = family;
        self.chain.opening = None;
    }

    pub(super) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Forgets what was written since the last checkpoint.
    pub(super) fn rewind(&mut self) {
        self.previous = self.saved.previous;
        self.rest.clear();
        self.rest.extend_from_slice(&self.saved.rest);
        self.chain.blocks.truncate(self.saved.blocks);
        self.chain.bytes = self.saved.bytes;
        self.chain.opening = self.chain.opening.filter(|(bytes, _)| *bytes <= self.saved.bytes);
    }

    fn hash(&mut self, block: &[u8]) {
        spend(block.len());
        self.previous = xxh3_64_with_seed(block, self.previous);
        self.chain.blocks.push(self.previous);
    }

    /// Takes bytes to fill the block in progress; true when it is full.
    fn fill(&mut self, bytes: &mut &[u8]) -> bool {
        let missing = self.chain.block_bytes - self.rest.len();
        let (first, others) = bytes.split_at(missing.min(bytes.len()));
        spend(first.len());
        self.rest.extend_from_slice(first);
        *bytes = others;
        first.len() == missing
    }
}

impl ByteSink for ChainHasher {
    #[inline]
    fn write(&mut self, mut bytes: &[u8]) {
        self.chain.bytes += bytes.len() as u64;
        if self.rest.len() + bytes.len() < self.chain.block_bytes {
            spend(bytes.len());
            self.rest.extend_from_slice(bytes);
            return;
        }
        if self.chain.blocks.len() >= self.max_blocks {
            return;
        }
        if !self.rest.is_empty() {
            if !self.fill(&mut bytes) {
                return;
            }
            let mut full = std::mem::take(&mut self.rest);
            self.hash(&full);
            full.clear();
            self.rest = full;
        }
        // Whole blocks are hashed where they stand.
        let mut blocks = bytes.chunks_exact(self.chain.block_bytes);
        for block in &mut blocks {
            if self.chain.blocks.len() >= self.max_blocks {
                return;
            }
            self.hash(block);
        }
        self.rest.extend_from_slice(blocks.remainder());
    }
}

impl TextSink for ChainHasher {
    fn skip(&mut self, bytes: usize) -> bool {
        let skips = self.chain.blocks.len() >= self.max_blocks;
        if skips {
            self.chain.bytes += bytes as u64;
        }
        skips
    }

    fn checkpoint(&mut self) {
        self.saved.previous = self.previous;
        spend(self.rest.len());
        self.saved.rest.clear();
        self.saved.rest.extend_from_slice(&self.rest);
        self.saved.blocks = self.chain.blocks.len();
        self.saved.bytes = self.chain.bytes;
    }

    fn opened(&mut self) {
        // After the longest chain no blocks exist that could distinguish conversations.
        let hashed = self.chain.blocks.len() < self.max_blocks;
        if self.chain.family == PromptFamily::Chat && hashed && self.chain.opening.is_none() {
            spend(self.rest.len());
            let hash = xxh3_64_with_seed(&self.rest, self.previous);
            self.chain.opening = Some((self.chain.bytes, hash));
        }
    }
}

#[cfg(test)]
mod tests;
