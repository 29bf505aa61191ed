//! The table of paths and their handlers, and Starlette's answers for unknown paths.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::connection_state::BusyGuard;
use super::error::{self, ApiError};
use super::fault::InjectedFault;
use super::options::Options;
use super::record::Recorded;
use super::reply::{self, Reply, Tracked};
use super::run::EngineCall;
use super::shared::EngineShared;
use super::{
    audio, chat, clock, completions, control, generate, messages, metrics, models, pooling, realtime,
    responses, tokenize,
};

/// The pause before an upgrade. No real server is faster, and a proxy may still be ending the request.
const UPGRADE_PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EngineRoute {
    Models,
    Chat,
    Completions,
    Responses,
    Response,
    CancelResponse,
    Messages,
    CountTokens,
    Generate,
    Embeddings,
    Pooling,
    Classify,
    Score,
    Rerank,
    Transcribe,
    Realtime,
    Tokenize,
    Detokenize,
    Invocations,
    Health,
    Version,
    Load,
    Metrics,
    Dev,
    Sim,
}

/// A row of the table: the pattern as in the metrics, the methods as in `allow`.
struct EngineRouteRow {
    route: EngineRoute,
    pattern: &'static str,
    allow: &'static str,
}

/// The routes with a fixed path. `find` has those with a parameter, and those under `/sim/`.
#[rustfmt::skip]
const TABLE: &[EngineRouteRow] = &[
    EngineRouteRow { route: EngineRoute::Models, pattern: "/v1/models", allow: "GET" },
    EngineRouteRow { route: EngineRoute::Chat, pattern: "/v1/chat/completions", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Completions, pattern: "/v1/completions", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Responses, pattern: "/v1/responses", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Messages, pattern: "/v1/messages", allow: "POST" },
    EngineRouteRow { route: EngineRoute::CountTokens, pattern: "/v1/messages/count_tokens", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Generate, pattern: "/inference/v1/generate", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Embeddings, pattern: "/v1/embeddings", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Pooling, pattern: "/pooling", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Classify, pattern: "/classify", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Score, pattern: "/score", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Score, pattern: "/v1/score", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Rerank, pattern: "/rerank", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Rerank, pattern: "/v1/rerank", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Rerank, pattern: "/v2/rerank", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Transcribe, pattern: "/v1/audio/transcriptions", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Transcribe, pattern: "/v1/audio/translations", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Realtime, pattern: "/v1/realtime", allow: "GET" },
    EngineRouteRow { route: EngineRoute::Tokenize, pattern: "/tokenize", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Detokenize, pattern: "/detokenize", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Invocations, pattern: "/invocations", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Health, pattern: "/health", allow: "GET" },
    EngineRouteRow { route: EngineRoute::Health, pattern: "/ping", allow: "GET, POST" },
    EngineRouteRow { route: EngineRoute::Version, pattern: "/version", allow: "GET" },
    EngineRouteRow { route: EngineRoute::Load, pattern: "/load", allow: "GET" },
    EngineRouteRow { route: EngineRoute::Metrics, pattern: "/metrics", allow: "GET" },
    EngineRouteRow { route: EngineRoute::Dev, pattern: "/reset_prefix_cache", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Dev, pattern: "/sleep", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Dev, pattern: "/wake_up", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Dev, pattern: "/is_sleeping", allow: "GET" },
    EngineRouteRow { route: EngineRoute::Dev, pattern: "/pause", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Dev, pattern: "/resume", allow: "POST" },
    EngineRouteRow { route: EngineRoute::Dev, pattern: "/is_paused", allow: "GET" },
];
const RESPONSE: EngineRouteRow =
    EngineRouteRow { route: EngineRoute::Response, pattern: "/v1/responses/{response_id}", allow: "GET" };
const CANCEL: EngineRouteRow = EngineRouteRow {
    route: EngineRoute::CancelResponse,
    pattern: "/v1/responses/{response_id}/cancel",
    allow: "POST",
};
const SIM: EngineRouteRow = EngineRouteRow { route: EngineRoute::Sim, pattern: "/sim", allow: "GET, POST" };

// === impl EngineRoute ===

impl EngineRoute {
    fn exists(self, options: &Options) -> bool {
        match self {
            Self::Embeddings | Self::Pooling | Self::Classify | Self::Score | Self::Rerank => {
                options.embeddings
            }
            Self::Transcribe => options.transcription,
            Self::Realtime => options.realtime,
            Self::Completions => options.completions,
            Self::Tokenize => options.tokenize,
            Self::Responses | Self::Response | Self::CancelResponse => options.responses,
            Self::Messages | Self::CountTokens => options.messages,
            Self::Dev => options.dev_mode,
            Self::Sim => options.control,
            _ => true,
        }
    }

