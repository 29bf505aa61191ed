//! An upstream's answer on its way to the client: head and first bytes, then piece by piece, to its end.
//!
//! One loop with three arms: the next piece of the answer, the client, the watch. It ends with an outcome.
//! Once the first byte was sent no attempt can follow, and the bytes held for one are freed.
//!
//! Never: make an attempt, write a piece without a deadline.

mod pipeline;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, header};
use pingora::http::ResponseHeader;
use pingora::{Error, Result};
use tokio::time::timeout;

use super::attempt::UpstreamAnswer;
use super::attempt::connection::UpstreamConnection;
use super::client::Client;
use super::headers;
use super::memory::NO_ROOM;
use super::placement::Placement;
use super::request::{ClientRequest, RequestScope};
use super::request_end::RequestEnd;
use super::request_report::{RequestReport, report_failure};
use super::route_edits::RouteEdits;
use super::watch::RequestWatch;
use crate::fleet::{Outcome, UpstreamSignal};
use crate::names::{
    X_ATTEMPTS, X_BALANCER, X_FORECAST, X_HIT, X_REASON, X_REQUEST_ID, X_SHOULD_RETRY, X_UPSTREAM,
};
use crate::reject::broken_stream;
use crate::reply::ending::error_events;
use crate::retry::{AttemptFailure, EndReason, is_refusal};
use crate::route::answer::overflow::OverflowAnswer;
use pipeline::AnswerPipeline;

/// How long the end of an answer waits for its trace where `traces.sync` requests it.
const MAX_SYNC_WAIT: Duration = Duration::from_secs(30);

/// An answer that is ready to go to the client.
pub(super) struct PreparedAnswer {
    connection: UpstreamConnection,
    head: ResponseHeader,
    pipeline: AnswerPipeline,
    /// The beginning of the body, as the client gets it.
    first: Bytes,
    over: bool,
    /// The status that it has for the fleet: that of an error which it begins with, or its own.
    judged: u16,
    status: u16,
    /// The balancer's answer replaces the upstream's, whose rest is discarded.
    replaced: bool,
    failure: Option<AttemptFailure>,
}

/// The end of an answer.
enum AnswerEnd {
    Whole,
    /// The upstream failed; for a stream, with the last events that the stream itself sends.
    Failed(AttemptFailure, Option<Bytes>),
}

/// Builds the head for the client, and passes the beginning of the body through the edits. Fails where the
/// edits cannot read the answer.
pub(super) fn prepare(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    placement: &Placement,
    answer: UpstreamAnswer,
    attempts: u32,
) -> Result<PreparedAnswer> {
    let UpstreamAnswer { connection, status, beginning, mut over, error_code, failure, held } = answer;
    let mut head = headers::of_answer(connection.head())?;
    let replaced_by = |edits: &RouteEdits| {
        let seed = scope.shared.random.next();
        let (sent, streams) = (request.body.bytes(), request.streams);
        let answer = edits.overflow_answer(&beginning, sent, streams, seed)?;
        Some((answer, edits.upstream_overflow_answer(sent, streams, seed)))
    };
    let edits = request.edits.as_deref().filter(|edits| over && edits.may_overflow(&head));
    let instead = edits.and_then(replaced_by);
    let judged = error_code.unwrap_or(status);
    let (mut first, mut replaced) = (Bytes::new(), false);
    let mut pipeline = AnswerPipeline::new(scope, request, &mut head, held)?;
    let mut status = status;
    if let Some((OverflowAnswer { content_type: kind, body }, recorded)) = instead {
        (status, over, replaced, first) = (200, true, true, body.into());
        head.set_status(status)?;
        head.remove_header(&header::TRANSFER_ENCODING);
        head.insert_header(header::CONTENT_LENGTH, first.len())?;
        head.insert_header(header::CONTENT_TYPE, kind)?;
        request.sample_answer(&first);
        if let (Some(capture), Some(answer)) = (&mut request.capture, recorded) {
            capture.replaced(&beginning, &answer);
        }
    } else if over || !beginning.is_empty() {
        let edited = pipeline.pass(scope, request, placement, &beginning, over)?;
        first = edited.unwrap_or_else(|| beginning.into());
        if over && request.capture.is_some() {
            headers::of_known_length(&mut head, connection.head(), first.len())?;
        }
    }
    if let Some(edits) = &request.edits {
        edits.towards_client(&mut head)?;
    }
    add_own_fields(&mut head, scope, placement, attempts)?;
    headers::frame_answer(&mut head, client)?;
    let judged = if replaced { 200 } else { judged };
    Ok(PreparedAnswer { connection, head, pipeline, first, over, judged, status, replaced, failure })
}

