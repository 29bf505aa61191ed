//! The state machine of one upstream: probes and signals of requests go in, the requests that it admits come
//! out.
//!
//! ```text
//! unknown --`rise` good probes--> ready
//! ready   --a failed probe, a request that could not connect, or one that was given up--> suspect
//! suspect --a good probe--> ready
//! suspect --`fall` failed probes, or connections of a request and of the next probe refused--> down
//! down    --`rise` good probes--> ready
//! ready, suspect  --failures of requests--> tripped
//! tripped --`open` is over: one trial request--> ready when its answer begins with a success,
//!           tripped for twice as long when it fails; two refused connections--> down
//! ready, suspect, tripped --the upstream announces its shutdown--> draining
//! draining --a refused connection, or `fall` failed probes--> down; --good probes after 15 s--> ready
//! any but unknown --its engine is dead--> down, and good probes count only after evidence of a new process:
//!           its metrics report another start, or nothing listened at a probe; where its metrics are not
//!           read, any failed probe; else after 30 s
//! ```
//!
//! The API server of a dead engine runs on for a moment and may answer probes meanwhile.
//!
//! An operator's drain overrides and hides the state until it is taken back, except for
//! `UpstreamStatus::gone`: requests in flight must end when their answers will not come. An upstream that
//! comes back grows to its full weight (`UpstreamStatus::warmth`).
//!
//! Only requests that were placed behind the end of a trip test the upstream: older ones may fail, or be
//! answered, long after it. An error of a client tests nothing, and neither does the head of a stream, which
//! vLLM sends before it reads the prompt.
//!
//! While a sibling's breaker is open, one failure of a request is enough here.
//!
//! A probe never ends a trip early: an engine that fails requests mostly answers probes. A probe that times
//! out does not count against an engine that has begun answers meanwhile. Errors of clients and full engines
//! are not reported to the machine. Pure: time comes in as `now`.

pub(crate) mod blame;
mod status;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub use self::status::UpstreamState;
pub(crate) use self::status::{Admits, UpstreamStatus};
use crate::config::types::{Breaker, Health};

/// What a request observed of an upstream. `placed`: when it was placed there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamSignal {
    /// The connection failed; `refused`: no process listens on the port.
    Unreached { refused: bool, placed: Instant },
    /// A server error, or a connection that ended without an answer.
    Failed { placed: Instant },
    /// The beginning of an answer was judged and goes to the client; `passed`: it is a success.
    Answered { passed: bool, placed: Instant },
    /// The upstream aborted the request before the first token: it is shutting down, or a client aborted the
    /// request. Clients may abort any request, so only a probe can distinguish the two.
    GaveUp,
    /// The upstream reported that it is shutting down.
    ShuttingDown,
    /// The upstream reported that its engine is dead: its process will end.
    EngineDead,
}

/// How a probe failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProbeMiss {
    /// The connection was refused.
    Refused,
    /// No answer within the time limit, or a broken one.
    Silent,
    /// An error status.
    Wrong,
}

/// The settings of the state machine.
#[derive(Clone, Debug, PartialEq)]
pub struct BreakerRules {
    pub health: Health,
    pub breaker: Breaker,
}

/// The longest time that an upstream counts as draining after it announced its shutdown. If it still answers
/// then, the announcement was wrong.
const MAX_SHUTDOWN_TIME: Duration = Duration::from_secs(15);

/// The time after which good probes alone end the state of a dead engine: the report was wrong, or the
/// balancer missed the restart.
const MAX_DEAD_TIME: Duration = Duration::from_secs(30);

/// The least share of failures among the answers of their period that trips the breaker.
const TRIP_SHARE: f64 = 0.5;

/// The state machine of one upstream.
#[derive(Clone, Debug)]
pub(crate) struct BreakerMachine {
    state: UpstreamState,
    since: Instant,
    /// Good probes in a row.
    good: u32,
    /// Failed probes in a row.
    bad: u32,
    /// The last connection was refused.
    refused: bool,
    /// The last probe got an error status.
    unwell: bool,
    /// The number of answers that had begun at the last probe.
    answers: u64,
    /// The recent failures of requests: their times, and the number of answers that were good by then.
    failures: VecDeque<(Instant, u64)>,
    /// The length of the present trip.
    open: Duration,
    warm_since: Option<Instant>,
    /// When an operator's drain began, and when the latest one ended.
    drained: Option<Instant>,
    undrained: Option<Instant>,
    dead: Option<DeadEngine>,
    /// Until when the breaker of a sibling keeps its requests away.
    sibling_trip: Option<Instant>,
}

/// An upstream reported that its engine is dead.
#[derive(Clone, Copy, Debug)]
struct DeadEngine {
    since: Instant,
    /// There is evidence of a new process.
    replaced: bool,
}

impl BreakerMachine {
    /// Builds the machine of an upstream that was not probed yet.
    pub(crate) fn new(now: Instant) -> Self {
        BreakerMachine {
            state: UpstreamState::Unknown,
            since: now,
            good: 0,
            bad: 0,
            refused: false,
            unwell: false,
            answers: 0,
            failures: VecDeque::new(),
            open: Duration::ZERO,
            warm_since: None,
            drained: None,
            undrained: None,
            dead: None,
            sibling_trip: None,
        }
    }

