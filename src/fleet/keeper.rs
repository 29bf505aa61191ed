//! The keeper: the task that turns the reports of probes and requests, and the operator's changes, into
//! snapshots, and is their only writer. It runs a prober and a metrics reader for each upstream.
//!
//! An upstream that was removed by force is probed for as long as requests are in flight on it: a probe is
//! the only way for these requests to end when the upstream dies.
//!
//! A message costs the same however many upstreams there are; only a snapshot takes time in proportion. So
//! the keeper handles all messages that have come and then publishes once, and at most once in
//! `MIN_PUBLISH_INTERVAL` - unless requests wait for room, which a change may give. Changes of the fleet are
//! published before their caller gets the answer.

mod changes;
mod records;
mod upstream_record;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::authorities::ReadAuthorities;
use super::breaker::ProbeMiss;
use super::discover::{DiscoveryPlan, PlannedSource};
use super::keeper_message::KeeperMessage;
use super::probe::ProbeFailure;
use super::snapshot::{DISCOVERY_GRACE, Snapshot};
use super::{Fleet, Upstream, now};
use crate::config::types::{Config, DiscoverySource, UpstreamConfig};
use records::UpstreamRecords;
use upstream_record::{CapacityEvent, UpstreamRecord};

/// The least interval between two snapshots, except for changes that a caller or a request waits for.
const MIN_PUBLISH_INTERVAL: Duration = Duration::from_millis(5);

/// The largest number of messages that are handled before a snapshot is published.
const MAX_BATCH: usize = 256;

/// The task that owns the state of all upstreams.
pub struct Keeper {
    fleet: Arc<Fleet>,
    inbox: mpsc::Receiver<KeeperMessage>,
    records: UpstreamRecords,
    /// The probers, and the tasks that wait until an upstream is idle.
    tasks: JoinSet<()>,
    next_id: usize,
    /// Until when sources that have not answered may list upstreams with any model.
    awaited: Option<Instant>,
    /// The upstreams that may admit more or fewer requests since waiting requests were last woken.
    touched: Vec<usize>,
    /// The records differ from the snapshot.
    changed: bool,
    published_at: Instant,
    /// The ends of trips up to this time have woken waiting requests.
    trips_ended: Instant,
}

impl Keeper {
    pub(super) fn new(
        fleet: Arc<Fleet>,
        inbox: mpsc::Receiver<KeeperMessage>,
        config: &Config,
    ) -> Result<Self, String> {
        let mut keeper = Keeper {
            fleet,
            inbox,
            records: UpstreamRecords::default(),
            tasks: JoinSet::new(),
            next_id: 0,
            awaited: (!config.sources.is_empty()).then(|| now() + DISCOVERY_GRACE),
            touched: Vec::new(),
            changed: false,
            published_at: now(),
            trips_ended: now(),
        };
        let servers: Vec<_> = config.sources.iter().filter_map(PlannedSource::server).collect();
        let read = ReadAuthorities::read_blocking(config.upstreams.iter().chain(&servers));
        for config in &config.upstreams {
            let upstream = keeper.new_upstream(config, &read)?;
            let observer = keeper.fleet.observer.clone();
            keeper.records.push(UpstreamRecord::new(upstream, now(), observer));
        }
        let plan = keeper.plan(config.sources.clone(), &read)?;
        keeper.fleet.plan.send_replace(plan);
        keeper.publish();
        Ok(keeper)
    }

