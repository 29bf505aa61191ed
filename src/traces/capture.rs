//! The capture of one call, while its request and its answer are forwarded.
//!
//! It copies the answer's pieces, as the upstream sent them, into a buffer that goes to the writer when it is
//! full and when the call ends. Of an event that the relay has read it copies the token only. A capture that
//! is dropped ends its call as incomplete.
//!
//! Never: an await, a parse, more than one buffer of an answer.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::assemble::AnswerBuffer;
use super::queue::{AnswerForm, CaptureMark, EndedCall, TraceMessage};
use super::record::{CallFacts, TraceApi, TraceError};
use super::shared::SharedTraces;
use crate::reply::token_event::TokenEvent;

/// The size at which the buffered part of an answer goes to the writer: it stays in a core's cache.
pub(crate) const MAX_BUFFERED_BYTES: usize = 8 << 10;

/// The first room of the buffer: short answers need no more.
const FIRST_BUFFER_BYTES: usize = 1 << 10;

/// The facts of a call at the beginning of its capture.
pub struct CaptureStart {
    pub trace_id: String,
    pub session_id: String,
    pub api: TraceApi,
    pub client_model: Option<String>,
    pub request_id: String,
    /// The body as it goes to the upstream.
    pub request: Bytes,
    /// A text that is sent inside of it, and where.
    pub inserted: Option<(usize, &'static [u8])>,
    pub begun: Instant,
    pub cumulative: Option<String>,
}

/// The capture of one call.
pub struct Capture {
    traces: Arc<SharedTraces>,
    mark: Arc<CaptureMark>,
    begun: Instant,
    /// `None`: the call has ended.
    call: Option<Box<EndedCall>>,
}

impl Capture {
    pub(super) fn new(traces: Arc<SharedTraces>, start: CaptureStart, weight_version: Option<i64>) -> Self {
        let arrived = SystemTime::now() - start.begun.elapsed();
        let arrived = arrived.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let facts = CallFacts {
            trace_id: start.trace_id,
            session_id: start.session_id,
            api: start.api,
            stream: false,
            client_model: start.client_model,
            request_id: start.request_id,
            weight_version,
            arrived,
            latency: Duration::ZERO,
            first_token: None,
            queued: None,
            upstream: None,
            attempts: 0,
            status: 0,
            error: None,
            partial: false,
            cumulative: start.cumulative,
        };
        let call = EndedCall {
            facts,
            request: start.request,
            inserted: start.inserted,
            answer: None,
            rest: AnswerBuffer::default(),
            replaced: None,
            stored: None,
            pending: None,
        };
        let mark = CaptureMark::new(traces.next_mark());
        Capture { traces, mark, begun: start.begun, call: Some(Box::new(call)) }
    }

    /// Records the beginning of an attempt.
    pub fn attempt(&mut self, upstream: &str, attempts: u32) {
        let Some(call) = &mut self.call else { return };
        call.facts.queued.get_or_insert_with(|| self.begun.elapsed());
        call.facts.upstream = Some(upstream.to_string());
        call.facts.attempts = attempts;
    }

    /// Begins an upstream's answer, and discards the parts of another attempt's answer.
    pub fn answer(&mut self, status: u16, stream: bool) {
        let Some(call) = &mut self.call else { return };
        if call.answer.is_some() {
            self.traces.queue.discard(&self.mark);
            self.mark = CaptureMark::new(self.traces.next_mark());
            call.rest.clear();
            call.facts.first_token = None;
        }
        (call.facts.status, call.facts.stream) = (status, stream);
        call.answer = Some(AnswerForm { api: call.facts.api, stream, status });
    }

    /// Replaces the upstream's whole answer, an error, by the balancer's own, which begins now.
    pub fn replace(&mut self, error: &[u8]) {
        if let Some(call) = &mut self.call {
            call.replaced = Some(error.into());
        }
    }

    /// Copies the next piece of the answer.
    pub fn piece(&mut self, piece: &[u8]) {
        if !piece.is_empty() {
            self.append(AnswerBuffer::piece_bytes(piece), |buffer| buffer.push_piece(piece));
        }
    }

