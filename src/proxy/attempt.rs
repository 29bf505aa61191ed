//! One try of a request on one upstream: a connection, the request, the answer's head, its first event.
//!
//! The request is queued and sent while the answer is awaited, so that an early answer is read. The answer's
//! beginning is read until it is known to be for the client, since vLLM sends its head before it reads the
//! prompt. The result is an answer with its live connection, or a failure with the facts for the retry rule,
//! and with the answer to fall back on, if there is one.
//!
//! Never: a byte to the client, a decision on what follows a failure. Only the placement outlives an attempt.

pub(super) mod connection;
pub(super) mod pool;
pub(super) mod wire;

use std::time::Duration;

use futures_util::FutureExt;
use http::header::AUTHORIZATION;
use pingora::http::ResponseHeader;
use tokio::time::{Instant, sleep_until};

use super::client::Client;
use super::memory::MemoryReservation;
use super::placement::Placement;
use super::request::{ClientRequest, RequestScope};
use super::request_end::RequestEnd;
use super::watch::RequestWatch;
use super::watched::watched;
use super::{cumulative, forwarded_head, headers};
use crate::fleet::UpstreamSignal;
use crate::reject::Reject;
use crate::reply::is_event_stream;
use crate::reply::judge::{AnswerJudge, AnswerVerdict};
use crate::retry::{AttemptFailure, EndReason};
use crate::route::answer::{MAX_WHOLE_ANSWER_BYTES, overflow};
use connection::UpstreamConnection;

/// The longest time that an answer, other than a stream, is held without a verdict on its beginning: an
/// upstream that stalls in the middle of the body must not delay the head.
const MAX_HOLD_TIME: Duration = Duration::from_secs(1);

/// How long a 429 to a client's own key keeps all requests away from the upstream.
const MAX_CLIENT_KEY_PAUSE: Duration = Duration::from_secs(1);

/// The largest number of informational answers that are skipped before one answer.
const MAX_INFORMATIONAL: u32 = 16;

/// A pooled connection that ends within this time of its use counts as ended before.
const STALE_DETECTION_TIME: Duration = Duration::from_secs(1);

/// An upstream's answer before its first byte is sent to the client.
pub(super) struct UpstreamAnswer {
    pub connection: UpstreamConnection,
    pub status: u16,
    /// The bytes of the body that were read.
    pub beginning: Vec<u8>,
    /// The body has ended.
    pub over: bool,
    /// The code of an error at the beginning of the body, independent of the status.
    pub error_code: Option<u16>,
    /// The upstream's failure that the answer shows although it is sent to the client.
    pub failure: Option<AttemptFailure>,
    /// The memory of an answer that is held until it is whole: the beginning, and its edited copy.
    pub held: MemoryReservation,
}

/// The end of an attempt without an answer for the client.
pub(super) enum AttemptError {
    /// The attempt failed; with the answer that may go to the client if no other attempt follows.
    Failed(AttemptFailure, Option<Box<UpstreamAnswer>>),
    /// The request is over.
    Stopped(RequestEnd),
}

/// The end of an attempt by the watch.
fn ended(reason: EndReason) -> AttemptError {
    match reason {
        EndReason::SlowUpload => RequestEnd::from(Reject::Slow).into(),
        reason => AttemptFailure::Ended(reason).into(),
    }
}

impl From<RequestEnd> for AttemptError {
    fn from(stop: RequestEnd) -> Self {
        AttemptError::Stopped(stop)
    }
}

impl From<AttemptFailure> for AttemptError {
    fn from(failure: AttemptFailure) -> Self {
        AttemptError::Failed(failure, None)
    }
}

