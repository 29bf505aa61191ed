//! What comes after the bytes that were looked at first: the chain goes on as the body streams past.
//!
//! A message has to be seen as a whole, since its keys may come in any order, so one message is held
//! until it is over, and [`HELD`] bytes at the most; a plain text and token ids flow through, of which a cut
//! escape and the value of a cut number are all that is kept. What follows the conversation in the body is
//! not read any more.
//!
//! Every byte is looked at a bounded number of times, however small the pieces are in which it comes.

use super::super::chain::{Hasher, Sink};
use super::super::scan::bytes::string_end;
use super::super::work::spend;
use super::cursor::Cursor;
use super::ids::IdReader;
use super::text_form::write_text;
use super::turns::{self, Talk};

/// The longest message behind the first bytes that is still understood.
pub const HELD: usize = 1 << 20;

/// Where a prompt stopped that was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// In the body: from here on nothing has been used.
    pub at: usize,
    pub place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Between the messages, or before one that was written as far as it was there.
    Elements,
    /// Between the quotes of a text.
    Text,
    /// In a list of token ids.
    Ids,
}

/// The bytes that are not understood yet.
#[derive(Debug, Default)]
pub struct Rest {
    held: Vec<u8>,
    /// Up to here they have been looked at for the end of a message.
    looked: usize,
    depth: u64,
    /// Where the text of the string in progress begins.
    string: Option<usize>,
    /// A message has come to its end, so what was written of it before is replaced.
    rewound: bool,
    ids: IdReader,
}

// === impl Rest ===

impl Rest {
    pub fn clear(&mut self) {
        self.held.clear();
        *self = Rest { held: std::mem::take(&mut self.held), ..Rest::default() };
    }

    /// Takes a piece of the body; false when the prompt is over, or cannot be followed any longer.
    pub fn go_on(&mut self, place: Place, piece: &[u8], out: &mut Hasher) -> bool {
        spend(piece.len());
        match place {
            Place::Elements => {
                self.held.extend_from_slice(piece);
                self.elements(out)
            }
            Place::Text => {
                self.held.extend_from_slice(piece);
                self.text(out)
            }
            Place::Ids => !self.ids.read(piece, out).over,
        }
    }

    fn text(&mut self, out: &mut Hasher) -> bool {
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

    fn elements(&mut self, out: &mut Hasher) -> bool {
        let mut start = 0;
        loop {
            spend(1);
            if self.depth == 0 {
                let between = |byte: &u8| byte.is_ascii_whitespace() || *byte == b',';
                let gap = self.held[self.looked..].iter().take_while(|byte| between(byte)).count();
                spend(gap);
                self.looked += gap;
                start = self.looked;
                match self.held.get(start) {
                    None => break,
                    Some(b'{') => {}
                    Some(_) => return false,
                }
            }
            if !self.find_end() {
                break;
            }
            if !std::mem::replace(&mut self.rewound, true) {
                out.rewind();
            }
            let mut talk = Talk { out: &mut *out, head: None::<turns::Head<'_>>, asks: false };
            // A message that ends is whole, and a whole one is no error.
            let _ = talk.element(&mut Cursor::new(&self.held[start..self.looked]));
            start = self.looked;
        }
        if start > 0 {
            spend(self.held.len() - start);
            self.held.drain(..start);
        }
        self.looked -= start;
        self.string = self.string.map(|string| string - start);
        self.held.len() <= HELD
    }

    /// Looks for the bracket that closes the message in progress, and stands behind it.
    fn find_end(&mut self) -> bool {
        loop {
            if let Some(start) = self.string {
                let Some(end) = string_end(&self.held, start, self.looked.max(start)) else {
                    self.looked = self.held.len();
                    return false;
                };
                (self.string, self.looked) = (None, end + 1);
            }
            let Some(&byte) = self.held.get(self.looked) else { return false };
            self.looked += 1;
            spend(1);
            match byte {
                b'"' => self.string = Some(self.looked),
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth -= 1,
                _ => {}
            }
            if self.depth == 0 {
                return true;
            }
        }
    }
}
