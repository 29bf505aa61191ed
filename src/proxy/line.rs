//! What a request's phases and the wrapper around its client's session tell each other.
//!
//! The phases know the upstream and the answer; the wrapper is what pingora polls while it waits for the
//! client, so that it is the place where deadlines and the upstream's end are noticed, and where an
//! answer's head can wait until the first event is known to be good.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use tokio::time::Instant;

use crate::config::types::Timeouts;
use crate::fleet::Fleet;

/// How often a silent answer's upstream is looked at.
const GLANCE: Duration = Duration::from_secs(2);

/// How long a client that has left its job in the background is waited for, with nothing of an answer. An
/// engine answers such a request before it reads the prompt; what a stream says later is of a job that is its
/// engine's by then, and ends by itself. Longer silence is a hang, which must not hold a place for ever:
/// vLLM's stream of a job that was cancelled is one, too. Whoever only ended its own half of the connection
/// cannot be told apart, and can have the rest by `GET`.
const LEFT: Duration = Duration::from_secs(600);

/// Why the wrapper ended a request that was on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    FirstByte,
    Idle,
    Total,
    /// Nobody waits any more, and nothing comes.
    Left,
    /// The upstream went silent, and its probes say that it is gone.
    Gone,
}

pub struct Line {
    fleet: Arc<Fleet>,
    timeouts: Timeouts,
    begun: Instant,
    /// Milliseconds from `begun` to the start of the present attempt; 0 while there is none.
    sent: AtomicU64,
    /// Milliseconds from `begun` to the last piece of the answer; 0 before the first.
    moved: AtomicU64,
    /// The upstream of the present attempt.
    upstream: AtomicU64,
    holding: AtomicBool,
    left: AtomicBool,
    ended: AtomicU8,
    /// In place of the answer that came, once that is held as a whole.
    instead: OnceLock<Box<Response<Bytes>>>,
}

impl Line {
    pub fn new(fleet: Arc<Fleet>, timeouts: Timeouts) -> Arc<Self> {
        Arc::new(Line {
            fleet,
            timeouts,
            begun: Instant::now(),
            sent: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            upstream: AtomicU64::new(0),
            holding: AtomicBool::new(true),
            left: AtomicBool::new(false),
            ended: AtomicU8::new(0),
            instead: OnceLock::new(),
        })
    }

