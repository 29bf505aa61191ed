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
    /// When it was taken.
    since: Instant,
    prefill: LeasePrefill,
    /// It holds the place of the one trial request after a trip.
    trial: bool,
}

/// The share of a lease in the backlog.
enum LeasePrefill {
    /// Part of the backlog until the first byte, which teaches the pace: `ahead` tokens, its own included.
    Streams {
        tokens: u64,
        ahead: u64,
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
            true => LeasePrefill::Streams { tokens, ahead: before + tokens },
            false => LeasePrefill::Expected(live.pace.begin(tokens, before, now)),
        };
        Some(Lease { upstream: upstream.clone(), tokens: work.tokens, since: now, prefill, trial })
    }

    /// Returns the upstream of the request.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Returns when the request was placed.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Ends the trial after a trip, if this is one: its answer was judged, however long it goes on.
    pub fn end_trial(&mut self) {
        if std::mem::take(&mut self.trial) {
            self.upstream.live.trial.store(false, Relaxed);
        }
    }

    /// Records that a byte of the answer's body came: the prefill is done. Returns whether it was the first.
    pub fn first_byte(&mut self, now: Instant) -> bool {
        if let LeasePrefill::Streams { ahead, .. } = self.prefill {
            self.upstream.live.pace.learn(ahead, now.saturating_duration_since(self.since));
        }
        let (is_first, was_waiting) = self.leave_backlog();
        if was_waiting {
            self.upstream.live.forecast.begin_head(millis(now));
        }
        is_first
    }

    /// Removes the prefill from the backlog without a first byte. Returns whether it was still part of it.
    pub fn end_prefill(&mut self) -> bool {
        let (is_first, was_waiting) = self.leave_backlog();
        if was_waiting {
            self.upstream.live.forecast.give_up(millis(self.since), millis(super::now()));
        }
        is_first
    }

    /// Removes the prefill from the backlog. Returns whether no call before did, and whether the prefill was
    /// still part of the backlog: its estimated end has not passed.
    fn leave_backlog(&mut self) -> (bool, bool) {
        let live = &self.upstream.live;
        let left = match std::mem::replace(&mut self.prefill, LeasePrefill::Over) {
            LeasePrefill::Streams { tokens, .. } => Some(tokens),
            LeasePrefill::Expected(ticket) => live.pace.end(ticket),
            LeasePrefill::Over => return (false, false),
        };
        live.gauges.backlog.fetch_sub(left.unwrap_or(0), Relaxed);
        (true, left.is_some())
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
mod tests;
