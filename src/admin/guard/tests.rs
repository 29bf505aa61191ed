//! Tests of the guard: which requests reach the admin API with and without a token.

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
    }
}

/// Regression: a page of another site could open any number of streams, and make the balancer work.
#[test]
fn rejects_reads_of_pages_of_other_sites_and_follows_links() {
    const CROSS: (&str, &str) = ("sec-fetch-site", "cross-site");
    for (headers, expected) in [
        (&[][..], 200),
        (&[("sec-fetch-site", "same-origin"), ("sec-fetch-dest", "empty")], 200),
        (&[("sec-fetch-site", "none"), ("sec-fetch-dest", "document")], 200),
        (&[("sec-fetch-site", "same-origin"), ("origin", "https://lb.example")], 200),
        (&[("origin", "http://lb:9090")], 200),
        (&[CROSS], 403),
        (&[CROSS, ("sec-fetch-dest", "empty"), ("sec-fetch-mode", "cors")], 403),
        (&[CROSS, ("sec-fetch-dest", "image"), ("sec-fetch-mode", "no-cors")], 403),
        (&[CROSS, ("sec-fetch-dest", "iframe"), ("sec-fetch-mode", "navigate")], 403),
        (&[CROSS, ("sec-fetch-dest", "document"), ("sec-fetch-mode", "navigate")], 200),
        (&[CROSS, ("sec-fetch-dest", "document"), ("sec-purpose", "prefetch")], 403),
        (&[("sec-fetch-site", "same-site"), ("sec-fetch-dest", "empty")], 403),
        // Browsers without `sec-fetch-site`.
        (&[("origin", "http://lb:8000")], 403),
        (&[("origin", "http://evil.example")], 403),
        (&[("origin", "null")], 403),
    ] {
        for method in ["GET", "HEAD"] {
            assert_eq!(status(method, headers, ""), expected, "{method} {headers:?}");
        }
    }
    let link = [CROSS, ("sec-fetch-dest", "document")];
    assert_eq!(status("POST", &link, ""), 403, "a form of another site");
    let own = [("host", "127.0.0.1"), ("origin", "http://127.0.0.1")];
    let other = [("host", "127.0.0.1"), ("origin", "http://evil.example")];
    for (headers, expected) in [(own, 200), (other, 403)] {
        assert_eq!(without_token("127.0.0.1:9090", "GET", "/admin/live", &headers), expected);
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
