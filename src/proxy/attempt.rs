//! One attempt after another: choosing an upstream, what an attempt's failure means, and whether
//! another may follow.
//!
//! An attempt may follow only while nothing of an answer has gone to the client, all that was read of the
//! body is still held, and the client's request is not bound to one upstream. Failures that cost no engine
//! anything (nobody listening, a pooled connection that had ended, an engine that is leaving) are tried
//! again as long as there is somebody else; the others within `retry.attempts` and the budget.

use std::future::Future;
use std::time::{Duration, Instant};

use pingora::http::ResponseHeader;
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType, Result};

use super::context::Context;
use super::line::Ended;
use super::{Shared, plan, prompt, refuse};
use crate::config::types::{Retry, RetryOn};
use crate::fleet::{Lease, Outcome, Query, Refused, Routing, Sign, Turn, Upstream};
use crate::observe;
use crate::observe::decisions::Decision;
use crate::pick::{self, Seed};
use crate::reject::Reject;
use crate::reply::judge::Verdict;

/// Tries for one request at the most, however cheap they are.
const MOST: u32 = 8;

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Could not be reached.
    Connect {
        refused: bool,
    },
    /// A pooled connection that had ended meanwhile.
    Stale,
    /// The connection ended before the answer began.
    Reset,
    Status(u16),
    /// It is shutting down.
    Leaving,
    /// It aborted without a token, which it does while it shuts down.
    Aborted,
    /// The first event was an error of its own.
    Failed,
    /// A deadline: the request is over. Or the silence of an upstream that is gone.
    Ended(Ended),
}

impl Cause {
    pub fn label(self) -> &'static str {
        match self {
            Cause::Connect { .. } => "connect",
            Cause::Stale => "stale",
            Cause::Reset => "reset",
            Cause::Status(429) => "429",
            Cause::Status(502) => "502",
            Cause::Status(503) => "503",
            Cause::Status(504) => "504",
            Cause::Status(_) => "status",
            Cause::Leaving => "leaving",
            Cause::Aborted => "aborted",
            Cause::Failed => "failed",
            Cause::Ended(Ended::Gone) => "gone",
            Cause::Ended(_) => "ended",
        }
    }

    /// Costs no engine anything.
    fn is_cheap(self) -> bool {
        self == Cause::Stale || self.sends_away()
    }

    /// Asking the same upstream again will hardly end otherwise: waiting for another is better.
    fn sends_away(self) -> bool {
        matches!(self, Cause::Connect { .. } | Cause::Leaving | Cause::Aborted)
    }

    /// Whether an engine may have read the prompt.
    fn reached(self) -> bool {
        match self {
            Cause::Connect { .. } | Cause::Stale | Cause::Leaving | Cause::Aborted => false,
            Cause::Status(status) => !is_refusal(status),
            Cause::Reset | Cause::Failed | Cause::Ended(_) => true,
        }
    }

    fn is_on(self, on: &RetryOn) -> bool {
        match self {
            Cause::Connect { .. } => on.connect,
            // What SIGTERM leaves behind: its connections stay open, and nothing ever comes on them.
            Cause::Stale | Cause::Reset | Cause::Ended(Ended::Gone) => on.reset,
            Cause::Status(502) => on.bad_gateway,
            Cause::Status(503) => on.unavailable,
            Cause::Status(504) => on.gateway_timeout,
            Cause::Leaving | Cause::Aborted | Cause::Failed => on.abort,
            Cause::Status(_) | Cause::Ended(_) => false,
        }
    }

    fn outcome(self, status: u16) -> Outcome {
        match self {
            Cause::Connect { .. } => Outcome::Unreached,
            Cause::Status(status) => Outcome::Answered(status),
            Cause::Leaving | Cause::Failed => Outcome::Answered(status.max(500)),
            Cause::Stale | Cause::Reset | Cause::Aborted | Cause::Ended(_) => Outcome::Broken,
        }
    }
}

/// Whether an answer with this status says that the prompt was not read: something is wrong with the request,
/// or the engine is too busy, or leaves, or a gateway did not find it. One that waited too long says nothing.
pub fn is_refusal(status: u16) -> bool {
    matches!(status, 400..500 | 502 | 503)
}

