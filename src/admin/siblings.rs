//! `GET /admin/siblings`: who else is there, and how old their word is.

use bytes::Bytes;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::answer;
use crate::state::exchange::Row;
use crate::state::redis::Exchange;

/// Without a Redis there is nobody.
pub fn all(exchange: Option<&Exchange>) -> Response<Bytes> {
    let rows = exchange.map(Exchange::rows).unwrap_or_default();
    let body = json!({
        "balancer": exchange.map(|exchange| id(exchange.id())),
        "redis": exchange.map(Exchange::place),
        "works": exchange.is_some_and(Exchange::works),
        "siblings": rows.iter().map(row).collect::<Vec<_>>(),
    });
    answer(StatusCode::OK, &body)
}

fn row(row: &Row) -> Value {
    json!({
        "balancer": id(row.balancer),
        "name": row.name,
        "address": row.address,
        "age_seconds": row.age.as_secs_f64(),
        "active": row.sum.active,
        "backlog_tokens": row.sum.backlog,
        "context_tokens": row.sum.context,
    })
}

fn id(balancer: u64) -> String {
    format!("{balancer:016x}")
}
