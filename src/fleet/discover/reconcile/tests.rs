//! The ownership of engines, by scripts and random schedules, over a fleet that applies every change.

mod refusals;

use proptest::prelude::*;

use super::*;
use crate::config::types::DiscoveryOrigin;
use crate::config::url;

/// An upstream of the simulated fleet.
#[derive(Clone, Debug)]
struct FleetUpstream {
    config: UpstreamConfig,
    removing: bool,
    ready: bool,
}

/// A simulated fleet with an operator, and the reconciler's state.
struct ReconcileScene {
    fleet: Vec<FleetUpstream>,
    ownerships: Ownerships,
    unanswered: bool,
    resend: bool,
    leave_at_once: bool,
    now: Instant,
}

fn named(written: &str) -> UpstreamConfig {
    UpstreamConfig::new(url::upstream(written).expect("is a URL"))
}

fn engine(number: u8) -> UpstreamConfig {
    let discovered = Some(DiscoveryOrigin { source: "gym http://g:1".into(), model: None });
    UpstreamConfig { discovered, ..named(&format!("http://e:{number}")) }
}

fn engines(numbers: &[u8]) -> Vec<UpstreamConfig> {
    numbers.iter().map(|number| engine(*number)).collect()
}

impl ReconcileScene {
    fn new() -> Self {
        let (fleet, ownerships) = (Vec::new(), Ownerships::default());
        let (unanswered, resend, leave_at_once) = (false, false, false);
        ReconcileScene { fleet, ownerships, unanswered, resend, leave_at_once, now: Instant::now() }
    }

    fn at(&mut self, name: &str) -> Option<usize> {
        self.fleet.iter().position(|there| there.config.name == name)
    }

    /// Applies an upsert as the keeper does.
    fn upsert(&mut self, config: UpstreamConfig) {
        let removing = false;
        match self.at(&config.name) {
            Some(at) => {
                let there = &self.fleet[at];
                let operators = there.config.discovered.is_none() && !there.removing;
                if !operators || config.discovered.is_none() {
                    let ready = there.ready && there.config.url == config.url;
                    self.fleet[at] = FleetUpstream { config, removing, ready };
                }
            }
            None => self.fleet.push(FleetUpstream { config, removing, ready: false }),
        }
    }

    fn remove(&mut self, name: &str) {
        if let Some(at) = self.at(name) {
            self.fleet[at].removing = true;
        }
    }

    /// Hands an upstream to discovery, as a reload does that removes it from the file.
    fn hand_to_discovery(&mut self, name: &str) {
        if let Some(at) = self.at(name) {
            self.fleet[at].config.discovered = Some(DiscoveryOrigin { source: "none".into(), model: None });
        }
    }

    /// Ends the last requests of the upstreams that are being removed.
    fn end_requests(&mut self) {
        self.fleet.retain(|there| !there.removing);
    }

    fn make_all_ready(&mut self) {
        self.fleet.iter_mut().for_each(|there| there.ready = true);
    }

    /// Reconciles and applies the changes; returns them as `+name` and `-name`.
    fn reconcile(&mut self, listed: &[UpstreamConfig]) -> Vec<String> {
        let fleet = self.fleet.clone();
        let present: Vec<PresentUpstream<'_>> = fleet
            .iter()
            .map(|FleetUpstream { config, removing, ready }| PresentUpstream {
                config,
                removing: *removing,
                ready: *ready,
                leaves_at_once: self.leave_at_once,
                has_answer: config.discovered.as_ref().is_some_and(|found| found.source != "none"),
            })
            .collect();
        let resend = std::mem::take(&mut self.resend);
        let changes = self.ownerships.reconcile(&FleetView {
            listed,
            present: &present,
            unanswered: self.unanswered,
            resend,
            now: self.now,
        });
        let mut log = Vec::new();
        for change in changes {
            match change {
                FleetChange::Upsert(config) => {
                    log.push(format!("+{}", config.name));
                    self.upsert(config);
                }
                FleetChange::Release { name } => {
                    log.push(format!("-{name}"));
                    if self.at(&name).is_some_and(|at| self.fleet[at].config.discovered.is_some()) {
                        self.remove(&name);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        log
    }

    /// Refuses the last change of a new engine. Returns whether that is news.
    fn refuse(&mut self, number: u8) -> bool {
        let url = engine(number).url;
        self.fleet.retain(|there| there.config.url != url);
        self.ownerships.mark_unusable(&url, self.now)
    }

    /// The upstreams that are not being removed, and whether each is discovered.
    fn staying(&self) -> Vec<(&str, bool)> {
        let staying = self.fleet.iter().filter(|there| !there.removing);
        staying.map(|there| (there.config.name.as_str(), there.config.discovered.is_some())).collect()
    }
}

const NOTHING: [&str; 0] = [];

#[test]
fn adds_engines_at_once_and_releases_old_ones_when_the_new_are_ready() {
    let mut scene = ReconcileScene::new();
    assert_eq!(scene.reconcile(&[]), NOTHING);
    assert_eq!(scene.reconcile(&engines(&[1, 2])), ["+e:1", "+e:2"]);
    assert_eq!(scene.reconcile(&engines(&[1, 2])), NOTHING);
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&engines(&[3, 2])), ["+e:3"], "the new one first");
    assert_eq!(scene.reconcile(&engines(&[3, 2])), NOTHING, "the new one is not ready");
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&engines(&[3, 2])), ["-e:1"]);
    assert_eq!(scene.reconcile(&engines(&[3, 2])), NOTHING);
    assert_eq!(scene.reconcile(&engines(&[2])), ["-e:3"], "the remaining one is ready already");
    assert_eq!(scene.reconcile(&engines(&[2, 3])), ["+e:3"], "listed again");
    assert_eq!(scene.staying(), [("e:2", true), ("e:3", true)]);
    assert_eq!(scene.reconcile(&[]), ["-e:2", "-e:3"], "no source is left");
}

