//! One request, from its head to its end: taken in, tried on one upstream after another, relayed.
//!
//! ```text
//! intake -> choose -> attempt -> relay -> record
//!              ^         |
//!              +- failed-+   while the retry rule allows another attempt
//! ```
//!
//! Only `ClientRequest`, `Attempts` and `RequestWatch` keep state from one step to the next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::{Error, Result};

use super::attempt::{AttemptError, UpstreamAnswer, attempt};
use super::capture::wait_until_stored;
use super::choose::choose;
use super::client::Client;
use super::context::RequestContext;
use super::intake::{Intake, take_in, watched};
use super::prompt_work::Placement;
use super::relay::{self, PreparedAnswer};
use super::request::{ClientRequest, RequestScope};
use super::settings::ProxySettings;
use super::watch::RequestWatch;
use super::{Balancer, cumulative, respond, stored, translation, tunnel};
use crate::fleet::{Blame, FailureKind, FilterResult, Outcome, Upstream, UpstreamQuery, UpstreamSignal};
use crate::reject::Reject;
use crate::reply::usage::Usage;
use crate::retry::{self, AttemptFailure, EndReason, RetryDecision, RetryFacts};

/// The reason why a request ends without an upstream's whole answer.
#[derive(Debug)]
pub enum RequestEnd {
    /// The balancer rejects the request.
    Reject(Reject),
    /// The client has disconnected, or has stopped reading.
    Disconnected(Box<Error>),
    /// The upstream failed after the first byte of its answer; the client has received the error.
    Broken(Box<Error>),
}

impl From<Reject> for RequestEnd {
    fn from(reject: Reject) -> Self {
        RequestEnd::Reject(reject)
    }
}

/// The facts of a request for its record.
#[derive(Default)]
pub struct RequestReport {
    /// The upstream of the last attempt.
    pub upstream: Option<Arc<Upstream>>,
    pub attempts: u32,
    pub status: u16,
    /// The outcome of the last attempt.
    pub outcome: Option<Outcome>,
    /// The label of the rejection that was sent.
    pub refused: Option<&'static str>,
    /// The time to the first event or byte of the model's output.
    pub first_byte: Option<Duration>,
    pub usage: Option<Usage>,
    pub bytes_received: u64,
    pub bytes_sent: u64,
}

/// A request that has ended, for its record and its connection.
pub struct FinishedRequest {
    pub request: ClientRequest,
    pub report: RequestReport,
    /// The connection must end without another byte.
    pub error: Option<Box<Error>>,
    /// The rest of the client's body is read before the connection closes: otherwise a reset could discard
    /// the refusal before the client reads it.
    pub drain: bool,
}

/// The attempts of one request.
#[derive(Default)]
pub struct Attempts {
    pub count: u32,
    /// The ids of the upstreams that were tried.
    pub tried: Vec<usize>,
    /// Upstreams that declined it.
    pub declined: Vec<usize>,
    /// The deadline of the wait for room.
    pub wait_until: Option<Instant>,
    /// The rejection for the client when no upstream is left.
    pub failed: Option<Reject>,
    /// An attempt found a pooled connection that had ended.
    stale: bool,
    /// Another attempt follows the one that failed.
    retry_follows: bool,
}

/// Carries one request to its end. Boxed, so that the caller's future stays small.
pub async fn carry(
    balancer: &Balancer,
    client: &mut Client<'_>,
    context: &RequestContext,
) -> Box<FinishedRequest> {
    let (shared, settings) = (&*balancer.shared, &*context.settings);
    let scope = RequestScope { shared, settings, id: &context.id, begun: context.started };
    let mut request = ClientRequest::new(settings.peeker.memory.reservation());
    let mut report = RequestReport::default();
    let served = serve(balancer, &scope, client, &mut request, &mut report).await;
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
    Box::new(FinishedRequest { request, report, error: ended.err(), drain })
}

async fn serve(
    balancer: &Balancer,
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    report: &mut RequestReport,
) -> Result<(), RequestEnd> {
    // Boxed: this future ends before the answer begins, and an idle stream should not hold its memory.
    match Box::pin(take_in(balancer, scope, client, request)).await? {
        Intake::Answer(answer) => {
            report.status = answer.status().as_u16();
            report.outcome = Some(Outcome::Answered(report.status));
            let close = client.may_omit_body() || scope.shared.shutdown.is_closing();
            respond::send(client, scope.id, request, answer, close).await.map_err(RequestEnd::Disconnected)
        }
        Intake::Forward(mut watch) => forward(scope, client, request, &mut watch, report).await,
    }
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
    let routing = snapshot.candidates(&query, Instant::now(), &mut Vec::new());
    matches!(routing, FilterResult::Candidates | FilterResult::Full { .. })
}

/// Reports a failed attempt.
fn report_attempt(
    scope: &RequestScope<'_>,
    placement: &Placement,
    failure: AttemptFailure,
    report: &mut RequestReport,
) {
    report.outcome = Some(outcome_of(failure));
    scope.shared.observer.attempt_failed(
        scope.id,
        placement.upstream().name(),
        failure.label(),
        report.attempts,
    );
}

