//! One attempt after another: choosing an upstream, what an attempt's failure means, and whether
//! another may follow.
//!
//! An attempt may follow only while nothing of an answer has gone to the client, all that was read of the
//! body is still held, and the client's request is not bound to one upstream. Failures that cost no engine
//! anything (nobody listening, a pooled connection that had ended, an engine that is leaving) are tried
//! again as long as there is somebody else; the others within `retry.attempts` and the budget.

use std::time::{Duration, Instant};

use pingora::http::ResponseHeader;
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType, Result};

use super::context::Context;
use super::line::Ended;
use super::peek::Wanted;
use super::{Shared, plan, refuse};
use crate::config::types::RetryOn;
use crate::fleet::{Lease, Outcome, Query, Routing, Sign};
use crate::observe;
use crate::pick::{self, Seed};
use crate::reject::Reject;
use crate::reply::judge::Verdict;

/// Tries for one request at the most, however cheap they are.
const MOST: u32 = 8;

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Could not be reached.
    Connect,
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
    /// A deadline, or silence: the request is over.
    Ended,
}

impl Cause {
    pub fn label(self) -> &'static str {
        match self {
            Cause::Connect => "connect",
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
            Cause::Ended => "ended",
        }
    }

    /// Costs no engine anything.
    fn is_cheap(self) -> bool {
        matches!(self, Cause::Connect | Cause::Stale | Cause::Leaving | Cause::Aborted)
    }

    fn is_on(self, on: &RetryOn) -> bool {
        match self {
            Cause::Connect => on.connect,
            Cause::Stale | Cause::Reset => on.reset,
            Cause::Status(502) => on.bad_gateway,
            Cause::Status(503) => on.unavailable,
            Cause::Status(504) => on.gateway_timeout,
            Cause::Leaving | Cause::Aborted | Cause::Failed => on.abort,
            Cause::Status(_) | Cause::Ended => false,
        }
    }

    fn outcome(self, status: u16) -> Outcome {
        match self {
            Cause::Connect => Outcome::Unreached,
            Cause::Status(status) => Outcome::Answered(status),
            Cause::Leaving | Cause::Failed => Outcome::Answered(status.max(500)),
            Cause::Stale | Cause::Reset | Cause::Aborted | Cause::Ended => Outcome::Broken,
        }
    }
}

/// Chooses an upstream that was not tried yet, and takes a lease on it.
pub fn choose(shared: &Shared, context: &mut Context) -> Result<()> {
    let snapshot = shared.fleet.snapshot_owned();
    let mut candidates = Vec::with_capacity(snapshot.entries.len());
    loop {
        let now = Instant::now();
        let routing = snapshot.candidates(&query(context), now, &mut candidates);
        let seed = Seed { random: shared.random.next(), turn: shared.fleet.next_turn() };
        let choice = match (routing, pick::pick(&candidates, &context.settings.knobs, seed)) {
            (Routing::Candidates, Some(choice)) => choice,
            (routing, _) => {
                let reject = context.failed.take();
                let reject = reject.unwrap_or_else(|| plan::no_candidate(&routing, context, &snapshot));
                return Err(refuse(context, reject));
            }
        };
        let entry = &snapshot.entries[choice.index];
        // Somebody else may have taken the last place meanwhile.
        let Some(lease) = Lease::take(entry, context.tokens, now) else { continue };
        let upstream = &entry.upstream;
        observe::chosen(&context.id, upstream.name(), choice.cost, choice.reason.label(), candidates.len());
        if let Some(line) = &context.line {
            line.attempt(upstream.id as u64);
        }
        context.tried.push(upstream.id);
        context.outcome = None;
        context.lease = Some(lease);
        return Ok(());
    }
}

/// What the request asks of the fleet. Who was tried may be tried again when nobody else is there.
fn query(context: &Context) -> Query<'_> {
    let model = match &context.model {
        Wanted::Named(name) => Some(name.as_str()),
        Wanted::Any | Wanted::Unreadable => None,
    };
    Query { model, tokens: context.tokens, tried: &context.tried, again: true, only: context.only }
}

/// Waits before another attempt, and chooses. The client's leave ends the wait.
pub async fn next(shared: &Shared, session: &mut Session, context: &mut Context) -> Result<()> {
    let pause = pause(context, shared.random.next());
    if !pause.is_zero() {
        let wait = tokio::time::sleep(pause);
        if session.is_body_done() {
            tokio::select! {
                gone = session.downstream_session.read_body_or_idle(true) => {
                    let gone = gone.err().unwrap_or_else(|| Error::new(ErrorType::ConnectionClosed));
                    return Err(gone.into_down());
                }
                () = wait => {}
            }
        } else {
            wait.await;
        }
    }
    choose(shared, context)
}

