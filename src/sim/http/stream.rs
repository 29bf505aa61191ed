//! Server-sent events: one event a chunk, each handed to the socket before the next is made.
//!
//! What is said is up to a `Talk`, one per API; when it is said, and how it breaks off, is decided here.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::Value;

use super::connection::Connection;
use super::driver::{Generation, Step};
use super::error::ApiError;
use super::fault::Fault;
use super::reply::{self, Reply};
use super::run::Call;
use super::shared::Shared;

/// Time for what was said to reach the client before the connection breaks.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// Turns steps of the engine into events of one API.
pub trait Talk: Send + 'static {
    /// What is said before the engine has done anything.
    fn open(&mut self, _events: &mut Events) {}
    fn tell(&mut self, step: Step, events: &mut Events);
    /// The generation failed.
    fn fail(&mut self, error: &ApiError, events: &mut Events);
}

/// Events ready to be sent.
#[derive(Debug, Default)]
pub struct Events(VecDeque<Bytes>);

struct Speaker {
    generation: Generation,
    talk: Box<dyn Talk>,
    events: Events,
    fault: Option<Fault>,
    sent: usize,
    ended: bool,
    connection: Arc<Connection>,
    shared: Arc<Shared>,
    silence: u64,
}

// === impl Events ===

impl Events {
    pub fn data(&mut self, value: &Value) {
        self.0.push_back(Bytes::from(format!("data: {value}\n\n")));
    }

    pub fn event(&mut self, name: &str, value: &Value) {
        self.0.push_back(Bytes::from(format!("event: {name}\ndata: {value}\n\n")));
    }

    pub fn take(&mut self) -> impl Iterator<Item = Bytes> {
        self.0.drain(..)
    }

    pub fn done(&mut self) {
        self.0.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }
}

/// The streamed answer of a generation.
pub fn answer(call: &Call, generation: Generation, talk: impl Talk) -> Reply {
    let mut speaker = Speaker {
        generation,
        talk: Box::new(talk),
        events: Events::default(),
        fault: call.fault.clone(),
        sent: 0,
        ended: false,
        connection: Arc::clone(&call.connection),
        shared: Arc::clone(&call.shared),
        silence: call.silence,
    };
    if let Some(Fault::ErrorEvent { status }) = speaker.fault {
        speaker.talk.fail(&ApiError::generation(status), &mut speaker.events);
        speaker.ended = true;
    } else {
        speaker.talk.open(&mut speaker.events);
    }
    reply::events(body(speaker))
}

fn body(speaker: Speaker) -> UnsyncBoxBody<Bytes, io::Error> {
    let frames = stream::unfold(Some(speaker), |speaker| async {
        let mut speaker = speaker?;
        match speaker.next().await? {
            Ok(event) => Some((Ok(Frame::data(event)), Some(speaker))),
            Err(error) => Some((Err(error), None)),
        }
    });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

// === impl Speaker ===

impl Speaker {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        // Gives hyper the chance to write what it has: each event shall be a write of its own.
        tokio::task::yield_now().await;
        loop {
            if (!self.events.0.is_empty() || self.ended)
                && let Some(cut) = self.interrupted().await
            {
                return Some(Err(cut));
            }
            if let Some(event) = self.events.0.pop_front() {
                self.sent += 1;
                return Some(Ok(event));
            }
            if self.ended {
                return None;
            }
            let step = self.generation.next().await;
            if self.shared.silence() != self.silence {
                // The process that would speak is shutting down; only the client can end this.
                std::future::pending::<()>().await;
            }
            self.talk.tell(step, &mut self.events);
            self.ended = step == Step::End;
        }
    }

    /// What stands between the events sent and the next one.
    async fn interrupted(&mut self) -> Option<io::Error> {
        match self.fault {
            Some(Fault::StallStream { events }) if self.sent >= events => std::future::pending().await,
            Some(Fault::CutStream { events, reset }) if self.sent >= events => {
                tokio::time::sleep(LAST_WORDS).await;
                if reset {
                    self.connection.end_with_reset();
                }
                Some(io::Error::other("simulated cut"))
            }
            _ => None,
        }
    }
}
