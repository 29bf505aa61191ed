//! Measures how far an engine's cached tokens agree with the predictions of the index.
//!
//! Answers report how many prompt tokens came from the cache; the sums of these and of the predicted tokens
//! are compared. When over many answers less than half of the prediction was cached, the engine has evicted
//! more than the index assumes: its cache is smaller, or other clients use it too. Then the oldest part of
//! the upstream's blocks is evicted from the index, and the sums restart. The threshold is that low because
//! the requests of a burst are predicted as cached before the first one has been computed.

/// The least number of answers before a conclusion.
const MIN_ANSWERS: u32 = 32;

/// The least number of predicted tokens before a conclusion.
const MIN_TOKENS: f64 = 65_536.0;

/// The least share of the predicted tokens that counts as agreement.
const DISAGREEMENT_SHARE: f64 = 0.5;

/// The least share of an upstream's blocks that one correction keeps.
const MIN_KEPT_SHARE: f64 = 0.5;

/// The predicted tokens at which the sums are halved, so that old answers lose weight.
const MAX_SUM_TOKENS: f64 = 16.0 * MIN_TOKENS;

/// The sums of predicted and reported cached tokens of one engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Agreement {
    answers: u32,
    predicted: f64,
    reported: f64,
}

impl Agreement {
    /// Adds an answer. Returns the share of the upstream's most recent blocks to keep, if the engine
    /// disagrees.
    pub(super) fn add(&mut self, predicted: u64, reported: u64) -> Option<f64> {
        self.answers = self.answers.saturating_add(1);
        self.predicted += predicted as f64;
        // Tokens cached for other clients are no evidence for the prediction.
        self.reported += reported.min(predicted) as f64;
        if self.predicted > MAX_SUM_TOKENS {
            (self.predicted, self.reported) = (self.predicted / 2.0, self.reported / 2.0);
        }
        let enough = self.answers >= MIN_ANSWERS && self.predicted >= MIN_TOKENS;
        let share = self.reported / self.predicted.max(1.0);
        if !enough || share >= DISAGREEMENT_SHARE {
            return None;
        }
        *self = Agreement::default();
        Some(share.max(MIN_KEPT_SHARE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(answers: u32, predicted: u64, reported: u64) -> Vec<f64> {
        let mut agreement = Agreement::default();
        (0..answers).filter_map(|_| agreement.add(predicted, reported)).collect()
    }

    #[test]
    fn trims_an_engine_that_holds_far_less_than_predicted_after_many_answers() {
        assert_eq!(after(31, 10_000, 0), [] as [f64; 0], "too few answers");
        assert_eq!(after(1_000, 50, 0), [] as [f64; 0], "too few tokens");
        assert_eq!(after(32, 10_000, 0), [MIN_KEPT_SHARE]);
        assert_eq!(after(32, 10_000, 4_900), [MIN_KEPT_SHARE]);
        assert_eq!(after(200, 10_000, 0).len(), 6, "again while the disagreement lasts");
    }

    #[test]
    fn keeps_all_blocks_of_an_engine_that_agrees() {
        for reported in [5_000, 9_000, 10_000, u64::MAX] {
            assert_eq!(after(10_000, 10_000, reported), [] as [f64; 0], "{reported}");
        }
    }

    #[test]
    fn old_answers_lose_weight() {
        let mut agreement = Agreement::default();
        (0..10_000).for_each(|_| assert_eq!(agreement.add(10_000, 10_000), None));
        let answers = (1..10_000).find(|_| agreement.add(10_000, 0).is_some());
        assert!(answers.is_some_and(|answers| answers < 300), "{answers:?}");
    }
}