/// Chooses an upstream that was not tried yet, and takes a lease on it. While all who could have the
/// request are full it waits its turn; the client's leave ends the wait.
pub async fn choose(shared: &Shared, session: &mut Session, context: &mut Context) -> Result<()> {
    // One wait for all attempts together.
    let wait = context.settings.wait;
    let deadline = *context.wait_until.get_or_insert_with(|| Instant::now() + wait);
    let model = context.model.name().map(str::to_string);
    let mut turn: Option<Turn> = None;
    loop {
        let (tried, away) = (std::mem::take(&mut context.tried), context.away.clone());
        let among = context.among(&shared.fleet.snapshot());
        let query = Query {
            model: model.as_deref(),
            tokens: context.tokens,
            tried: &tried,
            again: context.attempts > 1,
            away: &away,
            only: context.only,
            among: among.as_deref(),
            has_aliases: !context.settings.peeker.routes.is_empty(),
        };
        let full = match turn {
            None if shared.fleet.must_wait(&query) => Some(None),
            _ => look(shared, context, &query)?,
        };
        let waited = match full {
            None => {
                turn.into_iter().for_each(Turn::taken);
                context.tried = tried;
                context.tried.extend(context.lease.as_ref().map(|lease| lease.upstream().id));
                return Ok(());
            }
            Some(until) => {
                let waiting = async {
                    match turn.take() {
                        Some(turn) => turn.wait_on(until, deadline).await,
                        None => shared.fleet.wait(&query, until, deadline).await,
                    }
                };
                watched(session, context, waiting).await?
            }
        };
        context.tried = tried;
        match waited {
            Ok(mine) => turn = Some(mine),
            Err(Refused::Full { retry_after } | Refused::WaitedOut { retry_after }) => {
                return Err(refuse(context, Reject::Full { retry_after: retry_after.as_secs().max(1) }));
            }
        }
    }
}

/// Looks for room once. `Ok(None)`: the lease is taken. `Ok(Some(until))`: all are full.
fn look(shared: &Shared, context: &mut Context, query: &Query<'_>) -> Result<Option<Option<Instant>>> {
    let snapshot = shared.fleet.snapshot_owned();
    let mut candidates = Vec::with_capacity(snapshot.entries.len());
    loop {
        let now = Instant::now();
        let routing = snapshot.candidates(query, now, &mut candidates);
        prompt::weigh(shared, context, &snapshot, now, &mut candidates);
        let seed =
            Seed { random: shared.random.next(), turn: shared.fleet.next_turn(), haze: shared.state.haze() };
        let choice = match (routing, pick::pick(&candidates, &context.settings.knobs, seed)) {
            (Routing::Candidates, Some(choice)) => choice,
            (Routing::Full { until }, _) => return Ok(Some(until)),
            (routing, _) => {
                let reject = context.failed.take();
                let reject = reject.unwrap_or_else(|| plan::no_candidate(&routing, context, &snapshot));
                return Err(refuse(context, reject));
            }
        };
        let entry = &snapshot.entries[choice.index];
        // Somebody else may have taken the last place meanwhile.
        let chosen = candidates.iter().find(|candidate| candidate.index == choice.index);
        let work = prompt::work(context, chosen);
        let Some(lease) = Lease::take(entry, work, now) else { continue };
        let upstream = lease.upstream();
        let decision = Decision {
            id: &context.id,
            model: context.model.name(),
            attempt: context.attempts.max(1),
            session: context.asked.session.map(|session| session.source.label()),
            tokens: context.tokens,
            blocks: context.asked.chain.len(),
            choice,
            candidates: &candidates,
            knobs: &context.settings.knobs,
            name: &|index| snapshot.entries[index].upstream.name(),
        };
        observe::chosen(&decision);
        context.reason = decision.reason();
        if let Some(line) = &context.line {
            line.attempt(upstream.id);
        }
        context.outcome = None;
        context.status = 0;
        context.failed_at_once = None;
        context.first_byte = None;
        context.received = 0;
        context.head_came = false;
        context.events = None;
        context.last_words = None;
        context.blocks = context.asked.chain.len();
        context.hit = chosen.map_or(0, |chosen| chosen.hit);
        context.lease = Some(lease);
        prompt::learn(shared, context, work.uncached, now);
        return Ok(None);
    }
}

/// Waits for something of ours while the client is watched: its leave is the end, and so is the request's
/// own deadline. What a client sends meanwhile is held with the rest of its body.
pub async fn watched<T>(
    session: &mut Session,
    context: &mut Context,
    waiting: impl Future<Output = T>,
) -> Result<T> {
    tokio::pin!(waiting);
    loop {
        let done = session.is_body_done();
        let came = tokio::select! {
            biased;
            came = session.downstream_session.read_body_or_idle(done) => came,
            done = &mut waiting => return Ok(done),
        };
        if context.line.as_ref().is_some_and(|line| line.ended().is_some()) {
            return Err(refuse(context, Reject::NoTime));
        }
        match came {
            Ok(_) if context.replay.as_ref().is_some_and(|replay| !replay.is_whole()) => {
                return Err(refuse(context, Reject::Memory));
            }
            Ok(_) if !done => {}
            Ok(_) => return Err(Error::new_down(ErrorType::ConnectionClosed)),
            Err(mut gone) => {
                gone.set_retry(false);
                return Err(gone.into_down());
            }
        }
    }
}

