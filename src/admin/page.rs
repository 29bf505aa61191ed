//! `GET /`: the dashboard. The page holds no data of its own: it calls the admin API, with the token that its
//! user enters.

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};

use super::answer::{not_allowed, typed_answer};
use crate::dashboard::{DashboardPage, PAGE};

/// Answers with the page, or with 304 where the caller has it.
pub(super) fn page(request: &Request<Bytes>) -> Response<Bytes> {
    if !matches!(request.method().as_str(), "GET" | "HEAD") {
        return not_allowed("GET, HEAD");
    }
    let DashboardPage { html, policy, etag } = &*PAGE;
    let mut answer = if is_known(request, etag) {
        let mut unchanged = Response::new(Bytes::new());
        *unchanged.status_mut() = StatusCode::NOT_MODIFIED;
        unchanged
    } else {
        typed_answer(StatusCode::OK, "text/html; charset=utf-8", html.clone())
    };
    let headers = answer.headers_mut();
    let fields = [
        (header::CONTENT_SECURITY_POLICY, policy.as_str()),
        (header::ETAG, etag.as_str()),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    for (name, value) in fields {
        // Hashes and tags are letters and digits.
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    answer
}

/// Whether the caller names the present version of the page.
fn is_known(request: &Request<Bytes>, etag: &str) -> bool {
    let fields = request.headers().get_all(header::IF_NONE_MATCH).iter();
    let tags = fields.filter_map(|field| field.to_str().ok()).flat_map(|field| field.split(','));
    tags.map(|tag| tag.trim().trim_start_matches("W/")).any(|tag| tag == "*" || tag == etag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(method: &str, tags: &[&str]) -> Response<Bytes> {
        let request = tags.iter().fold(Request::builder().method(method).uri("/"), |request, tag| {
            request.header(header::IF_NONE_MATCH, *tag)
        });
        page(&request.body(Bytes::new()).expect("is a request"))
    }

    #[test]
    fn answers_304_to_callers_that_have_the_page() {
        let first = get("GET", &[]);
        assert_eq!((first.status().as_u16(), first.body()), (200, &PAGE.html));
        let etag = first.headers()["etag"].to_str().expect("is text");
        let weak = format!("W/{etag}");
        for tags in [&[etag][..], &["\"a\", \"b\"", etag], &[&weak], &["*"]] {
            let again = get("GET", tags);
            assert_eq!((again.status().as_u16(), again.body().len()), (304, 0), "{tags:?}");
            assert_eq!(again.headers()["etag"], etag);
        }
        assert_eq!(get("GET", &["\"another\""]).status(), 200);
        assert_eq!(get("POST", &[]).status(), 405);
    }

    #[test]
    fn forbids_what_the_page_does_not_need() {
        let answer = get("GET", &[]);
        let policy = answer.headers()["content-security-policy"].to_str().expect("is text");
        for part in ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "script-src 'sha"]
        {
            assert!(policy.contains(part), "{part} is not in {policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
        assert_eq!(answer.headers()["content-type"], "text/html; charset=utf-8");
    }
}