/// Tries the request on the upstream of its placement. `stale`: an earlier attempt used a stale connection.
pub(super) async fn attempt(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &mut Placement,
    watch: &mut RequestWatch,
    stale: bool,
) -> Result<Box<UpstreamAnswer>, AttemptError> {
    let mut connection = connect(scope, client, request, placement, watch, stale).await?;
    watch.begin_attempt(placement.upstream().id);
    let head = forwarded_head::towards_upstream(scope, client, request, placement.upstream());
    let head = head.map_err(|_| RequestEnd::from(Reject::Malformed { why: "its head cannot be sent on" }))?;
    let sent = connection.send_head(&head).await;
    sent.map_err(|_| RequestEnd::from(Reject::Malformed { why: "its head cannot be sent on" }))?;
    connection.send_held(scope, request, placement);
    watch.set_outgoing(connection.outgoing().clone());
    let head = await_head(scope, client, request, placement, &mut connection, watch).await;
    watch.record_sent();
    let status = match head {
        Err(AttemptError::Failed(AttemptFailure::Reset, _))
            if connection.may_be_stale() && watch.since_sent() < STALE_DETECTION_TIME =>
        {
            scope.shared.pool.forget(placement.upstream());
            return Err(AttemptFailure::Stale.into());
        }
        status => status?,
    };
    if !connection.is_framed_plainly() {
        return Err(AttemptFailure::Reset.into());
    }
    let held = scope.shared.memory.reservation();
    let mut answer = Box::new(UpstreamAnswer::new(connection, status, held));
    judge_head(scope, client, request, placement, answer.head());
    if status == 101 {
        report_accepted(scope, placement, &answer);
        return Ok(answer);
    }
    if matches!(status, 502..=504) {
        return Err(AttemptError::Failed(AttemptFailure::Status(status), Some(answer)));
    }
    match judge_beginning(scope, client, request, placement, &mut answer, watch).await? {
        None => {
            report_accepted(scope, placement, &answer);
            Ok(answer)
        }
        // There is nothing in it for the client.
        Some(AttemptFailure::Reset) => Err(AttemptFailure::Reset.into()),
        Some(failure) => Err(AttemptError::Failed(failure, Some(answer))),
    }
}

/// Takes a connection to the upstream while the client is watched. `fresh`: a new one, because a pooled one
/// had ended.
async fn connect(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &Placement,
    watch: &mut RequestWatch,
    fresh: bool,
) -> Result<UpstreamConnection, AttemptError> {
    let (upstream, pool) = (placement.upstream(), &scope.shared.pool);
    let idle = if fresh { None } else { pool.idle(upstream) };
    let connected = match idle {
        Some(wire) => UpstreamConnection::new(wire, true),
        None => {
            let limit = request.timeouts(scope.settings).connect;
            // Boxed: most requests find an idle connection and need no memory for this.
            let dialing = Box::pin(pool.dial(upstream, limit));
            // The rest of a body is not read meanwhile: memory to hold it may be lacking.
            let complete = request.body.is_complete();
            let dialed = watched(client, request, watch, complete, dialing).await?;
            let wire = dialed.map_err(|error| AttemptFailure::Connect(error.fault()))?;
            UpstreamConnection::new(wire, false)
        }
    };
    Ok(connected)
}

/// Waits for the answer's head while the rest of the body is sent. Returns its status.
async fn await_head(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &mut Placement,
    connection: &mut UpstreamConnection,
    watch: &mut RequestWatch,
) -> Result<u16, AttemptError> {
    let mut informational = 0;
    let room = connection.outgoing().clone();
    loop {
        let reads = connection.takes_more(request.body.is_complete());
        tokio::select! {
            biased;
            read = connection.read_head() => match read {
                Err(_) => return Err(AttemptFailure::Reset.into()),
                Ok(101) if client.is_upgrade() && connection.switches_to_websocket() => return Ok(101),
                // An upgrade that the client did not request: the bytes that follow are not HTTP.
                Ok(101) => return Err(AttemptFailure::Reset.into()),
                Ok(100..=199) => {
                    informational += 1;
                    if informational > MAX_INFORMATIONAL {
                        return Err(AttemptFailure::Reset.into());
                    }
                }
                Ok(status) => return Ok(status),
            },
            event = client.next(request.body.is_complete(), reads) => {
                connection.forward(scope, client, request, placement, watch, event)?;
            }
            () = room.room(), if !reads => {}
            reason = watch.end() => return Err(ended(reason)),
        }
        connection.pace(request, watch);
    }
}

