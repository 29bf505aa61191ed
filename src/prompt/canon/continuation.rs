//! Continues a prompt's chain after the peeked bytes, while the rest of the body streams past.
//!
//! A message must be read as a whole, since its keys may come in any order, so one message of at most
//! [`MAX_HELD_BYTES`] is held until its end. Plain text and token ids stream through: only a cut escape and
//! the value of a cut number are kept. The part of the body after the conversation is not read.
//!
//! Every byte is examined a bounded number of times, for pieces of any size.

use super::super::chain::{ChainHasher, TextSink};
use super::ids::IdReader;
use super::text_form::write_text;
use super::turns::{self, ConversationWriter};
use crate::json::work::spend;
use crate::json::{ContainerSkip, JsonCursor, is_space, string_end};

/// The longest message after the peeked bytes that is read.
pub(super) const MAX_HELD_BYTES: usize = 1 << 20;

/// Where the reader stopped in a prompt that was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CutPoint {
    /// The offset in the body up to which bytes were used.
    pub at: usize,
    pub place: CutPlace,
}

/// The kind of place at which the reader stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutPlace {
    /// Between the messages, or before a message of which a part was written.
    Elements,
    /// Between the quotes of a text.
    Text,
    /// In a list of token ids.
    Ids,
}

/// Reads the rest of a prompt; holds the bytes that are incomplete.
#[derive(Debug, Default)]
pub(super) struct PromptContinuation {
    held: Vec<u8>,
    /// The offset up to which the held bytes were searched for the end of a message.
    searched: usize,
    /// The message in progress.
    message: Option<ContainerSkip>,
    /// Whether a message has ended, so that its written part is replaced.
    rewound: bool,
    ids: IdReader,
}

// === impl PromptContinuation ===

impl PromptContinuation {
    /// Clears the state for another prompt and keeps the buffers.
    pub(super) fn clear(&mut self) {
        self.held.clear();
        *self = PromptContinuation { held: std::mem::take(&mut self.held), ..PromptContinuation::default() };
    }

    /// Reads a piece of the body; false when the prompt has ended, or cannot be parsed any further.
    pub(super) fn resume(&mut self, place: CutPlace, piece: &[u8], out: &mut ChainHasher) -> bool {
        spend(piece.len());
        match place {
            CutPlace::Elements => {
                self.held.extend_from_slice(piece);
                self.elements(out)
            }
            CutPlace::Text => {
                self.held.extend_from_slice(piece);
                self.text(out)
            }
            CutPlace::Ids => !self.ids.read(piece, out).over,
        }
    }

    fn text(&mut self, out: &mut ChainHasher) -> bool {
        if let Some(end) = string_end(&self.held, 0, 0) {
            write_text(&self.held[..end], true, out);
            out.opened();
            return false;
        }
        let used = write_text(&self.held, false, out);
        spend(self.held.len());
        self.held.drain(..used);
        true
    }

    fn elements(&mut self, out: &mut ChainHasher) -> bool {
        let mut start = 0;
        loop {
            spend(1);
            if self.message.is_none() {
                let is_between = |byte: &u8| is_space(*byte) || *byte == b',';
                let gap = self.held[self.searched..].iter().take_while(|byte| is_between(byte)).count();
                spend(gap);
                self.searched += gap;
                start = self.searched;
                match self.held.get(start) {
                    None => break,
                    Some(b'{') => {}
                    Some(_) => return false,
                }
            }
            let message = self.message.get_or_insert_default();
            let Some(end) = message.resume(&self.held, self.searched, &mut ()) else {
                self.searched = self.held.len();
                break;
            };
            (self.message, self.searched) = (None, end);
            if !std::mem::replace(&mut self.rewound, true) {
                out.rewind();
            }
            let mut talk = ConversationWriter {
                out: &mut *out,
                head: None::<turns::ConversationHead<'_>>,
                in_user_turn: false,
            };
            // A message that has ended is complete, and complete messages never fail.
            let _ = talk.element(&mut JsonCursor::new(&self.held[start..self.searched]));
            start = self.searched;
        }
        if start > 0 {
            spend(self.held.len() - start);
            self.held.drain(..start);
        }
        self.searched -= start;
        self.message.iter_mut().for_each(|message| message.shift(start));
        self.held.len() <= MAX_HELD_BYTES
    }
}
