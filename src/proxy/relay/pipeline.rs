//! The steps that an answer's bytes pass on their way to the client.
//!
//! In this order: the usage that the answer reports is read, a completion in place of a chat becomes a chat's
//! answer, the answer of a captured call is copied, the fields that the balancer requested for itself are
//! removed, and the route's edits are made. The log of bodies and the end of the stream come last and see the
//! client's bytes.
//!
//! Never: an await, a byte that is held longer than a step needs.

use bytes::Bytes;
use pingora::Result;
use pingora::http::ResponseHeader;

use crate::proxy::headers;
use crate::proxy::memory::MemoryReservation;
use crate::proxy::placement::Placement;
use crate::proxy::request::{ClientRequest, RequestScope};
use crate::reply::ending::{ErrorEventForm, StreamTail};
use crate::reply::is_event_stream;
use crate::reply::sse::EventTracker;
use crate::reply::usage::{CachedTokensField, StreamError, Usage, UsageMeter};

/// The events at the beginning of a Responses stream that announce the response without any content.
const ANNOUNCING_EVENTS: u64 = 2;

/// What edits may hold of an answer without a reservation: about one piece.
const MAX_UNCOUNTED_BYTES: usize = 64 << 10;

/// The steps of one answer.
pub(super) struct AnswerPipeline {
    meter: Option<Box<UsageMeter>>,
    /// The progress of a stream.
    tail: Option<StreamTail>,
    /// Events of a Responses stream, whose first two come before the prompt is read.
    announced: Option<Box<EventTracker>>,
    held: HeldAnswer,
}

/// The memory of what the edits hold back, and of what they have made of it.
struct HeldAnswer {
    reservation: MemoryReservation,
    bytes: usize,
}

// === impl AnswerPipeline ===

impl AnswerPipeline {
    /// For an answer with this head, which the edits may change.
    pub(super) fn new(
        scope: &RequestScope<'_>,
        request: &mut ClientRequest,
        head: &mut ResponseHeader,
        held: MemoryReservation,
    ) -> Result<Self> {
        let status = head.status.as_u16();
        let kind = headers::readable_type(head);
        let tail = is_event_stream(kind).then(StreamTail::default);
        // A chat that is made into a response announces nothing.
        let is_chat = request.edits.as_ref().is_some_and(|edits| edits.translates());
        let announces =
            status == 200 && request.form == ErrorEventForm::Responses && !is_chat && tail.is_some();
        let announced = announces.then(Box::default);
        let metered = status == 200 && request.counts_tokens;
        let meter = if metered { UsageMeter::of(kind).map(Box::new) } else { None };
        if tail.is_some() {
            // The error event of a broken stream would be cut at a declared length, and look whole.
            headers::of_unknown_length(head)?;
        }
        if let Some(continued) = &mut request.continued {
            continued.begin(head, &scope.shared.observer)?;
        }
        if let Some(capture) = &mut request.capture {
            capture.begin_answer(head)?;
        }
        if let Some(question) = &mut request.usage_injection {
            question.begin(head)?;
        }
        if let Some(pending) = &mut request.pending_response {
            pending.begin();
        }
        if let Some(edits) = &mut request.edits {
            edits.begin(head, &scope.shared.random)?;
        }
        Ok(AnswerPipeline { meter, tail, announced, held: HeldAnswer { reservation: held, bytes: 0 } })
    }

    /// Passes the next piece through the steps; `None`: the piece is unchanged. `end`: it is the last.
    pub(super) fn pass(
        &mut self,
        scope: &RequestScope<'_>,
        request: &mut ClientRequest,
        placement: &Placement,
        piece: &[u8],
        end: bool,
    ) -> Result<Option<Bytes>> {
        if let Some(meter) = &mut self.meter {
            meter.feed(piece);
            if let (Some(pending), Some(id)) = (&mut request.pending_response, meter.id()) {
                pending.record_id(&scope.shared.state, placement.upstream(), id);
            }
        }
        if let Some(events) = &mut self.announced {
            events.feed(piece);
            if end || events.whole() > ANNOUNCING_EVENTS {
                self.announced = None;
            }
        }
        let edited = edit(request, piece, end)?;
        if let Some(edited) = &edited {
            self.held.record(piece.len(), edited.len())?;
        }
        let passed = edited.as_deref().unwrap_or(piece);
        if let Some(tail) = &mut self.tail {
            tail.feed(passed);
        }
        request.sample_answer(passed);
        Ok(edited)
    }

