//! Responses that are made without a client: each in a task of its own, and, where it was asked for as a
//! stream, with all its events kept, so that whoever comes later hears them from the one it names on.
//!
//! Never: wait for who listens.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::watch;

use super::driver::{Generation, Step};
use super::reply::{self, Reply};
use super::responses::{Form, Progress};
use super::responses_stream::ResponseTalk;
use super::run::Call;
use super::stream::{Events, Talk};

/// The events of one response, each in the place of its number.
#[derive(Debug)]
pub struct Log {
    events: Mutex<Vec<Bytes>>,
    /// Whether there will be no more; moves with every event.
    ended: watch::Sender<bool>,
}

// === impl Log ===

impl Log {
    fn new() -> Arc<Self> {
        Arc::new(Log { events: Mutex::default(), ended: watch::Sender::new(false) })
    }

    fn take_in(&self, events: &mut Events) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).extend(events.take());
        self.ended.send_modify(|_| {});
    }

    fn at(&self, number: usize) -> Option<Bytes> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).get(number).cloned()
    }

    /// The stream from this event on, up to the last that there will be.
    pub fn follow(self: &Arc<Self>, from: usize) -> Reply {
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

/// Answers at once; the engine goes on without a client until it is done or cancelled.
pub fn begin(call: &Call, form: Form, generation: Generation, streams: bool) -> Reply {
    let store = &call.shared.store;
    let begun = form.response(if streams { Progress::Running } else { Progress::Queued });
    let id = form.id.clone();
    form.keep(store, &begun);
    let log = Log::new();
    let answer = if streams { log.follow(0) } else { reply::ok(&begun) };
    store.attach_log(&id, streams.then(|| Arc::clone(&log)));
    let talk = ResponseTalk::new(form, Arc::clone(&call.shared));
    let task = tokio::spawn(work(generation, talk, Ending(log)));
    store.attach(&id, task.abort_handle());
    answer
}

/// Ends the log also when the work is cancelled.
struct Ending(Arc<Log>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.ended.send_replace(true);
    }
}

async fn work(mut generation: Generation, mut talk: ResponseTalk, ending: Ending) {
    let mut events = Events::default();
    talk.open(&mut events);
    ending.0.take_in(&mut events);
    loop {
        let step = generation.next().await;
        talk.tell(step, &mut events);
        ending.0.take_in(&mut events);
        if step == Step::End {
            return;
        }
    }
}
