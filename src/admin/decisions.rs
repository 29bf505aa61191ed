//! `/admin/decisions`: the latest choices of upstreams, newest first, each with the numbers behind it.
//!
//! ```text
//! GET /admin/decisions?limit=50
//! GET /admin/decisions?id=ID        the choices for one request: one for each attempt
//! ```
//!
//! `cost` is the number that `pick` minimizes, in prompt tokens; its terms are listed beside it.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use serde_json::{Value, json};

use super::answer::{AdminReject, AdminResult, answer, respond};
use super::arguments::{check_parameters, decoded_id, parameter};
use crate::config::values::integer_in;
use crate::observe::decisions::{CandidateRecord, DecisionRecord, Decisions, KEPT_DECISIONS};

/// The number of decisions in an answer when the call has no `limit`.
const DEFAULT_DECISION_COUNT: usize = 50;

/// Lists the latest decisions, or those for one request, newest first.
pub(super) fn all(decisions: &Decisions, request: &Request<Bytes>) -> Response<Bytes> {
    respond(list(decisions, request))
}

fn list(decisions: &Decisions, request: &Request<Bytes>) -> AdminResult {
    check_parameters(request, &["id", "limit"])?;
    let id = parameter(request, "id").map(decoded_id).transpose()?;
    if id.as_deref() == Some("") {
        return Err(AdminReject::problem("id: is empty, and should be the x-request-id of an answer"));
    }
    let limit = parameter(request, "limit").map(integer_in(1..=KEPT_DECISIONS)).transpose();
    let limit = limit.map_err(|what| AdminReject::problem(format!("limit: {what}")))?;
    let records = match id {
        Some(id) => decisions.of_request(&id, limit.unwrap_or(KEPT_DECISIONS)),
        None => decisions.latest(limit.unwrap_or(DEFAULT_DECISION_COUNT)),
    };
    let whole = |record: &DecisionRecord| row(record, record.candidates().collect());
    let rows: Vec<Value> = records.iter().map(whole).collect();
    Ok(answer(StatusCode::OK, &rows.into()))
}

/// A recorded choice with these of its candidates.
pub(super) fn row(record: &DecisionRecord, candidates: Vec<CandidateRecord<'_>>) -> Value {
    json!({
        "time": record.at.as_millis() as f64 / 1e3,
        "id": record.id,
        "client_model": named(&record.client_model),
        "route": named(&record.route),
        "model": named(&record.model),
        "attempt": record.attempt,
        "session": record.session,
        "prompt_tokens": record.tokens,
        "blocks": record.blocks,
        "reason": record.reason,
        "upstream": record.chosen().map(|chosen| chosen.upstream),
        "of": record.of,
        "candidates": candidates.into_iter().map(candidate).collect::<Vec<_>>(),
    })
}

/// A name; null where there is none.
fn named(name: &str) -> Option<&str> {
    (!name.is_empty()).then_some(name)
}

fn candidate(record: CandidateRecord<'_>) -> Value {
    json!({
        "upstream": record.upstream,
        "cost": (record.cost * 10.0).round() / 10.0,
        "hit": record.terms.hit,
        "uncached": record.terms.uncached,
        "missing": record.terms.missing,
        "backlog": record.terms.backlog,
        "active": record.terms.active,
        "context": record.terms.context,
        "session_penalty": record.terms.session_penalty,
        "weight": record.terms.weight,
        "forecast_ms": (record.forecast.as_secs_f64() * 1e4).round() / 10.0,
    })
}
