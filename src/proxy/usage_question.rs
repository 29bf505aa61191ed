//! A stream that is asked for its usage although its client did not ask: the question in the body, and what
//! takes the answer to it out of the stream again. `route::usage` has the rules.
//!
//! Only a body that was peeked to its end is asked with; a larger one is never held for it, and its usage
//! stays unknown.
//!
//! Never: an await, an answer that is touched without having been asked.

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::http::ResponseHeader;

use super::headers;
use super::route_edits::RouteEdits;
use crate::prompt::scan::Scanner;
use crate::route::dialect::Dialect;
use crate::route::paths::Api;
use crate::route::refusal::{self, Refusal};
use crate::route::usage::{self, Unasked, UsageRequest};

pub struct UsageQuestion {
    /// The question is a field of its own, which a refusal counts.
    is_field: bool,
    /// The answer is made into another one, which tells the usage.
    keeps: bool,
    answer: Option<QuestionAnswer>,
}

/// What is done to the present answer.
enum QuestionAnswer {
    Stream(Unasked),
    Refusal(Refusal),
}

/// How the body asks, if it is one to ask with.
pub fn question(
    body: &[u8],
    scanner: &Scanner,
    api: Api,
    edits: Option<&RouteEdits>,
) -> Option<UsageRequest> {
    let dialect = Dialect::of(api);
    let asks = matches!(api, Api::Chat | Api::Completions);
    let leaves = edits.is_none_or(|edits| edits.plan.edits(dialect).leaves_usage());
    if asks && leaves { usage::ask(body, scanner, dialect) } else { None }
}

impl UsageQuestion {
    /// `is_field`: the question is a field of its own. `keeps`: the answer to it stays.
    pub fn new(is_field: bool, keeps: bool) -> Self {
        UsageQuestion { is_field, keeps, answer: None }
    }

    /// An answer begins. `body`: the client's.
    pub fn begin(&mut self, head: &mut ResponseHeader, body: &[u8]) -> Result<()> {
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let plain = text(header::CONTENT_ENCODING).is_none_or(|coding| coding == "identity");
        let kind = text(header::CONTENT_TYPE).unwrap_or_default();
        self.answer = match head.status.as_u16() {
            _ if !plain || self.keeps => None,
            200..300 if kind.starts_with("text/event-stream") => {
                Some(QuestionAnswer::Stream(Unasked::default()))
            }
            400 if kind.starts_with("application/json") && self.is_field => {
                refusal::fields(body).map(Refusal::new).map(QuestionAnswer::Refusal)
            }
            _ => None,
        };
        let keeps = match &self.answer {
            Some(QuestionAnswer::Stream(_)) => false,
            Some(QuestionAnswer::Refusal(refusal)) => refusal.keeps_length(),
            None => true,
        };
        if keeps { Ok(()) } else { headers::of_unknown_length(head) }
    }

    /// The next piece of the answer, without what is in it on our account. `None`: it goes on as it is.
    pub fn piece(&mut self, piece: &[u8], end: bool) -> Option<Bytes> {
        match self.answer.as_mut()? {
            QuestionAnswer::Stream(unasked) => unasked.feed(piece, end).map(Bytes::from),
            QuestionAnswer::Refusal(refusal) => Some(Bytes::from(refusal.feed(piece, end))),
        }
    }
}
