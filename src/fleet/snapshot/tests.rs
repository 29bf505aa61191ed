//! Who may take a request, by table.

mod floor;
mod slow_start;

use super::super::breaker::{ProbeMiss, Sign};
use super::super::engine_load::ForeignLoad;
use super::super::queue::Queue;
use super::*;
use crate::config::types::{Discovered, UpstreamConfig};
use crate::config::url;
use crate::observe::Observer;

fn rules() -> BreakerRules {
    let breaker = Breaker { failures: 1, ..Breaker::default() };
    BreakerRules { health: Health::default(), breaker }
}

/// For how long a source is waited for.
const LATE: Duration = Duration::from_secs(1);

/// An upstream that serves the models, after a script for its machine; see `act`.
struct ScriptedUpstream {
    script: &'static str,
    models: &'static [&'static str],
}

fn act(word: &str, machine: &mut Machine, entry: &mut SnapshotEntry, now: Instant) {
    match word {
        "ready" => machine.probed(Ok(()), 0, now, &rules()),
        "missed" => machine.probed(Err(ProbeMiss::Silent), 0, now, &rules()),
        // Of its making.
        "of-gym" | "of-gym=m" | "of-gym=n" | "of-other" => {}
        "refused" => machine.seen(Sign::Unreached { refused: true }, 0, now, &rules()),
        "tripped" => machine.seen(Sign::Failed, 0, now, &rules()),
        "tripped-later" => machine.seen(Sign::Failed, 0, now + Duration::from_secs(1), &rules()),
        "drained" => machine.drain(true, now),
        "removing" => entry.removing = true,
        "busy" => entry.upstream.busy(None, now),
        "busier" => entry.upstream.busy(Some(Duration::from_secs(600)), now),
        "taken" => {
            entry.upstream.live.gauges.active.store(2, Relaxed);
        }
        "trial" => entry.upstream.live.trial.store(true, Relaxed),
        other => panic!("{other}"),
    }
}

/// Names are `u0`, `u1`, ids 10, 11, ...; the limit of each is 2.
fn snapshot(given: &[ScriptedUpstream], now: Instant) -> Snapshot {
    let queue = Queue::new(9, Observer::default());
    let make = |(index, given): (usize, &ScriptedUpstream)| {
        let url = url::upstream(&format!("http://u{index}:1")).expect("is a URL");
        let said = given.script.split(' ').find_map(|word| word.strip_prefix("of-"));
        let discovered = said.map(|said| {
            let (source, model) = said.split_once('=').map_or((said, None), |(of, model)| (of, Some(model)));
            Discovered { source: source.into(), model: model.map(Into::into) }
        });
        let config = UpstreamConfig { max_active: Some(2), discovered, ..UpstreamConfig::new(url) };
        let upstream = Upstream::new(10 + index, config, queue.clone()).expect("it needs no file");
        let mut entry = SnapshotEntry::unknown(Arc::new(upstream));
        let card = |id: &&str| ModelCard {
            id: (*id).to_string(),
            raw: String::new(),
            max_model_len: None,
            parent: id.starts_with('+').then(|| "m".to_string()),
        };
        entry.models = Arc::new(given.models.iter().map(card).collect());
        let mut machine = Machine::new(now);
        given.script.split_whitespace().for_each(|word| act(word, &mut machine, &mut entry, now));
        entry.status = machine.status(&rules());
        entry
    };
    Snapshot::new(given.iter().enumerate().map(make).collect(), Vec::new())
}