/// Adds the balancer's fields to an upstream's answer.
fn add_own_fields(
    head: &mut ResponseHeader,
    scope: &RequestScope<'_>,
    placement: &Placement,
    attempts: u32,
) -> Result<()> {
    if !head.headers.contains_key(X_REQUEST_ID)
        && let Ok(id) = HeaderValue::try_from(scope.id)
    {
        head.insert_header(X_REQUEST_ID, id)?;
    }
    if attempts > 1 && (head.status == 429 || head.status.is_server_error()) {
        // The balancer has retried already: retries of the client's library would only add load.
        head.insert_header(X_SHOULD_RETRY, "false")?;
    }
    if scope.settings.expose {
        head.insert_header(X_BALANCER, scope.shared.name.clone())?;
        head.insert_header(X_UPSTREAM, placement.upstream().name())?;
        head.insert_header(X_ATTEMPTS, attempts)?;
        head.insert_header(X_REASON, placement.reason)?;
        head.insert_header(X_HIT, format!("{}/{}", placement.hit, placement.blocks))?;
        head.insert_header(X_FORECAST, placement.forecast.as_millis().to_string())?;
    }
    Ok(())
}

impl PreparedAnswer {
    /// The upstream switches to another protocol.
    pub(super) fn is_upgrade(&self) -> bool {
        self.status == 101
    }

    /// The upstream's failure that the answer shows, although the client gets the answer.
    pub(super) fn failure(&self) -> Option<AttemptFailure> {
        let failed = self.judged == self.status && matches!(self.status, 500 | 502 | 504..);
        self.failure.or(failed.then_some(AttemptFailure::Status(self.status)))
    }

    /// The connection, and the head that tells the client.
    pub(super) fn into_upgrade(self) -> (UpstreamConnection, ResponseHeader) {
        (self.connection, self.head)
    }
}

/// Whether the edited answer broke, and its client has received the error.
pub(super) fn is_broken(request: &ClientRequest) -> bool {
    request.edits.as_ref().is_some_and(|edits| edits.is_broken())
}

/// Waits until the trace is stored, where `traces.sync` requests it and the answer has ended.
pub(super) async fn wait_until_stored(scope: &RequestScope<'_>, request: &mut ClientRequest) {
    let waiting = request.capture.as_mut().and_then(|capture| capture.take_waiting());
    if let Some(waiting) = waiting
        && timeout(MAX_SYNC_WAIT, waiting).await.is_err()
    {
        scope.shared.observer.trace_sync_failed();
    }
}

