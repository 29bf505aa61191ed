//! Rejects calls that a web page makes. A browser sends the requests of any page, also to addresses that
//! only its user can reach, and a listener without a token is protected by its address alone.
//!
//! A page of another site cannot read answers of this listener, and browsers send a preflight request, which
//! is always rejected, before they send JSON to another site. But a site can point its own name at the
//! address of this listener (DNS rebinding): the browser then takes both for one site, and `Host` is the
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
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return Ok(());
    }
    let headers = request.headers();
    if is_of_another_site(headers) {
        let error = "the call comes from a web page of another site: make it from a program";
        return Err((StatusCode::FORBIDDEN, error));
    }
    if !request.body().is_empty() && !is_json(headers) {
        let error = "the body is not declared as JSON: send content-type: application/json";
        return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, error));
    }
    Ok(())
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
    // Reads need no check: the browser hides answers of another origin from pages.
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
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
mod tests {
    use super::*;

    fn status(method: &str, headers: &[(&str, &str)], body: &'static str) -> u16 {
        let mut request = Request::builder().method(method).uri("/admin/upstreams");
        for (name, value) in headers.iter().chain(&[("host", "lb:9090")]) {
            request = request.header(*name, *value);
        }
        let request = request.body(Bytes::from_static(body.as_bytes())).expect("is a request");
        check(&request, Protection::Token).map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    /// Without a token, at a listener of this address.
    fn without_token(address: &str, method: &str, uri: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Bytes::new()).expect("is a request");
        let address = match address.strip_prefix("unix:") {
            Some(path) => ListenAddress::Unix(path.into()),
            None => ListenAddress::Tcp(address.into()),
        };
        check(&request, Protection::Address(&address)).map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn rejects_bodies_that_are_not_declared_json() {
        for (headers, expected) in [
            (&[("content-type", "application/json")][..], 200),
            (&[("content-type", "Application/JSON; charset=utf-8")], 200),
            (&[], 415),
            (&[("content-type", "text/plain")], 415),
            (&[("content-type", "text/plain; application/json")], 415),
            (&[("content-type", "application/x-www-form-urlencoded")], 415),
            (&[("content-type", "application/jsonp")], 415),
        ] {
            for method in ["POST", "PATCH", "DELETE", "PUT"] {
                assert_eq!(status(method, headers, "{}"), expected, "{method} {headers:?}");
                assert_eq!(status(method, headers, ""), 200, "without a body there is nothing to declare");
            }
        }
    }

    #[test]
    fn rejects_changes_from_pages_of_other_sites() {
        for (headers, expected) in [
            (&[("sec-fetch-site", "same-origin")][..], 200),
            (&[("sec-fetch-site", "none")], 200),
            (&[("sec-fetch-site", "cross-site")], 403),
            (&[("sec-fetch-site", "same-site")], 403),
            // A proxy in front may have changed `Host`; `sec-fetch-site` comes from the browser.
            (&[("sec-fetch-site", "same-origin"), ("origin", "https://lb.example")], 200),
            (&[("origin", "http://lb:9090")], 200),
            (&[("origin", "http://lb:8000")], 403),
            (&[("origin", "http://evil.example")], 403),
            (&[("origin", "null")], 403),
            (&[("origin", "")], 403),
        ] {
            for method in ["POST", "PATCH", "DELETE"] {
                assert_eq!(status(method, headers, ""), expected, "{method} {headers:?}");
            }
            assert_eq!(status("GET", headers, ""), 200, "no page can read the answer");
        }
    }

    #[test]
    fn accepts_only_hosts_that_no_site_can_own_without_a_token() {
        const NAMED: &str = "lb.internal:9090";
        for (address, host, expected) in [
            ("127.0.0.1:9090", "127.0.0.1:9090", 200),
            ("127.0.0.1:9090", "127.0.0.1", 200),
            ("127.0.0.1:9090", "10.1.2.3:80", 200),
            ("[::]:9090", "[::1]:9090", 200),
            ("[::]:9090", "[2001:db8::1]", 200),
            ("127.0.0.1:9090", "localhost:9090", 200),
            ("127.0.0.1:9090", "LocalHost", 200),
            (NAMED, "lb.internal", 200),
            (NAMED, "LB.internal:8443", 200),
            (NAMED, "10.1.2.3:9090", 200),
            ("127.0.0.1:9090", "evil.example:9090", 421),
            ("127.0.0.1:9090", "lb.internal:9090", 421),
            (NAMED, "internal:9090", 421),
            (NAMED, "lb.internal.evil.example", 421),
            ("127.0.0.1:9090", "127.0.0.1.evil.example", 421),
            ("127.0.0.1:9090", "127.0.0.1:evil.example", 421),
            ("127.0.0.1:9090", "localhost.evil.example", 421),
            ("127.0.0.1:9090", "user@127.0.0.1", 421),
            ("127.0.0.1:9090", "[::1].evil.example", 421),
            ("127.0.0.1:9090", "[evil.example]", 421),
            ("127.0.0.1:9090", "::1", 421),
            ("127.0.0.1:9090", "", 421),
            (":9090", "", 421),
            ("unix:/run/lb.sock", "anything", 200),
        ] {
            for method in ["GET", "POST", "PATCH", "DELETE"] {
                let status = without_token(address, method, "/admin/config", &[("host", host)]);
                assert_eq!(status, expected, "{method} {host} at {address}");
            }
        }
        let (address, good, evil) = ("127.0.0.1:9090", ("host", "127.0.0.1"), ("host", "evil.example"));
        assert_eq!(without_token(address, "GET", "/admin/config", &[]), 200, "no browser leaves it out");
        assert_eq!(without_token(address, "GET", "/admin/config", &[good, evil]), 421);
        assert_eq!(without_token(address, "GET", "http://evil.example/admin/config", &[good]), 421);
        assert_eq!(without_token(address, "GET", "http://evil.example/admin/config", &[]), 421, "HTTP/2");
        assert_eq!(without_token(address, "GET", "http://[::1]:9090/admin/config", &[]), 200, "HTTP/2");
        assert_eq!(status("GET", &[evil], ""), 200, "a page does not know the token");
    }

    #[test]
    fn accepts_only_origins_that_are_the_host_without_a_token() {
        for (host, origin, expected) in [
            ("127.0.0.1:9090", "http://127.0.0.1:9090", 200),
            ("[::1]:9090", "http://[::1]:9090", 200),
            ("localhost:9090", "https://localhost:9090", 200),
            ("lb.internal", "http://lb.internal", 200),
            ("localhost:9090", "http://127.0.0.1:9090", 403),
            ("127.0.0.1:9090", "http://127.0.0.1:8000", 403),
            ("127.0.0.1:9090", "http://evil.example", 403),
            ("127.0.0.1:9090", "null", 403),
            ("127.0.0.1:9090", "", 403),
            ("evil.example", "http://evil.example", 421),
        ] {
            for site in [None, Some(("sec-fetch-site", "same-origin"))] {
                let headers: Vec<_> = [("host", host), ("origin", origin)].into_iter().chain(site).collect();
                for method in ["POST", "PATCH", "DELETE"] {
                    let status = without_token("lb.internal:9090", method, "/admin/upstreams", &headers);
                    assert_eq!(status, expected, "{method} {headers:?}");
                }
            }
        }
        let origin = [("origin", "http://127.0.0.1:9090")];
        assert_eq!(without_token("127.0.0.1:9090", "POST", "/admin/reload", &origin), 403, "no host");
    }
}
