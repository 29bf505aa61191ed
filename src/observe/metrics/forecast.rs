//! Metrics of the forecasts of times to first tokens.

use std::time::Duration;

use prometheus::{HistogramVec, IntCounterVec};

use super::builder::MetricsBuilder;

/// The forecasts of streams whose first token came, and their errors.
pub(in crate::observe) struct ForecastMetrics {
    seconds: HistogramVec,
    error_seconds: HistogramVec,
    late: IntCounterVec,
}

impl ForecastMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        ForecastMetrics {
            seconds: make.histogram_by(
                "vllm_lb_forecast_seconds",
                "Forecast of the time from the choice to a stream's first token.",
                &["upstream"],
            ),
            error_seconds: make.histogram_by(
                "vllm_lb_forecast_error_seconds",
                "Difference between that forecast and the time to the first token.",
                &["upstream"],
            ),
            late: make.counters(
                "vllm_lb_forecast_late_total",
                "First tokens of streams that came later than forecast.",
                &["upstream"],
            ),
        }
    }

    /// Counts a first token that came after `actual`.
    pub(in crate::observe) fn compared(&self, upstream: &str, forecast: Duration, actual: Duration) {
        self.seconds.with_label_values(&[upstream]).observe(forecast.as_secs_f64());
        let error = forecast.abs_diff(actual);
        self.error_seconds.with_label_values(&[upstream]).observe(error.as_secs_f64());
        let late = self.late.with_label_values(&[upstream]);
        if actual > forecast {
            late.inc();
        }
    }
}
