//! The bytes per token of each model, learned from answers that report the tokens of their prompts.
//!
//! The mean is weighted by tokens, and the latest hundred thousand tokens count most. So many short prompts,
//! whose chat template is as long as their text, do not outweigh the long prompts that matter.
//!
//! An implausible count is ignored: no tokenizer makes tokens of such a size from a long prompt, and
//! estimates in false tokens would draw conversations away from the upstreams that hold them.
//!
//! Readers take no lock. The number of models is bounded by [`MAX_MODELS`], since clients may send any name.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::rate::Rate;

/// The assumed bytes per token before the first observation.
pub(super) const DEFAULT_BYTES_PER_TOKEN: f64 = 4.0;

/// The least plausible bytes per token: single bytes. Prompts of a few words, which are mostly chat
/// template, are below it.
const MIN_BYTES_PER_TOKEN: f64 = 1.0;

/// The largest plausible bytes per token: long words and indentation.
const MAX_BYTES_PER_TOKEN: f64 = 16.0;

/// The number of tokens after which earlier observations count half.
const RATIO_WINDOW_TOKENS: f32 = 100_000.0;

/// The weight of the initial estimate, in tokens.
const PRIOR_TOKENS: f32 = 1_000.0;

/// The largest number of models.
const MAX_MODELS: usize = 1_024;

/// The bytes per token by model.
#[derive(Default)]
pub(super) struct Ratios(ArcSwap<HashMap<String, Arc<Rate>>>);

impl Ratios {
    /// Returns the bytes per token of a model.
    pub(super) fn of(&self, model: Option<&str>) -> f64 {
        let models = self.0.load();
        model.and_then(|model| models.get(model)).map_or(DEFAULT_BYTES_PER_TOKEN, |ratio| {
            ratio.value().clamp(MIN_BYTES_PER_TOKEN, MAX_BYTES_PER_TOKEN)
        })
    }

    /// Learns from a prompt of `bytes` that had `tokens`.
    pub(super) fn learn(&self, model: &str, bytes: u64, tokens: u64) {
        if !fits(bytes, tokens) {
            return;
        }
        if let Some(known) = self.0.load().get(model) {
            return add(known, bytes, tokens);
        }
        let new = Arc::new(Rate::new(PRIOR_TOKENS * DEFAULT_BYTES_PER_TOKEN as f32, PRIOR_TOKENS));
        add(&new, bytes, tokens);
        self.0.rcu(|models| {
            let mut models = HashMap::clone(models);
            if models.len() < MAX_MODELS {
                models.entry(model.to_string()).or_insert_with(|| new.clone());
            }
            models
        });
    }
}

/// Whether a prompt of `bytes` can plausibly have `tokens`.
pub(super) fn fits(bytes: u64, tokens: u64) -> bool {
    (MIN_BYTES_PER_TOKEN..=MAX_BYTES_PER_TOKEN).contains(&(bytes as f64 / tokens as f64))
}

fn add(ratio: &Rate, bytes: u64, tokens: u64) {
    let (bytes, tokens) = (bytes as f32, tokens as f32);
    ratio.add(bytes, tokens, RATIO_WINDOW_TOKENS / (RATIO_WINDOW_TOKENS + tokens));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn learns_a_ratio_for_each_model_and_starts_at_four() {
        let ratios = Ratios::default();
        ratios.learn("chinese", 30_000, 15_000);
        assert!((2.0..2.2).contains(&ratios.of(Some("chinese"))), "{}", ratios.of(Some("chinese")));
        assert_eq!(
            (ratios.of(Some("other")), ratios.of(None)),
            (DEFAULT_BYTES_PER_TOKEN, DEFAULT_BYTES_PER_TOKEN)
        );
    }

    #[test]
    fn later_observations_count_more() {
        let ratios = Ratios::default();
        (0..100).for_each(|_| ratios.learn("m", 50_000, 10_000));
        assert!((4.99..5.01).contains(&ratios.of(Some("m"))));
        (0..40).for_each(|_| ratios.learn("m", 30_000, 10_000));
        assert!((3.0..3.1).contains(&ratios.of(Some("m"))), "{}", ratios.of(Some("m")));
    }

    #[test]
    fn limits_the_number_of_models() {
        let ratios = Ratios::default();
        (0..2 * MAX_MODELS).for_each(|number| ratios.learn(&number.to_string(), 8_000_000, 1_000_000));
        assert_eq!(ratios.0.load().len(), MAX_MODELS);
        assert_eq!(ratios.of(Some(&(2 * MAX_MODELS - 1).to_string())), DEFAULT_BYTES_PER_TOKEN);
    }

    #[test]
    fn ignores_implausible_counts() {
        let ratios = Ratios::default();
        for (bytes, tokens) in [(40_000, 5), (40_000, 2_000), (40_000, 50_000), (40_000, u64::MAX), (0, 0)] {
            (0..1_000).for_each(|_| ratios.learn("m", bytes, tokens));
            assert_eq!(ratios.of(Some("m")), DEFAULT_BYTES_PER_TOKEN, "{tokens} tokens");
        }
        (0..1_000).for_each(|_| ratios.learn("m", 40_000, 40_000));
        assert!((1.0..1.01).contains(&ratios.of(Some("m"))), "a token a byte is possible");
    }

    proptest! {
        #[test]
        fn keeps_the_ratio_plausible_for_any_counts(
            all in prop::collection::vec((any::<u64>(), any::<u64>()), 0..30),
        ) {
            let ratios = Ratios::default();
            all.iter().for_each(|(bytes, tokens)| ratios.learn("m", *bytes, *tokens));
            prop_assert!((MIN_BYTES_PER_TOKEN..=MAX_BYTES_PER_TOKEN).contains(&ratios.of(Some("m"))));
        }
    }
}
