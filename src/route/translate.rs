//! Responses for engines that have only Chat Completions: translates the request into a chat, and the chat's
//! answer, whole or as a stream, into a response.
//!
//! ```text
//! request   items -> messages, flat tools -> nested ones, `text.format` -> `response_format`, …
//!           (the route's body edits come behind it, in the chat's language)
//! answer    reasoning, content and calls of the first choice -> items of the output
//! stream    each chunk -> the events that vLLM's own Responses would send, as it goes by
//! ```
//!
//! A field that a chat does not have is dropped where the engine ignores it too (`store`, `include` of what
//! OpenAI keeps), and rejected where the client relies on it (OpenAI's own tools, a stored response). Fields
//! in no list are passed on by their names: sampling fields are vLLM's own.
//!
//! Never: drop what changes the answer, report a number that the engine did not report, hold a stream back.

mod answer;
mod items;
mod request;
mod response;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use self::answer::MAX_ANSWER_VALUES;
pub use self::request::{MAX_TREE_VALUES, chat_bytes, memory_needed};
pub use self::response::RequestEcho;
use self::response::ResponseBuilder;
use self::stream::ChatStreamTranslator;
use super::answer::{MAX_WHOLE_ANSWER_BYTES, ModelRename};
use super::token_ids::MissingTokens;
use crate::reject::Reject;

/// Translates one request and its answer.
#[derive(Debug, Default)]
pub struct ResponseTranslation {
    echo: Arc<RequestEcho>,
    way: Option<TranslatedAnswer>,
}

/// The facts of a request that the translation of its answer needs.
#[derive(Clone, Debug, Default)]
pub struct TranslationContext {
    /// The name that the client gave, and what it stands for.
    pub model: Option<String>,
    pub to: Option<String>,
    /// In seconds since 1970.
    pub now: u64,
    /// Makes the ids.
    pub seed: u128,
    /// Token ids and log-probabilities are put on the last item.
    pub token_ids: bool,
    /// The route added the log-probabilities: the client does not get them.
    pub hides_logprobs: bool,
}

/// The answer in progress.
#[derive(Debug)]
enum TranslatedAnswer {
    Whole { form: ResponseBuilder, held: Vec<u8> },
    Events(Box<ChatStreamTranslator>),
}

/// Why an answer cannot be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFault {
    /// It is no chat's.
    NoChat,
    /// It has more bytes than [`MAX_WHOLE_ANSWER_BYTES`].
    ManyBytes,
    /// It has more values than [`MAX_ANSWER_VALUES`], each of which takes memory of its own.
    ManyValues,
    /// It lacks what a trainer needs of its tokens.
    Tokens(MissingTokens),
}

impl AnswerFault {
    /// The limit that the answer is above, of one that another upstream would hardly give otherwise.
    pub fn limit(self) -> Option<String> {
        match self {
            AnswerFault::NoChat | AnswerFault::Tokens(_) => None,
            AnswerFault::ManyBytes => Some(format!("{MAX_WHOLE_ANSWER_BYTES} bytes")),
            AnswerFault::ManyValues => Some(format!("{MAX_ANSWER_VALUES} values")),
        }
    }
}

impl ResponseTranslation {
    /// The chat that a request is sent as. `Ok(None)`: it is no JSON object and goes on as it is, for the
    /// engine to say what is wrong. With `tags`, reasoning stands in the content, from where the route's edit
    /// of think tags takes it.
    pub fn request(&mut self, body: &[u8], tags: bool) -> Result<Option<Vec<u8>>, Reject> {
        let Some((chat, echo)) = request::translate(body, tags)? else { return Ok(None) };
        self.echo = Arc::new(echo);
        Ok(Some(chat))
    }

    /// The chat as it is sent, after the route's edits: what counts is what is told to be asked for.
    pub fn record_sent_chat(&mut self, chat: &[u8]) {
        Arc::make_mut(&mut self.echo).apply_sent_chat(chat);
    }

    /// A good answer begins. `Err`: what it says of itself is no chat.
    pub fn begin(
        &mut self,
        asker: TranslationContext,
        content_type: Option<&str>,
    ) -> Result<(), AnswerFault> {
        let kind = content_type.unwrap_or_default().trim_start().to_ascii_lowercase();
        let names = ModelRename::of(asker.model.as_deref(), asker.to.as_deref());
        let form = ResponseBuilder::new(self.echo.clone(), asker);
        self.way = if kind.starts_with("text/event-stream") {
            Some(TranslatedAnswer::Events(Box::new(ChatStreamTranslator::new(form, names))))
        } else if kind.starts_with("application/json") {
            Some(TranslatedAnswer::Whole { form, held: Vec::new() })
        } else {
            return Err(AnswerFault::NoChat);
        };
        Ok(())
    }

    /// Another answer than a chat's: it goes on as it is.
    pub fn pass_through(&mut self) {
        self.way = None;
    }

    /// Its stream has ended as no chat does, and the client was told so.
    pub fn is_broken(&self) -> bool {
        matches!(&self.way, Some(TranslatedAnswer::Events(stream)) if stream.is_broken())
    }

    /// The next piece, and what the client gets of it; `None`: it goes on as it is.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Result<Option<Vec<u8>>, AnswerFault> {
        match &mut self.way {
            None => Ok(None),
            Some(TranslatedAnswer::Events(stream)) => Ok(Some(stream.feed(piece, end))),
            Some(TranslatedAnswer::Whole { form, held }) => {
                if held.len() + piece.len() > MAX_WHOLE_ANSWER_BYTES {
                    return Err(AnswerFault::ManyBytes);
                }
                held.extend_from_slice(piece);
                if !end {
                    return Ok(Some(Vec::new()));
                }
                let held = std::mem::take(held);
                answer::whole(form, &held).map(Some)
            }
        }
    }
}
