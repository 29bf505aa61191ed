//! Who else is there, and what each of them has in flight on each upstream.
//!
//! A sibling is known by its messages, and is gone when none came for so long, or when it said so: whoever
//! crashes leaves nothing behind. Messages that come twice, or in the wrong order, are told by their number.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{Gauges, Message, Told};

/// The most siblings that are listened to: a stream that others write to as well must not take the memory.
const MOST: usize = 1024;

pub struct Siblings {
    own: u64,
    /// How long a word counts.
    ttl: Duration,
    all: HashMap<u64, Sibling>,
}

struct Sibling {
    name: String,
    address: String,
    sequence: u64,
    heard: Instant,
    gauges: HashMap<String, Gauges>,
}

/// One sibling, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub balancer: u64,
    pub name: String,
    pub address: String,
    /// How old its last word is.
    pub age: Duration,
    /// In flight through it.
    pub sum: Gauges,
}

// === impl Siblings ===

impl Siblings {
    /// As the balancer `own` sees them.
    pub fn new(own: u64, ttl: Duration) -> Self {
        Siblings { own, ttl, all: HashMap::new() }
    }

    /// Takes in who says the message, and its gauges; `heard` is when it was said, as far as one can tell.
    /// `false` for what there is nothing to learn from: one's own words, and words heard before.
    pub fn hear(&mut self, message: &Message<'_>, heard: Instant, now: Instant) -> bool {
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
        if stale || known.is_none() && self.all.len() >= MOST {
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

    /// Forgets who has not been heard for too long.
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

    pub fn knows(&self, balancer: u64) -> bool {
        self.all.contains_key(&balancer)
    }

    /// What is in flight through all of them, by upstream.
    pub fn sums(&self) -> HashMap<&str, Gauges> {
        let mut sums: HashMap<&str, Gauges> = HashMap::new();
        for (name, gauges) in self.all.values().flat_map(|sibling| &sibling.gauges) {
            sums.entry(name).or_default().add(gauges);
        }
        sums
    }

    /// How old the oldest word is that the sums rest on. Who has nothing in flight says nothing for long, and
    /// misleads nobody.
    pub fn age(&self, now: Instant) -> Duration {
        let busy = self.all.values().filter(|sibling| !sibling.gauges.is_empty());
        busy.map(|sibling| now.saturating_duration_since(sibling.heard)).max().unwrap_or_default()
    }

    /// All of them, by name.
    pub fn rows(&self, now: Instant) -> Vec<Row> {
        let mut rows: Vec<Row> = self.all.iter().map(|(id, sibling)| sibling.row(*id, now)).collect();
        rows.sort_by(|one, other| (&one.name, one.balancer).cmp(&(&other.name, other.balancer)));
        rows
    }
}

impl Sibling {
    fn new(heard: Instant) -> Self {
        let (name, address) = (String::new(), String::new());
        Sibling { name, address, sequence: 0, heard, gauges: HashMap::new() }
    }

    fn lay(&mut self, told: &Told<'_>) {
        if told.whole {
            self.gauges.clear();
        }
        for (name, gauges) in &told.rows {
            if *gauges == Gauges::default() {
                self.gauges.remove(*name);
            } else if let Some(known) = self.gauges.get_mut(*name) {
                *known = *gauges;
            } else {
                self.gauges.insert((*name).into(), *gauges);
            }
        }
    }

    fn row(&self, balancer: u64, now: Instant) -> Row {
        let mut sum = Gauges::default();
        self.gauges.values().for_each(|gauges| sum.add(gauges));
        Row {
            balancer,
            name: self.name.clone(),
            address: self.address.clone(),
            age: now.saturating_duration_since(self.heard),
            sum,
        }
    }
}

impl Gauges {
    fn add(&mut self, other: &Gauges) {
        self.active = self.active.saturating_add(other.active);
        self.backlog = self.backlog.saturating_add(other.backlog);
        self.context = self.context.saturating_add(other.context);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Who;
    use super::*;
    use proptest::prelude::*;

    const TTL: Duration = Duration::from_secs(3);

    fn gauges(active: u64) -> Gauges {
        Gauges { active, backlog: 10 * active, context: 100 * active }
    }

    fn says<'a>(balancer: u64, sequence: u64, whole: bool, rows: &[(&'a str, u64)]) -> Message<'a> {
        let rows = rows.iter().map(|(name, active)| (*name, gauges(*active))).collect();
        Message { gauges: Some(Told { whole, rows }), ..Message::new(balancer, sequence) }
    }

    fn active(siblings: &Siblings, name: &str) -> u64 {
        siblings.sums().get(name).copied().unwrap_or_default().active
    }

    #[test]
    fn words_are_absolute_and_add_up_over_siblings() {
        let now = Instant::now();
        let mut siblings = Siblings::new(1, TTL);
        assert!(siblings.hear(&says(2, 1, true, &[("a", 3), ("b", 1)]), now, now));
        assert!(siblings.hear(&says(3, 9, true, &[("a", 4)]), now, now));
        assert_eq!((active(&siblings, "a"), active(&siblings, "b"), active(&siblings, "c")), (7, 1, 0));
        assert!(!siblings.hear(&says(1, 5, true, &[("a", 100)]), now, now), "its own echo");
        assert!(!siblings.hear(&says(3, 9, true, &[("a", 100)]), now, now), "heard before");
        siblings.hear(&says(2, 2, false, &[("b", 5), ("c", 1), ("a", 0)]), now, now);
        assert_eq!((active(&siblings, "a"), active(&siblings, "b"), active(&siblings, "c")), (4, 5, 1));
        siblings.hear(&says(2, 3, true, &[("c", 2)]), now, now);
        assert_eq!((active(&siblings, "b"), active(&siblings, "c")), (0, 2));
        assert_eq!(siblings.rows(now).len(), 2);
        siblings.hear(&Message { leaving: true, ..Message::new(2, 4) }, now, now);
        assert_eq!((active(&siblings, "c"), siblings.len(), siblings.knows(2)), (0, 1, false));
    }

    #[test]
    fn who_is_not_heard_is_gone_and_old_words_raise_nobody() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut siblings = Siblings::new(1, TTL);
        siblings.hear(&says(2, 1, true, &[("a", 3)]), at(0.0), at(0.0));
        let who = Some(Who { name: "lb-3", address: "h:1" });
        siblings.hear(&Message { who, ..Message::new(3, 1) }, at(0.0), at(0.0));
        assert_eq!(siblings.age(at(1.0)), Duration::from_secs(1), "who is idle does not count");
        siblings.hear(&Message::new(3, 2), at(2.0), at(2.0));
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
        assert!(siblings.hear(&says(4, 1, true, &[("a", 9)]), at(0.0), at(3.0)));
        assert_eq!((active(&siblings, "a"), siblings.len()), (0, 1));
    }

    #[test]
    fn there_is_an_end_to_siblings() {
        let now = Instant::now();
        let mut siblings = Siblings::new(0, TTL);
        for balancer in 1..3000 {
            siblings.hear(&Message::new(balancer, 1), now, now);
        }
        assert_eq!(siblings.len(), MOST);
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
            let mut siblings = Siblings::new(1, TTL);
            for (sequence, (name, number, whole, missed)) in (1..).zip(words) {
                if !missed {
                    siblings.hear(&says(2, sequence, whole, &[(NAMES[name], number)]), now, now);
                }
            }
            let rows: Vec<(&str, u64)> = NAMES.into_iter().zip(last.iter().copied()).collect();
            siblings.hear(&says(2, 100, true, &rows), now, now);
            for (name, number) in rows {
                prop_assert_eq!(active(&siblings, name), number);
            }
        }
    }
}
