//! `/admin/decisions`: the latest choices of upstreams, newest first, with what each was made by.
//!
//! ```text
//! GET /admin/decisions?limit=50
//! ```
//!
//! `cost` is what `pick` weighs, in prompt tokens; the terms that it is made of stand beside it.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use serde_json::{Value, json};

use super::{answer, parameter};
use crate::config::values::integer_in;
use crate::observe::decisions::{DECISIONS, KEPT, Record, Told};

/// How many are told unless the call says another number.
const USUAL: usize = 50;

/// The list.
pub fn all(request: &Request<Bytes>) -> Response<Bytes> {
    let limit = parameter(request, "limit").map_or(Ok(USUAL), integer_in(1..=KEPT));
    match limit {
        Ok(limit) => {
            let rows: Vec<Value> = DECISIONS.latest(limit).iter().map(row).collect();
            answer(StatusCode::OK, &rows.into())
        }
        Err(what) => answer(StatusCode::BAD_REQUEST, &json!({"error": format!("limit: {what}")})),
    }
}

fn row(record: &Record) -> Value {
    json!({
        "time": record.at.as_millis() as f64 / 1e3,
        "id": record.id,
        "model": (!record.model.is_empty()).then_some(record.model.as_str()),
        "attempt": record.attempt,
        "session": record.session,
        "prompt_tokens": record.tokens,
        "blocks": record.blocks,
        "reason": record.reason,
        "upstream": record.chosen().map(|chosen| chosen.upstream),
        "of": record.of,
        "candidates": record.candidates().map(candidate).collect::<Vec<_>>(),
    })
}

fn candidate(told: Told<'_>) -> Value {
    json!({
        "upstream": told.upstream,
        "cost": (told.cost * 10.0).round() / 10.0,
        "hit": told.terms.hit,
        "uncached": told.terms.uncached,
        "missing": told.terms.missing,
        "backlog": told.terms.backlog,
        "active": told.terms.active,
        "context": told.terms.context,
        "astray": told.terms.astray,
        "weight": told.terms.weight,
    })
}
