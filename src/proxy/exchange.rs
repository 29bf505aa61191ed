//! One request, from its head to its end: taken in, tried on one upstream after another, relayed.
//!
//! ```text
//! intake -> choose -> attempt -> relay -> report
//!              ^         |
//!              +- failed-+   while the retry rule allows another attempt
//! ```
//!
//! Never: state that outlives a step but what is in `ClientRequest`, `Tries` and `Watch`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::{Error, Result};

use super::attempt::{AttemptError, UpstreamAnswer, attempt};
use super::choose::choose;
use super::client::Client;
use super::context::{Context, FinishedRequest};
use super::intake::{Intake, take_in, watched};
use super::prompt_work::Placement;
use super::relay::{self, PreparedAnswer};
use super::request::{ClientRequest, Scope};
use super::settings::Settings;
use super::watch::Watch;
use super::{Balancer, respond, stored, translation, tunnel};
use crate::fleet::{Blame, FailureKind, Outcome, Query, Routing, Sign, Upstream};
use crate::observe;
use crate::reject::Reject;
use crate::reply::usage::Usage;
use crate::retry::{self, AttemptFailure, EndReason, RetryDecision, RetryFacts};

/// Why a request ends without an upstream's whole answer.
#[derive(Debug)]
pub enum Stop {
    /// The balancer refuses it.
    Reject(Reject),
    /// The client has disconnected, or does not read.
    Disconnected(Box<Error>),
    /// The upstream failed behind the first byte of its answer, and the client has been told.
    Broken(Box<Error>),
}

impl From<Reject> for Stop {
    fn from(reject: Reject) -> Self {
        Stop::Reject(reject)
    }
}

/// What is put down of a request for its record.
#[derive(Default)]
pub struct Report {
    /// The upstream of the last attempt.
    pub upstream: Option<Arc<Upstream>>,
    pub attempts: u32,
    pub status: u16,
    /// How the last attempt ended.
    pub outcome: Option<Outcome>,
    /// The label of a refusal that went out.
    pub refused: Option<&'static str>,
    /// Until the first event, or byte, of what the model says.
    pub first_byte: Option<Duration>,
    pub usage: Option<Usage>,
    pub bytes_received: u64,
    pub bytes_sent: u64,
}

/// The attempts of one request.
#[derive(Default)]
pub struct Tries {
    pub made: u32,
    /// Upstreams that have had it, by their ids.
    pub tried: Vec<usize>,
    /// Upstreams that declined it.
    pub away: Vec<usize>,
    /// Until when it waits for room.
    pub wait_until: Option<Instant>,
    /// What the client is told when no upstream is left.
    pub failed: Option<Reject>,
    /// An attempt met a pooled connection that had ended.
    stale: bool,
    /// Another attempt follows the one that failed.
    another: bool,
}

/// Carries one request. Fails where the connection must end without another byte.
pub async fn carry(balancer: &Balancer, client: &mut Client<'_>, context: &mut Context) -> Result<()> {
    let (settings, id) = (context.settings.clone(), std::mem::take(&mut context.id));
    let shared = &*balancer.shared;
    let scope = Scope { shared, settings: &settings, id: &id, begun: context.started };
    let mut request = ClientRequest::new(settings.peeker.memory.reservation());
    let mut report = Report::default();
    let served = serve(balancer, &scope, client, &mut request, &mut report).await;
    let ended = match served {
        Err(Stop::Reject(reject)) if !client.has_answer() => {
            refuse(&scope, client, &mut request, &mut report, &reject).await
        }
        Err(Stop::Reject(reject)) => {
            Err(Error::explain(pingora::ErrorType::Custom("refused"), reject.label()))
        }
        Err(Stop::Disconnected(error)) => {
            report.outcome = Some(Outcome::ClientGone);
            Err(error)
        }
        Err(Stop::Broken(error)) => Err(error),
        // Pingora would write the end of an answer that the client has stopped reading.
        Ok(()) if client.is_gone() => Err(Error::explain(pingora::ErrorType::Custom("gone"), "client")),
        Ok(()) => Ok(()),
    };
    let unread = report.refused.is_some() && report.attempts > 0 && !request.body.is_complete();
    context.drain = unread || client.sends_chunks();
    (report.bytes_received, report.bytes_sent) = (request.forwarded, client.bytes_sent());
    context.id = id;
    request.body.release();
    context.finished = Some(Box::new(FinishedRequest { request, report }));
    ended
}

