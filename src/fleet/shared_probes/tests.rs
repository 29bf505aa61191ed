//! What one balancer finds and another applies, without a network.

use std::sync::atomic::Ordering::Relaxed;

use super::*;
use crate::config::types::{Config, UpstreamConfig};
use crate::config::url;
use crate::fleet::Keeper;
use crate::fleet::keeper::tests::{condition, handle_all, works};
use crate::fleet::sight::SightState;
use crate::observe::Observer;

const SECOND: Duration = Duration::from_secs(1);

/// A balancer over upstreams of these names and URLs, which work, with one sibling.
fn balancer(own: u64, upstreams: &[(&str, &str)], host: &str) -> (Arc<Fleet>, Keeper) {
    let upstreams = upstreams.iter().map(|(name, written)| {
        let config = UpstreamConfig::new(url::upstream(written).expect("is a URL"));
        UpstreamConfig { name: name.to_string(), ..config }
    });
    let config = Config { upstreams: upstreams.collect(), ..Config::default() };
    let (fleet, mut keeper) = Fleet::new(&config, Observer::default()).expect("it needs no file");
    fleet.set_balancers(own, &[3 - own], host);
    works(&mut keeper);
    (fleet, keeper)
}

fn upstream(fleet: &Fleet) -> Arc<Upstream> {
    fleet.snapshot().entries[0].upstream.clone()
}

