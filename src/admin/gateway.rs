//! The paths of rllm-model-gateway's API, through which training frameworks read the calls of agents.
//!
//! ```text
//! GET, POST    /sessions                     lists sessions with traces; creates a session
//! GET, DELETE  /sessions/{id}                ids may hold slashes, percent-encoded or not
//! GET          /sessions/{id}/traces         ?since= &limit= &format=jsonl
//! POST         /sessions/batch_delete        {"session_ids": [...]}
//! GET          /traces/{id}
//! POST         /traces/query                 {"session_ids": [...], "since": ..., "limit": ...}
//! GET, POST    /admin/workers                upstreams in that gateway's terms
//! DELETE       /admin/workers/{id}
//! GET          /health/workers
//! POST         /admin/flush                  answers once every ended call is stored
//! GET, POST    /admin/weight_version
//! ```
//!
//! Requests for `/sessions/{id}/v1/…` go to an upstream, on every listener.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::{AdminApi, AdminReject, answer, not_allowed, parameter, sessions, traces, workers};
use crate::route::paths::{decode_escapes, of_session};

/// Whether a path outside of `/admin/` belongs to this API.
pub fn serves(path: &str) -> bool {
    let is_session = path.starts_with("/sessions/") && of_session(path).is_none();
    is_session || matches!(path, "/sessions" | "/health/workers") || path.starts_with("/traces/")
}

/// Answers a call of this API; other paths get 404.
pub async fn call(api: &AdminApi, request: &Request<Bytes>) -> Response<Bytes> {
    let path = request.uri().path();
    let is_post = request.method() == Method::POST;
    match path {
        "/sessions" => return sessions::all(api, request).await,
        "/sessions/batch_delete" if is_post => return sessions::delete_many(api, request).await,
        "/traces/query" if is_post => return traces::query(api, request).await,
        "/admin/workers" => return workers::all(api, request).await,
        "/admin/flush" if is_post => return traces::flush(api).await,
        "/admin/flush" => return not_allowed("POST"),
        "/admin/weight_version" => return traces::weight_version(api, request).await,
        "/health/workers" if request.method() == Method::GET => return workers::health(api),
        "/health/workers" => return not_allowed("GET"),
        _ => {}
    }
    let inside = |prefix: &str| path.strip_prefix(prefix).filter(|rest| !rest.is_empty());
    if let Some(written) = inside("/sessions/") {
        return sessions::one(api, written, request).await;
    }
    if let Some(written) = inside("/traces/") {
        return traces::one(api, written, request).await;
    }
    match inside("/admin/workers/") {
        Some(written) => workers::one(api, written, request).await,
        None => answer(StatusCode::NOT_FOUND, &json!({"detail": "Not Found"})),
    }
}

/// Decodes an id that is percent-encoded in a path.
pub fn decoded_id(written: &str) -> Result<String, AdminReject> {
    decode_escapes(written).ok_or_else(|| AdminReject::problem("the id is not percent-encoded UTF-8"))
}

/// The object in the body of a call. An empty body and one that is not JSON count as an empty object.
pub fn object(request: &Request<Bytes>) -> Result<Map<String, Value>, AdminReject> {
    match serde_json::from_slice(request.body()) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(AdminReject::problem("the body must be a JSON object")),
        Err(_) => Ok(Map::new()),
    }
}

/// The text of a member of a body; `None` for null and for an empty text.
pub fn text_member(body: &Map<String, Value>, name: &str) -> Result<Option<String>, AdminReject> {
    match body.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(_) => Err(AdminReject::problem(format!("{name} must be a string"))),
    }
}

