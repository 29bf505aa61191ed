//! The siblings, and the requests that each of them has in flight on each upstream.
//!
//! A sibling exists by its messages: it is removed when none came for `ttl`, or when it announced its end,
//! so a crash leaves no trace. Repeated and reordered messages are recognised by their number.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{GaugeUpdate, Message, SiblingLoad};

/// The most siblings that are listened to: a stream that others write to as well must not take the memory.
const MAX_SIBLINGS: usize = 1024;

pub struct SiblingTable {
    own: u64,
    /// How long a message counts.
    ttl: Duration,
    all: HashMap<u64, Sibling>,
}

struct Sibling {
    name: String,
    address: String,
    sequence: u64,
    heard: Instant,
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
    /// In flight through it.
    pub sum: SiblingLoad,
}

// === impl Siblings ===

impl SiblingTable {
    /// As the balancer `own` sees them.
    pub fn new(own: u64, ttl: Duration) -> Self {
        SiblingTable { own, ttl, all: HashMap::new() }
    }

    /// Applies the sender and the gauges of a message; `heard` is the estimated time at which it was
    /// published. Returns `false` for a message without news: an own one, or an old one.
    pub fn receive(&mut self, message: &Message<'_>, heard: Instant, now: Instant) -> bool {
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
        let stale = now.saturating_duration_since(heard) >= self.ttl;
        if stale || known.is_none() && self.all.len() >= MAX_SIBLINGS {
            return true;
        }
        let sibling = self.all.entry(message.balancer).or_insert_with(|| Sibling::new(heard));
        (sibling.sequence, sibling.heard) = (message.sequence, heard);
        if let Some(who) = message.who {
            (sibling.name, sibling.address) = (who.name.into(), who.address.into());
        }
        if let Some(told) = &message.gauges {
            sibling.lay(told);
        }
        true
    }

    /// Removes siblings without a recent message.
    pub fn expire(&mut self, now: Instant) {
        let ttl = self.ttl;
        self.all.retain(|_, sibling| now.saturating_duration_since(sibling.heard) < ttl);
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn contains(&self, balancer: u64) -> bool {
        self.all.contains_key(&balancer)
    }

    /// What is in flight through all of them, by upstream.
    pub fn sums(&self) -> HashMap<&str, SiblingLoad> {
        let mut sums: HashMap<&str, SiblingLoad> = HashMap::new();
        for (name, gauges) in self.all.values().flat_map(|sibling| &sibling.gauges) {
            sums.entry(name).or_default().add(gauges);
        }
        sums
    }

    /// The age of the oldest report that the sums rest on. Siblings without requests in flight report rarely
    /// and are left out.
    pub fn age(&self, now: Instant) -> Duration {
        let busy = self.all.values().filter(|sibling| !sibling.gauges.is_empty());
        busy.map(|sibling| now.saturating_duration_since(sibling.heard)).max().unwrap_or_default()
    }

    /// All of them, by name.
    pub fn rows(&self, now: Instant) -> Vec<SiblingRow> {
        let mut rows: Vec<SiblingRow> = self.all.iter().map(|(id, sibling)| sibling.row(*id, now)).collect();
        rows.sort_by(|one, other| (&one.name, one.balancer).cmp(&(&other.name, other.balancer)));
        rows
    }
}

impl Sibling {
    fn new(heard: Instant) -> Self {
        let (name, address) = (String::new(), String::new());
        Sibling { name, address, sequence: 0, heard, gauges: HashMap::new() }
    }

