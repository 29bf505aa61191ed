//! Checks the heads of requests, and builds the heads of answers.
//!
//! A head is built in one pass over the received one, without hop-by-hop fields and fields that `connection`
//! nominates, and with the framing of the body that is actually sent.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession;

use super::client::Client;
use crate::names::{OWN_FIELD_PREFIX, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, X_REQUEST_ID};
use crate::reject::Reject;

/// The most fields that `connection` may nominate.
const MAX_NOMINATED_FIELDS: usize = 64;

/// Returns the rejection of a head that must not be used.
///
/// A request with both a length and a transfer coding is how requests are smuggled past a proxy that
/// reads one of them to a server that reads the other. Pingora drops the length and continues; the balancer
/// rejects the request.
pub(super) fn refuse(session: &ServerSession, most: u64, mark: &HeaderValue) -> Option<Reject> {
    let head = session.req_header();
    if has_passed(head, mark) {
        return Some(Reject::Loop);
    }
    if let Some(http1) = session.as_http1() {
        let raw = http1.get_headers_raw_bytes();
        if raw.len() as u64 > most {
            return Some(Reject::HeadTooLarge { limit: most });
        }
        if memchr::memchr_iter(b'\n', &raw).any(|at| at == 0 || raw[at - 1] != b'\r') {
            return Some(Reject::Malformed { why: "a line that ends without a carriage return" });
        }
        let mut codings = head.headers.get_all(header::TRANSFER_ENCODING).iter();
        if let Some(coding) = codings.next() {
            if names_header(&raw, b"content-length") {
                return Some(Reject::Malformed { why: "both content-length and transfer-encoding" });
            }
            let chunked = coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
            if !chunked || codings.next().is_some() {
                return Some(Reject::Malformed { why: "a transfer-encoding other than chunked" });
            }
        }
    } else {
        let size: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        if size as u64 > most {
            return Some(Reject::HeadTooLarge { limit: most });
        }
    }
    if let Err(why) = content_length(&head.headers) {
        return Some(Reject::Malformed { why });
    }
    let hosts = head.headers.get_all(header::HOST).iter().count();
    if hosts > 1 {
        return Some(Reject::Malformed { why: "more than one host" });
    }
    // Each field of the head is compared with each nominated one.
    if nominated(&head.headers).nth(MAX_NOMINATED_FIELDS).is_some() {
        return Some(Reject::Malformed { why: "connection nominates too many fields" });
    }
    if nominated(&head.headers).any(|name| name.is_none_or(|name| is_protected(&name))) {
        return Some(Reject::Malformed { why: "connection nominates what it may not" });
    }
    None
}

/// The fields that `connection` nominates; `None` for what is no field's name.
pub(super) fn nominated(headers: &HeaderMap) -> impl Iterator<Item = Option<HeaderName>> {
    let lines = headers.get_all(header::CONNECTION).iter();
    let names = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    let names = names.map(<[u8]>::trim_ascii).filter(|name| !name.is_empty());
    names.map(|name| HeaderName::from_bytes(name).ok())
}

/// Whether a field is essential to the request, so that `connection` must not remove it.
fn is_protected(name: &HeaderName) -> bool {
    matches!(*name, header::HOST | header::CONTENT_LENGTH | header::TRANSFER_ENCODING)
        || [X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO].contains(&name.as_str())
}

/// Whether a field is for the next hop alone, or frames the body.
pub(super) fn is_hop_by_hop(name: &HeaderName) -> bool {
    match *name {
        header::CONNECTION
        | header::TE
        | header::TRAILER
        | header::TRANSFER_ENCODING
        | header::UPGRADE
        | header::EXPECT
        | header::PROXY_AUTHENTICATE
        | header::PROXY_AUTHORIZATION => true,
        _ => ["keep-alive", "proxy-connection", "http2-settings"].contains(&name.as_str()),
    }
}

/// Whether a request has passed this balancer before. `mark` is this balancer's unique entry in `via`.
fn has_passed(head: &RequestHeader, mark: &HeaderValue) -> bool {
    let passed = |value: &HeaderValue| memchr::memmem::find(value.as_bytes(), mark.as_bytes()).is_some();
    head.headers.get_all(header::VIA).iter().any(passed)
}

/// Whether a raw head has a field of this name, given in lower case.
fn names_header(raw: &[u8], name: &[u8]) -> bool {
    raw.split(|byte| *byte == b'\n').any(|line| {
        line.len() > name.len() && line[name.len()] == b':' && line[..name.len()].eq_ignore_ascii_case(name)
    })
}

/// The client's request id, if it is one that can be sent on and logged.
pub(super) fn request_id(head: &RequestHeader) -> Option<&str> {
    let id = head.headers.get(X_REQUEST_ID)?.to_str().ok()?;
    (!id.is_empty() && id.len() <= 256).then_some(id)
}

/// The length that a request's head declares: one field with one decimal number, or none. Pingora accepts
/// a number that is repeated, in fields or in a list, which an upstream may read in another way.
pub(super) fn content_length(headers: &HeaderMap) -> std::result::Result<Option<u64>, &'static str> {
    let mut fields = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(field) = fields.next() else { return Ok(None) };
    let number = field.as_bytes();
    let length = std::str::from_utf8(number).ok().and_then(|number| number.parse().ok());
    match length {
        Some(length) if fields.next().is_none() && number.iter().all(u8::is_ascii_digit) => Ok(Some(length)),
        _ => Err("a content-length other than one number"),
    }
}

