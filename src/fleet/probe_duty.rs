//! Decides when this balancer probes one upstream, and when the report of a sibling's probe is enough.
//!
//! Of the balancers on one Redis one probes an upstream for all: the one with the greatest hash of its id and
//! the upstream's name among the live ones (rendezvous hashing). A balancer that comes or goes moves only its
//! own upstreams.
//!
//! ```text
//! the balancer is alone, or Redis is away       probe every interval
//! this balancer is the upstream's prober        probe every interval, behind the last report too
//! a sibling is, and its reports come and agree  probe every `FOLLOWER_INTERVAL`
//! no report for `MISSED_INTERVALS` and a half   probe every interval
//! the upstream's condition is unsure            probe every `UNREADY_INTERVAL`
//! a report disagrees, or a request failed       probe at once (doubt)
//! ```
//!
//! **Own results win over reports.** A report never changes the state of an upstream: a good one cannot make
//! an upstream ready that this balancer does not reach, and a bad one cannot take out an upstream that it
//! reaches. A report that agrees with this balancer's own view saves a probe; any other one is doubt, which
//! only an own probe ends. An own failure therefore holds until an own probe is good, and while the upstream
//! is unsure these come every `UNREADY_INTERVAL`.
//!
//! A prober without reports is passed over: a sibling may be an older release, or lack the upstream. The next
//! in the order of the hashes takes its place until it reports.
//!
//! Times are spread by up to a tenth, so that many balancers and many upstreams do not probe together. Pure:
//! time and the random `draw` come in.

use std::time::{Duration, Instant};

/// The interval between two own probes of an upstream that a sibling probes.
pub(super) const FOLLOWER_INTERVAL: Duration = Duration::from_secs(30);

/// The interval between two probes while the condition of an upstream is unsure.
pub(super) const UNREADY_INTERVAL: Duration = Duration::from_millis(250);

/// The least interval between two probes, however many requests report failures of the upstream.
pub(super) const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(50);

/// The number of intervals after which a report is missing; up to a half more, so that not all balancers
/// notice it together.
pub(super) const MISSED_INTERVALS: u32 = 2;

/// The longest time by which a probe differs from its interval, as a share of the interval.
const MAX_JITTER_SHARE: f64 = 0.1;

/// The time that each balancer adds to the span over which the probes after a disagreeing report are spread.
const DOUBT_SPREAD: Duration = Duration::from_millis(5);

/// The largest number of siblings that are passed over for one upstream.
const MAX_PASSED_OVER: usize = 1024;

/// The balancers that share the probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LiveBalancers {
    /// The id of this balancer.
    pub own: u64,
    /// The ids of the siblings; empty while Redis is away.
    pub siblings: Vec<u64>,
}

/// What this balancer believes of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UpstreamCondition {
    /// It answers its probes.
    Works,
    /// It fails its probes.
    Fails,
    /// It was not probed often enough, or has just failed.
    Unsure,
}

/// The facts about an upstream that a decision needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct DutyView<'a> {
    /// The hash of the upstream's name.
    pub key: u64,
    pub balancers: &'a LiveBalancers,
    /// `health.interval`.
    pub interval: Duration,
    pub condition: UpstreamCondition,
    pub now: Instant,
}

/// The result of one own probe, as far as the duty is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProbeShare {
    /// The siblings need the result.
    pub publish: bool,
    /// The metrics of the upstream are to be read.
    pub metrics: bool,
}

/// The effect of a sibling's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeardReport {
    /// A later probe is known.
    Outdated,
    /// The sibling found what this balancer believes.
    Agrees,
    /// It found something else: an own probe is due.
    Disagrees,
}

