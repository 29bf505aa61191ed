//! Writes the balancer's own answers to a client: refusals, aggregates, admin answers.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::protocols::http::date::get_cached_date;

use super::client::Client;
use super::request::{ClientRequest, RequestScope};
use crate::names::{PRODUCT, X_BALANCER, X_REQUEST_ID};
use crate::reject::{ErrorShape, Reject};

/// A reject as an answer, in the form that the route's clients expect.
pub(super) fn refusal(reject: &Reject, style: ErrorShape) -> Response<Bytes> {
    let answer = reject.answer(style);
    let mut response = Response::new(Bytes::from(answer.body));
    *response.status_mut() = http::StatusCode::from_u16(answer.status).unwrap_or_default();
    let headers = response.headers_mut();
    for (name, value) in answer.headers {
        // A location with a client's bytes may be invalid as a header value; the answer is sent without it.
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    }
    if !response.body().is_empty() {
        json(response.headers_mut());
    }
    response
}

pub(super) fn json(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
}

/// Sends `answer` with the response headers of its route; `close` adds `connection: close`.
pub(super) async fn send(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &ClientRequest,
    answer: Response<Bytes>,
    close: bool,
) -> Result<()> {
    if close || client.sends_chunks() {
        client.close_after();
    }
    let (parts, body) = answer.into_parts();
    let mut head = ResponseHeader::build(parts.status, Some(parts.headers.len() + 5))?;
    head.insert_header(header::DATE, get_cached_date())?;
    head.insert_header(header::SERVER, PRODUCT)?;
    // Of a 304 the length would be that of the answer that the client has, and a 204 has none.
    if !matches!(parts.status, StatusCode::NOT_MODIFIED | StatusCode::NO_CONTENT) {
        head.insert_header(header::CONTENT_LENGTH, body.len())?;
    }
    if let Ok(id) = HeaderValue::try_from(scope.id) {
        head.insert_header(X_REQUEST_ID, id)?;
    }
    if scope.settings.expose && !request.admin {
        head.insert_header(X_BALANCER, scope.shared.name.clone())?;
    }
    for (name, value) in &parts.headers {
        head.append_header(name.clone(), value)?;
    }
    if let Some(edits) = &request.edits {
        edits.towards_client(&mut head)?;
    }
    let silent = body.is_empty() || client.is_head();
    let first: &[u8] = if silent { &[] } else { &body };
    client.write_head(head, first, silent).await?;
    client.finish().await
}
