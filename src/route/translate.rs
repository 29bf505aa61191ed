//! Responses and Messages for engines that have only Chat Completions: translates the request into a chat,
//! and the chat's answer, whole or as a stream, into that of the client's API.
//!
//! ```text
//! request   items or blocks -> messages, the API's tools -> the chat's, …
//!           (the route's body edits come behind it, in the chat's language)
//! answer    reasoning, content and calls of the first choice -> items or blocks
//! stream    each chunk -> the events that vLLM's own endpoint would send, as it goes by
//! ```
//!
//! `responses` and `messages` have what the two APIs have of their own; all else they share. The tokens of a
//! Messages request are counted by `/tokenize`, which renders a chat.
//!
//! Never: drop what changes the answer, report a number that the engine did not report, hold a stream back.

mod answer;
mod context;
mod messages;
mod request;
mod responses;
mod stream;
#[cfg(test)]
mod tests;
mod tokens;

use std::sync::Arc;

use self::answer::WholeChat;
pub use self::answer::{AnswerFault, MAX_ANSWER_VALUES};
pub use self::context::TranslationContext;
use self::messages::{MessageBuilder, MessageEvents};
pub use self::request::{MAX_TREE_VALUES, chat_bytes, memory_needed};
use self::responses::{RequestEcho, ResponseBuilder, ResponseEvents};
use self::stream::ChatStreamTranslator;
use super::answer::{MAX_WHOLE_ANSWER_BYTES, ModelRename};
use super::api_paths::Api;
use crate::reject::Reject;

/// An API whose requests can be sent to an engine in the language of its chats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TranslatedApi {
    Responses,
    Messages,
    /// The count of the tokens that a Messages request has.
    CountTokens,
}

/// Translates one request and its answer.
#[derive(Debug)]
pub struct ChatTranslation {
    api: TranslatedApi,
    echo: Arc<RequestEcho>,
    way: Option<TranslatedAnswer>,
}

/// The answer in progress.
#[derive(Debug)]
enum TranslatedAnswer {
    Whole { form: WholeForm, held: Vec<u8> },
    ResponseEvents(Box<ChatStreamTranslator<ResponseEvents>>),
    MessageEvents(Box<ChatStreamTranslator<MessageEvents>>),
}

/// What an answer that comes whole becomes.
#[derive(Debug)]
enum WholeForm {
    Response(ResponseBuilder),
    Message(MessageBuilder),
    Count,
    /// The engine's error, in Anthropic's form.
    MessagesError(Option<ModelRename>),
}

impl TranslatedApi {
    /// The interface that the upstreams are asked by.
    pub fn sent_as(self) -> Api {
        match self {
            TranslatedApi::Responses | TranslatedApi::Messages => Api::Chat,
            TranslatedApi::CountTokens => Api::Tokenize,
        }
    }

    /// The path of that interface.
    pub fn sent_to(self) -> &'static str {
        match self {
            TranslatedApi::Responses | TranslatedApi::Messages => "/v1/chat/completions",
            TranslatedApi::CountTokens => "/tokenize",
        }
    }
}

impl ChatTranslation {
    pub fn new(api: TranslatedApi) -> Self {
        ChatTranslation { api, echo: Arc::default(), way: None }
    }

    pub fn api(&self) -> TranslatedApi {
        self.api
    }

    /// The body that a request is sent as. `Ok(None)`: it is no JSON object and goes on as it is, for the
    /// engine to say what is wrong. With `tags`, reasoning stands in the content, from where the route's edit
    /// of think tags takes it.
    pub fn request(&mut self, body: &[u8], tags: bool) -> Result<Option<Vec<u8>>, Reject> {
        let Some(given) = request::fields(body)? else { return Ok(None) };
        let sent = match self.api {
            TranslatedApi::Responses => {
                let (chat, echo) = responses::translate(given, tags)?;
                self.echo = Arc::new(echo);
                chat
            }
            TranslatedApi::Messages => messages::translate(given, tags)?,
            TranslatedApi::CountTokens => messages::translate_count(given, tags)?,
        };
        Ok(serde_json::to_vec(&sent).ok())
    }

    /// The chat as it is sent, after the route's edits: what counts is what is told to be asked for.
    pub fn record_sent_chat(&mut self, chat: &[u8]) {
        if self.api == TranslatedApi::Responses {
            Arc::make_mut(&mut self.echo).apply_sent_chat(chat);
        }
    }

