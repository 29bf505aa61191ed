//! The admin listener's own calls: `http::Request` in, `http::Response` out.
//!
//! Requests for other paths are served as on the public listener. Never: pingora, or a change to the fleet
//! that bypasses `fleet_editor`.

mod answer;
mod arguments;
mod decisions;
mod fleet_editor;
mod gateway;
mod guard;
mod live;
mod overview;
mod page;
mod parts;
mod sessions;
mod siblings;
mod traces;
mod upstreams;
mod usage;
mod workers;

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use serde_json::json;

use crate::config::render;
use crate::config::types::Config;
use crate::fleet::UpstreamState;
use crate::observe::{ExpositionFormat, UpstreamGauges};
use answer::{AdminReject, answer, not_allowed, respond, typed_answer};
use guard::Protection;
use live::LiveFeed;
use overview::OverviewSource;
pub(crate) use parts::AdminParts;

const METRICS_PATH: &str = "/metrics";
const OVERVIEW_PATH: &str = "/admin/overview";
const LIVE_PATH: &str = "/admin/live";

/// The paths that the admin listener has beyond the public ones.
pub(crate) fn serves(path: &str) -> bool {
    matches!(path, "/" | METRICS_PATH | "/live" | "/ready" | "/health") || is_protected(path)
}

/// Whether a call only watches the balancer, so that it should not appear among the requests in flight that
/// it shows.
pub(crate) fn only_watches(path: &str) -> bool {
    matches!(path, "/metrics" | OVERVIEW_PATH | LIVE_PATH)
}

/// Whether a call shows or changes data that clients of the public listeners must not see.
fn is_protected(path: &str) -> bool {
    path.starts_with("/admin/") || gateway::serves(path)
}

/// The result of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Sections that changed.
    pub changed: Vec<String>,
    /// Changed keys that need a restart, and were not applied.
    pub restart: Vec<String>,
    pub warnings: Vec<String>,
}

/// Reads the configuration again. Implemented by the assembly, which alone has all parts.
pub(crate) trait Reload: Send + Sync {
    /// Applies the new configuration, or returns its problems and keeps the running one.
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, Vec<String>>>;
}

/// Answers the calls of the admin listener.
pub(crate) struct AdminApi {
    parts: Arc<AdminParts>,
    overviews: Arc<OverviewSource>,
    /// The stream of overviews.
    feed: Arc<LiveFeed>,
    /// The running configuration.
    config: Arc<ArcSwap<Config>>,
    reload: Arc<dyn Reload>,
    /// The balancer is shutting down: load balancers in front of it should stop sending clients.
    leaving: Arc<AtomicBool>,
}

impl AdminApi {
    pub(crate) fn new(
        parts: AdminParts,
        config: Arc<ArcSwap<Config>>,
        reload: Arc<dyn Reload>,
        leaving: Arc<AtomicBool>,
    ) -> Self {
        let parts = Arc::new(parts);
        let id = RandomState::new().hash_one(0u64);
        let overviews = OverviewSource::new(parts.clone(), config.clone(), leaving.clone(), id);
        let overviews = Arc::new(overviews);
        let feed = LiveFeed::new({
            let overviews = overviews.clone();
            move || overviews.frame()
        });
        AdminApi { parts, overviews, feed, config, reload, leaving }
    }

