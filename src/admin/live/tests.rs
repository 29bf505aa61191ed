//! Tests of the live feed: late, slow and too many viewers on one overview.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use super::*;

/// A feed with numbered overviews, each with a choice of its number, and the number of them.
fn feed() -> (Arc<LiveFeed>, Arc<AtomicU64>) {
    let made = Arc::new(AtomicU64::new(0));
    let count = made.clone();
    let feed = LiveFeed::new(move || {
        let number = count.fetch_add(1, Ordering::Relaxed) + 1;
        let choices: Vec<u64> = (1..=number).rev().collect();
        OverviewFrame::of(&format!("{{\"n\":{number}"), &choices)
    });
    (feed, made)
}

fn watch(feed: &Arc<LiveFeed>, query: &str) -> Result<impl Stream<Item = Bytes> + Send + use<>, StatusCode> {
    let request = Request::builder().uri(format!("/admin/live{query}")).body(Bytes::new());
    open(feed, &request.expect("is a request")).map(Response::into_body).map_err(|reject| reject.0)
}

fn text(event: Option<Bytes>) -> String {
    String::from_utf8(event.expect("the stream goes on").to_vec()).expect("events are text")
}

fn event(number: u64, choices: &str) -> String {
    format!("event: overview\ndata: {{\"n\":{number},\"decisions\":[{choices}]}}\n\n")
}

async fn until_idle(feed: &Arc<LiveFeed>) {
    while feed.table().frames.is_some() {
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn sends_an_event_at_once_and_then_at_each_interval() {
    let (feed, _) = feed();
    let start = Instant::now();
    for (query, interval) in [("", 1.0), ("?interval=0.5", 0.5), ("?interval=60", 60.0)] {
        let mut events = pin!(watch(&feed, query).expect("there is room"));
        for place in 0..4 {
            let before = Instant::now();
            events.next().await.expect("the stream goes on");
            let passed = before.elapsed().as_secs_f64();
            let wanted = if place == 0 { 0.0 } else { interval };
            assert!((passed - wanted).abs() < 0.05, "{passed} s for {wanted} s");
        }
    }
    assert!(start.elapsed() < Duration::from_secs(190));
}

#[tokio::test(start_paused = true)]
async fn a_viewer_that_is_late_gets_the_newest_and_all_choices_since_its_last_event() {
    let (feed, _) = feed();
    let mut events = pin!(watch(&feed, "").expect("there is room"));
    assert_eq!(text(events.next().await), event(1, "1"));
    assert_eq!(text(events.next().await), event(2, "2"));
    sleep(Duration::from_millis(3500)).await;
    assert_eq!(text(events.next().await), event(5, "5,4,3"), "nothing was queued");
    assert_eq!(text(events.next().await), event(6, "6"));
}

#[tokio::test(start_paused = true)]
async fn one_overview_serves_all_viewers_and_none_is_made_without_them() {
    let (feed, made) = feed();
    let mut streams: Vec<_> = (0..10).map(|_| Box::pin(watch(&feed, "").expect("there is room"))).collect();
    for number in 1..=5 {
        for events in &mut streams {
            assert_eq!(text(events.next().await), event(number, &number.to_string()));
        }
    }
    assert_eq!(made.load(Ordering::Relaxed), 5);
    drop(streams);
    until_idle(&feed).await;
    sleep(Duration::from_secs(100)).await;
    assert_eq!(made.load(Ordering::Relaxed), 5, "no viewer is left");
    let mut events = pin!(watch(&feed, "").expect("there is room"));
    assert_eq!(text(events.next().await), event(6, "6,5,4,3,2,1"), "a new one, and not an old one");
}

#[tokio::test(start_paused = true)]
async fn a_quick_viewer_does_not_wait_for_a_slow_one() {
    let (feed, made) = feed();
    let mut slow = pin!(watch(&feed, "?interval=60").expect("there is room"));
    slow.next().await.expect("the stream goes on");
    sleep(Duration::from_secs(10)).await;
    let mut quick = Box::pin(watch(&feed, "?interval=0.5").expect("there is room"));
    assert_eq!(text(quick.next().await), event(2, "2,1"), "not the old one");
    for _ in 0..4 {
        let next = timeout(Duration::from_millis(600), quick.next()).await;
        next.expect("in time").expect("the stream goes on");
    }
    drop(quick);
    let before = made.load(Ordering::Relaxed);
    slow.next().await.expect("the stream goes on");
    assert_eq!(made.load(Ordering::Relaxed), before + 1, "again at the slow one's interval");
}

/// Regression: when the task that makes the overviews panicked, its viewers waited for ever.
#[tokio::test(start_paused = true)]
async fn a_failed_overview_ends_the_streams_and_the_next_viewer_gets_another_task() {
    let made = Arc::new(AtomicU64::new(0));
    let count = made.clone();
    let feed = LiveFeed::new(move || {
        let number = count.fetch_add(1, Ordering::Relaxed) + 1;
        assert_ne!(number, 3, "the third overview fails");
        OverviewFrame::of(&format!("{{\"n\":{number}"), &[number])
    });
    let mut streams: Vec<_> = (0..3).map(|_| Box::pin(watch(&feed, "").expect("there is room"))).collect();
    for number in 1..=2 {
        for events in &mut streams {
            assert_eq!(text(events.next().await), event(number, &number.to_string()));
        }
    }
    for events in &mut streams {
        let end = timeout(Duration::from_secs(5), events.next()).await.expect("not silent");
        assert_eq!(end, None, "the stream has ended");
    }
    // The others have not left yet.
    streams.pop();
    let mut again = pin!(watch(&feed, "").expect("there is room"));
    assert_eq!(text(again.next().await), event(4, "4"));
    assert_eq!(text(again.next().await), event(5, "5"));
}

#[tokio::test(start_paused = true)]
async fn admits_a_bounded_number_of_viewers() {
    let (feed, _) = feed();
    let mut streams: Vec<_> = (0..MAX_VIEWERS).map(|_| watch(&feed, "").ok()).collect();
    assert!(streams.iter().all(Option::is_some));
    assert_eq!(watch(&feed, "").err(), Some(StatusCode::SERVICE_UNAVAILABLE));
    streams.pop();
    assert!(watch(&feed, "").is_ok(), "a place is free");
}

#[tokio::test(start_paused = true)]
async fn rejects_intervals_that_are_none() {
    let (feed, _) = feed();
    for interval in ["0", "0.4", "61", "-1", "often", "nan", ""] {
        let refused = watch(&feed, &format!("?interval={interval}")).err();
        assert_eq!(refused, Some(StatusCode::BAD_REQUEST), "{interval}");
    }
}