async fn serve(
    balancer: &Balancer,
    scope: &Scope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    report: &mut Report,
) -> Result<(), Stop> {
    // Boxed: it ends before the answer begins, and an idle stream should not hold its room.
    match Box::pin(take_in(balancer, scope, client, request)).await? {
        Intake::Answer(answer) => {
            report.status = answer.status().as_u16();
            report.outcome = Some(Outcome::Answered(report.status));
            let close = scope.shared.leave.is_closing();
            respond::send(client, scope.id, request, answer, close).await.map_err(Stop::Disconnected)
        }
        Intake::Forward(mut watch) => forward(scope, client, request, &mut watch, report).await,
    }
}

/// Tries the request on one upstream after another, and relays the answer.
async fn forward(
    scope: &Scope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    watch: &mut Watch,
    report: &mut Report,
) -> Result<(), Stop> {
    scope.shared.budget.request(request.retry(scope.settings).budget);
    let (mut tries, mut blame) = (Tries::default(), scope.shared.fleet.blame());
    loop {
        pause(scope, client, request, &tries, watch).await?;
        let mut placement = choose(scope, client, request, &mut tries, watch).await?;
        (report.attempts, report.upstream) = (tries.made, Some(placement.upstream().clone()));
        let trying = attempt(scope, client, request, &mut placement, watch, tries.stale);
        // Boxed where another attempt has failed: most requests have one, and pay nothing for that.
        let tried = if blame.is_open() { blame.during(Box::pin(trying)).await } else { trying.await };
        let failure = match settle(scope, client, request, &placement, &mut tries, tried).await {
            Settled::Answer(answer) if answer.is_upgrade() => {
                blame.conclude();
                return tunnel::carry(scope, client, request, &mut placement, answer, watch, report).await;
            }
            Settled::Answer(answer) => {
                answer
                    .failure()
                    .into_iter()
                    .for_each(|failure| fault(scope, &mut blame, &placement, failure));
                blame.conclude();
                return relay::relay(scope, client, request, &mut placement, answer, watch, report).await;
            }
            Settled::Failed(failure) => failure,
            Settled::Stopped(stop) => {
                placement.conclude(scope, request, true);
                return Err(stop);
            }
        };
        watch.end_attempt();
        placement.conclude(scope, request, failure.may_have_read());
        report_attempt(scope, &placement, failure, report);
        fault(scope, &mut blame, &placement, failure);
        tries.note(scope, &placement, failure);
        drop(placement);
        if !std::mem::take(&mut tries.another) {
            return Err(tries.failed.take().unwrap_or(Reject::Internal).into());
        }
        observe::retried(failure.label());
        request.forget_answer();
    }
}

/// What an attempt comes to.
enum Settled {
    Answer(Box<PreparedAnswer>),
    /// Whether another attempt follows stands in `Tries`.
    Failed(AttemptFailure),
    Stopped(Stop),
}

