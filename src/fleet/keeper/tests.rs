//! The keeper's handling of messages, one by one.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use super::super::breaker::UpstreamSignal;
use super::super::change::FleetChange;
use super::super::probe::ProbeReport;
use super::super::probe_duty::UpstreamCondition;
use super::*;
use crate::aggregate::EngineMetrics;
use crate::config::types::{Config, DiscoveryOrigin};
use crate::config::url;
use crate::fleet::UpstreamState;
use crate::observe::Observer;

/// Handles a message and publishes its effect at once.
fn handle(keeper: &mut Keeper, message: KeeperMessage) {
    keeper.handle(message);
    keeper.publish_changes();
}

/// Handles the messages that wait.
pub(in super::super) fn handle_all(keeper: &mut Keeper) {
    while let Ok(message) = keeper.inbox.try_recv() {
        handle(keeper, message);
    }
}

/// A good own probe of each upstream.
pub(in super::super) fn works(keeper: &mut Keeper) {
    let all: Vec<_> = keeper.records.present().iter().map(|record| record.upstream().clone()).collect();
    for upstream in all {
        let found = Ok(ProbeReport { models: Vec::new(), version: None });
        handle(keeper, KeeperMessage::Probed { id: upstream.id, found });
        probed(keeper, &upstream, true);
    }
}

/// As many failed own probes of the first upstream as take it out.
pub(in super::super) fn fails(keeper: &mut Keeper) {
    let upstream = keeper.records.present()[0].upstream().clone();
    for _ in 0..3 {
        let found = Err(ProbeFailure::Silent("no answer".into()));
        handle(keeper, KeeperMessage::Probed { id: upstream.id, found });
    }
    probed(keeper, &upstream, false);
}

fn probed(keeper: &Keeper, upstream: &Upstream, good: bool) {
    let circle = keeper.fleet.shared.circle();
    let view = keeper.fleet.duty_view(upstream, None, &circle, now());
    upstream.live.duty().probed(good, &view, 0.5);
}

/// The condition of the first upstream.
pub(in super::super) fn condition(keeper: &Keeper) -> UpstreamCondition {
    keeper.fleet.snapshot().entries[0].condition()
}

fn keeper() -> Keeper {
    let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
    let config = Config { upstreams: vec![config], ..Config::default() };
    Fleet::new(&config, Observer::default()).expect("it needs no file").1
}

/// A request that chose by an older snapshot may begin after the last one ended and before the keeper handles
/// its message.
#[tokio::test(start_paused = true)]
async fn removes_an_upstream_with_a_late_request_when_that_request_ends() {
    for force in [false, true] {
        let mut keeper = keeper();
        let upstream = keeper.records.present()[0].upstream().clone();
        let (id, name) = (upstream.id, upstream.name().to_string());
        keeper.apply(vec![FleetChange::Remove { name, force }], &Default::default()).expect("it is there");
        let message = keeper.inbox.recv().await.expect("the fleet lives");
        upstream.live.gauges.active.store(1, Relaxed);
        handle(&mut keeper, message);
        assert!(keeper.fleet.snapshot().watched(id).is_some(), "force {force}: one is in flight");
        upstream.live.gauges.active.store(0, Relaxed);
        upstream.live.emptied.notify_waiters();
        let message = tokio::time::timeout(Duration::from_secs(60), keeper.inbox.recv()).await;
        handle(&mut keeper, message.expect("the keeper gets another message").expect("the fleet lives"));
        assert!(keeper.fleet.snapshot().watched(id).is_none(), "force {force}: none is in flight");
    }
}

/// As another program, or an engine with a wrong clock, may report.
#[tokio::test(start_paused = true)]
async fn a_start_in_the_far_future_hides_no_restart() {
    let mut keeper = keeper();
    let id = keeper.records.present()[0].upstream().id;
    let mut incarnation = |started| {
        let metrics = EngineMetrics { started: Some(started), ..EngineMetrics::default() };
        handle(&mut keeper, KeeperMessage::Metrics { id, metrics });
        keeper.fleet.snapshot().entries[0].incarnation
    };
    assert_eq!([1e12, 100.0, 1e12, 100.0, 200.0, 1e12].map(&mut incarnation), [0, 0, 0, 0, 1, 1]);
}

