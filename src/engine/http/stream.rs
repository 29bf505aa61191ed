//! Server-sent events: one event a chunk, each written to the socket before the next one is built.
//!
//! An `EventWriter` for each API builds the events; this module decides their timing and injects faults.

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

use super::connection_state::ConnectionState;
use super::driver::{Generation, Step};
use super::error::ApiError;
use super::fault::InjectedFault;
use super::reply::{self, Reply};
use super::run::EngineCall;
use super::shared::EngineShared;

/// The pause before a connection breaks, so that the events sent so far reach the client.
const CUT_PAUSE: Duration = Duration::from_millis(20);

/// Turns steps of the engine into events of one API.
pub(super) trait EventWriter: Send + 'static {
    /// Writes the events that come before the first step of the engine.
    fn open(&mut self, _events: &mut ReplyEvents) {}
    fn write(&mut self, step: Step, events: &mut ReplyEvents);
    /// Writes the events of a failed generation.
    fn fail(&mut self, error: &ApiError, events: &mut ReplyEvents);
}

/// Events ready to be sent.
#[derive(Debug, Default)]
pub(super) struct ReplyEvents(VecDeque<Bytes>);

struct EventStream {
    generation: Generation,
    writer: Box<dyn EventWriter>,
    events: ReplyEvents,
    fault: Option<InjectedFault>,
    sent: usize,
    ended: bool,
    connection: Arc<ConnectionState>,
    shared: Arc<EngineShared>,
    silence: u64,
}

// === impl ReplyEvents ===

impl ReplyEvents {
    pub(super) fn data(&mut self, value: &Value) {
        self.0.push_back(Bytes::from(format!("data: {value}\n\n")));
    }

    pub(super) fn event(&mut self, name: &str, value: &Value) {
        self.0.push_back(Bytes::from(format!("event: {name}\ndata: {value}\n\n")));
    }

    pub(super) fn take(&mut self) -> impl Iterator<Item = Bytes> {
        self.0.drain(..)
    }

    pub(super) fn done(&mut self) {
        self.0.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }
}

/// Returns the streamed answer of a generation.
pub(super) fn answer(call: &EngineCall, generation: Generation, writer: impl EventWriter) -> Reply {
    let mut stream = EventStream {
        generation,
        writer: Box::new(writer),
        events: ReplyEvents::default(),
        fault: call.fault.clone(),
        sent: 0,
        ended: false,
        connection: Arc::clone(&call.connection),
        shared: Arc::clone(&call.shared),
        silence: call.silence,
    };
    if let Some(InjectedFault::ErrorEvent { status }) = stream.fault {
        stream.writer.fail(&ApiError::generation(status), &mut stream.events);
        stream.ended = true;
    } else {
        stream.writer.open(&mut stream.events);
    }
    reply::events(body(stream))
}

fn body(stream: EventStream) -> UnsyncBoxBody<Bytes, io::Error> {
    let frames = stream::unfold(Some(stream), |stream| async {
        let mut stream = stream?;
        match stream.next().await? {
            Ok(event) => Some((Ok(Frame::data(event)), Some(stream))),
            Err(error) => Some((Err(error), None)),
        }
    });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

// === impl EventStream ===

impl EventStream {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        // Lets hyper write the event before, so that each event is a write of its own.
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
                // The simulated process is shutting down; only the client can end the stream.
                std::future::pending::<()>().await;
            }
            self.writer.write(step, &mut self.events);
            self.ended = step == Step::End;
        }
    }

    /// Applies a fault between the events sent and the next one.
    async fn interrupted(&mut self) -> Option<io::Error> {
        match self.fault {
            Some(InjectedFault::StallStream { events }) if self.sent >= events => {
                std::future::pending().await
            }
            Some(InjectedFault::CutStream { events, reset }) if self.sent >= events => {
                tokio::time::sleep(CUT_PAUSE).await;
                if reset {
                    self.connection.end_with_reset();
                }
                Some(io::Error::other("simulated cut"))
            }
            _ => None,
        }
    }
}
