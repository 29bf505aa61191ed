//! Metrics of the forecasts of times to first tokens.

use std::time::Duration;

use super::builder::MetricsBuilder;
use super::series::{Counter, MetricVec, SecondsHistogram};

/// The forecasts of streams whose first token came, and their errors.
pub(in crate::observe) struct ForecastMetrics {
    seconds: MetricVec<SecondsHistogram>,
    error_seconds: MetricVec<SecondsHistogram>,
    late: MetricVec<Counter>,
}

impl ForecastMetrics {
    pub(super) fn new(make: &MetricsBuilder) -> Self {
        ForecastMetrics {
            seconds: make.histogram_by(
                "vllm_lb_forecast_seconds",
                "the [forecast](routing.md#the-forecast) of the time from the choice to the first token, of \
                 streams that reached it",
                &["upstream"],
            ),
            error_seconds: make.histogram_by(
                "vllm_lb_forecast_error_seconds",
                "the difference between that forecast and the time that it took",
                &["upstream"],
            ),
            late: make.counters(
                "vllm_lb_forecast_late_total",
                "first tokens that came later than the forecast",
                &["upstream"],
            ),
        }
    }

    /// Counts a first token that came after `actual`.
    pub(in crate::observe) fn compared(&self, upstream: &str, forecast: Duration, actual: Duration) {
        self.seconds.with_label_values(&[upstream]).observe_time(forecast);
        let error = forecast.abs_diff(actual);
        self.error_seconds.with_label_values(&[upstream]).observe_time(error);
        let late = self.late.with_label_values(&[upstream]);
        if actual > forecast {
            late.inc();
        }
    }
}
