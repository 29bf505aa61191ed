//! Detects a second model in the part of a document after the scanned bytes.
//!
//! Python's `json` uses the last of two equal keys, so the route found by the first name would not be the
//! route of the model that answers. The tail of a body streams past and is not held, so it is read in
//! pieces of any size, each byte once; only the beginning of a top-level key is kept from one piece to the
//! next.

use super::{BodyField, Scanner};
use crate::json::{ChunkVisitor, ChunkWalker};

/// The longest way to write the key, each character as `\uXXXX`.
const MAX_KEY_BYTES: usize = 6 * "model".len();

/// The reader of the rest of a document.
#[derive(Clone, Debug)]
pub struct DocumentTail {
    walker: ChunkWalker,
    keys: ModelKeyFinder,
}

/// Compares the top-level keys.
#[derive(Clone, Debug)]
struct ModelKeyFinder {
    /// The beginning of the present key.
    key: Vec<u8>,
    names_model: bool,
}

impl Scanner {
    /// What reads the document behind `body`, which has been scanned and names a model.
    pub fn tail(&self, body: &[u8]) -> DocumentTail {
        let (walker, key) = ChunkWalker::behind(&self.object, body);
        // A second name that has begun counts with its end.
        let names_model = self.found.field == Some(BodyField::Model);
        let mut keys = ModelKeyFinder { key: Vec::new(), names_model };
        key.into_iter().for_each(|part| keys.key(part));
        DocumentTail { walker, keys }
    }
}

// === impl DocumentTail ===

impl DocumentTail {
    /// Reads the next piece.
    pub fn read(&mut self, piece: &[u8]) {
        if !self.keys.names_model {
            self.walker.read(piece, &mut self.keys);
        }
    }

    /// Whether the document names its model behind the bytes that were scanned.
    pub fn names_model(&self) -> bool {
        self.keys.names_model
    }
}

// === impl ModelKeyFinder ===

impl ChunkVisitor for ModelKeyFinder {
    /// Keeps what is read of a key, and one byte more than it may have.
    fn key(&mut self, part: &[u8]) {
        let room = (MAX_KEY_BYTES + 1).saturating_sub(self.key.len());
        self.key.extend_from_slice(&part[..part.len().min(room)]);
    }

    fn key_end(&mut self) {
        self.names_model |= BodyField::of_key(&self.key) == Some(BodyField::Model);
        self.key.clear();
    }

    fn value(&mut self, _first: u8, _at: usize) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;