    /// Copies a token in place of its event, which comes between two events of the answer.
    pub fn token(&mut self, token: &TokenEvent<'_>) {
        self.append(AnswerBuffer::token_bytes(token), |buffer| buffer.push_token(token));
    }

    /// Appends at most so many bytes to the buffer.
    fn append(&mut self, bytes: usize, push: impl FnOnce(&mut AnswerBuffer)) {
        let Some(call) = self.call.as_mut() else { return };
        let Some(form) = call.answer else { return };
        call.facts.first_token.get_or_insert_with(|| self.begun.elapsed());
        if self.mark.is_dropped() {
            // No part of the call is stored any more.
            self.traces.queue.buffer_goes(std::mem::take(&mut call.rest).capacity());
            return;
        }
        let length = call.rest.len() + bytes;
        if length > call.rest.capacity() {
            // Twice: a short answer takes little, and a long one is not moved again and again.
            let room = if length <= FIRST_BUFFER_BYTES { FIRST_BUFFER_BYTES } else { MAX_BUFFERED_BYTES };
            let before = call.rest.capacity();
            call.rest.reserve(room.max(length));
            self.traces.queue.buffer_grows(call.rest.capacity() - before);
        }
        push(&mut call.rest);
        if call.rest.len() >= MAX_BUFFERED_BYTES {
            let part = std::mem::take(&mut call.rest);
            self.traces.queue.buffer_goes(part.capacity());
            self.traces.push(TraceMessage::Piece { mark: self.mark.clone(), form, part });
        }
    }

    /// Records an answer of the balancer itself, with this status.
    pub fn refuse(&mut self, status: u16) {
        if let Some(call) = &mut self.call {
            call.answer = None;
            call.facts.status = status;
        }
    }

    /// Ends the call; without an error its answer is complete.
    pub fn end(&mut self, error: Option<TraceError>) {
        self.finish(error, None);
    }

    /// As `end`; the returned receiver is notified once the trace is stored.
    pub fn end_stored(&mut self, error: Option<TraceError>) -> oneshot::Receiver<()> {
        let (told, heard) = oneshot::channel();
        self.finish(error, Some(told));
        heard
    }

    /// The session, until the call has ended.
    pub fn session(&self) -> Option<&str> {
        self.call.as_ref().map(|call| call.facts.session_id.as_str())
    }

    /// Records the way in which the cumulative token mode serves the call.
    pub fn set_cumulative(&mut self, way: String) {
        if let Some(call) = &mut self.call {
            call.facts.cumulative = Some(way);
        }
    }

    pub fn is_ended(&self) -> bool {
        self.call.is_none()
    }

