//! Tests of the judgement over predictions: its limits and its reasons.

use proptest::prelude::*;

use super::*;

const LIMIT: f64 = 0.5;

fn after(answers: u32, predicted: u64, reported: Option<u64>) -> SightTracker {
    let mut tracker = SightTracker::default();
    for _ in 0..answers {
        tracker.answered(predicted, reported, LIMIT);
    }
    tracker
}

fn judged(answers: u32, predicted: u64, reported: Option<u64>) -> (&'static str, Option<SightReason>) {
    let sight = after(answers, predicted, reported).sight();
    (sight.state.label(), sight.reason)
}

#[test]
fn confirms_predictions_after_enough_answers() {
    let few = ("learnt", Some(SightReason::FewAnswers));
    assert_eq!(judged(0, 0, None), few);
    assert_eq!(judged(MIN_COMPARED_ANSWERS - 1, 9_000, Some(9_000)), few);
    for (predicted, reported) in [(9_000, 9_000), (9_000, 5_000), (0, 0), (0, 200), (100, 0), (640, 896)] {
        assert_eq!(judged(MIN_COMPARED_ANSWERS, predicted, Some(reported)), ("exact", None), "{predicted}");
    }
}

#[test]
fn finds_wrong_predictions_in_both_directions() {
    let much = ("blind", Some(SightReason::PredictsTooMuch(97)));
    assert_eq!(judged(16, 10_000, Some(0)), much);
    assert_eq!(judged(16, 0, Some(10_000)), ("blind", Some(SightReason::PredictsTooLittle(97))));
    assert_eq!(judged(16, 1_000, Some(0)).0, "learnt", "too few tokens");
    assert_eq!(judged(22, 1_000, Some(0)).0, "blind");
}

#[test]
fn reports_missing_usage_details_until_they_come() {
    assert_eq!(judged(MIN_SILENT_ANSWERS - 1, 500, None).1, Some(SightReason::FewAnswers));
    let mut tracker = after(MIN_SILENT_ANSWERS, 500, None);
    assert_eq!(tracker.sight().reason, Some(SightReason::NoUsageDetails));
    let change = tracker.answered(500, Some(500), LIMIT).expect("a change");
    assert_eq!(change.from.reason, Some(SightReason::NoUsageDetails));
    assert_eq!(change.to.reason, Some(SightReason::FewAnswers));
}

#[test]
fn an_engine_without_prefix_caching_blinds_until_it_restarts() {
    let mut tracker = after(100, 0, Some(0));
    let change = tracker.set_prefix_caching(false).expect("a change");
    assert_eq!((change.from.state, change.to.state), (SightState::Exact, SightState::Blind));
    assert_eq!(tracker.set_prefix_caching(false), None, "only changes are reported");
    assert_eq!(tracker.answered(0, Some(0), LIMIT), None);
    assert_eq!(tracker.reset().map(|change| change.to), Some(Sight::UNKNOWN));
    assert_eq!(tracker.set_prefix_caching(true), None);
    assert_eq!(tracker.reset(), None);
}

#[test]
fn changes_once_while_the_error_stays_around_the_limit() {
    let mut tracker = after(100, 10_000, Some(10_000));
    let mut changes = 0;
    for round in 0..400_u64 {
        let reported = if round % 2 == 0 { 4_300 } else { 5_200 };
        changes += u32::from(tracker.answered(10_000, Some(reported), LIMIT).is_some());
    }
    assert_eq!((changes, tracker.sight().state), (1, SightState::Blind));
    let back = (0..400).find(|_| tracker.answered(10_000, Some(9_900), LIMIT).is_some());
    assert!(back.is_some_and(|answers| answers < 60), "{back:?}");
    assert_eq!(tracker.sight().state, SightState::Exact);
}

#[test]
fn follows_the_setting() {
    let mut tracker = after(100, 10_000, Some(7_000));
    assert_eq!(tracker.sight().state, SightState::Exact);
    let change = tracker.answered(10_000, Some(7_000), 0.1).expect("a change");
    assert_eq!(change.to.reason.map(SightReason::label), Some("predicts_too_much"));
}

proptest! {
    #[test]
    fn any_reports_give_a_reason_unless_exact(
        answers in prop::collection::vec((any::<u64>(), any::<Option<u64>>()), 0..80),
        limit in 0.0..1.0_f64,
    ) {
        let mut tracker = SightTracker::default();
        for (predicted, reported) in answers {
            let before = tracker.sight();
            let change = tracker.answered(predicted, reported, limit);
            prop_assert_eq!(change.is_none(), before.is_like(&tracker.sight()));
            let sight = tracker.sight();
            prop_assert_eq!(sight.state == SightState::Exact, sight.reason.is_none());
        }
    }
}