/// The duty of this balancer to probe one upstream.
#[derive(Clone, Debug)]
pub(super) struct ProbeDuty {
    /// The time of the first probe.
    first: Instant,
    /// When the last own probe ended, and whether it was good.
    probed: Option<(Instant, bool)>,
    /// When the probe of the last report ended, and whether it was good.
    heard: Option<(Instant, bool)>,
    /// An own probe is due at this time for another reason than its interval.
    doubt: Option<Instant>,
    /// The balancer that probes for all, and since when it was chosen or last reported.
    prober: Option<(u64, Instant)>,
    /// The siblings that do not report on this upstream.
    passed_over: Vec<u64>,
    /// When the result of an own probe was last published.
    published: Option<Instant>,
    /// A random number in 0..1, new for each own probe.
    draw: f64,
}

// === impl LiveBalancers ===

impl LiveBalancers {
    /// Whether no other balancer is known.
    pub(super) fn is_alone(&self) -> bool {
        self.siblings.is_empty()
    }

    /// Returns the balancer with the greatest hash for this key, without the ones in `but`.
    fn prober(&self, key: u64, but: &[u64]) -> u64 {
        let siblings = self.siblings.iter().copied().filter(|id| !but.contains(id));
        let all = siblings.chain([self.own]);
        all.max_by_key(|id| (scatter(key ^ scatter(*id)), *id)).unwrap_or(self.own)
    }
}

