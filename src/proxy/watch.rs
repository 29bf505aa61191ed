//! Ends attempts by deadlines, and when the upstream is gone, the upload is too slow or the upstream stops
//! reading.
//!
//! A request has one timer, which fires at its earliest deadline, and at least every
//! `UPSTREAM_CHECK_INTERVAL`. Bytes that pass only move the times that are checked then, so that an event of
//! a stream costs no timer.
//!
//! The clock of the attempt also measures the phases of the request, so that most of them cost no further
//! look at the clock.
//!
//! Never: I/O, decide on a retry.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::attempt::wire::Outgoing;
use super::phases::RequestPhases;
use crate::config::types::Timeouts;
use crate::fleet::Fleet;
use crate::observe::request::RequestTimes;
use crate::retry::EndReason;

/// How often the upstream of a silent answer is checked.
const UPSTREAM_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// How long a background job may stay silent after its client has disconnected. An engine answers such a
/// request before it reads the prompt, and what a stream says later is of a job that ends by itself. Longer
/// silence is a hang, which must not hold a lease for ever; vLLM's stream of a cancelled job is one, too.
const MAX_ABANDONED_SILENCE: Duration = Duration::from_secs(600);

/// How long an upstream may leave sent bytes unread.
const MAX_UPSTREAM_STALL: Duration = Duration::from_secs(60);

/// The time that a client has for the first piece of its body.
const UPLOAD_GRACE: Duration = Duration::from_secs(30);

/// Bytes of a body that give its client another second.
const MIN_UPLOAD_BYTES_PER_SECOND: u64 = 64 << 10;

/// Measures whether a client sends its body fast enough: half a minute, and a second for each 64 KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct UploadPace {
    begun: Instant,
    received: u64,
    /// Since when the balancer does not read, because the upstream does not.
    paused: Option<Instant>,
}

/// The present attempt.
#[derive(Clone, Copy, Debug)]
struct AttemptClock {
    upstream: usize,
    /// When the request was sent, as far as it had come then.
    sent: Instant,
    /// When the last piece of the answer came, or went to the client.
    last_piece: Option<Instant>,
}

/// The limits of the parts of a request that the watch measures; `None` is no limit.
#[derive(Clone, Copy, Debug)]
struct WatchLimits {
    first_byte: Option<Duration>,
    idle: Option<Duration>,
    total: Option<Duration>,
}

/// Watches one request.
pub(super) struct RequestWatch {
    fleet: Arc<Fleet>,
    limits: WatchLimits,
    begun: Instant,
    phases: RequestPhases,
    attempt: Option<AttemptClock>,
    outgoing: Option<Outgoing>,
    upload: Option<UploadPace>,
    /// The client of a background job has disconnected.
    abandoned: bool,
    timer: Option<Pin<Box<Sleep>>>,
}

// === impl UploadPace ===

impl UploadPace {
    pub(super) fn new(begun: Instant) -> Self {
        UploadPace { begun, received: 0, paused: None }
    }

    /// Counts received bytes of the body, which extend its deadline.
    pub(super) fn received(&mut self, bytes: usize) {
        self.received += bytes as u64;
        self.resume();
    }

    /// The client cannot send, because the balancer does not read.
    pub(super) fn pause(&mut self) {
        self.paused.get_or_insert_with(Instant::now);
    }

    /// Ends a pause: its time does not count against the client.
    pub(super) fn resume(&mut self) {
        if let Some(since) = self.paused.take() {
            self.begun += since.elapsed();
        }
    }

    /// When the client has been too slow; `None` while it is not its turn.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let allowed = UPLOAD_GRACE + Duration::from_secs(self.received / MIN_UPLOAD_BYTES_PER_SECOND);
        self.paused.is_none().then(|| self.begun + allowed)
    }
}

// === impl RequestWatch ===

impl RequestWatch {
    /// `begun`: when the request's head came.
    pub(super) fn new(fleet: Arc<Fleet>, timeouts: Timeouts, begun: std::time::Instant) -> Self {
        let Timeouts { first_byte, idle, total, .. } = timeouts;
        RequestWatch {
            fleet,
            limits: WatchLimits { first_byte, idle, total },
            begun: Instant::from_std(begun),
            phases: RequestPhases::BEGIN,
            attempt: None,
            outgoing: None,
            upload: None,
            abandoned: false,
            timer: None,
        }
    }

