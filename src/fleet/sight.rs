//! How well the balancer sees what an upstream's cache holds, judged from what the engine reports.
//!
//! ```text
//! blind    the engine caches no prompts, by its metrics, or the predictions are wrong by more than
//!          `balance.sight_error`
//! exact    the engine's reports of cached tokens confirm the predictions
//! learnt   neither: the engine reports no cached tokens, or too few answers have come
//! ```
//!
//! Over the latest answers with a report, weighted by tokens,
//!
//! ```text
//! error = sum of max(0, |predicted - reported| - MAX_ROUNDING_TOKENS) / sum of max(predicted, reported)
//! ```
//!
//! A block of the index is larger than one of the engine, and chat templates add tokens: both are rounding,
//! not errors. The sums are halved at `MAX_SUM_TOKENS`, so that old answers lose weight. A blind upstream
//! has to become better than the limit by a margin, so that the state does not flap.

use std::fmt;

/// The least number of answers with a report before the predictions are judged.
const MIN_COMPARED_ANSWERS: u32 = 16;

/// The least number of answers without a report after which the engine counts as reporting none.
const MIN_SILENT_ANSWERS: u32 = 16;

/// The least number of cached tokens, predicted or reported, before predictions count as wrong.
const MIN_COMPARED_TOKENS: f64 = 16_384.0;

/// The cached tokens at which the sums are halved.
const MAX_SUM_TOKENS: f64 = 262_144.0;

/// The difference of one answer that is rounding, in tokens.
const MAX_ROUNDING_TOKENS: u64 = 256;

/// A blind upstream is judged anew below this share of the limit.
const RECOVERY_SHARE: f64 = 0.8;

/// How well the balancer sees the cache of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SightState {
    /// The engine's reports confirm the predictions.
    Exact,
    /// The predictions are neither confirmed nor refuted.
    Learnt,
    /// The predictions are worth little.
    Blind,
}

/// Why the sight of an upstream is not exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SightReason {
    /// Too few answers with a report have come.
    FewAnswers,
    /// Answers come without cached tokens.
    NoUsageDetails,
    /// The engine caches no prompts.
    PrefixCachingOff,
    /// The engine holds less than predicted, by this percentage.
    PredictsTooMuch(u8),
    /// The engine holds more than predicted, by this percentage.
    PredictsTooLittle(u8),
}

/// The sight of one upstream. Only `exact` has no reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    pub state: SightState,
    pub reason: Option<SightReason>,
}

/// A change of an upstream's sight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SightChange {
    pub from: Sight,
    pub to: Sight,
}

/// What is known of one upstream's reports, and the last judgement.
#[derive(Clone, Debug)]
pub(super) struct SightTracker {
    sight: Sight,
    /// Whether the engine caches prompts; `None` while its metrics do not report it.
    prefix_caching: Option<bool>,
    /// The answers with a report.
    compared: u32,
    /// The answers without a report since the last one with it.
    silent: u32,
    predicted: f64,
    reported: f64,
    /// The sum of the larger one of both.
    larger: f64,
    wrong: f64,
    /// The error above which predictions are wrong, as last configured.
    max_error: f64,
}

// === impl SightState ===

impl SightState {
    /// All states, the best first.
    pub const ALL: [SightState; 3] = [SightState::Exact, SightState::Learnt, SightState::Blind];

    /// The name in metrics, logs and the admin API.
    pub fn label(self) -> &'static str {
        match self {
            SightState::Exact => "exact",
            SightState::Learnt => "learnt",
            SightState::Blind => "blind",
        }
    }
}

// === impl SightReason ===

impl SightReason {
    /// The name in logs; without the percentage, which changes all the time.
    pub fn label(self) -> &'static str {
        match self {
            SightReason::FewAnswers => "few_answers",
            SightReason::NoUsageDetails => "no_usage_details",
            SightReason::PrefixCachingOff => "prefix_caching_off",
            SightReason::PredictsTooMuch(_) => "predicts_too_much",
            SightReason::PredictsTooLittle(_) => "predicts_too_little",
        }
    }
}