    /// Whether machines poll the route often: polls are recorded separately and never affected by a fault.
    fn is_poll(self) -> bool {
        matches!(self, Self::Models | Self::Health | Self::Version | Self::Load | Self::Metrics)
    }
}

fn find(path: &str, options: &Options) -> Option<&'static EngineRouteRow> {
    let row = match path.strip_prefix("/v1/responses/") {
        Some(rest) => match rest.split_once('/') {
            None if !rest.is_empty() => &RESPONSE,
            Some((id, "cancel")) if !id.is_empty() => &CANCEL,
            _ => return None,
        },
        None if path.starts_with("/sim/") => &SIM,
        // `/metrics` is a mount, which takes all paths below it.
        None if path.starts_with("/metrics/") => {
            TABLE.iter().find(|row| row.route == EngineRoute::Metrics)?
        }
        None => TABLE.iter().find(|row| row.pattern == path)?,
    };
    row.route.exists(options).then_some(row)
}

/// Answers one request; an error closes the connection.
pub(super) async fn answer(
    shared: Arc<EngineShared>,
    busy: BusyGuard,
    request: Request<Incoming>,
) -> io::Result<Response<Tracked>> {
    let busy = Arc::new(busy);
    let method = request.method().as_str().to_owned();
    let row = find(request.uri().path(), &shared.options);
    let wanted = request.headers().get("x-request-id").cloned();
    shared.carries(busy.connection(), row.is_some_and(|row| row.route.is_poll()));
    let mut reply = respond(&shared, &busy, row, request).await?;
    if shared.options.request_id_headers {
        let fresh = || HeaderValue::from_str(&shared.random_hex()).ok();
        if let Some(id) = wanted.or_else(fresh) {
            reply.headers_mut().insert("x-request-id", id);
        }
    }
    if shared.options.clock_skew != 0
        && let Ok(date) = HeaderValue::from_str(&clock::skewed_http_date(shared.options.clock_skew))
    {
        reply.headers_mut().insert(header::DATE, date);
    }
    let pattern = row.map_or("none", |row| row.pattern);
    if row.is_none_or(|row| !row.route.is_poll() || row.route == EngineRoute::Models) {
        shared.traffic.count(pattern, &method, reply.status().as_u16());
    }
    Ok(reply.map(|body| Tracked { body, _busy: busy }))
}