/// Sends the answer to the client, and writes its end into the report.
pub(super) async fn relay(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &mut Placement,
    mut answer: Box<PreparedAnswer>,
    watch: &mut RequestWatch,
    report: &mut RequestReport,
) -> Result<(), RequestEnd> {
    let read = !answer.replaced && !is_refusal(answer.judged);
    placement.conclude(scope, request, read);
    report.status = answer.status;
    let mut prefill = PrefillTracker { ended: false, teaches: answer.judged == 200 && read };
    if !answer.first.is_empty() || answer.over {
        prefill.check(scope, &answer.pipeline, placement, watch);
    }
    if !read {
        // What is still to come of the prompt is not read either.
        request.prompt_tail = None;
    }
    request.release_for_answer(answer.connection.outgoing().is_sent());
    if scope.shared.shutdown.is_closing() || client.is_http10() || client.sends_chunks() {
        client.close_after();
    }
    let end = carry_body(scope, client, request, placement, &mut answer, watch, &mut prefill).await;
    watch.record_sent();
    let usage = answer.pipeline.usage();
    if let Some(usage) = &usage {
        let (pipeline, is_whole) = (&answer.pipeline, matches!(end, Ok(AnswerEnd::Whole)));
        let is_whole = is_whole && pipeline.failure().is_none();
        let cached = placement.upstream().cached_tokens(usage, pipeline.cached_tokens_field(), is_whole);
        placement.correct(scope, request, usage, cached);
    }
    report.usage = usage;
    match end? {
        AnswerEnd::Whole => {
            report.outcome = Some(whole(scope, request, placement, &answer));
            // Boxed: this future ends at once, and an idle stream should not hold its memory.
            if let Some(wire) = Box::pin(answer.connection.into_idle()).await {
                scope.shared.pool.keep(placement.upstream(), wire);
            }
            Ok(())
        }
        AnswerEnd::Failed(failure, last_words) => {
            report_failure(scope, placement, failure, report);
            if let Some(capture) = &mut request.capture {
                capture.break_off();
            }
            wait_until_stored(scope, request).await;
            end_stream(scope, client, request, placement, &answer, failure, last_words).await;
            let error = Error::explain(pingora::ErrorType::ConnectionClosed, failure.label());
            Err(RequestEnd::Broken(error.into_up()))
        }
    }
}

/// Marks the end of the prefill, once.
struct PrefillTracker {
    ended: bool,
    /// Whether the answer measures the engine's pace of reading.
    teaches: bool,
}

impl PrefillTracker {
    fn check(
        &mut self,
        scope: &RequestScope<'_>,
        pipeline: &AnswerPipeline,
        placement: &mut Placement,
        watch: &mut RequestWatch,
    ) {
        if self.ended || !pipeline.has_content() {
            return;
        }
        self.ended = true;
        let now = Instant::now();
        watch.record_first_byte(now);
        placement.end_prefill(self.teaches, now);
        if self.teaches && pipeline.is_stream() {
            placement.compare_forecast(scope, now);
        }
    }
}

/// Writes head and body, while the rest of the request is sent and the client is watched.
async fn carry_body(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &mut Placement,
    answer: &mut PreparedAnswer,
    watch: &mut RequestWatch,
    prefill: &mut PrefillTracker,
) -> Result<AnswerEnd, RequestEnd> {
    let head = std::mem::replace(
        &mut answer.head,
        ResponseHeader::build_no_case(200, Some(0)).map_err(RequestEnd::Broken)?,
    );
    let bodiless = answer.over && answer.first.is_empty();
    wait_until_stored(scope, request).await;
    let written = write_beginning(client, head, &answer.first, bodiless).await;
    let stalled = written.map_err(RequestEnd::Disconnected)?;
    answer.first = Bytes::new();
    if answer.pipeline.is_stream() && request.body.is_complete() {
        client.forget_fields(scope.settings.trusts(client.address()));
    }
    watch.record_forwarded(stalled);
    let PreparedAnswer { connection, pipeline, over, .. } = answer;
    let room = connection.outgoing().clone();
    while !*over {
        let reads = connection.takes_more(request.body.is_complete());
        tokio::select! {
            biased;
            piece = connection.read_piece() => {
                let Ok(piece) = piece else { return Ok(AnswerEnd::Failed(AttemptFailure::Reset, None)) };
                let (piece, end) = (piece.unwrap_or_default(), piece.is_none());
                watch.record_next_piece(pipeline.is_stream() && !end);
                let edited = match pipeline.pass(scope, request, placement, piece, end) {
                    Ok(edited) => edited,
                    Err(error) => return Ok(AnswerEnd::Failed(edit_failure(&error), None)),
                };
                if !piece.is_empty() || end {
                    prefill.check(scope, pipeline, placement, watch);
                }
                if is_broken(request) && !end {
                    return Ok(AnswerEnd::Failed(AttemptFailure::Reset, edited));
                }
                wait_until_stored(scope, request).await;
                client.write(edited.as_deref().unwrap_or(piece)).await.map_err(RequestEnd::Disconnected)?;
                watch.record_answer_piece();
                *over = end;
                if let Some(reason) = watch.passed().filter(|_| !end) {
                    return Ok(AnswerEnd::Failed(AttemptFailure::Ended(reason), None));
                }
            }
            event = client.next(request.body.is_complete(), reads) => {
                match connection.forward(scope, client, request, placement, watch, event) {
                    Err(RequestEnd::Reject(_)) => {
                        let failure = AttemptFailure::Ended(EndReason::Refused);
                        return Ok(AnswerEnd::Failed(failure, None));
                    }
                    forwarded => forwarded?,
                }
            }
            () = room.room(), if !reads => {}
            reason = watch.end() => {
                return Ok(AnswerEnd::Failed(AttemptFailure::Ended(reason), None));
            }
        }
        connection.pace(request, watch);
    }
    finish(client, pipeline).await
}