    /// Watches the body's upload from now on; `None`: it is complete.
    pub(super) fn set_upload(&mut self, upload: Option<UploadPace>) {
        self.upload = upload;
        self.rearm();
    }

    pub(super) fn upload(&mut self) -> Option<&mut UploadPace> {
        self.upload.as_mut()
    }

    /// The phases of the request so far.
    pub(super) fn times(&self) -> RequestTimes {
        self.phases.times(self.last_piece())
    }

    /// Adds the time in which the client's body was awaited before the first choice.
    pub(super) fn add_body_wait(&mut self, time: Duration) {
        self.phases.add_body_wait(time);
    }

    /// Adds a time in the queue for room.
    pub(super) fn add_queued(&mut self, time: Duration) {
        self.phases.add_queued(time);
    }

    /// The upstream of the next attempt has been chosen.
    pub(super) fn record_choice(&mut self) {
        self.phases.begin_attempt(self.begun.elapsed());
    }

    /// An attempt on this upstream begins, with a connection.
    pub(super) fn begin_attempt(&mut self, upstream: usize) {
        let now = Instant::now();
        self.phases.connected = self.since_begun(now).into();
        self.attempt = Some(AttemptClock { upstream, sent: now, last_piece: None });
        self.outgoing = None;
        self.rearm();
    }

    /// Notes when the request was sent, if its last byte has been. The connection must not serve another
    /// request yet.
    pub(super) fn record_sent(&mut self) {
        if self.phases.sent.get().is_some() || self.upload.is_some() {
            return;
        }
        if let Some(sent) = self.outgoing.as_ref().and_then(Outgoing::sent_at) {
            self.phases.sent = self.since_begun(sent).into();
        }
    }

    /// The first event, or byte, of the model's output has come.
    pub(super) fn record_first_byte(&mut self, now: std::time::Instant) {
        self.phases.first_byte = self.since_begun(Instant::from_std(now)).into();
    }

