//! `/admin/upstreams`: what the fleet is, and changes to it.
//!
//! ```text
//! GET    /admin/upstreams                   all of them
//! POST   /admin/upstreams?wait=30s          {"url": "http://gpu-7:8000", ...}: as in the file
//! GET    /admin/upstreams/{name}
//! PATCH  /admin/upstreams/{name}            {"state": "drain"} or "ready", {"drain": true}, {"weight": 2}
//! DELETE /admin/upstreams/{name}?wait=5m    or ?force: not waiting for requests in flight
//! ```
//!
//! An upstream with a `source` was discovered. What is deleted of those stays out for as long as its source
//! goes on naming it; one that is added by its URL is the operator's from then on, whoever else names it.
//!
//! Names may hold slashes and brackets, percent-encoded or not. Bodies come as `application/json`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::desk::Desk;
use super::{answer, not_allowed, parameter};
use crate::config::check;
use crate::config::types::UpstreamConfig;
use crate::config::url::decoded;
use crate::config::values::duration_in;
use crate::fleet::{Change, Entry, Fleet, Refusal, State};

/// The longest that a call waits.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Everything that a call can be refused for.
struct Refused(StatusCode, Value);

type Answered = Result<Response<Bytes>, Refused>;

impl Refused {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Refused(status, json!({"error": error.into()}))
    }

    fn problem(error: impl Into<String>) -> Self {
        Refused::new(StatusCode::BAD_REQUEST, error)
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal {
            Refusal::Unknown(_) => StatusCode::NOT_FOUND,
            Refusal::Unusable(_) => StatusCode::BAD_REQUEST,
            Refusal::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        Refused::new(status, refusal.to_string())
    }
}

fn told(answered: Answered) -> Response<Bytes> {
    answered.unwrap_or_else(|Refused(status, body)| answer(status, &body))
}

/// Calls of the list.
pub async fn all(desk: &Desk<'_>, request: &Request<Bytes>) -> Response<Bytes> {
    match *request.method() {
        Method::GET => {
            let rows: Vec<Value> = desk.fleet.snapshot().entries.iter().map(row).collect();
            answer(StatusCode::OK, &rows.into())
        }
        Method::POST => told(add(desk, request).await),
        _ => not_allowed("GET, POST"),
    }
}

/// Calls of one upstream, by its name as it stands in the path.
pub async fn one(desk: &Desk<'_>, written: &str, request: &Request<Bytes>) -> Response<Bytes> {
    let Some(name) = decoded(written) else {
        return told(Err(Refused::problem("the upstream's name is not percent-encoded UTF-8")));
    };
    told(match *request.method() {
        Method::GET => show(desk.fleet, &name, StatusCode::OK),
        Method::PATCH => alter(desk, &name, request).await,
        Method::DELETE => remove(desk, &name, request).await,
        _ => return not_allowed("GET, PATCH, DELETE"),
    })
}

fn show(fleet: &Fleet, name: &str, status: StatusCode) -> Answered {
    let snapshot = fleet.snapshot();
    let entry = snapshot.by_name(name).ok_or_else(|| Refusal::Unknown(name.into()))?;
    Ok(answer(status, &row(entry)))
}

fn is_ready(entry: &Entry) -> bool {
    entry.state() == State::Ready
}

async fn add(desk: &Desk<'_>, request: &Request<Bytes>) -> Answered {
    let fleet = desk.fleet;
    let wait = wait(request)?;
    let config = read(request.body())?;
    let name = config.name.clone();
    let (there, same) = match fleet.snapshot().by_name(&name) {
        Some(entry) => (!entry.removing, entry.upstream.config == config),
        None => (false, false),
    };
    if there && !same {
        let remedy = "PATCH or DELETE it, or choose another name";
        let error = format!("an upstream is named {name:?} already, with other settings: {remedy}");
        return Err(Refused::new(StatusCode::CONFLICT, error));
    }
    desk.apply(vec![Change::Upsert(config)]).await?;
    let added = if there { StatusCode::OK } else { StatusCode::CREATED };
    let Some(wait) = wait else { return show(fleet, &name, added) };
    // Whoever takes it out meanwhile ends the wait too.
    let settled = fleet.wait_until(wait, |snapshot| snapshot.by_name(&name).is_none_or(is_ready)).await;
    if settled {
        return show(fleet, &name, added);
    }
    let row = fleet.snapshot().by_name(&name).map(row);
    let error = format!("upstream {name:?} was added, and is not ready yet");
    Err(Refused(StatusCode::GATEWAY_TIMEOUT, json!({"error": error, "upstream": row})))
}

fn read(body: &[u8]) -> Result<UpstreamConfig, Refused> {
    let text = std::str::from_utf8(body).map_err(|_| Refused::problem("the body is not UTF-8"))?;
    check::upstream_alone(text).map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let error = "the upstream has problems";
        Refused(StatusCode::BAD_REQUEST, json!({"error": error, "problems": problems}))
    })
}

