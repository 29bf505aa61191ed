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
//! tripped --`open` is over: one trial request--> ready when it is answered,
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
//! While a sibling's breaker is open, one failure of a request is enough here.
//!
//! A probe never ends a trip early: an engine that fails requests mostly answers probes. A probe that times
//! out does not count against an engine that has begun answers meanwhile. Errors of clients and full engines
//! are not reported to the machine. Pure: time comes in as `now`.

pub mod blame;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::types::{Breaker, Health};

/// The state of one upstream, as the admin API and the metrics show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamState {
    /// Not reached since it was configured.
    Unknown,
    Ready,
    /// A failure was seen; the next probe runs at once.
    Suspect,
    /// Does not answer.
    Down,
    /// Finishes its requests and takes no new ones.
    Draining,
    /// Answers probes but fails too many requests.
    Tripped,
}

impl UpstreamState {
    /// All states, for metrics that have one series a state.
    pub const ALL: [UpstreamState; 6] = [
        UpstreamState::Unknown,
        UpstreamState::Ready,
        UpstreamState::Suspect,
        UpstreamState::Down,
        UpstreamState::Draining,
        UpstreamState::Tripped,
    ];

    /// Returns the name of the state in logs, metrics and the admin API.
    pub fn label(self) -> &'static str {
        match self {
            UpstreamState::Unknown => "unknown",
            UpstreamState::Ready => "ready",
            UpstreamState::Suspect => "suspect",
            UpstreamState::Down => "down",
            UpstreamState::Draining => "draining",
            UpstreamState::Tripped => "tripped",
        }
    }
}

/// Which requests an upstream admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Admits {
    None,
    /// One trial request at a time.
    One,
    /// Requests that no better upstream can take.
    Last,
    All,
}

/// What a request observed of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamSignal {
    /// The connection failed; `refused`: no process listens on the port.
    Unreached { refused: bool },
    /// A server error, or a connection that ended without an answer.
    Failed,
    /// An answer began.
    Answered,
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
pub enum ProbeMiss {
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

/// The time in which an upstream that came back grows to its full weight: its cache is cold and its kernels
/// are not compiled.
const WARM_UP: Duration = Duration::from_secs(10);

/// The share of its weight with which an upstream that came back begins.
const COLD_WEIGHT_SHARE: f64 = 0.1;

/// The longest time that an upstream counts as draining after it announced its shutdown. If it still answers
/// then, the announcement was wrong.
const MAX_SHUTDOWN_TIME: Duration = Duration::from_secs(15);

/// The number of requests in flight up to which an upstream that came back has its full weight; it grows by
/// one a second. Without it the upstream would get no requests beside idle upstreams, which cost a tenth.
const FULL_WEIGHT_REQUESTS: u64 = 1;

/// The time after which good probes alone end the state of a dead engine: the report was wrong, or the
/// balancer missed the restart.
const MAX_DEAD_TIME: Duration = Duration::from_secs(30);

/// The least share of failures among the answers of their period that trips the breaker.
const TRIP_SHARE: f64 = 0.5;

/// The facts about an upstream that routing needs; valid until the next event of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamStatus {
    pub state: UpstreamState,
    /// When `state` began.
    pub since: Instant,
    /// Probes show that its process no longer works; also set while an operator drains it.
    pub gone: bool,
    /// Connections are refused: its process and its memory are gone.
    pub lost: bool,
    /// Never reached although it was probed; when it will answer is unknown.
    pub missing: bool,
    /// An operator drains it.
    pub drained: bool,
    admits: Admits,
    /// The end of a trip; the upstream admits nothing before it.
    opens: Option<Instant>,
    warm_since: Option<Instant>,
}

impl UpstreamStatus {
    /// Returns which requests the upstream admits at `now`.
    pub fn admits(&self, now: Instant) -> Admits {
        match self.opens {
            Some(opens) if now < opens => Admits::None,
            _ => self.admits,
        }
    }

    /// Whether the upstream admits all requests until the next event.
    pub fn is_steady(&self) -> bool {
        self.opens.is_none() && self.admits == Admits::All
    }

    /// Returns the time from which on the upstream has its full weight; `None`: it has it.
    pub fn warm_at(&self) -> Option<Instant> {
        self.warm_since.map(|since| since + WARM_UP)
    }

    /// Returns the end of the trip; `None` when the upstream is not tripped or is gone.
    pub fn trip_end(&self) -> Option<Instant> {
        self.opens.filter(|_| !self.gone)
    }

    /// Returns the share of its weight that the upstream has with `active` requests in flight: full for the
    /// first few, its warmth beyond them.
    pub fn weight_share(&self, active: u64, now: Instant) -> f64 {
        let Some(since) = self.warm_since else { return 1.0 };
        let full_weight = FULL_WEIGHT_REQUESTS + now.saturating_duration_since(since).as_secs();
        if active < full_weight { 1.0 } else { self.warmth(now) }
    }

    /// Returns the share of its weight that the upstream has recovered: below 1 for a while after it came
    /// back.
    pub fn warmth(&self, now: Instant) -> f64 {
        let Some(since) = self.warm_since else { return 1.0 };
        let share = now.saturating_duration_since(since).as_secs_f64() / WARM_UP.as_secs_f64();
        share.clamp(COLD_WEIGHT_SHARE, 1.0)
    }
}

