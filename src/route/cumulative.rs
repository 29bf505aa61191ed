//! Turns of a chat that continue from the recorded token ids of the turn before, so that text which would be
//! tokenised in another way cannot change the history.
//!
//! ```text
//! RecordedTurn        the last turn of a session: its messages as fingerprints, its answer and all its ids
//! ChatTurn            a chat whose answer a completion can give as well
//! Continuation        a chat with the messages of a recorded turn, its answer, and new ones behind them
//! tokenize_bodies     the chat, and the same chat with another answer in its history: what the tokens of
//!                     both end with is what the chat template puts behind an answer
//! prompt              recorded prompt + recorded answer + that end
//! completion          the body of the completion with this prompt
//! CompletionAnswer    the completion's answer as the chat's
//! ```
//!
//! The tokens of the history never come from the template, so that it may render old turns in another way
//! than the latest one, as templates of reasoning models do.
//!
//! `/v1/completions` is used also where the engine has `/inference/v1/generate`. The answer of the latter has
//! token ids without text, so the text would take a
//! detokeniser here, or a further request for each event. It is there with `--enable-scale-out` alone. A
//! completion takes the same ids, and answers with text, ids and log-probabilities of each event.
//!
//! Never: a completion where the engine would parse more than text out of a chat's answer.

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

/// Why a turn is sent as a chat although a turn before it was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallbackReason {
    /// The messages are not those of the last turn, its answer and new ones.
    History,
    /// Another model, or other settings of the chat template.
    Settings,
    /// Tools: calls are parsed out of a chat's answer.
    Tools,
    /// The answer was parsed into reasoning and content.
    Reasoning,
    /// The answer must have a form.
    Structured,
    /// Something other than text.
    Media,
    /// Several choices.
    Choices,
    /// Alternatives, or log-probabilities of the prompt.
    Logprobs,
    /// Fields that a completion does not have, or reads in another way.
    Fields,
    /// The body is too large, or there is no memory for it.
    Size,
    /// The last turn's answer came without token ids.
    Ids,
    /// The last turn was not assembled in time.
    Late,
    /// No upstream tokenised the chat.
    Tokenizer,
    /// The chat template shows no end of the answer.
    Template,
    /// The upstream refused the completion.
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
