//! Builds the heads of requests that go to upstreams, each in one pass over the client's.

use std::fmt::{Display, Write};

use http::header::InvalidHeaderValue;
use http::{HeaderName, HeaderValue, header};
use pingora::http::RequestHeader;

use super::client::Client;
use super::cumulative;
use super::headers::{is_hop_by_hop, nominated};
use super::request::{ClientRequest, RequestScope};
use super::upstream_head::UpstreamHead;
use crate::fleet::Upstream;
use crate::names::{
    TRACEPARENT, TRACESTATE, X_DATA_PARALLEL_RANK, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO,
};
use crate::otlp::trace_context::RequestTrace;

/// The head of a client's request, as it goes to the upstream of this attempt.
pub(super) fn towards_upstream(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &ClientRequest,
    upstream: &Upstream,
) -> Result<UpstreamHead, InvalidHeaderValue> {
    let (from, prefix) = (client.head(), &upstream.config.url.prefix);
    let translated = cumulative::target(request, from)
        .or_else(|| request.edits.as_ref().and_then(|edits| edits.translated_target(from)));
    let target = translated.as_ref().map_or_else(|| origin_form(from), |target| target.as_bytes());
    let target = [prefix.as_bytes(), target].concat();
    let mut head = UpstreamHead::new(from.method.clone(), target, from.headers.len() + 7);
    head.append(header::HOST, HeaderValue::from_str(&upstream.host)?);
    let nominated: Vec<HeaderName> = nominated(&from.headers).flatten().collect();
    let cookies = joined_cookies(client);
    let trusted = scope.settings.trusts(client.address());
    let edits_answer = request.edits.is_some()
        || request.usage_injection.is_some()
        || request.capture.is_some()
        || request.continued.is_some();
    for (name, value) in &from.headers {
        let stays = match *name {
            header::HOST | header::CONTENT_LENGTH => true,
            // What is compressed on the way could not be edited or recorded.
            header::ACCEPT_ENCODING => edits_answer,
            header::COOKIE => cookies.is_some(),
            _ => {
                is_hop_by_hop(name)
                    || is_forwarded(name)
                    || is_replaced(name, scope.trace)
                    || !trusted && name == X_DATA_PARALLEL_RANK
                    || is_for_trainers(name)
            }
        };
        if !stays && !nominated.contains(name) {
            head.append(name.clone(), value.clone());
        }
    }
    if let Some(cookies) = cookies.filter(|_| !nominated.contains(&header::COOKIE)) {
        head.append(header::COOKIE, cookies?);
    }
    if client.is_upgrade() {
        head.append(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        head.append(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    frame(&mut head, client, request);
    forwarded(client, &mut head, trusted)?;
    if let Some(authorization) = &upstream.authorization {
        head.replace_key(HeaderValue::try_from(authorization)?);
    }
    head.append(header::VIA, scope.shared.mark.clone());
    if let Some(trace) = scope.trace {
        let parent = HeaderValue::try_from(trace.towards_upstream())?;
        head.append(HeaderName::from_static(TRACEPARENT), parent);
    }
    if let Some(edits) = &request.edits {
        edits.towards_upstream(&mut head, upstream);
    }
    Ok(head)
}

/// The cookies of a client that has sent them in several fields, as HTTP/2 does: HTTP/1.1 has one field.
fn joined_cookies(client: &Client<'_>) -> Option<Result<HeaderValue, InvalidHeaderValue>> {
    let fields = client.headers().get_all(header::COOKIE);
    fields.iter().nth(1)?;
    let fields: Vec<&[u8]> = fields.iter().map(HeaderValue::as_bytes).collect();
    Some(HeaderValue::from_bytes(&fields.join(&b"; "[..])))
}

/// The target as upstreams get it: a path with its query, also where the client named the host in it.
fn origin_form(head: &RequestHeader) -> &[u8] {
    let raw = head.raw_path();
    let path = || head.uri.path_and_query().map_or("/", |path| path.as_str()).as_bytes();
    if raw.starts_with(b"/") { raw } else { path() }
}

/// Frames the body that is sent: by its length where that is known, else in chunks.
fn frame(head: &mut UpstreamHead, client: &Client<'_>, request: &ClientRequest) {
    let declares = client.headers().contains_key(header::CONTENT_LENGTH);
    match request.length() {
        Some(0) if !declares => {}
        Some(length) => head.append(header::CONTENT_LENGTH, length.into()),
        None => head.append(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked")),
    }
}

/// Whether a field describes the origin of a request.
fn is_forwarded(name: &HeaderName) -> bool {
    [X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO].contains(&name.as_str())
}

/// Whether a field is replaced by the request's own trace, to which only the state of a joined one belongs.
fn is_replaced(name: &HeaderName, trace: Option<&RequestTrace>) -> bool {
    trace.is_some_and(|trace| name == TRACEPARENT || name == TRACESTATE && trace.is_root())
}

/// Whether a field is for a gateway of rllm alone, which removes it.
fn is_for_trainers(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-rllm-")
}

/// Adds the client's address, host and scheme. The fields of a trusted proxy in front are kept; those of any
/// other client are replaced.
fn forwarded(client: &Client<'_>, head: &mut UpstreamHead, trusted: bool) -> Result<(), InvalidHeaderValue> {
    let from = client.headers();
    let address = client.address().and_then(|address| address.as_inet()).map(|address| address.ip());
    let mut chain = String::new();
    if trusted {
        let before = from.get_all(X_FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok());
        before.for_each(|hop| push_hop(&mut chain, hop));
    }
    if let Some(address) = address {
        push_hop(&mut chain, address);
    }
    if !chain.is_empty() {
        head.append(HeaderName::from_static(X_FORWARDED_FOR), HeaderValue::try_from(chain)?);
    }
    let told = |name: &str| from.get(name).filter(|_| trusted).cloned();
    let scheme = if client.is_https() { "https" } else { "http" };
    let scheme = told(X_FORWARDED_PROTO).unwrap_or(HeaderValue::from_static(scheme));
    head.append(HeaderName::from_static(X_FORWARDED_PROTO), scheme);
    if let Some(host) = told(X_FORWARDED_HOST).or_else(|| from.get(header::HOST).cloned()) {
        head.append(HeaderName::from_static(X_FORWARDED_HOST), host);
    }
    Ok(())
}

fn push_hop(chain: &mut String, hop: impl Display) {
    let comma = if chain.is_empty() { "" } else { ", " };
    // Writing to a string never fails.
    let _ = write!(chain, "{comma}{hop}");
}
