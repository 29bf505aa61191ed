//! Forecasts of known times, and properties of all.

use proptest::prelude::*;

use super::terms::{BASE_RANGE, ForecastTerms, PER_TOKEN_RANGE};
use super::*;
use crate::pick::{mix, unit_interval};

const SECOND: Duration = Duration::from_secs(1);

fn terms(base: f32, per_token: f32) -> ForecastTerms {
    ForecastTerms { base, per_token }
}

/// A candidate of these terms, with so many tokens ahead, of a sibling's, and to read.
fn candidate(index: usize, terms: ForecastTerms, ahead: u64, uncached: u64) -> Candidate {
    Candidate {
        index,
        backlog: ahead,
        missing: 9,
        active: 5,
        context: 7,
        weight: 1.0,
        session_penalty: 3,
        cold: 9,
        hit: 0,
        uncached,
        own_backlog: 0,
        head_millis: 9,
        terms,
    }
}

#[test]
fn forecasts_by_the_pace_and_the_tokens_to_read() {
    let fast = terms(0.05, 1.0 / 20_000.0);
    let table = [
        (ForecastTerms::default(), 0, 0, 20),
        (ForecastTerms::default(), 0, 8_000, 1_020),
        (ForecastTerms::default(), 16_000, 8_000, 3_020),
        (fast, 0, 1_000, 100),
        (fast, 19_000, 1_000, 1_050),
        (fast, u64::MAX, u64::MAX, 600_000),
    ];
    for (terms, ahead, uncached, millis) in table {
        let found = forecast(&candidate(0, terms, ahead, uncached)).as_secs_f64() * 1e3;
        assert!((found - f64::from(millis)).abs() < 0.01, "{found} of {ahead} and {uncached}, not {millis}");
    }
}

#[test]
fn an_engine_reads_its_backlog_at_its_pace_and_no_more_than_that() {
    for (backlog, own_backlog, head_millis, before) in [
        (8_000, 8_000, 0, 9_000),
        (8_000, 8_000, 500, 5_000),
        (8_000, 8_000, 5_000, 1_000),
        (8_000, 2_000, 500, 7_000),
        (8_000, 0, u32::MAX, 9_000),
        (0, 0, 5_000, 1_000),
    ] {
        let terms = ForecastTerms::default();
        let candidate = Candidate { own_backlog, head_millis, ..candidate(0, terms, backlog, 1_000) };
        let found = tokens_before(&candidate);
        assert!(found.abs_diff(before) <= 1, "{found} of {backlog}, {own_backlog} after {head_millis} ms");
    }
}

/// An engine with a base of 60 ms and 25,000 tokens a second, whose times scatter by a tenth; one answer of
/// ten takes five times as long.
#[test]
fn learns_the_pace_of_an_engine_among_outliers() {
    let unit = |answer: usize, which: u64| unit_interval(mix(which, answer));
    let mut learnt = ForecastTerms::default();
    let mut errors = Vec::new();
    for answer in 0..400 {
        let tokens = 200 + (40_000.0 * unit(answer, 1)) as u64;
        let scatter = 0.9 + 0.2 * unit(answer, 2);
        let actual = (0.06 + tokens as f64 / 25_000.0) * scatter * if answer % 10 == 3 { 5.0 } else { 1.0 };
        if answer >= 100 && answer % 10 != 3 {
            errors.push((learnt.seconds(tokens) / actual - 1.0).abs());
        }
        learnt = learnt.corrected(tokens, Duration::from_secs_f64(actual), answer as u32);
    }
    errors.sort_by(f64::total_cmp);
    let median = errors[errors.len() / 2];
    assert!(median < 0.12, "{median} with {learnt:?}");
}

#[test]
fn follows_an_engine_whose_pace_changes() {
    let mut learnt = ForecastTerms::default();
    for per_token in [1.0 / 40_000.0, 1.0 / 2_000.0] {
        for answer in 0..100 {
            learnt = learnt.corrected(10_000, SECOND.mul_f64(0.02 + 10_000.0 * per_token), answer);
        }
        let found = learnt.seconds(10_000) / (0.02 + 10_000.0 * per_token);
        assert!((0.95..1.05).contains(&found), "{found}");
    }
}