/// The first further try goes out at once: it goes to somebody else. From then on the pauses double, each
/// drawn between its half and its whole.
fn pause(context: &Context, random: u64) -> Duration {
    let retry = &context.settings.retry;
    let Some(doublings) = context.attempts.checked_sub(2) else { return Duration::ZERO };
    let whole = retry.backoff.saturating_mul(1 << doublings.min(16)).min(retry.max_backoff);
    whole.mul_f64(0.5 + 0.5 * (random >> 11) as f64 / (1u64 << 53) as f64)
}

/// Whether another attempt may follow a failure; a try is paid for if so.
pub fn may_follow(shared: &Shared, context: &Context, cause: Cause) -> bool {
    let retry = &context.settings.retry;
    let held = context.replay.as_ref().is_some_and(|replay| replay.is_whole());
    if retry.attempts == 0 || !held || context.pinned || !cause.is_on(&retry.on) {
        return false;
    }
    if cause.is_cheap() {
        return context.attempts < MOST;
    }
    context.attempts <= retry.attempts && shared.budget.take()
}

/// Ends the present attempt: the upstream is told of, the lease goes.
pub fn end(shared: &Shared, context: &mut Context, cause: Cause) {
    context.outcome = Some(cause.outcome(context.status));
    let Some(lease) = context.lease.take() else { return };
    let upstream = lease.upstream();
    observe::attempt_failed(&context.id, upstream.name(), cause.label(), context.attempts);
    let name = upstream.name().to_string();
    let ended = context.line.as_ref().and_then(|line| line.ended());
    if matches!(ended, Some(Ended::FirstByte | Ended::Idle)) {
        // Probes of an engine that hangs are answered well; only requests can tell.
        shared.fleet.report(upstream, Sign::Failed);
    }
    context.failed = match (cause, ended) {
        // It answered that it is full: that nobody else has room either is what there is to say.
        (Cause::Status(429 | 503), _) => None,
        (_, Some(Ended::FirstByte | Ended::Idle | Ended::Total)) => Some(Reject::Timeout { name }),
        (_, Some(Ended::Gone) | None) => Some(Reject::Upstream { name }),
    };
    shared.blame(upstream, cause);
    context.last = Some(upstream.clone());
}

/// What pingora's error after the connection was made means; `None` is the client's doing.
pub fn cause_of(error: &Error, context: &Context, reused: bool) -> Option<Cause> {
    if context.line.as_ref().is_some_and(|line| line.ended().is_some()) {
        return Some(Cause::Ended);
    }
    match error.esource() {
        ErrorSource::Upstream if reused => Some(Cause::Stale),
        ErrorSource::Upstream => Some(Cause::Reset),
        ErrorSource::Downstream | ErrorSource::Internal | ErrorSource::Unset => None,
    }
}

/// An answer's head came: what it says about the upstream.
pub fn answered(shared: &Shared, context: &Context, head: &ResponseHeader) {
    let Some(lease) = &context.lease else { return };
    let status = head.status.as_u16();
    if matches!(status, 429 | 503) {
        shared.busy(lease.upstream(), retry_after(head));
    }
}

/// What the upstream asks to be left alone for, if it says so.
fn retry_after(head: &ResponseHeader) -> Duration {
    let value = head.headers.get(http::header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = value.and_then(|value| value.trim().parse().ok()).unwrap_or(1);
    Duration::from_secs(u64::clamp(seconds, 1, 60))
}

/// Looks at a piece of the answer. `Some`: the attempt is given up, and another may follow.
pub fn judge(shared: &Shared, context: &mut Context, piece: &[u8], end: bool) -> Option<Cause> {
    let verdict = context.judge.as_mut()?.feed(piece, end);
    let cause = match verdict {
        Verdict::Wait => return None,
        Verdict::Accept => None,
        Verdict::Leaving => Some(Cause::Leaving),
        Verdict::Aborted => Some(Cause::Aborted),
        Verdict::Failed(_) => Some(Cause::Failed),
    };
    if let Some(cause) = cause
        && may_follow(shared, context, cause)
    {
        return Some(cause);
    }
    if let Some(lease) = &context.lease {
        match cause {
            Some(cause) => shared.blame(lease.upstream(), cause),
            None if context.status < 400 => shared.fleet.report(lease.upstream(), Sign::Answered),
            None => shared.blame(lease.upstream(), Cause::Status(context.status)),
        }
    }
    context.accept();
    None
}
