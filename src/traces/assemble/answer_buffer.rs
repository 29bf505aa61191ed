//! A part of an answer on its way to the assembler: bytes as they came, and tokens that the relay has read.
//!
//! A token takes a tenth of the bytes of its event, and is not parsed a second time.
//!
//! ```text
//! run of bytes: RUN, length (u64), bytes
//! token:        TOKEN + HAS_LOGPROB + HAS_ID + IS_CONTENT, index (u32), logprob (f64), id (u32), lengths of
//!               key and text (u32), key, text; of IS_CONTENT there is no key
//! ```
//!
//! Never: a token with a usage, an allocation of its own for a token.

use crate::reply::token_event::TokenEvent;

const RUN: u8 = 0;
const TOKEN: u8 = 1;
const HAS_LOGPROB: u8 = 2;
const HAS_ID: u8 = 4;
const IS_CONTENT: u8 = 8;

/// The key of most tokens.
const CONTENT: &str = "content";

/// What a run of bytes takes beside them: its tag and its length.
const RUN_HEAD_BYTES: usize = 1 + size_of::<u64>();

/// What a token takes beside its key and its text.
const TOKEN_HEAD_BYTES: usize = 1 + 4 + 8 + 4 + 4 + 4;

/// See the module.
#[derive(Debug, Default)]
pub struct AnswerBuffer {
    bytes: Vec<u8>,
    /// Where the run begins that is last; `None`: a token is, or nothing.
    last_run: Option<usize>,
}

/// One part of a buffer.
#[derive(Debug, PartialEq)]
pub(super) enum AnswerSection<'a> {
    Bytes(&'a [u8]),
    Token(TokenEvent<'a>),
}

// === impl AnswerBuffer ===

impl AnswerBuffer {
    /// The bytes that `piece` takes at the most.
    pub fn piece_bytes(piece: &[u8]) -> usize {
        RUN_HEAD_BYTES + piece.len()
    }

    /// The bytes that `token` takes at the most.
    pub fn token_bytes(token: &TokenEvent<'_>) -> usize {
        TOKEN_HEAD_BYTES + token.key.len() + token.text.len()
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Removes what was appended; the room stays.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.last_run = None;
    }

    /// Makes room for so many bytes in all.
    pub fn reserve(&mut self, room: usize) {
        self.bytes.reserve_exact(room.saturating_sub(self.bytes.len()));
    }

    /// Appends the next bytes of the answer.
    pub fn push_piece(&mut self, piece: &[u8]) {
        let start = match self.last_run {
            Some(start) => start,
            None => {
                let start = self.bytes.len();
                self.bytes.extend_from_slice(&[RUN; RUN_HEAD_BYTES]);
                self.last_run = Some(start);
                start
            }
        };
        self.bytes.extend_from_slice(piece);
        let length = (self.bytes.len() - start - RUN_HEAD_BYTES) as u64;
        self.bytes[start + 1..start + RUN_HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
    }

    /// Appends a token without its usage. The event of the token came between two events.
    pub fn push_token(&mut self, token: &TokenEvent<'_>) {
        debug_assert!(token.usage.is_none(), "it would be lost");
        let length = |text: &str| (text.len() as u32).to_le_bytes();
        let is_content = token.key == CONTENT;
        let key = if is_content { "" } else { token.key };
        let flags = if token.logprob.is_some() { HAS_LOGPROB } else { 0 }
            | if token.token_id.is_some() { HAS_ID } else { 0 }
            | if is_content { IS_CONTENT } else { 0 };
        let mut head = [TOKEN | flags; TOKEN_HEAD_BYTES];
        head[1..5].copy_from_slice(&token.index.to_le_bytes());
        head[5..13].copy_from_slice(&token.logprob.unwrap_or_default().to_le_bytes());
        head[13..17].copy_from_slice(&token.token_id.unwrap_or_default().to_le_bytes());
        head[17..21].copy_from_slice(&length(key));
        head[21..].copy_from_slice(&length(token.text));
        self.last_run = None;
        self.bytes.extend_from_slice(&head);
        self.bytes.extend_from_slice(key.as_bytes());
        self.bytes.extend_from_slice(token.text.as_bytes());
    }

    /// What was appended, in order.
    pub(super) fn sections(&self) -> impl Iterator<Item = AnswerSection<'_>> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || match *rest.first()? {
            RUN => {
                let length = u64::from_le_bytes(*rest.get(1..)?.first_chunk()?);
                let (bytes, behind) = rest.get(RUN_HEAD_BYTES..)?.split_at_checked(length as usize)?;
                rest = behind;
                Some(AnswerSection::Bytes(bytes))
            }
            flags => {
                let (head, behind) = rest.split_first_chunk::<TOKEN_HEAD_BYTES>()?;
                let number =
                    |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
                let (key, behind) = behind.split_at_checked(number(17) as usize)?;
                let (text, behind) = behind.split_at_checked(number(21) as usize)?;
                rest = behind;
                let logprob = f64::from_le_bytes(*head[5..].first_chunk()?);
                Some(AnswerSection::Token(TokenEvent {
                    index: number(1),
                    key: if flags & IS_CONTENT != 0 { CONTENT } else { std::str::from_utf8(key).ok()? },
                    text: std::str::from_utf8(text).ok()?,
                    logprob: (flags & HAS_LOGPROB != 0).then_some(logprob),
                    token_id: (flags & HAS_ID != 0).then_some(number(13)),
                    usage: None,
                }))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_bytes_and_tokens_in_their_order() {
        let token = |index: u32, text| TokenEvent {
            index,
            key: if index == 2 { "reasoning" } else { "content" },
            text,
            logprob: (index != 1).then_some(-0.1 * f64::from(index)),
            token_id: (index != 2).then_some(u32::MAX - index),
            usage: None,
        };
        let tokens = [token(0, " a"), token(1, ""), token(2, "é"), token(u32::MAX, "b")];
        let mut buffer = AnswerBuffer::default();
        assert!(buffer.is_empty() && buffer.sections().next().is_none());
        let mut most = AnswerBuffer::piece_bytes(b"one two");
        buffer.push_piece(b"one");
        buffer.push_piece(b" two");
        for token in &tokens {
            buffer.push_token(token);
            most += AnswerBuffer::token_bytes(token);
        }
        assert!(buffer.len() <= most);
        buffer.push_piece(b"three");
        let mut expected = vec![AnswerSection::Bytes(b"one two")];
        expected.extend(tokens.map(AnswerSection::Token));
        expected.push(AnswerSection::Bytes(b"three"));
        assert_eq!(buffer.sections().collect::<Vec<_>>(), expected);
        buffer.clear();
        buffer.push_piece(b"four");
        assert_eq!(buffer.sections().collect::<Vec<_>>(), [AnswerSection::Bytes(b"four")]);
    }
}
