//! One request, from its head to its end: taken in, tried on one upstream after another, relayed.
//!
//! ```text
//! intake -> choose -> attempt -> relay -> record
//!              ^         |
//!              +- failed-+   while the retry rule allows another attempt
//! ```
//!
//! Only `ClientRequest`, `Attempts` and `RequestWatch` keep state from one step to the next.

use std::time::Instant;

use http::StatusCode;
use pingora::{Error, Result};

use super::admin_service::AdminService;
use super::attempt::{AttemptError, UpstreamAnswer, attempt};
use super::attempts::Attempts;
use super::choose::choose;
use super::client::Client;
use super::context::RequestContext;
use super::intake::{Intake, take_in};
use super::placement::{self, Placement};
use super::relay::{self, PreparedAnswer, wait_until_stored};
use super::request::{ClientRequest, RequestScope};
use super::request_end::RequestEnd;
use super::request_report::{RequestReport, report_attempt, report_fault};
use super::shared::ProxyShared;
use super::watch::RequestWatch;
use super::watched::watched;
use super::{admin_stream, cumulative, respond, stored, translation, tunnel};
use crate::fleet::{FilterResult, Outcome, UpstreamQuery};
use crate::observe::request::RequestTimes;
use crate::reject::Reject;
use crate::retry::{self, AttemptFailure, RetryDecision, RetryFacts};

/// A request that has ended, for its record and its connection.
pub(super) struct FinishedRequest {
    pub request: ClientRequest,
    pub report: RequestReport,
    pub times: RequestTimes,
    /// The connection must end without another byte.
    pub error: Option<Box<Error>>,
    /// The rest of the client's body is read before the connection closes: otherwise a reset could discard
    /// the refusal before the client reads it.
    pub drain: bool,
}

/// Carries one request to its end. Boxed, so that the caller's future stays small.
pub(super) async fn carry(
    shared: &ProxyShared,
    admin: Option<&dyn AdminService>,
    client: &mut Client<'_>,
    context: &RequestContext,
) -> Box<FinishedRequest> {
    let settings = &*context.settings;
    let scope = RequestScope {
        shared,
        settings,
        admin,
        id: &context.id,
        trace: context.trace.as_deref(),
        begun: context.started,
    };
    let mut request = ClientRequest::new(settings.peeker.memory.reservation());
    let mut report = RequestReport::default();
    let (served, times) = serve(&scope, client, &mut request, &mut report).await;
    if let Some(capture) = &mut request.capture {
        capture.end(served.as_ref().copied());
        wait_until_stored(&scope, &mut request).await;
    }
    let ended = match served {
        Err(RequestEnd::Reject(reject)) if !client.has_answer() => {
            refuse(&scope, client, &mut request, &mut report, &reject).await
        }
        Err(RequestEnd::Reject(reject)) => {
            Err(Error::explain(pingora::ErrorType::Custom("refused"), reject.label()))
        }
        Err(RequestEnd::Disconnected(error)) => {
            report.outcome = Some(Outcome::ClientGone);
            Err(error)
        }
        Err(RequestEnd::Broken(error)) => Err(error),
        // Otherwise pingora would write the end of an answer that the client has stopped reading.
        Ok(()) if client.is_gone() => Err(Error::explain(pingora::ErrorType::Custom("gone"), "client")),
        Ok(()) => Ok(()),
    };
    let unread = report.refused.is_some() && report.attempts > 0 && !request.body.is_complete();
    let drain = unread || client.sends_chunks();
    (report.bytes_received, report.bytes_sent) = (request.forwarded, client.bytes_sent());
    request.body.release();
    Box::new(FinishedRequest { request, report, times, error: ended.err(), drain })
}

/// Serves the request. Returns its phases as well, which are the watch's until its end.
async fn serve(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    report: &mut RequestReport,
) -> (Result<(), RequestEnd>, RequestTimes) {
    // Boxed: this future ends before the answer begins, and an idle stream should not hold its memory.
    let mut watch = match Box::pin(take_in(scope, client, request)).await {
        Ok(Intake::Forward(watch)) => watch,
        // Moved as a whole: an idle stream would hold the room of what waits here in parts.
        own => return (answer(scope, client, request, report, own).await, RequestTimes::default()),
    };
    let end = forward(scope, client, request, &mut watch, report).await;
    (end, watch.times())
}

