//! Writes the balancer's own answers to a client: refusals, aggregates, admin answers.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, header};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::protocols::http::date::get_cached_date;
use pingora::proxy::Session;

use super::context::Context;
use crate::names::{PRODUCT, X_REQUEST_ID};
use crate::reject::{Reject, Style};

/// A refusal as an answer, in the shape that the route's clients expect.
pub fn refusal(reject: &Reject, style: Style) -> Response<Bytes> {
    let answer = reject.answer(style);
    let mut response = Response::new(Bytes::from(answer.body));
    *response.status_mut() = http::StatusCode::from_u16(answer.status).unwrap_or_default();
    let headers = response.headers_mut();
    for (name, value) in answer.headers {
        // A location made of a client's bytes may be no header value; the refusal goes out without it.
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    }
    if !response.body().is_empty() {
        json(response.headers_mut());
    }
    response
}

pub fn json(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
}

/// Sends `answer`, with the headers that its route has for the client; with `close` the client is told that
/// the connection ends.
pub async fn send(
    session: &mut Session,
    answer: Response<Bytes>,
    context: &Context,
    close: bool,
) -> Result<()> {
    if close {
        session.set_keepalive(None);
    }
    let (parts, body) = answer.into_parts();
    let mut head = ResponseHeader::build(parts.status, Some(parts.headers.len() + 4))?;
    head.insert_header(header::DATE, get_cached_date())?;
    head.insert_header(header::SERVER, PRODUCT)?;
    head.insert_header(header::CONTENT_LENGTH, body.len())?;
    if let Ok(id) = HeaderValue::try_from(context.id.as_str()) {
        head.insert_header(X_REQUEST_ID, id)?;
    }
    for (name, value) in &parts.headers {
        head.append_header(name.clone(), value)?;
    }
    context.face.as_ref().map_or(Ok(()), |face| face.towards_client(&mut head))?;
    let silent = body.is_empty() || session.req_header().method == Method::HEAD;
    session.write_response_header(Box::new(head), silent).await?;
    if !silent {
        session.write_response_body(Some(body), true).await?;
    }
    Ok(())
}
