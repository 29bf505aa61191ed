//! Tests of the publisher: what is published after changes and losses.

use super::*;

fn gauges(active: u64) -> SiblingLoad {
    SiblingLoad { active, backlog: active, context: active }
}

/// Returns the update for this load, sorted by name, and whether it is complete.
fn update(publisher: &mut Publisher, flight: &[(&str, u64)]) -> Option<(bool, Vec<(String, u64)>)> {
    let (changed, _) =
        publisher.read_gauges(|tell| flight.iter().for_each(|(name, number)| tell(name, gauges(*number))));
    let update = publisher.gauge_update()?;
    let mut rows: Vec<(String, u64)> =
        update.rows.iter().map(|(name, gauges)| (name.to_string(), gauges.active)).collect();
    rows.sort();
    assert!(changed || update.whole);
    Some((update.whole, rows))
}

fn rows(all: &[(&str, u64)]) -> Vec<(String, u64)> {
    all.iter().map(|(name, number)| (name.to_string(), *number)).collect()
}

/// Regression: two writes of the list with no message between them, as after a connection was opened, had
/// one mark, so that a sibling that had read the list between them missed the second.
#[tokio::test(start_paused = true)]
async fn every_write_of_the_list_has_another_mark() {
    let mut publisher = Publisher::new();
    let marks = [publisher.next_mark(7), publisher.next_mark(7)];
    assert_eq!(marks, ["0000000000000007-1", "0000000000000007-2"]);
}

#[tokio::test(start_paused = true)]
async fn publishes_only_changed_gauges_and_all_after_a_loss() {
    let mut publisher = Publisher::new();
    let first = [("a", 1), ("b", 2), ("c", 0)];
    assert_eq!(update(&mut publisher, &first), Some((true, rows(&[("a", 1), ("b", 2)]))));
    assert_eq!(
        update(&mut publisher, &first),
        Some((true, rows(&[("a", 1), ("b", 2)]))),
        "the message was not accepted"
    );
    publisher.published(now());
    assert_eq!(update(&mut publisher, &first), None);
    assert_eq!(update(&mut publisher, &[("a", 1), ("b", 5)]), Some((false, rows(&[("b", 5)]))));
    publisher.published(now());
    // An upstream without requests in flight, or one that is gone, is reported once.
    assert_eq!(update(&mut publisher, &[("b", 0)]), Some((false, rows(&[("a", 0), ("b", 0)]))));
    publisher.published(now());
    assert_eq!((update(&mut publisher, &[("b", 0)]), publisher.gauges.len()), (None, 0));
    update(&mut publisher, &[("b", 1)]);
    publisher.published(now());
    publisher.republish_all();
    assert_eq!(update(&mut publisher, &[("b", 1)]), Some((true, rows(&[("b", 1)]))));
}

/// Returns the milliseconds until the next round.
async fn next_round(rounds: &mut PublishRounds, outbox: &Outbox) -> u128 {
    let start = now();
    rounds.next(outbox).await;
    now().saturating_duration_since(start).as_millis()
}

/// Requests that siblings choose for in the same interval would go to the same upstream.
#[tokio::test(start_paused = true)]
async fn a_request_after_an_interval_without_a_message_is_published_at_once() {
    let outbox = Outbox::default();
    let mut rounds = PublishRounds::new(Duration::from_millis(20));
    assert_eq!(next_round(&mut rounds, &outbox).await, 0);
    assert_eq!(next_round(&mut rounds, &outbox).await, 20);
    rounds.end(false);
    tokio::time::sleep(Duration::from_millis(7)).await;
    outbox.request_sent();
    assert_eq!(next_round(&mut rounds, &outbox).await, 0);
    // One message in an interval at most, and one look for changes.
    for has_published in [true, false] {
        rounds.end(has_published);
        (0..100).for_each(|_| outbox.request_sent());
        assert_eq!(next_round(&mut rounds, &outbox).await, 20);
        rounds.end(false);
        assert_eq!(next_round(&mut rounds, &outbox).await, 0, "requests were sent");
    }
    // Without a request, the ticks come as before.
    rounds.end(true);
    for _ in 0..2 {
        assert_eq!(next_round(&mut rounds, &outbox).await, 20);
        rounds.end(false);
    }
}
