//! A lease is one request in flight on one upstream. Taking the lease raises the upstream's gauges, dropping
//! it lowers them by the same amounts. Nothing else changes these gauges, except for the end of a prefill.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::breaker::Admits;
use super::millis;
use super::pace::PrefillTicket;
use super::snapshot_entry::SnapshotEntry;
use super::upstream::Upstream;

/// How a request on an upstream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The upstream sent a whole answer with this status.
    Answered(u16),
    /// The client disconnected before the end of the answer.
    ClientGone,
    /// The upstream could not be reached.
    Unreached,
    /// The upstream ended the answer, or the connection, early.
    Broken,
}

impl Outcome {
    /// Returns the value of the metric label `outcome`.
    pub fn label(self) -> &'static str {
        match self {
            Outcome::Answered(status) if status < 400 => "ok",
            Outcome::Answered(status) if status < 500 => "client_error",
            Outcome::Answered(_) => "server_error",
            Outcome::ClientGone => "client_gone",
            Outcome::Unreached => "unreached",
            Outcome::Broken => "broken",
        }
    }
}

/// The work that a request is for an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestWork {
    /// The prompt tokens, estimated.
    pub tokens: u64,
    /// The prompt tokens that are not in the upstream's cache.
    pub uncached: u64,
    /// The answer streams: its first byte shows the end of the prefill.
    pub streams: bool,
}

/// One request in flight on one upstream.
pub struct Lease {
    upstream: Arc<Upstream>,
    tokens: u64,
    prefill: LeasePrefill,
    /// This is the trial request after a trip.
    trial: bool,
}

/// The share of a lease in the backlog.
enum LeasePrefill {
    /// Part of the backlog until the first byte, which teaches the pace: `ahead` tokens, its own included,
    /// since `since`.
    Streams {
        tokens: u64,
        ahead: u64,
        since: Instant,
    },
    /// Part of the backlog until the first byte or the estimated end of the prefill.
    Expected(PrefillTicket),
    Over,
}

impl Lease {
    /// Takes a lease on an upstream that admits `admits` of the request. Returns `None` when another request
    /// has just taken the last place.
    pub(super) fn take_as(
        entry: &SnapshotEntry,
        admits: Admits,
        work: RequestWork,
        now: Instant,
    ) -> Option<Self> {
        let upstream = &entry.upstream;
        let live = &upstream.live;
        let trial = match admits {
            // A request that only this upstream can answer; `Snapshot::candidates` has checked that.
            Admits::None if entry.drains() => false,
            Admits::None => return None,
            Admits::One => true,
            Admits::Last | Admits::All => false,
        };
        if trial && live.trial.swap(true, Relaxed) {
            return None;
        }
        let max_active = upstream.config.max_active.map_or(u64::MAX, u64::from);
        let place = |active: u64| (active < max_active).then_some(active + 1);
        if live.gauges.active.fetch_update(Relaxed, Relaxed, place).is_err() {
            if trial {
                live.trial.store(false, Relaxed);
            }
            return None;
        }
        live.engine_load.count_sent(work.tokens);
        let tokens = work.uncached;
        let before = live.gauges.backlog.fetch_add(tokens, Relaxed);
        if before == 0 {
            live.forecast.begin_head(millis(now));
        }
        live.gauges.context.fetch_add(work.tokens, Relaxed);
        let prefill = match work.streams {
            true => LeasePrefill::Streams { tokens, ahead: before + tokens, since: now },
            false => LeasePrefill::Expected(live.pace.begin(tokens, before, now)),
        };
        Some(Lease { upstream: upstream.clone(), tokens: work.tokens, prefill, trial })
    }

    /// Returns the upstream of the request.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Records that a byte of the answer's body came: the prefill is done. Returns whether it was the first.
    pub fn first_byte(&mut self, now: Instant) -> bool {
        if let LeasePrefill::Streams { ahead, since, .. } = self.prefill {
            self.upstream.live.pace.learn(ahead, now.saturating_duration_since(since));
        }
        let is_first = self.end_prefill();
        if is_first {
            self.upstream.live.forecast.begin_head(millis(now));
        }
        is_first
    }

    /// Removes the prefill from the backlog. Returns whether it was still part of it.
    pub fn end_prefill(&mut self) -> bool {
        let live = &self.upstream.live;
        let tokens = match std::mem::replace(&mut self.prefill, LeasePrefill::Over) {
            LeasePrefill::Streams { tokens, .. } => tokens,
            LeasePrefill::Expected(ticket) => live.pace.end(ticket).unwrap_or(0),
            LeasePrefill::Over => return false,
        };
        live.gauges.backlog.fetch_sub(tokens, Relaxed);
        true
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.end_prefill();
        let live = &self.upstream.live;
        live.gauges.context.fetch_sub(self.tokens, Relaxed);
        if self.trial {
            live.trial.store(false, Relaxed);
        }
        if live.gauges.active.fetch_sub(1, Relaxed) == 1 {
            live.emptied.notify_waiters();
        }
        live.queue.freed(&live.identity);
    }
}

#[cfg(test)]
mod tests {
    use super::super::breaker::{BreakerMachine, BreakerRules, UpstreamSignal};
    use super::super::queue::Queue;
    use super::super::upstream::UpstreamLoad;
    use super::*;
    use crate::config::types::{Breaker, Health, UpstreamConfig, UpstreamUrl};
    use crate::observe::Observer;
    use proptest::prelude::*;

    /// A ready entry.
    fn entry(max_active: Option<u32>) -> SnapshotEntry {
        let url =
            UpstreamUrl { https: false, host: "gpu".into(), port: 1, unix: None, prefix: String::new() };
        let config = UpstreamConfig { max_active, ..UpstreamConfig::new(url) };
        let upstream =
            Upstream::new(0, config, Queue::new(9, Observer::default())).expect("it needs no file");
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
        machine.signalled(UpstreamSignal::Failed, 0, now, &rules());
        entry.status = machine.status(&rules());
        assert!(Lease::take(&entry, RequestWork::default(), now).is_none(), "the trip is not over");
        let later = now + rules().breaker.open;
        let first = Lease::take(&entry, RequestWork::default(), later);
        assert!(first.is_some());
        assert!(Lease::take(&entry, RequestWork::default(), later).is_none(), "the trial is in flight");
        drop(first);
        assert!(
            Lease::take(&entry, RequestWork::default(), later).is_some(),
            "the trial ended without a signal and freed its place"
        );
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
}