    /// Returns the present status.
    pub(crate) fn status(&self, rules: &BreakerRules) -> UpstreamStatus {
        let BreakerMachine { state, warm_since, .. } = *self;
        // What a drain has hidden begins for observers with the end of the drain.
        let since = self.undrained.map_or(self.since, |undrained| undrained.max(self.since));
        let gone = match state {
            UpstreamState::Down => true,
            // The state stays `Tripped` while probes fail.
            UpstreamState::Tripped => self.bad >= rules.health.fall,
            UpstreamState::Unknown
            | UpstreamState::Ready
            | UpstreamState::Suspect
            | UpstreamState::Draining => false,
        };
        let lost = gone && (self.refused || self.dead.is_some());
        let missing = state == UpstreamState::Unknown && self.bad > 0;
        let admits = match state {
            UpstreamState::Ready => Admits::All,
            UpstreamState::Suspect if self.refused || self.unwell => Admits::Last,
            UpstreamState::Suspect => Admits::All,
            UpstreamState::Tripped if !gone => Admits::One,
            UpstreamState::Unknown
            | UpstreamState::Down
            | UpstreamState::Draining
            | UpstreamState::Tripped => Admits::None,
        };
        let status = |state, since, admits, opens, warm_since| {
            let drained = self.drained.is_some();
            UpstreamStatus { state, since, gone, lost, missing, drained, admits, opens, warm_since }
        };
        match self.drained {
            Some(since) => status(UpstreamState::Draining, since, Admits::None, None, None),
            None => status(state, since, admits, self.opens(), warm_since),
        }
    }

    /// Returns the time at which the status admits more without another event.
    pub(crate) fn opens(&self) -> Option<Instant> {
        (self.state == UpstreamState::Tripped).then(|| self.since + self.open)
    }

    /// Returns the number of failed probes in a row.
    pub(crate) fn missed(&self) -> u32 {
        self.bad
    }

    /// Whether the upstream is to be probed more often than at each interval.
    pub(crate) fn is_uncertain(&self) -> bool {
        !matches!(self.state, UpstreamState::Ready | UpstreamState::Tripped)
    }

    /// Whether the machine needs the answers of requests as signals; otherwise they are only counted.
    pub(crate) fn counts_answers(&self) -> bool {
        matches!(self.state, UpstreamState::Suspect | UpstreamState::Tripped)
    }

    /// Starts or ends an operator's drain.
    pub(crate) fn drain(&mut self, drain: bool, now: Instant) {
        match (drain, self.drained) {
            (true, None) => self.drained = Some(now),
            (false, Some(_)) => (self.drained, self.undrained) = (None, Some(now)),
            (true, Some(_)) | (false, None) => {}
        }
    }

    /// Applies the result of a probe; `answers` is the number of answers to requests that have begun.
    pub(crate) fn probed(
        &mut self,
        found: Result<(), ProbeMiss>,
        answers: u64,
        now: Instant,
        rules: &BreakerRules,
    ) {
        let alive = std::mem::replace(&mut self.answers, answers) != answers;
        match found {
            Ok(()) => self.good_probe(now, rules),
            Err(ProbeMiss::Silent) if alive => self.bad = 0,
            Err(miss) => self.bad_probe(miss, now, rules),
        }
    }

    /// Applies a signal of a request; `good` is the number of answers whose beginnings were judged good.
    pub(crate) fn signalled(
        &mut self,
        signal: UpstreamSignal,
        good: u64,
        now: Instant,
        rules: &BreakerRules,
    ) {
        match signal {
            UpstreamSignal::Unreached { refused, placed } => {
                self.unreached(refused, now);
                // The next probe finds that a refusing upstream is down; a trip would last longer than its
                // restart.
                if !refused || self.state == UpstreamState::Tripped {
                    self.failed(placed, good, now, rules);
                }
            }
            UpstreamSignal::Failed { placed } => self.failed(placed, good, now, rules),
            UpstreamSignal::Answered { passed, placed } => self.answered(passed, placed, now),
            UpstreamSignal::GaveUp if self.state == UpstreamState::Ready => {
                self.enter(UpstreamState::Suspect, now)
            }
            UpstreamSignal::GaveUp => {}
            UpstreamSignal::ShuttingDown => {
                if matches!(
                    self.state,
                    UpstreamState::Ready | UpstreamState::Suspect | UpstreamState::Tripped
                ) {
                    self.enter(UpstreamState::Draining, now);
                }
            }
            UpstreamSignal::EngineDead => self.engine_died(now),
        }
    }

    /// Records a sibling's trip: until its end one failure of a request is enough for a trip here.
    pub(crate) fn sibling_tripped(&mut self, until: Instant) {
        self.sibling_trip = self.sibling_trip.max(Some(until));
    }