#[test]
fn releases_an_engine_after_a_limit_when_its_replacement_does_not_come() {
    let mut scene = ReconcileScene::new();
    scene.reconcile(&engines(&[1]));
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&engines(&[2])), ["+e:2"]);
    assert_eq!(scene.ownerships.due(), Some(scene.now + MAX_RELEASE_WAIT));
    scene.now += MAX_RELEASE_WAIT - Duration::from_millis(1);
    assert_eq!(scene.reconcile(&engines(&[2])), NOTHING);
    assert_eq!(scene.reconcile(&engines(&[2, 1])), ["+e:1"], "listed again");
    assert_eq!(scene.ownerships.due(), None);
    assert_eq!(scene.reconcile(&engines(&[2])), NOTHING);
    scene.now += MAX_RELEASE_WAIT;
    assert_eq!(scene.reconcile(&engines(&[2])), ["-e:1"]);
    assert_eq!(scene.ownerships.due(), None);
}

/// A source that watches lists engines when they are ready, and no longer when they are told to stop.
#[test]
fn releases_an_engine_of_a_watched_source_without_waiting_for_others() {
    let mut scene = ReconcileScene::new();
    scene.leave_at_once = true;
    scene.reconcile(&engines(&[1, 2]));
    assert_eq!(scene.reconcile(&engines(&[1])), ["-e:2"], "none is ready by its probes");
    scene.end_requests();
    // Another engine has the name of the first one, and must not be taken for it.
    let moved = UpstreamConfig { name: "e:1".into(), ..engine(3) };
    assert_eq!(scene.reconcile(&[moved.clone(), engine(4)]), ["+e:1", "+e:4"]);
    assert_eq!(scene.reconcile(&[moved, engine(4)]), NOTHING);
    assert_eq!(scene.reconcile(&[]), ["-e:1", "-e:4"]);
}

#[test]
fn leaves_the_operators_engines_alone_by_url_and_by_name() {
    let mut scene = ReconcileScene::new();
    scene.upsert(UpstreamConfig { name: "mine".into(), ..named("http://e:1/v1") });
    scene.upsert(UpstreamConfig { name: "e:2".into(), ..named("http://other:2") });
    assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), ["+e:3"]);
    assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), NOTHING);
    // The operator also names discovered engines: by the same name, and by another.
    scene.upsert(UpstreamConfig { weight: 2.0, ..named("http://e:3") });
    assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), NOTHING);
    scene.reconcile(&engines(&[1, 2, 3, 4]));
    scene.upsert(UpstreamConfig { name: "fourth".into(), ..named("http://e:4") });
    assert_eq!(scene.reconcile(&engines(&[1, 2, 3, 4])), ["-e:4"]);
    scene.end_requests();
    assert_eq!(scene.reconcile(&engines(&[1, 2, 3, 4])), NOTHING);
    assert_eq!(scene.reconcile(&[]), NOTHING, "the operator's upstreams stay");
    let all = ["mine", "e:2", "e:3", "fourth"].map(|name| (name, false));
    assert_eq!(scene.staying(), all);
}

#[test]
fn keeps_out_what_the_operator_removed_while_a_source_lists_it() {
    for at_once in [false, true] {
        let mut scene = ReconcileScene::new();
        scene.upsert(named("http://e:2"));
        scene.reconcile(&engines(&[1, 2, 3]));
        scene.remove("e:1");
        scene.remove("e:2");
        if at_once {
            scene.end_requests();
        }
        for _ in 0..3 {
            assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), NOTHING, "at once: {at_once}");
        }
        scene.end_requests();
        assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), NOTHING);
        assert_eq!(scene.reconcile(&engines(&[3])), NOTHING);
        assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), ["+e:1", "+e:2"], "newly listed");
        // The operator adds a removed upstream again.
        scene.remove("e:1");
        scene.end_requests();
        assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), NOTHING);
        scene.upsert(named("http://e:1"));
        assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), NOTHING);
        scene.remove("e:1");
        assert_eq!(scene.reconcile(&engines(&[1, 2, 3])), NOTHING);
    }
}

