//! The siblings, and the requests that each of them has in flight on each upstream.
//!
//! A sibling is known by its messages: it expires when no message came for `ttl`, as after a crash, and is
//! removed when it announces its shutdown. Repeated and reordered messages are recognised by their sequence.
//!
//! Totals over all siblings are kept by difference: see `totals`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::totals::{LoadSum, UpstreamTotals};
use super::{GaugeUpdate, Message, SiblingLoad};

/// The largest number of siblings: a stream with foreign writers must not exhaust the memory.
const MAX_SIBLINGS: usize = 1024;

/// The siblings and their gauges.
pub struct SiblingTable {
    /// The id of this balancer.
    own: u64,
    /// The time for which a message is valid.
    ttl: Duration,
    all: HashMap<u64, Sibling>,
    totals: UpstreamTotals,
}

struct Sibling {
    name: String,
    address: String,
    sequence: u64,
    /// When the last message was published.
    published_at: Instant,
    /// The load on each upstream, by its number in the totals.
    reported: Vec<ReportedLoad>,
    /// The number of reports of gauges.
    reports: u64,
    /// The number of upstreams with requests in flight.
    busy: usize,
    sum: LoadSum,
}

/// The load of one sibling on one upstream.
#[derive(Clone, Copy, Default)]
struct ReportedLoad {
    load: SiblingLoad,
    /// The number of the report that had the upstream last.
    report: u64,
}

/// One sibling, for display.
#[derive(Clone, Debug, PartialEq)]
pub struct SiblingRow {
    pub balancer: u64,
    pub name: String,
    pub address: String,
    /// The age of its last message.
    pub age: Duration,
    /// The sibling's requests in flight on all upstreams.
    pub sum: SiblingLoad,
}

// === impl SiblingTable ===

impl SiblingTable {
    /// Builds the table of the balancer `own`.
    pub fn new(own: u64, ttl: Duration) -> Self {
        SiblingTable { own, ttl, all: HashMap::new(), totals: UpstreamTotals::default() }
    }

    /// Applies the sender and the gauges of a message; `published_at` is the estimated time of its
    /// publication. Returns `false` for a message to ignore: an own one, or an old one.
    pub fn receive(&mut self, message: &Message<'_>, published_at: Instant, now: Instant) -> bool {
        if message.balancer == self.own {
            return false;
        }
        let known = self.all.get(&message.balancer);
        if known.is_some_and(|sibling| sibling.sequence >= message.sequence) {
            return false;
        }
        if message.leaving {
            self.remove(message.balancer);
            return true;
        }
        let stale = now.saturating_duration_since(published_at) >= self.ttl;
        if stale || known.is_none() && self.all.len() >= MAX_SIBLINGS {
            return true;
        }
        let sibling = self.all.entry(message.balancer).or_insert_with(|| Sibling::new(published_at));
        (sibling.sequence, sibling.published_at) = (message.sequence, published_at);
        if let Some(who) = message.who {
            (sibling.name, sibling.address) = (who.name.into(), who.address.into());
        }
        if let Some(update) = &message.gauges {
            sibling.apply(update, &mut self.totals);
        }
        true
    }

    /// Removes siblings without a recent message.
    pub fn expire(&mut self, now: Instant) {
        let is_silent = |sibling: &Sibling| now.saturating_duration_since(sibling.published_at) >= self.ttl;
        let silent: Vec<u64> =
            self.all.iter().filter(|(_, sibling)| is_silent(sibling)).map(|(id, _)| *id).collect();
        silent.into_iter().for_each(|id| self.remove(id));
    }

    fn remove(&mut self, balancer: u64) {
        if let Some(mut sibling) = self.all.remove(&balancer) {
            sibling.clear(&mut self.totals, |_| true);
        }
    }

