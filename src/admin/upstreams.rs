//! `/admin/upstreams`: the upstreams of the fleet, and changes to them.
//!
//! ```text
//! GET    /admin/upstreams                   all upstreams
//! POST   /admin/upstreams?wait=30s          {"url": "http://gpu-7:8000", ...}: as in the file
//! GET    /admin/upstreams/{name}
//! PATCH  /admin/upstreams/{name}            {"state": "drain"} or "ready", {"drain": true}, {"weight": 2}
//! DELETE /admin/upstreams/{name}?wait=5m    or ?force: without waiting for requests in flight
//! ```
//!
//! An upstream with a `source` was discovered. A deleted discovered upstream stays out for as long as its
//! source lists it. An upstream that is added by its URL belongs to the operator from then on, even if a
//! source lists it too.
//!
//! Names may hold slashes and brackets, percent-encoded or not. Bodies must be `application/json`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::answer::{AdminReject, AdminResult, answer, not_allowed, respond};
use super::arguments::{check_parameters, parameter};
use super::fleet_editor::FleetEditor;
use crate::config::check;
use crate::config::types::{UpstreamConfig, parse_weight};
use crate::config::url::decoded;
use crate::config::values::duration_in;
use crate::fleet::{Fleet, FleetChange, FleetChangeError, SnapshotEntry, UpstreamState};

/// The longest time that a call waits.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// Answers calls of the list of upstreams.
pub(super) async fn all(editor: &FleetEditor<'_>, request: &Request<Bytes>) -> Response<Bytes> {
    match *request.method() {
        Method::GET => {
            let rows: Vec<Value> = editor.fleet.snapshot().entries.iter().map(row).collect();
            answer(StatusCode::OK, &rows.into())
        }
        Method::POST => respond(add(editor, request).await),
        _ => not_allowed("GET, POST"),
    }
}

/// Answers calls of one upstream. `written`: its name as written in the path.
pub(super) async fn one(
    editor: &FleetEditor<'_>,
    written: &str,
    request: &Request<Bytes>,
) -> Response<Bytes> {
    let Some(name) = decoded(written) else {
        return respond(Err(AdminReject::problem("the upstream's name is not percent-encoded UTF-8")));
    };
    respond(match *request.method() {
        Method::GET => show(editor.fleet, &name, StatusCode::OK),
        Method::PATCH => alter(editor, &name, request).await,
        Method::DELETE => remove(editor, &name, request).await,
        _ => return not_allowed("GET, PATCH, DELETE"),
    })
}

fn show(fleet: &Fleet, name: &str, status: StatusCode) -> AdminResult {
    let snapshot = fleet.snapshot();
    let entry = snapshot.by_name(name).ok_or_else(|| FleetChangeError::Unknown(name.into()))?;
    Ok(answer(status, &row(entry)))
}

pub(super) fn is_ready(entry: &SnapshotEntry) -> bool {
    entry.state() == UpstreamState::Ready
}

async fn add(editor: &FleetEditor<'_>, request: &Request<Bytes>) -> AdminResult {
    let fleet = editor.fleet;
    check_parameters(request, &["wait"])?;
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
        return Err(AdminReject::new(StatusCode::CONFLICT, error));
    }
    editor.apply(vec![FleetChange::Upsert(config)]).await?;
    let added = if there { StatusCode::OK } else { StatusCode::CREATED };
    let Some(wait) = wait else { return show(fleet, &name, added) };
    // The wait also ends when the upstream is removed.
    let settled = fleet.wait_until(wait, |snapshot| snapshot.by_name(&name).is_none_or(is_ready)).await;
    if settled {
        return show(fleet, &name, added);
    }
    let row = fleet.snapshot().by_name(&name).map(row);
    let error = format!("upstream {name:?} was added, and is not ready yet");
    Err(AdminReject(StatusCode::GATEWAY_TIMEOUT, json!({"error": error, "upstream": row})))
}

fn read(body: &[u8]) -> Result<UpstreamConfig, AdminReject> {
    let text = std::str::from_utf8(body).map_err(|_| AdminReject::problem("the body is not UTF-8"))?;
    check::upstream_alone(text).map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let error = "the upstream has problems";
        AdminReject(StatusCode::BAD_REQUEST, json!({"error": error, "problems": problems}))
    })
}

async fn alter(editor: &FleetEditor<'_>, name: &str, request: &Request<Bytes>) -> AdminResult {
    check_parameters(request, &[])?;
    let body: Result<Map<String, Value>, _> = serde_json::from_slice(request.body());
    let body =
        body.map_err(|error| AdminReject::problem(format!("the body must be a JSON object: {error}")))?;
    let mut changes = Vec::new();
    for (key, value) in &body {
        changes.push(match (key.as_str(), value) {
            ("state", Value::String(state)) if state == "drain" => drain(name, true),
            ("state", Value::String(state)) if state == "ready" => drain(name, false),
            ("state", _) => {
                return Err(AdminReject::problem(format!("state: {value} is neither drain nor ready")));
            }
            ("drain", Value::Bool(wanted)) => drain(name, *wanted),
            ("drain", _) => {
                return Err(AdminReject::problem(format!("drain: {value} is neither true nor false")));
            }
            ("weight", _) => {
                let weight = parse_weight(&value.to_string());
                let weight = weight.map_err(|what| AdminReject::problem(format!("weight: {what}")))?;
                FleetChange::Weight { name: name.into(), weight }
            }
            _ => {
                let known = "known are state, drain, weight";
                return Err(AdminReject::problem(format!("{key:?} cannot be changed: {known}")));
            }
        });
    }
    if changes.is_empty() {
        return Err(AdminReject::problem("nothing to change: give state, drain or weight"));
    }
    editor.apply(changes).await?;
    show(editor.fleet, name, StatusCode::OK)
}