/// Reports an answer's head to the fleet. The exchange reports failures, since it knows whether another
/// upstream fails alike.
fn judge_head(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &ClientRequest,
    placement: &Placement,
    head: &ResponseHeader,
) {
    let (fleet, upstream) = (&scope.shared.fleet, placement.upstream());
    match head.status.as_u16() {
        429 if shows_client_key(client, request, placement) => {
            let pause = retry_after(head).map(|pause| pause.min(MAX_CLIENT_KEY_PAUSE));
            fleet.mark_busy(upstream, pause)
        }
        429 | 503 => fleet.mark_busy(upstream, retry_after(head)),
        status if blames_upstream(status) => {}
        _ => fleet.answer_began(upstream),
    }
}

/// Reports to the fleet that an answer goes to the client, now that its beginning was judged.
fn report_accepted(scope: &RequestScope<'_>, placement: &mut Placement, answer: &UpstreamAnswer) {
    if answer.status != 429 && !blames_upstream(answer.status) {
        // An error of the client does not show that the engine works.
        let passed = answer.status < 400 && answer.error_code.is_none();
        let signal = UpstreamSignal::Answered { passed, placed: placement.lease.since() };
        scope.shared.fleet.report(placement.upstream(), signal);
    }
    placement.lease.end_trial();
}

/// Whether the status is the upstream's fault. It lacks what a 501 asks for.
fn blames_upstream(status: u16) -> bool {
    status >= 500 && status != 501
}

/// Whether the upstream got the client's own key, and so may limit this client alone.
fn shows_client_key(client: &Client<'_>, request: &ClientRequest, placement: &Placement) -> bool {
    let replaced = placement.upstream().authorization.is_some()
        || request.edits.as_ref().is_some_and(|edits| edits.authorization().is_some());
    !replaced && client.headers().contains_key(AUTHORIZATION)
}

