//! The candidates of a request, by tables.

mod floor;
mod membership;
mod models;
mod slow_start;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::super::breaker::{BreakerMachine, BreakerRules, ProbeMiss, UpstreamSignal};
use super::super::engine_load::ForeignLoad;
use super::super::queue::Queue;
use super::super::upstream::Upstream;
use super::*;
use crate::aggregate::ModelCard;
use crate::config::types::{DiscoveryOrigin, Health, UpstreamConfig};
use crate::config::url;
use crate::observe::Observer;

fn rules() -> BreakerRules {
    let breaker = Breaker { failures: 1, ..Breaker::default() };
    BreakerRules { health: Health::default(), breaker }
}

/// How long an unanswered source is awaited.
const LATE: Duration = Duration::from_secs(1);

/// An upstream that serves the models, after a script of events; see `act`.
struct ScriptedUpstream {
    script: &'static str,
    models: &'static [&'static str],
}

fn act(word: &str, machine: &mut BreakerMachine, entry: &mut SnapshotEntry, now: Instant) {
    match word {
        "ready" => machine.probed(Ok(()), 0, now, &rules()),
        "missed" => machine.probed(Err(ProbeMiss::Silent), 0, now, &rules()),
        // Read by `snapshot`.
        "of-gym" | "of-gym=m" | "of-gym=n" | "of-other" | "lists-b" | "lists-c" => {}
        "refused" => {
            machine.signalled(UpstreamSignal::Unreached { refused: true, placed: now }, 0, now, &rules())
        }
        "tripped" => machine.signalled(UpstreamSignal::Failed { placed: now }, 0, now, &rules()),
        "tripped-later" => machine.signalled(
            UpstreamSignal::Failed { placed: now },
            0,
            now + Duration::from_secs(1),
            &rules(),
        ),
        "drained" => machine.drain(true, now),
        "removing" => entry.removing = true,
        "busy" => entry.upstream.mark_busy(None, now),
        "busier" => entry.upstream.mark_busy(Some(Duration::from_secs(600)), now),
        "taken" => {
            entry.upstream.live.gauges.active.store(2, Relaxed);
        }
        "trial" => entry.upstream.live.trial.store(true, Relaxed),
        other => panic!("{other}"),
    }
}

/// Builds a snapshot of upstreams named `u0`, `u1`, ... with ids 10, 11, ... and a `max_active` of 2.
fn snapshot(given: &[ScriptedUpstream], now: Instant) -> Snapshot {
    let queue = Queue::new(9, Observer::default());
    let make = |(index, given): (usize, &ScriptedUpstream)| {
        let url = url::upstream(&format!("http://u{index}:1")).expect("is a URL");
        let origin = given.script.split(' ').find_map(|word| word.strip_prefix("of-"));
        let discovered = origin.map(|origin| {
            let (source, model) =
                origin.split_once('=').map_or((origin, None), |(of, model)| (of, Some(model)));
            DiscoveryOrigin { source: source.into(), model: model.map(Into::into) }
        });
        let listed = given.script.split(' ').find_map(|word| word.strip_prefix("lists-"));
        let models = listed.map(|model| vec![model.to_string()]);
        let config = UpstreamConfig { max_active: Some(2), discovered, models, ..UpstreamConfig::new(url) };
        let upstream =
            Upstream::new(10 + index, config, queue.clone(), &Default::default()).expect("it needs no file");
        let mut entry = SnapshotEntry::unknown(Arc::new(upstream));
        let card = |id: &&str| ModelCard {
            id: (*id).to_string(),
            raw: String::new(),
            max_model_len: None,
            parent: id.starts_with('+').then(|| "m".to_string()),
        };
        entry.models = Arc::new(given.models.iter().map(card).collect());
        let mut machine = BreakerMachine::new(now);
        given.script.split_whitespace().for_each(|word| act(word, &mut machine, &mut entry, now));
        entry.status = machine.status(&rules());
        entry
    };
    Snapshot::new(given.iter().enumerate().map(make).collect(), Vec::new(), None)
}

