//! What an upstream's answers have taught of the time to its first tokens (`pick::forecast`), and when its
//! engine began with the prompt at the head of its backlog.
//!
//! All numbers are relaxed atomics: a choice reads them as hints, and only the first token of a streaming
//! answer writes them.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::pick::forecast::terms::ForecastTerms;

/// The age of the latest answer from which on a forecast is no reason to refuse a request.
const MAX_FORECAST_AGE: Duration = Duration::from_secs(10);

/// The weight of the newest error in the moving average.
const NEWEST_ERROR_WEIGHT: f32 = 0.1;

/// The forecasts of one upstream. Every choice reads them.
pub(super) struct UpstreamForecast {
    /// The `ForecastTerms`.
    terms: AtomicU64,
    /// Since when the engine has been reading the head of the backlog, by `fleet::millis`.
    head_since: AtomicU64,
}

/// How good the forecasts of one upstream are.
#[derive(Default)]
pub(super) struct ForecastAccuracy {
    /// When an answer last corrected the terms, by `fleet::millis`; 0: none did.
    corrected_at: AtomicU64,
    /// The number of answers that have corrected them.
    answers: AtomicU32,
    /// The moving average of the errors in seconds, an `f32`.
    error: AtomicU32,
    /// The latest time to a first token as a share of its forecast, an `f32`.
    latest_ratio: AtomicU32,
}

// === impl UpstreamForecast ===

impl UpstreamForecast {
    pub(super) fn new() -> Self {
        UpstreamForecast {
            terms: AtomicU64::new(ForecastTerms::default().to_bits()),
            head_since: AtomicU64::new(0),
        }
    }

    pub(super) fn terms(&self) -> ForecastTerms {
        ForecastTerms::from_bits(self.terms.load(Relaxed))
    }

    /// Forgets what answers have taught.
    pub(super) fn reset(&self) {
        self.terms.store(ForecastTerms::default().to_bits(), Relaxed);
    }

    /// The engine begins with the next prompt: a first token came, or the backlog was empty. `now` by
    /// `fleet::millis`.
    pub(super) fn begin_head(&self, now: u64) {
        self.head_since.store(now, Relaxed);
    }

    /// Returns the milliseconds since the engine began with the head of the backlog. `now` by
    /// `fleet::millis`.
    pub(super) fn head_millis(&self, now: u64) -> u32 {
        u32::try_from(now.saturating_sub(self.head_since.load(Relaxed))).unwrap_or(u32::MAX)
    }

    /// Corrects the terms by a first token; see `ForecastTerms::corrected`.
    pub(super) fn correct(&self, tokens: u64, actual: Duration, answers: u32) {
        let terms = ForecastTerms::from_bits;
        let corrected = |bits| Some(terms(bits).corrected(tokens, actual, answers).to_bits());
        // The closure always returns a value.
        let _ = self.terms.fetch_update(Relaxed, Relaxed, corrected);
    }
}

// === impl ForecastAccuracy ===

impl ForecastAccuracy {
    /// Adds an answer. Returns the number of earlier ones. `now` by `fleet::millis`.
    pub(super) fn add(&self, forecast: Duration, actual: Duration, now: u64) -> u32 {
        let answers = self.answers.fetch_add(1, Relaxed);
        let error = forecast.abs_diff(actual).as_secs_f32();
        let before = f32::from_bits(self.error.load(Relaxed));
        let average = if answers == 0 { error } else { before + NEWEST_ERROR_WEIGHT * (error - before) };
        // Of two concurrent answers the average may miss one, which is acceptable for an average.
        self.error.store(average.to_bits(), Relaxed);
        let ratio = actual.as_secs_f32() / forecast.as_secs_f32().max(f32::MIN_POSITIVE);
        self.latest_ratio.store(ratio.to_bits(), Relaxed);
        self.corrected_at.store(now, Relaxed);
        answers
    }

    /// Returns the share of a forecast, 0 to 1, that counts as a reason to refuse a request at `now`, by
    /// `fleet::millis`.
    ///
    /// An upstream whose requests are all refused sends no answer that would show that it has recovered. So
    /// without an answer of late a forecast does not count, which lets the next request through. Were that
    /// answered much earlier than forecast, the forecasts would still be wrong until many answers have
    /// corrected them. So they count by no more than the latest answer confirms.
    pub(super) fn trust(&self, now: u64) -> f64 {
        let corrected_at = self.corrected_at.load(Relaxed);
        let age = Duration::from_millis(now.saturating_sub(corrected_at));
        if corrected_at == 0 || age > MAX_FORECAST_AGE {
            return 0.0;
        }
        f64::from(f32::from_bits(self.latest_ratio.load(Relaxed))).min(1.0)
    }

    /// Returns the moving average of the errors; `None` before the first answer.
    pub(super) fn error(&self) -> Option<Duration> {
        let error = f32::from_bits(self.error.load(Relaxed));
        let is_known = self.answers.load(Relaxed) > 0;
        is_known.then(|| Duration::try_from_secs_f32(error).unwrap_or(Duration::MAX))
    }

    /// Forgets all answers.
    pub(super) fn reset(&self) {
        self.answers.store(0, Relaxed);
        self.corrected_at.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::upstream::Upstream;
    use super::*;
    use crate::config::types::UpstreamConfig;
    use crate::config::url;
    use crate::fleet::queue::Queue;
    use crate::observe::Observer;

    const SECOND: Duration = Duration::from_secs(1);

    fn upstream() -> Upstream {
        let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
        Upstream::new(0, config, Queue::new(9, Observer::default())).expect("it needs no file")
    }

    #[test]
    fn answers_correct_the_forecasts_until_the_upstream_restarts() {
        let (upstream, now) = (upstream(), Instant::now() + SECOND);
        let forecast = || upstream.live.forecast.terms().forecast(8_000);
        let (first, error) = (forecast(), || upstream.forecast_error().map(|error| error.as_millis()));
        assert_eq!((upstream.forecast_trust(now), error()), (0.0, None));
        for _ in 0..100 {
            upstream.correct_forecast(8_000, forecast(), SECOND / 4, now);
        }
        assert!(forecast().abs_diff(SECOND / 4) < SECOND / 50, "{:?}", forecast());
        assert!(error().is_some_and(|error| error < 40), "{:?}", error());
        assert!(upstream.forecast_trust(now + MAX_FORECAST_AGE) > 0.9);
        assert_eq!(upstream.forecast_trust(now + MAX_FORECAST_AGE + SECOND), 0.0);
        upstream.reset_forecast();
        assert_eq!((forecast(), upstream.forecast_trust(now), error()), (first, 0.0, None));
        upstream.correct_forecast(8_000, SECOND, 3 * SECOND, now);
        assert_eq!((upstream.forecast_trust(now), error()), (1.0, Some(2_000)), "the average begins anew");
        upstream.correct_forecast(8_000, SECOND, SECOND / 4, now);
        assert_eq!(upstream.forecast_trust(now), 0.25);
    }
}
