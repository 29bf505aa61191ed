//! A turn that is sent as a completion, and its answer as a chat's.

use bytes::Bytes;
use http::header;
use pingora::http::ResponseHeader;
use pingora::{Error, ErrorType, Result};

use super::body::SentBody;
use super::headers;
use crate::observe::Observer;
use crate::route::cumulative::{CompletionAnswer, TokenForm};

/// A turn that is sent as a completion.
pub(super) struct ContinuedTurn {
    /// The chat, for the case that the completion is refused.
    chat: SentBody,
    tokens: TokenForm,
    is_counted: bool,
    answer: Option<CompletionAnswer>,
}

// === impl ContinuedTurn ===

impl ContinuedTurn {
    /// `chat`: the body whose place the completion takes.
    pub(super) fn new(chat: SentBody, tokens: TokenForm) -> Self {
        ContinuedTurn { chat, tokens, is_counted: false, answer: None }
    }

    /// The chat, to be sent in place of the completion.
    pub(super) fn into_chat(self) -> SentBody {
        self.chat
    }

    /// An answer begins.
    pub(super) fn begin(&mut self, head: &mut ResponseHeader, observer: &Observer) -> Result<()> {
        self.answer = None;
        if !head.status.is_success() {
            return Ok(());
        }
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let is_plain = text(header::CONTENT_ENCODING).is_none_or(|coding| coding == "identity");
        let kind = text(header::CONTENT_TYPE).filter(|_| is_plain);
        self.answer = Some(CompletionAnswer::new(kind, self.tokens).ok_or_else(unreadable)?);
        if !std::mem::replace(&mut self.is_counted, true) {
            observer.cumulative_turn("continued");
        }
        headers::of_unknown_length(head)
    }

    /// The next piece of the answer as a chat's. `None`: it goes on as it is.
    pub(super) fn piece(&mut self, piece: &[u8], end: bool) -> Result<Option<Bytes>> {
        let Some(answer) = &mut self.answer else { return Ok(None) };
        answer.feed(piece, end).map(|chat| Some(Bytes::from(chat))).map_err(|_| unreadable())
    }
}

fn unreadable() -> Box<Error> {
    Error::explain(ErrorType::InvalidHTTPHeader, "the answer is no completion").into_up()
}
