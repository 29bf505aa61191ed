//! Tests of the table of siblings: sums, expiry, and totals by difference.

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
    siblings.total(name).active
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
    assert_eq!((rows[0].name.as_str(), rows[0].address.as_str(), rows[0].age.as_secs()), ("lb-3", "h:1", 1));
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

#[test]
fn reports_only_changed_totals() {
    let now = Instant::now();
    let mut siblings = SiblingTable::new(1, TTL);
    let changes = |siblings: &mut SiblingTable| {
        let mut changes: Vec<(String, u64)> =
            siblings.take_changes().into_iter().map(|(name, load)| (name.to_string(), load.active)).collect();
        changes.sort();
        changes
    };
    let wanted = |all: &[(&str, u64)]| -> Vec<(String, u64)> {
        all.iter().map(|(name, active)| (name.to_string(), *active)).collect()
    };
    siblings.receive(&report(2, 1, true, &[("a", 3), ("b", 1), ("c", 0)]), now, now);
    siblings.receive(&report(3, 1, true, &[("a", 4)]), now, now);
    assert_eq!(changes(&mut siblings), wanted(&[("a", 7), ("b", 1)]));
    siblings.receive(&report(2, 2, true, &[("a", 3), ("b", 1)]), now, now);
    assert_eq!(changes(&mut siblings), wanted(&[]), "the same report again");
    siblings.receive(&report(2, 3, true, &[("a", 3)]), now, now);
    assert_eq!(changes(&mut siblings), wanted(&[("b", 0)]));
    siblings.receive(&Message { leaving: true, ..Message::new(3, 2) }, now, now);
    assert_eq!(changes(&mut siblings), wanted(&[("a", 3)]));
    siblings.expire(now + TTL);
    assert_eq!(changes(&mut siblings), wanted(&[("a", 0)]));
    assert_eq!(siblings.totals.find("c"), None, "an upstream without load has no number");
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// The siblings as plain tables, whose sums are made anew each time.
#[derive(Default)]
struct PlainTable(HashMap<u64, (HashMap<String, SiblingLoad>, Instant)>);

impl PlainTable {
    fn total(&self, name: &str) -> SiblingLoad {
        let loads = self.0.values().filter_map(|(loads, _)| loads.get(name));
        loads.fold(SiblingLoad::default(), |sum, load| SiblingLoad {
            active: sum.active.saturating_add(load.active),
            backlog: sum.backlog.saturating_add(load.backlog),
            context: sum.context.saturating_add(load.context),
        })
    }

    fn age(&self, now: Instant) -> Duration {
        let busy = self.0.values().filter(|(loads, _)| loads.values().any(|load| !load.is_idle()));
        busy.map(|(_, at)| now - *at).max().unwrap_or_default()
    }
}

/// A report of a sibling, its end, or a time in which siblings expire.
#[derive(Clone, Debug)]
enum SiblingEvent {
    Report { balancer: u64, whole: bool, rows: Vec<(usize, SiblingLoad)> },
    Leave(u64),
    Wait(Duration),
}

fn steps() -> impl Strategy<Value = Vec<SiblingEvent>> {
    let number = || prop_oneof![Just(0), 0u64..5, Just(u64::MAX), Just(u64::MAX - 1), any::<u64>()];
    let load = (number(), number(), number()).prop_map(|(active, backlog, context)| SiblingLoad {
        active,
        backlog,
        context,
    });
    let load = prop_oneof![1 => Just(SiblingLoad::default()), 3 => load];
    let report = (2u64..5, any::<bool>(), prop::collection::vec((0..NAMES.len(), load), 0..6));
    let step = prop_oneof![
        8 => report.prop_map(|(balancer, whole, rows)| SiblingEvent::Report { balancer, whole, rows }),
        1 => (2u64..5).prop_map(SiblingEvent::Leave),
        1 => (0u64..2000).prop_map(|millis| SiblingEvent::Wait(Duration::from_millis(millis))),
    ];
    prop::collection::vec(step, 0..40)
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

    /// Totals by difference are the sums over all siblings.
    #[test]
    fn totals_by_difference_are_the_plain_sums(steps in steps()) {
        let mut now = Instant::now();
        let (mut siblings, mut plain) = (SiblingTable::new(1, TTL), PlainTable::default());
        let mut told: HashMap<Arc<str>, SiblingLoad> = HashMap::new();
        for (sequence, step) in (1..).zip(steps) {
            match step {
                SiblingEvent::Report { balancer, whole, rows } => {
                    let rows: Vec<_> = rows.iter().map(|(name, load)| (NAMES[*name], *load)).collect();
                    let entry = plain.0.entry(balancer).or_insert((HashMap::new(), now));
                    entry.1 = now;
                    if whole {
                        entry.0.clear();
                    }
                    entry.0.extend(rows.iter().map(|(name, load)| (name.to_string(), *load)));
                    let gauges = Some(GaugeUpdate { whole, rows });
                    siblings.receive(&Message { gauges, ..Message::new(balancer, sequence) }, now, now);
                }
                SiblingEvent::Leave(balancer) => {
                    plain.0.remove(&balancer);
                    let leaving = Message { leaving: true, ..Message::new(balancer, sequence) };
                    siblings.receive(&leaving, now, now);
                }
                SiblingEvent::Wait(time) => {
                    now += time;
                    plain.0.retain(|_, (_, at)| now - *at < TTL);
                    siblings.expire(now);
                }
            }
            told.extend(siblings.take_changes());
            for name in NAMES {
                let total = plain.total(name);
                prop_assert_eq!(siblings.total(name), total);
                prop_assert_eq!(told.get(name).copied().unwrap_or_default(), total);
            }
            prop_assert_eq!(siblings.age(now), plain.age(now));
            for row in siblings.rows(now) {
                let loads = plain.0[&row.balancer].0.values();
                let active = loads.fold(0u64, |sum, load| sum.saturating_add(load.active));
                prop_assert_eq!(row.sum.active, active);
            }
        }
    }
}
