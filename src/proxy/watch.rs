//! Ends attempts by deadlines, and when the upstream is gone, the upload is too slow or the upstream stops
//! reading.
//!
//! A request has one timer, which fires at its earliest deadline, and at least every
//! `UPSTREAM_CHECK_INTERVAL`. Bytes that pass only move the times that are checked then, so that an event of
//! a stream costs no timer.
//!
//! Never: I/O, decide on a retry.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::attempt::wire::Outgoing;
use crate::config::types::Timeouts;
use crate::fleet::Fleet;
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

/// Watches one request.
pub(super) struct RequestWatch {
    fleet: Arc<Fleet>,
    timeouts: Timeouts,
    begun: Instant,
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
        RequestWatch {
            fleet,
            timeouts,
            begun: Instant::from_std(begun),
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

    /// An attempt on this upstream begins.
    pub(super) fn begin_attempt(&mut self, upstream: usize) {
        self.attempt = Some(AttemptClock { upstream, sent: Instant::now(), last_piece: None });
        self.outgoing = None;
        self.rearm();
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

    /// A piece of the answer came, or has gone to the client.
    pub(super) fn record_answer_piece(&mut self) {
        let Some(attempt) = &mut self.attempt else { return };
        let is_first = attempt.last_piece.replace(Instant::now()).is_none();
        if is_first {
            self.rearm();
        }
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
        let total = at(self.begun, self.timeouts.total, EndReason::Total);
        let upload = self.upload.and_then(|upload| upload.deadline());
        let upload = upload.map(|deadline| (deadline, EndReason::SlowUpload));
        let step = self.attempt.and_then(|attempt| match attempt.last_piece {
            None => at(attempt.sent, self.timeouts.first_byte, EndReason::FirstByte),
            Some(moved) => at(moved, self.timeouts.idle, EndReason::Idle),
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
pub(super) mod tests {
    use super::*;
    use crate::config::types::{Config, UpstreamConfig, UpstreamUrl};
    use crate::observe::Observer;

    /// Watches a request to an upstream that was never probed; its id is 0.
    pub(crate) fn watch(timeouts: Timeouts) -> RequestWatch {
        let url =
            UpstreamUrl { https: false, host: "gpu".into(), port: 1, unix: None, prefix: String::new() };
        let config = Config { upstreams: vec![UpstreamConfig::new(url)], ..Config::default() };
        let (fleet, _keeper) = Fleet::new(&config, Observer::default()).unwrap();
        RequestWatch::new(fleet, timeouts, Instant::now().into_std())
    }

    fn seconds(first_byte: u64, idle: u64, total: u64) -> Timeouts {
        let some = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        Timeouts { first_byte: some(first_byte), idle: some(idle), total: some(total), ..Timeouts::default() }
    }

    async fn ends(watch: &mut RequestWatch) -> (EndReason, u64) {
        let begun = Instant::now();
        let reason = watch.end().await;
        (reason, begun.elapsed().as_secs())
    }

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[tokio::test(start_paused = true)]
    async fn each_deadline_counts_from_its_own_beginning() {
        let mut waiting = watch(seconds(5, 1, 60));
        waiting.begin_attempt(0);
        assert_eq!(ends(&mut waiting).await, (EndReason::FirstByte, 5));

        let mut streaming = watch(seconds(5, 10, 0));
        streaming.begin_attempt(0);
        streaming.record_answer_piece();
        assert_eq!(ends(&mut streaming).await, (EndReason::Idle, 10));

        let mut long = watch(seconds(0, 30, 7));
        long.begin_attempt(0);
        long.record_answer_piece();
        assert_eq!(ends(&mut long).await, (EndReason::Total, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_becomes_earlier_is_kept() {
        let mut watch = watch(seconds(60, 1, 0));
        watch.begin_attempt(0);
        assert!(tokio::time::timeout(Duration::from_millis(100), watch.end()).await.is_err());
        watch.record_answer_piece();
        assert_eq!(ends(&mut watch).await, (EndReason::Idle, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_never_cut_by_a_limit_that_was_not_asked_for() {
        let mut watch = watch(seconds(0, 0, 0));
        watch.begin_attempt(0);
        assert!(tokio::time::timeout(DAY, watch.end()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_job_is_not_waited_for_without_end() {
        let mut silent = watch(seconds(0, 0, 0));
        silent.begin_attempt(0);
        silent.abandon();
        assert_eq!(ends(&mut silent).await, (EndReason::Abandoned, 600));

        // From what came last; and what was configured goes before.
        let mut streaming = watch(seconds(0, 0, 0));
        streaming.begin_attempt(0);
        tokio::time::sleep(Duration::from_secs(50)).await;
        streaming.record_answer_piece();
        streaming.abandon();
        assert_eq!(ends(&mut streaming).await, (EndReason::Abandoned, 600));
        let mut limited = watch(seconds(0, 10, 0));
        limited.begin_attempt(0);
        limited.record_answer_piece();
        limited.abandon();
        assert_eq!(ends(&mut limited).await, (EndReason::Idle, 10));

        // The wait for room has its own end.
        let mut waiting = watch(seconds(0, 0, 0));
        waiting.abandon();
        assert!(tokio::time::timeout(DAY, waiting.end()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_moves_is_not_idle() {
        let mut watch = watch(seconds(0, 3, 0));
        watch.begin_attempt(0);
        for _ in 0..10 {
            watch.record_answer_piece();
            let two = Duration::from_secs(2);
            assert!(tokio::time::timeout(two, watch.end()).await.is_err());
        }
        assert_eq!(ends(&mut watch).await.0, EndReason::Idle);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_ends_and_one_that_waits_for_its_upstream_does_not() {
        let mut slow = watch(seconds(0, 0, 0));
        slow.begin_attempt(0);
        slow.set_upload(Some(UploadPace::new(Instant::now())));
        let begun = Instant::now();
        let trickle = async {
            loop {
                let second = tokio::time::timeout(Duration::from_secs(1), slow.end()).await;
                match second {
                    Ok(reason) => return reason,
                    Err(_) => slow.record_upload(100),
                }
            }
        };
        assert_eq!(trickle.await, EndReason::SlowUpload);
        assert_eq!(begun.elapsed().as_secs(), 30);

        let mut paused = watch(seconds(0, 0, 0));
        let mut pace = UploadPace::new(Instant::now());
        pace.pause();
        paused.set_upload(Some(pace));
        assert!(tokio::time::timeout(DAY, paused.end()).await.is_err());
        paused.upload().unwrap().resume();
        assert_eq!(ends(&mut paused).await, (EndReason::SlowUpload, 30));
    }

    #[tokio::test(start_paused = true)]
    async fn an_upstream_that_does_not_read_is_given_up() {
        let mut watch = watch(seconds(0, 0, 0));
        watch.begin_attempt(0);
        let outgoing = Outgoing::default();
        outgoing.push(bytes::Bytes::from_static(b"body"));
        watch.set_outgoing(outgoing);
        assert_eq!(ends(&mut watch).await, (EndReason::Unread, 60));
    }
}
