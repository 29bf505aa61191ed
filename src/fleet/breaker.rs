//! The state machine of one upstream: observations go in, the requests that it may have come out.
//!
//! ```text
//! unknown --`rise` good probes--> ready
//! ready   --a failed probe, or a request that could not reach it or that it gave up--> suspect
//! suspect --a good probe--> ready
//! suspect --`fall` failed probes, or refused by a request and by the next probe--> down
//! down    --`rise` good probes--> ready
//! ready, suspect  --failures of requests--> tripped
//! tripped --`open` is over: one request is let through--> ready when it is answered,
//!           tripped for twice as long when it is not; refused twice--> down
//! ready, suspect, tripped --its own word that it is leaving--> draining
//! draining --refused, or `fall` failed probes--> down; --still there after a while--> ready
//! any but unknown --its engine is dead--> down, and good probes count only after a sign of another process:
//!           its metrics report another start, or nothing listened at a probe; where its metrics are not
//!           read, any failed probe; else after 30 s
//! ```
//!
//! The process of a dead engine goes on for a moment, and may answer probes well meanwhile.
//!
//! An operator's drain overrides all of this and hides it until it is taken back, except for
//! `UpstreamStatus::gone`: requests in flight must learn that their answers will not come. An upstream that
//! comes back works its way up to its whole weight (`UpstreamStatus::warmth`).
//!
//! A probe never ends a trip early: an engine that fails requests mostly answers probes well. Silence to a
//! probe never counts against an engine that has begun answers meanwhile. Errors of clients and full
//! engines are nothing that this sees. Pure: time comes in as `now`.

pub mod blame;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::types::{Breaker, Health};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamState {
    /// Not reached since it is known.
    Unknown,
    Ready,
    /// Something went wrong; it is asked at once.
    Suspect,
    /// Does not answer.
    Down,
    /// Ends its work and takes no more.
    Draining,
    /// Answers, and fails too many requests.
    Tripped,
}

impl UpstreamState {
    pub const ALL: [UpstreamState; 6] = [
        UpstreamState::Unknown,
        UpstreamState::Ready,
        UpstreamState::Suspect,
        UpstreamState::Down,
        UpstreamState::Draining,
        UpstreamState::Tripped,
    ];

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

/// Which requests an upstream may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Admits {
    None,
    /// One at a time, to find out.
    One,
    /// Only requests that no better upstream can take.
    Last,
    All,
}

/// What a request saw of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The connection failed; `refused`: no process listens on the port.
    Unreached { refused: bool },
    /// A server error, or an end without an answer.
    Failed,
    /// An answer began.
    Answered,
    /// The upstream gave the request up without a token: it is shutting down, or a client aborted the
    /// request. Clients may abort any request, so only a probe can tell the cases apart.
    GaveUp,
    /// It said itself that it is shutting down.
    Leaving,
    /// It reported that its engine is dead: its process can do nothing but end.
    EngineDead,
}

/// How a probe failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeMiss {
    /// The connection was refused.
    Refused,
    /// No answer in time, or a broken one.
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

/// After coming back an upstream works its way up for this long: its cache is cold and its kernels are
/// not compiled.
const WARM_UP: Duration = Duration::from_secs(10);

/// The share of its weight with which it begins.
const COLD_WEIGHT_SHARE: f64 = 0.1;

/// The longest that an engine which announced its shutdown counts as draining. If it still answers then, the
/// announcement was wrong.
const MAX_LEAVING_TIME: Duration = Duration::from_secs(15);

/// While an upstream works its way up it has its whole weight with this many requests in flight, one more
/// for each second. Otherwise the balancer would send it nothing beside idle upstreams, which cost a tenth.
const FIRST_IN_FLIGHT: u64 = 1;

/// After this time good probes alone end the state of a dead engine: the probes have seen no other process,
/// so the sign was wrong, or the balancer missed the restart.
const MAX_DEAD: Duration = Duration::from_secs(30);

