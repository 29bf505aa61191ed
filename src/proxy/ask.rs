//! A stream that is asked for its usage although its client did not ask: the body with the question, and
//! what takes the answer to it out of the stream again. What exactly that is, is `route::usage`'s matter.
//!
//! Only a body that was peeked to its end is asked with; a larger one is never held for it, and its usage
//! stays unknown.
//!
//! Never: an await, an answer that is touched without having been asked.

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};

use super::face::Face;
use crate::prompt::scan::Scanner;
use crate::route::dialect::Dialect;
use crate::route::paths::Api;
use crate::route::usage::{self, Unasked};

pub struct Ask {
    /// Of the body with the question.
    length: usize,
    unasked: Option<Unasked>,
}

/// The body with the question in it, if it is one to ask with.
pub fn question(body: &[u8], scanner: &Scanner, api: Api, face: Option<&Face>) -> Option<Vec<u8>> {
    let dialect = Dialect::of(api);
    let asks = matches!(api, Api::Chat | Api::Completions);
    let leaves = face.is_none_or(|face| face.plan.edits(dialect).leaves_usage());
    if asks && leaves { usage::ask(body, scanner, dialect) } else { None }
}

impl Ask {
    pub fn new(length: usize) -> Self {
        Ask { length, unasked: None }
    }

    /// Makes a head one of the body with the question.
    pub fn towards_upstream(&self, head: &mut RequestHeader) -> Result<()> {
        head.remove_header(&header::TRANSFER_ENCODING);
        head.insert_header(header::CONTENT_LENGTH, self.length)?;
        // What is compressed on the way could not be taken out.
        head.remove_header(&header::ACCEPT_ENCODING);
        Ok(())
    }

    /// An answer begins.
    pub fn begin(&mut self, head: &mut ResponseHeader) -> Result<()> {
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let plain = text(header::CONTENT_ENCODING).is_none_or(|coding| coding == "identity");
        let streams = text(header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/event-stream"));
        let edits = plain && streams && head.status.is_success();
        self.unasked = edits.then(Unasked::default);
        if edits && head.remove_header(&header::CONTENT_LENGTH).is_some() {
            head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
        }
        Ok(())
    }

    /// The next piece of the answer, without what was only asked for. `None`: it goes on as it is.
    pub fn piece(&mut self, piece: &[u8], end: bool) -> Option<Bytes> {
        self.unasked.as_mut()?.feed(piece, end).map(Bytes::from)
    }
}