    /// Probes all upstreams and publishes every change. Ends with `stop`.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let all: Vec<_> = self.records.present().iter().map(|record| record.upstream().clone()).collect();
        let count = all.len();
        all.into_iter().for_each(|upstream| self.start_prober(upstream, count));
        let mut messages = Vec::with_capacity(MAX_BATCH);
        loop {
            let trip_end = self.records.next_trip_end(self.trips_ended);
            let publish_at = self.changed.then(|| self.published_at + MIN_PUBLISH_INTERVAL);
            tokio::select! {
                count = self.inbox.recv_many(&mut messages, MAX_BATCH) => {
                    if count == 0 {
                        break;
                    }
                    messages.drain(..).for_each(|message| self.handle(message));
                    self.publish_if_due();
                }
                () = sleep_until(publish_at) => self.publish_changes(),
                // One trial request may be sent.
                () = sleep_until(trip_end) => self.end_trips(),
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {}
                _ = stop.wait_for(|stopping| *stopping) => break,
            }
        }
        self.tasks.shutdown().await;
    }

    fn new_upstream(
        &mut self,
        config: &UpstreamConfig,
        read: &ReadAuthorities,
    ) -> Result<Arc<Upstream>, String> {
        let id = self.next_id;
        self.next_id += 1;
        Ok(Arc::new(Upstream::new(id, config.clone(), self.fleet.queue.clone(), read)?))
    }

    fn plan(
        &mut self,
        sources: Vec<DiscoverySource>,
        read: &ReadAuthorities,
    ) -> Result<Arc<DiscoveryPlan>, String> {
        let mut plan = DiscoveryPlan::default();
        for source in sources {
            let server =
                PlannedSource::server(&source).map(|server| self.new_upstream(&server, read)).transpose()?;
            plan.sources.push(Arc::new(PlannedSource::new(source, server)));
        }
        Ok(Arc::new(plan))
    }

    // === snapshots ===

    fn publish(&mut self) {
        let entries = |all: &[UpstreamRecord]| all.iter().map(|record| record.entry.clone()).collect();
        let before = self.fleet.snapshot();
        let (present, departed) = (entries(self.records.present()), entries(self.records.departed()));
        let snapshot = Snapshot::new(present, departed, Some(&before));
        let max_ejected = self.fleet.rules.load().breaker.max_ejected;
        self.fleet.publish(snapshot.awaiting(self.awaited).ejecting(max_ejected));
        let now_served = self.fleet.snapshot();
        let has_upstream = |name: &str| now_served.by_name(name).is_some();
        self.fleet.observer.forget_unseen_series(has_upstream, |model| now_served.serves_model(model));
        (self.changed, self.published_at) = (false, now());
    }

    /// Publishes the changes since the last snapshot, and wakes the requests that waited for them.
    fn publish_changes(&mut self) {
        if self.changed {
            self.publish();
            self.wake_waiters();
        }
    }

    /// Wakes the requests that wait for upstreams whose trips have ended.
    fn end_trips(&mut self) {
        self.publish_changes();
        self.trips_ended = now();
        self.touched.extend(self.records.tripped_until(self.trips_ended));
        self.wake_waiters();
    }

    /// As `publish_changes`, but not too soon after the last snapshot.
    fn publish_if_due(&mut self) {
        if !self.fleet.queue.is_empty() || now() >= self.published_at + MIN_PUBLISH_INTERVAL {
            self.publish_changes();
        }
    }

    /// Wakes waiting requests for upstreams that may have room. When an upstream stops taking requests, all
    /// lines of the queue look again, since no upstream may be left for them.
    fn wake_waiters(&mut self) {
        let queue = self.fleet.queue.clone();
        for id in std::mem::take(&mut self.touched) {
            let Some(record) = self.records.find_probed(id) else { continue };
            match record.capacity_event(now()) {
                Some(CapacityEvent::Room) => queue.freed(&record.upstream().live.identity),
                Some(CapacityEvent::Loss) => queue.lost(),
                None => {}
            }
        }
    }

    // === messages ===

    /// Returns the upstream of the next signal in the inbox.
    #[cfg(test)]
    pub(super) fn next_signal(&mut self) -> Option<usize> {
        match self.inbox.try_recv() {
            Ok(KeeperMessage::Signal { id, .. }) => Some(id),
            _ => None,
        }
    }

    fn handle(&mut self, message: KeeperMessage) {
        let rules = self.fleet.rules.load_full();
        match message {
            KeeperMessage::Probed { id, found } => {
                self.update(id, |record| record.probed(found, now(), &rules));
            }
            KeeperMessage::Metrics { id, metrics } => {
                self.update(id, |record| record.read_metrics(&metrics));
            }
            KeeperMessage::Reported { facts } => {
                for (id, facts) in facts {
                    self.update(id, |record| record.apply_facts(facts));
                }
            }
            KeeperMessage::Signal { id, signal } => {
                self.update(id, |record| record.signalled(signal, now(), &rules));
            }
            KeeperMessage::Idle { id } => self.changed |= self.remove_idle(id),
            KeeperMessage::Apply { changes, read, answer } => {
                // Sending fails when the caller has stopped waiting; the changes are applied anyway.
                drop(answer.send(self.apply(changes, &read)));
            }
        }
    }

    /// Applies an event to an upstream, in the fleet or departed. `apply` returns whether a request could see
    /// a difference.
    fn update(&mut self, id: usize, apply: impl FnOnce(&mut UpstreamRecord) -> bool) {
        let Some(record) = self.records.find_probed(id) else { return };
        let before = record.trip_end();
        let changed = apply(record);
        let trip_end = record.trip_end();
        if trip_end != before {
            if let Some(ends) = trip_end {
                self.fleet.shared.put_trip(record.upstream(), ends);
            }
            self.records.set_trip(id, trip_end);
        }
        if changed {
            self.changed = true;
            self.touched.push(id);
        }
    }

    /// Removes an upstream that became idle. Returns whether the fleet changed.
    fn remove_idle(&mut self, id: usize) -> bool {
        let Some(record) = self.records.find_probed(id) else { return false };
        record.awaits_idle = false;
        if !record.entry.removing {
            return false;
        }
        if !record.is_idle() {
            // A request that used an older snapshot has chosen this upstream meanwhile.
            let upstream = record.begin_await_idle();
            self.report_when_idle(upstream);
            return false;
        }
        if let Some((record, true)) = self.records.forget(id) {
            self.fleet.observer.upstream_removed(record.upstream().name());
        }
        true
    }

    /// Starts a task that sends `KeeperMessage::Idle` when the upstream has no requests in flight; `None`:
    /// such a task runs.
    fn report_when_idle(&mut self, upstream: Option<Arc<Upstream>>) {
        let Some(upstream) = upstream else { return };
        let id = upstream.id;
        let keeper = self.fleet.keeper.clone();
        self.tasks.spawn(async move {
            upstream.idle().await;
            // Sending fails only when the keeper has stopped.
            drop(keeper.send(KeeperMessage::Idle { id }).await);
        });
    }
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Converts a failed probe into the state machine's input.
fn miss(failure: &ProbeFailure) -> ProbeMiss {
    match failure {
        ProbeFailure::Refused(_) => ProbeMiss::Refused,
        ProbeFailure::Silent(_) => ProbeMiss::Silent,
        ProbeFailure::Wrong(_) => ProbeMiss::Wrong,
    }
}

#[cfg(test)]
pub(super) mod tests;
