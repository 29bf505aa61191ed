//! The document behind the bytes that a scanner has seen: whether it names its model once more.
//!
//! Python's `json` takes the last of two equal keys, so that a route that was found by the first name would
//! not be that of the model which answers. The tail of a body streams past and is not held, so it is read in
//! pieces of any size, each byte once; only the beginning of a top-level key is kept from one piece to the
//! next. It is as lax as the scanner: the upstream refuses what is no JSON.

use super::bytes::{ByteClass, CLASSES};
use super::{BodyField, Scanner, ScannerState};
use crate::prompt::work::spend;

/// The longest way to write the key, each character as `\uXXXX`.
const MAX_KEY_BYTES: usize = 6 * "model".len();

/// How many bytes are examined at once for structure, in values that have none.
const WINDOW: usize = 32;

/// See the module.
#[derive(Clone, Debug)]
pub struct DocumentTail {
    /// Objects and arrays that are open inside the top-level object.
    depth: u64,
    /// At the top level, the next string is a key.
    expects_key: bool,
    in_string: bool,
    /// The string that is read is a top-level key.
    in_key: bool,
    /// The next byte of the string stands behind an odd number of backslashes.
    escaped: bool,
    /// The beginning of a top-level key.
    key: Vec<u8>,
    names_model: bool,
    /// The document has ended.
    over: bool,
}

impl Scanner {
    /// What reads the document behind `body`, which has been scanned and names a model.
    pub fn tail(&self, body: &[u8]) -> DocumentTail {
        let (depth, string, in_key) = match self.place {
            ScannerState::InKey { start } => (0, Some(start), true),
            ScannerState::InString { start } => (0, Some(start), false),
            ScannerState::Nested { .. } => (self.depth, None, false),
            ScannerState::NestedString { quote, .. } => (self.depth, Some(quote), false),
            _ => (0, None, false),
        };
        let mut tail = DocumentTail {
            depth,
            expects_key: matches!(self.place, ScannerState::KeyOrEnd | ScannerState::Key),
            in_string: string.is_some(),
            in_key,
            escaped: false,
            key: Vec::new(),
            // A second name has begun, and counts with its end.
            names_model: self.field == Some(BodyField::Model),
            over: matches!(
                self.place,
                ScannerState::End | ScannerState::NotAnObject | ScannerState::Malformed(_)
            ),
        };
        if let Some(text) = string.and_then(|start| body.get(start..)) {
            tail.keep_key(text);
            tail.escaped = trailing_backslashes(text) % 2 == 1;
        }
        tail
    }
}

// === impl DocumentTail ===

impl DocumentTail {
    /// Reads the next piece.
    pub fn read(&mut self, piece: &[u8]) {
        let mut at = 0;
        while at < piece.len() && !self.over && !self.names_model {
            at = if self.in_string { self.string(piece, at) } else { self.outside(piece, at) };
        }
    }

    /// Whether the document names its model behind the bytes that were scanned.
    pub fn names_model(&self) -> bool {
        self.names_model
    }

    /// Reads from `at` on to the next string. Returns where that begins.
    fn outside(&mut self, piece: &[u8], mut at: usize) -> usize {
        while let Some(&byte) = piece.get(at) {
            spend(1);
            match CLASSES[usize::from(byte)] {
                ByteClass::Quote => {
                    (self.in_string, self.escaped) = (true, false);
                    self.in_key = self.depth == 0 && self.expects_key;
                    self.key.clear();
                    return at + 1;
                }
                ByteClass::Open => self.depth += 1,
                ByteClass::Close if self.depth == 0 => {
                    self.over = true;
                    return piece.len();
                }
                ByteClass::Close => self.depth -= 1,
                ByteClass::Number | ByteClass::Other if self.depth > 0 => {
                    at += plain_bytes(&piece[at..]);
                    continue;
                }
                ByteClass::Number | ByteClass::Other => match byte {
                    b',' => self.expects_key = true,
                    b':' => self.expects_key = false,
                    _ => {}
                },
            }
            at += 1;
        }
        at
    }

    /// Reads the string that goes on at `start`. Returns where its end has been passed.
    fn string(&mut self, piece: &[u8], start: usize) -> usize {
        let mut from = start;
        loop {
            let quote = memchr::memchr(b'"', &piece[from..]);
            let at = quote.map_or(piece.len(), |quote| from + quote);
            spend(at - from + 1);
            let escaped = self.is_escaped(&piece[start..at]);
            if quote.is_some() && escaped {
                from = at + 1;
                continue;
            }
            self.keep_key(&piece[start..at]);
            self.escaped = escaped;
            if quote.is_some() {
                self.in_string = false;
                self.names_model = self.in_key && BodyField::of_key(&self.key) == Some(BodyField::Model);
            }
            return at + 1;
        }
    }

    /// Whether the byte behind `text`, with which the piece goes on in the string, is escaped.
    fn is_escaped(&self, text: &[u8]) -> bool {
        let backslashes = trailing_backslashes(text);
        let carried = self.escaped && backslashes == text.len();
        (backslashes + usize::from(carried)) % 2 == 1
    }

    /// Keeps what is read of a key, and one byte more than it may have.
    fn keep_key(&mut self, text: &[u8]) {
        if self.in_key {
            let room = (MAX_KEY_BYTES + 1).saturating_sub(self.key.len());
            self.key.extend_from_slice(&text[..text.len().min(room)]);
        }
    }
}

fn trailing_backslashes(text: &[u8]) -> usize {
    let backslashes = text.iter().rev().take_while(|byte| **byte == b'\\').count();
    spend(1 + backslashes);
    backslashes
}

/// How many bytes from the first on, which is neither quote nor bracket, are none either, within a window.
fn plain_bytes(bytes: &[u8]) -> usize {
    let Some(window) = bytes.first_chunk::<WINDOW>() else { return 1 };
    spend(WINDOW);
    // Without branches, so that it becomes vector instructions.
    let mut structure = 0;
    for byte in window {
        let folded = byte | 0x20;
        structure |= u8::from((*byte == b'"') | (folded == b'{') | (folded == b'}'));
    }
    if structure == 0 {
        return WINDOW;
    }
    let is_plain = |byte: &&u8| matches!(CLASSES[usize::from(**byte)], ByteClass::Number | ByteClass::Other);
    window.iter().take_while(is_plain).count().max(1)
}

#[cfg(test)]
mod tests;