fn of(scripts: &[&'static str]) -> Vec<ScriptedUpstream> {
    scripts.iter().map(|script| ScriptedUpstream { script, models: &["m"] }).collect()
}

fn ask(snapshot: &Snapshot, query: &Query<'_>, now: Instant) -> (Routing, Vec<usize>) {
    let mut out = Vec::new();
    let routing = snapshot.candidates(query, now, &mut out);
    (routing, out.iter().map(|candidate| candidate.index).collect())
}

#[test]
fn who_may_have_a_request_follows_from_readiness_room_and_what_was_tried() {
    use Routing::{Candidates, NotReady, Tried};
    let full = Routing::Full { until: None };
    type Row<'r> = (&'r [&'static str], &'r [usize], Routing, &'r [usize]);
    let table: &[Row<'_>] = &[
        (&["ready", "ready"], &[], Candidates, &[0, 1]),
        (&["ready", ""], &[], Candidates, &[0]),
        (&["", ""], &[], NotReady, &[]),
        (&["ready drained", "ready removing"], &[], NotReady, &[]),
        // The doubtful get what nobody better can have.
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
        // A trip lets nothing through before its time.
        (&["ready tripped", "ready"], &[], Candidates, &[1]),
        (&["ready tripped", ""], &[11], Candidates, &[0]),
        (&["ready tripped missed missed missed"], &[], NotReady, &[]),
    ];
    let now = Instant::now();
    for (scripts, tried, routing, candidates) in table {
        let query = Query { model: Some("m"), tried, ..Query::default() };
        let found = ask(&snapshot(&of(scripts), now), &query, now);
        assert_eq!(found, (*routing, candidates.to_vec()), "{scripts:?} without {tried:?}");
    }
}

#[test]
fn those_tried_may_be_tried_again_when_that_is_said_and_nobody_else_is_there() {
    let now = Instant::now();
    let both = snapshot(&of(&["ready", "ready"]), now);
    let again = |tried| Query { model: Some("m"), tried, again: true, ..Query::default() };
    assert_eq!(ask(&both, &again(&[10]), now), (Routing::Candidates, vec![1]));
    assert_eq!(ask(&both, &again(&[10, 11]), now), (Routing::Candidates, vec![0, 1]));
    let one_full = snapshot(&of(&["ready taken", "ready"]), now);
    assert_eq!(ask(&one_full, &again(&[11]), now), (Routing::Candidates, vec![1]), "it need not wait");
    let away = |snapshot: &Snapshot| ask(snapshot, &Query { away: &[11], ..again(&[11]) }, now);
    assert_eq!(
        away(&one_full),
        (Routing::Full { until: None }, vec![]),
        "better to wait than to be sent away"
    );
    let alone = snapshot(&of(&["", "ready"]), now);
    assert_eq!(away(&alone), (Routing::Candidates, vec![1]), "there is nobody to wait for");
    let both_full = snapshot(&of(&["ready taken", "ready taken"]), now);
    assert_eq!(ask(&both_full, &again(&[11]), now), (Routing::Full { until: None }, vec![]));
}

#[test]
fn only_one_may_have_it_when_it_is_named() {
    let now = Instant::now();
    let both = snapshot(&of(&["ready", "ready taken"]), now);
    let only = |id| Query { only: Some(id), ..Query::default() };
    assert_eq!(ask(&both, &only(10), now), (Routing::Candidates, vec![0]));
    assert_eq!(ask(&both, &only(11), now), (Routing::Full { until: None }, vec![]));
    assert_eq!(ask(&both, &only(12), now), (Routing::NotReady, vec![]));
    assert_eq!(both.by_name("u1:1").map(|entry| entry.upstream.id), Some(11));
    assert!(both.by_id(12).is_none() && both.by_name("u2:1").is_none());
}

#[test]
fn a_full_engine_is_avoided_until_its_time_is_over() {
    let now = Instant::now();
    let after = |seconds| now + Duration::from_secs_f64(seconds);
    let both = snapshot(&of(&["ready busy", "ready busier"]), now);
    let query = Query::default();
    let (routing, _) = ask(&both, &query, now);
    let Routing::Full { until: Some(until) } = routing else { panic!("{routing:?}") };
    assert!((after(0.9)..=after(1.1)).contains(&until), "the first of the two");
    assert_eq!(ask(&both, &query, after(1.1)), (Routing::Candidates, vec![0]));
    assert_eq!(ask(&both, &query, after(59.0)), (Routing::Candidates, vec![0]));
    assert_eq!(ask(&both, &query, after(60.1)), (Routing::Candidates, vec![0, 1]), "a minute is the most");
}

#[test]
fn after_a_trip_one_request_is_let_through_and_none_that_failed_already() {
    let now = Instant::now();
    let later = now + rules().breaker.open;
    let query = Query::default();
    let retry = Query { tried: &[99], ..query };
    let both = snapshot(&of(&["ready tripped", "ready"]), now);
    assert_eq!(ask(&both, &query, later), (Routing::Candidates, vec![0, 1]));
    assert_eq!(ask(&both, &retry, later), (Routing::Candidates, vec![1]));
    let on_trial = snapshot(&of(&["ready tripped trial", "ready"]), now);
    assert_eq!(ask(&on_trial, &query, later), (Routing::Candidates, vec![1]));
}

#[test]
fn a_name_that_nobody_serves_is_unknown_once_nobody_can_come_with_it() {
    let now = Instant::now();
    let given = |scripts: [&'static str; 2]| {
        [
            ScriptedUpstream { script: scripts[0], models: &["a"] },
            ScriptedUpstream { script: scripts[1], models: &["b"] },
        ]
    };
    let routing = |scripts, model, now: Instant| {
        let query = Query { model: Some(model), ..Query::default() };
        ask(&snapshot(&given(scripts), now), &query, now)
    };
    assert_eq!(routing(["ready", "ready"], "b", now), (Routing::Candidates, vec![1]));
    assert_eq!(routing(["ready", "ready"], "c", now), (Routing::NoSuchModel, vec![]));
    assert_eq!(routing(["ready", "ready refused"], "b", now), (Routing::Candidates, vec![1]));
    assert_eq!(routing(["ready", "ready drained"], "b", now), (Routing::NotReady, vec![]));
    assert_eq!(routing(["ready", "ready removing"], "b", now), (Routing::Candidates, vec![0]));
    assert_eq!(routing(["ready", ""], "c", now), (Routing::NotReady, vec![]), "it may still come");
    let young = snapshot(&given(["ready", ""]), now);
    let query = Query { model: Some("c"), ..Query::default() };
    assert_eq!(ask(&young, &query, now + DISCOVERY_GRACE).0, Routing::NoSuchModel);
}

#[test]
fn requests_of_others_are_work_and_take_no_place() {
    let now = Instant::now();
    let both = snapshot(&of(&["ready", "ready"]), now);
    both.entries[1]
        .upstream
        .live
        .engine_load
        .set(ForeignLoad { requests: 5, tokens: 700 }, now + DISCOVERY_GRACE);
    let mut out = Vec::new();
    let query = Query { tokens: 30, ..Query::default() };
    assert_eq!(both.candidates(&query, now, &mut out), Routing::Candidates, "its limit is two");
    let loads: Vec<_> = out.iter().map(|one| (one.active, one.backlog, one.context, one.missing)).collect();
    assert_eq!(loads, [(0, 0, 0, 30), (5, 700, 700, 30)]);
}

/// A model that nobody knows may be one of those that a source will name.
#[test]
fn an_unknown_model_may_come_while_a_source_is_silent() {
    let now = Instant::now();
    let until = now + DISCOVERY_GRACE;
    let query = |model| Query { model: Some(model), ..Query::default() };
    let table = [
        (None, "x", now, Routing::Candidates),
        (Some(until), "x", now, Routing::NotReady),
        (Some(until), "m", now, Routing::Candidates),
        (Some(until), "x", until, Routing::NoSuchModel),
    ];
    for (awaited, model, now, expected) in table {
        let snapshot = snapshot(&of(&["ready"]), now).awaiting(awaited);
        let (routing, _) = ask(&snapshot, &query(model), now);
        assert_eq!(routing, expected, "{model}, awaited {}", awaited.is_some());
    }
}

#[test]
fn there_is_one_base_model_when_all_whom_sources_name_have_it() {
    let now = Instant::now();
    type Row = (&'static [(&'static str, &'static [&'static str])], Option<&'static str>);
    let table: &[Row] = &[
        (&[], None),
        (&[("ready of-gym", &["m"])], Some("m")),
        (&[("ready of-gym", &["m", "+lora"]), ("ready of-other", &["m"])], Some("m")),
        (&[("ready of-gym", &["+lora", "m", "m"])], Some("m")),
        (&[("ready of-gym", &["m", "n"])], None),
        (&[("ready of-gym", &["m"]), ("ready of-other", &["n"])], None),
        // Nothing is guessed of those that the file or an operator names, whatever they serve now.
        (&[("ready", &["m"])], None),
        (&[("ready", &["m"]), ("ready", &["m"])], None),
        (&[("ready of-gym", &["m"]), ("ready", &["m"])], None),
        (&[("ready of-gym", &["m"]), ("", &[])], None),
        // It is remembered, and may be back at any time.
        (&[("ready of-gym", &["m"]), ("ready missed missed missed of-other", &["n"])], None),
        (&[("ready of-gym", &["m"]), ("ready removing of-other", &["n"])], Some("m")),
        // Of some nobody knows what they serve.
        (&[("ready of-gym", &["m"]), ("ready of-other", &[])], None),
        (&[("ready of-gym", &[])], None),
        (&[("ready of-gym", &["m"]), ("missed of-other", &[])], None),
        // A source's word, for engines that have several names, or are not up yet.
        (&[("ready of-gym=n", &["m", "n"])], Some("n")),
        (&[("ready of-gym=n", &["m"])], Some("m")),
        (&[(" of-gym=n", &[])], Some("n")),
        (&[("ready of-gym", &["m"]), (" of-gym=m", &[])], Some("m")),
        // Of one source, the latest that is ready.
        (&[("ready of-gym", &["m"]), (" of-gym", &[])], Some("m")),
        (&[("ready of-gym", &["m"]), ("ready of-gym", &["n"])], Some("n")),
        (&[("ready of-gym", &["m"]), (" of-gym=n", &[])], Some("m")),
        (&[("ready missed missed missed of-gym", &["m"]), (" of-gym=n", &[])], Some("n")),
    ];
    for (given, wanted) in table {
        let all: Vec<ScriptedUpstream> =
            given.iter().map(|(script, models)| ScriptedUpstream { script, models }).collect();
        let snapshot = snapshot(&all, now);
        assert_eq!(snapshot.only_base(None, now), *wanted, "{given:?}");
    }
}

