//! How many bytes of a prompt make a token, for each model: learnt from answers that count them.
//!
//! The mean is weighed by tokens and fades: what the latest hundred thousand tokens say counts most, so that
//! many short prompts, whose chat template weighs as much as their text, do not outweigh the long ones that
//! matter.
//!
//! Readers take no lock. Never: more models than [`MOST`]; a client may name what it likes.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::rate::Rate;

/// What is taken for a token before any was counted.
pub const BYTES: f64 = 4.0;

/// What an estimate may be off by, whatever is counted.
const LEAST: f64 = 0.25;
const LARGEST: f64 = 64.0;

/// Tokens after which what was learnt before counts half.
const WINDOW: f32 = 100_000.0;

/// Tokens that the first estimate weighs.
const PRIOR: f32 = 1_000.0;

const MOST: usize = 1_024;

#[derive(Default)]
pub struct Ratios(ArcSwap<HashMap<String, Arc<Rate>>>);

impl Ratios {
    /// Bytes of a token of this model.
    pub fn of(&self, model: Option<&str>) -> f64 {
        let models = self.0.load();
        model.and_then(|model| models.get(model)).map_or(BYTES, |ratio| ratio.value().clamp(LEAST, LARGEST))
    }

    pub fn learn(&self, model: &str, bytes: u64, tokens: u64) {
        if bytes == 0 || tokens == 0 {
            return;
        }
        if let Some(known) = self.0.load().get(model) {
            return add(known, bytes, tokens);
        }
        let made = Arc::new(Rate::new(PRIOR * BYTES as f32, PRIOR));
        add(&made, bytes, tokens);
        self.0.rcu(|models| {
            let mut models = HashMap::clone(models);
            if models.len() < MOST {
                models.entry(model.to_string()).or_insert_with(|| made.clone());
            }
            models
        });
    }
}

fn add(ratio: &Rate, bytes: u64, tokens: u64) {
    let (bytes, tokens) = (bytes as f32, tokens as f32);
    ratio.add(bytes, tokens, WINDOW / (WINDOW + tokens));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_model_has_its_own_ratio_and_begins_at_four() {
        let ratios = Ratios::default();
        ratios.learn("chinese", 30_000, 15_000);
        assert!((2.0..2.2).contains(&ratios.of(Some("chinese"))), "{}", ratios.of(Some("chinese")));
        assert_eq!((ratios.of(Some("other")), ratios.of(None)), (BYTES, BYTES));
    }

    #[test]
    fn what_comes_later_counts_more() {
        let ratios = Ratios::default();
        (0..100).for_each(|_| ratios.learn("m", 50_000, 10_000));
        assert!((4.99..5.01).contains(&ratios.of(Some("m"))));
        (0..40).for_each(|_| ratios.learn("m", 30_000, 10_000));
        assert!((3.0..3.1).contains(&ratios.of(Some("m"))), "{}", ratios.of(Some("m")));
    }

    #[test]
    fn names_without_end_take_no_memory_without_end() {
        let ratios = Ratios::default();
        (0..2 * MOST).for_each(|number| ratios.learn(&number.to_string(), 8_000_000, 1_000_000));
        assert_eq!(ratios.0.load().len(), MOST);
        assert_eq!(ratios.of(Some(&(2 * MOST - 1).to_string())), BYTES);
    }

    proptest! {
        #[test]
        fn whatever_is_counted_the_ratio_stays_one(
            all in prop::collection::vec((any::<u64>(), any::<u64>()), 0..30),
        ) {
            let ratios = Ratios::default();
            all.iter().for_each(|(bytes, tokens)| ratios.learn("m", *bytes, *tokens));
            prop_assert!((LEAST..=LARGEST).contains(&ratios.of(Some("m"))));
        }
    }
}