    /// Whether a part of the model's output has arrived: then the prompt has been read.
    pub(super) fn has_content(&self) -> bool {
        self.announced.is_none()
    }

    pub(super) fn is_stream(&self) -> bool {
        self.tail.is_some()
    }

    /// Whether an event of the balancer's own can follow what was passed.
    pub(super) fn is_between_events(&self) -> bool {
        self.tail.as_ref().is_none_or(StreamTail::between_events)
    }

    /// Whether it is a stream that stops in the middle of a line.
    pub(super) fn is_cut(&self) -> bool {
        self.tail.as_ref().is_some_and(StreamTail::is_cut)
    }

    /// The error that the answer reported.
    pub(super) fn failure(&self) -> Option<StreamError> {
        self.meter.as_ref().and_then(|meter| meter.failure())
    }

    /// The usage that the answer has reported so far.
    pub(super) fn usage(&self) -> Option<Usage> {
        self.meter.as_ref().map(|meter| meter.usage())
    }

    /// The field in which the answer reports cached tokens, or would.
    pub(super) fn cached_tokens_field(&self) -> Option<CachedTokensField> {
        self.meter.as_ref()?.cached_tokens_field()
    }
}

// === impl HeldAnswer ===

impl HeldAnswer {
    /// Records that the edits took this much of the answer, and made this much of what they held.
    fn record(&mut self, taken: usize, made: usize) -> Result<()> {
        self.bytes = if made == 0 { self.bytes + taken } else { made.max(taken) };
        if self.bytes > MAX_UNCOUNTED_BYTES {
            return self.reservation.hold_answer(self.bytes);
        }
        // A long event of a stream has been written.
        self.reservation.release();
        Ok(())
    }
}

/// A piece as the client gets it. `None`: as it is.
fn edit(request: &mut ClientRequest, piece: &[u8], end: bool) -> Result<Option<Bytes>> {
    let chat = request.continued.as_mut().map(|turn| turn.piece(piece, end)).transpose()?.flatten();
    let piece = chat.as_deref().unwrap_or(piece);
    let cleaned = request.capture.as_mut().and_then(|capture| capture.piece(piece, end));
    let piece = cleaned.as_deref().unwrap_or(piece);
    let taken = request.usage_injection.as_mut().and_then(|question| question.piece(piece, end));
    let piece = taken.as_deref().unwrap_or(piece);
    let edited = request.edits.as_mut().map(|edits| edits.piece(piece, end)).transpose()?.flatten();
    // Not before: another attempt, or a refusal, may follow an answer that the edits cannot read.
    if let Some(capture) = &mut request.capture
        && request.edits.as_ref().is_none_or(|edits| !edits.is_broken())
    {
        capture.conclude();
    }
    Ok(edited.or(taken).or(cleaned).or(chat))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Observer;
    use crate::proxy::memory::PeekMemory;

    #[test]
    fn counts_what_edits_hold_until_it_is_written() {
        let reservation = PeekMemory::new(1 << 20, Observer::default()).reservation();
        let mut held = HeldAnswer { reservation, bytes: 0 };
        let step = 40 << 10;
        for (taken, made, counted) in [
            (step, 0, 0),
            (step, 0, 2 * step),
            (step, 0, 3 * step),
            (10, 3 * step + 10, 3 * step + 10),
            (step, step, 0),
            (10, 9, 0),
        ] {
            held.record(taken, made).expect("there is room");
            assert_eq!(held.reservation.bytes(), counted as u64, "{taken} {made}");
        }
        assert!(held.record(2 << 20, 0).is_err());
    }
}
