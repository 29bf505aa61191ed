//! The settings of health probes and of the circuit breaker.

use std::time::Duration;

use crate::config::setting::{
    SettingRow, SettingsTable, duration, integer, number, row, switch, text, value,
};
use crate::config::values::{HOUR, show_duration, url_path};

/// The shortest interval, timeout and window.
const MIN_DURATION: Duration = Duration::from_millis(10);

/// The settings of health probes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    pub path: String,
    pub interval: Duration,
    pub timeout: Duration,
    /// Failed probes in a row after which an upstream is down.
    pub fall: u32,
    /// Good probes in a row after which an upstream is ready again.
    pub rise: u32,
    /// Whether the metrics of the upstream are read too.
    pub metrics: bool,
}

impl Default for Health {
    fn default() -> Self {
        Health {
            path: "/health".into(),
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(2),
            fall: 3,
            rise: 1,
            metrics: true,
        }
    }
}

/// When an upstream that answers probes and fails requests gets no requests for a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Breaker {
    /// The failures within `window` that open the breaker, if at least half of the answers failed.
    pub failures: u32,
    pub window: Duration,
    /// How long the upstream gets no request; then one request tests it.
    pub open: Duration,
    /// The upper limit of `open`, which doubles with every failed test.
    pub max_open: Duration,
    /// The largest share of the upstreams of a model that are ejected at once. The last candidate is never
    /// ejected.
    pub max_ejected: f64,
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker {
            failures: 5,
            window: Duration::from_secs(10),
            open: Duration::from_secs(5),
            max_open: Duration::from_secs(60),
            max_ejected: 0.5,
        }
    }
}

// === impl Health ===

impl SettingsTable for Health {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "path",
            "Path that a probe requests with GET; an upstream that answers 200 is healthy.",
            &value(|health: &mut Self| &mut health.path, text("URL path", url_path)),
        ),
        row(
            "interval",
            "Time between two probes of a ready upstream; any other is probed every 250ms.",
            &value(|health: &mut Self| &mut health.interval, duration(MIN_DURATION, HOUR)),
        ),
        row(
            "timeout",
            "Time after which a probe has failed.",
            &value(|health: &mut Self| &mut health.timeout, duration(MIN_DURATION, HOUR)),
        ),
        row(
            "fall",
            "Failed probes in a row after which an upstream is down.",
            &value(|health: &mut Self| &mut health.fall, integer(1, 1000)),
        ),
        row(
            "rise",
            "Good probes in a row after which an upstream is ready again.",
            &value(|health: &mut Self| &mut health.rise, integer(1, 1000)),
        ),
        row(
            "metrics",
            "Whether probes also read the `/metrics` of the upstream.",
            &value(|health: &mut Self| &mut health.metrics, switch()),
        ),
    ];

    fn defaults() -> Self {
        Health::default()
    }
}

// === impl Breaker ===

impl SettingsTable for Breaker {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "failures",
            "Failures within the window that open the breaker, if they are at least half of the answers.",
            &value(|breaker: &mut Self| &mut breaker.failures, integer(1, 1000)),
        ),
        row(
            "window",
            "Time within which failures count.",
            &value(|breaker: &mut Self| &mut breaker.window, duration(MIN_DURATION, HOUR)),
        ),
        row(
            "open",
            "Time without requests after the breaker opened; one request then tests the upstream.",
            &value(|breaker: &mut Self| &mut breaker.open, duration(MIN_DURATION, HOUR)),
        ),
        row(
            "max_open",
            "Upper limit of that time, which doubles with every test that fails.",
            &value(|breaker: &mut Self| &mut breaker.max_open, duration(MIN_DURATION, HOUR)),
        ),
        row(
            "max_ejected",
            "Largest share of the upstreams of a model that the breaker may take out at once.",
            &value(|breaker: &mut Self| &mut breaker.max_ejected, number(0.0, 1.0)),
        ),
    ];

    fn defaults() -> Self {
        Breaker::default()
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        if self.open > self.max_open {
            let (open, most) = (show_duration(self.open), show_duration(self.max_open));
            report("open", format!("{open} is more than breaker.max_open, which is {most}"));
        }
    }
}
