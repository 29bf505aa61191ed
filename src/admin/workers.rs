//! Upstreams in rllm-model-gateway's terms: see `gateway` for the paths, `upstreams` for our own API.
//!
//! A worker's id is its upstream's name. `url` and `api_path` together locate the API. A path that both of
//! them name counts once: `http://gpu-0:8000/v1` with `/v1` is `http://gpu-0:8000/v1`.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::answer::{AdminReject, AdminResult, answer, not_allowed, respond};
use super::arguments::{decoded_id, object, text_member};
use super::parts::AdminParts;
use super::upstreams::{is_ready, wait};
use crate::config::check;
use crate::config::types::UpstreamConfig;
use crate::fleet::{FleetChange, Snapshot, SnapshotEntry};

/// The path of vLLM's API below every upstream.
const API_PATH: &str = "/v1";

/// Answers calls of the list of workers.
pub(super) async fn all(parts: &AdminParts, request: &Request<Bytes>) -> Response<Bytes> {
    match *request.method() {
        Method::GET => answer(StatusCode::OK, &rows(&parts.fleet.snapshot()).into()),
        Method::POST => respond(add(parts, request).await),
        _ => not_allowed("GET, POST"),
    }
}

/// Answers calls of one worker.
pub(super) async fn one(parts: &AdminParts, written: &str, request: &Request<Bytes>) -> Response<Bytes> {
    match *request.method() {
        Method::DELETE => respond(remove(parts, written, request).await),
        _ => not_allowed("DELETE"),
    }
}

/// Lists all workers and counts those that accept requests.
pub(super) fn health(parts: &AdminParts) -> Response<Bytes> {
    let snapshot = parts.fleet.snapshot();
    let (workers, healthy) = (rows(&snapshot), present(&snapshot).filter(|entry| is_ready(entry)).count());
    let total = workers.len();
    answer(StatusCode::OK, &json!({"workers": workers, "healthy": healthy, "total": total}))
}

/// The upstreams, without those that are removed after their last request in flight.
fn present(snapshot: &Snapshot) -> impl Iterator<Item = &SnapshotEntry> {
    snapshot.entries.iter().filter(|entry| !entry.removing)
}

fn rows(snapshot: &Snapshot) -> Vec<Value> {
    present(snapshot).map(row).collect()
}

fn row(entry: &SnapshotEntry) -> Value {
    let config = &entry.upstream.config;
    json!({
        "worker_id": config.name,
        "url": config.url.display(),
        "api_path": API_PATH,
        "model_name": entry.models.first().map(|card| card.id.as_str()),
        // rllm's type is an integer.
        "weight": config.weight.round().max(1.0) as u64,
        "healthy": is_ready(entry),
        "active_requests": entry.upstream.load().active,
        "state": entry.state().label(),
    })
}

async fn add(parts: &AdminParts, request: &Request<Bytes>) -> AdminResult {
    let wait = wait(request)?;
    let config = worker(&object(request)?)?;
    let same_url = present(&parts.fleet.snapshot())
        .find(|entry| entry.upstream.config.url == config.url)
        .map(|entry| entry.upstream.config.clone());
    let config = match same_url {
        Some(known) => known,
        None => {
            insert(parts, config.clone()).await?;
            config
        }
    };
    let name = &config.name;
    let mut body = json!({"worker_id": name, "url": config.url.display(), "api_path": API_PATH});
    let Some(wait) = wait else { return Ok(answer(StatusCode::OK, &body)) };
    // The wait also ends when the upstream is removed.
    let settled = parts.fleet.wait_until(wait, |snapshot| snapshot.by_name(name).is_none_or(is_ready)).await;
    if !settled {
        body["error"] = format!("worker {name:?} was added, and is not ready yet").into();
        return Err(AdminReject(StatusCode::GATEWAY_TIMEOUT, body));
    }
    Ok(answer(StatusCode::OK, &body))
}