/// Decides whether an attempt's answer goes to the client, or another attempt follows.
async fn settle(
    scope: &Scope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    placement: &Placement,
    tries: &mut Tries,
    tried: Result<Box<UpstreamAnswer>, AttemptError>,
) -> Settled {
    let (failure, answer) = match tried {
        Err(AttemptError::Stopped(stop)) => return Settled::Stopped(stop),
        Err(AttemptError::Failed(failure, answer)) => (Some(failure), answer),
        Ok(answer) => (None, Some(answer)),
    };
    if let (None, Some(answer)) = (failure, &answer)
        && stored::elsewhere(scope.shared, request, answer.status).await
    {
        tries.another = true;
        return Settled::Failed(AttemptFailure::Status(answer.status));
    }
    if let Some(failure) = failure {
        tries.another = may_follow(scope, request, tries, failure);
        if failure == AttemptFailure::EngineDead && !has_another(scope, request, tries) {
            // The engine's own words tell the client more than a failure to find another.
            tries.another = false;
        }
        if tries.another || answer.is_none() {
            return Settled::Failed(failure);
        }
    }
    let Some(mut answer) = answer else { return Settled::Failed(AttemptFailure::Reset) };
    // The client gets the answer, and the upstream is judged by it.
    answer.failure = failure;
    let prepared = relay::prepare(scope, client, request, placement, *answer, tries.made);
    if let Some(limit) = prepared.as_ref().err().and_then(|error| translation::limit_of(error)) {
        // Another upstream would hardly answer otherwise.
        return Settled::Stopped(Reject::LargeAnswer { limit }.into());
    }
    let broken = prepared.is_err() || relay::is_broken(request);
    if broken && may_follow(scope, request, tries, AttemptFailure::Reset) {
        tries.another = true;
        return Settled::Failed(AttemptFailure::Reset);
    }
    prepared.map_or(Settled::Failed(AttemptFailure::Reset), |answer| Settled::Answer(Box::new(answer)))
}

/// Waits before another attempt. The client is looked at even when there is no pause: one that disconnected
/// while a connection was made is noticed here.
async fn pause(
    scope: &Scope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    tries: &Tries,
    watch: &mut Watch,
) -> Result<(), Stop> {
    if tries.made == 0 {
        return Ok(());
    }
    let random = scope.shared.random.next();
    let pause = retry::pause(request.retry(scope.settings), tries.made + 1, random);
    let pausing = async {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    };
    watched(client, request, watch, true, Box::pin(pausing)).await
}

/// Whether another attempt may follow a failure; it is paid for if so.
fn may_follow(scope: &Scope<'_>, request: &ClientRequest, tries: &Tries, failure: AttemptFailure) -> bool {
    let retry = request.retry(scope.settings);
    let replayable = request.body.is_replayable();
    let facts = RetryFacts { attempts: tries.made, replayable, pinned: request.pinned };
    let pays = || scope.shared.budget.take(retry.budget);
    match retry::decide(failure, facts, retry) {
        RetryDecision::Stop => false,
        RetryDecision::Free => true,
        RetryDecision::Paid => pays(),
        RetryDecision::PaidElsewhere => has_another(scope, request, tries) && pays(),
    }
}

/// Whether an upstream that was not tried may have the request, now or when it has room.
fn has_another(scope: &Scope<'_>, request: &ClientRequest, tries: &Tries) -> bool {
    let snapshot = scope.shared.fleet.snapshot();
    let among = request.among(&snapshot);
    let query = Query { tried: &tries.tried, ..request.query(scope.settings, among.as_deref()) };
    let routing = snapshot.candidates(&query, Instant::now(), &mut Vec::new());
    matches!(routing, Routing::Candidates | Routing::Full { .. })
}

/// Puts down that an attempt failed.
fn report_attempt(scope: &Scope<'_>, placement: &Placement, failure: AttemptFailure, report: &mut Report) {
    report.outcome = Some(outcome_of(failure));
    observe::attempt_failed(scope.id, placement.upstream().name(), failure.label(), report.attempts);
}

/// Puts down that an answer that had begun failed, and tells the fleet: no attempt can follow.
pub fn report_failure(
    scope: &Scope<'_>,
    placement: &Placement,
    failure: AttemptFailure,
    report: &mut Report,
) {
    report_attempt(scope, placement, failure, report);
    match sign_of(failure) {
        Fault::Sign(sign) => scope.shared.fleet.report(placement.upstream(), sign),
        Fault::Failed(_) => scope.shared.fleet.report(placement.upstream(), Sign::Failed),
        Fault::None => {}
    }
}

