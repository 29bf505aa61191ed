//! `GET /admin/siblings`: the other balancers on the same Redis, and the age of their last messages.

use bytes::Bytes;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::answer::answer;
use crate::state::exchange::SiblingRow;
use crate::state::redis::SiblingExchange;

/// Lists the siblings; the list is empty without a Redis.
pub(super) fn all(exchange: Option<&SiblingExchange>) -> Response<Bytes> {
    let rows = exchange.map(SiblingExchange::rows).unwrap_or_default();
    let body = json!({
        "balancer": exchange.map(|exchange| id(exchange.id())),
        "redis": exchange.map(SiblingExchange::place),
        "works": exchange.is_some_and(SiblingExchange::works),
        "shares_members": exchange.is_some_and(SiblingExchange::shares_members),
        "siblings": rows.iter().map(|sibling| row(sibling, exchange)).collect::<Vec<_>>(),
    });
    answer(StatusCode::OK, &body)
}

/// A sibling as the list shows it.
pub(super) fn row(row: &SiblingRow, exchange: Option<&SiblingExchange>) -> Value {
    json!({
        "balancer": id(row.balancer),
        "name": row.name,
        "address": row.address,
        "age_seconds": row.age.as_secs_f64(),
        "active": row.sum.active,
        "backlog_tokens": row.sum.backlog,
        "context_tokens": row.sum.context,
        // `null` while it is unknown, and of older releases.
        "shares_upstreams": exchange.and_then(|exchange| exchange.shares_upstreams(row.balancer)),
    })
}

/// A balancer's id as it is written.
pub(super) fn id(balancer: u64) -> String {
    format!("{balancer:016x}")
}
