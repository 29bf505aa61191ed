//! Answers with the headers of uvicorn, in its order.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, SizeHint};
use serde_json::Value;

use super::clock;
use super::connection_state::BusyGuard;

/// An answer of the engine.
pub(super) type Reply = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// A body that keeps its connection marked busy until the last byte was sent.
pub(super) struct Tracked {
    pub body: UnsyncBoxBody<Bytes, io::Error>,
    pub _busy: Arc<BusyGuard>,
}

/// An answer with a JSON body.
pub(super) fn json(status: u16, value: &Value) -> Reply {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    with(status, &[], Some("application/json"), Bytes::from(value.to_string()))
}

pub(super) fn ok(value: &Value) -> Reply {
    json(200, value)
}

/// Returns an answer without a body, as for `/health`.
pub(super) fn empty(status: u16) -> Reply {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    with(status, &[], None, Bytes::new())
}

pub(super) fn text(content_type: &'static str, text: String) -> Reply {
    with(StatusCode::OK, &[], Some(content_type), Bytes::from(text))
}

/// Returns a whole answer; `first` are the headers before the length.
pub(super) fn with(
    status: StatusCode,
    first: &[(&'static str, &str)],
    kind: Option<&str>,
    body: Bytes,
) -> Reply {
    let length = body.len();
    let mut reply = Response::new(boxed(body));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    begin(headers);
    for (name, value) in first {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(*name, value);
        }
    }
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if let Some(kind) = kind.and_then(|kind| HeaderValue::from_str(kind).ok()) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    reply
}

/// Returns Starlette's redirect of a path that differs by a slash.
pub(super) fn redirect(location: &str) -> Reply {
    let mut reply = empty(307);
    if let Ok(location) = HeaderValue::from_str(location) {
        reply.headers_mut().insert(header::LOCATION, location);
    }
    reply
}

/// Returns a stream of events, sent in chunks since its length is unknown.
pub(super) fn events(body: UnsyncBoxBody<Bytes, io::Error>) -> Reply {
    let mut reply = Response::new(body);
    let headers = reply.headers_mut();
    begin(headers);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    reply
}

fn begin(headers: &mut http::HeaderMap) {
    if let Ok(date) = HeaderValue::from_str(&clock::http_date()) {
        headers.insert(header::DATE, date);
    }
    headers.insert(header::SERVER, HeaderValue::from_static("uvicorn"));
}

pub(super) fn boxed(body: Bytes) -> UnsyncBoxBody<Bytes, io::Error> {
    Full::new(body).map_err(|never: Infallible| match never {}).boxed_unsync()
}

// === impl Tracked ===

impl Body for Tracked {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