/// Failures trip when they are at least this share of the answers among which they fell.
const TRIP_SHARE: f64 = 0.5;

/// What a decision needs to know of an upstream; true until the machine moves again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamStatus {
    pub state: UpstreamState,
    /// When `state` began.
    pub since: Instant,
    /// By all that was seen of it its process does not work any more, also while an operator drains it.
    pub gone: bool,
    /// Connections are refused: its process, and what it held in memory, is gone.
    pub lost: bool,
    /// It was probed and did not answer; when it will come is unknown.
    pub missing: bool,
    admits: Admits,
    /// Before this it admits nothing.
    opens: Option<Instant>,
    warm_since: Option<Instant>,
}

impl UpstreamStatus {
    pub fn admits(&self, now: Instant) -> Admits {
        match self.opens {
            Some(opens) if now < opens => Admits::None,
            _ => self.admits,
        }
    }

    /// The end of the trip that keeps requests away; `None`: it is not tripped, or it is gone.
    pub fn trip_end(&self) -> Option<Instant> {
        self.opens.filter(|_| !self.gone)
    }

    /// The share of its weight that it has with so many requests in flight: its warmth beyond the few that it
    /// may have at once.
    pub fn weight_share(&self, active: u64, now: Instant) -> f64 {
        let Some(since) = self.warm_since else { return 1.0 };
        let at_once = FIRST_IN_FLIGHT + now.saturating_duration_since(since).as_secs();
        if active < at_once { 1.0 } else { self.warmth(now) }
    }

    /// The share of its weight that it has: below 1 for a while after it came back.
    pub fn warmth(&self, now: Instant) -> f64 {
        let Some(since) = self.warm_since else { return 1.0 };
        let share = now.saturating_duration_since(since).as_secs_f64() / WARM_UP.as_secs_f64();
        share.clamp(COLD_WEIGHT_SHARE, 1.0)
    }
}

#[derive(Clone, Debug)]
pub struct Machine {
    state: UpstreamState,
    since: Instant,
    /// Probes in a row.
    good: u32,
    bad: u32,
    /// The last connection was refused.
    refused: bool,
    /// It said at the last probe that it is not well.
    unwell: bool,
    /// Answers that had begun when it was last probed.
    answers: u64,
    /// When requests failed, and how many answers had begun by then.
    failures: VecDeque<(Instant, u64)>,
    /// How long the present trip lasts.
    open: Duration,
    warm_since: Option<Instant>,
    /// Since when an operator wants it drained.
    drained: Option<Instant>,
    dead: Option<DeadEngine>,
}

/// An upstream reported that its engine is dead.
#[derive(Clone, Copy, Debug)]
struct DeadEngine {
    since: Instant,
    /// There was a sign of another process.
    replaced: bool,
}

impl Machine {
    pub fn new(now: Instant) -> Self {
        Machine {
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
        }
    }