fn card(id: &str) -> ModelCard {
    let raw = format!(r#"{{"id":"{id}","object":"model","max_model_len":8}}"#);
    ModelCard { id: id.into(), raw, max_model_len: Some(8), parent: None }
}

/// Brings the reports of one balancer to the other, after `age`.
fn carry(from: &Fleet, to: &Fleet, keeper: &mut Keeper, age: Duration) -> usize {
    let reports = from.take_reports(usize::MAX);
    to.apply_reports(1, &reports, age);
    handle_all(keeper);
    reports.len()
}

#[tokio::test(start_paused = true)]
async fn applies_what_a_sibling_found() {
    let ((one, _), (other, mut keeper)) =
        (balancer(1, &[("a", "http://gpu:1")], "x"), balancer(2, &[("a", "http://gpu:1")], "y"));
    let (ours, theirs) = (upstream(&one), upstream(&other));
    // Later than the other's own probe.
    tokio::time::advance(SECOND).await;
    let report = ProbeReport { models: vec![card("m")], version: Some("0.32.0".into()) };
    one.shared.put_probe(&ours, Some(&report), &[]);
    let metrics = EngineMetrics {
        running: Some(5),
        waiting: Some(1),
        kv_usage: Some(0.5),
        cache_tokens: Some(4096),
        started: Some(100.0),
        prefix_caching: Some(false),
    };
    one.shared.put_engine(&ours, &metrics, Some(ForeignLoad { requests: 2, tokens: 300 }));
    one.mark_busy(&ours, Some(10 * SECOND));
    assert_eq!(carry(&one, &other, &mut keeper, SECOND / 10), 1, "one report has all parts");
    let now = now();
    assert_eq!(theirs.foreign(now), ForeignLoad { requests: 2, tokens: 300 });
    let gauges = theirs.gauge_report(now).expect("is known");
    assert_eq!((gauges.running, gauges.waiting, gauges.kv_usage), (Some(5), Some(1), Some(0.5)));
    let left = theirs.busy_until(now).expect("is full").saturating_duration_since(now);
    assert!(left <= 10 * SECOND && left > 9 * SECOND, "{left:?}");
    let snapshot = other.snapshot();
    let entry = &snapshot.entries[0];
    assert_eq!((entry.cache_tokens, entry.version.as_deref()), (Some(4096), Some("0.32.0")));
    assert!(entry.serves("m"));
    assert_eq!(theirs.sight().state, SightState::Blind, "the engine caches no prompts");
    // A later start of the process is a restart here too.
    let before = entry.incarnation;
    let restarted = EngineMetrics { started: Some(200.0), ..metrics };
    one.shared.put_engine(&ours, &restarted, None);
    carry(&one, &other, &mut keeper, Duration::ZERO);
    assert_eq!(other.snapshot().entries[0].incarnation, before + 1);
    // What was heard is not published again.
    assert_eq!(other.take_reports(usize::MAX), []);
}

/// A report that differs from the own view changes no state and leads to an own probe.
#[tokio::test(start_paused = true)]
async fn a_report_changes_no_state() {
    let ((one, _), (other, mut keeper)) =
        (balancer(1, &[("a", "http://gpu:1")], "x"), balancer(2, &[("a", "http://gpu:1")], "y"));
    let (ours, theirs) = (upstream(&one), upstream(&other));
    tokio::time::advance(SECOND).await;
    one.shared.put_probe(&ours, None, &[]);
    carry(&one, &other, &mut keeper, Duration::ZERO);
    assert_eq!(condition(&keeper), UpstreamCondition::Works);
    assert!(theirs.live.duty().is_in_doubt());
    // The upstream fails here, and works for the sibling.
    let (other, mut keeper) = balancer(2, &[("a", "http://gpu:1")], "y");
    crate::fleet::keeper::tests::fails(&mut keeper);
    assert_eq!(condition(&keeper), UpstreamCondition::Fails);
    tokio::time::advance(SECOND).await;
    for _ in 0..10 {
        let report = ProbeReport { models: vec![card("m")], version: Some("9".into()) };
        one.shared.put_probe(&ours, Some(&report), &[]);
        carry(&one, &other, &mut keeper, Duration::ZERO);
    }
    assert_eq!(condition(&keeper), UpstreamCondition::Fails);
    assert!(upstream(&other).live.duty().is_in_doubt());
    assert!(!other.snapshot().entries[0].serves("m"), "own failures win over the report as a whole");
}

#[tokio::test(start_paused = true)]
async fn ignores_old_reports_and_reports_on_other_servers() {
    // Names, URLs and machines, and whether both balancers mean the same server.
    let table = [
        ("http://gpu:1", "http://gpu:1", "y", true),
        ("http://gpu:1", "http://gpu:2", "y", false),
        ("http://gpu:1", "https://gpu:1", "y", false),
        ("http://127.0.0.1:1", "http://127.0.0.1:1", "y", false),
        ("http://127.0.0.1:1", "http://127.0.0.1:1", "x", true),
        ("http://localhost:1", "http://localhost:1", "y", false),
        ("http://[::1]:1", "http://[::1]:1", "y", false),
        ("unix:/run/a", "unix:/run/a", "y", false),
        ("unix:/run/a", "unix:/run/a", "x", true),
    ];
    for (ours, theirs, host, same) in table {
        let ((one, _), (other, mut keeper)) =
            (balancer(1, &[("a", ours)], "x"), balancer(2, &[("a", theirs)], host));
        one.mark_busy(&upstream(&one), None);
        carry(&one, &other, &mut keeper, Duration::ZERO);
        assert_eq!(upstream(&other).busy_until(now()).is_some(), same, "{ours} {theirs} {host}");
    }
    let ((one, _), (other, mut keeper)) =
        (balancer(1, &[("a", "http://gpu:1")], "x"), balancer(2, &[("a", "http://gpu:1")], "y"));
    let (ours, theirs) = (upstream(&one), upstream(&other));
    tokio::time::advance(60 * SECOND).await;
    one.shared.put_probe(&ours, None, &[]);
    one.shared.put_engine(&ours, &EngineMetrics { started: Some(1.0), ..EngineMetrics::default() }, None);
    one.mark_busy(&ours, Some(SECOND));
    carry(&one, &other, &mut keeper, 30 * SECOND);
    assert!(!theirs.live.duty().is_in_doubt());
    assert_eq!((theirs.gauge_report(now()), theirs.busy_until(now())), (None, None));
    // Without Redis neither publishes nor applies.
    one.mark_busy(&ours, Some(60 * SECOND));
    let reports = one.take_reports(usize::MAX);
    other.set_balancers(2, &[], "y");
    other.apply_reports(1, &reports, Duration::ZERO);
    assert_eq!(theirs.busy_until(now()), None);
    other.mark_busy(&theirs, None);
    assert_eq!(other.take_reports(usize::MAX), []);
}

#[tokio::test(start_paused = true)]
async fn reads_a_changed_list_of_models_that_a_report_does_not_have() {
    let ((one, _), (other, mut keeper)) =
        (balancer(1, &[("a", "http://gpu:1")], "x"), balancer(2, &[("a", "http://gpu:1")], "y"));
    let (ours, theirs) = (upstream(&one), upstream(&other));
    let long = |id: &str| ModelCard {
        raw: format!(r#"{{"id":"{id}","x":"{}"}}"#, "x".repeat(MAX_CARDS_BYTES)),
        ..card(id)
    };
    let found = |card: ModelCard| ProbeReport { models: vec![card], version: None };
    tokio::time::advance(SECOND).await;
    one.shared.put_probe(&ours, Some(&found(long("m"))), &[]);
    assert_eq!(one.shared.pending()[&ours.id].cards, None, "the list is too long for a report");
    carry(&one, &other, &mut keeper, Duration::ZERO);
    assert!(theirs.live.duty().is_in_doubt());
    // Cards that are not the ones of the hash are not taken over.
    let (other, mut keeper) = balancer(2, &[("a", "http://gpu:1")], "y");
    tokio::time::advance(SECOND).await;
    one.shared.put_probe(&ours, Some(&found(card("m"))), &[]);
    let mut reports = one.take_reports(usize::MAX);
    reports[0].cards = Some(list(&[card("evil")]));
    other.apply_reports(1, &reports, Duration::ZERO);
    handle_all(&mut keeper);
    assert!(!other.snapshot().serves_model("evil") && upstream(&other).live.duty().is_in_doubt());
    // The operator's list needs no reading.
    assert_eq!(models_hash(&[card("m")]), models_hash(&[ModelCard { raw: String::new(), ..card("m") }]));
    let longer = ModelCard { max_model_len: Some(9), ..card("m") };
    assert_ne!(models_hash(&[card("m")]), models_hash(&[longer]));
}

#[tokio::test(start_paused = true)]
async fn one_failure_is_enough_while_a_siblings_breaker_is_open() {
    let ((one, _), (other, mut keeper)) =
        (balancer(1, &[("a", "http://gpu:1")], "x"), balancer(2, &[("a", "http://gpu:1")], "y"));
    let (ours, theirs) = (upstream(&one), upstream(&other));
    one.shared.put_trip(&ours, now() + 5 * SECOND);
    carry(&one, &other, &mut keeper, Duration::ZERO);
    assert_eq!(condition(&keeper), UpstreamCondition::Works, "the report takes no requests away");
    theirs.live.good_answers.fetch_add(100, Relaxed);
    other.report(&theirs, crate::fleet::UpstreamSignal::Failed { placed: now() });
    handle_all(&mut keeper);
    let state = |fleet: &Fleet| fleet.snapshot().entries[0].state();
    assert_eq!(state(&other), crate::fleet::UpstreamState::Tripped);
    // Later five are needed again.
    let (other, mut keeper) = balancer(2, &[("a", "http://gpu:1")], "y");
    one.shared.put_trip(&ours, now() + 5 * SECOND);
    carry(&one, &other, &mut keeper, Duration::ZERO);
    tokio::time::advance(6 * SECOND).await;
    other.report(&upstream(&other), crate::fleet::UpstreamSignal::Failed { placed: now() });
    handle_all(&mut keeper);
    assert_eq!(state(&other), crate::fleet::UpstreamState::Ready);
}

#[tokio::test(start_paused = true)]
async fn takes_reports_of_a_bounded_size() {
    let names: Vec<String> = (0..20).map(|at| format!("u{at}")).collect();
    let upstreams: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "http://gpu:1")).collect();
    let (fleet, _keeper) = balancer(1, &upstreams, "x");
    for entry in &fleet.snapshot().entries {
        fleet.mark_busy(&entry.upstream, None);
        fleet.mark_busy(&entry.upstream, None);
    }
    let mut counts = Vec::new();
    while let taken @ 1.. = fleet.take_reports(1000).len() {
        counts.push(taken);
    }
    assert_eq!(counts, [4, 4, 4, 4, 4]);
    fleet.mark_busy(&fleet.snapshot().entries[0].upstream, None);
    assert_eq!(fleet.take_reports(1).len(), 1);
}