    /// A good answer begins. `Err`: what it says of itself is no chat.
    pub fn begin(
        &mut self,
        asker: TranslationContext,
        content_type: Option<&str>,
    ) -> Result<(), AnswerFault> {
        let is_stream = match MediaKind::of(content_type) {
            MediaKind::Events => true,
            MediaKind::Json => false,
            MediaKind::Other => return Err(AnswerFault::NoChat),
        };
        let names = ModelRename::of(asker.model.as_deref(), asker.to.as_deref());
        let (token_ids, held) = (asker.token_ids, Vec::new());
        self.way = Some(match (self.api, is_stream) {
            (TranslatedApi::Responses, true) => {
                let events = ResponseEvents::new(ResponseBuilder::new(self.echo.clone(), asker));
                let stream = ChatStreamTranslator::new(events, names, token_ids);
                TranslatedAnswer::ResponseEvents(Box::new(stream))
            }
            (TranslatedApi::Messages, true) => {
                let events = MessageEvents::new(MessageBuilder::new(asker));
                let stream = ChatStreamTranslator::new(events, names, token_ids);
                TranslatedAnswer::MessageEvents(Box::new(stream))
            }
            (TranslatedApi::CountTokens, true) => return Err(AnswerFault::NoChat),
            (TranslatedApi::Responses, false) => {
                let form = WholeForm::Response(ResponseBuilder::new(self.echo.clone(), asker));
                TranslatedAnswer::Whole { form, held }
            }
            (TranslatedApi::Messages, false) => {
                TranslatedAnswer::Whole { form: WholeForm::Message(MessageBuilder::new(asker)), held }
            }
            (TranslatedApi::CountTokens, false) => TranslatedAnswer::Whole { form: WholeForm::Count, held },
        });
        Ok(())
    }

    /// An error begins, for a request that named the model `model`, which is served as `to`. Returns whether
    /// its form changes; other errors go on as they are.
    pub fn begin_error(
        &mut self,
        (model, to): (Option<&str>, Option<&str>),
        content_type: Option<&str>,
    ) -> bool {
        let is_other_form = self.api != TranslatedApi::Responses;
        self.way = (is_other_form && MediaKind::of(content_type) == MediaKind::Json).then(|| {
            let form = WholeForm::MessagesError(ModelRename::of(model, to));
            TranslatedAnswer::Whole { form, held: Vec::new() }
        });
        self.way.is_some()
    }

    /// Its stream has ended as no chat does, and the client was told so.
    pub fn is_broken(&self) -> bool {
        match &self.way {
            Some(TranslatedAnswer::ResponseEvents(stream)) => stream.is_broken(),
            Some(TranslatedAnswer::MessageEvents(stream)) => stream.is_broken(),
            Some(TranslatedAnswer::Whole { .. }) | None => false,
        }
    }

    /// The next piece, and what the client gets of it; `None`: it goes on as it is.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Result<Option<Vec<u8>>, AnswerFault> {
        match &mut self.way {
            None => Ok(None),
            Some(TranslatedAnswer::ResponseEvents(stream)) => Ok(Some(stream.feed(piece, end))),
            Some(TranslatedAnswer::MessageEvents(stream)) => Ok(Some(stream.feed(piece, end))),
            Some(TranslatedAnswer::Whole { form, held }) => {
                if held.len() + piece.len() > MAX_WHOLE_ANSWER_BYTES {
                    return Err(AnswerFault::ManyBytes);
                }
                held.extend_from_slice(piece);
                if !end {
                    return Ok(Some(Vec::new()));
                }
                form.write(&std::mem::take(held)).map(Some)
            }
        }
    }
}

impl WholeForm {
    fn write(&self, body: &[u8]) -> Result<Vec<u8>, AnswerFault> {
        match self {
            WholeForm::Response(form) => responses::whole(form, WholeChat::read(body)?),
            WholeForm::Message(form) => messages::whole(form, WholeChat::read(body)?),
            WholeForm::Count => messages::count(body),
            WholeForm::MessagesError(names) => Ok(messages::error(names.as_ref(), body)),
        }
    }
}

/// What an answer says that it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MediaKind {
    Events,
    Json,
    Other,
}

impl MediaKind {
    fn of(content_type: Option<&str>) -> Self {
        let kind = content_type.unwrap_or_default().trim_start().to_ascii_lowercase();
        if kind.starts_with("text/event-stream") {
            MediaKind::Events
        } else if kind.starts_with("application/json") {
            MediaKind::Json
        } else {
            MediaKind::Other
        }
    }
}