/// What an attempt's failure says about its upstream.
enum Fault {
    None,
    /// The upstream's own word, or it was not reached.
    Sign(Sign),
    /// It failed with the request, which may be the cause itself.
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

fn sign_of(failure: AttemptFailure) -> Fault {
    match failure {
        AttemptFailure::Connect { refused } => Fault::Sign(Sign::Unreached { refused }),
        AttemptFailure::EngineDead => Fault::Sign(Sign::EngineDead),
        AttemptFailure::Leaving => Fault::Sign(Sign::Leaving),
        AttemptFailure::Aborted => Fault::Sign(Sign::GaveUp),
        AttemptFailure::Reset => Fault::Failed(FailureKind::Reset),
        AttemptFailure::EngineError => Fault::Failed(FailureKind::ErrorEvent(500)),
        AttemptFailure::Status(status @ (500 | 502 | 504..)) => Fault::Failed(FailureKind::Status(status)),
        // A long answer is no fault of the upstream's, nor is a job that has not had its turn.
        AttemptFailure::Ended(
            EndReason::Total | EndReason::Abandoned | EndReason::SlowUpload | EndReason::Refused,
        ) => Fault::None,
        // Probes of an engine that hangs are answered well; only requests can tell.
        AttemptFailure::Ended(
            EndReason::FirstByte | EndReason::Idle | EndReason::Gone | EndReason::Unread,
        ) => Fault::Failed(FailureKind::Silence),
        // A full upstream was reported with its head; a pooled connection may end at any time.
        AttemptFailure::Status(_) | AttemptFailure::Stale => Fault::None,
    }
}

/// Tells the fleet what an attempt's failure says about its upstream.
fn fault(scope: &Scope<'_>, blame: &mut Blame<'_>, placement: &Placement, failure: AttemptFailure) {
    match sign_of(failure) {
        Fault::None => {}
        Fault::Sign(sign) => scope.shared.fleet.report(placement.upstream(), sign),
        Fault::Failed(kind) => blame.failed(placement.upstream().id, kind),
    }
}

/// Answers with a refusal.
async fn refuse(
    scope: &Scope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    report: &mut Report,
    reject: &Reject,
) -> Result<()> {
    observe::rejected(reject.label());
    report.refused = Some(reject.label());
    report.status = reject.status();
    // What an answer reported that no client got counts for nothing.
    report.usage = None;
    let unread = report.attempts > 0 && !request.body.is_complete();
    let close = unread || client.may_omit_body() || reject.closes() || scope.shared.leave.is_closing();
    let answer = respond::refusal(reject, request.style);
    respond::send(client, scope.id, request, answer, close).await
}

// === impl Tries ===

impl Tries {
    /// What the request asks of the fleet now.
    pub fn query<'a>(
        &'a self,
        request: &'a ClientRequest,
        settings: &Settings,
        among: Option<&'a [usize]>,
    ) -> Query<'a> {
        let (tried, away, again) = (&self.tried, &self.away, self.made > 0);
        Query { tried, away, again, ..request.query(settings, among) }
    }

    /// An attempt on this upstream begins.
    pub fn begin(&mut self, upstream: usize) {
        self.made += 1;
        self.tried.push(upstream);
    }

    fn note(&mut self, scope: &Scope<'_>, placement: &Placement, failure: AttemptFailure) {
        let upstream = placement.upstream();
        self.stale |= failure == AttemptFailure::Stale;
        if failure.declines() {
            self.away.push(upstream.id);
        }
        let name = scope.settings.expose.then(|| upstream.name().to_string());
        self.failed = Some(match failure {
            AttemptFailure::Ended(EndReason::Gone) => Reject::Upstream { name },
            AttemptFailure::Ended(_) => Reject::Timeout { name },
            _ => Reject::Upstream { name },
        });
    }
}
