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
mod fingerprint;
mod recorded;
#[cfg(test)]
mod tests;

pub use answer::{CompletionAnswer, CompletionFault};
pub use chat::{ChatTurn, MAX_CHAT_BYTES, TokenForm, memory_needed};
pub use recorded::{Continuation, RecordedChat, RecordedReply, RecordedTurn, parse_tokens};

/// The members of a chat, of a completion, or of an answer.
type ChatFields = serde_json::Map<String, serde_json::Value>;

/// The reason why a turn with a recorded previous turn is sent as a chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallbackReason {
    /// The messages differ from those of the last turn, its answer and new ones after it.
    History,
    /// Another model, or other settings of the chat template.
    Settings,
    /// The chat has tools: calls are parsed out of its answer.
    Tools,
    /// The answer was parsed into reasoning and content.
    Reasoning,
    /// The chat requests a structured answer.
    Structured,
    /// A message has content other than text.
    Media,
    /// The chat requests several choices.
    Choices,
    /// The chat requests alternatives, or log-probabilities of the prompt.
    Logprobs,
    /// The chat has fields that a completion lacks, or reads in another way.
    Fields,
    /// The body is too large, or memory for it is lacking.
    Size,
    /// The last turn's answer came without token ids.
    Ids,
    /// The last turn was not assembled in time.
    Late,
    /// No upstream tokenised the chat.
    Tokenizer,
    /// The two chats have no common end of their tokens.
    Template,
    /// The upstream rejected the completion.
    Refused,
}

impl FallbackReason {
    /// The name in metrics.
    pub fn label(self) -> &'static str {
        match self {
            FallbackReason::History => "history",
            FallbackReason::Settings => "settings",
            FallbackReason::Tools => "tools",
            FallbackReason::Reasoning => "reasoning",
            FallbackReason::Structured => "structured",
            FallbackReason::Media => "media",
            FallbackReason::Choices => "choices",
            FallbackReason::Logprobs => "logprobs",
            FallbackReason::Fields => "fields",
            FallbackReason::Size => "size",
            FallbackReason::Ids => "ids",
            FallbackReason::Late => "late",
            FallbackReason::Tokenizer => "tokenizer",
            FallbackReason::Template => "template",
            FallbackReason::Refused => "refused",
        }
    }
}