async fn alter(desk: &Desk<'_>, name: &str, request: &Request<Bytes>) -> Answered {
    let body: Result<Map<String, Value>, _> = serde_json::from_slice(request.body());
    let body = body.map_err(|error| Refused::problem(format!("the body must be a JSON object: {error}")))?;
    let mut changes = Vec::new();
    for (key, value) in &body {
        changes.push(match (key.as_str(), value) {
            ("state", Value::String(state)) if state == "drain" => drain(name, true),
            ("state", Value::String(state)) if state == "ready" => drain(name, false),
            ("state", _) => {
                return Err(Refused::problem(format!("state: {value} is neither drain nor ready")));
            }
            ("drain", Value::Bool(wanted)) => drain(name, *wanted),
            ("drain", _) => {
                return Err(Refused::problem(format!("drain: {value} is neither true nor false")));
            }
            ("weight", _) => {
                let weight = check::weight(&value.to_string());
                let weight = weight.map_err(|what| Refused::problem(format!("weight: {what}")))?;
                Change::Weight { name: name.into(), weight }
            }
            _ => {
                let known = "known are state, drain, weight";
                return Err(Refused::problem(format!("{key:?} cannot be changed: {known}")));
            }
        });
    }
    if changes.is_empty() {
        return Err(Refused::problem("nothing to change: give state, drain or weight"));
    }
    desk.apply(changes).await?;
    show(desk.fleet, name, StatusCode::OK)
}

fn drain(name: &str, drain: bool) -> Change {
    Change::Drain { name: name.into(), drain }
}

async fn remove(desk: &Desk<'_>, name: &str, request: &Request<Bytes>) -> Answered {
    let fleet = desk.fleet;
    let wait = wait(request)?;
    let force = match parameter(request, "force") {
        None | Some("false") => false,
        Some("" | "true") => true,
        Some(other) => return Err(Refused::problem(format!("force: {other:?} is neither true nor false"))),
    };
    let id = fleet.snapshot().by_name(name).map(|entry| entry.upstream.id);
    desk.apply(vec![Change::Remove { name: name.into(), force }]).await?;
    let Some(id) = id else { return Err(Refusal::Unknown(name.into()).into()) };
    let gone = fleet.wait_until(wait.unwrap_or_default(), |snapshot| snapshot.by_id(id).is_none()).await;
    let active = fleet.snapshot().by_id(id).map(|entry| entry.upstream.load().active);
    match (gone, active) {
        (false, Some(active)) if wait.is_some() => {
            let error = format!("upstream {name:?} goes when its {active} requests in flight have ended");
            Err(Refused(StatusCode::GATEWAY_TIMEOUT, json!({"error": error, "active": active})))
        }
        (false, Some(active)) => {
            Ok(answer(StatusCode::ACCEPTED, &json!({"name": name, "removed": false, "active": active})))
        }
        _ => Ok(answer(StatusCode::OK, &json!({"name": name, "removed": true}))),
    }
}

/// `?wait=30s`.
fn wait(request: &Request<Bytes>) -> Result<Option<Duration>, Refused> {
    let Some(written) = parameter(request, "wait") else { return Ok(None) };
    let wait = duration_in(Duration::ZERO..=LONGEST_WAIT)(written);
    wait.map(Some).map_err(|what| Refused::problem(format!("wait: {what}")))
}

fn row(entry: &Entry) -> Value {
    let load = entry.upstream.load();
    let config = &entry.upstream.config;
    let now = Instant::now();
    let mut row = json!({
        "name": config.name,
        "url": config.url.display(),
        "state": entry.state().label(),
        "since_seconds": now.saturating_duration_since(entry.standing.since).as_secs(),
        "removing": entry.removing,
        "full": entry.upstream.busy_until(now).is_some(),
        "models": entry.models.iter().map(|card| card.id.as_str()).collect::<Vec<_>>(),
        "version": entry.version.as_deref(),
        "weight": config.weight,
        "warmth": entry.standing.warmth(now),
        "max_active": config.max_active,
        "active": load.active,
        "backlog_tokens": load.backlog,
        "context_tokens": load.context,
        "siblings_active": entry.upstream.siblings().active,
        "incarnation": entry.incarnation,
    });
    // By its own metrics, and by who named it. What is not said is left out, or it would pass for a number.
    let told = entry.upstream.telling(now);
    let known = [
        ("running", told.and_then(|told| told.running).map(Value::from)),
        ("waiting", told.and_then(|told| told.waiting).map(Value::from)),
        ("foreign", told.and_then(|told| told.foreign).map(Value::from)),
        ("kv_usage", told.and_then(|told| told.kv_usage).map(Value::from)),
        ("cache_tokens", entry.cache_tokens.map(Value::from)),
        ("source", config.discovered.as_ref().map(|discovered| discovered.source.as_str().into())),
    ];
    for (key, value) in known {
        if let Some(value) = value {
            row[key] = value;
        }
    }
    row
}