#[test]
fn a_route_asks_what_its_own_upstreams_serve() {
    let now = Instant::now();
    let later = now + DISCOVERY_GRACE;
    let given = [("ready of-gym", &["m"] as &[_]), ("ready of-other", &["n"]), ("missed of-other", &[])];
    let make = || snapshot(&given.map(|(script, models)| ScriptedUpstream { script, models }), now);
    let (known, awaiting) = (make(), make().awaiting(Some(now + LATE)));
    for (among, base, waits) in [
        (None, None, true),
        (Some(&[10][..]), Some("m"), false),
        (Some(&[11, 12]), Some("n"), false),
        (Some(&[12]), None, false),
        (Some(&[10, 99]), Some("m"), true),
    ] {
        assert_eq!(known.only_base(among, now), base, "{among:?}");
        let soon = if waits { None } else { base };
        assert_eq!(awaiting.only_base(among, now), soon, "{among:?} while a source is silent");
        assert_eq!(awaiting.only_base(among, now + LATE), base, "{among:?} when it has been for long");
    }
    let routing = |snapshot: &Snapshot, model, among: &[usize], now| {
        ask(snapshot, &Query { model: Some(model), among: Some(among), ..Query::default() }, now).0
    };
    use Routing::{Candidates, NoSuchModel, NotReady};
    for (model, among, soon, late) in [
        ("m", &[10][..], Candidates, Candidates),
        ("m", &[11], NoSuchModel, NoSuchModel),
        ("m", &[11, 12], NotReady, NoSuchModel),
        ("m", &[12], NotReady, NotReady),
        ("nobody", &[10], NoSuchModel, NoSuchModel),
    ] {
        assert_eq!(routing(&known, model, among, now), soon, "{model} {among:?}");
        assert_eq!(routing(&known, model, among, later), late, "{model} {among:?}, later");
    }
    assert_eq!(routing(&awaiting, "m", &[11, 99], now), NotReady, "it may be the source's");
    assert!(known.is_ready_with("n", None) && !known.is_ready_with("n", Some(&[10])));
}