/// The clocks of engines and balancers differ: only the engine's own figures are compared with each other.
#[tokio::test(start_paused = true)]
async fn a_restart_is_found_whatever_the_clocks_say() {
    let own = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is set").as_secs_f64();
    let day = 24.0 * 3600.0;
    for ahead in [-10_000.0 * day, -2.0 * day, -60.0, 0.0, 60.0, 0.9 * day] {
        let mut keeper = keeper();
        let id = keeper.records.present()[0].upstream().id;
        let incarnations = [0.0, 0.0, 0.5, 0.5].map(|later| {
            let metrics = EngineMetrics { started: Some(own + ahead + later), ..EngineMetrics::default() };
            handle(&mut keeper, KeeperMessage::Metrics { id, metrics });
            keeper.fleet.snapshot().entries[0].incarnation
        });
        assert_eq!(incarnations, [0, 0, 1, 1], "{ahead} s ahead");
    }
}

/// The start and the cache size that metrics report, and what follows: the incarnation, the cache size in the
/// snapshot, and whether a snapshot was published.
#[tokio::test(start_paused = true)]
async fn counts_a_later_start_as_a_new_incarnation_and_keeps_unreported_values() {
    let mut keeper = keeper();
    let id = keeper.records.present()[0].upstream().id;
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
        let before = keeper.fleet.snapshot_owned();
        let (second, now) = (Duration::from_secs(1), super::super::now());
        before.entries[0].upstream.correct_forecast(8_000, second, second, now);
        let metrics = EngineMetrics { running, started, cache_tokens, ..EngineMetrics::default() };
        handle(&mut keeper, KeeperMessage::Metrics { id, metrics });
        let is_new = changes.has_changed().expect("the fleet lives");
        changes.mark_unchanged();
        let snapshot = keeper.fleet.snapshot();
        let entry = &snapshot.entries[0];
        assert_eq!((entry.incarnation, entry.cache_tokens, is_new), expected, "row {at}");
        let is_later = entry.incarnation > before.entries[0].incarnation;
        assert_eq!(entry.upstream.forecast_error().is_none(), is_later, "row {at}");
    }
}