    /// Answers a call. A call with `expect: 100-continue` arrives without its body: the answer is 100 when
    /// the body is needed, else the final answer. A body without an exact size is a stream.
    pub(crate) async fn call(&self, request: Request<Bytes>) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
        let refused = self.refuse(&request);
        let is_live = request.uri().path() == LIVE_PATH && request.method() == Method::GET;
        let answer = match refused {
            Some(refused) => refused,
            None if is_live => match live::open(&self.feed, &request) {
                Ok(answer) => {
                    let frames =
                        |events| StreamBody::new(StreamExt::map(events, |event| Ok(Frame::data(event))));
                    return answer.map(|events| frames(events).boxed_unsync());
                }
                Err(reject) => respond(Err(reject)),
            },
            None => self.answer(request).await,
        };
        answer.map(|body| Full::new(body).boxed_unsync())
    }

    /// Rejects a protected call without its token or from a web page, and permits an accepted one to send its
    /// body.
    fn refuse(&self, request: &Request<Bytes>) -> Option<Response<Bytes>> {
        let path = request.uri().path();
        if !is_protected(path) {
            // Scrapers send no token and use any name; the page of metrics costs as much for other callers.
            let checked = if path == METRICS_PATH { guard::check_site(request) } else { Ok(()) };
            return checked.err().map(|(status, error)| respond(Err(AdminReject::new(status, error))));
        }
        if let Err(reject) = self.check_caller(request) {
            return Some(respond(Err(reject)));
        }
        request.headers().contains_key(header::EXPECT).then(|| {
            let mut permission = Response::new(Bytes::new());
            *permission.status_mut() = StatusCode::CONTINUE;
            permission
        })
    }

    async fn answer(&self, request: Request<Bytes>) -> Response<Bytes> {
        let (path, method) = (request.uri().path(), request.method());
        match path {
            "/" => page::page(&request),
            "/live" | "/health" if method == Method::GET => answer(StatusCode::OK, &json!({"status": "ok"})),
            "/ready" if method == Method::GET => self.ready(),
            METRICS_PATH if method == Method::GET => self.metrics(request.headers()),
            "/admin/config" if method == Method::GET => {
                answer(StatusCode::OK, &render::json(&self.config.load()))
            }
            "/admin/decisions" if method == Method::GET => {
                decisions::all(self.parts.observer.decisions(), &request)
            }
            "/admin/usage" if method == Method::GET => usage::all(self.parts.observer.usage(), &request),
            "/admin/siblings" if method == Method::GET => siblings::all(self.parts.exchange.as_deref()),
            OVERVIEW_PATH if method == Method::GET => {
                let overview = self.overviews.frame().document(0);
                typed_answer(StatusCode::OK, "application/json", overview.into())
            }
            "/admin/reload" if method == Method::POST => self.reload().await,
            "/live" | "/health" | "/ready" | METRICS_PATH => not_allowed("GET"),
            "/admin/config" | "/admin/decisions" | "/admin/siblings" | "/admin/usage" => not_allowed("GET"),
            OVERVIEW_PATH | LIVE_PATH => not_allowed("GET"),
            "/admin/reload" => not_allowed("POST"),
            _ => match path.strip_prefix("/admin/upstreams") {
                Some("") => upstreams::all(&self.parts.editor(), &request).await,
                Some(name) if name.starts_with('/') => {
                    upstreams::one(&self.parts.editor(), &name[1..], &request).await
                }
                _ => gateway::call(&self.parts, &request).await,
            },
        }
    }

    fn check_caller(&self, request: &Request<Bytes>) -> Result<(), AdminReject> {
        if !self.allowed(request.headers()) {
            return Err(AdminReject::new(StatusCode::UNAUTHORIZED, "Unauthorized"));
        }
        let config = self.config.load();
        let protection = match config.admin.token {
            Some(_) => Protection::Token,
            None => Protection::Address(&config.admin.address),
        };
        guard::check(request, protection).map_err(|(status, error)| AdminReject::new(status, error))
    }

    /// Whether the call has the configured token. Without one the address is the protection, see `guard`.
    fn allowed(&self, headers: &HeaderMap) -> bool {
        let config = self.config.load();
        let Some(token) = &config.admin.token else { return true };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        given.and_then(|value| value.strip_prefix("Bearer ")).is_some_and(|given| token.matches(given))
    }

    fn ready(&self) -> Response<Bytes> {
        let snapshot = self.parts.fleet.snapshot();
        let (ready, all) = (snapshot.ready().count(), snapshot.entries.len());
        let is_ready = ready > 0 && !self.leaving.load(Ordering::Acquire);
        let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        answer(status, &json!({"ready": is_ready, "upstreams": ready, "of": all}))
    }

    fn metrics(&self, headers: &HeaderMap) -> Response<Bytes> {
        let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let format = ExpositionFormat::accepted(accept);
        let (snapshot, now) = (self.parts.fleet.snapshot(), Instant::now());
        let gauges: Vec<UpstreamGauges<'_>> = snapshot
            .entries
            .iter()
            .map(|entry| {
                let load = entry.upstream.load();
                let telling = entry.upstream.gauge_report(now);
                UpstreamGauges {
                    upstream: entry.upstream.name(),
                    ready: entry.is_ready(),
                    states: UpstreamState::ALL.map(|state| (state.label(), state == entry.state())),
                    active: load.active,
                    siblings_active: entry.upstream.siblings().active,
                    backlog: load.backlog,
                    context: load.context,
                    incarnation: entry.incarnation,
                    foreign: telling.and_then(|telling| telling.foreign),
                    unaccounted: telling.and_then(|telling| telling.unaccounted),
                    kv_usage: telling.and_then(|telling| telling.kv_usage),
                    cache_tokens: entry.cache_tokens,
                    sight: entry.upstream.sight().state,
                }
            })
            .collect();
        let size = self.parts.state.size();
        self.parts.observer.index_size(size.blocks, size.pairs, size.bytes);
        let (calls, bytes, stored) = self.parts.traces.sizes();
        self.parts.observer.trace_sizes(calls, bytes, stored);
        let page = self.parts.observer.render(format, &gauges);
        // After the page, so that it shows the last counts of an upstream that has left.
        let has_upstream = |name: &str| snapshot.by_name(name).is_some();
        self.parts.observer.forget_series(has_upstream, |model| snapshot.serves_model(model));
        typed_answer(StatusCode::OK, format.content_type(), page.into())
    }

    async fn reload(&self) -> Response<Bytes> {
        // Runs in a task of its own: a caller that disconnects must not stop the reload half-way.
        let reload = self.reload.clone();
        let done = tokio::spawn(async move { reload.reload().await }).await;
        match done.unwrap_or_else(|error| Err(vec![error.to_string()])) {
            Ok(Reloaded { changed, restart, warnings }) => {
                let body = json!({
                    "status": "ok",
                    "changed": changed,
                    "needs_restart": restart,
                    "warnings": warnings,
                });
                answer(StatusCode::OK, &body)
            }
            Err(problems) => {
                let error = "the configuration has problems: everything stays as it was";
                answer(StatusCode::UNPROCESSABLE_ENTITY, &json!({"error": error, "problems": problems}))
            }
        }
    }
}
