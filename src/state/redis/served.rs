//! The upstreams that siblings serve. Siblings that share none of this balancer's upstreams are another
//! fleet on the same Redis and prefix.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// The interval in which a balancer repeats which upstreams it serves.
const REPEAT_INTERVAL: Duration = Duration::from_secs(5);

/// The time after which a sibling without a common upstream is reported. Lists differ for a while when
/// upstreams are replaced.
const REPORT_DELAY: Duration = Duration::from_secs(2);

/// The upstreams of this balancer and of its siblings, as hashes of their names.
#[derive(Debug, Default)]
pub(super) struct ServedUpstreams {
    own: HashSet<u32>,
    published_at: Option<Instant>,
    siblings: HashMap<u64, HashSet<u32>>,
    /// Since when some sibling shares no upstream.
    foreign_since: Option<Instant>,
    reported: bool,
}

impl ServedUpstreams {
    /// Sets this balancer's upstreams. Returns them when they are to be published.
    pub(super) fn publish(&mut self, own: HashSet<u32>, now: Instant) -> Vec<u32> {
        let is_due = |at: Instant| now.saturating_duration_since(at) >= REPEAT_INTERVAL;
        if self.own == own && !self.published_at.is_none_or(is_due) {
            return Vec::new();
        }
        (self.own, self.published_at) = (own, Some(now));
        self.own.iter().copied().collect()
    }

    /// Makes the next call of `publish` return the upstreams.
    pub(super) fn republish(&mut self) {
        self.published_at = None;
    }

    /// Sets a sibling's upstreams.
    pub(super) fn receive(&mut self, balancer: u64, served: &[u32]) {
        if !served.is_empty() {
            self.siblings.insert(balancer, served.iter().copied().collect());
        }
    }

    /// Whether a sibling serves an upstream with this hash.
    pub(super) fn is_served(&self, hash: u32) -> bool {
        self.siblings.values().any(|served| served.contains(&hash))
    }

    /// Whether a sibling shares an upstream with this balancer; `None` while that is unknown.
    pub(super) fn shares(&self, balancer: u64) -> Option<bool> {
        let served = self.siblings.get(&balancer).filter(|_| !self.own.is_empty())?;
        Some(!served.is_disjoint(&self.own))
    }

    /// Removes siblings that are gone. Returns a sibling to report, once until all share upstreams again.
    pub(super) fn check(&mut self, is_sibling: impl Fn(u64) -> bool, now: Instant) -> Option<u64> {
        self.siblings.retain(|balancer, _| is_sibling(*balancer));
        let foreign = self.siblings.keys().copied().find(|balancer| self.shares(*balancer) == Some(false));
        let Some(foreign) = foreign else {
            (self.foreign_since, self.reported) = (None, false);
            return None;
        };
        let since = *self.foreign_since.get_or_insert(now);
        let is_due = !self.reported && now.saturating_duration_since(since) >= REPORT_DELAY;
        self.reported |= is_due;
        is_due.then_some(foreign)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_a_sibling_without_a_common_upstream_once() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut served = ServedUpstreams::default();
        served.receive(7, &[1, 2]);
        assert_eq!(served.shares(7), None, "no own upstream is known yet");
        assert_eq!(served.publish([3].into(), at(0)), [3]);
        assert_eq!((served.shares(7), served.is_served(2), served.is_served(3)), (Some(false), true, false));
        let reports: Vec<_> = (0..6).map(|seconds| served.check(|_| true, at(seconds))).collect();
        assert_eq!(reports, [None, None, Some(7), None, None, None]);
        served.receive(7, &[2, 3]);
        assert_eq!((served.shares(7), served.check(|_| true, at(7))), (Some(true), None));
        served.receive(7, &[2]);
        assert_eq!((served.check(|_| true, at(8)), served.check(|_| true, at(10))), (None, Some(7)));
        assert_eq!(served.check(|_| false, at(11)), None);
        assert!(!served.is_served(2));
    }

    #[test]
    fn publishes_changes_at_once_and_repeats_the_list() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut served = ServedUpstreams::default();
        let counts = [(1, 0), (1, 1), (2, 2), (2, 4), (2, 7), (2, 8)];
        let sent = counts.map(|(count, seconds)| served.publish((0..count).collect(), at(seconds)).len());
        assert_eq!(sent, [1, 0, 2, 0, 2, 0]);
        served.republish();
        assert_eq!(served.publish((0..2).collect(), at(8)).len(), 2);
    }
}