    pub fn status(&self, rules: &BreakerRules) -> UpstreamStatus {
        let Machine { state, since, warm_since, .. } = *self;
        let gone = match state {
            UpstreamState::Down => true,
            // A trip hides that probes fail, too.
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
        UpstreamStatus { state, since, gone, lost, missing, admits, opens, warm_since }
    }

    /// When `standing` admits more by itself.
    pub fn opens(&self) -> Option<Instant> {
        (self.state == UpstreamState::Tripped).then(|| self.since + self.open)
    }

    /// Failed probes in a row.
    pub fn missed(&self) -> u32 {
        self.bad
    }

    /// Whether news of it are worth more than a probe at each interval.
    pub fn is_uncertain(&self) -> bool {
        !matches!(self.state, UpstreamState::Ready | UpstreamState::Tripped)
    }

    /// Whether answers are news: otherwise they are only counted.
    pub fn counts_answers(&self) -> bool {
        matches!(self.state, UpstreamState::Suspect | UpstreamState::Tripped)
    }

    /// The operator's word; it stands until the next one.
    pub fn drain(&mut self, drain: bool, now: Instant) {
        self.drained = drain.then(|| self.drained.unwrap_or(now));
    }

    /// What a probe found; `answers` to requests have begun in all.
    pub fn probed(&mut self, found: Result<(), ProbeMiss>, answers: u64, now: Instant, rules: &BreakerRules) {
        let alive = std::mem::replace(&mut self.answers, answers) != answers;
        match found {
            Ok(()) => self.good_probe(now, rules),
            Err(ProbeMiss::Silent) if alive => self.bad = 0,
            Err(miss) => self.bad_probe(miss, now, rules),
        }
    }

    /// What a request saw; `answers` as above.
    pub fn seen(&mut self, sign: Sign, answers: u64, now: Instant, rules: &BreakerRules) {
        match sign {
            Sign::Unreached { refused } => self.unreached(refused, answers, now, rules),
            Sign::Failed => self.failed(answers, now, rules),
            Sign::Answered => self.answered(now),
            Sign::GaveUp if self.state == UpstreamState::Ready => self.enter(UpstreamState::Suspect, now),
            Sign::GaveUp => {}
            Sign::Leaving => {
                if matches!(
                    self.state,
                    UpstreamState::Ready | UpstreamState::Suspect | UpstreamState::Tripped
                ) {
                    self.enter(UpstreamState::Draining, now);
                }
            }
            Sign::EngineDead => self.engine_died(now),
        }
    }

    /// Its metrics report that its process began anew.
    pub fn restarted(&mut self) {
        if let Some(dead) = &mut self.dead {
            dead.replaced = true;
        }
    }

    fn engine_died(&mut self, now: Instant) {
        // Requests of the same process report it one after the other: the first counts.
        if self.state != UpstreamState::Unknown && self.dead.is_none() {
            self.dead = Some(DeadEngine { since: now, replaced: false });
            self.good = 0;
            self.enter(UpstreamState::Down, now);
        }
    }

    /// Whether the engine may still be dead although its API server answers probes.
    fn is_dead(&self, now: Instant) -> bool {
        self.dead.is_some_and(|dead| !dead.replaced && now < dead.since + MAX_DEAD)
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
            // One that was there before us is as warm as the others; one that came up while we looked is not.
            UpstreamState::Unknown if self.good >= rules.health.rise => {
                self.warm_since = self.warm_since.or(was_missing.then_some(now));
                self.enter(UpstreamState::Ready, now);
            }
            UpstreamState::Unknown if was_missing => self.warm_since = Some(now),
            UpstreamState::Suspect => self.enter(UpstreamState::Ready, now),
            UpstreamState::Draining if now >= self.since + MAX_LEAVING_TIME => self.come_back(now),
            _ => {}
        }
    }

    fn bad_probe(&mut self, miss: ProbeMiss, now: Instant, rules: &BreakerRules) {
        let refused = miss == ProbeMiss::Refused;
        // Refused twice, or after it announced its shutdown: the process is gone.
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
            // A trip outlasts everything but the process that it was about.
            UpstreamState::Tripped if gone => self.enter(UpstreamState::Down, now),
            _ => {}
        }
    }

    fn unreached(&mut self, refused: bool, answers: u64, now: Instant, rules: &BreakerRules) {
        self.refused |= refused;
        if self.state == UpstreamState::Ready {
            self.enter(UpstreamState::Suspect, now);
        }
        // Who refuses is found to be down by the next probe; a trip would outlast its coming back.
        if !refused || self.state == UpstreamState::Tripped {
            self.failed(answers, now, rules);
        }
    }

    fn failed(&mut self, answers: u64, now: Instant, rules: &BreakerRules) {
        let Breaker { failures: enough, window, open, max_open, .. } = rules.breaker;
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
