//! Who an engine belongs to, by scripts and by chance, over a fleet that does what it is told.

use proptest::prelude::*;

use super::*;
use crate::config::types::Discovered;
use crate::config::url;

/// An upstream as the fleet has it.
#[derive(Clone, Debug)]
struct There {
    config: UpstreamConfig,
    removing: bool,
    ready: bool,
}

/// A fleet, an operator, and what is believed.
struct ReconcileScene {
    fleet: Vec<There>,
    standings: Ownerships,
    silent: bool,
    again: bool,
    now: Instant,
}

fn named(written: &str) -> UpstreamConfig {
    UpstreamConfig::new(url::upstream(written).expect("is a URL"))
}

fn engine(number: u8) -> UpstreamConfig {
    let discovered = Some(Discovered { source: "gym http://g:1".into(), model: None });
    UpstreamConfig { discovered, ..named(&format!("http://e:{number}")) }
}

fn engines(numbers: &[u8]) -> Vec<UpstreamConfig> {
    numbers.iter().map(|number| engine(*number)).collect()
}

impl ReconcileScene {
    fn new() -> Self {
        let (fleet, standings) = (Vec::new(), Ownerships::default());
        ReconcileScene { fleet, standings, silent: false, again: false, now: Instant::now() }
    }

    fn at(&mut self, name: &str) -> Option<usize> {
        self.fleet.iter().position(|there| there.config.name == name)
    }

    /// As the keeper does.
    fn upsert(&mut self, config: UpstreamConfig) {
        let removing = false;
        match self.at(&config.name) {
            Some(at) => {
                let there = &self.fleet[at];
                let operators = there.config.discovered.is_none() && !there.removing;
                if !operators || config.discovered.is_none() {
                    let ready = there.ready && there.config.url == config.url;
                    self.fleet[at] = There { config, removing, ready };
                }
            }
            None => self.fleet.push(There { config, removing, ready: false }),
        }
    }

    fn remove(&mut self, name: &str) {
        if let Some(at) = self.at(name) {
            self.fleet[at].removing = true;
        }
    }

    /// A reload takes it out of the file.
    fn leave(&mut self, name: &str) {
        if let Some(at) = self.at(name) {
            self.fleet[at].config.discovered = Some(Discovered { source: "none".into(), model: None });
        }
    }

    /// Whose last request has ended.
    fn empty(&mut self) {
        self.fleet.retain(|there| !there.removing);
    }

    fn ready(&mut self) {
        self.fleet.iter_mut().for_each(|there| there.ready = true);
    }