/// Sends the balancer's own answer.
async fn answer(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    report: &mut RequestReport,
    intake: Result<Intake, RequestEnd>,
) -> Result<(), RequestEnd> {
    let mut record = |status: StatusCode| {
        report.status = status.as_u16();
        report.outcome = Some(Outcome::Answered(report.status));
    };
    let sent = match intake? {
        Intake::Answer(answer) => {
            record(answer.status());
            let close = client.may_omit_body() || scope.shared.shutdown.is_closing();
            respond::send(scope, client, request, answer, close).await
        }
        Intake::Stream(answer) => {
            record(answer.status());
            // Boxed: other requests should not hold its room.
            Box::pin(admin_stream::send(scope, client, answer)).await
        }
        // `serve` forwards it.
        Intake::Forward(_) => Ok(()),
    };
    sent.map_err(RequestEnd::Disconnected)
}

/// Tries the request on one upstream after another, and relays the answer.
async fn forward(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    watch: &mut RequestWatch,
    report: &mut RequestReport,
) -> Result<(), RequestEnd> {
    scope.shared.budget.request(request.retry(scope.settings).budget);
    let (mut attempts, mut blame) = (Attempts::default(), scope.shared.fleet.blame());
    loop {
        pause_before_retry(scope, client, request, &attempts, watch).await?;
        let mut placement = choose(scope, client, request, &mut attempts, watch).await?;
        (report.attempts, report.upstream) = (attempts.count, Some(placement.upstream().clone()));
        report.forecast = Some(placement.forecast);
        if let Some(capture) = &mut request.capture {
            capture.attempt(placement.upstream().name(), attempts.count);
        }
        let trying = attempt(scope, client, request, &mut placement, watch, attempts.stale);
        // Boxed after a failed attempt: most requests have one attempt and need no memory for more.
        let tried = if blame.is_open() { blame.during(Box::pin(trying)).await } else { trying.await };
        let failure = match conclude_attempt(scope, client, request, &placement, &mut attempts, tried).await {
            AttemptResult::Answer(answer) if answer.is_upgrade() => {
                blame.conclude();
                return tunnel::carry(scope, client, request, &mut placement, answer, watch, report).await;
            }
            AttemptResult::Answer(answer) => {
                answer
                    .failure()
                    .into_iter()
                    .for_each(|failure| report_fault(scope, &mut blame, &placement, failure));
                blame.conclude();
                return relay::relay(scope, client, request, &mut placement, answer, watch, report).await;
            }
            AttemptResult::Failed(failure) => failure,
            AttemptResult::Stopped(stop) => {
                placement.conclude(scope, request, true);
                return Err(stop);
            }
        };
        watch.end_attempt();
        placement.conclude(scope, request, failure.may_have_read());
        report_attempt(scope, &placement, failure, report);
        report_fault(scope, &mut blame, &placement, failure);
        attempts.record_failure(scope, &placement, failure);
        drop(placement);
        if !std::mem::take(&mut attempts.retry_follows) {
            return Err(attempts.failed.take().unwrap_or(Reject::Internal).into());
        }
        scope.shared.observer.retried(failure.label());
        request.forget_answer();
    }
}

/// The result of an attempt.
enum AttemptResult {
    Answer(Box<PreparedAnswer>),
    /// `Attempts::retry_follows` has the decision on a retry.
    Failed(AttemptFailure),
    Stopped(RequestEnd),
}

