//! An answer as it is assembled, and the parts that its readers collect.

use super::wire::AnswerBody;
use crate::traces::json::push_string;
use crate::traces::record::{ChoiceRecord, CutDocument, TraceError, TraceTokens};

/// An assembled answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AssembledAnswer {
    pub model: Option<String>,
    pub choices: Vec<ChoiceRecord>,
    pub prompt_token_ids: Vec<u32>,
    pub tokens: TraceTokens,
    pub weight_version: Option<i64>,
    /// An answer that was not a stream.
    pub response: Option<CutDocument>,
    /// The answer has an error event, is larger than what is captured, or has no end.
    pub error: Option<TraceError>,
    /// A part of the answer is missing.
    pub partial: bool,
    /// The stream's last event arrived; for other answers, the whole document.
    pub is_complete: bool,
}

/// The parts of an answer that all readers collect.
#[derive(Debug, Default)]
pub(super) struct AnswerParts {
    pub model: Option<String>,
    pub choices: Vec<ChoiceRecord>,
    pub prompt_token_ids: Vec<u32>,
    pub tokens: TraceTokens,
    pub weight_version: Option<i64>,
    pub has_error: bool,
    pub is_complete: bool,
    /// Whether a part could not be read.
    pub is_damaged: bool,
}

// === impl AnswerParts ===

impl AnswerParts {
    /// Reads the members that every answer and every chunk has at its root.
    pub(super) fn read_common(&mut self, body: &AnswerBody<'_>) {
        if let Some(version) = body.weight_version.and_then(|version| version.get().parse().ok()) {
            self.weight_version = Some(version);
        }
        self.has_error |= body.error.is_some();
    }
}

/// The message of a completion.
pub(super) fn completion_message(text: &str) -> String {
    let mut message = String::with_capacity(text.len() + 40);
    message.push_str("{\"role\":\"assistant\",\"content\":");
    push_string(&mut message, text);
    message.push('}');
    message
}