fn drain(name: &str, drain: bool) -> FleetChange {
    FleetChange::Drain { name: name.into(), drain }
}

async fn remove(editor: &FleetEditor<'_>, name: &str, request: &Request<Bytes>) -> AdminResult {
    let fleet = editor.fleet;
    check_parameters(request, &["wait", "force"])?;
    let wait = wait(request)?;
    let force = match parameter(request, "force") {
        None | Some("false") => false,
        Some("" | "true") => true,
        Some(other) => {
            return Err(AdminReject::problem(format!("force: {other:?} is neither true nor false")));
        }
    };
    let id = fleet.snapshot().by_name(name).map(|entry| entry.upstream.id);
    editor.apply(vec![FleetChange::Remove { name: name.into(), force }]).await?;
    let Some(id) = id else { return Err(FleetChangeError::Unknown(name.into()).into()) };
    let gone = fleet.wait_until(wait.unwrap_or_default(), |snapshot| snapshot.by_id(id).is_none()).await;
    let active = fleet.snapshot().by_id(id).map(|entry| entry.upstream.load().active);
    match (gone, active) {
        (false, Some(active)) if wait.is_some() => {
            let error = format!("upstream {name:?} goes when its {active} requests in flight have ended");
            Err(AdminReject(StatusCode::GATEWAY_TIMEOUT, json!({"error": error, "active": active})))
        }
        (false, Some(active)) => {
            Ok(answer(StatusCode::ACCEPTED, &json!({"name": name, "removed": false, "active": active})))
        }
        _ => Ok(answer(StatusCode::OK, &json!({"name": name, "removed": true}))),
    }
}

/// Why the upstream is in its state, where the state alone does not tell.
pub(super) fn reason(entry: &SnapshotEntry, is_full: bool) -> Option<String> {
    let status = &entry.status;
    let reason = match entry.state() {
        UpstreamState::Draining if entry.removing => "it is removed after its last request",
        UpstreamState::Draining if status.drained && status.gone => "an operator drains it, and it is down",
        UpstreamState::Draining if status.drained => "an operator drains it",
        UpstreamState::Draining => "it announced its shutdown",
        UpstreamState::Down if status.lost => "it refuses connections, or its engine is dead",
        UpstreamState::Down => "its probes fail",
        UpstreamState::Tripped if status.gone => "its requests and its probes fail",
        UpstreamState::Tripped => "too many of its requests fail",
        UpstreamState::Suspect => "a probe failed, or a request did not reach it",
        UpstreamState::Unknown if status.missing => "no probe of it has succeeded",
        UpstreamState::Unknown => "its first probe has not ended",
        UpstreamState::Ready if is_full => "its engine reports that it is full",
        UpstreamState::Ready => return None,
    };
    Some(match &entry.probe_error {
        Some(error) => format!("{reason} ({error})"),
        None => reason.into(),
    })
}

/// Parses `?wait=30s`.
pub(super) fn wait(request: &Request<Bytes>) -> Result<Option<Duration>, AdminReject> {
    let Some(written) = parameter(request, "wait") else { return Ok(None) };
    let wait = duration_in(Duration::ZERO..=MAX_WAIT)(written);
    wait.map(Some).map_err(|what| AdminReject::problem(format!("wait: {what}")))
}

fn row(entry: &SnapshotEntry) -> Value {
    let load = entry.upstream.load();
    let config = &entry.upstream.config;
    let (now, sight) = (Instant::now(), entry.upstream.sight());
    let is_full = entry.upstream.busy_until(now).is_some();
    let mut row = json!({
        "name": config.name,
        "url": config.url.display(),
        "state": entry.state().label(),
        "reason": reason(entry, is_full),
        "drained": entry.status.drained,
        "since_seconds": now.saturating_duration_since(entry.status.since).as_secs(),
        "removing": entry.removing,
        "full": is_full,
        "models": entry.models.iter().map(|card| card.id.as_str()).collect::<Vec<_>>(),
        "version": entry.version.as_deref(),
        "weight": config.weight,
        "warmth": entry.status.warmth(now),
        "max_active": config.max_active,
        "active": load.active,
        "backlog_tokens": load.backlog,
        "context_tokens": load.context,
        "siblings_active": entry.upstream.siblings().active,
        "incarnation": entry.incarnation,
        "sight": sight.state.label(),
        "sight_reason": sight.reason.map(|reason| reason.to_string()),
    });
    // Values from the upstream's metrics and its source. A value that was not reported is omitted: a
    // default would look like a measured number.
    let report = entry.upstream.gauge_report(now);
    let known = [
        ("running", report.and_then(|report| report.running).map(Value::from)),
        ("waiting", report.and_then(|report| report.waiting).map(Value::from)),
        ("foreign", report.and_then(|report| report.foreign).map(Value::from)),
        ("kv_usage", report.and_then(|report| report.kv_usage).map(Value::from)),
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
