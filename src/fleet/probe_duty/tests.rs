//! The decisions of one balancer, as scripts over times in milliseconds.

use super::*;
use UpstreamCondition::{Fails, Unsure, Works};

const INTERVAL: Duration = Duration::from_secs(2);

/// The middle of all spreads, so that a pause is as long as its interval.
const MIDDLE: f64 = 0.5;

/// What happens to a duty.
#[derive(Clone, Copy, Debug)]
enum DutyStep {
    /// The siblings from now on; none while Redis is away.
    Siblings(&'static [u64]),
    Condition(UpstreamCondition),
    /// An own probe begins.
    Begin,
    /// An own probe ends; one that did not begin before has taken no time.
    Probed(bool),
    /// A sibling's report comes, on a probe of this moment.
    Heard(u64, bool),
    /// A request failed.
    Doubt,
}

use DutyStep::{Begin, Condition, Doubt, Heard, Probed, Siblings};

/// A balancer, an upstream and a clock.
struct DutyScene {
    duty: ProbeDuty,
    start: Instant,
    now: Instant,
    balancers: LiveBalancers,
    condition: UpstreamCondition,
    key: u64,
    is_probing: bool,
}

impl DutyScene {
    /// A balancer 1 and an upstream whose prober is the first of these that is there.
    fn new(order: &[u64]) -> Self {
        let is_order = |key: &u64| {
            (0..order.len()).all(|gone| {
                let balancers = LiveBalancers { own: order[gone], siblings: order[gone..].to_vec() };
                balancers.prober(*key, &[]) == order[gone]
            })
        };
        let key = (0..100_000).find(is_order).expect("some key has this order");
        let start = Instant::now();
        let balancers = LiveBalancers { own: 1, siblings: Vec::new() };
        let duty = ProbeDuty::new(start, MIDDLE);
        DutyScene { duty, start, now: start, balancers, condition: Works, key, is_probing: false }
    }

    fn step(&mut self, at: u64, step: DutyStep) -> Option<ProbeShare> {
        self.now = self.start + Duration::from_millis(at);
        let balancers = self.balancers.clone();
        let DutyScene { key, condition, now, .. } = *self;
        let view = DutyView { key, balancers: &balancers, interval: INTERVAL, condition, now };
        match step {
            Siblings(ids) => self.balancers.siblings = ids.to_vec(),
            Condition(condition) => self.condition = condition,
            Begin => {
                self.duty.begin_probe();
                self.is_probing = true;
            }
            Probed(good) => {
                if !std::mem::take(&mut self.is_probing) {
                    self.duty.begin_probe();
                }
                return Some(self.duty.probed(good, &view, MIDDLE));
            }
            Heard(from, good) => drop(self.duty.heard(from, good, self.now, &view)),
            Doubt => self.duty.doubt(self.now),
        }
        None
    }