fn of(scripts: &[&'static str]) -> Vec<ScriptedUpstream> {
    scripts.iter().map(|script| ScriptedUpstream { script, models: &["m"] }).collect()
}

/// Returns the result of a query, and the indices of the candidates.
fn search(snapshot: &Snapshot, query: &UpstreamQuery<'_>, now: Instant) -> (FilterResult, Vec<usize>) {
    let mut out = Vec::new();
    let routing = snapshot.candidates(query, now, &mut out);
    (routing, out.iter().map(|candidate| candidate.index).collect())
}

#[test]
fn filters_by_readiness_room_and_earlier_attempts() {
    use FilterResult::{Candidates, NotReady, Tried};
    let full = FilterResult::Full { until: None };
    type Row<'r> = (&'r [&'static str], &'r [usize], FilterResult, &'r [usize]);
    let table: &[Row<'_>] = &[
        (&["ready", "ready"], &[], Candidates, &[0, 1]),
        (&["ready", ""], &[], Candidates, &[0]),
        (&["", ""], &[], NotReady, &[]),
        (&["ready drained", "ready removing"], &[], NotReady, &[]),
        // A doubtful upstream takes requests that no better one can take.
        (&["ready", "ready refused"], &[], Candidates, &[0]),
        (&["", "ready refused"], &[], Candidates, &[1]),
        (&["ready", "ready refused"], &[10], Candidates, &[1]),
        (&["ready taken", "ready refused"], &[], full, &[]),
        // Room.
        (&["ready taken", "ready"], &[], Candidates, &[1]),
        (&["ready taken", "ready taken"], &[], full, &[]),
        (&["ready taken", ""], &[], full, &[]),
        // What was tried.
        (&["ready", "ready"], &[11], Candidates, &[0]),
        (&["ready", "ready"], &[10, 11], Tried, &[]),
        (&["ready taken", "ready"], &[11], full, &[]),
        (&["", "ready"], &[11], Tried, &[]),
        // A tripped upstream admits nothing before the end of its trip.
        (&["ready tripped", "ready"], &[], Candidates, &[1]),
        (&["ready tripped", ""], &[11], Candidates, &[0]),
        (&["ready tripped missed missed missed"], &[], NotReady, &[]),
    ];
    let now = Instant::now();
    for (scripts, tried, routing, candidates) in table {
        let query = UpstreamQuery { model: Some("m"), tried, ..UpstreamQuery::default() };
        let found = search(&snapshot(&of(scripts), now), &query, now);
        assert_eq!(found, (*routing, candidates.to_vec()), "{scripts:?} without {tried:?}");
    }
}

#[test]
fn offers_tried_upstreams_again_when_allowed_and_no_other_is_left() {
    let now = Instant::now();
    let both = snapshot(&of(&["ready", "ready"]), now);
    let again = |tried| UpstreamQuery { model: Some("m"), tried, again: true, ..UpstreamQuery::default() };
    assert_eq!(search(&both, &again(&[10]), now), (FilterResult::Candidates, vec![1]));
    assert_eq!(search(&both, &again(&[10, 11]), now), (FilterResult::Candidates, vec![0, 1]));
    let one_full = snapshot(&of(&["ready taken", "ready"]), now);
    assert_eq!(
        search(&one_full, &again(&[11]), now),
        (FilterResult::Candidates, vec![1]),
        "the other upstream is tried again at once"
    );
    let declined =
        |snapshot: &Snapshot| search(snapshot, &UpstreamQuery { declined: &[11], ..again(&[11]) }, now);
    assert_eq!(
        declined(&one_full),
        (FilterResult::Full { until: None }, vec![]),
        "waits rather than returning to the upstream that declined"
    );
    let alone = snapshot(&of(&["", "ready"]), now);
    assert_eq!(declined(&alone), (FilterResult::Candidates, vec![1]), "no other upstream is ready");
    let both_full = snapshot(&of(&["ready taken", "ready taken"]), now);
    assert_eq!(search(&both_full, &again(&[11]), now), (FilterResult::Full { until: None }, vec![]));
}

#[test]
fn offers_only_the_upstream_that_the_query_requires() {
    let now = Instant::now();
    let both = snapshot(&of(&["ready", "ready taken"]), now);
    let only = |id| UpstreamQuery { only: Some(id), ..UpstreamQuery::default() };
    assert_eq!(search(&both, &only(10), now), (FilterResult::Candidates, vec![0]));
    assert_eq!(search(&both, &only(11), now), (FilterResult::Full { until: None }, vec![]));
    assert_eq!(search(&both, &only(12), now), (FilterResult::NotReady, vec![]));
    assert_eq!(both.by_name("u1:1").map(|entry| entry.upstream.id), Some(11));
    assert!(both.by_id(12).is_none() && both.by_name("u2:1").is_none());
}

#[test]
fn avoids_a_full_engine_until_its_retry_after_ends() {
    let now = Instant::now();
    let after = |seconds| now + Duration::from_secs_f64(seconds);
    let both = snapshot(&of(&["ready busy", "ready busier"]), now);
    let query = UpstreamQuery::default();
    let (routing, _) = search(&both, &query, now);
    let FilterResult::Full { until: Some(until) } = routing else { panic!("{routing:?}") };
    assert!((after(0.9)..=after(1.1)).contains(&until), "the first of the two");
    assert_eq!(search(&both, &query, after(1.1)), (FilterResult::Candidates, vec![0]));
    assert_eq!(search(&both, &query, after(59.0)), (FilterResult::Candidates, vec![0]));
    assert_eq!(
        search(&both, &query, after(60.1)),
        (FilterResult::Candidates, vec![0, 1]),
        "at most a minute"
    );
}

#[test]
fn offers_an_upstream_after_its_trip_to_one_request_that_has_not_failed() {
    let now = Instant::now();
    let later = now + rules().breaker.open;
    let query = UpstreamQuery::default();
    let retry = UpstreamQuery { tried: &[99], ..query };
    let both = snapshot(&of(&["ready tripped", "ready"]), now);
    assert_eq!(search(&both, &query, later), (FilterResult::Candidates, vec![0, 1]));
    assert_eq!(search(&both, &retry, later), (FilterResult::Candidates, vec![1]));
    let on_trial = snapshot(&of(&["ready tripped trial", "ready"]), now);
    assert_eq!(search(&on_trial, &query, later), (FilterResult::Candidates, vec![1]));
}

#[test]
fn reports_an_unknown_model_once_no_upstream_may_still_serve_it() {
    let now = Instant::now();
    let given = |scripts: [&'static str; 2]| {
        [
            ScriptedUpstream { script: scripts[0], models: &["a"] },
            ScriptedUpstream { script: scripts[1], models: &["b"] },
        ]
    };
    let routing = |scripts, model, now: Instant| {
        let query = UpstreamQuery { model: Some(model), ..UpstreamQuery::default() };
        search(&snapshot(&given(scripts), now), &query, now)
    };
    assert_eq!(routing(["ready", "ready"], "b", now), (FilterResult::Candidates, vec![1]));
    assert_eq!(routing(["ready", "ready"], "c", now), (FilterResult::NoSuchModel, vec![]));
    assert_eq!(routing(["ready", "ready refused"], "b", now), (FilterResult::Candidates, vec![1]));
    assert_eq!(routing(["ready", "ready drained"], "b", now), (FilterResult::NotReady, vec![]));
    assert_eq!(routing(["ready", "ready removing"], "b", now), (FilterResult::Candidates, vec![0]));
    assert_eq!(
        routing(["ready", ""], "c", now),
        (FilterResult::NotReady, vec![]),
        "an unreached upstream may serve it"
    );
    // An upstream with a configured list serves no other model, whether it was reached or not.
    assert_eq!(routing(["ready", "lists-b"], "c", now).0, FilterResult::NoSuchModel);
    assert_eq!(routing(["ready", "lists-c"], "c", now).0, FilterResult::NotReady);
    let young = snapshot(&given(["ready", ""]), now);
    let query = UpstreamQuery { model: Some("c"), ..UpstreamQuery::default() };
    assert_eq!(search(&young, &query, now + DISCOVERY_GRACE).0, FilterResult::NoSuchModel);
}

#[test]
fn counts_foreign_requests_as_load_but_not_towards_max_active() {
    let now = Instant::now();
    let both = snapshot(&of(&["ready", "ready"]), now);
    both.entries[1]
        .upstream
        .live
        .engine_load
        .set(ForeignLoad { requests: 5, tokens: 700 }, now + DISCOVERY_GRACE);
    let mut out = Vec::new();
    let query = UpstreamQuery { tokens: 30, ..UpstreamQuery::default() };
    assert_eq!(
        both.candidates(&query, now, &mut out),
        FilterResult::Candidates,
        "five foreign requests do not reach max_active"
    );
    let loads: Vec<_> = out.iter().map(|one| (one.active, one.backlog, one.context, one.missing)).collect();
    assert_eq!(loads, [(0, 0, 0, 30), (5, 700, 700, 30)]);
}
