//! The admin listener's own calls: `http::Request` in, `http::Response` out.
//!
//! Whatever is not one of these is served as on the public listener. Never: pingora, or a change to the
//! fleet that does not go through it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};

use crate::config::render;
use crate::config::types::Config;
use crate::fleet::{Entry, Fleet, State};
use crate::observe::metrics::{METRICS, UpstreamGauges, upstream_gauges};

/// The paths that the admin listener has beyond the public ones.
pub fn serves(path: &str) -> bool {
    matches!(path, "/metrics" | "/live" | "/ready" | "/health") || path.starts_with("/admin/")
}

pub struct Admin {
    fleet: Arc<Fleet>,
    config: Arc<Config>,
    /// The balancer goes away: whoever sends clients here should stop it.
    leaving: Arc<AtomicBool>,
}

impl Admin {
    pub fn new(fleet: Arc<Fleet>, config: Arc<Config>, leaving: Arc<AtomicBool>) -> Self {
        Admin { fleet, config, leaving }
    }

    pub fn call(&self, request: &Request<Bytes>) -> Response<Bytes> {
        let path = request.uri().path();
        if path.starts_with("/admin/") && !self.allowed(request.headers()) {
            return json(StatusCode::UNAUTHORIZED, r#"{"error":"Unauthorized"}"#.into());
        }
        let known = match path {
            "/live" => json(StatusCode::OK, r#"{"status":"ok"}"#.into()),
            "/health" => json(StatusCode::OK, r#"{"status":"ok"}"#.into()),
            "/ready" => self.ready(),
            "/metrics" => self.metrics(),
            "/admin/upstreams" => self.upstreams(),
            "/admin/config" => json(StatusCode::OK, render::json(&self.config).to_string()),
            _ => return json(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#.into()),
        };
        if request.method() != Method::GET {
            let mut refusal =
                json(StatusCode::METHOD_NOT_ALLOWED, r#"{"detail":"Method Not Allowed"}"#.into());
            refusal.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
            return refusal;
        }
        known
    }

    /// Without a token in the configuration the listener's address is the protection.
    fn allowed(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.config.admin.token else { return true };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        given.and_then(|value| value.strip_prefix("Bearer ")).is_some_and(|given| token.matches(given))
    }

    fn ready(&self) -> Response<Bytes> {
        let snapshot = self.fleet.snapshot();
        let (ready, all) = (snapshot.ready().count(), snapshot.entries.len());
        let leaving = self.leaving.load(Ordering::Acquire);
        let is_ready = ready > 0 && !leaving;
        let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        json(status, format!(r#"{{"ready":{is_ready},"upstreams":{ready},"of":{all}}}"#))
    }

    fn metrics(&self) -> Response<Bytes> {
        let snapshot = self.fleet.snapshot();
        let gauges = |entry| {
            let Entry { upstream, state, .. }: &Entry = entry;
            let load = upstream.load();
            (upstream.name().to_string(), *state == State::Ready, load)
        };
        let rows: Vec<_> = snapshot.entries.iter().map(gauges).collect();
        let rows: Vec<UpstreamGauges<'_>> = rows
            .iter()
            .map(|(name, ready, load)| UpstreamGauges {
                upstream: name,
                ready: *ready,
                active: load.active,
                backlog: load.backlog,
                context: load.context,
            })
            .collect();
        let mut text = METRICS.render();
        text.extend_from_slice(upstream_gauges(&rows).as_bytes());
        let mut answer = Response::new(Bytes::from(text));
        let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        answer
    }

    fn upstreams(&self) -> Response<Bytes> {
        let snapshot = self.fleet.snapshot();
        let rows: Vec<serde_json::Value> = snapshot.entries.iter().map(row).collect();
        json(StatusCode::OK, serde_json::Value::from(rows).to_string())
    }
}

fn row(entry: &Entry) -> serde_json::Value {
    let load = entry.upstream.load();
    let config = &entry.upstream.config;
    serde_json::json!({
        "name": config.name,
        "url": config.url.display(),
        "state": entry.state.label(),
        "since_seconds": entry.since.elapsed().as_secs(),
        "models": entry.models.iter().map(|card| card.id.as_str()).collect::<Vec<_>>(),
        "version": entry.version.as_deref(),
        "weight": config.weight,
        "max_active": config.max_active,
        "active": load.active,
        "backlog_tokens": load.backlog,
        "context_tokens": load.context,
    })
}

fn json(status: StatusCode, body: String) -> Response<Bytes> {
    let mut answer = Response::new(Bytes::from(body));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
