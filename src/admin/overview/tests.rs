//! Tests of the overview: sums of absurd numbers, and choices since the last event.

use super::*;
use crate::reply::usage::Usage;

/// Regression: an overview overflowed when the engines of two models reported absurd numbers.
#[test]
fn sums_of_absurd_numbers_stay_at_the_largest() {
    let tokens = Some(u64::MAX);
    let usage =
        Usage { prompt_tokens: tokens, cached_tokens: tokens, output_tokens: tokens, ..Usage::default() };
    let mut sums = TokenSums::default();
    for _ in 0..2 {
        sums.add(&UsageTotal { requests: 1, usage, ..UsageTotal::default() });
    }
    assert_eq!((sums.requests, sums.prompt, sums.cached, sums.output), (2, u64::MAX, u64::MAX, u64::MAX));
}

#[test]
fn a_reader_gets_the_choices_that_it_has_not_seen() {
    let frame = OverviewFrame::of("{\"a\":1", &[9, 8, 5]);
    assert_eq!(frame.last_decision(), 9);
    assert_eq!(frame.document(0), "{\"a\":1,\"decisions\":[9,8,5]}");
    assert_eq!(frame.document(7), "{\"a\":1,\"decisions\":[9,8]}");
    assert_eq!(frame.document(9), "{\"a\":1,\"decisions\":[]}");
}