/// Scatters a number over 64 bits.
fn scatter(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

// === impl ProbeDuty ===

impl ProbeDuty {
    /// Builds the duty for an upstream whose first probe is due at `first`; `draw` is random, in 0..1.
    pub(super) fn new(first: Instant, draw: f64) -> Self {
        ProbeDuty {
            first,
            probed: None,
            heard: None,
            doubt: None,
            prober: None,
            passed_over: Vec::new(),
            published: None,
            draw,
        }
    }

    /// Returns the time of the first probe.
    pub(super) fn first_probe(&self) -> Instant {
        self.first
    }

    /// Returns the time of the next decision: a probe is due when it is not in the future.
    pub(super) fn due(&mut self, view: &DutyView<'_>) -> Instant {
        let Some((probed, _)) = self.probed else {
            return self.doubt.map_or(self.first, |doubt| doubt.min(self.first));
        };
        let next = match self.follows(view) {
            Some(missing) => missing.min(probed + self.spread(FOLLOWER_INTERVAL.max(view.interval))),
            None => self.own_turn(view, probed),
        };
        let next = match self.doubt {
            // The last own probe may be old: only the doubt is spread over the balancers.
            Some(doubt) if view.condition != UpstreamCondition::Unsure => doubt,
            Some(doubt) => doubt.min(next),
            None => next,
        };
        next.max(probed + MIN_PROBE_INTERVAL)
    }

    /// Returns the time of the next probe that does not rely on reports.
    fn own_turn(&self, view: &DutyView<'_>, probed: Instant) -> Instant {
        // A sibling that was the prober a moment ago has probed for this balancer too.
        let relied = !view.balancers.is_alone() && self.agrees(view.condition);
        let last = self.heard.filter(|_| relied).map_or(probed, |(heard, _)| heard.max(probed));
        let pause = match view.condition {
            UpstreamCondition::Works => view.interval,
            UpstreamCondition::Fails | UpstreamCondition::Unsure => view.interval.min(UNREADY_INTERVAL),
        };
        last + self.spread(pause)
    }

    /// Returns until when the reports of a sibling are enough, if they are.
    fn follows(&mut self, view: &DutyView<'_>) -> Option<Instant> {
        if self.is_prober(view) || !self.agrees(view.condition) {
            return None;
        }
        let (heard, _) = self.heard?;
        let missing = heard + self.patience(view.interval);
        (missing > view.now).then_some(missing)
    }

    /// Returns how long after a report the next one is missing.
    fn patience(&self, interval: Duration) -> Duration {
        interval.mul_f64(f64::from(MISSED_INTERVALS) + self.draw / 2.0)
    }

    /// Whether the last report and this balancer's own view are the same.
    fn agrees(&self, condition: UpstreamCondition) -> bool {
        let heard = self.heard.map(|(_, good)| good);
        match condition {
            UpstreamCondition::Works => heard == Some(true),
            UpstreamCondition::Fails => heard == Some(false),
            UpstreamCondition::Unsure => false,
        }
    }

    /// Returns the balancer that probes for all. Passes over a sibling without reports.
    fn prober(&mut self, view: &DutyView<'_>) -> u64 {
        let DutyView { key, balancers, interval, now, .. } = *view;
        self.passed_over.retain(|id| balancers.siblings.contains(id));
        loop {
            let chosen = balancers.prober(key, &self.passed_over);
            let since = match self.prober {
                Some((before, since)) if before == chosen => since,
                _ => self.prober.insert((chosen, now)).1,
            };
            let silent = now.saturating_duration_since(since) >= self.patience(interval);
            if chosen == balancers.own || !silent || self.passed_over.len() >= MAX_PASSED_OVER {
                return chosen;
            }
            self.passed_over.push(chosen);
        }
    }

    /// Records the start of an own probe, which settles the doubts so far. What a request or a sibling
    /// reports while the probe is in flight needs another one.
    pub(super) fn begin_probe(&mut self) {
        self.doubt = None;
    }

    /// Records the end of an own probe; `draw` is random, in 0..1. Returns what to do with the result.
    pub(super) fn probed(&mut self, good: bool, view: &DutyView<'_>, draw: f64) -> ProbeShare {
        let turned = self.probed.is_some_and(|(_, before)| before != good);
        let follows = self.follows(view).is_some();
        let is_prober = self.is_prober(view);
        self.probed = Some((view.now, good));
        self.draw = draw.clamp(0.0, 1.0);
        // Probes of an unsure upstream come often; a report of each one would say nothing new.
        let due = |published: Instant| {
            view.now.saturating_duration_since(published)
                >= view.interval.mul_f64(1.0 - 2.0 * MAX_JITTER_SHARE)
        };
        let regular = is_prober && self.published.is_none_or(due);
        let publish = !view.balancers.is_alone() && (regular || turned);
        if publish {
            self.published = Some(view.now);
        }
        ProbeShare { publish, metrics: !follows }
    }

    /// Records a report of a sibling's probe, which ended at `probed`.
    pub(super) fn heard(
        &mut self,
        from: u64,
        good: bool,
        probed: Instant,
        view: &DutyView<'_>,
    ) -> HeardReport {
        self.passed_over.retain(|id| *id != from);
        let probed = probed.min(view.now);
        if let Some((prober, since)) = &mut self.prober
            && *prober == from
        {
            *since = view.now;
        }
        // Reports may arrive in another order than the probes were made in.
        if self.heard.is_some_and(|(before, _)| before > probed) {
            return HeardReport::Outdated;
        }
        self.heard = Some((probed, good));
        if self.probed.is_none_or(|(own, _)| own > probed) {
            return HeardReport::Outdated;
        }
        if self.agrees(view.condition) {
            return HeardReport::Agrees;
        }
        self.doubt_with_others(view);
        HeardReport::Disagrees
    }

    /// Whether an own probe is due for another reason than its interval.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    /// Whether this balancer probes the upstream for all.
    pub(super) fn is_prober(&mut self, view: &DutyView<'_>) -> bool {
        self.prober(view) == view.balancers.own
    }

    /// Makes an own probe due at `at`, or earlier where one is due already.
    pub(super) fn doubt(&mut self, at: Instant) {
        self.doubt = Some(self.doubt.map_or(at, |before| before.min(at)));
    }

    /// As `doubt`, when all siblings doubt at the same time: spreads their probes.
    pub(super) fn doubt_with_others(&mut self, view: &DutyView<'_>) {
        let balancers = u32::try_from(view.balancers.siblings.len() + 1).unwrap_or(u32::MAX);
        let span = DOUBT_SPREAD.saturating_mul(balancers).min(view.interval / 2);
        self.doubt(view.now + span.mul_f64(self.draw));
    }

    fn spread(&self, interval: Duration) -> Duration {
        interval.mul_f64(1.0 - MAX_JITTER_SHARE + 2.0 * MAX_JITTER_SHARE * self.draw)
    }
}

#[cfg(test)]
mod tests;
