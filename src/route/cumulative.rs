//! Turns of a chat that continue from the recorded token ids of the previous turn, so that a different
//! tokenisation of the same text cannot change the history.
//!
//! ```text
//! RecordedTurn        the last turn of a session: its messages as fingerprints, its answer and all its ids
//! ChatTurn            a chat whose answer a completion can give as well
//! Continuation        a chat with the messages of a recorded turn, its answer, and new ones behind them
//! tokenize_bodies     the chat, and the same chat with another answer in its history: the common end of
//!                     their tokens is the text that the chat template puts after an answer
//! prompt              recorded prompt + recorded answer + that end
//! completion          the body of the completion with this prompt
//! CompletionAnswer    the completion's answer as the chat's
//! ```
//!
//! The tokens of the history never come from the template, so that the template may render old turns in
//! another way than the latest one, as templates of reasoning models do.
//!
//! Never: a completion for a chat whose answer the engine parses into more than text.

mod answer;
mod chat;
mod fallback;
mod fingerprint;
mod recorded;
#[cfg(test)]
mod tests;

pub(crate) use answer::CompletionAnswer;
pub(crate) use chat::{ChatTurn, TokenForm, memory_needed};
pub(crate) use fallback::FallbackReason;
pub(crate) use recorded::{RecordedChat, RecordedReply, RecordedTurn, parse_tokens};
