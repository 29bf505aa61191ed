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
use serde_json::json;

use super::answer::{answer, not_allowed};
use super::parts::AdminParts;
use super::{sessions, traces, workers};
use crate::route::api_paths::of_session;

/// Whether a path outside of `/admin/` belongs to this API.
pub(super) fn serves(path: &str) -> bool {
    let is_session = path.starts_with("/sessions/") && of_session(path).is_none();
    is_session || matches!(path, "/sessions" | "/health/workers") || path.starts_with("/traces/")
}

/// Answers a call of this API; other paths get 404.
pub(super) async fn call(parts: &AdminParts, request: &Request<Bytes>) -> Response<Bytes> {
    let path = request.uri().path();
    let is_post = request.method() == Method::POST;
    match path {
        "/sessions" => return sessions::all(parts, request).await,
        "/sessions/batch_delete" if is_post => return sessions::delete_many(parts, request).await,
        "/traces/query" if is_post => return traces::query(parts, request).await,
        "/admin/workers" => return workers::all(parts, request).await,
        "/admin/flush" if is_post => return traces::flush(parts).await,
        "/admin/flush" => return not_allowed("POST"),
        "/admin/weight_version" => return traces::weight_version(parts, request).await,
        "/health/workers" if request.method() == Method::GET => return workers::health(parts),
        "/health/workers" => return not_allowed("GET"),
        _ => {}
    }
    let inside = |prefix: &str| path.strip_prefix(prefix).filter(|rest| !rest.is_empty());
    if let Some(written) = inside("/sessions/") {
        return sessions::one(parts, written, request).await;
    }
    if let Some(written) = inside("/traces/") {
        return traces::one(parts, written, request).await;
    }
    match inside("/admin/workers/") {
        Some(written) => workers::one(parts, written, request).await,
        None => answer(StatusCode::NOT_FOUND, &json!({"detail": "Not Found"})),
    }
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
}
