//! Responses that are generated without a client: each in a task of its own. Where one was requested as a
//! stream all its events are kept, so that a client that connects later receives them from any number on.
//!
//! Never waits for a reader.

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
use super::responses::{ResponseProgress, ResponsesReplyForm};
use super::responses_stream::ResponseTalk;
use super::run::EngineCall;
use super::stream::{EventWriter, ReplyEvents};

/// The events of one response, each in the place of its number.
#[derive(Debug)]
pub struct EventLog {
    events: Mutex<Vec<Bytes>>,
    /// Whether there will be no more; moves with every event.
    ended: watch::Sender<bool>,
}

// === impl Log ===

impl EventLog {
    fn new() -> Arc<Self> {
        Arc::new(EventLog { events: Mutex::default(), ended: watch::Sender::new(false) })
    }

    fn take_in(&self, events: &mut ReplyEvents) {
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
pub fn begin(call: &EngineCall, form: ResponsesReplyForm, generation: Generation, streams: bool) -> Reply {
    let store = &call.shared.store;
    let begun = form.response(if streams { ResponseProgress::Running } else { ResponseProgress::Queued });
    let id = form.id.clone();
    form.keep(store, &begun);
    let log = EventLog::new();
    let answer = if streams { log.follow(0) } else { reply::ok(&begun) };
    store.attach_log(&id, streams.then(|| Arc::clone(&log)));
    let talk = ResponseTalk::new(form, Arc::clone(&call.shared));
    let task = tokio::spawn(work(generation, talk, EndLogOnDrop(log)));
    store.attach(&id, task.abort_handle());
    answer
}

/// Ends the log also when the work is cancelled.
struct EndLogOnDrop(Arc<EventLog>);

impl Drop for EndLogOnDrop {
    fn drop(&mut self) {
        self.0.ended.send_replace(true);
    }
}

async fn work(mut generation: Generation, mut talk: ResponseTalk, ending: EndLogOnDrop) {
    let mut events = ReplyEvents::default();
    talk.open(&mut events);
    ending.0.take_in(&mut events);
    loop {
        let step = generation.next().await;
        talk.write(step, &mut events);
        ending.0.take_in(&mut events);
        if step == Step::End {
            return;
        }
    }
}
