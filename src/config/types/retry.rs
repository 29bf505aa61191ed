//! When a failed request goes to another upstream.

use std::time::Duration;

use serde_json::json;

use crate::config::problem::seen;
use crate::config::setting::{SettingRow, SettingsTable, duration, integer, list, number, row, value};
use crate::config::values::{MINUTE, ReadResult, show_duration};

/// When, and how often, a request that failed before its answer began is sent to another upstream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retry {
    /// Attempts after the first; 0 is none.
    pub attempts: u32,
    /// The pause before the second further attempt; doubles with each one.
    pub backoff: Duration,
    pub max_backoff: Duration,
    /// Further attempts as a share of all requests.
    pub budget: f64,
    pub on: RetryOn,
}

impl Default for Retry {
    fn default() -> Self {
        Retry {
            attempts: 2,
            backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(2),
            budget: 0.2,
            on: RetryOn::default(),
        }
    }
}

/// The failures after which a request is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryOn {
    pub connect: bool,
    pub reset: bool,
    pub bad_gateway: bool,
    pub unavailable: bool,
    pub gateway_timeout: bool,
    /// The engine aborted the request, or is shutting down.
    pub abort: bool,
}

// === impl Retry ===

impl SettingsTable for Retry {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "attempts",
            "Attempts after the first; 0 is none.",
            &value(|retry: &mut Self| &mut retry.attempts, integer(0, 7)),
        ),
        row(
            "backoff",
            "Pause before the second further attempt, which doubles from there.",
            &value(|retry: &mut Self| &mut retry.backoff, duration(Duration::ZERO, MINUTE)),
        ),
        row(
            "max_backoff",
            "Longest pause between two attempts.",
            &value(|retry: &mut Self| &mut retry.max_backoff, duration(Duration::ZERO, MINUTE)),
        ),
        row(
            "budget",
            "Further attempts as a share of all requests.",
            &value(|retry: &mut Self| &mut retry.budget, number(0.0, 10.0)),
        ),
        row(
            "on",
            "Failures after which a request is retried: connect, reset, 502, 503, 504, abort.",
            &value(
                |retry: &mut Self| &mut retry.on,
                list("list of failures", failure_name, RetryOn::of_names, |on| json!(on.names())),
            ),
        ),
    ];

    fn defaults() -> Self {
        Retry::default()
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        if self.backoff > self.max_backoff {
            let (small, large) = (show_duration(self.backoff), show_duration(self.max_backoff));
            report("backoff", format!("{small} is more than retry.max_backoff, which is {large}"));
        }
    }
}

fn failure_name(text: &str) -> ReadResult<&'static str> {
    match RetryOn::NAMES.iter().find(|name| **name == text) {
        Some(name) => Ok(*name),
        None => Err(format!("{} is none of {}", seen(text), RetryOn::NAMES.join(", "))),
    }
}

// === impl RetryOn ===

impl RetryOn {
    /// The names of the failures, in the order of the fields.
    pub const NAMES: [&'static str; 6] = ["connect", "reset", "502", "503", "504", "abort"];

    /// Retries for no cause.
    pub const NOTHING: RetryOn = RetryOn {
        connect: false,
        reset: false,
        bad_gateway: false,
        unavailable: false,
        gateway_timeout: false,
        abort: false,
    };

    /// The switch of a failure by its name.
    pub fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "connect" => Some(&mut self.connect),
            "reset" => Some(&mut self.reset),
            "502" => Some(&mut self.bad_gateway),
            "503" => Some(&mut self.unavailable),
            "504" => Some(&mut self.gateway_timeout),
            "abort" => Some(&mut self.abort),
            _ => None,
        }
    }

    /// The names of the failures that are switched on.
    pub fn names(mut self) -> Vec<&'static str> {
        Self::NAMES.into_iter().filter(|name| self.switch(name).is_some_and(|on| *on)).collect()
    }

    /// The failures that these words name.
    fn of_names(names: Vec<&'static str>) -> Self {
        let mut on = RetryOn::NOTHING;
        for name in names {
            if let Some(switch) = on.switch(name) {
                *switch = true;
            }
        }
        on
    }
}

impl Default for RetryOn {
    fn default() -> Self {
        RetryOn {
            connect: true,
            reset: true,
            bad_gateway: true,
            unavailable: true,
            gateway_timeout: true,
            abort: true,
        }
    }
}
