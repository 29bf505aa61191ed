//! The siblings, and the requests that each of them has in flight on each upstream.
//!
//! A sibling is known by its messages: it expires when no message came for `ttl`, as after a crash, and is
//! removed when it announces its shutdown. Repeated and reordered messages are recognised by their sequence.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{GaugeUpdate, Message, SiblingLoad};

/// The largest number of siblings: a stream with foreign writers must not exhaust the memory.
const MAX_SIBLINGS: usize = 1024;

/// The siblings and their gauges.
pub struct SiblingTable {
    /// The id of this balancer.
    own: u64,
    /// The time for which a message is valid.
    ttl: Duration,
    all: HashMap<u64, Sibling>,
}

struct Sibling {
    name: String,
    address: String,
    sequence: u64,
    /// When the last message was published.
    published_at: Instant,
    gauges: HashMap<String, SiblingLoad>,
}

/// One sibling, for display.
#[derive(Clone, Debug, PartialEq)]
pub struct SiblingRow {
    pub balancer: u64,
    pub name: String,
    pub address: String,
    /// The age of its last message.
    pub age: Duration,
    /// The sibling's requests in flight on all upstreams.
    pub sum: SiblingLoad,
}

// === impl SiblingTable ===

impl SiblingTable {
    /// Builds the table of the balancer `own`.
    pub fn new(own: u64, ttl: Duration) -> Self {
        SiblingTable { own, ttl, all: HashMap::new() }
    }

    /// Applies the sender and the gauges of a message; `published_at` is the estimated time of its
    /// publication. Returns `false` for a message to ignore: an own one, or an old one.
    pub fn receive(&mut self, message: &Message<'_>, published_at: Instant, now: Instant) -> bool {
        if message.balancer == self.own {
            return false;
        }
        let known = self.all.get(&message.balancer);
        if known.is_some_and(|sibling| sibling.sequence >= message.sequence) {
            return false;
        }
        if message.leaving {
            self.all.remove(&message.balancer);
            return true;
        }
        let stale = now.saturating_duration_since(published_at) >= self.ttl;
        if stale || known.is_none() && self.all.len() >= MAX_SIBLINGS {
            return true;
        }
        let sibling = self.all.entry(message.balancer).or_insert_with(|| Sibling::new(published_at));
        (sibling.sequence, sibling.published_at) = (message.sequence, published_at);
        if let Some(who) = message.who {
            (sibling.name, sibling.address) = (who.name.into(), who.address.into());
        }
        if let Some(update) = &message.gauges {
            sibling.apply(update);
        }
        true
    }

    /// Removes siblings without a recent message.
    pub fn expire(&mut self, now: Instant) {
        let ttl = self.ttl;
        self.all.retain(|_, sibling| now.saturating_duration_since(sibling.published_at) < ttl);
    }

    /// Returns the number of siblings.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are no siblings.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether the balancer is a known sibling.
    pub fn contains(&self, balancer: u64) -> bool {
        self.all.contains_key(&balancer)
    }

    /// Returns the name of a sibling for display; one that has not published its name yet has its id.
    pub fn name(&self, balancer: u64) -> String {
        let known = self.all.get(&balancer).map(|sibling| sibling.name.as_str());
        known.filter(|name| !name.is_empty()).map_or_else(|| format!("{balancer:016x}"), str::to_string)
    }

    /// Returns the sums of all siblings' requests in flight, by upstream.
    pub fn sums(&self) -> HashMap<&str, SiblingLoad> {
        let mut sums: HashMap<&str, SiblingLoad> = HashMap::new();
        for (name, gauges) in self.all.values().flat_map(|sibling| &sibling.gauges) {
            sums.entry(name).or_default().add(gauges);
        }
        sums
    }

    /// Returns the age of the oldest report in the sums. Excludes siblings without requests in flight, which
    /// report rarely.
    pub fn age(&self, now: Instant) -> Duration {
        let busy = self.all.values().filter(|sibling| !sibling.gauges.is_empty());
        busy.map(|sibling| now.saturating_duration_since(sibling.published_at)).max().unwrap_or_default()
    }

    /// Returns all siblings, sorted by name.
    pub fn rows(&self, now: Instant) -> Vec<SiblingRow> {
        let mut rows: Vec<SiblingRow> = self.all.iter().map(|(id, sibling)| sibling.row(*id, now)).collect();
        rows.sort_by(|one, other| (&one.name, one.balancer).cmp(&(&other.name, other.balancer)));
        rows
    }
}

impl Sibling {
    fn new(published_at: Instant) -> Self {
        let (name, address) = (String::new(), String::new());
        Sibling { name, address, sequence: 0, published_at, gauges: HashMap::new() }
    }

    fn apply(&mut self, update: &GaugeUpdate<'_>) {
        if update.whole {
            self.gauges.clear();
        }
        for (name, gauges) in &update.rows {
            if *gauges == SiblingLoad::default() {
                self.gauges.remove(*name);
            } else if let Some(known) = self.gauges.get_mut(*name) {
                *known = *gauges;
            } else {
                self.gauges.insert((*name).into(), *gauges);
            }
        }
    }

    fn row(&self, balancer: u64, now: Instant) -> SiblingRow {
        let mut sum = SiblingLoad::default();
        self.gauges.values().for_each(|gauges| sum.add(gauges));
        SiblingRow {
            balancer,
            name: self.name.clone(),
            address: self.address.clone(),
            age: now.saturating_duration_since(self.published_at),
            sum,
        }
    }
}

