//! Detects answers that lack what `token_ids: true` of a route requested: a trainer must not take an answer
//! without token ids for a good one.
//!
//! An answer that says nothing was made of no tokens, and passes without them.

/// What an engine left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingTokens {
    PromptIds,
    AnswerIds,
    LogProbabilities,
}

/// What an answer, or a stream so far, has of its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct SeenTokens {
    pub prompt: bool,
    pub ids: bool,
    pub logprobs: bool,
}

impl SeenTokens {
    /// What an answer that says something lacks.
    pub fn missing(self) -> Option<MissingTokens> {
        let lacks = [
            (self.ids, MissingTokens::AnswerIds),
            (self.prompt, MissingTokens::PromptIds),
            (self.logprobs, MissingTokens::LogProbabilities),
        ];
        lacks.into_iter().find(|(seen, _)| !seen).map(|(_, missing)| missing)
    }

    /// With what a further piece of the answer has.
    pub fn and(self, more: Self) -> Self {
        SeenTokens {
            prompt: self.prompt || more.prompt,
            ids: self.ids || more.ids,
            logprobs: self.logprobs || more.logprobs,
        }
    }
}

impl MissingTokens {
    /// The status that NeMo Gym has for it: its clients give up on it after few attempts, where they repeat a
    /// 502 without end.
    pub const STATUS: u16 = 500;

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