    fn finish(&mut self, error: Option<TraceError>, stored: Option<oneshot::Sender<()>>) {
        let Some(mut call) = self.call.take() else { return };
        let facts = &mut call.facts;
        facts.latency = self.begun.elapsed();
        facts.partial = error.is_some() && call.answer.is_some() && call.replaced.is_none();
        facts.error = error.or(TraceError::of_status(facts.status));
        call.stored = stored;
        call.pending = self.traces.pending_turn(&call.facts);
        self.traces.queue.buffer_goes(call.rest.capacity());
        self.traces.push(TraceMessage::End { mark: self.mark.clone(), call });
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.finish(Some(TraceError::Incomplete), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::TracesConfig;
    use crate::observe::Observer;
    use crate::route::capture::AnswerCleanup;
    use crate::route::dialect::BodyDialect;
    use crate::route::rewrite::AddedAnswerFields;
    use crate::traces::Traces;
    use crate::traces::assemble::AnswerAssembler;

    fn start() -> CaptureStart {
        CaptureStart {
            trace_id: "t".into(),
            session_id: "s".into(),
            api: TraceApi::Chat,
            client_model: None,
            request_id: "r".into(),
            request: Bytes::new(),
            inserted: None,
            begun: Instant::now(),
            cumulative: None,
        }
    }

    /// A stream of a chat with tokens in the form of engines, and with events that are left to the parser.
    fn chat() -> String {
        let event = |delta: &str, logprobs: &str, more: &str, end: &str| {
            format!(
                "data: {{\"id\":\"c\",\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{delta},\
                 \"logprobs\":{logprobs},\"finish_reason\":{more}}}]}}{end}"
            )
        };
        let token = |text: &str, id: u32, end: &str| {
            let logprobs = format!(
                "{{\"content\":[{{\"token\":\"{text}\",\"logprob\":-0.{id}1,\"bytes\":[1],\
                 \"top_logprobs\":[]}}]}}"
            );
            event(
                &format!("{{\"content\":\"{text}\"}}"),
                &logprobs,
                &format!("null,\"token_ids\":[{id}]"),
                end,
            )
        };
        [
            event("{\"role\":\"assistant\",\"content\":\"\"}", "null", "null,\"token_ids\":null", "\n\n"),
            token("one", 1, "\n\n"),
            token("\\n", 2, "\n\n"),
            ": comment\n\n".to_owned(),
            token("two é", 3, "\n\n"),
            token("three", 4, "\r\n\r\n"),
            token("four", 5, "\n\n"),
            token("", 6, "\n\n"),
            event("{\"content\":\"end\"}", "null", "\"stop\",\"token_ids\":[7]", "\n\n"),
            "data: [DONE]\n\n".to_owned(),
        ]
        .concat()
    }

    #[test]
    fn tokens_read_by_the_relay_make_the_record_of_the_stream() {
        let body = chat();
        let mut whole = AnswerAssembler::new(TraceApi::Chat, true, 200);
        whole.feed(body.as_bytes());
        let whole = whole.finish();
        assert_eq!(whole.choices[0].token_ids, [1, 2, 3, 4, 5, 6, 7]);
        let ends: Vec<usize> = body.match_indices("\n\n").map(|(at, _)| at + 2).collect();
        let mut most = 0;
        for at in 0..body.len() {
            let (mut assembler, mut taken) = (AnswerAssembler::new(TraceApi::Chat, true, 200), 0);
            let fields = AddedAnswerFields { logprobs: true, token_ids: true };
            let mut cleanup = AnswerCleanup::new(BodyDialect::Chat, fields, 200, Some("text/event-stream"));
            let mut cuts = [&ends[..], &[at]].concat();
            cuts.sort_unstable();
            let mut buffer = AnswerBuffer::default();
            for span in [&[0], &cuts[..]].concat().windows(2) {
                let piece = &body.as_bytes()[span[0]..span[1]];
                let bytes = cleanup.take_tokens(piece, &mut Vec::new(), |token| {
                    buffer.push_token(token);
                    taken += 1;
                });
                cleanup.feed(&piece[bytes..], false, &mut Vec::new());
                if bytes < piece.len() {
                    buffer.push_piece(&piece[bytes..]);
                }
            }
            assembler.read(&buffer);
            assert_eq!(assembler.finish(), whole, "cut at {at}");
            most = most.max(taken);
        }
        assert_eq!(most, 3, "one, two and the empty one");
    }

    #[tokio::test]
    async fn the_buffer_of_an_open_call_is_counted_until_it_goes() {
        let traces =
            Traces::start(&TracesConfig::default(), Observer::default()).await.expect("a store in memory");
        let bytes = || traces.sizes().1;
        let mut captures: Vec<Capture> = (0..3).map(|_| traces.begin(start())).collect();
        for capture in &mut captures {
            capture.answer(200, true);
            capture.piece(b"data: 1\n\n");
        }
        assert_eq!(bytes(), 3 * FIRST_BUFFER_BYTES);
        captures[0].piece(&[b'x'; 2 * FIRST_BUFFER_BYTES]);
        assert_eq!(bytes(), 2 * FIRST_BUFFER_BYTES + MAX_BUFFERED_BYTES);
        captures[0].piece(&[b'x'; MAX_BUFFERED_BYTES]);
        captures[1].end(None);
        drop(captures);
        traces.flush().await;
        assert_eq!(bytes(), 0);
        traces.stop(Duration::from_secs(5)).await;
    }
}
