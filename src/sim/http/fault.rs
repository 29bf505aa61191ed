//! Ways to break, each as some real vLLM was seen to: set for all requests or for the next few.
//!
//! It must never touch `/sim/…`, or there would be no way back; `/health` obeys a setting of its own.

use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// What goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// The listener closes: connecting is refused. Idle connections end, busy ones go on.
    Refuse,
    /// Connections are accepted and closed at once.
    CloseAfterAccept,
    /// Connections without a request are closed, once.
    CloseIdle,
    /// The state after SIGTERM: the listener is closed, open answers go silent and stay open.
    Silent,
    /// The request is read and nothing is answered.
    StallHeaders,
    /// A stream says nothing more after so many events.
    StallStream { events: usize },
    /// A stream ends without its last chunk after so many events: by a reset, or by a plain close.
    CutStream { events: usize, reset: bool },
    /// An answer with this status and body.
    Status { status: u16, body: String },
    /// What vLLM says while it drains: 500, "cannot schedule new futures after shutdown".
    ShuttingDown,
    /// 200 with `finish_reason: abort` and not one token.
    AbortEmpty,
    /// A stream whose first event is an error.
    ErrorEvent { status: u16 },
    /// So many times slower.
    Slow { factor: f64 },
}

#[derive(Debug, Default)]
pub struct Faults(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    fault: Option<Fault>,
    /// How many more requests it strikes; `None`: all.
    left: Option<u64>,
    health: Option<u16>,
}

impl Faults {
    pub fn set(&self, fault: Option<Fault>, requests: Option<u64>) {
        let mut state = self.lock();
        state.fault = fault;
        state.left = requests;
    }

    pub fn set_health(&self, status: Option<u16>) {
        self.lock().health = status;
    }

    pub fn health(&self) -> Option<u16> {
        self.lock().health
    }

    /// The fault as it is set, without counting a request.
    pub fn current(&self) -> Option<Fault> {
        self.lock().fault.clone()
    }

    /// The fault that strikes this request.
    pub fn strike(&self) -> Option<Fault> {
        let mut state = self.lock();
        if let Some(left) = &mut state.left {
            if *left == 0 {
                state.fault = None;
                state.left = None;
                return None;
            }
            *left -= 1;
        }
        state.fault.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fault {
    /// Reads `{"kind": …}` of `POST /sim/fault`.
    pub fn parse(body: &Value) -> Result<Self, String> {
        let number = |key: &str, default: u64| body[key].as_u64().unwrap_or(default);
        let status = |default| u16::try_from(number("status", default)).unwrap_or(500);
        Ok(match body["kind"].as_str().unwrap_or_default() {
            "refuse" => Self::Refuse,
            "close_after_accept" => Self::CloseAfterAccept,
            "close_idle" => Self::CloseIdle,
            "silent" => Self::Silent,
            "stall_headers" => Self::StallHeaders,
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
                     stall_headers, stall_stream, cut_stream, status, shutting_down, abort_empty, \
                     error_event, slow, health, restart or none"
                ));
            }
        })
    }
}