    fn since_begun(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.begun)
    }

    /// What the attempt sends goes out here.
    pub(super) fn set_outgoing(&mut self, outgoing: Outgoing) {
        self.outgoing = Some(outgoing);
    }

    /// No attempt is on its way: the request waits for room, or for another attempt.
    pub(super) fn end_attempt(&mut self) {
        (self.attempt, self.outgoing) = (None, None);
        self.rearm();
    }

    /// How long the present attempt has been on its way.
    pub(super) fn since_sent(&self) -> Duration {
        self.attempt.map_or(Duration::ZERO, |attempt| attempt.sent.elapsed())
    }

    /// A piece of the body came: the upstream has not had the whole request yet.
    pub(super) fn record_upload(&mut self, bytes: usize) {
        if let Some(upload) = &mut self.upload {
            upload.received(bytes);
        }
        if let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.last_piece.is_none()) {
            attempt.sent = Instant::now();
        }
    }

    /// A piece of the answer came, or has gone to the client. Returns the time since the one before.
    pub(super) fn record_answer_piece(&mut self) -> Option<Duration> {
        let (now, attempt) = (Instant::now(), self.attempt.as_mut()?);
        let before = attempt.last_piece.replace(now);
        if before.is_none() {
            self.rearm();
        }
        before.map(|before| now - before)
    }

    /// A piece of the answer came that decides that the answer goes to the client.
    pub(super) fn record_verdict(&mut self) {
        self.record_answer_piece();
        self.phases.accepted = self.last_piece().unwrap_or_default().into();
    }

    /// The answer goes to the client without a verdict, and has been held since this time.
    pub(super) fn record_held_since(&mut self, since: Instant) {
        self.phases.accepted = self.since_begun(since).into();
    }

    /// The head and the beginning of the answer have gone to the client. `stalled`: since when the client did
    /// not take the rest of them, if it had to be awaited.
    pub(super) fn record_forwarded(&mut self, stalled: Option<Instant>) {
        self.record_answer_piece();
        let forwarded = stalled.map(|since| self.since_begun(since)).or(self.last_piece());
        self.phases.forwarded = forwarded.unwrap_or_default().into();
    }

    /// A piece came after the beginning of the answer; `is_event`: it is of a stream, and not its end.
    pub(super) fn record_next_piece(&mut self, is_event: bool) {
        if let (Some(gap), true) = (self.record_answer_piece(), is_event) {
            self.phases.add_gap(gap);
        }
    }

    fn last_piece(&self) -> Option<Duration> {
        Some(self.since_begun(self.attempt?.last_piece?))
    }

    /// The client of a background job has disconnected.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
        self.rearm();
    }

    /// Whether a deadline has passed, for a loop that is always busy: it never waits for the timer.
    pub(super) fn passed(&self) -> Option<EndReason> {
        let now = Instant::now();
        self.deadline().filter(|(deadline, _)| *deadline <= now).map(|(_, reason)| reason)
    }

    /// Waits until the request, or its attempt, must end.
    pub(super) async fn end(&mut self) -> EndReason {
        poll_fn(|cx| self.poll_end(cx)).await
    }

    /// Ready when a deadline of the request has passed.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<EndReason> {
        loop {
            let due = self.next_check();
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if let Some(reason) = self.reason() {
                return Poll::Ready(reason);
            }
            let due = self.next_check();
            if let Some(timer) = &mut self.timer {
                timer.as_mut().reset(due);
            }
        }
    }

    /// The present deadlines may be earlier than the timer fires.
    fn rearm(&mut self) {
        let due = self.next_check();
        if let Some(timer) = self.timer.as_mut().filter(|timer| due < timer.deadline()) {
            timer.as_mut().reset(due);
        }
    }

    fn next_check(&self) -> Instant {
        let glance = Instant::now() + UPSTREAM_CHECK_INTERVAL;
        self.deadline().map_or(glance, |(deadline, _)| deadline.min(glance))
    }

    fn reason(&self) -> Option<EndReason> {
        let now = Instant::now();
        if let Some((_, reason)) = self.deadline().filter(|(deadline, _)| *deadline <= now) {
            return Some(reason);
        }
        let attempt = self.attempt.as_ref()?;
        let silent = now.saturating_duration_since(attempt.last_piece.unwrap_or(attempt.sent))
            >= UPSTREAM_CHECK_INTERVAL;
        let gone = silent && self.fleet.snapshot().is_gone(attempt.upstream);
        gone.then_some(EndReason::Gone)
    }

    /// The earliest deadline, and what it is of.
    fn deadline(&self) -> Option<(Instant, EndReason)> {
        // A limit beyond what a clock can tell is none.
        let at = |from: Instant, limit: Option<Duration>, reason| Some((from.checked_add(limit?)?, reason));
        let total = at(self.begun, self.limits.total, EndReason::Total);
        let upload = self.upload.and_then(|upload| upload.deadline());
        let upload = upload.map(|deadline| (deadline, EndReason::SlowUpload));
        // While the client owes a part of its body, its pace counts and not the upstream's silence.
        let waits_for_answer = self.attempt.filter(|_| self.upload.is_none());
        let step = waits_for_answer.and_then(|attempt| match attempt.last_piece {
            None => at(attempt.sent, self.limits.first_byte, EndReason::FirstByte),
            Some(moved) => at(moved, self.limits.idle, EndReason::Idle),
        });
        let abandoned = self.attempt.filter(|_| self.abandoned).map(|attempt| {
            let last = attempt.last_piece.unwrap_or(attempt.sent);
            (last + MAX_ABANDONED_SILENCE, EndReason::Abandoned)
        });
        let stuck = self.outgoing.as_ref().and_then(Outgoing::stuck_since);
        let stuck = stuck.map(|since| (since + MAX_UPSTREAM_STALL, EndReason::Unread));
        let all = [total, upload, step, abandoned, stuck];
        all.into_iter().flatten().min_by_key(|(deadline, _)| *deadline)
    }
}

#[cfg(test)]
pub(super) mod tests;