async fn insert(parts: &AdminParts, config: UpstreamConfig) -> Result<(), AdminReject> {
    let is_taken = present(&parts.fleet.snapshot()).any(|entry| entry.upstream.config.name == config.name);
    if is_taken {
        let error = format!("another worker has the id {:?}: choose another worker_id", config.name);
        return Err(AdminReject::new(StatusCode::CONFLICT, error));
    }
    Ok(parts.editor().apply(vec![FleetChange::Upsert(config)]).await?)
}

/// Parses the upstream that a body describes, with the checks for upstreams of the file.
fn worker(body: &Map<String, Value>) -> Result<UpstreamConfig, AdminReject> {
    let Some(url) = text_member(body, "url")? else {
        return Err(AdminReject::problem("url is required"));
    };
    let api_path = match body.get("api_path") {
        None | Some(Value::Null) => None,
        Some(Value::String(path)) => Some(path.as_str()),
        Some(_) => return Err(AdminReject::problem("api_path must be a string")),
    };
    let mut upstream = Map::new();
    upstream.insert("url".into(), joined(&url, api_path).map_err(AdminReject::problem)?.into());
    if let Some(id) = text_member(body, "worker_id")? {
        upstream.insert("name".into(), id.into());
    }
    if let Some(model) = text_member(body, "model_name")? {
        upstream.insert("models".into(), json!([model]));
    }
    if let Some(weight) = body.get("weight").filter(|weight| !weight.is_null()) {
        upstream.insert("weight".into(), weight.clone());
    }
    let is_named = upstream.contains_key("name");
    let config = check::upstream_alone(&Value::Object(upstream).to_string()).map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let error = format!("the worker has problems: {}", problems.join("; "));
        AdminReject(StatusCode::BAD_REQUEST, json!({"error": error, "problems": problems}))
    })?;
    // Several APIs of one server are several workers.
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
    let prefix = config.url.prefix.replace(|c| !is_plain(c), "-");
    let name = if is_named { config.name } else { format!("{}{prefix}", config.name) };
    Ok(UpstreamConfig { name, ..config })
}

/// The URL of the API, which ends with `/v1`.
fn joined(url: &str, api_path: Option<&str>) -> Result<String, String> {
    let url = url.trim().trim_end_matches('/');
    let is_socket = url.starts_with("unix:");
    let start = url.find("://").map_or(0, |at| at + 3);
    let path_at = if is_socket { None } else { url[start..].find('/') };
    let (base, path) = url.split_at(path_at.map_or(url.len(), |at| start + at));
    let path = match api_path.map(|api_path| api_path.trim().trim_matches('/')) {
        None if path.is_empty() => API_PATH.to_string(),
        None | Some("") => path.to_string(),
        Some(api_path) if path.ends_with(&format!("/{api_path}")) => path.to_string(),
        Some(api_path) => format!("{path}/{api_path}"),
    };
    match path.strip_suffix(API_PATH) {
        Some("") if is_socket => Ok(base.to_string()),
        Some(_) if !is_socket => Ok(format!("{base}{path}")),
        _ => {
            let rule =
                "url and api_path together must end with /v1, which every path of vLLM's API begins with";
            Err(format!("{rule}: {path:?} does not fit"))
        }
    }
}

