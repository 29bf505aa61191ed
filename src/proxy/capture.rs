//! The capture of a request's call as a trace: what is requested of the engine for it, the copy of the
//! answer, and the answer as the client would have received it without a trace.
//!
//! `route::capture` has the edits, `traces` the rest; this module applies them at their time. The call ends
//! before the last bytes of its answer go to the client, so that a flush which follows the answer finds it.
//!
//! Never: reject a request because its trace cannot be recorded.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::http::ResponseHeader;
use tokio::sync::oneshot;

use super::headers;
use super::memory::MemoryReservation;
use super::random::RandomSource;
use super::request_end::RequestEnd;
use super::shared::ProxyShared;
use crate::reject::Reject;
use crate::route::answer::overflow::OverflowAnswer;
use crate::route::api_paths::Api;
use crate::route::capture::{AnswerCleanup, CaptureQuestion};
use crate::route::dialect::BodyDialect;
use crate::traces::Traces;
use crate::traces::capture::{Capture, CaptureStart};
use crate::traces::record::{SessionSettings, TraceApi, TraceError, UNNAMED_SESSION};

/// The largest room for a cleaned piece that is kept for the next one.
const MAX_KEPT_BYTES: usize = 4 << 10;

/// The media type of a stream, in any case of letters.
const EVENT_STREAM: &str = "text/event-stream";

/// The decisions on a request's capture before its body is edited.
pub(super) struct CaptureIntent {
    pub session_id: String,
    /// The operator's settings of the session.
    pub settings: Option<Arc<SessionSettings>>,
    pub is_captured: bool,
    /// The model that the client named, where the session's settings change the body.
    pub client_model: Option<String>,
}

/// The change of a body for its capture.
pub(super) struct PreparedCapture {
    pub session_id: String,
    /// The model that the client named, where the body names the session's.
    pub client_model: Option<String>,
    pub api: TraceApi,
    /// The dialect that the upstream receives.
    pub dialect: BodyDialect,
    pub question: Option<CaptureQuestion>,
    /// The body, and where the question stands in it.
    pub request: Bytes,
    /// Reserved for the body beyond the attempts.
    pub held: MemoryReservation,
}

/// The capture of one request. See the module.
pub(super) struct RequestCapture {
    capture: Capture,
    dialect: BodyDialect,
    question: Option<CaptureQuestion>,
    /// Of the current answer; `None`: it is compressed, and goes on as it is.
    cleanup: Option<AnswerCleanup>,
    /// The cleaned piece, in room that is used again.
    cleaned: Vec<u8>,
    /// The end of the answer waits for the trace.
    sync: bool,
    /// Notified once the trace is stored.
    waiting: Option<oneshot::Receiver<()>>,
    /// The bytes that remain of an answer with a declared length.
    left: Option<u64>,
    /// The reservation for the request.
    request_bytes: u64,
    /// The end of the answer has been copied.
    is_over: bool,
    held: MemoryReservation,
}

/// The interface of a trace; `None`: calls of it are not captured.
pub(super) fn trace_api(api: Api) -> Option<TraceApi> {
    match api {
        Api::Chat => Some(TraceApi::Chat),
        Api::Completions => Some(TraceApi::Completions),
        Api::Responses => Some(TraceApi::Responses),
        Api::Messages => Some(TraceApi::Messages),
        _ => None,
    }
}

impl CaptureIntent {
    /// `label`: the session, wherever it is named; `in_path`: by the path.
    pub(super) async fn of(
        traces: &Traces,
        label: Option<&str>,
        in_path: bool,
        random: &RandomSource,
    ) -> Option<Self> {
        let settings = match label {
            Some(label) => traces.session_settings(label).await,
            None => None,
        };
        let is_captured = traces.captures(in_path, settings.is_some(), random.next());
        let session_id = label.unwrap_or(UNNAMED_SESSION).to_string();
        let is_of_use = is_captured || settings.is_some();
        is_of_use.then_some(CaptureIntent { session_id, settings, is_captured, client_model: None })
    }

    /// The settings, where they change a body.
    pub(super) fn edits(&self) -> Option<&SessionSettings> {
        let settings = self.settings.as_deref()?;
        (!settings.sampling_params.is_empty() || settings.model.is_some()).then_some(settings)
    }
}

impl RequestCapture {
    /// Begins the capture of a prepared request with this id, which began at this time.
    pub(super) fn begin(
        shared: &ProxyShared,
        (id, begun): (&str, Instant),
        prepared: PreparedCapture,
        client_model: Option<&str>,
    ) -> Box<RequestCapture> {
        let PreparedCapture { session_id, client_model: sent_model, .. } = prepared;
        let PreparedCapture { api, dialect, question, request, held, .. } = prepared;
        let start = CaptureStart {
            trace_id: shared.random.uuid(),
            session_id,
            api,
            client_model: sent_model.or_else(|| client_model.map(str::to_string)),
            request_id: id.to_string(),
            request,
            inserted: question.as_ref().map(|question| (question.at, question.text)),
            begun,
            cumulative: None,
        };
        let (traces, waiting) = (&shared.traces, None);
        let sync = traces.settings().sync;
        let capture = traces.begin(start);
        Box::new(RequestCapture {
            capture,
            dialect,
            question,
            cleanup: None,
            cleaned: Vec::new(),
            sync,
            waiting,
            left: None,
            request_bytes: held.bytes(),
            is_over: false,
            held,
        })
    }