/// Reports an answer that failed after its beginning, also to the fleet: no attempt can follow.
pub fn report_failure(
    scope: &RequestScope<'_>,
    placement: &Placement,
    failure: AttemptFailure,
    report: &mut RequestReport,
) {
    report_attempt(scope, placement, failure, report);
    match fault_of(failure) {
        UpstreamFault::Signal(signal) => scope.shared.fleet.report(placement.upstream(), signal),
        UpstreamFault::Failed(_) => scope.shared.fleet.report(placement.upstream(), UpstreamSignal::Failed),
        UpstreamFault::None => {}
    }
}

/// The evidence of an attempt's failure against its upstream.
enum UpstreamFault {
    None,
    /// The upstream reported it, or could not be reached.
    Signal(UpstreamSignal),
    /// The upstream failed with the request, which may itself be the cause.
    Failed(FailureKind),
}

fn outcome_of(failure: AttemptFailure) -> Outcome {
    match failure {
        AttemptFailure::Connect { .. } => Outcome::Unreached,
        AttemptFailure::Status(status) => Outcome::Answered(status),
        AttemptFailure::Leaving | AttemptFailure::EngineError | AttemptFailure::EngineDead => {
            Outcome::Answered(500)
        }
        AttemptFailure::Stale
        | AttemptFailure::Reset
        | AttemptFailure::Aborted
        | AttemptFailure::Ended(_) => Outcome::Broken,
    }
}

fn fault_of(failure: AttemptFailure) -> UpstreamFault {
    match failure {
        AttemptFailure::Connect { refused } => UpstreamFault::Signal(UpstreamSignal::Unreached { refused }),
        AttemptFailure::EngineDead => UpstreamFault::Signal(UpstreamSignal::EngineDead),
        AttemptFailure::Leaving => UpstreamFault::Signal(UpstreamSignal::ShuttingDown),
        AttemptFailure::Aborted => UpstreamFault::Signal(UpstreamSignal::GaveUp),
        AttemptFailure::Reset => UpstreamFault::Failed(FailureKind::Reset),
        AttemptFailure::EngineError => UpstreamFault::Failed(FailureKind::ErrorEvent(500)),
        AttemptFailure::Status(status @ (500 | 502 | 504..)) => {
            UpstreamFault::Failed(FailureKind::Status(status))
        }
        // A long answer is not the upstream's fault, nor is a job that still waits in the engine.
        AttemptFailure::Ended(
            EndReason::Total | EndReason::Abandoned | EndReason::SlowUpload | EndReason::Refused,
        ) => UpstreamFault::None,
        // A hanging engine still answers probes: only requests detect it.
        AttemptFailure::Ended(
            EndReason::FirstByte | EndReason::Idle | EndReason::Gone | EndReason::Unread,
        ) => UpstreamFault::Failed(FailureKind::Silence),
        // A full upstream was reported with its head; a pooled connection may end at any time.
        AttemptFailure::Status(_) | AttemptFailure::Stale => UpstreamFault::None,
    }
}

/// Reports an attempt's failure to the fleet.
fn report_fault(
    scope: &RequestScope<'_>,
    blame: &mut Blame<'_>,
    placement: &Placement,
    failure: AttemptFailure,
) {
    match fault_of(failure) {
        UpstreamFault::None => {}
        UpstreamFault::Signal(signal) => scope.shared.fleet.report(placement.upstream(), signal),
        UpstreamFault::Failed(kind) => blame.failed(placement.upstream().id, kind),
    }
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
    respond::send(client, scope.id, request, answer, close).await
}

// === impl Attempts ===

impl Attempts {
    /// The query for the next attempt's candidates.
    pub fn query<'a>(
        &'a self,
        request: &'a ClientRequest,
        settings: &ProxySettings,
        among: Option<&'a [usize]>,
    ) -> UpstreamQuery<'a> {
        let (tried, declined, again) = (&self.tried, &self.declined, self.count > 0);
        UpstreamQuery { tried, declined, again, ..request.query(settings, among) }
    }

    /// Records the beginning of an attempt on this upstream.
    pub fn begin(&mut self, upstream: usize) {
        self.count += 1;
        self.tried.push(upstream);
    }

    /// Permits another attempt on the same upstream, with another body.
    fn try_again(&mut self, placement: &Placement) {
        self.tried.retain(|id| *id != placement.upstream().id);
        self.retry_follows = true;
    }

    fn record_failure(&mut self, scope: &RequestScope<'_>, placement: &Placement, failure: AttemptFailure) {
        let upstream = placement.upstream();
        self.stale |= failure == AttemptFailure::Stale;
        if failure.declines() {
            self.declined.push(upstream.id);
        }
        let name = scope.settings.expose.then(|| upstream.name().to_string());
        self.failed = Some(match failure {
            AttemptFailure::Ended(EndReason::Gone) => Reject::Upstream { name },
            AttemptFailure::Ended(_) => Reject::Timeout { name },
            _ => Reject::Upstream { name },
        });
    }
}
