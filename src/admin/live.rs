//! `GET /admin/live`: the overview as server-sent events, `?interval=` seconds apart (0.5 to 60, 1 unless
//! given).
//!
//! ```text
//! event: overview
//! data: {...}            one line, as GET /admin/overview; decisions: those since this viewer's last event
//! ```
//!
//! One task makes the overviews for all viewers, and only while there are some. A viewer receives the newest
//! one: overviews that it could not take in time are skipped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderValue, Request, Response, StatusCode, header};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::answer::AdminReject;
use super::arguments::parameter;
use super::overview::OverviewFrame;
use crate::config::values::number_in;

/// The largest number of viewers at once.
const MAX_VIEWERS: usize = 64;

/// The seconds between two events for viewers that name none.
const DEFAULT_INTERVAL_SECONDS: f64 = 1.0;

const INTERVAL_SECONDS: std::ops::RangeInclusive<f64> = 0.5..=60.0;

/// The overviews, and their viewers.
pub(super) struct LiveFeed {
    overview: Box<dyn Fn() -> OverviewFrame + Send + Sync>,
    latest: watch::Sender<Option<Arc<LiveFrame>>>,
    table: Mutex<ViewerTable>,
    /// A viewer has come or gone.
    changed: Notify,
}

/// An overview, and when it was made.
struct LiveFrame {
    overview: OverviewFrame,
    made: Instant,
}

#[derive(Default)]
struct ViewerTable {
    /// The ids and intervals of the viewers.
    viewers: Vec<(u64, Duration)>,
    last_id: u64,
    /// The task that makes the overviews.
    maker: Option<JoinHandle<()>>,
}

/// One viewer, until it is dropped.
struct LiveViewer {
    feed: Arc<LiveFeed>,
    id: u64,
    interval: Duration,
    frames: watch::Receiver<Option<Arc<LiveFrame>>>,
    /// The number of the last choice that the viewer has received.
    last_decision: u64,
    /// When the overview of the next event is made at the earliest.
    next: Option<Instant>,
}

/// Opens a stream of overviews.
pub(super) fn open(
    feed: &Arc<LiveFeed>,
    request: &Request<Bytes>,
) -> Result<Response<impl Stream<Item = Bytes> + Send + use<>>, AdminReject> {
    let interval = parameter(request, "interval")
        .map_or(Ok(DEFAULT_INTERVAL_SECONDS), number_in(INTERVAL_SECONDS))
        .map_err(|what| AdminReject::problem(format!("interval: {what}")))?;
    let Some(viewer) = feed.enter(Duration::from_secs_f64(interval)) else {
        let error = format!("{MAX_VIEWERS} viewers are connected already, which is the limit");
        return Err(AdminReject::new(StatusCode::SERVICE_UNAVAILABLE, error));
    };
    let events = stream::unfold(viewer, async |mut viewer| Some((viewer.next_event().await?, viewer)));
    let mut answer = Response::new(events);
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // A proxy before this listener should not collect the events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(answer)
}

// === impl LiveFeed ===

impl LiveFeed {
    /// `overview` makes an overview.
    pub(super) fn new(overview: impl Fn() -> OverviewFrame + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(LiveFeed {
            overview: Box::new(overview),
            latest: watch::Sender::new(None),
            table: Mutex::default(),
            changed: Notify::new(),
        })
    }

    fn table(&self) -> MutexGuard<'_, ViewerTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a viewer, unless there are too many.
    fn enter(self: &Arc<Self>, interval: Duration) -> Option<LiveViewer> {
        let mut table = self.table();
        if table.viewers.len() >= MAX_VIEWERS {
            return None;
        }
        table.last_id += 1;
        let id = table.last_id;
        table.viewers.push((id, interval));
        let mut frames = self.latest.subscribe();
        // A task that panicked has finished, too.
        if table.maker.as_ref().is_none_or(JoinHandle::is_finished) {
            self.latest.send_replace(None);
            table.maker = Some(tokio::spawn(self.clone().make()));
        }
        let is_fresh = |frame: &Option<Arc<LiveFrame>>| {
            frame.as_ref().is_some_and(|frame| frame.made.elapsed() < interval)
        };
        if is_fresh(&frames.borrow_and_update()) {
            frames.mark_changed();
        }
        drop(table);
        self.changed.notify_one();
        Some(LiveViewer { feed: self.clone(), id, interval, frames, last_decision: 0, next: None })
    }

    /// Makes overviews until the last viewer has left.
    async fn make(self: Arc<Self>) {
        let mut made: Option<Instant> = None;
        while let Some(interval) = self.interval() {
            if let Some(made) = made {
                tokio::select! {
                    () = sleep_until(made + interval) => {}
                    () = self.changed.notified() => continue,
                }
            }
            let now = Instant::now();
            made = Some(now);
            let frame = LiveFrame { overview: (self.overview)(), made: now };
            self.latest.send_replace(Some(Arc::new(frame)));
        }
    }

    /// The shortest interval of a viewer. Without a viewer the task that makes the overviews must end.
    fn interval(&self) -> Option<Duration> {
        let mut table = self.table();
        let shortest = table.viewers.iter().map(|(_, interval)| *interval).min();
        if shortest.is_none() {
            table.maker = None;
            self.latest.send_replace(None);
        }
        shortest
    }
}

// === impl LiveViewer ===

impl LiveViewer {
    /// Waits for the next event.
    async fn next_event(&mut self) -> Option<Bytes> {
        let frame = loop {
            // The sender lives as long as the feed.
            self.frames.changed().await.ok()?;
            let frame = self.frames.borrow_and_update().clone();
            if let Some(frame) = frame.filter(|frame| self.next.is_none_or(|next| frame.made >= next)) {
                break frame;
            }
        };
        // A little early, so that the overview that is made then is not missed.
        self.next = Some(frame.made + self.interval.mul_f64(0.75));
        let document = frame.overview.document(self.last_decision);
        self.last_decision = frame.overview.last_decision().max(self.last_decision);
        Some(format!("event: overview\ndata: {document}\n\n").into())
    }
}

impl Drop for LiveViewer {
    fn drop(&mut self) {
        self.feed.table().viewers.retain(|(id, _)| *id != self.id);
        self.feed.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
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

    fn watch(
        feed: &Arc<LiveFeed>,
        query: &str,
    ) -> Result<impl Stream<Item = Bytes> + Send + use<>, StatusCode> {
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
        while feed.table().maker.is_some() {
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
        let mut streams: Vec<_> =
            (0..10).map(|_| Box::pin(watch(&feed, "").expect("there is room"))).collect();
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
}
