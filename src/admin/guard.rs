//! Rejects calls that a web page makes. A browser sends the requests of any page, also to addresses that
//! only its user can reach, and a listener without a token is protected by its address alone.
//!
//! A page of another site cannot read answers of this listener, and browsers send a preflight request, which
//! is always rejected, before they send JSON to another site. But its requests cost as much as others, a
//! stream of overviews most of all: what browsers report to come from another site is rejected, reads too. A
//! link that leads here is followed: its answer is shown to the user. And a site can point its own name at
//! the address of this listener (DNS rebinding): the browser then takes both for one site, and `Host` is the
//! site's name. Without a token `Host` must therefore be a name that no site can own: an IP address,
//! `localhost` or the name in `admin.address`; the same holds for `Origin`. Programs send no `Origin` and may
//! omit `Host`; browsers always send `Host`, and cannot reach a Unix socket. With a token any name is
//! accepted, because a page does not have the token.

use std::net::{Ipv4Addr, Ipv6Addr};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};

use crate::config::types::ListenAddress;

/// The header in which browsers report the origin of a request: a page of the same site, of another site,
/// or the user.
const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// The header in which browsers report what they request: `document` is what they show in a window.
const SEC_FETCH_DEST: &str = "sec-fetch-dest";

/// The header of requests in advance, for what may never be shown.
const SEC_PURPOSE: &str = "sec-purpose";

const FOREIGN_HOST: &str = "the host is a name that any web site could have: call the admin listener by its \
                            IP address, localhost or the name in admin.address, or set admin.token";
const FOREIGN_ORIGIN: &str = "the call comes from a web page of another site: make it from a program, or set \
                              admin.token";

/// What protects the listener.
#[derive(Clone, Copy, Debug)]
pub(super) enum Protection<'a> {
    /// A token, which the caller has sent.
    Token,
    /// The listener's address.
    Address(&'a ListenAddress),
}

/// The status and the text of a rejected call.
type GuardReject = (StatusCode, &'static str);

/// Rejects calls that a web page may have made.
pub(super) fn check(request: &Request<Bytes>, protection: Protection<'_>) -> Result<(), GuardReject> {
    if let Protection::Address(address) = protection {
        check_names(request, address)?;
    }
    check_site(request)?;
    let headers = request.headers();
    if !is_read(request) && !request.body().is_empty() && !is_json(headers) {
        let error = "the body is not declared as JSON: send content-type: application/json";
        return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, error));
    }
    Ok(())
}

/// Rejects a call that a page of another site has made, unless it is a link that the browser follows.
pub(super) fn check_site(request: &Request<Bytes>) -> Result<(), GuardReject> {
    let headers = request.headers();
    if !is_of_another_site(headers) || is_read(request) && is_followed_link(headers) {
        return Ok(());
    }
    let error = "the call comes from a web page of another site: make it from a program";
    Err((StatusCode::FORBIDDEN, error))
}

fn is_read(request: &Request<Bytes>) -> bool {
    matches!(*request.method(), Method::GET | Method::HEAD)
}

/// Whether the browser shows the answer in a window, as it does with a link or an entry of a bookmark list.
fn is_followed_link(headers: &HeaderMap) -> bool {
    let is_shown = headers.get(SEC_FETCH_DEST).is_some_and(|value| value == "document");
    is_shown && !headers.contains_key(SEC_PURPOSE)
}

/// Checks that `Host` and `Origin` are names that no web site can own.
fn check_names(request: &Request<Bytes>, address: &ListenAddress) -> Result<(), GuardReject> {
    let configured = match address {
        ListenAddress::Tcp(address) => split_port(address).unwrap_or(address),
        ListenAddress::Unix(_) => return Ok(()),
    };
    // HTTP/2 and absolute forms have the host in the URI.
    let authority = request.uri().authority().map(|authority| authority.as_str());
    let hosts = request.headers().get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or_default());
    let mut hosts = authority.into_iter().chain(hosts);
    if !hosts.all(|host| is_own(host, configured)) {
        return Err((StatusCode::MISDIRECTED_REQUEST, FOREIGN_HOST));
    }
    // `Origin` may name another host only where a proxy changes `Host`, which hurts no read.
    let changes = !is_read(request);
    let mut origins = request.headers().get_all(header::ORIGIN).iter();
    let is_own_origin = |origin: &str| {
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        authority.is_some_and(|authority| is_own(authority, configured) && is_host(request, authority))
    };
    match !changes || origins.all(|origin| origin.to_str().is_ok_and(is_own_origin)) {
        true => Ok(()),
        false => Err((StatusCode::FORBIDDEN, FOREIGN_ORIGIN)),
    }
}

/// Whether the request was sent to this host and port.
fn is_host(request: &Request<Bytes>, authority: &str) -> bool {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.or(request.uri().authority().map(|authority| authority.as_str()));
    host.is_some_and(|host| host.eq_ignore_ascii_case(authority))
}

/// Whether an authority is a name that no web site can own. `configured`: the host in `admin.address`.
fn is_own(authority: &str, configured: &str) -> bool {
    let Some(host) = split_port(authority) else { return false };
    let is_name = |name: &str| host.eq_ignore_ascii_case(name);
    is_ip(host) || is_name("localhost") || !configured.is_empty() && is_name(configured)
}

fn is_ip(host: &str) -> bool {
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    match bracketed {
        Some(inside) => inside.parse::<Ipv6Addr>().is_ok(),
        None => host.parse::<Ipv4Addr>().is_ok(),
    }
}

/// The host of an authority with an optional port; `None` when the text after the colon is not a port.
fn split_port(authority: &str) -> Option<&str> {
    let end = match authority.find(']') {
        Some(bracket) => bracket + 1,
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at(end);
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    (port.is_empty() || port.strip_prefix(':').is_some_and(is_port)).then_some(host)
}

/// Whether a page of another site sent the request. Browsers without `sec-fetch-site` send `Origin`, at
/// least with calls that can change something.
fn is_of_another_site(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    match (text(SEC_FETCH_SITE), text(header::ORIGIN.as_str())) {
        (Some(site), _) => site != "same-origin" && site != "none",
        (None, Some(origin)) => {
            let origin = origin.split_once("://").map(|(_, authority)| authority);
            origin.is_none() || origin != text(header::HOST.as_str())
        }
        (None, None) => false,
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next());
    kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

#[cfg(test)]
mod tests;