impl SiblingLoad {
    fn add(&mut self, other: &SiblingLoad) {
        self.active = self.active.saturating_add(other.active);
        self.backlog = self.backlog.saturating_add(other.backlog);
        self.context = self.context.saturating_add(other.context);
    }
}

#[cfg(test)]
mod tests {
    use super::super::BalancerInfo;
    use super::*;
    use proptest::prelude::*;

    const TTL: Duration = Duration::from_secs(3);

    fn gauges(active: u64) -> SiblingLoad {
        SiblingLoad { active, backlog: 10 * active, context: 100 * active }
    }

    fn report<'a>(balancer: u64, sequence: u64, whole: bool, rows: &[(&'a str, u64)]) -> Message<'a> {
        let rows = rows.iter().map(|(name, active)| (*name, gauges(*active))).collect();
        Message { gauges: Some(GaugeUpdate { whole, rows }), ..Message::new(balancer, sequence) }
    }

    fn active(siblings: &SiblingTable, name: &str) -> u64 {
        siblings.sums().get(name).copied().unwrap_or_default().active
    }

    #[test]
    fn sums_the_absolute_gauges_of_all_siblings() {
        let now = Instant::now();
        let mut siblings = SiblingTable::new(1, TTL);
        assert!(siblings.receive(&report(2, 1, true, &[("a", 3), ("b", 1)]), now, now));
        assert!(siblings.receive(&report(3, 9, true, &[("a", 4)]), now, now));
        assert_eq!((active(&siblings, "a"), active(&siblings, "b"), active(&siblings, "c")), (7, 1, 0));
        assert!(!siblings.receive(&report(1, 5, true, &[("a", 100)]), now, now), "an own message");
        assert!(!siblings.receive(&report(3, 9, true, &[("a", 100)]), now, now), "an old message");
        siblings.receive(&report(2, 2, false, &[("b", 5), ("c", 1), ("a", 0)]), now, now);
        assert_eq!((active(&siblings, "a"), active(&siblings, "b"), active(&siblings, "c")), (4, 5, 1));
        siblings.receive(&report(2, 3, true, &[("c", 2)]), now, now);
        assert_eq!((active(&siblings, "b"), active(&siblings, "c")), (0, 2));
        assert_eq!(siblings.rows(now).len(), 2);
        siblings.receive(&Message { leaving: true, ..Message::new(2, 4) }, now, now);
        assert_eq!((active(&siblings, "c"), siblings.len(), siblings.contains(2)), (0, 1, false));
    }

    #[test]
    fn expires_silent_siblings_and_ignores_old_messages() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut siblings = SiblingTable::new(1, TTL);
        siblings.receive(&report(2, 1, true, &[("a", 3)]), at(0.0), at(0.0));
        let who = Some(BalancerInfo { name: "lb-3", address: "h:1" });
        siblings.receive(&Message { who, ..Message::new(3, 1) }, at(0.0), at(0.0));
        assert_eq!(siblings.age(at(1.0)), Duration::from_secs(1), "an idle sibling does not count");
        siblings.receive(&Message::new(3, 2), at(2.0), at(2.0));
        siblings.expire(at(2.9));
        assert_eq!(siblings.len(), 2);
        siblings.expire(at(3.0));
        assert_eq!((active(&siblings, "a"), siblings.age(at(3.0))), (0, Duration::ZERO));
        let rows = siblings.rows(at(3.0));
        assert_eq!(
            (rows[0].name.as_str(), rows[0].address.as_str(), rows[0].age.as_secs()),
            ("lb-3", "h:1", 1)
        );
        // A message from the tail of the stream: its chains are applied, its gauges are not.
        assert!(siblings.receive(&report(4, 1, true, &[("a", 9)]), at(0.0), at(3.0)));
        assert_eq!((active(&siblings, "a"), siblings.len()), (0, 1));
    }

    #[test]
    fn limits_the_number_of_siblings() {
        let now = Instant::now();
        let mut siblings = SiblingTable::new(0, TTL);
        for balancer in 1..3000 {
            siblings.receive(&Message::new(balancer, 1), now, now);
        }
        assert_eq!(siblings.len(), MAX_SIBLINGS);
    }

    proptest! {
        /// A complete report overrides every earlier one, also when messages were missed.
        #[test]
        fn a_complete_report_overrides_all_earlier_ones(
            reports in prop::collection::vec((0usize..3, 0u64..4, any::<bool>(), any::<bool>()), 0..30),
            last in prop::collection::vec(0u64..4, 3),
        ) {
            const NAMES: [&str; 3] = ["a", "b", "c"];
            let now = Instant::now();
            let mut siblings = SiblingTable::new(1, TTL);
            for (sequence, (name, number, whole, missed)) in (1..).zip(reports) {
                if !missed {
                    siblings.receive(&report(2, sequence, whole, &[(NAMES[name], number)]), now, now);
                }
            }
            let rows: Vec<(&str, u64)> = NAMES.into_iter().zip(last.iter().copied()).collect();
            siblings.receive(&report(2, 100, true, &rows), now, now);
            for (name, number) in rows {
                prop_assert_eq!(active(&siblings, name), number);
            }
        }
    }
}
