//! What an upstream's answers have taught of the time to its first tokens (`pick::forecast`), and when its
//! engine began with the prompt at the head of its backlog.
//!
//! All numbers are relaxed atomics: a choice reads them as hints, and only the first token of a streaming
//! answer writes them.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::pick::forecast::terms::ForecastTerms;

/// The age of the latest answer from which on a forecast is no reason to refuse a request. The time in which
/// the engine reads its backlog does not count while a first token is awaited.
const MAX_FORECAST_AGE: Duration = Duration::from_secs(10);

/// The weight of the newest answer in the moving averages of errors and of forecasts.
const NEWEST_ANSWER_WEIGHT: f32 = 0.1;

/// The largest weight of an early answer in the confirmed share, which falls by no more than that at once.
const MAX_EARLY_WEIGHT: f32 = 0.25;

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
    /// The moving average of the forecasts in seconds, an `f32`.
    usual: AtomicU32,
    /// The share of the forecasts that answers of late have taken, 0 to 1, an `f32`.
    confirmed: AtomicU32,
    /// The requests in flight whose first tokens will correct the terms.
    awaited: AtomicU64,
    /// Since when there have been any, by `fleet::millis`.
    awaited_since: AtomicU64,
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

    /// A prompt that was sent at `since` was given up before its first token. A prompt that was sent before
    /// the engine began with the head of the backlog may have been that head. Both by `fleet::millis`.
    pub(super) fn give_up(&self, since: u64, now: u64) {
        if since <= self.head_since.load(Relaxed) {
            self.begin_head(now);
        }
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
        let weight = if answers == 0 { 1.0 } else { NEWEST_ANSWER_WEIGHT };
        move_average(&self.error, forecast.abs_diff(actual).as_secs_f32(), weight);
        let seconds = forecast.as_secs_f32();
        move_average(&self.usual, seconds, weight);
        let share = (actual.as_secs_f32() / seconds.max(f32::MIN_POSITIVE)).min(1.0);
        let is_early = share < f32::from_bits(self.confirmed.load(Relaxed));
        let silence = now.saturating_sub(self.corrected_at.swap(now, Relaxed));
        // After a silence nothing else is known of the engine.
        let is_only = answers == 0 || u128::from(silence) > MAX_FORECAST_AGE.as_millis();
        let usual = f32::from_bits(self.usual.load(Relaxed)).max(f32::MIN_POSITIVE);
        let weight = match is_early && !is_only {
            true => MAX_EARLY_WEIGHT * (seconds / usual).min(1.0),
            false => 1.0,
        };
        move_average(&self.confirmed, share, weight);
        answers
    }

    /// Begins to wait for a first token. `now` by `fleet::millis`.
    pub(super) fn begin_awaiting(&self, now: u64) {
        if self.awaited.fetch_add(1, Relaxed) == 0 {
            self.awaited_since.store(now, Relaxed);
        }
    }

    /// Ends the wait for a first token.
    pub(super) fn end_awaiting(&self) {
        self.awaited.fetch_sub(1, Relaxed);
    }

    /// Returns the share of a forecast, 0 to 1, that counts as a reason to refuse a request at `now`, by
    /// `fleet::millis`. `backlog`: the forecast for a first token behind the whole backlog.
    ///
    /// An upstream whose requests are all refused sends no answer that would show that it has recovered. So
    /// without an answer of late a forecast does not count, which lets the next request through. While first
    /// tokens are awaited, no answer is to be expected before the engine has read its backlog.
    ///
    /// Where answers come much earlier than forecast, the forecasts stay wrong until many answers have
    /// corrected them. So they count by no more than the latest answers confirm. One early answer may be an
    /// exception, and one with a short forecast shows little about long ones: it takes away a part only.
    pub(super) fn trust(&self, now: u64, backlog: Duration) -> f64 {
        let corrected_at = self.corrected_at.load(Relaxed);
        let (since, explained) = match self.awaited.load(Relaxed) {
            0 => (corrected_at, Duration::ZERO),
            _ => (corrected_at.max(self.awaited_since.load(Relaxed)), backlog),
        };
        let silence = Duration::from_millis(now.saturating_sub(since));
        if corrected_at == 0 || silence > MAX_FORECAST_AGE + explained {
            return 0.0;
        }
        f64::from(f32::from_bits(self.confirmed.load(Relaxed)))
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

/// Moves a moving average, an `f32`, towards a value; with a weight of 1 it begins anew. Of two concurrent
/// values it may miss one, which is acceptable for an average.
fn move_average(average: &AtomicU32, value: f32, weight: f32) {
    let before = f32::from_bits(average.load(Relaxed));
    let after = if weight < 1.0 { before + weight * (value - before) } else { value };
    average.store(after.to_bits(), Relaxed);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use super::super::awaited_token::AwaitedToken;
    use super::super::upstream::Upstream;
    use super::*;
    use crate::config::types::UpstreamConfig;
    use crate::config::url;
    use crate::fleet::queue::Queue;
    use crate::observe::Observer;

    const SECOND: Duration = Duration::from_secs(1);

    fn upstream() -> Upstream {
        let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
        Upstream::new(0, config, Queue::new(9, Observer::default()), &Default::default())
            .expect("it needs no file")
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
        assert_eq!(upstream.forecast_trust(now), 0.8125, "one early answer after one in time");
    }

    /// Regression: one early answer, such as a short one after long ones, lowered the trust to its own share.
    #[test]
    fn one_answer_changes_the_trust_by_a_bound_and_several_by_what_they_show() {
        type Answers = &'static [(u32, u64, u64)];
        const IN_TIME: (u32, u64, u64) = (20, 1_000, 1_000);
        // The number of answers, with their forecasts and times in milliseconds; the trust after them.
        let table: [(Answers, f64, f64); 10] = [
            (&[(1, 1_000, 250)], 0.25, 0.25),
            (&[IN_TIME, (1, 1_000, 250)], 0.80, 0.83),
            (&[IN_TIME, (1, 1_000, 0)], 0.74, 0.76),
            (&[IN_TIME, (1, 10, 2)], 0.99, 1.0),
            (&[IN_TIME, (1, 40_000, 10_000)], 0.80, 0.83),
            (&[IN_TIME, (12, 1_000, 250)], 0.25, 0.28),
            (&[IN_TIME, (12, 1_000, 250), (1, 1_000, 900)], 0.89, 0.91),
            (&[(1, 2_500, 50), (1, 20, 50)], 1.0, 1.0),
            (&[IN_TIME, (1, 1_000, 9_000), (1, 1_000, 250)], 0.80, 0.83),
            (&[(20, 20, 20), (1, 1_000, 250)], 0.80, 0.83),
        ];
        for (answers, least, most) in table {
            let accuracy = ForecastAccuracy::default();
            let millis = Duration::from_millis;
            for (count, forecast, actual) in answers {
                for _ in 0..*count {
                    accuracy.add(millis(*forecast), millis(*actual), 1_000);
                }
            }
            let found = accuracy.trust(1_000, Duration::ZERO);
            assert!((least..=most).contains(&found), "{found} after {answers:?}");
        }
        let accuracy = ForecastAccuracy::default();
        accuracy.add(SECOND, SECOND, 1_000);
        let later = 1_000 + MAX_FORECAST_AGE.as_millis() as u64 + 1;
        accuracy.add(SECOND, SECOND / 4, later);
        assert_eq!(accuracy.trust(later, Duration::ZERO), 0.25, "nothing else is known of late");
    }

    /// An engine reads 400,000 tokens in 50 s, and sends no first token meanwhile.
    #[test]
    fn trust_lasts_while_the_backlog_explains_the_silence() {
        let (upstream, begun) = (Arc::new(upstream()), Instant::now() + SECOND);
        let at = |seconds: u32| upstream.forecast_trust(begun + seconds * SECOND);
        upstream.live.gauges.backlog.store(400_000, Relaxed);
        let early = AwaitedToken::new(upstream.clone(), begun);
        assert_eq!(at(1), 0.0, "no answer has corrected the forecasts");
        upstream.correct_forecast(8_000, SECOND, SECOND, begun);
        drop(early);
        assert_eq!((at(10), at(11)), (1.0, 0.0), "answers that do not stream explain nothing");
        let long = AwaitedToken::new(upstream.clone(), begun + 20 * SECOND);
        assert_eq!((at(31), at(79), at(81)), (1.0, 1.0, 0.0));
        let next = AwaitedToken::new(upstream.clone(), begun + 75 * SECOND);
        assert_eq!(at(81), 0.0, "the engine is late with the first one");
        drop(long);
        upstream.correct_forecast(400_000, 50 * SECOND, 70 * SECOND, begun + 90 * SECOND);
        upstream.live.gauges.backlog.store(0, Relaxed);
        assert_eq!((at(100), at(101)), (1.0, 0.0), "without a backlog the token should have come");
        drop(next);
        assert_eq!((at(100), at(101)), (1.0, 0.0));
    }
}