#[test]
fn hands_upstreams_removed_from_the_file_to_discovery_or_releases_them() {
    let mut scene = ReconcileScene::new();
    scene.upsert(named("http://e:1"));
    scene.upsert(UpstreamConfig { name: "mine".into(), ..named("http://e:2") });
    scene.upsert(named("http://e:9"));
    scene.make_all_ready();
    scene.unanswered = true;
    ["e:1", "mine", "e:9"].iter().for_each(|name| scene.hand_to_discovery(name));
    assert_eq!(scene.reconcile(&[]), NOTHING, "the source has not answered");
    scene.unanswered = false;
    assert_eq!(scene.reconcile(&engines(&[1, 2])), ["+e:1", "+e:2"]);
    assert!(scene.fleet[0].ready, "the upstream is unchanged");
    assert_eq!(scene.reconcile(&engines(&[1, 2])), NOTHING, "under another name it is another upstream");
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&engines(&[1, 2])), ["-mine", "-e:9"]);
    assert_eq!(scene.staying(), [("e:1", true), ("e:2", true)]);
    // In the file and listed by a source, then removed from the file.
    scene.upsert(named("http://e:1"));
    assert_eq!(scene.reconcile(&engines(&[1, 2])), NOTHING);
    scene.hand_to_discovery("e:1");
    assert_eq!(scene.reconcile(&engines(&[1, 2])), ["+e:1"]);
    // The source never answers.
    let mut scene = ReconcileScene::new();
    scene.upsert(named("http://e:1"));
    scene.hand_to_discovery("e:1");
    scene.unanswered = true;
    assert_eq!(scene.reconcile(&[]), NOTHING);
    scene.now += MAX_RELEASE_WAIT;
    assert_eq!(scene.reconcile(&[]), ["-e:1"]);
}

#[test]
fn applies_new_settings_of_a_source_and_keeps_an_operators_weight() {
    let mut scene = ReconcileScene::new();
    scene.reconcile(&engines(&[1]));
    scene.fleet[0].config.weight = 5.0;
    let with = |model: &str, weight: f64| {
        let discovered = Some(DiscoveryOrigin { source: "gym http://g:1".into(), model: Some(model.into()) });
        [UpstreamConfig { discovered, weight, ..engine(1) }]
    };
    assert_eq!(scene.reconcile(&with("m", 1.0)), ["+e:1"]);
    assert_eq!(scene.fleet[0].config.weight, 5.0);
    assert_eq!(scene.reconcile(&with("m", 1.0)), NOTHING);
    assert_eq!(scene.reconcile(&with("m", 2.0)), ["+e:1"]);
    assert_eq!(scene.fleet[0].config.weight, 2.0);
    scene.resend = true;
    assert_eq!(scene.reconcile(&with("m", 2.0)), ["+e:1"], "files may have changed");
    assert_eq!(scene.reconcile(&with("m", 2.0)), NOTHING);
}

/// The same engine with another scheme has the same name.
#[test]
fn does_not_release_an_upstream_that_took_over_the_name() {
    let mut scene = ReconcileScene::new();
    scene.reconcile(&engines(&[80]));
    scene.make_all_ready();
    let mut secure = engine(80);
    secure.url.https = true;
    assert_eq!(scene.reconcile(&[secure.clone()]), ["+e:80"]);
    scene.make_all_ready();
    scene.now += MAX_RELEASE_WAIT;
    assert_eq!(scene.reconcile(&[secure]), NOTHING);
    assert_eq!(scene.staying(), [("e:80", true)]);
}

/// Regression: an engine with another name counted as removed by the operator, and left the fleet.
#[test]
fn an_engine_gets_another_name_or_that_of_another_engine() {
    let listed = |number: u8, name: &str| UpstreamConfig { name: name.into(), ..engine(number) };
    let mut scene = ReconcileScene::new();
    assert_eq!(scene.reconcile(&[listed(1, "a"), listed(2, "b")]), ["+a", "+b"]);
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&[listed(1, "a"), listed(2, "c")]), ["+c"]);
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&[listed(1, "a"), listed(2, "c")]), ["-b"]);
    scene.end_requests();
    assert_eq!(scene.reconcile(&[listed(1, "c"), listed(2, "a")]), ["+c", "+a"]);
    let at = |scene: &ReconcileScene| -> Vec<(String, u16)> {
        let shown = |there: &FleetUpstream| (there.config.name.clone(), there.config.url.port);
        scene.fleet.iter().filter(|there| !there.removing).map(shown).collect()
    };
    assert_eq!(at(&scene), [("a".into(), 2), ("c".into(), 1)]);
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&[listed(1, "c"), listed(2, "a")]), NOTHING);
    // What the operator removed stays out under any name.
    scene.remove("a");
    scene.end_requests();
    assert_eq!(scene.reconcile(&[listed(1, "c"), listed(2, "d")]), NOTHING);
    assert_eq!(at(&scene), [("c".into(), 1)]);
}