    /// Returns the number of siblings.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Returns the ids of the siblings, in order.
    pub fn ids(&self) -> Vec<u64> {
        let mut ids: Vec<u64> = self.all.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Whether there are no siblings.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether the balancer is a known sibling.
    pub fn contains(&self, balancer: u64) -> bool {
        self.all.contains_key(&balancer)
    }

    /// Returns the name of a sibling for display; one that has not published its name yet has its id.
    pub fn name(&self, balancer: u64) -> String {
        let known = self.all.get(&balancer).map(|sibling| sibling.name.as_str());
        known.filter(|name| !name.is_empty()).map_or_else(|| format!("{balancer:016x}"), str::to_string)
    }

    /// Returns the sum of all siblings' requests in flight on an upstream.
    pub fn total(&self, upstream: &str) -> SiblingLoad {
        self.totals.total(upstream)
    }

    /// Returns the sums of all siblings' requests in flight for the upstreams where they have changed since
    /// the last call.
    pub fn take_changes(&mut self) -> Vec<(Arc<str>, SiblingLoad)> {
        self.totals.take_changes()
    }

    /// Returns the age of the oldest report in the sums. Excludes siblings without requests in flight, which
    /// report rarely.
    pub fn age(&self, now: Instant) -> Duration {
        let busy = self.all.values().filter(|sibling| sibling.busy > 0);
        busy.map(|sibling| now.saturating_duration_since(sibling.published_at)).max().unwrap_or_default()
    }

    /// Returns all siblings, sorted by name.
    pub fn rows(&self, now: Instant) -> Vec<SiblingRow> {
        let mut rows: Vec<SiblingRow> = self.all.iter().map(|(id, sibling)| sibling.row(*id, now)).collect();
        rows.sort_by(|one, other| (&one.name, one.balancer).cmp(&(&other.name, other.balancer)));
        rows
    }
}

// === impl Sibling ===

impl Sibling {
    fn new(published_at: Instant) -> Self {
        Sibling {
            name: String::new(),
            address: String::new(),
            sequence: 0,
            published_at,
            reported: Vec::new(),
            reports: 0,
            busy: 0,
            sum: LoadSum::default(),
        }
    }

    fn apply(&mut self, update: &GaugeUpdate<'_>, totals: &mut UpstreamTotals) {
        self.reports += 1;
        for (name, load) in &update.rows {
            // An idle upstream needs no number.
            let number = if load.is_idle() { totals.find(name) } else { totals.number(name) };
            let Some(number) = number else { continue };
            self.set(number, *load, totals);
        }
        if update.whole {
            let report = self.reports;
            self.clear(totals, |reported| reported.report != report);
        }
    }

    /// Sets the load on an upstream.
    fn set(&mut self, number: usize, load: SiblingLoad, totals: &mut UpstreamTotals) {
        if self.reported.len() <= number {
            if load.is_idle() {
                return;
            }
            self.reported.resize(number + 1, ReportedLoad::default());
        }
        let reported = &mut self.reported[number];
        let before = std::mem::replace(reported, ReportedLoad { load, report: self.reports }).load;
        if before != load {
            self.busy += usize::from(!load.is_idle());
            self.busy -= usize::from(!before.is_idle());
            self.sum.replace(&before, &load);
            totals.replace(number, &before, &load);
        }
    }

    /// Removes the load from the upstreams for which `is_over` returns true.
    fn clear(&mut self, totals: &mut UpstreamTotals, is_over: impl Fn(&ReportedLoad) -> bool) {
        for number in 0..self.reported.len() {
            if !self.reported[number].load.is_idle() && is_over(&self.reported[number]) {
                self.set(number, SiblingLoad::default(), totals);
            }
        }
    }

    fn row(&self, balancer: u64, now: Instant) -> SiblingRow {
        SiblingRow {
            balancer,
            name: self.name.clone(),
            address: self.address.clone(),
            age: now.saturating_duration_since(self.published_at),
            sum: self.sum.load(),
        }
    }
}

impl SiblingLoad {
    /// Whether no request is in flight.
    pub fn is_idle(&self) -> bool {
        *self == SiblingLoad::default()
    }
}

#[cfg(test)]
mod tests;
