//! Detects answers that lack the fields requested by `token_ids: true` of a route: a trainer must not accept
//! an answer without token ids.
//!
//! An empty answer has no tokens, and passes without them.

/// The fields that an engine omitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingTokens {
    PromptIds,
    AnswerIds,
    LogProbabilities,
}

/// The token fields that an answer, or a stream so far, has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SeenTokens {
    pub prompt: bool,
    pub ids: bool,
    pub logprobs: bool,
}

impl SeenTokens {
    /// The fields that a non-empty answer lacks.
    pub(crate) fn missing(self) -> Option<MissingTokens> {
        let lacks = [
            (self.ids, MissingTokens::AnswerIds),
            (self.prompt, MissingTokens::PromptIds),
            (self.logprobs, MissingTokens::LogProbabilities),
        ];
        lacks.into_iter().find(|(seen, _)| !seen).map(|(_, missing)| missing)
    }

    /// Combines the fields of two pieces of an answer.
    pub(crate) fn and(self, more: Self) -> Self {
        SeenTokens {
            prompt: self.prompt || more.prompt,
            ids: self.ids || more.ids,
            logprobs: self.logprobs || more.logprobs,
        }
    }
}

impl MissingTokens {
    /// The status of NeMo Gym for this case: its clients give up on it after a few attempts, whereas they
    /// retry a 502 without end.
    pub const REJECT_STATUS: u16 = 500;

    /// The text of the error: what is missing, and the flag of the engine that sends it.
    pub fn message(self) -> String {
        let (what, flag, since) = match self {
            MissingTokens::PromptIds => ("prompt_token_ids", "return_token_ids", ", known since vLLM 0.10.2"),
            MissingTokens::AnswerIds => ("token_ids", "return_token_ids", ", known since vLLM 0.10.2"),
            MissingTokens::LogProbabilities => ("logprobs", "logprobs", ""),
        };
        format!(
            "The engine's answer has no `{what}`: it ignored `{flag}: true`{since}, which the route sends \
             for `token_ids: true`."
        )
    }
}
