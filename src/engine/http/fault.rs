//! Injected faults, each observed on some real vLLM: for all requests, or for the next few.
//!
//! Faults never affect `/sim/…`, which clears them; `/health` and `/metrics` have settings of their own.

use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// A fault.
#[derive(Debug, Clone, PartialEq)]
pub enum InjectedFault {
    /// The listener closes: connections are refused. Idle connections end, busy ones continue.
    Refuse,
    /// Connections are accepted and closed at once.
    CloseAfterAccept,
    /// Connections without a request are closed, once.
    CloseIdle,
    /// The state after SIGTERM: the listener is closed, open answers go silent and stay open.
    Silent,
    /// The request is read and never answered.
    StallHeaders,
    /// The request is read and the connection ends, by a reset or by a plain close.
    CutHeaders { reset: bool },
    /// A stream stalls after `events`.
    StallStream { events: usize },
    /// A stream ends without its last chunk after `events`: by a reset, or by a plain close.
    CutStream { events: usize, reset: bool },
    /// An answer with this status and body.
    Status { status: u16, body: String },
    /// The answer of a draining vLLM: 500, "cannot schedule new futures after shutdown".
    ShuttingDown,
    /// 200 with `finish_reason: abort` and no token.
    AbortEmpty,
    /// A stream whose first event is an error.
    ErrorEvent { status: u16 },
    /// The engine is slower by `factor`.
    Slow { factor: f64 },
}

/// What `/metrics` does instead of answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoMetrics {
    /// Answers with this status.
    Status(u16),
    /// Never answers.
    Stall,
}

/// The fault that is injected at the moment.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<FaultState>);

#[derive(Debug, Default)]
struct FaultState {
    fault: Option<InjectedFault>,
    /// The number of requests that the fault still affects; `None`: all.
    left: Option<u64>,
    health: Option<u16>,
    metrics: Option<NoMetrics>,
}

// === impl Faults ===

impl Faults {
    /// Injects a fault, for a number of requests where one is given; `None` removes it.
    pub(super) fn set(&self, fault: Option<InjectedFault>, requests: Option<u64>) {
        let mut state = self.lock();
        state.fault = fault.filter(|_| requests != Some(0));
        state.left = requests;
    }

    pub(super) fn set_health(&self, status: Option<u16>) {
        self.lock().health = status;
    }

    pub(super) fn health(&self) -> Option<u16> {
        self.lock().health
    }

    pub(super) fn set_metrics(&self, instead: Option<NoMetrics>) {
        self.lock().metrics = instead;
    }

    pub(super) fn metrics(&self) -> Option<NoMetrics> {
        self.lock().metrics
    }

    /// Returns the fault if `applies` accepts it, and counts the affected request.
    pub(super) fn strike(&self, applies: impl Fn(&InjectedFault) -> bool) -> Option<InjectedFault> {
        let mut state = self.lock();
        let fault = state.fault.clone().filter(applies)?;
        if let Some(left) = &mut state.left {
            *left = left.saturating_sub(1);
            if *left == 0 {
                *state = FaultState { health: state.health, metrics: state.metrics, ..FaultState::default() };
            }
        }
        Some(fault)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, FaultState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl InjectedFault ===

impl InjectedFault {
    /// Whether the fault affects single requests after they were read. The other faults affect the listener,
    /// new connections or the whole engine, and last until they are cleared.
    pub(super) fn strikes_requests(&self) -> bool {
        !matches!(
            self,
            Self::Refuse | Self::CloseAfterAccept | Self::CloseIdle | Self::Silent | Self::Slow { .. }
        )
    }

    /// Parses `{"kind": …}` of `POST /sim/fault`.
    pub fn parse(body: &Value) -> Result<Self, String> {
        let number = |key: &str, default: u64| body[key].as_u64().unwrap_or(default);
        let status = |default| u16::try_from(number("status", default)).unwrap_or(500);
        Ok(match body["kind"].as_str().unwrap_or_default() {
            "refuse" => Self::Refuse,
            "close_after_accept" => Self::CloseAfterAccept,
            "close_idle" => Self::CloseIdle,
            "silent" => Self::Silent,
            "stall_headers" => Self::StallHeaders,
            "cut_headers" => Self::CutHeaders { reset: body["reset"].as_bool().unwrap_or(false) },
            "stall_stream" => Self::StallStream { events: number("events", 1) as usize },
            "cut_stream" => Self::CutStream {
                events: number("events", 1) as usize,
                reset: body["reset"].as_bool().unwrap_or(false),
            },
            "status" => Self::Status {
                status: status(503),
                body: body["body"].as_str().unwrap_or("{\"error\":\"simulated\"}").to_owned(),
            },
            "shutting_down" => Self::ShuttingDown,
            "abort_empty" => Self::AbortEmpty,
            "error_event" => Self::ErrorEvent { status: status(500) },
            "slow" => Self::Slow { factor: body["factor"].as_f64().unwrap_or(10.0) },
            other => {
                return Err(format!(
                    "unknown kind `{other}`, use refuse, close_after_accept, close_idle, silent, \
                     stall_headers, cut_headers, stall_stream, cut_stream, status, shutting_down, \
                     abort_empty, error_event, slow, health, metrics, restart or none"
                ));
            }
        })
    }
}