impl fmt::Display for SightReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SightReason::FewAnswers => f.write_str("too few answers with cached tokens so far"),
            SightReason::NoUsageDetails => {
                f.write_str("no usage details: start vLLM with --enable-prompt-tokens-details")
            }
            SightReason::PrefixCachingOff => {
                f.write_str("prefix caching is off: start vLLM with --enable-prefix-caching")
            }
            SightReason::PredictsTooMuch(percent) => {
                write!(f, "predictions are wrong by {percent} %: the engine holds less than predicted")
            }
            SightReason::PredictsTooLittle(percent) => {
                write!(f, "predictions are wrong by {percent} %: the engine holds more than predicted")
            }
        }
    }
}

// === impl Sight ===

impl Sight {
    const UNKNOWN: Sight = Sight { state: SightState::Learnt, reason: Some(SightReason::FewAnswers) };

    /// Whether state and reason are the same, whatever the percentage.
    fn is_like(&self, other: &Sight) -> bool {
        let label = |sight: &Sight| sight.reason.map(SightReason::label);
        self.state == other.state && label(self) == label(other)
    }
}

// === impl SightTracker ===

impl Default for SightTracker {
    fn default() -> Self {
        SightTracker {
            sight: Sight::UNKNOWN,
            prefix_caching: None,
            compared: 0,
            silent: 0,
            predicted: 0.0,
            reported: 0.0,
            larger: 0.0,
            wrong: 0.0,
            max_error: 1.0,
        }
    }
}

impl SightTracker {
    pub(super) fn sight(&self) -> Sight {
        self.sight
    }

    /// Adds an answer to a prompt with blocks. `reported`: the cached tokens in its usage.
    pub(super) fn answered(
        &mut self,
        predicted: u64,
        reported: Option<u64>,
        max_error: f64,
    ) -> Option<SightChange> {
        self.max_error = max_error;
        match reported {
            None => self.silent = self.silent.saturating_add(1),
            Some(reported) => {
                self.silent = 0;
                self.compared = self.compared.saturating_add(1);
                self.compare(predicted, reported);
            }
        }
        self.judge_again()
    }

    /// Sets whether the engine caches prompts, as its metrics report.
    pub(super) fn set_prefix_caching(&mut self, caches: bool) -> Option<SightChange> {
        self.prefix_caching = Some(caches);
        self.judge_again()
    }

    /// Forgets everything: the process restarted, perhaps with other flags.
    pub(super) fn reset(&mut self) -> Option<SightChange> {
        *self = SightTracker { sight: self.sight, max_error: self.max_error, ..SightTracker::default() };
        self.judge_again()
    }

    fn compare(&mut self, predicted: u64, reported: u64) {
        self.predicted += predicted as f64;
        self.reported += reported as f64;
        self.larger += predicted.max(reported) as f64;
        self.wrong += predicted.abs_diff(reported).saturating_sub(MAX_ROUNDING_TOKENS) as f64;
        if self.larger > MAX_SUM_TOKENS {
            for sum in [&mut self.predicted, &mut self.reported, &mut self.larger, &mut self.wrong] {
                *sum /= 2.0;
            }
        }
    }

    fn judge_again(&mut self) -> Option<SightChange> {
        let to = self.judge();
        let from = std::mem::replace(&mut self.sight, to);
        (!from.is_like(&to)).then_some(SightChange { from, to })
    }

    fn judge(&self) -> Sight {
        if self.prefix_caching == Some(false) {
            return Sight { state: SightState::Blind, reason: Some(SightReason::PrefixCachingOff) };
        }
        if self.compared < MIN_COMPARED_ANSWERS {
            let is_silent = self.silent >= MIN_SILENT_ANSWERS;
            let reason = if is_silent { SightReason::NoUsageDetails } else { SightReason::FewAnswers };
            return Sight { state: SightState::Learnt, reason: Some(reason) };
        }
        let error = self.wrong / self.larger.max(1.0);
        let was_wrong = matches!(
            self.sight.reason,
            Some(SightReason::PredictsTooMuch(_) | SightReason::PredictsTooLittle(_))
        );
        let limit = if was_wrong { self.max_error * RECOVERY_SHARE } else { self.max_error };
        if error <= limit {
            return Sight { state: SightState::Exact, reason: None };
        }
        if self.larger < MIN_COMPARED_TOKENS {
            return Sight::UNKNOWN;
        }
        let percent = (error * 100.0).round().clamp(0.0, 100.0) as u8;
        let reason = match self.predicted > self.reported {
            true => SightReason::PredictsTooMuch(percent),
            false => SightReason::PredictsTooLittle(percent),
        };
        Sight { state: SightState::Blind, reason: Some(reason) }
    }
}

#[cfg(test)]
mod tests;