/// The session ids in a body; empty when the body has no list of them.
pub fn session_ids(body: &Map<String, Value>) -> Result<Vec<String>, AdminReject> {
    let wrong = || AdminReject::problem("session_ids must be a list of strings");
    match body.get("session_ids") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => {
            ids.iter().map(|id| id.as_str().map(String::from).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

/// The part of a list that a call requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ListRange {
    /// Seconds since 1970.
    pub since: Option<f64>,
    /// A number of entries.
    pub limit: Option<usize>,
}

impl ListRange {
    /// Parses `?since=…&limit=…`.
    pub fn of_query(request: &Request<Bytes>) -> Result<Self, AdminReject> {
        let written = |name| parameter(request, name).map(|text| decode_escapes(text).unwrap_or_default());
        let wrong = |error| AdminReject::new(StatusCode::UNPROCESSABLE_ENTITY, error);
        let since =
            written("since").map(|text| text.trim().parse().ok().filter(|since: &f64| since.is_finite()));
        let limit = written("limit").map(|text| count(text.trim()));
        match (since, limit) {
            (Some(None), _) => Err(wrong("since must be a number of seconds since 1970")),
            (_, Some(None)) => Err(wrong("limit must be a number of entries, 0 or more")),
            (since, limit) => Ok(ListRange { since: since.flatten(), limit: limit.flatten() }),
        }
    }

    /// Parses `since` and `limit` of a body.
    pub fn of_body(body: &Map<String, Value>) -> Result<Self, AdminReject> {
        let member = |name| body.get(name).filter(|value| !value.is_null());
        let since = member("since").map(Value::as_f64);
        let limit = member("limit").map(|limit| match limit {
            Value::Number(number) => {
                // JSON may write a huge limit as a fraction; precision is irrelevant there.
                let is_count = |number: &f64| *number >= 0.0 && number.fract() == 0.0;
                number.as_f64().filter(is_count).map(|number| number as usize)
            }
            _ => None,
        });
        match (since, limit) {
            (Some(None), _) => Err(AdminReject::problem("since must be a number of seconds since 1970")),
            (_, Some(None)) => Err(AdminReject::problem("limit must be a number of entries, 0 or more")),
            (since, limit) => Ok(ListRange { since: since.flatten(), limit: limit.flatten() }),
        }
    }
}

/// Parses a count of decimal digits; a number too large for `usize` counts as no limit.
fn count(text: &str) -> Option<usize> {
    let is_count = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_count.then(|| text.parse().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_paths_of_the_proxy_to_the_proxy() {
        for (path, expected) in [
            ("/sessions", true),
            ("/sessions/a", true),
            ("/sessions/harbor/hello-world:0", true),
            ("/sessions/a/traces", true),
            ("/sessions/v1", true),
            ("/sessions/a/v10", true),
            ("/sessions/", true),
            ("/sessions/a/v1", false),
            ("/sessions/a/b/v1/chat/completions", false),
            ("/session", false),
            ("/sessionsx", false),
            ("/traces/1", true),
            ("/traces/query", true),
            ("/traces", false),
            ("/health/workers", true),
            ("/health", false),
            ("/v1/models", false),
        ] {
            assert_eq!(serves(path), expected, "{path}");
        }
    }

    fn of_query(query: &str) -> Option<ListRange> {
        let request = Request::builder().uri(format!("/sessions?{query}")).body(Bytes::new());
        ListRange::of_query(&request.expect("is a URI")).ok()
    }

    fn of_body(body: Value) -> Option<ListRange> {
        ListRange::of_body(body.as_object().expect("is an object")).ok()
    }

    #[test]
    fn reads_ranges_from_queries() {
        let range = |since, limit| Some(ListRange { since, limit });
        for (query, expected) in [
            ("", range(None, None)),
            ("since=1.5&limit=3", range(Some(1.5), Some(3))),
            ("since=-1&limit=0", range(Some(-1.0), Some(0))),
            ("since=1e%2B9", range(Some(1e9), None)),
            ("limit=99999999999999999999999999", range(None, Some(usize::MAX))),
            ("since=", None),
            ("since=nan", None),
            ("since=inf", None),
            ("since=x", None),
            ("since=%zz", None),
            ("limit=", None),
            ("limit=-1", None),
            ("limit=1.5", None),
            ("limit=%2B1", None),
            ("limit=ten", None),
        ] {
            assert_eq!(of_query(query), expected, "{query}");
        }
    }

    #[test]
    fn reads_ranges_from_bodies() {
        let range = |since, limit| Some(ListRange { since, limit });
        for (body, expected) in [
            (json!({}), range(None, None)),
            (json!({"since": null, "limit": null}), range(None, None)),
            (json!({"since": 3, "limit": 0}), range(Some(3.0), Some(0))),
            (json!({"since": 1.25, "limit": 7}), range(Some(1.25), Some(7))),
            (json!({"limit": 1e30}), range(None, Some(usize::MAX))),
            (json!({"since": "3"}), None),
            (json!({"limit": "3"}), None),
            (json!({"limit": -1}), None),
            (json!({"limit": 1.5}), None),
            (json!({"limit": true}), None),
            (json!({"limit": [1]}), None),
        ] {
            assert_eq!(of_body(body.clone()), expected, "{body}");
        }
    }
}