    /// The changes, which are carried out, as `+name`, and `-name`.
    fn look(&mut self, wanted: &[UpstreamConfig]) -> Vec<String> {
        let fleet = self.fleet.clone();
        let present: Vec<PresentUpstream<'_>> = fleet
            .iter()
            .map(|There { config, removing, ready }| PresentUpstream {
                config,
                removing: *removing,
                ready: *ready,
            })
            .collect();
        let again = std::mem::take(&mut self.again);
        let changes = self.standings.reconcile(&FleetView {
            wanted,
            present: &present,
            silent: self.silent,
            again,
            now: self.now,
        });
        let mut told = Vec::new();
        for change in changes {
            match change {
                Change::Upsert(config) => {
                    told.push(format!("+{}", config.name));
                    self.upsert(config);
                }
                Change::Release { name } => {
                    told.push(format!("-{name}"));
                    if self.at(&name).is_some_and(|at| self.fleet[at].config.discovered.is_some()) {
                        self.remove(&name);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        told
    }

    /// Those that take requests when they are up, and of whom.
    fn staying(&self) -> Vec<(&str, bool)> {
        let staying = self.fleet.iter().filter(|there| !there.removing);
        staying.map(|there| (there.config.name.as_str(), there.config.discovered.is_some())).collect()
    }
}

const NOTHING: [&str; 0] = [];

#[test]
fn engines_enter_at_once_and_leave_when_the_others_are_ready() {
    let mut scene = ReconcileScene::new();
    assert_eq!(scene.look(&[]), NOTHING);
    assert_eq!(scene.look(&engines(&[1, 2])), ["+e:1", "+e:2"]);
    assert_eq!(scene.look(&engines(&[1, 2])), NOTHING);
    scene.ready();
    assert_eq!(scene.look(&engines(&[3, 2])), ["+e:3"], "the new one first");
    assert_eq!(scene.look(&engines(&[3, 2])), NOTHING, "it is not ready");
    scene.ready();
    assert_eq!(scene.look(&engines(&[3, 2])), ["-e:1"]);
    assert_eq!(scene.look(&engines(&[3, 2])), NOTHING);
    assert_eq!(scene.look(&engines(&[2])), ["-e:3"], "the other is ready already");
    assert_eq!(scene.look(&engines(&[2, 3])), ["+e:3"], "it stays after all");
    assert_eq!(scene.staying(), [("e:2", true), ("e:3", true)]);
    assert_eq!(scene.look(&[]), ["-e:2", "-e:3"], "nobody is asked any more");
}

#[test]
fn nobody_waits_for_ever_for_engines_that_do_not_come() {
    let mut scene = ReconcileScene::new();
    scene.look(&engines(&[1]));
    scene.ready();
    assert_eq!(scene.look(&engines(&[2])), ["+e:2"]);
    assert_eq!(scene.standings.due(), Some(scene.now + MAX_RELEASE_WAIT));
    scene.now += MAX_RELEASE_WAIT - Duration::from_millis(1);
    assert_eq!(scene.look(&engines(&[2])), NOTHING);
    assert_eq!(scene.look(&engines(&[2, 1])), ["+e:1"], "it is named again");
    assert_eq!(scene.standings.due(), None);
    assert_eq!(scene.look(&engines(&[2])), NOTHING);
    scene.now += MAX_RELEASE_WAIT;
    assert_eq!(scene.look(&engines(&[2])), ["-e:1"]);
    assert_eq!(scene.standings.due(), None);
}

#[test]
fn the_operators_engine_is_left_alone_by_url_and_by_name() {
    let mut scene = ReconcileScene::new();
    scene.upsert(UpstreamConfig { name: "mine".into(), ..named("http://e:1/v1") });
    scene.upsert(UpstreamConfig { name: "e:2".into(), ..named("http://other:2") });
    assert_eq!(scene.look(&engines(&[1, 2, 3])), ["+e:3"]);
    assert_eq!(scene.look(&engines(&[1, 2, 3])), NOTHING);
    // The operator names what was discovered, too: by the same name, and by another.
    scene.upsert(UpstreamConfig { weight: 2.0, ..named("http://e:3") });
    assert_eq!(scene.look(&engines(&[1, 2, 3])), NOTHING);
    scene.look(&engines(&[1, 2, 3, 4]));
    scene.upsert(UpstreamConfig { name: "fourth".into(), ..named("http://e:4") });
    assert_eq!(scene.look(&engines(&[1, 2, 3, 4])), ["-e:4"]);
    scene.empty();
    assert_eq!(scene.look(&engines(&[1, 2, 3, 4])), NOTHING);
    assert_eq!(scene.look(&[]), NOTHING, "the operator's stay");
    let all = ["mine", "e:2", "e:3", "fourth"].map(|name| (name, false));
    assert_eq!(scene.staying(), all);
}

#[test]
fn what_the_operator_takes_out_stays_out_while_it_is_named() {
    for at_once in [false, true] {
        let mut scene = ReconcileScene::new();
        scene.upsert(named("http://e:2"));
        scene.look(&engines(&[1, 2, 3]));
        scene.remove("e:1");
        scene.remove("e:2");
        if at_once {
            scene.empty();
        }
        for _ in 0..3 {
            assert_eq!(scene.look(&engines(&[1, 2, 3])), NOTHING, "at once: {at_once}");
        }
        scene.empty();
        assert_eq!(scene.look(&engines(&[1, 2, 3])), NOTHING);
        assert_eq!(scene.look(&engines(&[3])), NOTHING);
        assert_eq!(scene.look(&engines(&[1, 2, 3])), ["+e:1", "+e:2"], "they are named anew");
        // The operator names one that is out.
        scene.remove("e:1");
        scene.empty();
        assert_eq!(scene.look(&engines(&[1, 2, 3])), NOTHING);
        scene.upsert(named("http://e:1"));
        assert_eq!(scene.look(&engines(&[1, 2, 3])), NOTHING);
        scene.remove("e:1");
        assert_eq!(scene.look(&engines(&[1, 2, 3])), NOTHING);
    }
}

#[test]
fn what_the_file_names_no_more_is_its_sources_or_goes_when_those_are_there() {
    let mut scene = ReconcileScene::new();
    scene.upsert(named("http://e:1"));
    scene.upsert(UpstreamConfig { name: "mine".into(), ..named("http://e:2") });
    scene.upsert(named("http://e:9"));
    scene.ready();
    scene.silent = true;
    ["e:1", "mine", "e:9"].iter().for_each(|name| scene.leave(name));
    assert_eq!(scene.look(&[]), NOTHING, "the source has not answered");
    scene.silent = false;
    assert_eq!(scene.look(&engines(&[1, 2])), ["+e:1", "+e:2"]);
    assert!(scene.fleet[0].ready, "it goes on as it was");
    assert_eq!(scene.look(&engines(&[1, 2])), NOTHING, "another name makes another upstream of it");
    scene.ready();
    assert_eq!(scene.look(&engines(&[1, 2])), ["-mine", "-e:9"]);
    assert_eq!(scene.staying(), [("e:1", true), ("e:2", true)]);
    // Named by both, left by the file.
    scene.upsert(named("http://e:1"));
    assert_eq!(scene.look(&engines(&[1, 2])), NOTHING);
    scene.leave("e:1");
    assert_eq!(scene.look(&engines(&[1, 2])), ["+e:1"]);
    // The source never answers.
    let mut scene = ReconcileScene::new();
    scene.upsert(named("http://e:1"));
    scene.leave("e:1");
    scene.silent = true;
    assert_eq!(scene.look(&[]), NOTHING);
    scene.now += MAX_RELEASE_WAIT;
    assert_eq!(scene.look(&[]), ["-e:1"]);
}

#[test]
fn what_a_source_says_anew_is_taken_over_and_a_weight_of_the_operators_stays() {
    let mut scene = ReconcileScene::new();
    scene.look(&engines(&[1]));
    scene.fleet[0].config.weight = 5.0;
    let with = |model: &str, weight: f64| {
        let discovered = Some(Discovered { source: "gym http://g:1".into(), model: Some(model.into()) });
        [UpstreamConfig { discovered, weight, ..engine(1) }]
    };
    assert_eq!(scene.look(&with("m", 1.0)), ["+e:1"]);
    assert_eq!(scene.fleet[0].config.weight, 5.0);
    assert_eq!(scene.look(&with("m", 1.0)), NOTHING);
    assert_eq!(scene.look(&with("m", 2.0)), ["+e:1"]);
    assert_eq!(scene.fleet[0].config.weight, 2.0);
    scene.again = true;
    assert_eq!(scene.look(&with("m", 2.0)), ["+e:1"], "files may have changed");
    assert_eq!(scene.look(&with("m", 2.0)), NOTHING);
}

/// One with another scheme has the same name.
#[test]
fn a_name_that_another_has_by_now_is_not_taken_out_with_its_old_owner() {
    let mut scene = ReconcileScene::new();
    scene.look(&engines(&[80]));
    scene.ready();
    let mut secure = engine(80);
    secure.url.https = true;
    assert_eq!(scene.look(&[secure.clone()]), ["+e:80"]);
    scene.ready();
    scene.now += MAX_RELEASE_WAIT;
    assert_eq!(scene.look(&[secure]), NOTHING);
    assert_eq!(scene.staying(), [("e:80", true)]);
}

#[test]
fn what_could_not_enter_is_tried_again() {
    let mut scene = ReconcileScene::new();
    scene.look(&engines(&[1]));
    scene.fleet.clear();
    scene.standings.unusable(&engine(1).url);
    assert_eq!(scene.look(&engines(&[1])), ["+e:1"]);
}

/// Of what is named no more nobody waits for it, and what was there before it could not be used stays.
#[test]
fn what_cannot_enter_holds_nobody_and_what_cannot_be_altered_stays() {
    let mut scene = ReconcileScene::new();
    scene.look(&engines(&[1, 2]));
    scene.ready();
    assert_eq!(scene.look(&engines(&[2, 3])), ["+e:3"]);
    let at = scene.at("e:3").expect("it entered");
    scene.fleet.remove(at);
    for more in [&[][..], &["-e:1"]] {
        for number in [2, 3] {
            scene.standings.unusable(&engine(number).url);
        }
        let tried = [&["+e:2", "+e:3"], more].concat();
        assert_eq!(scene.look(&engines(&[2, 3])), tried);
        scene.fleet.retain(|there| there.config.name != "e:3");
        scene.now += MAX_RELEASE_WAIT;
    }
    assert_eq!(scene.standings.due(), None);
    assert!(scene.staying().contains(&("e:2", true)));
}

/// What anybody may do.
#[derive(Clone, Debug)]
enum Act {
    Say(Vec<u8>),
    Add(u8, bool),
    Remove(u8),
    Empty,
    Ready,
    Wait,
    Leave(u8),
    Silent(bool),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        proptest::collection::vec(1..6_u8, 0..5).prop_map(Act::Say),
        (1..6_u8, any::<bool>()).prop_map(|(number, renamed)| Act::Add(number, renamed)),
        (1..6_u8).prop_map(Act::Remove),
        Just(Act::Empty),
        Just(Act::Ready),
        Just(Act::Wait),
        (1..6_u8).prop_map(Act::Leave),
        any::<bool>().prop_map(Act::Silent),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_each_engine_is_there_once_and_the_operators_stay(
        acts in proptest::collection::vec(act(), 1..40),
    ) {
        let mut scene = ReconcileScene::new();
        let mut wanted: Vec<UpstreamConfig> = Vec::new();
        for act in acts {
            match act {
                Act::Say(mut numbers) => {
                    numbers.sort_unstable();
                    numbers.dedup();
                    wanted = engines(&numbers);
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
                Act::Empty => scene.empty(),
                Act::Ready => scene.ready(),
                Act::Wait => scene.now += MAX_RELEASE_WAIT,
                Act::Leave(number) => scene.leave(&format!("e:{number}")),
                Act::Silent(silent) => scene.silent = silent,
            }
            let operators = |scene: &ReconcileScene| -> Vec<String> {
                let staying = scene.staying().into_iter().filter(|(_, discovered)| !discovered);
                staying.map(|(name, _)| name.to_string()).collect()
            };
            let before = operators(&scene);
            let first = scene.look(&wanted);
            prop_assert_eq!(operators(&scene), before);
            let second = scene.look(&wanted);
            // What waited for one that entered may leave now.
            prop_assert!(second.is_empty() || first.iter().any(|told| told.starts_with('+')), "{second:?}");
            prop_assert_eq!(scene.look(&wanted), NOTHING);
            for there in scene.fleet.iter().filter(|there| !there.removing) {
                let same = |other: &&There| !other.removing && other.config.url == there.config.url;
                prop_assert_eq!(scene.fleet.iter().filter(same).count(), 1);
            }
        }
        // In the end all that are named and were not taken out are there, and nobody else who was discovered.
        scene.ready();
        scene.now += MAX_RELEASE_WAIT;
        scene.look(&wanted);
        for (name, discovered) in scene.staying() {
            prop_assert!(!discovered || wanted.iter().any(|config| config.name == name), "{name}");
        }
    }
}