/// Waits before another attempt, and chooses.
pub async fn next(shared: &Shared, session: &mut Session, context: &mut Context) -> Result<()> {
    let pause = pause(context.retry(), context.attempts, shared.random.next());
    let pausing = async {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    };
    // Looked at even when there is no pause: a client that left while we connected is noticed here.
    watched(session, context, pausing).await?;
    choose(shared, session, context).await
}

/// The pause before an attempt, the first being number 1. The second goes out at once: it goes to somebody
/// else. From then on the pauses double, each drawn between its half and its whole.
fn pause(retry: &Retry, attempt: u32, random: u64) -> Duration {
    let Some(doublings) = attempt.checked_sub(3) else { return Duration::ZERO };
    let whole = retry.backoff.saturating_mul(1 << doublings.min(16)).min(retry.max_backoff);
    whole.mul_f64(0.5 + 0.5 * (random >> 11) as f64 / (1u64 << 53) as f64)
}

/// Whether another attempt may follow a failure; a try is paid for if so.
pub fn may_follow(shared: &Shared, context: &Context, cause: Cause) -> bool {
    let retry = context.retry();
    let held = match &context.replay {
        Some(replay) => replay.is_whole(),
        // An upgrade has no body, and no wrapper: it may be given to another as long as nobody has seen it.
        None => matches!(cause, Cause::Connect { .. }),
    };
    if retry.attempts == 0 || !held || context.pinned || !cause.is_on(&retry.on) {
        return false;
    }
    if cause.is_cheap() {
        return context.attempts < MOST;
    }
    // An answer is given up only for somebody else's: the one there is tells the client more than our wait
    // for the same upstream would.
    if matches!(cause, Cause::Status(_)) && !somebody_else(shared, context) {
        return false;
    }
    context.attempts <= retry.attempts && shared.budget.take(retry.budget)
}

/// Whether an upstream that was not tried may have the request, now or when it has room.
fn somebody_else(shared: &Shared, context: &Context) -> bool {
    let snapshot = shared.fleet.snapshot();
    let among = context.among(&snapshot);
    let query = Query {
        model: context.model.name(),
        tokens: context.tokens,
        tried: &context.tried,
        again: false,
        away: &[],
        only: context.only,
        among: among.as_deref(),
        has_aliases: !context.settings.peeker.routes.is_empty(),
    };
    let routing = snapshot.candidates(&query, Instant::now(), &mut Vec::new());
    matches!(routing, Routing::Candidates | Routing::Full { .. })
}

/// Ends the present attempt: the upstream is told of, the lease goes.
pub fn end(shared: &Shared, context: &mut Context, cause: Cause) {
    context.outcome = Some(cause.outcome(context.status));
    context.was_stale |= cause == Cause::Stale;
    let Some(lease) = context.lease.take() else { return };
    let upstream = lease.upstream();
    prompt::forget(shared, context, upstream.id, cause.reached());
    observe::attempt_failed(&context.id, upstream.name(), cause.label(), context.attempts);
    if cause.sends_away() {
        context.away.push(upstream.id);
    }
    let name = upstream.name().to_string();
    context.failed = Some(match context.line.as_ref().and_then(|line| line.ended()) {
        Some(Ended::FirstByte | Ended::Idle | Ended::Total | Ended::Left) => Reject::Timeout { name },
        Some(Ended::Gone) | None => Reject::Upstream { name },
    });
    blame(shared, upstream, cause);
    if let Some(line) = &context.line {
        line.wait();
    }
    context.last = Some(upstream.clone());
}

/// An answer came to a proper end and is not whole: its client has been told, and so are all others.
pub fn broke(shared: &Shared, context: &mut Context) {
    context.outcome = Some(Cause::Reset.outcome(context.status));
    let Some(lease) = &context.lease else { return };
    observe::stream_broken(&context.id, lease.upstream().name(), "it ended before the answer was whole");
    blame(shared, lease.upstream(), Cause::Reset);
}

/// An answer came to its end: what it was. Whatever its head has said, a stream may tell of an error.
pub fn whole(shared: &Shared, context: &Context) -> Outcome {
    let failure = context.meter.as_ref().and_then(|meter| meter.failure());
    let status = match (context.failed_at_once, failure) {
        // The upstream was judged by it then.
        (Some(code), _) => code,
        (None, Some(failure)) => {
            // Where no code says so, it may be the request's own fault.
            if let (Some(lease), Some(500..)) = (&context.lease, failure.code) {
                blame(shared, lease.upstream(), Cause::Failed);
            }
            failure.status()
        }
        (None, None) => context.status,
    };
    Outcome::Answered(status)
}