    /// The session from whose last turn the call may continue.
    pub(super) fn continued_session(&self) -> Option<&str> {
        let session = self.capture.session().filter(|session| *session != UNNAMED_SESSION)?;
        (self.dialect == BodyDialect::Chat).then_some(session)
    }

    /// How the cumulative token mode serves the call.
    pub(super) fn set_cumulative(&mut self, way: String) {
        self.capture.set_cumulative(way);
    }

    /// An attempt on this upstream begins.
    pub(super) fn attempt(&mut self, upstream: &str, attempts: u32) {
        self.capture.attempt(upstream, attempts);
    }

    /// An answer begins.
    pub(super) fn begin_answer(&mut self, head: &mut ResponseHeader) -> Result<()> {
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let plain = text(header::CONTENT_ENCODING).is_none_or(|coding| coding == "identity");
        let kind = text(header::CONTENT_TYPE);
        let status = head.status.as_u16();
        (self.left, self.is_over) = (headers::length(&head.headers), false);
        let media = kind.and_then(|kind| kind.get(..EVENT_STREAM.len()));
        let is_stream = media.is_some_and(|media| media.eq_ignore_ascii_case(EVENT_STREAM));
        self.capture.answer(status, is_stream);
        let fields = self.question.as_ref().map(|question| question.added_fields).unwrap_or_default();
        self.cleanup = plain.then(|| {
            let mut cleanup = AnswerCleanup::new(self.dialect, fields, status, kind);
            cleanup.expect(self.left.unwrap_or(0));
            cleanup
        });
        let keeps = self.cleanup.as_ref().is_none_or(AnswerCleanup::keeps_length);
        if keeps { Ok(()) } else { headers::of_unknown_length(head) }
    }

    /// Copies the next piece of the answer. Returns it as the client gets it; `None`: as it is.
    pub(super) fn piece(&mut self, piece: &[u8], end: bool) -> Option<Bytes> {
        let (capture, out) = (&mut self.capture, &mut self.cleaned);
        let (edited, ends) = match &mut self.cleanup {
            Some(cleanup) => {
                let taken = cleanup.take_tokens(piece, out, |token| capture.token(token));
                let rest = &piece[taken..];
                let (mut is_changed, mut ends) = (taken > 0, false);
                if !rest.is_empty() || end {
                    capture.piece(rest);
                    let cleaned = cleanup.feed(rest, end, out);
                    if taken > 0 && !cleaned.is_changed {
                        out.extend_from_slice(rest);
                    }
                    (is_changed, ends) = (is_changed || cleaned.is_changed, cleaned.ends);
                    let holds = cleanup.held_bytes() as u64;
                    if holds > 0 && !self.held.grow_to(self.request_bytes + holds.next_power_of_two()) {
                        // The client gets fields that it did not request, rather than no answer.
                        cleanup.give_up(out);
                    }
                }
                let bytes = match is_changed {
                    // A whole answer goes on without a copy.
                    true if out.len() > MAX_KEPT_BYTES => Some(Bytes::from(std::mem::take(out))),
                    true => Some(Bytes::copy_from_slice(out)),
                    false => None,
                };
                out.clear();
                (bytes, ends)
            }
            None => {
                capture.piece(piece);
                (None, end)
            }
        };
        self.left = self.left.map(|left| left.saturating_sub(piece.len() as u64));
        // The client of an answer that goes on as it is knows its end before the upstream's is read.
        let is_last = edited.is_none() && self.left == Some(0);
        self.is_over |= ends || end || is_last;
        edited
    }

    /// Ends the call if the copied piece, which is now sent to the client, was the last one.
    pub(super) fn conclude(&mut self) {
        if std::mem::take(&mut self.is_over) {
            self.close(None);
        }
    }

    /// Ends the call of an answer that broke off.
    pub(super) fn break_off(&mut self) {
        self.close(Some(TraceError::Incomplete));
    }

    /// An error that says that the prompt does not fit is replaced by the balancer's own answer, which the
    /// client gets with status 200.
    pub(super) fn replaced(&mut self, error: &[u8], answer: &OverflowAnswer) {
        self.capture.replace(error);
        self.capture.answer(200, answer.content_type.starts_with("text/event-stream"));
        self.capture.piece(answer.body.as_bytes());
        self.close(Some(TraceError::Overflow));
    }

    /// The end of the request, of a call that has not ended.
    pub(super) fn end(&mut self, end: Result<(), &RequestEnd>) {
        match end {
            Ok(()) => self.capture.end(None),
            Err(RequestEnd::Reject(reject)) => {
                self.capture.refuse(reject.status());
                self.close(Some(error_of(reject)));
            }
            Err(RequestEnd::Disconnected(_)) => self.capture.end(Some(TraceError::ClientGone)),
            Err(RequestEnd::Broken(_)) => self.capture.end(Some(TraceError::Incomplete)),
        }
    }

    /// What is notified once the trace is stored, where the end of the answer waits for it.
    pub(super) fn take_waiting(&mut self) -> Option<oneshot::Receiver<()>> {
        self.waiting.take()
    }

    /// Ends the call before its client gets the end of the answer.
    fn close(&mut self, error: Option<TraceError>) {
        if self.capture.is_ended() {
            return;
        }
        if self.sync {
            self.waiting = Some(self.capture.end_stored(error));
        } else {
            self.capture.end(error);
        }
        self.held.release();
    }
}

fn error_of(reject: &Reject) -> TraceError {
    match reject {
        Reject::Upstream { .. } => TraceError::Connection,
        Reject::Timeout { .. } => TraceError::Timeout,
        _ => TraceError::of_status(reject.status()).unwrap_or(TraceError::UpstreamError),
    }
}