/// Regression: while any source was silent, no other one could release an upstream for half a minute.
#[test]
fn a_source_that_has_answered_releases_its_own_upstreams() {
    let mut scene = ReconcileScene::new();
    scene.unanswered = true;
    scene.reconcile(&engines(&[1, 2, 3]));
    scene.make_all_ready();
    scene.hand_to_discovery("e:3");
    assert_eq!(scene.reconcile(&engines(&[2])), ["-e:1"], "the third one may belong to the silent source");
    assert_eq!(scene.reconcile(&engines(&[2, 4])), ["+e:4"]);
    assert_eq!(scene.reconcile(&engines(&[4])), NOTHING, "its replacement is not ready");
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&engines(&[4])), ["-e:2"]);
    scene.unanswered = false;
    assert_eq!(scene.reconcile(&engines(&[4])), ["-e:3"]);
}

/// What the operator, the sources or the engines may do.
#[derive(Clone, Debug)]
enum Act {
    List(Vec<u8>),
    Add(u8, bool),
    Remove(u8),
    Empty,
    Ready,
    Wait,
    HandToDiscovery(u8),
    Unanswered(bool),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        proptest::collection::vec(1..6_u8, 0..5).prop_map(Act::List),
        (1..6_u8, any::<bool>()).prop_map(|(number, renamed)| Act::Add(number, renamed)),
        (1..6_u8).prop_map(Act::Remove),
        Just(Act::Empty),
        Just(Act::Ready),
        Just(Act::Wait),
        (1..6_u8).prop_map(Act::HandToDiscovery),
        any::<bool>().prop_map(Act::Unanswered),
    ]
}

proptest! {
    #[test]
    fn keeps_each_engine_once_and_all_operators_upstreams_in_any_order(
        acts in proptest::collection::vec(act(), 1..40),
    ) {
        let mut scene = ReconcileScene::new();
        let mut listed: Vec<UpstreamConfig> = Vec::new();
        for act in acts {
            match act {
                Act::List(mut numbers) => {
                    numbers.sort_unstable();
                    numbers.dedup();
                    listed = engines(&numbers);
                }
                Act::Add(number, renamed) => {
                    let mut config = named(&format!("http://e:{number}"));
                    if renamed {
                        config.name = format!("mine-{number}");
                    }
                    let twice = scene.fleet.iter().any(|there| {
                        !there.removing && there.config.discovered.is_none() && there.config.url == config.url
                    });
                    if !twice {
                        scene.upsert(config);
                    }
                }
                Act::Remove(number) => scene.remove(&format!("e:{number}")),
                Act::Empty => scene.end_requests(),
                Act::Ready => scene.make_all_ready(),
                Act::Wait => scene.now += MAX_RELEASE_WAIT,
                Act::HandToDiscovery(number) => scene.hand_to_discovery(&format!("e:{number}")),
                Act::Unanswered(unanswered) => scene.unanswered = unanswered,
            }
            let operators = |scene: &ReconcileScene| -> Vec<String> {
                let staying = scene.staying().into_iter().filter(|(_, discovered)| !discovered);
                staying.map(|(name, _)| name.to_string()).collect()
            };
            let before = operators(&scene);
            let first = scene.reconcile(&listed);
            prop_assert_eq!(operators(&scene), before);
            let second = scene.reconcile(&listed);
            // Upstreams that waited for an entering one may be released now.
            prop_assert!(second.is_empty() || first.iter().any(|log| log.starts_with('+')), "{second:?}");
            prop_assert_eq!(scene.reconcile(&listed), NOTHING);
            for there in scene.fleet.iter().filter(|there| !there.removing) {
                let same = |other: &&FleetUpstream| !other.removing && other.config.url == there.config.url;
                prop_assert_eq!(scene.fleet.iter().filter(same).count(), 1);
            }
        }
        // In the end only listed upstreams are left of the discovered ones.
        scene.make_all_ready();
        scene.now += MAX_RELEASE_WAIT;
        scene.reconcile(&listed);
        for (name, discovered) in scene.staying() {
            prop_assert!(!discovered || listed.iter().any(|config| config.name == name), "{name}");
        }
    }
}