/// What pingora's error after the connection was made means; `None` is the client's doing.
pub fn cause_of(error: &Error, context: &Context, reused: bool) -> Option<Cause> {
    if let Some(ended) = context.line.as_ref().and_then(|line| line.ended()) {
        return Some(Cause::Ended(ended));
    }
    match error.esource() {
        ErrorSource::Upstream if reused && context.may_be_stale() => Some(Cause::Stale),
        ErrorSource::Upstream => Some(Cause::Reset),
        ErrorSource::Downstream | ErrorSource::Internal | ErrorSource::Unset => None,
    }
}

/// Tells the fleet what an attempt's failure says about its upstream.
fn blame(shared: &Shared, upstream: &Upstream, cause: Cause) {
    let sign = match cause {
        Cause::Connect { refused } => Sign::Unreached { refused },
        Cause::Reset | Cause::Failed => Sign::Failed,
        // A long answer is nobody's fault, nor is a job that has not had its turn.
        Cause::Ended(Ended::Total | Ended::Left) => return,
        // Probes of an engine that hangs are answered well; only requests can tell.
        Cause::Ended(_) => Sign::Failed,
        Cause::Leaving => Sign::Leaving,
        Cause::Aborted => Sign::GaveUp,
        // A status has been told when the head came; a pooled connection may end at any time.
        Cause::Status(_) | Cause::Stale => return,
    };
    shared.fleet.report(upstream, sign);
}

/// An answer's head came: what it says about the upstream. What a 500 means shows in its body.
pub fn answered(shared: &Shared, context: &Context, head: &ResponseHeader) {
    let Some(lease) = &context.lease else { return };
    let upstream = lease.upstream();
    match head.status.as_u16() {
        429 | 503 => shared.fleet.busy(upstream, retry_after(head)),
        // With a body it shows there what it means.
        500 if head.headers.get(http::header::CONTENT_LENGTH).is_none_or(|length| length != "0") => {}
        500 | 502.. => shared.fleet.report(upstream, Sign::Failed),
        _ => shared.fleet.report(upstream, Sign::Answered),
    }
}

/// How long the upstream asks to be left alone, if it says so.
fn retry_after(head: &ResponseHeader) -> Option<Duration> {
    let value = head.headers.get(http::header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

/// Looks at a piece of the answer. `Some`: the attempt is given up, and another may follow.
pub fn judge(shared: &Shared, context: &mut Context, piece: &[u8], end: bool) -> Option<Cause> {
    let verdict = context.judge.as_mut()?.feed(piece, end);
    context.failed_at_once = match verdict {
        // No code is one of success.
        Verdict::Failed(code) => Some(code.max(400)),
        Verdict::Leaving => Some(503),
        Verdict::EngineDead => Some(500),
        Verdict::Wait | Verdict::Accept | Verdict::Aborted => None,
    };
    let cause = match verdict {
        Verdict::Wait => return None,
        Verdict::Accept if context.status == 500 => Some(Cause::Failed),
        Verdict::Accept => None,
        // A stored answer that its client cancelled looks the same.
        Verdict::Aborted if context.only.is_some() => None,
        Verdict::Leaving => Some(Cause::Leaving),
        // Not a job in the background that its client cancels: its stream says nothing more, as of vLLM, or
        // ends behind its prelude.
        Verdict::Aborted => Some(Cause::Aborted),
        Verdict::Failed(code) if code < 500 => None,
        Verdict::Failed(_) | Verdict::EngineDead => Some(Cause::Failed),
    };
    if let Some(cause) = cause {
        // A 500 that the engine gave to this request is its answer, whoever else might give another.
        if verdict != Verdict::Accept && may_follow(shared, context, cause) {
            return Some(cause);
        }
        if let Some(lease) = &context.lease {
            blame(shared, lease.upstream(), cause);
        }
    }
    context.accept();
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_attempt_goes_out_at_once_and_then_the_pauses_double() {
        let backoff = Duration::from_millis(50);
        let retry = Retry { backoff, max_backoff: backoff * 3, ..Retry::default() };
        for (attempt, times) in [(2, 0), (3, 1), (4, 2), (5, 3), (8, 3)] {
            let (least, most) = (pause(&retry, attempt, 0), pause(&retry, attempt, u64::MAX));
            assert_eq!(least, backoff * times / 2, "attempt {attempt}");
            assert!(most > backoff * times * 99 / 100 || times == 0, "attempt {attempt}");
            assert!(most <= backoff * times, "attempt {attempt}");
        }
    }
}