async fn remove(parts: &AdminParts, written: &str, request: &Request<Bytes>) -> AdminResult {
    let wait = wait(request)?;
    let name = decoded_id(written)?;
    let found = present(&parts.fleet.snapshot())
        .find(|entry| entry.upstream.config.name == name)
        .map(|entry| entry.upstream.id);
    let Some(id) = found else {
        return Err(AdminReject::new(StatusCode::NOT_FOUND, format!("Worker {name} not found")));
    };
    parts.editor().apply(vec![FleetChange::Remove { name: name.clone(), force: false }]).await?;
    if let Some(wait) = wait.filter(|wait| *wait > Duration::ZERO) {
        let gone = parts.fleet.wait_until(wait, |snapshot| snapshot.by_id(id).is_none()).await;
        if !gone {
            let error = format!("worker {name:?} goes when its requests in flight have ended");
            return Err(AdminReject::new(StatusCode::GATEWAY_TIMEOUT, error));
        }
    }
    Ok(answer(StatusCode::OK, &json!({"removed": name})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_a_path_in_both_url_and_api_path_once() {
        for (url, api_path, expected) in [
            ("http://w:8000", None, Some("http://w:8000/v1")),
            ("http://w:8000/", Some("/v1"), Some("http://w:8000/v1")),
            ("http://w:8000/v1", Some("/v1"), Some("http://w:8000/v1")),
            ("http://w:8000/v1/", Some("v1/"), Some("http://w:8000/v1")),
            ("http://w:8000/v1", None, Some("http://w:8000/v1")),
            ("http://w:8000/v1", Some(""), Some("http://w:8000/v1")),
            ("http://w:8000", Some("/api/v1"), Some("http://w:8000/api/v1")),
            ("http://w:8000/api", Some("/v1"), Some("http://w:8000/api/v1")),
            ("http://w:8000/api/v1", Some("/v1"), Some("http://w:8000/api/v1")),
            ("http://v1", None, Some("http://v1/v1")),
            ("http://v1", Some("/v1"), Some("http://v1/v1")),
            ("unix:/run/vllm.sock", Some("/v1"), Some("unix:/run/vllm.sock")),
            ("unix:/run/v1", None, Some("unix:/run/v1")),
            ("http://v1", Some(""), None),
            ("http://w:8000", Some("/openai"), None),
            ("http://w:8000/team", None, None),
            ("http://w:8000/xv1", Some(""), None),
            ("unix:/run/vllm.sock", Some("/api/v1"), None),
        ] {
            assert_eq!(joined(url, api_path).ok().as_deref(), expected, "{url} {api_path:?}");
        }
    }

    #[test]
    fn checks_a_worker_like_an_upstream() {
        let body = |value: Value| value.as_object().cloned().unwrap_or_default();
        let given = json!({
            "url": "http://w:8000/v1", "api_path": "/v1", "worker_id": "7", "model_name": "m", "weight": 2,
        });
        let config = worker(&body(given)).ok().expect("is a worker");
        assert_eq!((config.name.as_str(), config.url.display()), ("7", "http://w:8000".to_string()));
        assert_eq!((config.models, config.weight), (Some(vec!["m".to_string()]), 2.0));
        let config = worker(&body(json!({"url": "http://w:8000/team/v1"}))).ok().expect("is a worker");
        assert_eq!(config.name, "w:8000/team");
        for (wrong, said) in [
            (json!({}), "url is required"),
            (json!({"url": null}), "url is required"),
            (json!({"url": ""}), "url is required"),
            (json!({"url": 7}), "url must be a string"),
            (json!({"url": "w:8000"}), "has no scheme"),
            (json!({"url": "http://u:secret@w"}), "use api_key"),
            (json!({"url": "http://w?x=1"}), "take the query"),
            (json!({"url": "http://w", "api_path": 1}), "api_path must be a string"),
            (json!({"url": "http://w", "api_path": "/openai"}), "must end with /v1"),
            (json!({"url": "http://w", "worker_id": 7}), "worker_id must be a string"),
            (json!({"url": "http://w", "worker_id": "a b\n"}), "name"),
            (json!({"url": "http://w", "model_name": ["m"]}), "model_name must be a string"),
            (json!({"url": "http://w", "weight": 0}), "weight"),
            (json!({"url": "http://w", "weight": "heavy"}), "weight"),
        ] {
            let Err(AdminReject(status, error)) = worker(&body(wrong.clone())) else {
                panic!("{wrong} is taken");
            };
            let error = error["error"].as_str().unwrap_or_default();
            assert!(error.contains(said) && !error.contains("secret"), "{wrong}: {error}");
            assert_eq!(status, StatusCode::BAD_REQUEST);
        }
    }
}