/// The length that a head declares. Pingora has refused differing ones.
pub(super) fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// The host that the client named.
pub(super) fn host(head: &RequestHeader) -> Option<String> {
    let field = head.headers.get(header::HOST).and_then(|value| value.to_str().ok());
    field.or_else(|| head.uri.authority().map(|authority| authority.as_str())).map(str::to_string)
}

/// Whether an answer can be read, that is, is not compressed; vLLM compresses nothing.
pub(super) fn is_plain(head: &ResponseHeader) -> bool {
    head.headers.get(header::CONTENT_ENCODING).is_none_or(|coding| coding == "identity")
}

/// The type of an answer that can be read.
pub(super) fn readable_type(head: &ResponseHeader) -> Option<&str> {
    let kind = head.headers.get(header::CONTENT_TYPE).filter(|_| is_plain(head));
    kind.and_then(|value| value.to_str().ok())
}

/// Removes the length: the answer's body is edited while it streams.
pub(super) fn of_unknown_length(head: &mut ResponseHeader) -> Result<()> {
    match head.remove_header(&header::CONTENT_LENGTH) {
        Some(_) => head.insert_header(header::TRANSFER_ENCODING, "chunked"),
        None => Ok(()),
    }
}

/// The head of an answer that was edited, and is there as a whole: it has a length where the upstream's has.
pub(super) fn of_known_length(head: &mut ResponseHeader, from: &ResponseHeader, length: usize) -> Result<()> {
    let names_length = |head: &ResponseHeader| head.headers.contains_key(header::CONTENT_LENGTH);
    if length > 0 && names_length(from) && !names_length(head) {
        head.remove_header(&header::TRANSFER_ENCODING);
        head.insert_header(header::CONTENT_LENGTH, length)?;
    }
    Ok(())
}

/// The head of an upstream's answer, as far as it is the client's. The fields by which the balancer names
/// itself and its choice are added to it, and are never an upstream's.
pub(super) fn of_answer(from: &ResponseHeader) -> Result<ResponseHeader> {
    let mut head = ResponseHeader::build_no_case(from.status, Some(from.headers.len() + 7))?;
    head.set_reason_phrase(from.get_reason_phrase())?;
    let framing = [header::CONTENT_LENGTH, header::TRANSFER_ENCODING];
    // `connection` must not nominate fields that frame the body.
    let nominated: Vec<HeaderName> = nominated(&from.headers)
        .flatten()
        .filter(|name| !framing.contains(name))
        .take(MAX_NOMINATED_FIELDS)
        .collect();
    for (name, value) in &from.headers {
        let stays = match *name {
            header::TRANSFER_ENCODING => false,
            header::CONTENT_LENGTH => true,
            _ => is_hop_by_hop(name) || name.as_str().starts_with(OWN_FIELD_PREFIX),
        };
        if !stays && !nominated.contains(name) {
            head.append_header(name, value)?;
        }
    }
    // One number, or none: the body is framed anew.
    let lengths = from.headers.get_all(header::CONTENT_LENGTH).iter().count();
    if let Some(length) = length(&from.headers).filter(|_| lengths == 1) {
        head.insert_header(header::CONTENT_LENGTH, length)?;
    }
    if from.status == StatusCode::SWITCHING_PROTOCOLS {
        head.insert_header(header::CONNECTION, "Upgrade")?;
        head.insert_header(header::UPGRADE, "websocket")?;
    }
    Ok(head)
}

/// Frames an answer for the client: HTTP/1.0 knows no chunks, there the end of the connection is the end of
/// the answer.
pub(super) fn frame_answer(head: &mut ResponseHeader, client: &Client<'_>) -> Result<()> {
    if head.status == StatusCode::NO_CONTENT {
        head.remove_header(&header::CONTENT_LENGTH);
        head.remove_header(&header::TRANSFER_ENCODING);
    }
    let bodiless = client.is_head() || matches!(head.status.as_u16(), 101 | 204 | 304);
    if client.head().version == Version::HTTP_10 {
        head.remove_header(&header::TRANSFER_ENCODING);
    } else if !bodiless && !head.headers.contains_key(header::CONTENT_LENGTH) {
        head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, header};

    use super::{content_length, names_header};

    #[test]
    fn a_length_is_one_field_with_one_number() {
        let lengths = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::CONTENT_LENGTH, HeaderValue::from_static(value));
            }
            content_length(&headers)
        };
        assert_eq!(lengths(&[]), Ok(None));
        for (value, length) in [("0", 0), ("31", 31), ("0031", 31), ("18446744073709551615", u64::MAX)] {
            assert_eq!(lengths(&[value]), Ok(Some(length)));
        }
        for value in ["", "+31", "-1", " 31", "31 ", "0x1f", "31, 31", "31,", "3 1", "18446744073709551616"] {
            assert!(lengths(&[value]).is_err(), "{value:?}");
        }
        assert!(lengths(&["31", "31"]).is_err() && lengths(&["31", ""]).is_err());
    }

    #[test]
    fn a_field_is_found_by_its_whole_name_in_any_case() {
        let raw = b"POST / HTTP/1.1\r\nContent-LENGTH: 3\r\nx-content-length: 4\r\n\r\n";
        assert!(names_header(raw, b"content-length"));
        assert!(names_header(raw, b"x-content-length"));
        assert!(!names_header(raw, b"content"));
        assert!(!names_header(b"GET /content-length: HTTP/1.1\r\n\r\n", b"content-length"));
    }
}
