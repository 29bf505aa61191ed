//! Requests the usage of a stream whose client did not request it: adds the field to the body, and removes
//! the usage from the answer again. `route::usage` has the rules.
//!
//! Only a body that was peeked to its end is changed; a larger one is never held for it, and its usage stays
//! unknown.
//!
//! Never: await, edit an answer whose usage the client requested.

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::http::ResponseHeader;

use super::headers;
use super::route_edits::RouteEdits;
use crate::prompt::scan::Scanner;
use crate::route::api_paths::Api;
use crate::route::dialect::BodyDialect;
use crate::route::engine_error::{self, RefusalEditor};
use crate::route::usage::{self, UsageFilter, UsageRequest};

/// Requests the usage of one stream, and removes it from the answer.
pub(super) struct UsageInjection {
    /// The body has one more field, which a refusal counts.
    is_field: bool,
    /// The usage stays in the answer: it is translated into another one, which reports it.
    keeps: bool,
    answer: Option<InjectionCleanup>,
}

/// The edit of the current answer.
enum InjectionCleanup {
    Stream(UsageFilter),
    Refusal(RefusalEditor),
}

/// The change to the body that requests the usage, if it should be requested.
pub(super) fn usage_request(
    body: &[u8],
    scanner: &Scanner,
    api: Api,
    edits: Option<&RouteEdits>,
) -> Option<UsageRequest> {
    let dialect = BodyDialect::of(api);
    let asks = matches!(api, Api::Chat | Api::Completions);
    let leaves = edits.is_none_or(|edits| edits.plan.edits(dialect).leaves_usage());
    if asks && leaves { usage::usage_request(body, scanner, dialect) } else { None }
}

impl UsageInjection {
    /// `is_field`: the body has one more field. `keeps`: the usage stays in the answer.
    pub(super) fn new(is_field: bool, keeps: bool) -> Self {
        UsageInjection { is_field, keeps, answer: None }
    }

    /// Whether the request for the usage stands at the end of the body, of which all else is as it was.
    pub(super) fn is_inserted(&self) -> bool {
        self.is_field
    }

    /// Leaves it to the caller to count the field that the body has more. Returns whether it has one.
    pub(super) fn give_up_member(&mut self) -> bool {
        std::mem::take(&mut self.is_field)
    }

    /// An answer begins. `body`: the client's.
    pub(super) fn begin(&mut self, head: &mut ResponseHeader, body: &[u8]) -> Result<()> {
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let plain = text(header::CONTENT_ENCODING).is_none_or(|coding| coding == "identity");
        let kind = text(header::CONTENT_TYPE).unwrap_or_default();
        self.answer = match head.status.as_u16() {
            _ if !plain || self.keeps => None,
            200..300 if kind.starts_with("text/event-stream") => {
                Some(InjectionCleanup::Stream(UsageFilter::default()))
            }
            400 if kind.starts_with("application/json") && self.is_field => {
                engine_error::fields(body).map(RefusalEditor::new).map(InjectionCleanup::Refusal)
            }
            _ => None,
        };
        let keeps = match &self.answer {
            Some(InjectionCleanup::Stream(_)) => false,
            Some(InjectionCleanup::Refusal(refusal)) => refusal.keeps_length(),
            None => true,
        };
        if keeps { Ok(()) } else { headers::of_unknown_length(head) }
    }

    /// The next piece of the answer, without the requested usage. `None`: it is unchanged.
    pub(super) fn piece(&mut self, piece: &[u8], end: bool) -> Option<Bytes> {
        match self.answer.as_mut()? {
            InjectionCleanup::Stream(filter) => filter.feed(piece, end).map(Bytes::from),
            InjectionCleanup::Refusal(refusal) => Some(Bytes::from(refusal.feed(piece, end))),
        }
    }
}
