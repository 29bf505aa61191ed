//! What runs of `retry:`, with its defaults.

use std::time::Duration;

/// When, and how often, a request that failed before its answer began goes to another upstream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retry {
    /// Attempts after the first; 0 is none.
    pub attempts: u32,
    /// Before the second further attempt; doubles from there.
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

/// The failures that are tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryOn {
    pub connect: bool,
    pub reset: bool,
    pub bad_gateway: bool,
    pub unavailable: bool,
    pub gateway_timeout: bool,
    /// The engine aborted, or is shutting down.
    pub abort: bool,
}

impl RetryOn {
    /// The words of the configuration, in the order of the fields.
    pub const NAMES: [&'static str; 6] = ["connect", "reset", "502", "503", "504", "abort"];

    pub const NOTHING: RetryOn = RetryOn {
        connect: false,
        reset: false,
        bad_gateway: false,
        unavailable: false,
        gateway_timeout: false,
        abort: false,
    };

    /// The switch that a word stands for.
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

    /// The words that are on.
    pub fn names(mut self) -> Vec<&'static str> {
        Self::NAMES.into_iter().filter(|name| self.switch(name).is_some_and(|on| *on)).collect()
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
