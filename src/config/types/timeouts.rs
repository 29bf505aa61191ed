//! Time limits of requests to upstreams.

use std::time::Duration;

use crate::config::setting::{SettingRow, SettingsTable, duration, duration_or_zero, row, value};
use crate::config::values::{DAY, MINUTE};

const WEEK: Duration = DAY.saturating_mul(7);

/// The limits of the parts of a request; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    /// From sending a request to the first event, or byte, of its answer.
    pub first_byte: Option<Duration>,
    /// Between two pieces of an answer.
    pub idle: Option<Duration>,
    /// From a request's head to its answer's end.
    pub total: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { connect: Duration::from_secs(2), first_byte: None, idle: None, total: None }
    }
}

// === impl Timeouts ===

impl SettingsTable for Timeouts {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "connect",
            "Time for opening a connection to an upstream, TLS included.",
            &value(
                |timeouts: &mut Self| &mut timeouts.connect,
                duration(Duration::from_millis(1), MINUTE.saturating_mul(10)),
            ),
        ),
        row(
            "first_byte",
            "Time from sending a request to the first event or byte of its answer; 0 is no limit.",
            &value(|timeouts: &mut Self| &mut timeouts.first_byte, duration_or_zero(WEEK)),
        ),
        row(
            "idle",
            "Time between two pieces of an answer; 0 is no limit.",
            &value(|timeouts: &mut Self| &mut timeouts.idle, duration_or_zero(WEEK)),
        ),
        row(
            "total",
            "Time from the head of a request to the end of its answer; 0 is no limit.",
            &value(|timeouts: &mut Self| &mut timeouts.total, duration_or_zero(WEEK)),
        ),
    ];

    fn defaults() -> Self {
        Timeouts::default()
    }
}
