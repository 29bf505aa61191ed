//! A chat's answer, as far as its translations read it alike.

use serde_json::Value;

use super::tokens::AnswerTokens;
use crate::json::has_at_most;
use crate::route::answer::MAX_WHOLE_ANSWER_BYTES;
use crate::route::token_ids::MissingTokens;

/// The most values that a chat's answer may have. Log-probabilities are most of those: with 20 of them for
/// each token it is enough for some 5,000 tokens.
pub const MAX_ANSWER_VALUES: usize = 1_000_000;

/// Why an answer cannot be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFault {
    /// It is no chat's.
    NoChat,
    /// It has more bytes than [`MAX_WHOLE_ANSWER_BYTES`].
    ManyBytes,
    /// It has more values than [`MAX_ANSWER_VALUES`], each of which takes memory of its own.
    ManyValues,
    /// The model's arguments of a tool are no JSON object.
    ToolInput,
    /// It lacks what a trainer needs of its tokens.
    Tokens(MissingTokens),
}

impl AnswerFault {
    /// The limit that the answer is above, of one that another upstream would hardly give otherwise.
    pub fn limit(self) -> Option<String> {
        match self {
            AnswerFault::NoChat | AnswerFault::ToolInput | AnswerFault::Tokens(_) => None,
            AnswerFault::ManyBytes => Some(format!("{MAX_WHOLE_ANSWER_BYTES} bytes")),
            AnswerFault::ManyValues => Some(format!("{MAX_ANSWER_VALUES} values")),
        }
    }
}

/// The text that a message has under one of these names; an empty one is none.
pub(super) fn text<'a>(message: &'a Value, names: &[&str]) -> Option<&'a str> {
    let texts = names.iter().filter_map(|name| message[*name].as_str());
    texts.into_iter().find(|text| !text.is_empty())
}

/// Whether a message, or a piece of one, is made of tokens that clients see.
pub(super) fn has_text(message: &Value) -> bool {
    let calls = message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    calls || text(message, &REASONING_FIELDS).or(text(message, &["content", "refusal"])).is_some()
}

/// Where engines put what the model thought.
pub(super) const REASONING_FIELDS: [&str; 2] = ["reasoning", "reasoning_content"];

/// An answer that came whole: the chat, and its first choice, which is no longer in it.
#[derive(Debug)]
pub(super) struct WholeChat {
    pub chat: Value,
    pub choice: Value,
}

impl WholeChat {
    /// Parses the answer to a chat.
    pub(super) fn read(body: &[u8]) -> Result<Self, AnswerFault> {
        if !has_at_most(body, MAX_ANSWER_VALUES) {
            return Err(AnswerFault::ManyValues);
        }
        let chat: Value = serde_json::from_slice(body).map_err(|_| AnswerFault::NoChat)?;
        Self::first_choice(chat).ok_or(AnswerFault::NoChat)
    }

    fn first_choice(mut chat: Value) -> Option<Self> {
        let choices = chat.get_mut("choices")?.as_array_mut()?;
        let first = choices.iter().position(|choice| choice["index"] == 0).unwrap_or(0);
        let choice = choices.get_mut(first)?.take();
        choice["message"].is_object().then_some(WholeChat { chat, choice })
    }

    /// What the answer says of its tokens. `Err`: it lacks some of what a trainer needs.
    pub(super) fn take_tokens(&mut self) -> Result<AnswerTokens, AnswerFault> {
        let mut tokens = AnswerTokens::default();
        tokens.collect(&mut self.chat, &mut self.choice);
        match tokens.missing(has_text(&self.choice["message"])) {
            Some(missing) => Err(AnswerFault::Tokens(missing)),
            None => Ok(tokens),
        }
    }
}
