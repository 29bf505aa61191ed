//! The reasons for which a turn does not continue from recorded tokens.

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