    /// The time of the next probe, when none of the waits in between ends early.
    fn next(&mut self) -> u64 {
        loop {
            let balancers = self.balancers.clone();
            let DutyScene { key, condition, now, .. } = *self;
            let view = DutyView { key, balancers: &balancers, interval: INTERVAL, condition, now };
            let due = self.duty.due(&view);
            if due <= self.now {
                return self.now.saturating_duration_since(self.start).as_millis() as u64;
            }
            self.now = due;
        }
    }
}

type DutyScript = &'static [(u64, DutyStep)];

/// The order of the hashes, a script, and the time of the next probe after it.
const TABLE: &[(&str, &[u64], DutyScript, u64)] = &[
    ("nothing was probed", &[1], &[], 0),
    ("alone: every interval", &[1], &[(0, Probed(true))], 2000),
    ("alone and failing: often", &[1], &[(0, Condition(Fails)), (0, Probed(false))], 250),
    ("alone and unsure: often", &[1], &[(0, Condition(Unsure)), (0, Probed(true))], 250),
    ("the prober", &[1, 2], &[(0, Siblings(&[2])), (0, Probed(true))], 2000),
    (
        "the prober probes a failing upstream often",
        &[1, 2],
        &[(0, Siblings(&[2])), (0, Condition(Fails)), (0, Probed(false)), (10, Heard(2, false))],
        260,
    ),
    (
        "a follower with reports",
        &[2, 1],
        &[(0, Siblings(&[2])), (0, Probed(true)), (29_000, Heard(2, true))],
        30_000,
    ),
    (
        "a follower of a failing upstream",
        &[2, 1],
        &[(0, Siblings(&[2])), (0, Condition(Fails)), (0, Probed(false)), (29_000, Heard(2, false))],
        30_000,
    ),
    ("no report ever came", &[2, 1], &[(0, Siblings(&[2])), (0, Probed(true))], 2000),
    (
        "the reports end: two intervals and a quarter",
        &[2, 1],
        &[(0, Siblings(&[2])), (0, Probed(true)), (1000, Heard(2, true))],
        5500,
    ),
    (
        "the last sibling leaves: as if alone",
        &[2, 1],
        &[(0, Siblings(&[2])), (0, Probed(true)), (1000, Heard(2, true)), (1500, Siblings(&[]))],
        2000,
    ),
    (
        "the prober leaves and this balancer is the next",
        &[2, 1, 3],
        &[(0, Siblings(&[2, 3])), (0, Probed(true)), (1000, Heard(2, true)), (1500, Siblings(&[3]))],
        3000,
    ),
    (
        "the prober leaves and a sibling is the next",
        &[2, 3, 1],
        &[
            (0, Siblings(&[2, 3])),
            (0, Probed(true)),
            (1000, Heard(2, true)),
            (1500, Siblings(&[3])),
            (2500, Heard(3, true)),
        ],
        7000,
    ),
    (
        "redis goes away: as if alone",
        &[2, 1],
        &[(0, Siblings(&[2])), (0, Probed(true)), (9000, Heard(2, true)), (9100, Siblings(&[]))],
        9100,
    ),
    (
        "a request fails",
        &[2, 1],
        &[(0, Siblings(&[2])), (0, Probed(true)), (1000, Heard(2, true)), (1200, Doubt)],
        1200,
    ),
    (
        "a request fails while a probe is in flight that began before",
        &[2, 1],
        &[
            (0, Siblings(&[2])),
            (0, Probed(true)),
            (1000, Heard(2, true)),
            (1200, Doubt),
            (1200, Begin),
            (1201, Doubt),
            (1202, Probed(true)),
            (1210, Heard(2, true)),
        ],
        1252,
    ),
    (
        "many requests fail: not more often than the least interval",
        &[1],
        &[(0, Probed(true)), (10, Doubt), (20, Doubt)],
        50,
    ),
    (
        "an own failure against a report: this balancer's probes go on",
        &[2, 1],
        &[
            (0, Siblings(&[2])),
            (0, Probed(true)),
            (1000, Probed(false)),
            (1000, Condition(Unsure)),
            (1001, Heard(2, true)),
            (1100, Probed(false)),
        ],
        1350,
    ),
    (
        "a report of a failure: soon, and the own probe decides",
        &[2, 1],
        &[(0, Siblings(&[2])), (0, Probed(true)), (1000, Heard(2, true)), (3000, Heard(2, false))],
        3005,
    ),
    (
        "a report of a recovery",
        &[2, 1],
        &[
            (0, Siblings(&[2])),
            (0, Condition(Fails)),
            (0, Probed(false)),
            (1000, Heard(2, false)),
            (1500, Heard(2, true)),
        ],
        1505,
    ),
];

#[test]
fn decides_when_to_probe() {
    for (what, order, script, wanted) in TABLE {
        let mut scene = DutyScene::new(order);
        for (at, step) in *script {
            scene.step(*at, *step);
        }
        assert_eq!(scene.next(), *wanted, "{what}");
    }
}

/// The siblings 2 and 3 come before this balancer; 2 never reports.
#[test]
fn passes_over_a_sibling_without_reports_until_it_reports() {
    let mut scene = DutyScene::new(&[2, 3, 1]);
    scene.step(0, Siblings(&[2, 3]));
    let mut probes = Vec::new();
    // The time at which the sibling 3 begins to report, as it passes over 2 as well.
    while scene.next() < 6000 {
        let at = scene.now.saturating_duration_since(scene.start).as_millis() as u64;
        scene.step(at, Probed(true));
        probes.push(at);
    }
    assert_eq!(probes, [0, 2000, 4000]);
    for at in [6000, 8000, 10_000, 12_000] {
        scene.step(at, Heard(3, true));
    }
    assert_eq!(scene.next(), 16_500, "3 probes for all until its reports end");
    let share = scene.step(16_500, Probed(true)).expect("it is a probe");
    assert!(share.publish && share.metrics, "2 and 3 do not report");
    assert_eq!(scene.next(), 18_500);
    scene.step(19_000, Heard(2, true));
    let share = scene.step(20_000, Probed(true)).expect("it is a probe");
    assert!(!share.publish && !share.metrics, "2 reports again");
}

/// The results of probes, and the ones that siblings get.
#[test]
fn publishes_results_of_the_prober_once_an_interval_and_each_turn() {
    let script = [
        (0, true, true),
        (250, true, false),
        (2000, true, true),
        (2300, false, true),
        (2550, false, false),
        (3900, false, true),
        (4000, true, true),
    ];
    let mut scene = DutyScene::new(&[1, 2]);
    scene.step(0, Siblings(&[2]));
    for (at, good, wanted) in script {
        let share = scene.step(at, Probed(good)).expect("it is a probe");
        assert_eq!(share.publish, wanted, "at {at}");
    }
    // A follower publishes only a turn: it may see a failure first.
    let mut scene = DutyScene::new(&[2, 1]);
    scene.step(0, Siblings(&[2]));
    for (at, good, wanted) in
        [(0, true, false), (3000, true, false), (6000, false, true), (6100, false, false)]
    {
        scene.step(at, Heard(2, true));
        let share = scene.step(at, Probed(good)).expect("it is a probe");
        assert_eq!((share.publish, share.metrics), (wanted, false), "at {at}");
    }
    let mut scene = DutyScene::new(&[1]);
    let share = scene.step(0, Probed(true)).expect("it is a probe");
    assert!(!share.publish && share.metrics, "there is no sibling");
}

#[test]
fn ignores_reports_on_earlier_probes() {
    let mut scene = DutyScene::new(&[2, 1]);
    scene.step(0, Siblings(&[2]));
    scene.step(1000, Probed(true));
    let balancers = scene.balancers.clone();
    let now = scene.start + Duration::from_millis(1200);
    let view = DutyView { key: scene.key, balancers: &balancers, interval: INTERVAL, condition: Works, now };
    let probed = |millis| scene.start + Duration::from_millis(millis);
    let (early, late) = (probed(900), probed(1100));
    assert_eq!(scene.duty.heard(2, false, early, &view), HeardReport::Outdated, "the own probe is newer");
    assert_eq!(scene.duty.heard(2, false, late, &view), HeardReport::Disagrees);
    assert_eq!(scene.duty.heard(2, true, early, &view), HeardReport::Outdated);
    // A clock that is ahead does not make a report last longer.
    scene.duty.heard(2, true, now + INTERVAL * 100, &view);
    assert_eq!(scene.duty.heard, Some((now, true)));
}

#[test]
fn moves_only_the_upstreams_of_a_balancer_that_leaves() {
    let all = LiveBalancers { own: 1, siblings: (2..=10).collect() };
    let fewer = LiveBalancers { own: 1, siblings: (2..10).collect() };
    let mut counts = [0; 11];
    for key in 0..10_000 {
        let (before, after) = (all.prober(scatter(key), &[]), fewer.prober(scatter(key), &[]));
        counts[before as usize] += 1;
        assert!(before == after || before == 10);
    }
    assert!(counts[1..].iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    // All balancers choose the same one.
    let other = LiveBalancers { own: 7, siblings: vec![10, 9, 8, 1, 2, 3, 4, 5, 6] };
    assert!((0..1000).all(|key| all.prober(key, &[]) == other.prober(key, &[])));
}

#[test]
fn spreads_probes_by_a_tenth() {
    for (draw, wanted) in [(0.0, 1800), (0.25, 1900), (1.0, 2200)] {
        let mut scene = DutyScene::new(&[1]);
        scene.step(0, Probed(true));
        scene.duty.draw = draw;
        assert_eq!(scene.next(), wanted);
    }
}