async fn respond(
    shared: &Arc<EngineShared>,
    busy: &Arc<BusyGuard>,
    row: Option<&'static EngineRouteRow>,
    mut request: Request<Incoming>,
) -> io::Result<Reply> {
    // Taken before the body is read; a request that upgrades has no body.
    let upgrade = request.headers().contains_key(header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let is_sim = row.is_some_and(|row| row.route == EngineRoute::Sim);
    let is_poll = row.is_some_and(|row| row.route.is_poll());
    if !is_sim {
        let recorded = Recorded::new(parts.method.clone(), &parts.uri, parts.headers.clone(), &body);
        shared.record(recorded, is_poll);
    }
    let silence = shared.silence();
    let fault = if is_sim || is_poll { None } else { shared.faults.strike(InjectedFault::strikes_requests) };
    match &fault {
        Some(InjectedFault::StallHeaders) => std::future::pending().await,
        Some(InjectedFault::CutHeaders { reset }) => {
            if *reset {
                busy.connection().end_with_reset();
            }
            return Err(io::Error::other("simulated cut"));
        }
        Some(InjectedFault::ShuttingDown) => return Ok(ApiError::shutting_down().reply(false)),
        Some(InjectedFault::Status { status, body }) => {
            let status = http::StatusCode::from_u16(*status).unwrap_or_default();
            return Ok(reply::with(status, &[], Some("application/json"), Bytes::from(body.clone())));
        }
        _ => {}
    }
    if !authorized(&shared.options, &parts.method, &parts.uri, &parts.headers) {
        return Ok(error::unauthorized());
    }
    let Some(row) = row else {
        return Ok(unknown_path(&shared.options, &parts.uri, &parts.headers));
    };
    if !row.allow.split(", ").any(|method| method == parts.method.as_str()) {
        // FastAPI has a route for each method; the first one answers.
        return Ok(error::method_not_allowed(row.allow.split(", ").next().unwrap_or(row.allow)));
    }
    let call = EngineCall {
        shared: Arc::clone(shared),
        connection: Arc::clone(busy.connection()),
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
        body,
        fault,
        silence,
    };
    let anthropic = matches!(row.route, EngineRoute::Messages | EngineRoute::CountTokens);
    let reply = match (row.route, upgrade) {
        (EngineRoute::Realtime, Some(upgrade)) => {
            tokio::time::sleep(UPGRADE_PAUSE).await;
            realtime::open(&call, upgrade, Arc::clone(busy))
        }
        // Without an upgrade, a websocket route does not exist for HTTP.
        (EngineRoute::Realtime, None) => Ok(error::not_found()),
        (route, _) => dispatch(route, &call).await,
    };
    let reply = reply.unwrap_or_else(|error| error.reply(anthropic));
    if shared.silence() != silence && !is_sim {
        // The server went silent meanwhile, so open requests are never answered.
        std::future::pending::<()>().await;
    }
    Ok(reply)
}

async fn dispatch(route: EngineRoute, call: &EngineCall) -> Result<Reply, ApiError> {
    match route {
        EngineRoute::Models => Ok(models::list(call)),
        EngineRoute::Chat => chat::create(call).await,
        EngineRoute::Completions => completions::create(call).await,
        EngineRoute::Responses => responses::create(call).await,
        EngineRoute::Response => responses::get(call),
        EngineRoute::CancelResponse => responses::cancel(call),
        EngineRoute::Messages => messages::create(call).await,
        EngineRoute::CountTokens => messages::count(call),
        EngineRoute::Generate => generate::create(call).await,
        EngineRoute::Embeddings => pooling::embeddings(call).await,
        EngineRoute::Pooling => pooling::pooling(call).await,
        EngineRoute::Classify => pooling::classify(call).await,
        EngineRoute::Score => pooling::score(call).await,
        EngineRoute::Rerank => pooling::rerank(call).await,
        EngineRoute::Transcribe => audio::transcribe(call).await,
        EngineRoute::Tokenize => tokenize::tokenize(call),
        EngineRoute::Detokenize => tokenize::detokenize(call),
        EngineRoute::Invocations => invocations(call).await,
        EngineRoute::Health => Ok(reply::empty(call.shared.faults.health().unwrap_or(200))),
        EngineRoute::Version => Ok(models::version(call)),
        EngineRoute::Load => Ok(models::load(call)),
        EngineRoute::Metrics => Ok(metrics::answer(call).await),
        EngineRoute::Dev => control::dev(call),
        EngineRoute::Sim => control::sim(call).await,
        EngineRoute::Realtime => Ok(error::not_found()),
    }
}

/// Handles SageMaker's single path: the fields of the body select the API.
async fn invocations(call: &EngineCall) -> Result<Reply, ApiError> {
    let input = call.input()?;
    if input.get("messages").is_some() {
        chat::create(call).await
    } else if input.get("prompt").is_some() {
        completions::create(call).await
    } else if input.get("query").is_some() && call.shared.options.embeddings {
        pooling::rerank(call).await
    } else if input.get("input").is_some() && call.shared.options.embeddings {
        pooling::embeddings(call).await
    } else {
        Err(ApiError::bad_request(
            "Cannot find suitable handler for request. Expected one of: chat, completion",
        ))
    }
}

fn authorized(options: &Options, method: &Method, uri: &Uri, headers: &HeaderMap) -> bool {
    let Some(key) = &options.api_key else { return true };
    let guarded = ["/v1", "/v2", "/inference", "/cohere"].iter().any(|start| uri.path().starts_with(start));
    if !guarded || method == Method::OPTIONS {
        return true;
    }
    let given = headers.get(header::AUTHORIZATION).and_then(|given| given.to_str().ok());
    let given = given.and_then(|given| given.split_once(' '));
    given.is_some_and(|(scheme, token)| scheme.eq_ignore_ascii_case("bearer") && token == key)
}

/// Answers an unknown path: 404, or 307 when the path differs from a route by a slash at the end.
fn unknown_path(options: &Options, uri: &Uri, headers: &HeaderMap) -> Reply {
    let path = uri.path();
    let other = path.strip_suffix('/').map_or_else(|| format!("{path}/"), str::to_owned);
    if path == "/" || find(&other, options).is_none() {
        return error::not_found();
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    reply::redirect(&format!("http://{host}{other}{query}"))
}
