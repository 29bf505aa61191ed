//! Tests of leases: gauges under any sequence of outcomes, and limits across threads.

use super::super::breaker::{BreakerMachine, BreakerRules, UpstreamSignal};
use super::super::queue::Queue;
use super::super::upstream::UpstreamLoad;
use super::*;
use crate::config::types::{Breaker, Health, UpstreamConfig, UpstreamUrl};
use crate::observe::Observer;
use proptest::prelude::*;

/// A ready entry.
fn entry(max_active: Option<u32>) -> SnapshotEntry {
    let url = UpstreamUrl { https: false, host: "gpu".into(), port: 1, unix: None, prefix: String::new() };
    let config = UpstreamConfig { max_active, ..UpstreamConfig::new(url) };
    let upstream = Upstream::new(0, config, Queue::new(9, Observer::default()), &Default::default())
        .expect("it needs no file");
    let mut entry = SnapshotEntry::unknown(Arc::new(upstream));
    let mut machine = BreakerMachine::new(Instant::now());
    machine.probed(Ok(()), 0, Instant::now(), &rules());
    entry.status = machine.status(&rules());
    entry
}

fn rules() -> BreakerRules {
    let breaker = Breaker { failures: 1, ..Breaker::default() };
    BreakerRules { health: Health::default(), breaker }
}

impl Lease {
    pub fn take(entry: &SnapshotEntry, work: RequestWork, now: Instant) -> Option<Self> {
        Lease::take_as(entry, entry.admits(now), work, now)
    }
}

fn take(entry: &SnapshotEntry, tokens: u64) -> Option<Lease> {
    Lease::take(entry, RequestWork { tokens, uncached: tokens, streams: true }, Instant::now())
}

#[test]
fn lowers_the_backlog_at_the_first_byte_and_the_rest_when_dropped() {
    let entry = entry(None);
    let mut lease = take(&entry, 700).expect("there is room");
    assert_eq!(entry.upstream.load(), UpstreamLoad { active: 1, backlog: 700, context: 700 });
    assert!(lease.first_byte(Instant::now()));
    assert!(!lease.first_byte(Instant::now()));
    assert_eq!(entry.upstream.load(), UpstreamLoad { active: 1, backlog: 0, context: 700 });
    drop(lease);
    assert_eq!(entry.upstream.load(), UpstreamLoad::default());
}

#[test]
fn counts_only_uncached_tokens_as_backlog() {
    let entry = entry(None);
    let work = RequestWork { tokens: 700, uncached: 100, streams: true };
    let lease = Lease::take(&entry, work, Instant::now()).expect("there is room");
    assert_eq!(entry.upstream.load(), UpstreamLoad { active: 1, backlog: 100, context: 700 });
    drop(lease);
    assert_eq!(entry.upstream.load(), UpstreamLoad::default());
}

#[test]
fn lowers_the_backlog_of_an_unstreamed_answer_at_its_estimated_end() {
    let entry = entry(None);
    let now = Instant::now();
    let work = RequestWork { tokens: 8000, uncached: 8000, streams: false };
    let mut lease = Lease::take(&entry, work, now).expect("there is room");
    assert_eq!(entry.upstream.load_at(now).backlog, 8000);
    let second = std::time::Duration::from_secs(1);
    assert_eq!(
        entry.upstream.load_at(now + 2 * second),
        UpstreamLoad { active: 1, backlog: 0, context: 8000 }
    );
    assert!(lease.first_byte(now + 3 * second), "the first byte is still reported once");
    drop(lease);
    assert_eq!(entry.upstream.load(), UpstreamLoad::default());
    let early = Lease::take(&entry, work, now).expect("there is room");
    drop(early);
    assert_eq!(entry.upstream.load_at(now + 3 * second), UpstreamLoad::default());
}

/// Milliseconds since the engine began with the head of the backlog.
fn head_millis(entry: &SnapshotEntry, at: Instant) -> u32 {
    entry.upstream.live.forecast.head_millis(millis(at))
}

#[test]
fn the_engine_begins_with_the_next_prompt_when_its_head_is_given_up() {
    let second = std::time::Duration::from_secs(1);
    let (entry, now) = (entry(None), Instant::now());
    for streams in [true, false] {
        // The leases were taken a while ago, so that they can be given up now.
        let begun = now - 30 * second;
        let work = RequestWork { tokens: 4_000_000, uncached: 4_000_000, streams };
        let head = Lease::take(&entry, work, begun).expect("there is room");
        let second_one = Lease::take(&entry, work, begun + second).expect("there is room");
        let third = Lease::take(&entry, work, begun + 2 * second).expect("there is room");
        assert_eq!(head_millis(&entry, begun + 30 * second), 30_000);
        drop(second_one);
        assert_eq!(head_millis(&entry, begun + 30 * second), 30_000, "the head is still read");
        drop(head);
        assert!(head_millis(&entry, Instant::now()) < 10_000, "nothing of the third is read");
        drop(third);
        assert_eq!(entry.upstream.load(), UpstreamLoad::default());
    }
}