    fn lay(&mut self, told: &GaugeUpdate<'_>) {
        if told.whole {
            self.gauges.clear();
        }
        for (name, gauges) in &told.rows {
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
            age: now.saturating_duration_since(self.heard),
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

    fn says<'a>(balancer: u64, sequence: u64, whole: bool, rows: &[(&'a str, u64)]) -> Message<'a> {
        let rows = rows.iter().map(|(name, active)| (*name, gauges(*active))).collect();
        Message { gauges: Some(GaugeUpdate { whole, rows }), ..Message::new(balancer, sequence) }
    }

    fn active(siblings: &SiblingTable, name: &str) -> u64 {
        siblings.sums().get(name).copied().unwrap_or_default().active
    }

    #[test]
    fn words_are_absolute_and_add_up_over_siblings() {
        let now = Instant::now();
        let mut siblings = SiblingTable::new(1, TTL);
        assert!(siblings.receive(&says(2, 1, true, &[("a", 3), ("b", 1)]), now, now));
        assert!(siblings.receive(&says(3, 9, true, &[("a", 4)]), now, now));
        assert_eq!((active(&siblings, "a"), active(&siblings, "b"), active(&siblings, "c")), (7, 1, 0));
        assert!(!siblings.receive(&says(1, 5, true, &[("a", 100)]), now, now), "its own echo");
        assert!(!siblings.receive(&says(3, 9, true, &[("a", 100)]), now, now), "heard before");
        siblings.receive(&says(2, 2, false, &[("b", 5), ("c", 1), ("a", 0)]), now, now);
        assert_eq!((active(&siblings, "a"), active(&siblings, "b"), active(&siblings, "c")), (4, 5, 1));
        siblings.receive(&says(2, 3, true, &[("c", 2)]), now, now);
        assert_eq!((active(&siblings, "b"), active(&siblings, "c")), (0, 2));
        assert_eq!(siblings.rows(now).len(), 2);
        siblings.receive(&Message { leaving: true, ..Message::new(2, 4) }, now, now);
        assert_eq!((active(&siblings, "c"), siblings.len(), siblings.contains(2)), (0, 1, false));
    }

    #[test]
    fn who_is_not_heard_is_gone_and_old_words_raise_nobody() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut siblings = SiblingTable::new(1, TTL);
        siblings.receive(&says(2, 1, true, &[("a", 3)]), at(0.0), at(0.0));
        let who = Some(BalancerInfo { name: "lb-3", address: "h:1" });
        siblings.receive(&Message { who, ..Message::new(3, 1) }, at(0.0), at(0.0));
        assert_eq!(siblings.age(at(1.0)), Duration::from_secs(1), "who is idle does not count");
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
        // From the tail of a stream: what is there to learn is worth hearing, the gauges are not.
        assert!(siblings.receive(&says(4, 1, true, &[("a", 9)]), at(0.0), at(3.0)));
        assert_eq!((active(&siblings, "a"), siblings.len()), (0, 1));
    }

    #[test]
    fn there_is_an_end_to_siblings() {
        let now = Instant::now();
        let mut siblings = SiblingTable::new(0, TTL);
        for balancer in 1..3000 {
            siblings.receive(&Message::new(balancer, 1), now, now);
        }
        assert_eq!(siblings.len(), MAX_SIBLINGS);
    }

    proptest! {
        /// Whatever was missed on the way, the last whole word is what counts.
        #[test]
        fn a_whole_word_is_right_whatever_came_before(
            words in prop::collection::vec((0usize..3, 0u64..4, any::<bool>(), any::<bool>()), 0..30),
            last in prop::collection::vec(0u64..4, 3),
        ) {
            const NAMES: [&str; 3] = ["a", "b", "c"];
            let now = Instant::now();
            let mut siblings = SiblingTable::new(1, TTL);
            for (sequence, (name, number, whole, missed)) in (1..).zip(words) {
                if !missed {
                    siblings.receive(&says(2, sequence, whole, &[(NAMES[name], number)]), now, now);
                }
            }
            let rows: Vec<(&str, u64)> = NAMES.into_iter().zip(last.iter().copied()).collect();
            siblings.receive(&says(2, 100, true, &rows), now, now);
            for (name, number) in rows {
                prop_assert_eq!(active(&siblings, name), number);
            }
        }
    }
}
