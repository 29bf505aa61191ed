//! How far an engine agrees with what was predicted of its cache.
//!
//! Answers that say how many prompt tokens came from the cache are added up beside what the index believed.
//! Where, over many of them, less than half of what was believed is there, the engine has forgotten more
//! than we know of: it has a smaller cache, or others use it too. Then the oldest part of what is believed
//! goes, and the sums begin anew. A burst that was sent before the first of it was computed is believed
//! held and is not yet; that is why nothing is done for less.

/// The answers, and the predicted tokens, that are required before a conclusion.
const MIN_ANSWERS: u32 = 32;
const MIN_TOKENS: f64 = 65_536.0;

/// A smaller share of the predicted tokens is far too little.
const DISAGREEMENT_SHARE: f64 = 0.5;

/// The least share of an upstream's blocks that one correction keeps.
const MIN_KEPT_SHARE: f64 = 0.5;

/// When sums are this large they are halved, so that what was long ago fades.
const MAX_SUM_TOKENS: f64 = 16.0 * MIN_TOKENS;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    answers: u32,
    predicted: f64,
    reported: f64,
}

impl Agreement {
    /// Another answer. `Some`: so much of what is believed is to be kept, the most recent part.
    pub fn seen(&mut self, predicted: u64, reported: u64) -> Option<f64> {
        self.answers = self.answers.saturating_add(1);
        self.predicted += predicted as f64;
        // What others have put into its cache proves nothing of what we believe.
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
        (0..answers).filter_map(|_| agreement.seen(predicted, reported)).collect()
    }

    #[test]
    fn an_engine_that_holds_far_less_is_trimmed_after_many_answers() {
        assert_eq!(after(31, 10_000, 0), [] as [f64; 0], "too few answers");
        assert_eq!(after(1_000, 50, 0), [] as [f64; 0], "too few tokens");
        assert_eq!(after(32, 10_000, 0), [MIN_KEPT_SHARE]);
        assert_eq!(after(32, 10_000, 4_900), [MIN_KEPT_SHARE]);
        assert_eq!(after(200, 10_000, 0).len(), 6, "and again while it does not help");
    }

    #[test]
    fn an_engine_that_holds_about_what_is_believed_is_left_alone() {
        for reported in [5_000, 9_000, 10_000, u64::MAX] {
            assert_eq!(after(10_000, 10_000, reported), [] as [f64; 0], "{reported}");
        }
    }

    #[test]
    fn what_was_long_ago_fades() {
        let mut agreement = Agreement::default();
        (0..10_000).for_each(|_| assert_eq!(agreement.seen(10_000, 10_000), None));
        let answers = (1..10_000).find(|_| agreement.seen(10_000, 0).is_some());
        assert!(answers.is_some_and(|answers| answers < 300), "{answers:?}");
    }
}