    fn now(&self) -> u64 {
        // Never 0, which stands for not yet.
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// An attempt begins.
    pub fn attempt(&self, upstream: usize) {
        self.sent.store(self.now(), Relaxed);
        self.moved.store(0, Relaxed);
        self.upstream.store(upstream as u64, Relaxed);
        self.holding.store(true, Relaxed);
        // The one before may have ended because its upstream was gone.
        self.ended.store(0, Relaxed);
    }

    /// No attempt is on its way: the request waits for room, or for another try.
    pub fn wait(&self) {
        self.sent.store(0, Relaxed);
        self.moved.store(0, Relaxed);
    }

    /// How long the present attempt has been on its way.
    pub fn since_sent(&self) -> Duration {
        Duration::from_millis(self.now().saturating_sub(self.sent.load(Relaxed)))
    }

    /// A piece of the body came from the client: the upstream has not had all of the request yet.
    pub fn uploading(&self) {
        if self.sent.load(Relaxed) > 0 && self.moved.load(Relaxed) == 0 {
            self.sent.store(self.now(), Relaxed);
        }
    }

    /// A piece of the answer came, or has gone to the client.
    pub fn moved(&self) {
        self.moved.store(self.now(), Relaxed);
    }

    /// The answer is good: its head may go out.
    pub fn let_go(&self) {
        self.holding.store(false, Relaxed);
    }

    /// The client has left, and the request goes on without it.
    pub fn left(&self) {
        self.left.store(true, Relaxed);
    }

    pub fn holds(&self) -> bool {
        self.holding.load(Relaxed)
    }

    /// This goes out, under the fields of the head that is held.
    pub fn say_instead(&self, answer: Response<Bytes>) {
        // No attempt follows an answer that goes out: there is but one.
        self.instead.get_or_init(|| Box::new(answer));
    }

    pub fn instead(&self) -> Option<&Response<Bytes>> {
        self.instead.get().map(|answer| &**answer)
    }

    pub fn ended(&self) -> Option<Ended> {
        match self.ended.load(Relaxed) {
            1 => Some(Ended::FirstByte),
            2 => Some(Ended::Idle),
            3 => Some(Ended::Total),
            4 => Some(Ended::Gone),
            5 => Some(Ended::Left),
            _ => None,
        }
    }

    /// Waits until the request must end, and says why. Costs one timer.
    pub async fn must_end(&self) -> Ended {
        loop {
            let glance = Instant::now() + GLANCE;
            let due = self.deadline().map_or(glance, |(deadline, _)| deadline.min(glance));
            tokio::time::sleep_until(due).await;
            let passed = self.deadline().filter(|(deadline, _)| *deadline <= Instant::now());
            let ended = if let Some((_, why)) = passed {
                Some(why)
            } else if self.silent_for(GLANCE) && self.upstream_is_gone() {
                Some(Ended::Gone)
            } else {
                None
            };
            if let Some(ended) = ended {
                let code = match ended {
                    Ended::FirstByte => 1,
                    Ended::Idle => 2,
                    Ended::Total => 3,
                    Ended::Gone => 4,
                    Ended::Left => 5,
                };
                self.ended.store(code, Relaxed);
                return ended;
            }
        }
    }

    /// The earliest deadline there is, and what it is of.
    fn deadline(&self) -> Option<(Instant, Ended)> {
        let at = |millis: u64, limit: Option<Duration>, why| {
            Some((self.begun + Duration::from_millis(millis) + limit?, why))
        };
        let (sent, moved) = (self.sent.load(Relaxed), self.moved.load(Relaxed));
        let step = match moved {
            0 if sent == 0 => None,
            0 => at(sent, self.timeouts.first_byte, Ended::FirstByte),
            moved => at(moved, self.timeouts.idle, Ended::Idle),
        };
        let left = (sent > 0 && self.left.load(Relaxed)).then_some(LEFT);
        let left = at(moved.max(sent), left, Ended::Left);
        let total = at(0, self.timeouts.total, Ended::Total);
        [step, left, total].into_iter().flatten().min_by_key(|(deadline, _)| *deadline)
    }

    fn silent_for(&self, time: Duration) -> bool {
        let last = self.moved.load(Relaxed).max(self.sent.load(Relaxed));
        self.now().saturating_sub(last) >= u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
    }

    fn upstream_is_gone(&self) -> bool {
        self.sent.load(Relaxed) > 0 && self.fleet.snapshot().is_gone(self.upstream.load(Relaxed) as usize)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::config::types::{Config, UpstreamConfig, UpstreamUrl};

    /// Of a request to an upstream that nobody has looked at, whose number is 0.
    pub fn line(timeouts: Timeouts) -> Arc<Line> {
        let url =
            UpstreamUrl { https: false, host: "gpu".into(), port: 1, unix: None, prefix: String::new() };
        let config = Config { upstreams: vec![UpstreamConfig::new(url)], ..Config::default() };
        let (fleet, _keeper) = Fleet::new(&config).unwrap();
        Line::new(fleet, timeouts)
    }

    fn seconds(first_byte: u64, idle: u64, total: u64) -> Timeouts {
        let some = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        Timeouts { first_byte: some(first_byte), idle: some(idle), total: some(total), ..Timeouts::default() }
    }

    async fn ends(line: &Line) -> (Ended, u64) {
        let begun = Instant::now();
        let ended = line.must_end().await;
        (ended, begun.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn each_deadline_counts_from_its_own_beginning() {
        let waiting = line(seconds(5, 1, 60));
        waiting.attempt(0);
        assert_eq!(ends(&waiting).await, (Ended::FirstByte, 5));

        let streaming = line(seconds(5, 10, 0));
        streaming.attempt(0);
        streaming.moved();
        assert_eq!(ends(&streaming).await, (Ended::Idle, 10));

        let long = line(seconds(0, 30, 7));
        long.attempt(0);
        long.moved();
        assert_eq!(ends(&long).await, (Ended::Total, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_never_cut_by_a_limit_that_was_not_asked_for() {
        let line = line(seconds(0, 0, 0));
        line.attempt(0);
        let day = Duration::from_secs(24 * 3600);
        assert!(tokio::time::timeout(day, line.must_end()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_left_is_not_waited_for_without_end() {
        let silent = line(seconds(0, 0, 0));
        silent.attempt(0);
        silent.left();
        assert_eq!(ends(&silent).await, (Ended::Left, 600));

        // From what came last; and what was asked for goes before.
        let streaming = line(seconds(0, 0, 0));
        streaming.attempt(0);
        tokio::time::sleep(Duration::from_secs(50)).await;
        streaming.moved();
        streaming.left();
        assert_eq!(ends(&streaming).await, (Ended::Left, 600));
        let limited = line(seconds(0, 10, 0));
        limited.attempt(0);
        limited.moved();
        limited.left();
        assert_eq!(ends(&limited).await, (Ended::Idle, 10));

        // The wait for room has its own end.
        let waiting = line(seconds(0, 0, 0));
        waiting.left();
        let day = Duration::from_secs(24 * 3600);
        assert!(tokio::time::timeout(day, waiting.must_end()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_moves_is_not_idle() {
        let line = line(seconds(0, 3, 0));
        line.attempt(0);
        for _ in 0..10 {
            line.moved();
            let two = Duration::from_secs(2);
            assert!(tokio::time::timeout(two, line.must_end()).await.is_err());
        }
        assert_eq!(ends(&line).await.0, Ended::Idle);
    }
}
