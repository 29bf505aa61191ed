//! Responses for engines that have only Chat Completions: the request is said as a chat, and the chat's
//! answer, in one piece or as a stream, is told as a response again.
//!
//! ```text
//! request   items -> messages, flat tools -> nested ones, `text.format` -> `response_format`, …
//!           (the route's body edits come behind it, in the chat's language)
//! answer    reasoning, content and calls of the first choice -> items of the output
//! stream    each chunk -> the events that vLLM's own Responses would tell, as it goes by
//! ```
//!
//! What a chat has no word for is either nothing to the engine either (`store`, `include` of what OpenAI
//! keeps), and left out, or something that the client relies on (its own tools of OpenAI, a stored
//! response), and refused. What stands in no list goes on by its name: sampling fields are vLLM's own.
//!
//! Never: drop what changes the answer, tell a number that the engine did not tell, hold a stream back.

mod answer;
mod form;
mod items;
mod request;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use self::answer::MAX_ANSWER_VALUES;
pub use self::form::Echo;
use self::form::Form;
pub use self::request::{MAX_TREE_VALUES, chat_bytes, memory_needed};
use self::stream::Stream;
use super::answer::{Names, WHOLE};
use crate::reject::Reject;

/// One exchange that is translated, from the request's body to the end of its answer.
#[derive(Debug, Default)]
pub struct Exchange {
    echo: Arc<Echo>,
    way: Option<Way>,
}

/// What is known of a request when its answer begins.
#[derive(Clone, Debug, Default)]
pub struct Asker {
    /// The name that the client gave, and what it stands for.
    pub model: Option<String>,
    pub to: Option<String>,
    /// In seconds since 1970.
    pub now: u64,
    /// Makes the ids.
    pub seed: u128,
    /// Token ids and log-probabilities are put on the last item.
    pub token_ids: bool,
    /// The log-probabilities are there on our own account.
    pub hides_logprobs: bool,
}

/// How an answer comes.
#[derive(Debug)]
enum Way {
    Whole { form: Form, held: Vec<u8> },
    Events(Box<Stream>),
}

/// Why an answer cannot be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFault {
    /// It is no chat's.
    NoChat,
    /// It has more bytes than [`WHOLE`].
    ManyBytes,
    /// It has more values than [`MAX_ANSWER_VALUES`], each of which takes memory of its own.
    ManyValues,
}

impl AnswerFault {
    /// The limit that the answer is above, of one that another upstream would hardly give otherwise.
    pub fn limit(self) -> Option<String> {
        match self {
            AnswerFault::NoChat => None,
            AnswerFault::ManyBytes => Some(format!("{WHOLE} bytes")),
            AnswerFault::ManyValues => Some(format!("{MAX_ANSWER_VALUES} values")),
        }
    }
}

impl Exchange {
    /// The chat that a request is sent as. `Ok(None)`: it is no JSON object and goes on as it is, for the
    /// engine to say what is wrong. With `tags`, reasoning stands in the content, from where the route's edit
    /// of think tags takes it.
    pub fn request(&mut self, body: &[u8], tags: bool) -> Result<Option<Vec<u8>>, Reject> {
        let Some((chat, echo)) = request::translate(body, tags)? else { return Ok(None) };
        self.echo = Arc::new(echo);
        Ok(Some(chat))
    }

    /// The chat as it is sent, after the route's edits: what counts is what is told to be asked for.
    pub fn sent(&mut self, chat: &[u8]) {
        Arc::make_mut(&mut self.echo).settle(chat);
    }

    /// A good answer begins. `Err`: what it says of itself is no chat.
    pub fn begin(&mut self, asker: Asker, content_type: Option<&str>) -> Result<(), AnswerFault> {
        let kind = content_type.unwrap_or_default().trim_start().to_ascii_lowercase();
        let names = Names::of(asker.model.as_deref(), asker.to.as_deref());
        let form = Form::new(self.echo.clone(), asker);
        self.way = if kind.starts_with("text/event-stream") {
            Some(Way::Events(Box::new(Stream::new(form, names))))
        } else if kind.starts_with("application/json") {
            Some(Way::Whole { form, held: Vec::new() })
        } else {
            return Err(AnswerFault::NoChat);
        };
        Ok(())
    }

    /// Another answer than a chat's: it goes on as it is.
    pub fn pass(&mut self) {
        self.way = None;
    }

    /// Its stream has ended as no chat does, and the client was told so.
    pub fn is_broken(&self) -> bool {
        matches!(&self.way, Some(Way::Events(stream)) if stream.is_broken())
    }

    /// The next piece, and what the client gets of it; `None`: it goes on as it is.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Result<Option<Vec<u8>>, AnswerFault> {
        match &mut self.way {
            None => Ok(None),
            Some(Way::Events(stream)) => Ok(Some(stream.feed(piece, end))),
            Some(Way::Whole { form, held }) => {
                if held.len() + piece.len() > WHOLE {
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
