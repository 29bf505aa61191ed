//! Keeps web pages out: a browser sends what any page tells it to, also to addresses that only its user can
//! reach, and a listener without a token has no other protection than its address.
//!
//! A page can read no answer of ours, so that calls which change nothing need no guard. For the others,
//! browsers tell where the page is from; and they ask first, which we never allow, before they send JSON to
//! another site. Programs tell nothing of the kind and are let through.

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};

/// Where a request was made: by a page of the same address, of another one, or by the user.
const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// What a call is refused for, whoever makes it.
pub fn check(request: &Request<Bytes>) -> Result<(), (StatusCode, &'static str)> {
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

/// Browsers that tell no site tell an origin, at least with calls that can change something.
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
        check(&request).map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn a_body_must_say_that_it_is_json() {
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
    fn pages_of_other_sites_change_nothing() {
        for (headers, expected) in [
            (&[("sec-fetch-site", "same-origin")][..], 200),
            (&[("sec-fetch-site", "none")], 200),
            (&[("sec-fetch-site", "cross-site")], 403),
            (&[("sec-fetch-site", "same-site")], 403),
            // A proxy in front may have changed the host; the browser knows what it asked.
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
}