/// The events of a script, and the incarnation after each.
#[tokio::test(start_paused = true)]
async fn counts_a_restart_as_one_new_incarnation() {
    let mut keeper = keeper();
    let id = keeper.records.present()[0].upstream().id;
    let found = |keeper: &mut Keeper, found| handle(keeper, KeeperMessage::Probed { id, found });
    let script = [
        ("well", 0),
        ("began 100", 0),
        ("failed", 0),
        ("well", 0),
        ("drained", 0),
        ("undrained", 0),
        // The upstream was gone; its new start is the same restart.
        ("failed", 0),
        ("failed", 0),
        ("failed", 0),
        ("well", 1),
        ("began 200", 1),
        ("began 200", 1),
        ("began 300", 2),
        // An upstream that is gone during a trip or a drain.
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
    for (at, (event, incarnation)) in script.into_iter().enumerate() {
        let name = keeper.records.present()[0].upstream().name().to_string();
        match event {
            "well" => found(&mut keeper, Ok(ProbeReport { models: Vec::new(), version: None })),
            "failed" => found(&mut keeper, Err(ProbeFailure::Silent("no answer".into()))),
            "tripped" => (0..5).for_each(|_| {
                handle(
                    &mut keeper,
                    KeeperMessage::Signal { id, signal: UpstreamSignal::Failed { placed: now() } },
                );
            }),
            "drained" | "undrained" => {
                let drain = event == "drained";
                keeper
                    .apply(vec![FleetChange::Drain { name, drain }], &Default::default())
                    .expect("it is there");
            }
            began => {
                let started = began.strip_prefix("began ").and_then(|at| at.parse().ok());
                let metrics = EngineMetrics { started, ..EngineMetrics::default() };
                handle(&mut keeper, KeeperMessage::Metrics { id, metrics });
            }
        }
        assert_eq!(keeper.fleet.snapshot().entries[0].incarnation, incarnation, "{event}, event {at}");
    }
}

/// Neither a discovered upstream nor a release by its source changes an upstream that an operator has named.
#[tokio::test(start_paused = true)]
async fn an_operators_settings_take_precedence_over_a_sources() {
    let mut keeper = keeper();
    let operators = keeper.records.present()[0].upstream().config.clone();
    let name = operators.name.clone();
    let discovered = Some(DiscoveryOrigin { source: "gym http://g:1".into(), model: None });
    let from_source = UpstreamConfig { weight: 9.0, discovered, ..operators.clone() };
    let present = |keeper: &Keeper| {
        let record = &keeper.records.present()[0];
        let config = &record.upstream().config;
        (config.weight, config.discovered.is_some(), record.entry.removing)
    };
    let id = keeper.records.present()[0].upstream().id;
    let release = || vec![FleetChange::Release { name: name.clone() }];
    keeper
        .apply(vec![FleetChange::Upsert(from_source.clone())], &Default::default())
        .expect("the upstream is unchanged");
    keeper.apply(release(), &Default::default()).expect("the upstream is unchanged");
    assert_eq!(present(&keeper), (1.0, false, false));
    // Once the operator has removed the upstream, the source takes it over with its requests in flight.
    keeper
        .apply(vec![FleetChange::Remove { name: name.clone(), force: false }], &Default::default())
        .expect("it is there");
    keeper
        .apply(vec![FleetChange::Upsert(from_source)], &Default::default())
        .expect("the operator has given it up");
    assert_eq!((present(&keeper), keeper.records.present()[0].upstream().id), ((9.0, true, false), id));
    keeper.apply(vec![FleetChange::Upsert(operators)], &Default::default()).expect("it is there");
    assert_eq!(present(&keeper), (1.0, false, false));
    keeper
        .apply(vec![FleetChange::Release { name: "unknown".into() }], &Default::default())
        .expect("there is nothing to do");
    assert_eq!(keeper.records.present().len(), 1);
}

/// The process of a dead engine answers probes for a moment.
#[tokio::test(start_paused = true)]
async fn readmits_an_upstream_with_a_dead_engine_once_a_new_process_runs() {
    let mut keeper = keeper();
    let id = keeper.records.present()[0].upstream().id;
    let started = |started| KeeperMessage::Metrics {
        id,
        metrics: EngineMetrics { started: Some(started), ..EngineMetrics::default() },
    };
    let well = || KeeperMessage::Probed { id, found: Ok(ProbeReport { models: Vec::new(), version: None }) };
    let refused = || KeeperMessage::Probed { id, found: Err(ProbeFailure::Refused(String::new())) };
    let dead = || KeeperMessage::Signal { id, signal: UpstreamSignal::EngineDead };
    let second = Duration::from_secs(1);
    type Script = Vec<(KeeperMessage, UpstreamState, Duration)>;
    let scripts: [Script; 3] = [
        vec![(started(100.0), UpstreamState::Down, second), (started(200.0), UpstreamState::Ready, second)],
        vec![(refused(), UpstreamState::Ready, second)],
        vec![(well(), UpstreamState::Down, second * 28), (well(), UpstreamState::Ready, second)],
    ];
    for script in scripts {
        for message in [well(), started(100.0), dead(), well()] {
            handle(&mut keeper, message);
        }
        let state = |keeper: &Keeper| keeper.fleet.snapshot().entries[0].state();
        assert_eq!(state(&keeper), UpstreamState::Down);
        assert!(keeper.fleet.snapshot().is_gone(id), "its requests in flight end");
        for (message, wanted, pause) in script {
            handle(&mut keeper, message);
            tokio::time::advance(pause + second / 2).await;
            handle(&mut keeper, well());
            assert_eq!(state(&keeper), wanted);
        }
        // The state that the next script starts from.
        keeper.handle(started(100.0));
    }
}

/// Changes that no caller waits for are published together; the first one at once.
#[tokio::test(start_paused = true)]
async fn publishes_many_changes_together() {
    let upstream = |at| UpstreamConfig::new(url::upstream(&format!("http://gpu:{at}")).expect("is a URL"));
    let config = Config { upstreams: (1..=100).map(upstream).collect(), ..Config::default() };
    let (fleet, mut keeper) = Fleet::new(&config, Observer::default()).expect("it needs no file");
    let published = fleet.changes();
    let count = || *published.borrow();
    let well =
        |id| KeeperMessage::Probed { id, found: Ok(ProbeReport { models: Vec::new(), version: None }) };
    let before = count();
    tokio::time::advance(MIN_PUBLISH_INTERVAL).await;
    for id in 0..50 {
        keeper.handle(well(id));
        keeper.publish_if_due();
    }
    assert_eq!((count(), fleet.snapshot().ready().count()), (before + 1, 1));
    // A caller's change is published with the others before the answer.
    let name = keeper.records.present()[99].upstream().name().to_string();
    keeper.apply(vec![FleetChange::Drain { name, drain: true }], &Default::default()).expect("it is there");
    assert_eq!((count(), fleet.snapshot().ready().count()), (before + 2, 50));
    keeper.handle(well(50));
    keeper.publish_if_due();
    assert_eq!(fleet.snapshot().ready().count(), 50);
    tokio::time::advance(MIN_PUBLISH_INTERVAL).await;
    keeper.publish_if_due();
    assert_eq!((count(), fleet.snapshot().ready().count()), (before + 3, 51));
}