    /// Records that the metrics of the upstream report a new process.
    pub(crate) fn restarted(&mut self) {
        if let Some(dead) = &mut self.dead {
            dead.replaced = true;
        }
    }

    fn engine_died(&mut self, now: Instant) {
        // Several requests report the same death: the first report counts.
        if self.state != UpstreamState::Unknown && self.dead.is_none() {
            self.dead = Some(DeadEngine { since: now, replaced: false });
            self.good = 0;
            self.enter(UpstreamState::Down, now);
        }
    }

    /// Whether the engine may still be dead although its API server answers probes.
    fn is_dead(&self, now: Instant) -> bool {
        self.dead.is_some_and(|dead| !dead.replaced && now < dead.since + MAX_DEAD_TIME)
    }

    fn enter(&mut self, state: UpstreamState, now: Instant) {
        if self.state != state {
            self.state = state;
            self.since = now;
        }
    }

    fn come_back(&mut self, now: Instant) {
        self.warm_since = Some(now);
        self.failures.clear();
        self.dead = None;
        self.sibling_trip = None;
        self.enter(UpstreamState::Ready, now);
    }

    fn good_probe(&mut self, now: Instant, rules: &BreakerRules) {
        let was_missing = self.bad > 0;
        self.good = if self.is_dead(now) { 0 } else { self.good.saturating_add(1) };
        self.bad = 0;
        self.refused = false;
        self.unwell = false;
        match self.state {
            UpstreamState::Down if self.good >= rules.health.rise => self.come_back(now),
            // An upstream that answered the first probe is as warm as the others; one that came up later is
            // not.
            UpstreamState::Unknown if self.good >= rules.health.rise => {
                self.warm_since = self.warm_since.or(was_missing.then_some(now));
                self.enter(UpstreamState::Ready, now);
            }
            UpstreamState::Unknown if was_missing => self.warm_since = Some(now),
            UpstreamState::Suspect => self.enter(UpstreamState::Ready, now),
            UpstreamState::Draining if now >= self.since + MAX_SHUTDOWN_TIME => self.come_back(now),
            _ => {}
        }
    }

    fn bad_probe(&mut self, miss: ProbeMiss, now: Instant, rules: &BreakerRules) {
        let refused = miss == ProbeMiss::Refused;
        // Two refused connections, or one after the announced shutdown: the process is gone.
        let gone = refused && (self.refused || self.state == UpstreamState::Draining);
        self.refused = refused;
        self.unwell = miss == ProbeMiss::Wrong;
        self.good = 0;
        self.bad = self.bad.saturating_add(1);
        if let Some(dead) = &mut self.dead {
            dead.replaced |= refused || !rules.health.metrics;
        }
        let fallen = gone || self.bad >= rules.health.fall;
        match self.state {
            UpstreamState::Ready | UpstreamState::Suspect | UpstreamState::Draining if fallen => {
                self.enter(UpstreamState::Down, now)
            }
            UpstreamState::Ready => self.enter(UpstreamState::Suspect, now),
            // A trip ends early only with the process that failed.
            UpstreamState::Tripped if gone => self.enter(UpstreamState::Down, now),
            _ => {}
        }
    }

    fn unreached(&mut self, refused: bool, now: Instant) {
        self.refused |= refused;
        if self.state == UpstreamState::Ready {
            self.enter(UpstreamState::Suspect, now);
        }
    }

    /// Whether a request that was placed then tests whether a trip is over.
    fn is_test(&self, placed: Instant) -> bool {
        self.opens().is_some_and(|opens| placed >= opens)
    }

    fn failed(&mut self, placed: Instant, good: u64, now: Instant, rules: &BreakerRules) {
        let Breaker { failures, window, open, max_open, .. } = rules.breaker;
        let enough = if self.sibling_trip.is_some_and(|until| now < until) { 1 } else { failures };
        match self.state {
            UpstreamState::Ready | UpstreamState::Suspect => {}
            UpstreamState::Tripped if self.is_test(placed) => {
                self.open = self.open.saturating_mul(2).min(max_open);
                self.since = now;
                return;
            }
            UpstreamState::Unknown
            | UpstreamState::Down
            | UpstreamState::Draining
            | UpstreamState::Tripped => return,
        }
        self.failures.push_back((now, good));
        let old = |(at, _): &(Instant, u64)| now.saturating_duration_since(*at) > window;
        while self.failures.front().is_some_and(old) || self.failures.len() > enough as usize {
            self.failures.pop_front();
        }
        let answered = self.failures.front().map_or(0, |(_, first)| good.saturating_sub(*first));
        let failed = self.failures.len() as f64;
        if self.failures.len() >= enough as usize && failed >= TRIP_SHARE * (failed + answered as f64) {
            self.open = open;
            self.enter(UpstreamState::Tripped, now);
        }
    }

    fn answered(&mut self, passed: bool, placed: Instant, now: Instant) {
        match self.state {
            UpstreamState::Tripped if passed && self.is_test(placed) => self.come_back(now),
            UpstreamState::Suspect => self.refused = false,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
