//! The events of one background response, kept for clients that connect later.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::watch;

use super::reply::{self, Reply};

/// The events of one response, by number.
#[derive(Debug)]
pub(super) struct EventLog {
    events: Mutex<Vec<Bytes>>,
    /// Whether the last event was added; notified of every event.
    ended: watch::Sender<bool>,
}

// === impl EventLog ===

impl EventLog {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(EventLog { events: Mutex::default(), ended: watch::Sender::new(false) })
    }

    /// Adds events.
    pub(super) fn append(&self, events: impl Iterator<Item = Bytes>) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).extend(events);
        self.ended.send_modify(|_| {});
    }

    /// Ends the log: no event follows.
    pub(super) fn end(&self) {
        self.ended.send_replace(true);
    }

    fn at(&self, number: usize) -> Option<Bytes> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).get(number).cloned()
    }

    /// Returns the stream of all events from number `from` on, up to the last.
    pub(super) fn follow(self: &Arc<Self>, from: usize) -> Reply {
        let state = (Arc::clone(self), self.ended.subscribe(), from);
        let frames = stream::unfold(state, |(log, mut ended, number)| async move {
            loop {
                let over = *ended.borrow_and_update();
                if let Some(event) = log.at(number) {
                    return Some((Ok(Frame::data(event)), (log, ended, number + 1)));
                }
                if over || ended.changed().await.is_err() {
                    return None;
                }
            }
        });
        let body: UnsyncBoxBody<Bytes, io::Error> = BodyExt::boxed_unsync(StreamBody::new(frames));
        reply::events(body)
    }
}
