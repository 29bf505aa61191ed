//! A lease is one request in flight on one upstream: taking it raises the upstream's gauges, dropping
//! it, on whatever path, lowers them by the same amounts. There is no other way up or down.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::breaker::Admits;
use super::pace::PrefillTicket;
use super::snapshot::SnapshotEntry;
use super::upstream::Upstream;

/// How a request on an upstream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A whole answer with this status.
    Answered(u16),
    /// The client left first.
    ClientGone,
    /// The upstream could not be reached.
    Unreached,
    /// The upstream ended the answer, or the connection, before it was whole.
    Broken,
}

impl Outcome {
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

/// What a request brings, in prompt tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub tokens: u64,
    /// Of these, the ones that the upstream has not in its cache.
    pub uncached: u64,
    /// The first byte of the answer will tell when its prefill is over.
    pub streams: bool,
}

pub struct Lease {
    upstream: Arc<Upstream>,
    tokens: u64,
    prefill: LeasePrefill,
    /// It is the one request that is let through after a trip.
    trial: bool,
}

/// What a lease holds of the backlog.
enum LeasePrefill {
    /// Until the first byte. To learn from it: since when, and how much was ahead with it.
    Streams {
        tokens: u64,
        ahead: u64,
        since: Instant,
    },
    /// Until the first byte, or until it should be over.
    Expected(PrefillTicket),
    Over,
}

impl Lease {
    /// Takes a lease on an upstream that admits so much of the request. `None` when another request has just
    /// taken the last place.
    pub(super) fn take_as(entry: &SnapshotEntry, admits: Admits, work: Work, now: Instant) -> Option<Self> {
        let upstream = &entry.upstream;
        let live = &upstream.live;
        let trial = match admits {
            // What only it can answer; the candidates have said that it is so.
            Admits::None if entry.drains() => false,
            Admits::None => return None,
            Admits::One => true,
            Admits::Last | Admits::All => false,
        };
        if trial && live.trial.swap(true, Relaxed) {
            return None;
        }
        let most = upstream.config.max_active.map_or(u64::MAX, u64::from);
        let place = |active: u64| (active < most).then_some(active + 1);
        if live.gauges.active.fetch_update(Relaxed, Relaxed, place).is_err() {
            if trial {
                live.trial.store(false, Relaxed);
            }
            return None;
        }
        live.engine_load.took(work.tokens);
        let tokens = work.uncached;
        let before = live.gauges.backlog.fetch_add(tokens, Relaxed);
        live.gauges.context.fetch_add(work.tokens, Relaxed);
        let prefill = match work.streams {
            true => LeasePrefill::Streams { tokens, ahead: before + tokens, since: now },
            false => LeasePrefill::Expected(live.pace.begin(tokens, before, now)),
        };
        Some(Lease { upstream: upstream.clone(), tokens: work.tokens, prefill, trial })
    }

    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// The first byte of the answer's body came: the prefill is done. Returns whether it was the first.
    pub fn first_byte(&mut self, now: Instant) -> bool {
        if let LeasePrefill::Streams { ahead, since, .. } = self.prefill {
            self.upstream.live.pace.learn(ahead, now.saturating_duration_since(since));
        }
        self.end_prefill()
    }

    /// Takes the prefill out of the backlog, if that has not been done.
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
        live.queue.freed(live);
    }
}

#[cfg(test)]
mod tests {
    use super::super::breaker::{BreakerRules, Machine, Sign};
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
        let mut machine = Machine::new(Instant::now());
        machine.probed(Ok(()), 0, Instant::now(), &rules());
        entry.status = machine.status(&rules());
        entry
    }

    fn rules() -> BreakerRules {
        let breaker = Breaker { failures: 1, ..Breaker::default() };
        BreakerRules { health: Health::default(), breaker }
    }

    impl Lease {
        pub fn take(entry: &SnapshotEntry, work: Work, now: Instant) -> Option<Self> {
            Lease::take_as(entry, entry.admits(now), work, now)
        }
    }

    fn take(entry: &SnapshotEntry, tokens: u64) -> Option<Lease> {
        Lease::take(entry, Work { tokens, uncached: tokens, streams: true }, Instant::now())
    }

    #[test]
    fn the_backlog_ends_with_the_first_byte_and_the_rest_with_the_lease() {
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
    fn only_what_is_not_cached_is_backlog() {
        let entry = entry(None);
        let work = Work { tokens: 700, uncached: 100, streams: true };
        let lease = Lease::take(&entry, work, Instant::now()).expect("there is room");
        assert_eq!(entry.upstream.load(), UpstreamLoad { active: 1, backlog: 100, context: 700 });
        drop(lease);
        assert_eq!(entry.upstream.load(), UpstreamLoad::default());
    }

    #[test]
    fn the_backlog_of_what_does_not_stream_ends_when_it_should() {
        let entry = entry(None);
        let now = Instant::now();
        let work = Work { tokens: 8000, uncached: 8000, streams: false };
        let mut lease = Lease::take(&entry, work, now).expect("there is room");
        assert_eq!(entry.upstream.load_at(now).backlog, 8000);
        let second = std::time::Duration::from_secs(1);
        assert_eq!(
            entry.upstream.load_at(now + 2 * second),
            UpstreamLoad { active: 1, backlog: 0, context: 8000 }
        );
        assert!(lease.first_byte(now + 3 * second), "its first byte comes all the same");
        drop(lease);
        assert_eq!(entry.upstream.load(), UpstreamLoad::default());
        let early = Lease::take(&entry, work, now).expect("there is room");
        drop(early);
        assert_eq!(entry.upstream.load_at(now + 3 * second), UpstreamLoad::default());
    }

    #[test]
    fn threads_at_once_never_exceed_max_active() {
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
    fn after_a_trip_one_request_is_let_through_at_a_time() {
        let mut entry = entry(Some(5));
        let now = Instant::now();
        let mut machine = Machine::new(now);
        machine.probed(Ok(()), 0, now, &rules());
        machine.seen(Sign::Failed, 0, now, &rules());
        entry.status = machine.status(&rules());
        assert!(Lease::take(&entry, Work::default(), now).is_none(), "the trip is not over");
        let later = now + rules().breaker.open;
        let first = Lease::take(&entry, Work::default(), later);
        assert!(first.is_some());
        assert!(Lease::take(&entry, Work::default(), later).is_none(), "one is on its way");
        drop(first);
        assert!(
            Lease::take(&entry, Work::default(), later).is_some(),
            "it told nothing, and its place came back"
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
        fn leases_go_back_to_zero_after_any_sequence_of_outcomes(steps in steps()) {
            let entry = entry(None);
            let upstream = entry.upstream.clone();
            let mut held: Vec<Lease> = Vec::new();
            for step in steps {
                match step {
                    LeaseStep::Take(tokens, streams) => {
                        let work = Work { tokens, uncached: tokens / 2, streams };
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
