//! What the keeper does with words that come late.

use std::sync::atomic::Ordering::Relaxed;

use super::*;
use crate::config::types::{Config, Discovered};
use crate::config::url;
use crate::fleet::UpstreamState;
use crate::observe::Observer;

fn keeper() -> Keeper {
    let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
    let config = Config { upstreams: vec![config], ..Config::default() };
    Fleet::new(&config, Observer::default()).expect("it needs no file").1
}

/// Between the last request's end and the keeper's look at it, one may come that chose by an older snapshot.
#[tokio::test(start_paused = true)]
async fn an_upstream_that_got_a_late_request_goes_when_that_has_ended() {
    for force in [false, true] {
        let mut keeper = keeper();
        let upstream = keeper.kept[0].upstream().clone();
        let (id, name) = (upstream.id, upstream.name().to_string());
        keeper.apply(vec![Change::Remove { name, force }]).expect("it is there");
        let word = keeper.inbox.recv().await.expect("the fleet lives");
        upstream.live.gauges.active.store(1, Relaxed);
        keeper.take_in(word);
        assert!(keeper.fleet.snapshot().watched(id).is_some(), "force {force}: one is in flight");
        upstream.live.gauges.active.store(0, Relaxed);
        upstream.live.emptied.notify_waiters();
        let word = tokio::time::timeout(Duration::from_secs(60), keeper.inbox.recv()).await;
        keeper.take_in(word.expect("it is told of again").expect("the fleet lives"));
        assert!(keeper.fleet.snapshot().watched(id).is_none(), "force {force}: nothing is");
    }
}

/// What metrics say of the process and of its cache, and what a snapshot tells of it: the incarnation, the
/// cache, and whether there was a new one.
#[tokio::test(start_paused = true)]
async fn a_later_start_is_another_incarnation_and_what_is_not_said_stays() {
    let mut keeper = keeper();
    let id = keeper.kept[0].upstream().id;
    let mut changes = keeper.fleet.changes();
    type Row = ((Option<f64>, Option<u64>), (u64, Option<u64>, bool));
    let table: [Row; 11] = [
        ((None, None), (0, None, false)),
        ((Some(100.0), None), (0, None, false)),
        ((Some(100.0), Some(5)), (0, Some(5), true)),
        ((Some(100.0), Some(5)), (0, Some(5), false)),
        ((None, None), (0, Some(5), false)),
        ((Some(100.5), Some(5)), (1, Some(5), true)),
        ((Some(100.5), Some(5)), (1, Some(5), false)),
        // Another process behind the same address, and the first again.
        ((Some(90.0), None), (1, Some(5), false)),
        ((Some(100.5), None), (1, Some(5), false)),
        ((Some(200.0), Some(7)), (2, Some(7), true)),
        ((None, Some(8)), (2, Some(8), true)),
    ];
    for (at, ((started, cache_tokens), expected)) in table.into_iter().enumerate() {
        let running = Some(at as u64);
        keeper.take_in(KeeperMessage::Metrics {
            id,
            metrics: EngineMetrics { running, started, cache_tokens, ..EngineMetrics::default() },
        });
        let is_new = changes.has_changed().expect("the fleet lives");
        changes.mark_unchanged();
        let snapshot = keeper.fleet.snapshot();
        let entry = &snapshot.entries[0];
        assert_eq!((entry.incarnation, entry.cache_tokens, is_new), expected, "row {at}");
    }
}

/// The words of a script, and the incarnation after each.
#[tokio::test(start_paused = true)]
async fn who_was_gone_comes_back_as_another_incarnation_and_one_restart_counts_once() {
    let mut keeper = keeper();
    let id = keeper.kept[0].upstream().id;
    let found = |keeper: &mut Keeper, found| keeper.take_in(KeeperMessage::Probed { id, found });
    let script = [
        ("well", 0),
        ("began 100", 0),
        ("failed", 0),
        ("well", 0),
        ("drained", 0),
        ("undrained", 0),
        // It was gone, and its new start is no second news.
        ("failed", 0),
        ("failed", 0),
        ("failed", 0),
        ("well", 1),
        ("began 200", 1),
        ("began 200", 1),
        ("began 300", 2),
        // A trip hides that it is gone, and a drain too.
        ("tripped", 2),
        ("well", 2),
        ("failed", 2),
        ("failed", 2),
        ("failed", 2),
        ("well", 3),
        ("drained", 3),
        ("failed", 3),
        ("failed", 3),
        ("failed", 3),
        ("well", 4),
        ("undrained", 4),
    ];
    for (at, (word, incarnation)) in script.into_iter().enumerate() {
        let name = keeper.kept[0].upstream().name().to_string();
        match word {
            "well" => found(&mut keeper, Ok(ProbeReport { models: Vec::new(), version: None })),
            "failed" => found(&mut keeper, Err(ProbeFailure::Silent("no answer".into()))),
            "tripped" => (0..5).for_each(|_| keeper.take_in(KeeperMessage::Seen { id, sign: Sign::Failed })),
            "drained" | "undrained" => {
                let drain = word == "drained";
                keeper.apply(vec![Change::Drain { name, drain }]).expect("it is there");
            }
            began => {
                let started = began.strip_prefix("began ").and_then(|at| at.parse().ok());
                keeper.take_in(KeeperMessage::Metrics {
                    id,
                    metrics: EngineMetrics { started, ..EngineMetrics::default() },
                });
            }
        }
        assert_eq!(keeper.fleet.snapshot().entries[0].incarnation, incarnation, "{word}, word {at}");
    }
}

