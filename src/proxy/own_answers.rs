//! The balancer's own answers, in the form of a single vLLM: the model list, health, version, load, and the
//! upstreams' metrics as one page.
//!
//! Lists and health come from the snapshot and never wait for an upstream. Metrics and load are requested
//! from all upstreams at once, within one time limit, once for all waiting requests.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};

use super::cached_pages::{self, CachedPages};
use super::fleet_routes::FleetRoutes;
use super::respond::json;
use crate::aggregate;
use crate::fleet::{Fleet, Snapshot, SnapshotEntry};
use crate::reject::unanswered_call;

/// For metrics and load: a scraper's own timeout is not much longer.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(2);

/// For a control call that is fanned out; some of them wait for requests in flight.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(300);

/// The version while no upstream has reported one.
const VERSION_UNKNOWN: &str = "unknown";

fn answer(kind: &'static str, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut answer = Response::new(body.into());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

fn json_answer(body: impl Into<Bytes>) -> Response<Bytes> {
    let mut answer = Response::new(body.into());
    json(answer.headers_mut());
    answer
}

/// 200 with an empty body while some upstream is ready and the balancer stays, else 503, as vLLM's.
pub(super) fn health(snapshot: &Snapshot, leaving: bool) -> Response<Bytes> {
    let mut answer = Response::new(Bytes::new());
    if leaving || !snapshot.any_ready() {
        *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    answer
}

/// The models that clients may request now: those of ready upstreams, and the names that routes add.
pub(super) fn models(snapshot: &Snapshot, routes: &FleetRoutes) -> Response<Bytes> {
    json_answer(routes.models(snapshot))
}

/// The lowest version among the upstreams: each of them has its features.
pub(super) fn version(snapshot: &Snapshot) -> Response<Bytes> {
    let versions: Vec<&str> = snapshot.ready().filter_map(|entry| entry.version.as_deref()).collect();
    let version = aggregate::version_min(&versions).unwrap_or_else(|| VERSION_UNKNOWN.into());
    json_answer(format!(r#"{{"version":{}}}"#, serde_json::Value::from(version)))
}

/// The sum over ready upstreams.
pub(super) async fn load(pages: &CachedPages, fleet: &Fleet) -> Response<Bytes> {
    cached_pages::shared(&pages.load, load_now(fleet)).await
}

async fn load_now(fleet: &Fleet) -> Response<Bytes> {
    let bodies = request_from_ready(fleet, "/load").await;
    let bodies: Vec<&[u8]> = bodies.iter().map(|(_, body)| &body[..]).collect();
    json_answer(format!(r#"{{"server_load":{}}}"#, aggregate::load_sum(&bodies)))
}

/// The upstreams' metrics, each sample with an `upstream` label.
pub(super) async fn metrics(pages: &CachedPages, fleet: &Fleet) -> Response<Bytes> {
    cached_pages::shared(&pages.metrics, metrics_now(fleet)).await
}

async fn metrics_now(fleet: &Fleet) -> Response<Bytes> {
    let bodies = request_from_ready(fleet, "/metrics").await;
    let texts: Vec<(&str, std::borrow::Cow<'_, str>)> =
        bodies.iter().map(|(name, body)| (name.as_str(), String::from_utf8_lossy(body))).collect();
    let texts: Vec<(&str, &str)> = texts.iter().map(|(name, text)| (*name, text.as_ref())).collect();
    answer("text/plain; version=1.0.0; charset=utf-8", aggregate::merge_metrics(&texts))
}

/// The answers of ready upstreams with status 200, by name. An upstream without an answer is omitted.
async fn request_from_ready(fleet: &Fleet, path: &str) -> Vec<(String, Bytes)> {
    let snapshot = fleet.snapshot_owned();
    let asked = snapshot.ready().map(async |entry| {
        let answer = fleet.client().scrape(&entry.upstream, path, SCRAPE_TIMEOUT).await.ok()?;
        let name = entry.upstream.name().to_string();
        (answer.status() == StatusCode::OK).then(|| (name, answer.into_body()))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// Sends a control call to every ready upstream. The answer is the first that failed, else the first.
///
/// Of the client's head goes on what describes the body, and its key: an upstream without a key of its own
/// in the configuration may ask for one. `expose`: an error names its upstream.
pub(super) async fn fan_out(
    fleet: &Fleet,
    (method, path): (&Method, &str),
    head: &HeaderMap,
    body: Bytes,
    expose: bool,
) -> Option<Response<Bytes>> {
    let snapshot = fleet.snapshot_owned();
    let asked = snapshot.ready().map(async |entry| {
        let mut request = Request::builder().method(method).uri(path);
        for name in [header::CONTENT_TYPE, header::AUTHORIZATION] {
            if let Some(value) = head.get(&name) {
                request = request.header(name, value);
            }
        }
        let request = request.body(body.clone()).ok()?;
        let answer = fleet.client().request(&entry.upstream, request, CONTROL_TIMEOUT).await;
        Some(answer.unwrap_or_else(|error| unreached(entry, &error.to_string(), expose)))
    });
    let answers: Vec<Response<Bytes>> = join_all(asked).await.into_iter().flatten().collect();
    let failed = answers.iter().position(|answer| !answer.status().is_success());
    answers.into_iter().nth(failed.unwrap_or(0)).map(clean)
}

fn unreached(entry: &SnapshotEntry, error: &str, expose: bool) -> Response<Bytes> {
    let message = unanswered_call(expose.then_some((entry.upstream.name(), error)));
    let mut answer = json_answer(format!(r#"{{"error":{}}}"#, serde_json::Value::from(message)));
    *answer.status_mut() = StatusCode::BAD_GATEWAY;
    answer
}

/// Keeps only the fields that describe the body of an answer that was read whole. A status that ends no
/// request is no answer.
fn clean(answer: Response<Bytes>) -> Response<Bytes> {
    let (mut parts, body) = answer.into_parts();
    if parts.status.is_informational() {
        parts.status = StatusCode::BAD_GATEWAY;
    }
    let mut cleaned = Response::new(body);
    *cleaned.status_mut() = parts.status;
    if let Some(kind) = parts.headers.get(header::CONTENT_TYPE) {
        cleaned.headers_mut().insert(header::CONTENT_TYPE, kind.clone());
    }
    cleaned
}