/// The failure of an answer that cannot be edited; a lack of memory is not the upstream's.
fn edit_failure(error: &Error) -> AttemptFailure {
    if error.etype == NO_ROOM { AttemptFailure::Ended(EndReason::Refused) } else { AttemptFailure::Reset }
}

/// Ends the answer for the client, if it is whole.
async fn finish(client: &mut Client<'_>, pipeline: &AnswerPipeline) -> Result<AnswerEnd, RequestEnd> {
    if pipeline.is_cut() {
        return Ok(AnswerEnd::Failed(AttemptFailure::Reset, None));
    }
    client.finish().await.map_err(RequestEnd::Disconnected)?;
    Ok(AnswerEnd::Whole)
}

/// Writes the head and the beginning of an answer. Returns since when the client did not take what was left
/// of them, if it had to be awaited.
async fn write_beginning(
    client: &mut Client<'_>,
    head: ResponseHeader,
    first: &[u8],
    end: bool,
) -> Result<Option<tokio::time::Instant>> {
    let mut stalled = None;
    let mut write = pin!(client.write_head(head, first, end));
    let written = poll_fn(|cx| {
        let polled = write.as_mut().poll(cx);
        if polled.is_pending() {
            stalled.get_or_insert_with(tokio::time::Instant::now);
        }
        polled
    });
    written.await?;
    Ok(stalled)
}

/// The outcome of a complete answer. A stream may report an error after a head of success.
fn whole(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    placement: &Placement,
    answer: &PreparedAnswer,
) -> Outcome {
    let (fleet, upstream) = (&scope.shared.fleet, placement.upstream());
    if is_broken(request) {
        scope.shared.observer.stream_broken(
            scope.id,
            upstream.name(),
            "it ended before the answer was whole",
        );
        fleet.report(upstream, UpstreamSignal::Failed { placed: placement.lease.since() });
        return Outcome::Broken;
    }
    match answer.pipeline.failure() {
        // The upstream was judged by the beginning of its answer.
        _ if answer.judged != answer.status => Outcome::Answered(answer.judged),
        Some(failure) => {
            // Without a code the request itself may be the cause.
            if let Some(500..) = failure.code {
                fleet.report(upstream, UpstreamSignal::Failed { placed: placement.lease.since() });
            }
            Outcome::Answered(failure.status())
        }
        None => Outcome::Answered(answer.status),
    }
}

/// Ends a stream that cannot continue: sends an error event in the form of the interface and closes the
/// connection. Other answers break off, which their framing shows.
async fn end_stream(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &ClientRequest,
    placement: &Placement,
    answer: &PreparedAnswer,
    failure: AttemptFailure,
    last_words: Option<Bytes>,
) {
    client.close_after();
    let name = placement.upstream().name();
    scope.shared.observer.stream_broken(scope.id, name, failure.label());
    if !answer.pipeline.is_stream() {
        return client.cut();
    }
    let late = !matches!(failure, AttemptFailure::Ended(EndReason::Gone) | AttemptFailure::Reset);
    let (code, message) = broken_stream(late, scope.settings.expose.then_some(name));
    let apart = !answer.pipeline.is_between_events();
    let events = last_words.unwrap_or_else(|| error_events(request.form, &message, code, apart).into());
    // A disconnected client cannot be cut silently.
    if client.write(&events).await.is_ok() {
        client.finish().await.ok();
    }
}