#[test]
fn keeps_the_candidates_within_a_limit() {
    let known = ForecastTerms::default();
    // Forecasts of 0.02, 1.02 and 2.02 s.
    let all = [0, 8_000, 16_000].map(|tokens| candidate(tokens as usize, known, 0, tokens));
    let kept = |limit: u64, unknown: usize| {
        let mut candidates = all.to_vec();
        let excess = keep_within(&mut candidates, Duration::from_millis(limit), |index| {
            f64::from(u8::from(index != unknown))
        });
        (candidates.iter().map(|candidate| candidate.index).collect::<Vec<_>>(), excess)
    };
    let excess =
        |found: Option<Duration>| found.map(|excess| excess.as_secs_f64() * 1e3).unwrap_or(-1.0).round();
    for (limit, unknown, left, late) in [
        (3_000, 1, &[0, 8_000, 16_000][..], -1.0),
        (1_500, 1, &[0, 8_000], -1.0),
        (100, 1, &[0], -1.0),
        (100, 16_000, &[0, 16_000], -1.0),
        (10, 16_000, &[16_000], -1.0),
        (10, 1, &[0, 8_000, 16_000], 10.0),
        (0, 1, &[0, 8_000, 16_000], 20.0),
    ] {
        let (candidates, found) = kept(limit, unknown);
        assert_eq!((&candidates[..], excess(found)), (left, late), "{limit} ms without {unknown}");
    }
    assert_eq!(keep_within(&mut Vec::new(), SECOND, |_| 1.0), None);
}

#[test]
fn an_idle_engine_reads_only_the_prompt_itself() {
    let known = ForecastTerms::default();
    let busy = Candidate { own_backlog: 80_000, ..candidate(0, known, 80_000, 16_000) };
    let found = |candidates: &[Candidate], trust: f64| {
        least_idle(candidates, |_| trust).map(|idle| (idle.as_secs_f64() * 1e3).round())
    };
    assert_eq!(found(&[busy], 1.0), Some(2_020.0));
    assert_eq!(found(&[busy, candidate(1, known, 0, 24_000)], 1.0), Some(2_020.0), "the least one");
    assert_eq!(found(&[busy, candidate(1, known, 0, 8_000)], 1.0), Some(1_020.0));
    assert_eq!(found(&[busy], 0.5), Some(1_010.0));
    assert_eq!((found(&[busy], 0.0), found(&[busy], 9.0)), (Some(0.0), Some(2_020.0)));
    assert_eq!(found(&[], 1.0), None);
}

fn any_terms() -> impl Strategy<Value = ForecastTerms> {
    (1e-4f32..60.0, 1e-7f32..1e-2).prop_map(|(base, per_token)| terms(base, per_token))
}

proptest! {
    #[test]
    fn more_tokens_never_make_a_forecast_earlier(
        terms in any_terms(), ahead: u64, uncached: u64, more: u64, which: bool,
        own_backlog: u64, head_millis: u32,
    ) {
        let forecast = |ahead, uncached| {
            forecast(&Candidate { own_backlog, head_millis, ..candidate(0, terms, ahead, uncached) })
        };
        let before = forecast(ahead, uncached);
        let (ahead, uncached) = match which {
            true => (ahead.saturating_add(more), uncached),
            false => (ahead, uncached.saturating_add(more)),
        };
        let after = forecast(ahead, uncached);
        prop_assert!(before <= after, "{before:?} {after:?}");
        prop_assert!(after <= Duration::from_secs_f64(MAX_SECONDS));
    }

    #[test]
    fn an_answer_moves_a_forecast_towards_its_time_and_by_a_bound(
        terms in any_terms(),
        tokens in prop_oneof![0u64..100_000, any::<u64>()],
        nanos: u64,
        answers in 50u32..,
    ) {
        let actual = Duration::from_nanos(nanos);
        let corrected = terms.corrected(tokens, actual, answers);
        let (before, after) = (terms.seconds(tokens), corrected.seconds(tokens));
        let (ratio, actual) = (after / before, actual.as_secs_f64());
        // f32 has seven digits.
        prop_assert!((0.965..1.036).contains(&ratio), "{ratio}");
        let towards = (ratio - 1.0) * (actual - before);
        prop_assert!(towards >= -1e-5 * actual.max(before), "{before} {after} {actual}");
        prop_assert_eq!(ForecastTerms::from_bits(corrected.to_bits()), corrected);
    }

    #[test]
    fn terms_stay_within_their_bounds(steps in prop::collection::vec((any::<u32>(), any::<u64>()), 1..500)) {
        let mut terms = ForecastTerms::default();
        for (answers, (tokens, nanos)) in (0..).zip(steps) {
            terms = terms.corrected(tokens.into(), Duration::from_nanos(nanos), answers);
            prop_assert!((BASE_RANGE.0 as f32..=BASE_RANGE.1 as f32).contains(&terms.base));
            prop_assert!((PER_TOKEN_RANGE.0 as f32..=PER_TOKEN_RANGE.1 as f32).contains(&terms.per_token));
        }
    }
}
