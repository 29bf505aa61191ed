//! How a balancer ends.

use std::time::Duration;

use crate::config::setting::{SettingRow, SettingsTable, duration, row, value};
use crate::config::values::{DAY, HOUR};

/// What happens between SIGTERM and the end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownConfig {
    /// How long requests in flight may continue once no new ones are accepted.
    pub grace: Duration,
    /// How long requests are still accepted after SIGTERM, while health checks answer 503.
    pub drain: Duration,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        ShutdownConfig { grace: Duration::from_secs(180), drain: Duration::ZERO }
    }
}

// === impl ShutdownConfig ===

impl SettingsTable for ShutdownConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "grace",
            "Time for requests in flight to end once no new ones are accepted.",
            &value(
                |shutdown: &mut Self| &mut shutdown.grace,
                duration(Duration::ZERO, DAY.saturating_mul(7)),
            ),
        ),
        row(
            "drain",
            "Time after SIGTERM in which requests are still accepted while health checks answer 503.",
            &value(|shutdown: &mut Self| &mut shutdown.drain, duration(Duration::ZERO, HOUR)),
        ),
    ];

    fn defaults() -> Self {
        ShutdownConfig::default()
    }
}