#[test]
fn an_answer_whose_prefill_was_over_does_not_begin_another_one() {
    let second = std::time::Duration::from_secs(1);
    let (entry, now) = (entry(None), Instant::now());
    let whole = RequestWork { tokens: 8_000, uncached: 8_000, streams: false };
    let mut whole = Lease::take(&entry, whole, now).expect("there is room");
    assert_eq!(entry.upstream.load_at(now + 2 * second).backlog, 0, "it is over");
    let work = RequestWork { tokens: 80_000, uncached: 80_000, streams: true };
    let long = Lease::take(&entry, work, now + 2 * second).expect("there is room");
    assert!(whole.first_byte(now + 5 * second));
    assert_eq!(head_millis(&entry, now + 6 * second), 4_000, "the engine reads the long one");
    drop((whole, long));
    assert_eq!(entry.upstream.load(), UpstreamLoad::default());
}

#[test]
fn never_exceeds_max_active_across_threads() {
    let entry = entry(Some(3));
    let most = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    if let Some(lease) = take(&entry, 1) {
                        most.fetch_max(entry.upstream.load().active, Relaxed);
                        drop(lease);
                    }
                }
            });
        }
    });
    assert!((1..=3).contains(&most.into_inner()));
    assert_eq!(entry.upstream.load(), UpstreamLoad::default());
}

#[test]
fn admits_one_trial_request_at_a_time_after_a_trip() {
    let mut entry = entry(Some(5));
    let now = Instant::now();
    let mut machine = BreakerMachine::new(now);
    machine.probed(Ok(()), 0, now, &rules());
    machine.signalled(UpstreamSignal::Failed { placed: now }, 0, now, &rules());
    entry.status = machine.status(&rules());
    assert!(Lease::take(&entry, RequestWork::default(), now).is_none(), "the trip is not over");
    let later = now + rules().breaker.open;
    let first = Lease::take(&entry, RequestWork::default(), later);
    assert!(first.is_some());
    assert!(Lease::take(&entry, RequestWork::default(), later).is_none(), "the trial is in flight");
    drop(first);
    let mut judged = Lease::take(&entry, RequestWork::default(), later);
    assert!(judged.is_some(), "the trial ended without a signal and freed its place");
    // Its stream may go on for an hour, over which the upstream may trip again.
    judged.iter_mut().for_each(Lease::end_trial);
    let next = Lease::take(&entry, RequestWork::default(), later);
    assert!(next.is_some(), "its answer was judged");
    drop(judged);
    assert!(Lease::take(&entry, RequestWork::default(), later).is_none(), "the place is the next one's");
}

#[derive(Clone, Debug)]
enum LeaseStep {
    Take(u64, bool),
    FirstByte(prop::sample::Index),
    Drop(prop::sample::Index),
    Panic(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<LeaseStep>> {
    let step = prop_oneof![
        (0u64..1 << 40, any::<bool>()).prop_map(|(tokens, streams)| LeaseStep::Take(tokens, streams)),
        any::<prop::sample::Index>().prop_map(LeaseStep::FirstByte),
        any::<prop::sample::Index>().prop_map(LeaseStep::Drop),
        any::<prop::sample::Index>().prop_map(LeaseStep::Panic),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #[test]
    fn gauges_return_to_zero_after_any_sequence_of_outcomes(steps in steps()) {
        let entry = entry(None);
        let upstream = entry.upstream.clone();
        let mut held: Vec<Lease> = Vec::new();
        for step in steps {
            match step {
                LeaseStep::Take(tokens, streams) => {
                    let work = RequestWork { tokens, uncached: tokens / 2, streams };
                    held.extend(Lease::take(&entry, work, Instant::now()));
                }
                LeaseStep::FirstByte(at) if !held.is_empty() => {
                    let at = at.index(held.len());
                    held[at].first_byte(Instant::now());
                }
                LeaseStep::Drop(at) if !held.is_empty() => drop(held.swap_remove(at.index(held.len()))),
                LeaseStep::Panic(at) if !held.is_empty() => {
                    let lease = held.swap_remove(at.index(held.len()));
                    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                        let _held = lease;
                        std::panic::resume_unwind(Box::new("a request's task died"));
                    }));
                    prop_assert!(unwound.is_err());
                }
                _ => {}
            }
            prop_assert_eq!(upstream.load().active, held.len() as u64);
            let context: u64 = held.iter().map(|lease| lease.tokens).sum();
            prop_assert_eq!(upstream.load().context, context);
        }
        drop(held);
        prop_assert_eq!(upstream.load(), UpstreamLoad::default());
    }
}
