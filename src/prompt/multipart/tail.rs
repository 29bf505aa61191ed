//! Detects a second model in the part of a form after the scanned bytes.
//!
//! Starlette uses the last of two equal fields, so the route found by the first one would not be the route of
//! the model that answers. The tail of a form streams past and is not held, except for the headers of a part
//! or the beginning of a boundary that the scanner has not finished.

use super::{FormParserState, FormScanner};

/// The reader of the rest of a form.
#[derive(Clone, Debug)]
pub struct FormTail {
    scanner: FormScanner,
    /// The bytes that the scanner still needs; its offsets are into these.
    kept: Vec<u8>,
}

impl FormScanner {
    /// What reads the form behind `body`, which has been scanned and names a model.
    pub fn tail(&self, body: &[u8]) -> FormTail {
        let mut scanner = self.clone();
        // A second field whose content has begun counts with its end.
        scanner.model = None;
        let mut tail = FormTail { kept: Vec::new(), scanner };
        let needed = tail.scanner.needed_from().min(body.len());
        tail.kept.extend_from_slice(&body[needed..]);
        tail.scanner.forget(needed);
        tail
    }

    /// Where the bytes begin that are looked at again.
    fn needed_from(&self) -> usize {
        match self.place {
            FormParserState::Start => 0,
            FormParserState::Headers { start } => start.min(self.at),
            FormParserState::Content { .. } | FormParserState::End { .. } | FormParserState::Malformed(_) => {
                self.at
            }
        }
    }

    /// Counts offsets from behind so many bytes, which are not looked at again.
    fn forget(&mut self, bytes: usize) {
        self.at -= bytes;
        match &mut self.place {
            // The start of a content counts only for its span, of which nothing but its presence is used.
            FormParserState::Headers { start }
            | FormParserState::Content { start, .. }
            | FormParserState::End { start } => {
                *start = start.saturating_sub(bytes);
            }
            FormParserState::Malformed(offset) => *offset = offset.saturating_sub(bytes),
            FormParserState::Start => {}
        }
    }
}

// === impl FormTail ===

impl FormTail {
    /// Reads the next piece.
    pub fn read(&mut self, piece: &[u8]) {
        if self.is_over() {
            return;
        }
        self.kept.extend_from_slice(piece);
        self.scanner.scan(&self.kept);
        let needed = self.scanner.needed_from().min(self.kept.len());
        self.kept.drain(..needed);
        self.scanner.forget(needed);
        self.kept.shrink_to(2 * self.kept.len());
    }

    /// Whether the form names its model behind the bytes that were scanned.
    pub fn names_model(&self) -> bool {
        self.scanner.model.is_some()
    }

    /// Whether the form cannot be followed any more, or engines may read it differently.
    pub fn is_lost(&self) -> bool {
        self.scanner.is_lost()
    }

    fn is_over(&self) -> bool {
        self.names_model()
            || matches!(self.scanner.place, FormParserState::End { .. } | FormParserState::Malformed(_))
    }
}

#[cfg(test)]
mod tests;
