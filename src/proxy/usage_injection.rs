//! Requests the usage of a stream whose client did not request it: adds the field to the body, and removes
//! the usage from the answer again. `route::usage` has the rules.
//!
//! Only a body that was peeked to its end is changed; a larger one is never held for it, and its usage stays
//! unknown.
//!
//! Never: await, edit an answer whose usage the client requested.

use bytes::Bytes;
use pingora::Result;
use pingora::http::ResponseHeader;

use super::headers;
use super::route_edits::RouteEdits;
use crate::prompt::scan::Scanner;
use crate::reply::is_event_stream;
use crate::route::api_paths::Api;
use crate::route::dialect::BodyDialect;
use crate::route::usage::{self, UsageFilter, UsageRequest};

/// Requests the usage of one stream, and removes it from the answer.
pub(super) struct UsageInjection {
    /// The request for the usage stands at the end of the body, of which all else is as it was.
    is_inserted: bool,
    /// The usage stays in the answer: it is translated into another one, which reports it.
    keeps: bool,
    /// Of the current answer, if it is a stream.
    filter: Option<UsageFilter>,
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
    /// `is_inserted`: as one more field at the body's end. `keeps`: the usage stays in the answer.
    pub(super) fn new(is_inserted: bool, keeps: bool) -> Self {
        UsageInjection { is_inserted, keeps, filter: None }
    }

    /// Whether the request for the usage stands at the end of the body, of which all else is as it was.
    pub(super) fn is_inserted(&self) -> bool {
        self.is_inserted
    }

    /// An answer begins.
    pub(super) fn begin(&mut self, head: &mut ResponseHeader) -> Result<()> {
        let is_stream = is_event_stream(headers::readable_type(head));
        let filters = !self.keeps && is_stream && head.status.is_success();
        self.filter = filters.then(UsageFilter::default);
        if filters { headers::of_unknown_length(head) } else { Ok(()) }
    }

    /// The next piece of the answer, without the requested usage. `None`: it is unchanged.
    pub(super) fn piece(&mut self, piece: &[u8], end: bool) -> Option<Bytes> {
        self.filter.as_mut()?.feed(piece, end).map(Bytes::from)
    }
}
