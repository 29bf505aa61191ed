//! Header hygiene: what a client's head must not be, and what goes on towards upstreams and clients.
//!
//! Hop-by-hop fields, those that `connection` names included, are taken out by pingora before these
//! functions run.

use http::{HeaderMap, HeaderValue, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::proxy::Session;

use super::context::Context;
use crate::fleet::Upstream;
use crate::names::{
    X_ATTEMPTS, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, X_HIT, X_REASON, X_REQUEST_ID,
    X_SHOULD_RETRY, X_UPSTREAM,
};
use crate::reject::Reject;

/// What a head is refused for, before anything of it is used.
///
/// A request with both a length and a transfer coding is how requests are smuggled past a proxy that
/// reads one of them to a server that reads the other. Pingora drops the length and goes on; we do not.
pub fn refuse(session: &Session, most: u64, mark: &HeaderValue) -> Option<Reject> {
    let head = session.req_header();
    if has_passed(head, mark) {
        return Some(Reject::Loop);
    }
    if let Some(http1) = session.as_ref().as_http1() {
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
    None
}

/// Whether a request has been here before. `mark` is what this balancer says of itself, as nobody else does.
fn has_passed(head: &RequestHeader, mark: &HeaderValue) -> bool {
    let passed = |value: &HeaderValue| memchr::memmem::find(value.as_bytes(), mark.as_bytes()).is_some();
    head.headers.get_all(header::VIA).iter().any(passed)
}

/// Says that a request has passed here, behind all who have said so before.
pub fn pass(head: &mut RequestHeader, mark: &HeaderValue) -> Result<()> {
    head.append_header(header::VIA, mark.clone()).map(|_| ())
}

/// Whether a raw head has a field of this name, given in lower case.
fn names_header(raw: &[u8], name: &[u8]) -> bool {
    raw.split(|byte| *byte == b'\n').any(|line| {
        line.len() > name.len() && line[name.len()] == b':' && line[..name.len()].eq_ignore_ascii_case(name)
    })
}

/// The client's request id, if it is one that can be sent on and logged.
pub fn request_id(head: &RequestHeader) -> Option<&str> {
    let id = head.headers.get(X_REQUEST_ID)?.to_str().ok()?;
    (!id.is_empty() && id.len() <= 256).then_some(id)
}

/// The length that a request's head declares: one field with one decimal number, or none. Pingora accepts
/// a number that is repeated, in fields or in a list, which an upstream may read in another way.
pub fn content_length(headers: &HeaderMap) -> std::result::Result<Option<u64>, &'static str> {
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
pub fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// Makes a client's head one for `upstream`.
pub fn towards_upstream(
    session: &Session,
    head: &mut RequestHeader,
    upstream: &Upstream,
    https: bool,
) -> Result<()> {
    let url = &upstream.config.url;
    head.remove_header(&header::EXPECT);
    forwarded(session, head, https)?;
    let host = if url.unix.is_some() { "localhost".to_string() } else { url.authority() };
    head.insert_header(header::HOST, host)?;
    if let Some(authorization) = &upstream.authorization {
        replace_key(head, authorization)?;
    }
    if !url.prefix.is_empty() {
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let prefixed = format!("{}{path}", url.prefix);
        head.set_raw_path(prefixed.as_bytes())?;
    }
    Ok(())
}

/// Shows the upstream this key and none of the client's; Anthropic's clients have theirs in another field.
pub fn replace_key(head: &mut RequestHeader, key: impl TryInto<HeaderValue>) -> Result<()> {
    head.remove_header("x-api-key");
    head.insert_header(header::AUTHORIZATION, key)
}

/// Who asked, for which host, over what. A proxy in front may have said so already; it knows better.
fn forwarded(session: &Session, head: &mut RequestHeader, https: bool) -> Result<()> {
    let client = session.client_addr().and_then(|address| address.as_inet()).map(|address| address.ip());
    if let Some(client) = client {
        let before = head.headers.get_all(X_FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok());
        let mut chain: Vec<String> = before.map(str::to_string).collect();
        chain.push(client.to_string());
        head.insert_header(X_FORWARDED_FOR, chain.join(", "))?;
    }
    if !head.headers.contains_key(X_FORWARDED_PROTO) {
        head.insert_header(X_FORWARDED_PROTO, if https { "https" } else { "http" })?;
    }
    if !head.headers.contains_key(X_FORWARDED_HOST)
        && let Some(host) = host(session.req_header())
    {
        head.insert_header(X_FORWARDED_HOST, host)?;
    }
    Ok(())
}

/// The host that the client named.
pub fn host(head: &RequestHeader) -> Option<String> {
    let field = head.headers.get(header::HOST).and_then(|value| value.to_str().ok());
    field.or_else(|| head.uri.authority().map(|authority| authority.as_str())).map(str::to_string)
}

/// The answer's body will be edited as it goes by.
pub fn of_unknown_length(head: &mut ResponseHeader) -> Result<()> {
    match head.remove_header(&header::CONTENT_LENGTH) {
        Some(_) => head.insert_header(header::TRANSFER_ENCODING, "chunked"),
        None => Ok(()),
    }
}

/// Puts on an upstream's answer what is ours to add.
pub fn towards_client(head: &mut ResponseHeader, context: &Context, expose: bool) -> Result<()> {
    if head.status != http::StatusCode::SWITCHING_PROTOCOLS {
        keep_hop(head);
    }
    if !head.headers.contains_key(X_REQUEST_ID)
        && let Ok(id) = HeaderValue::try_from(context.id.as_str())
    {
        head.insert_header(X_REQUEST_ID, id)?;
    }
    if context.attempts > 1 && (head.status == 429 || head.status.is_server_error()) {
        // We have tried; the client's library would only multiply the tries.
        head.insert_header(X_SHOULD_RETRY, "false")?;
    }
    if expose && let Some(lease) = &context.lease {
        head.insert_header(X_UPSTREAM, lease.upstream().name())?;
        head.insert_header(X_ATTEMPTS, context.attempts)?;
        head.insert_header(X_REASON, context.reason)?;
        head.insert_header(X_HIT, format!("{}/{}", context.hit, context.blocks))?;
    }
    Ok(())
}

/// Takes out what an upstream said to us and not to the client: pingora does so for requests only. What
/// frames the body is not the upstream's to nominate.
fn keep_hop(head: &mut ResponseHeader) {
    let lines = head.headers.get_all(header::CONNECTION).iter().filter_map(|line| line.to_str().ok());
    let names = lines.flat_map(|line| line.split(',')).map(str::trim);
    let framing =
        |name: &&str| !["content-length", "transfer-encoding"].contains(&&*name.to_ascii_lowercase());
    let nominated: Vec<String> = names.filter(framing).map(str::to_string).collect();
    for name in nominated.iter().map(String::as_str).chain(["connection", "keep-alive", "proxy-connection"]) {
        head.remove_header(name);
    }
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
