//! `/admin/usage`: the tokens of all answers since this balancer started, by model, route and session.
//!
//! ```text
//! GET /admin/usage?limit=100        the most recently used sessions, the latest first
//! GET /admin/usage?session=ID       this session only
//! ```
//!
//! A number that no answer reported is absent. The numbers are this balancer's own; siblings count theirs.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::answer::{AdminReject, AdminResult, answer, respond};
use super::arguments::{check_parameters, parameter};
use crate::config::values::integer_in;
use crate::observe::usage::{DatedTotal, MAX_SESSION_TOTALS, UsageTotal, UsageTotals};
use crate::prompt::session::printable;
use crate::route::api_paths::decode_escapes;

/// The number of sessions in an answer when the call has no `limit`.
const DEFAULT_SESSION_COUNT: usize = 100;

/// Lists all totals.
pub(super) fn all(totals: &UsageTotals, request: &Request<Bytes>) -> Response<Bytes> {
    respond(list(totals, request))
}

fn list(totals: &UsageTotals, request: &Request<Bytes>) -> AdminResult {
    check_parameters(request, &["session", "limit"])?;
    let limit =
        parameter(request, "limit").map_or(Ok(DEFAULT_SESSION_COUNT), integer_in(1..=MAX_SESSION_TOTALS));
    let limit = limit.map_err(|what| AdminReject::problem(format!("limit: {what}")))?;
    let sessions: Vec<Value> = match parameter(request, "session") {
        Some(written) => {
            let decoded = decode_escapes(written);
            let name = printable(decoded.as_deref().unwrap_or(written).as_bytes());
            totals.session(&name).map(|dated| of_session(&name, &dated)).into_iter().collect()
        }
        None => totals.sessions(limit).iter().map(|(name, dated)| of_session(name, dated)).collect(),
    };
    let named = |key: &str, totals: Vec<(String, UsageTotal)>| -> Value {
        totals.iter().map(|(name, total)| Value::Object(row(key, name, total))).collect()
    };
    let body = json!({
        "models": named("model", totals.models()),
        "routes": named("route", totals.routes()),
        "sessions": sessions,
    });
    Ok(answer(StatusCode::OK, &body))
}

fn of_session(name: &str, dated: &DatedTotal) -> Value {
    let mut row = row("session", name, &dated.total);
    row.insert("last".into(), dated.last.as_secs().into());
    Value::Object(row)
}

fn row(key: &str, name: &str, total: &UsageTotal) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert(key.into(), name.into());
    row.insert("requests".into(), total.requests.into());
    row.insert("unknown".into(), total.unknown.into());
    let usage = &total.usage;
    for (kind, tokens) in [
        ("input", usage.prompt_tokens),
        ("output", usage.output_tokens),
        ("cached", usage.cached_tokens),
        ("reasoning", usage.reasoning_tokens),
    ] {
        if let Some(tokens) = tokens {
            row.insert(kind.into(), tokens.into());
        }
    }
    row
}