/// What is discovered, and what its source names no more, changes nothing that an operator has named.
#[tokio::test(start_paused = true)]
async fn an_operators_word_goes_before_a_sources() {
    let mut keeper = keeper();
    let operators = keeper.kept[0].upstream().config.clone();
    let name = operators.name.clone();
    let discovered = Some(Discovered { source: "gym http://g:1".into(), model: None });
    let theirs = UpstreamConfig { weight: 9.0, discovered, ..operators.clone() };
    let there = |keeper: &Keeper| {
        let kept = &keeper.kept[0];
        (kept.upstream().config.weight, kept.upstream().config.discovered.is_some(), kept.entry.removing)
    };
    let id = keeper.kept[0].upstream().id;
    let release = || vec![Change::Release { name: name.clone() }];
    keeper.apply(vec![Change::Upsert(theirs.clone())]).expect("it is left alone");
    keeper.apply(release()).expect("it is left alone");
    assert_eq!(there(&keeper), (1.0, false, false));
    // Once it is taken out the source may have it, requests in flight and all.
    keeper.apply(vec![Change::Remove { name: name.clone(), force: false }]).expect("it is there");
    keeper.apply(vec![Change::Upsert(theirs)]).expect("it is nobody else's");
    assert_eq!((there(&keeper), keeper.kept[0].upstream().id), ((9.0, true, false), id));
    keeper.apply(vec![Change::Upsert(operators)]).expect("it is there");
    assert_eq!(there(&keeper), (1.0, false, false));
    keeper.apply(vec![Change::Release { name: "nobody".into() }]).expect("there is nothing to do");
    assert_eq!(keeper.kept.len(), 1);
}

/// The process of a dead engine answers its probes for a moment.
#[tokio::test(start_paused = true)]
async fn an_upstream_whose_engine_is_dead_is_back_with_its_next_process() {
    let mut keeper = keeper();
    let id = keeper.kept[0].upstream().id;
    let started = |started| KeeperMessage::Metrics {
        id,
        metrics: EngineMetrics { started: Some(started), ..EngineMetrics::default() },
    };
    let well = || KeeperMessage::Probed { id, found: Ok(ProbeReport { models: Vec::new(), version: None }) };
    let refused = || KeeperMessage::Probed { id, found: Err(ProbeFailure::Refused(String::new())) };
    let dead = || KeeperMessage::Seen { id, sign: Sign::EngineDead };
    let second = Duration::from_secs(1);
    type Script = Vec<(KeeperMessage, UpstreamState, Duration)>;
    let scripts: [Script; 3] = [
        vec![(started(100.0), UpstreamState::Down, second), (started(200.0), UpstreamState::Ready, second)],
        vec![(refused(), UpstreamState::Ready, second)],
        vec![(well(), UpstreamState::Down, second * 28), (well(), UpstreamState::Ready, second)],
    ];
    for script in scripts {
        for word in [well(), started(100.0), dead(), well()] {
            keeper.take_in(word);
        }
        let state = |keeper: &Keeper| keeper.fleet.snapshot().entries[0].state();
        assert_eq!(state(&keeper), UpstreamState::Down);
        assert!(keeper.fleet.snapshot().is_gone(id), "its requests in flight need not wait for it");
        for (word, wanted, pause) in script {
            keeper.take_in(word);
            tokio::time::advance(pause + second / 2).await;
            keeper.take_in(well());
            assert_eq!(state(&keeper), wanted);
        }
        // The same for the next script.
        keeper.take_in(started(100.0));
    }
}