/// Decides whether an attempt's answer goes to the client, or another attempt follows.
async fn conclude_attempt(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    placement: &Placement,
    attempts: &mut Attempts,
    tried: Result<Box<UpstreamAnswer>, AttemptError>,
) -> AttemptResult {
    let (failure, answer) = match tried {
        Err(AttemptError::Stopped(stop)) => return AttemptResult::Stopped(stop),
        Err(AttemptError::Failed(failure, answer)) => (Some(failure), answer),
        Ok(answer) => (None, Some(answer)),
    };
    if let (None, Some(answer)) = (failure, &answer)
        && stored::retries_elsewhere(scope.shared, request, answer.status).await
    {
        attempts.retry_follows = true;
        return AttemptResult::Failed(AttemptFailure::Status(answer.status));
    }
    if let Some(answer) = &answer
        && cumulative::is_refused(scope, request, answer.status)
    {
        attempts.try_again(placement);
        return AttemptResult::Failed(AttemptFailure::Status(answer.status));
    }
    if let Some(failure) = failure {
        attempts.retry_follows = permit_retry(scope, request, attempts, failure);
        if failure == AttemptFailure::EngineDead && !has_untried_upstream(scope, request, attempts) {
            // The engine's error tells the client more than a failure to find another upstream.
            attempts.retry_follows = false;
        }
        if attempts.retry_follows || answer.is_none() {
            return AttemptResult::Failed(failure);
        }
    }
    let Some(mut answer) = answer else { return AttemptResult::Failed(AttemptFailure::Reset) };
    // The client gets the answer, and the upstream is judged by it.
    answer.failure = failure;
    let prepared = relay::prepare(scope, client, request, placement, *answer, attempts.count);
    if let Some(reject) = prepared.as_ref().err().and_then(|error| translation::refusal_of(error)) {
        return AttemptResult::Stopped(reject.into());
    }
    let broken = prepared.is_err() || relay::is_broken(request);
    if broken && cumulative::give_up(scope, request) {
        attempts.try_again(placement);
        return AttemptResult::Failed(AttemptFailure::Reset);
    }
    if broken && permit_retry(scope, request, attempts, AttemptFailure::Reset) {
        attempts.retry_follows = true;
        return AttemptResult::Failed(AttemptFailure::Reset);
    }
    prepared.map_or(AttemptResult::Failed(AttemptFailure::Reset), |answer| {
        AttemptResult::Answer(Box::new(answer))
    })
}

/// Waits before a retry. The client is checked even without a pause: a disconnect while a connection was
/// made is detected here.
async fn pause_before_retry(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    attempts: &Attempts,
    watch: &mut RequestWatch,
) -> Result<(), RequestEnd> {
    if attempts.count == 0 {
        return Ok(());
    }
    let random = scope.shared.random.next();
    let pause = retry::pause(request.retry(scope.settings), attempts.count + 1, random);
    let pausing = async {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    };
    watched(client, request, watch, true, Box::pin(pausing)).await
}

/// Whether another attempt may follow a failure; if so, takes it from the retry budget.
fn permit_retry(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    attempts: &Attempts,
    failure: AttemptFailure,
) -> bool {
    let retry = request.retry(scope.settings);
    let replayable = request.body.is_replayable();
    let facts = RetryFacts { attempts: attempts.count, replayable, pinned: request.pinned };
    let pays = || scope.shared.budget.take(retry.budget);
    match retry::decide(failure, facts, retry) {
        RetryDecision::Stop => false,
        RetryDecision::Free => true,
        RetryDecision::Paid => pays(),
        RetryDecision::PaidElsewhere => has_untried_upstream(scope, request, attempts) && pays(),
    }
}

/// Whether an untried upstream may take the request, now or when it has room.
fn has_untried_upstream(scope: &RequestScope<'_>, request: &ClientRequest, attempts: &Attempts) -> bool {
    let snapshot = scope.shared.fleet.snapshot();
    let among = request.among(&snapshot);
    let query = UpstreamQuery { tried: &attempts.tried, ..request.query(scope.settings, among.as_deref()) };
    let routing =
        placement::with_candidates(|candidates| snapshot.candidates(&query, Instant::now(), candidates));
    matches!(routing, FilterResult::Candidates | FilterResult::Full { .. })
}

/// Answers with a rejection.
async fn refuse(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    report: &mut RequestReport,
    reject: &Reject,
) -> Result<()> {
    scope.shared.observer.rejected(reject.label());
    report.refused = Some(reject.label());
    report.status = reject.status();
    // The client did not get the answer: its usage is not counted.
    report.usage = None;
    let unread = report.attempts > 0 && !request.body.is_complete();
    let close = unread || client.may_omit_body() || reject.closes() || scope.shared.shutdown.is_closing();
    let answer = respond::refusal(reject, request.style);
    respond::send(scope, client, request, answer, close).await
}
