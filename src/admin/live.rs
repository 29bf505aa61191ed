//! `GET /admin/live`: the overview as server-sent events, `?interval=` seconds apart (0.5 to 60, 1 unless
//! given).
//!
//! ```text
//! event: overview
//! data: {...}            one line, as GET /admin/overview; decisions: those since this viewer's last event
//! ```
//!
//! One task makes the overviews for all viewers, and only while there are some. A viewer receives the newest
//! one: overviews that it could not take in time are skipped. When the task fails, all streams end, and the
//! next viewer starts another task.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderValue, Request, Response, StatusCode, header};
use tokio::sync::{Notify, watch};
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
    table: Mutex<ViewerTable>,
    /// A viewer has come or gone.
    changed: Notify,
}

/// An overview, and when it was made.
struct LiveFrame {
    overview: OverviewFrame,
    made: Instant,
}

/// The newest overview; `None` before the first one. The sender is the task's that makes them, so that the
/// channel closes when the task ends, however it ends.
type FrameReceiver = watch::Receiver<Option<Arc<LiveFrame>>>;

#[derive(Default)]
struct ViewerTable {
    /// The ids and intervals of the viewers.
    viewers: Vec<(u64, Duration)>,
    last_id: u64,
    /// The overviews of the task that makes them.
    frames: Option<FrameReceiver>,
}

/// One viewer, until it is dropped.
struct LiveViewer {
    feed: Arc<LiveFeed>,
    id: u64,
    interval: Duration,
    frames: FrameReceiver,
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
        Arc::new(LiveFeed { overview: Box::new(overview), table: Mutex::default(), changed: Notify::new() })
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
        // The channel of a task that panicked is closed.
        let running = table.frames.clone().filter(|frames| frames.has_changed().is_ok());
        let mut frames = running.unwrap_or_else(|| {
            let (latest, frames) = watch::channel(None);
            tokio::spawn(self.clone().make(latest));
            frames
        });
        table.frames = Some(frames.clone());
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
    async fn make(self: Arc<Self>, latest: watch::Sender<Option<Arc<LiveFrame>>>) {
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
            latest.send_replace(Some(Arc::new(frame)));
        }
    }

    /// The shortest interval of a viewer. Without a viewer the task that makes the overviews must end.
    fn interval(&self) -> Option<Duration> {
        let mut table = self.table();
        let shortest = table.viewers.iter().map(|(_, interval)| *interval).min();
        if shortest.is_none() {
            table.frames = None;
        }
        shortest
    }
}

// === impl LiveViewer ===

impl LiveViewer {
    /// Waits for the next event; `None`: no more will come.
    async fn next_event(&mut self) -> Option<Bytes> {
        let frame = loop {
            // The channel closes with the task that makes the overviews.
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
mod tests;
