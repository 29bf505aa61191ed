//! Routes that change the server: vLLM's development routes, and `/sim/…`, which is not part of vLLM.
//!
//! ```text
//! POST /sim/fault    {"kind":"status","status":503,"requests":2,"seconds":1.5}   see fault.rs; "none" clears
//! POST /sim/restart  a new process: new start time, empty cache, connections closed
//! GET  /sim/stats    counts            GET /sim/requests, /sim/polls   what was received
//! ```
//!
//! A fault with `seconds` clears itself, which is the only way over HTTP while connections are refused.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::{self, ApiError};
use super::fault::{InjectedFault, NoMetrics};
use super::record::Recorded;
use super::reply::{self, Reply};
use super::run::EngineCall;
use super::shared::EngineShared;

/// The pause after an answer before the restart that it announces.
const ANSWER_GRACE: Duration = Duration::from_millis(20);

/// Handles `/reset_prefix_cache`, `/sleep`, `/wake_up`, `/is_sleeping`, `/pause`, `/resume`, `/is_paused`.
pub(super) fn dev(call: &EngineCall) -> Result<Reply, ApiError> {
    let driver = &call.shared.driver;
    let sleep = &call.shared.sleep;
    Ok(reply::ok(&match call.uri.path() {
        "/reset_prefix_cache" => json!({"success": driver.clear_cache()}),
        "/sleep" => {
            let level = call.query("level").and_then(|level| level.parse().ok()).unwrap_or(1_usize).min(2);
            if call.query("mode").unwrap_or("abort") == "abort" {
                driver.abort_all();
            }
            call.shared.fall_asleep(level);
            json!({"status": "sleeping", "level": level})
        }
        "/wake_up" => {
            sleep.store(0, Ordering::SeqCst);
            driver.resume();
            json!({"status": "awake", "tags": call.query("tags").map(|tag| vec![tag])})
        }
        "/is_sleeping" => json!({"is_sleeping": sleep.load(Ordering::SeqCst) > 0}),
        "/pause" => {
            if call.query("mode").unwrap_or("abort") == "abort" {
                driver.abort_all();
            }
            driver.pause();
            json!({"status": "paused"})
        }
        "/resume" => {
            driver.resume();
            json!({"status": "resumed"})
        }
        _ => json!({"is_paused": driver.paused()}),
    }))
}

/// Answers the routes under `/sim/`.
pub(super) async fn sim(call: &EngineCall) -> Result<Reply, ApiError> {
    let list = |all: Vec<Recorded>| {
        let all: Vec<Value> = all.iter().map(Recorded::to_json).collect();
        reply::ok(&json!(all))
    };
    Ok(match (call.method.as_str(), call.uri.path()) {
        ("GET", "/sim/stats") => reply::ok(&json!(call.shared.stats())),
        ("GET", "/sim/requests") => list(call.shared.requests.all()),
        ("GET", "/sim/polls") => list(call.shared.polls.all()),
        ("POST", "/sim/restart") => {
            restart_soon(call);
            reply::ok(&json!({"status": "restarting"}))
        }
        ("POST", "/sim/fault") => {
            let body = serde_json::from_slice(&call.body).unwrap_or(Value::Null);
            set_fault(call, &body).await?;
            reply::ok(&json!({"status": "ok"}))
        }
        _ => error::not_found(),
    })
}

async fn set_fault(call: &EngineCall, body: &Value) -> Result<(), ApiError> {
    match body["kind"].as_str() {
        Some("none") => {
            clear_faults(&call.shared).await;
            return Ok(());
        }
        Some("restart") => {
            restart_soon(call);
            return Ok(());
        }
        Some("health") => {
            let status = body["status"].as_u64().and_then(|status| u16::try_from(status).ok());
            call.shared.faults.set_health(Some(status.unwrap_or(503)));
        }
        Some("metrics") => {
            let status = body["status"].as_u64().and_then(|status| u16::try_from(status).ok());
            call.shared.faults.set_metrics(Some(status.map_or(NoMetrics::Stall, NoMetrics::Status)));
        }
        _ => {
            let fault = InjectedFault::parse(body).map_err(ApiError::bad_request)?;
            call.shared.set_fault(Some(fault), body["requests"].as_u64()).await;
        }
    }
    if let Some(seconds) = body["seconds"].as_f64().filter(|seconds| (0.0..=86_400.0).contains(seconds)) {
        let shared = Arc::clone(&call.shared);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
            clear_faults(&shared).await;
        });
    }
    Ok(())
}

/// Removes all faults.
async fn clear_faults(shared: &EngineShared) {
    shared.faults.set_health(None);
    shared.faults.set_metrics(None);
    shared.set_fault(None, None).await;
}

/// Restarts after the answer was sent, since the restart closes the answer's connection too.
fn restart_soon(call: &EngineCall) {
    let shared = Arc::clone(&call.shared);
    tokio::spawn(async move {
        tokio::time::sleep(ANSWER_GRACE).await;
        shared.restart();
    });
}
