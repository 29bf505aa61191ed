//! The terms of an upstream's forecasts, and how its answers correct them.
//!
//! `base` and `per_token` are learnt for each upstream from its streaming answers. An answer that came after
//! `actual` seconds moves both, each by its part of the forecast, along the slope of the squared logarithm
//! of `actual / forecast`:
//!
//! ```text
//! error      = ln(actual / forecast), cut to -MAX_ERROR..MAX_ERROR
//! rate       = max(MIN_RATE, 1 / (2 + earlier answers))
//! base      *= exp(rate * error * base / forecast)
//! per_token *= exp(rate * error * (1 - base / forecast))
//! ```
//!
//! So an error counts by its ratio, and neither term can become negative. The first answers change the terms
//! much; later one answer changes a term by 3.5 % at the most, however late it came, and fades as further
//! ones come.

use std::time::Duration;

/// The longest forecast, in seconds.
pub(super) const MAX_SECONDS: f64 = 600.0;

/// The share of an answer's error by which the terms change after many answers.
const MIN_RATE: f64 = 0.05;

/// The largest error that one answer counts for, as a natural logarithm.
const MAX_ERROR: f64 = 0.7;

/// The bounds of `base`, in seconds.
pub(super) const BASE_RANGE: (f64, f64) = (0.000_1, 60.0);

/// The bounds of `per_token`, in seconds: from ten million tokens a second to a hundred.
pub(super) const PER_TOKEN_RANGE: (f64, f64) = (1e-7, 1e-2);

/// How the time to a first token depends on the tokens to read before it, for one upstream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForecastTerms {
    /// Seconds that every first token takes.
    pub(super) base: f32,
    /// Seconds for each token to read.
    pub(super) per_token: f32,
}

impl Default for ForecastTerms {
    /// The terms before any answer: 20 ms, and 8,000 tokens a second.
    fn default() -> Self {
        ForecastTerms { base: 0.02, per_token: 1.0 / 8_000.0 }
    }
}

// === impl ForecastTerms ===

impl ForecastTerms {
    /// Returns the forecast for a first token behind so many tokens, the request's own included.
    pub fn forecast(self, tokens: u64) -> Duration {
        Duration::from_secs_f64(self.seconds(tokens).min(MAX_SECONDS))
    }

    pub(super) fn seconds(self, tokens: u64) -> f64 {
        f64::from(self.base) + tokens as f64 * f64::from(self.per_token)
    }

    /// Returns the terms corrected by a first token that came after `actual`, behind so many tokens.
    /// `answers`: the number of answers that corrected them before.
    pub fn corrected(self, tokens: u64, actual: Duration, answers: u32) -> Self {
        let forecast = self.seconds(tokens);
        let error = (actual.as_secs_f64() / forecast).max(f64::MIN_POSITIVE).ln();
        let step = MIN_RATE.max(1.0 / (2.0 + f64::from(answers))) * error.clamp(-MAX_ERROR, MAX_ERROR);
        let share = f64::from(self.base) / forecast;
        let moved = |term: f32, share: f64, (low, high): (f64, f64)| {
            (f64::from(term) * (step * share).exp()).clamp(low, high) as f32
        };
        ForecastTerms {
            base: moved(self.base, share, BASE_RANGE),
            per_token: moved(self.per_token, 1.0 - share, PER_TOKEN_RANGE),
        }
    }

    /// Returns the tokens that the engine reads in so many milliseconds.
    pub(super) fn tokens_in(self, millis: u32) -> u64 {
        (f64::from(millis) / 1e3 / f64::from(self.per_token)) as u64
    }

    /// Packs the terms into a word, so that they change together.
    pub fn to_bits(self) -> u64 {
        u64::from(self.base.to_bits()) << 32 | u64::from(self.per_token.to_bits())
    }

    /// Returns the terms of a word of `to_bits`.
    pub fn from_bits(bits: u64) -> Self {
        ForecastTerms { base: f32::from_bits((bits >> 32) as u32), per_token: f32::from_bits(bits as u32) }
    }
}