/// The upstream's `retry-after`, if it sends one.
fn retry_after(head: &ResponseHeader) -> Option<Duration> {
    let value = head.headers.get(http::header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

/// Reads the beginning of an answer until its verdict. Returns the failure after which another attempt may
/// follow.
async fn judge_beginning(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &mut Placement,
    answer: &mut UpstreamAnswer,
    watch: &mut RequestWatch,
) -> Result<Option<AttemptFailure>, AttemptError> {
    let kind = headers::readable_type(answer.head());
    let is_stream = is_event_stream(kind);
    let mut judge = AnswerJudge::new(answer.status, kind, headers::length(&answer.head().headers));
    // Measured from the first byte of the body: a head alone decides nothing, and another attempt can follow.
    let mut held_until = None;
    let edits = request.edits.as_ref();
    let may_overflow = edits.is_some_and(|edits| edits.may_overflow(answer.head()));
    // An answer above the limit is replaced by an error, while no head has been sent.
    let holds =
        edits.is_some_and(|edits| edits.holds(answer.head())) || cumulative::holds(request, answer.head());
    let room = answer.connection.outgoing().clone();
    loop {
        answer.connection.pace(request, watch);
        let reads = answer.connection.takes_more(request.body.is_complete());
        let received = tokio::select! {
            biased;
            piece = answer.connection.read_piece() => piece,
            event = client.next(request.body.is_complete(), reads) => {
                answer.connection.forward(scope, client, request, placement, watch, event)?;
                continue;
            }
            () = room.room(), if !reads => continue,
            reason = watch.end() => return Err(ended(reason)),
            () = wait_until(held_until), if !is_stream && !holds => {
                held_until.into_iter().for_each(|until| watch.record_held_since(until - MAX_HOLD_TIME));
                return Ok(None);
            }
        };
        let Ok(piece) = received else { return Err(AttemptFailure::Reset.into()) };
        let (piece, end) = (piece.unwrap_or_default(), piece.is_none());
        let verdict = judge.feed(piece, end);
        // A prelude is not progress: an engine sends it before it reads the prompt.
        if verdict != AnswerVerdict::Wait {
            watch.record_verdict();
        }
        answer.beginning.extend_from_slice(piece);
        answer.over = end;
        if !piece.is_empty() {
            held_until.get_or_insert_with(|| Instant::now() + MAX_HOLD_TIME);
        }
        let may_overflow =
            may_overflow && !answer.over && answer.beginning.len() <= overflow::MAX_OVERFLOW_ERROR_BYTES;
        let holds = holds
            && verdict == AnswerVerdict::Accept
            && !answer.over
            && answer.beginning.len() <= MAX_WHOLE_ANSWER_BYTES;
        if holds && answer.held.hold_answer(2 * answer.beginning.len()).is_err() {
            return Err(RequestEnd::from(Reject::Memory).into());
        }
        if verdict == AnswerVerdict::Wait || may_overflow || holds {
            continue;
        }
        let failure = failure_of(verdict, request, answer);
        if failure.is_none() {
            answer.read_available()?;
        }
        return Ok(failure);
    }
}

/// Waits until the deadline; for ever without one.
async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The failure of the attempt by the verdict; stores the code of an error that the answer begins with.
fn failure_of(
    verdict: AnswerVerdict,
    request: &ClientRequest,
    answer: &mut UpstreamAnswer,
) -> Option<AttemptFailure> {
    answer.error_code = match verdict {
        // The code is not a success.
        AnswerVerdict::Failed(code) => Some(code.max(400)),
        AnswerVerdict::Leaving => Some(503),
        AnswerVerdict::EngineDead => Some(500),
        AnswerVerdict::Wait | AnswerVerdict::Accept | AnswerVerdict::Nothing | AnswerVerdict::Aborted => None,
    };
    match verdict {
        AnswerVerdict::Wait | AnswerVerdict::Accept => None,
        // A job that its client cancelled ends like this, and so does its stored answer.
        AnswerVerdict::Nothing if request.background || request.only.is_some() => None,
        AnswerVerdict::Nothing => Some(AttemptFailure::Reset),
        AnswerVerdict::Aborted if request.only.is_some() => None,
        AnswerVerdict::Aborted => Some(AttemptFailure::Aborted),
        AnswerVerdict::Leaving => Some(AttemptFailure::Leaving),
        AnswerVerdict::EngineDead => Some(AttemptFailure::EngineDead),
        AnswerVerdict::Failed(code) if code < 500 => None,
        AnswerVerdict::Failed(_) => Some(AttemptFailure::EngineError),
    }
}

// === impl UpstreamAnswer ===

impl UpstreamAnswer {
    /// Reads the available bytes without waiting. An engine that dies right after its first event fails here,
    /// while another attempt can follow.
    fn read_available(&mut self) -> Result<(), AttemptFailure> {
        if self.over {
            return Ok(());
        }
        match self.connection.read_piece().now_or_never() {
            None => {}
            Some(Err(_)) => return Err(AttemptFailure::Reset),
            Some(Ok(None)) => self.over = true,
            Some(Ok(Some(piece))) => self.beginning.extend_from_slice(piece),
        }
        Ok(())
    }

    fn new(connection: UpstreamConnection, status: u16, held: MemoryReservation) -> Self {
        UpstreamAnswer {
            connection,
            status,
            beginning: Vec::new(),
            over: false,
            error_code: None,
            failure: None,
            held,
        }
    }

    pub(super) fn head(&self) -> &ResponseHeader {
        self.connection.head()
    }
}