/// The state machine of one upstream.
#[derive(Clone, Debug)]
pub struct BreakerMachine {
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
    /// The recent failures of requests: their times, and the number of answers that had begun by then.
    failures: VecDeque<(Instant, u64)>,
    /// The length of the present trip.
    open: Duration,
    warm_since: Option<Instant>,
    /// When an operator's drain began.
    drained: Option<Instant>,
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
    pub fn new(now: Instant) -> Self {
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
            dead: None,
            sibling_trip: None,
        }
    }

    /// Returns the present status.
    pub fn status(&self, rules: &BreakerRules) -> UpstreamStatus {
        let BreakerMachine { state, since, warm_since, .. } = *self;
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
        if let Some(since) = self.drained {
            let (state, admits) = (UpstreamState::Draining, Admits::None);
            return UpstreamStatus {
                state,
                since,
                gone,
                lost,
                missing,
                drained: true,
                admits,
                opens: None,
                warm_since: None,
            };
        }
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
        let opens = (state == UpstreamState::Tripped).then(|| since + self.open);
        UpstreamStatus { state, since, gone, lost, missing, drained: false, admits, opens, warm_since }
    }

    /// Returns the time at which the status admits more without another event.
    pub fn opens(&self) -> Option<Instant> {
        (self.state == UpstreamState::Tripped).then(|| self.since + self.open)
    }

    /// Returns the number of failed probes in a row.
    pub fn missed(&self) -> u32 {
        self.bad
    }

    /// Whether the upstream is to be probed more often than at each interval.
    pub fn is_uncertain(&self) -> bool {
        !matches!(self.state, UpstreamState::Ready | UpstreamState::Tripped)
    }

    /// Whether the machine needs the answers of requests as signals; otherwise they are only counted.
    pub fn counts_answers(&self) -> bool {
        matches!(self.state, UpstreamState::Suspect | UpstreamState::Tripped)
    }

    /// Starts or ends an operator's drain.
    pub fn drain(&mut self, drain: bool, now: Instant) {
        self.drained = drain.then(|| self.drained.unwrap_or(now));
    }

    /// Applies the result of a probe; `answers` is the number of answers to requests that have begun.
    pub fn probed(&mut self, found: Result<(), ProbeMiss>, answers: u64, now: Instant, rules: &BreakerRules) {
        let alive = std::mem::replace(&mut self.answers, answers) != answers;
        match found {
            Ok(()) => self.good_probe(now, rules),
            Err(ProbeMiss::Silent) if alive => self.bad = 0,
            Err(miss) => self.bad_probe(miss, now, rules),
        }
    }

    /// Applies a signal of a request; `answers` as for `probed`.
    pub fn signalled(&mut self, signal: UpstreamSignal, answers: u64, now: Instant, rules: &BreakerRules) {
        match signal {
            UpstreamSignal::Unreached { refused } => self.unreached(refused, answers, now, rules),
            UpstreamSignal::Failed => self.failed(answers, now, rules),
            UpstreamSignal::Answered => self.answered(now),
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
    pub fn sibling_tripped(&mut self, until: Instant) {
        self.sibling_trip = self.sibling_trip.max(Some(until));
    }

    /// Records that the metrics of the upstream report a new process.
    pub fn restarted(&mut self) {
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

    fn unreached(&mut self, refused: bool, answers: u64, now: Instant, rules: &BreakerRules) {
        self.refused |= refused;
        if self.state == UpstreamState::Ready {
            self.enter(UpstreamState::Suspect, now);
        }
        // The next probe finds that a refusing upstream is down; a trip would last longer than its restart.
        if !refused || self.state == UpstreamState::Tripped {
            self.failed(answers, now, rules);
        }
    }

    fn failed(&mut self, answers: u64, now: Instant, rules: &BreakerRules) {
        let Breaker { failures, window, open, max_open, .. } = rules.breaker;
        let enough = if self.sibling_trip.is_some_and(|until| now < until) { 1 } else { failures };
        match self.state {
            UpstreamState::Ready | UpstreamState::Suspect => {}
            UpstreamState::Tripped if now >= self.since + self.open => {
                self.open = self.open.saturating_mul(2).min(max_open);
                self.since = now;
                return;
            }
            UpstreamState::Unknown
            | UpstreamState::Down
            | UpstreamState::Draining
            | UpstreamState::Tripped => return,
        }
        self.failures.push_back((now, answers));
        let old = |(at, _): &(Instant, u64)| now.saturating_duration_since(*at) > window;
        while self.failures.front().is_some_and(old) || self.failures.len() > enough as usize {
            self.failures.pop_front();
        }
        let answered = self.failures.front().map_or(0, |(_, first)| answers.saturating_sub(*first));
        let failed = self.failures.len() as f64;
        if self.failures.len() >= enough as usize && failed >= TRIP_SHARE * (failed + answered as f64) {
            self.open = open;
            self.enter(UpstreamState::Tripped, now);
        }
    }

    fn answered(&mut self, now: Instant) {
        match self.state {
            UpstreamState::Tripped if now >= self.since + self.open => self.come_back(now),
            UpstreamState::Suspect => self.refused = false,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
