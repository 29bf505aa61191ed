//! The keeper: the task that turns the reports of probes and requests, and the operator's changes, into
//! snapshots, and is their only writer. It runs a prober and a metrics reader for each upstream.
//!
//! An upstream that was removed by force is probed for as long as requests are in flight on it: a probe is
//! the only way for these requests to end when the upstream dies.
//!
//! An upstream that is not ready is probed more often, so that it gets requests soon after it comes up. An
//! upstream that a request could not reach is probed at once.

mod upstream_record;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::breaker::{BreakerRules, ProbeMiss};
use super::change::{FleetChange, FleetChangeError};
use super::discover::{DiscoveryPlan, NO_SOURCE, PolledSource};
use super::keeper_message::KeeperMessage;
use super::probe::{self, ProbeFailure};
use super::snapshot::{DISCOVERY_GRACE, Snapshot};
use super::{Fleet, Upstream, metrics_reader, now};
use crate::config::types::{Config, DiscoveryOrigin, DiscoverySource, UpstreamConfig};
use upstream_record::{CapacityEvent, UpstreamRecord};

/// The interval between two probes while an upstream is not ready.
const UNREADY_PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// The least interval between two probes, however many requests report failures of the upstream.
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(50);

/// The task that owns the state of all upstreams.
pub struct Keeper {
    fleet: Arc<Fleet>,
    inbox: mpsc::Receiver<KeeperMessage>,
    /// The upstreams of the fleet.
    records: Vec<UpstreamRecord>,
    /// Upstreams that have left the fleet and still have requests in flight.
    departed: Vec<UpstreamRecord>,
    /// The probers, and the tasks that wait until an upstream is idle.
    tasks: JoinSet<()>,
    next_id: usize,
    /// Until when sources that have not answered may list upstreams with any model.
    awaited: Option<Instant>,
}

impl Keeper {
    pub(super) fn new(
        fleet: Arc<Fleet>,
        inbox: mpsc::Receiver<KeeperMessage>,
        config: &Config,
    ) -> Result<Self, String> {
        let (records, departed) = (Vec::new(), Vec::new());
        let awaited = (!config.sources.is_empty()).then(|| now() + DISCOVERY_GRACE);
        let tasks = JoinSet::new();
        let mut keeper = Keeper { fleet, inbox, records, departed, tasks, next_id: 0, awaited };
        for config in &config.upstreams {
            let upstream = keeper.new_upstream(config)?;
            keeper.records.push(UpstreamRecord::new(upstream, now(), keeper.fleet.observer.clone()));
        }
        let plan = keeper.plan(config.sources.clone())?;
        keeper.fleet.plan.send_replace(plan);
        keeper.publish();
        Ok(keeper)
    }

    /// Probes all upstreams and publishes every change. Ends with `stop`.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        for index in 0..self.records.len() {
            self.start_prober(self.records[index].upstream().clone());
        }
        loop {
            let opens = self.records.iter().filter_map(|record| record.opens(now())).min();
            let trip_ends = async {
                match opens {
                    Some(opens) => tokio::time::sleep_until(opens.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                message = self.inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => break,
                },
                // One trial request may be sent.
                () = trip_ends => self.wake_waiters(),
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {}
                _ = stop.wait_for(|stopping| *stopping) => break,
            }
        }
        self.tasks.shutdown().await;
    }

    fn new_upstream(&mut self, config: &UpstreamConfig) -> Result<Arc<Upstream>, String> {
        let id = self.next_id;
        self.next_id += 1;
        Ok(Arc::new(Upstream::new(id, config.clone(), self.fleet.queue.clone())?))
    }

    fn plan(&mut self, sources: Vec<DiscoverySource>) -> Result<Arc<DiscoveryPlan>, String> {
        let mut plan = DiscoveryPlan::default();
        for source in sources {
            let server = self.new_upstream(&PolledSource::server(&source))?;
            plan.sources.push(Arc::new(PolledSource::new(source, server)));
        }
        Ok(Arc::new(plan))
    }

    fn start_prober(&mut self, upstream: Arc<Upstream>) {
        self.tasks.spawn(watch_upstream(self.fleet.clone(), upstream));
    }

    /// Returns all probed upstreams, in the fleet or departed.
    fn all(&mut self) -> impl Iterator<Item = &mut UpstreamRecord> {
        self.records.iter_mut().chain(&mut self.departed)
    }

    /// Returns a probed upstream, in the fleet or departed.
    fn find_probed(&mut self, id: usize) -> Option<&mut UpstreamRecord> {
        self.all().find(|record| record.upstream().id == id)
    }

    /// Returns an upstream of the fleet.
    fn find(&mut self, id: usize) -> Option<&mut UpstreamRecord> {
        self.records.iter_mut().find(|record| record.upstream().id == id)
    }

    fn publish(&self) {
        let entries = |all: &[UpstreamRecord]| all.iter().map(|record| record.entry.clone()).collect();
        let snapshot = Snapshot::new(entries(&self.records), entries(&self.departed));
        let max_ejected = self.fleet.rules.load().breaker.max_ejected;
        self.fleet.publish(snapshot.awaiting(self.awaited).ejecting(max_ejected));
    }

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
        let changed = match message {
            KeeperMessage::Probed { id, found } => {
                self.find_probed(id).is_some_and(|record| record.probed(found, now(), &rules))
            }
            KeeperMessage::Metrics { id, metrics } => {
                self.find_probed(id).is_some_and(|record| record.read_metrics(&metrics))
            }
            KeeperMessage::Signal { id, signal } => {
                self.find_probed(id).is_some_and(|record| record.signalled(signal, now(), &rules))
            }
            KeeperMessage::Idle { id } => self.remove_idle(id),
            KeeperMessage::Apply { changes, answer } => {
                // Sending fails when the caller has stopped waiting; the changes are applied anyway.
                drop(answer.send(self.apply(changes)));
                false
            }
        };
        if changed {
            self.publish();
            self.wake_waiters();
        }
    }

    /// Wakes waiting requests for upstreams that may have room. When an upstream stops taking requests, all
    /// lines of the queue look again, since no upstream may be left for them.
    fn wake_waiters(&mut self) {
        let queue = self.fleet.queue.clone();
        for record in self.all() {
            match record.capacity_event(now()) {
                Some(CapacityEvent::Room) => queue.freed(&record.upstream().live.identity),
                Some(CapacityEvent::Loss) => queue.lost(),
                None => {}
            }
        }
    }

    /// Removes an upstream that became idle. Returns whether the fleet changed.
    fn remove_idle(&mut self, id: usize) -> bool {
        let removing = |record: &UpstreamRecord| record.upstream().id == id && record.entry.removing;
        let goes = |record: &UpstreamRecord| removing(record) && record.is_idle();
        let mut all = self.records.iter().chain(&self.departed);
        let busy = all.find(|record| removing(record) && !record.is_idle());
        let busy = busy.map(|record| record.upstream().clone());
        if let Some(upstream) = busy {
            // A request that used an older snapshot has chosen this upstream meanwhile.
            self.report_when_idle(upstream);
            return false;
        }
        let before = self.records.len() + self.departed.len();
        self.departed.retain(|record| !goes(record));
        self.records.retain(|record| {
            let goes = goes(record);
            if goes {
                self.fleet.observer.upstream_removed(record.upstream().name());
            }
            !goes
        });
        self.records.len() + self.departed.len() != before
    }

    // === changes ===

    /// Applies all changes or none: every step that can fail runs before the first change is made.
    fn apply(&mut self, changes: Vec<FleetChange>) -> Result<(), FleetChangeError> {
        let mut prepared = Vec::new();
        for change in changes {
            prepared.push(self.prepare(change)?);
        }
        for change in prepared {
            self.carry_out(change);
        }
        self.publish();
        self.wake_waiters();
        Ok(())
    }

    /// Returns the index of the upstream with this name.
    fn named(&self, name: &str) -> Result<usize, FleetChangeError> {
        let found = self.records.iter().position(|record| record.upstream().name() == name);
        found.ok_or_else(|| FleetChangeError::Unknown(name.to_string()))
    }

    fn prepare(&mut self, change: FleetChange) -> Result<PreparedChange, FleetChangeError> {
        let at = match &change {
            FleetChange::Upsert(config) => self.named(&config.name).ok(),
            FleetChange::Remove { name, .. }
            | FleetChange::Drain { name, .. }
            | FleetChange::Weight { name, .. } => Some(self.named(name)?),
            FleetChange::Release { name } | FleetChange::HandToDiscovery { name } => self.named(name).ok(),
            _ => None,
        };
        let is_operators = at.is_some_and(|at| self.records[at].is_operators());
        let present = at.map(|at| self.records[at].upstream().clone());
        Ok(match (change, present) {
            (FleetChange::Upsert(config), Some(_)) if is_operators && config.discovered.is_some() => {
                PreparedChange::Nothing
            }
            (FleetChange::Release { .. }, _) if is_operators => PreparedChange::Nothing,
            (FleetChange::Release { .. }, Some(present)) => {
                PreparedChange::Remove { id: present.id, force: false }
            }
            (FleetChange::HandToDiscovery { .. }, Some(present)) => {
                let discovered = Some(DiscoveryOrigin { source: NO_SOURCE.into(), model: None });
                let config = UpstreamConfig { discovered, ..present.config.clone() };
                let upstream = Arc::new(present.renewed(config).map_err(FleetChangeError::Unusable)?);
                PreparedChange::Renew { upstream, stays: false }
            }
            (FleetChange::Sources(sources), _) => {
                PreparedChange::Plan(self.plan(sources).map_err(FleetChangeError::Unusable)?)
            }
            (FleetChange::Upsert(config), Some(present)) if present.has_settings(&config) => {
                PreparedChange::Keep(present.id)
            }
            (FleetChange::Upsert(config), Some(present)) if present.config.url == config.url => {
                let upstream = Arc::new(present.renewed(config).map_err(FleetChangeError::Unusable)?);
                PreparedChange::Renew { upstream, stays: true }
            }
            (FleetChange::Upsert(config), present) => {
                let upstream = self.new_upstream(&config).map_err(FleetChangeError::Unusable)?;
                PreparedChange::Enter { upstream, replaces: present.map(|present| present.id) }
            }
            (FleetChange::Weight { weight, .. }, Some(present)) => {
                let config = UpstreamConfig { weight, ..present.config.clone() };
                let upstream = Arc::new(present.renewed(config).map_err(FleetChangeError::Unusable)?);
                PreparedChange::Renew { upstream, stays: false }
            }
            (FleetChange::Remove { force, .. }, Some(present)) => {
                PreparedChange::Remove { id: present.id, force }
            }
            (FleetChange::Drain { drain, .. }, Some(present)) => {
                PreparedChange::Drain { id: present.id, drain }
            }
            (FleetChange::Rules(rules), _) => PreparedChange::Rules(Arc::new(rules)),
            (FleetChange::QueueSize(size), _) => PreparedChange::QueueSize(size),
            (FleetChange::AwaitSources(until), _) => PreparedChange::AwaitSources(until),
            // `named` has rejected changes that require the upstream.
            (_, None) => PreparedChange::Nothing,
        })
    }

    fn carry_out(&mut self, change: PreparedChange) {
        let rules = self.fleet.rules.load_full();
        match change {
            PreparedChange::Keep(id) => {
                if let Some(record) = self.find(id) {
                    record.entry.removing = false;
                }
            }
            PreparedChange::Renew { upstream, stays } => {
                self.fleet.observer.upstream_altered(upstream.name());
                if let Some(record) = self.find(upstream.id) {
                    record.renew(upstream);
                    record.entry.removing &= !stays;
                }
            }
            PreparedChange::Enter { upstream, replaces } => {
                self.fleet.observer.upstream_added(upstream.name(), &upstream.config.url.display());
                let entering = UpstreamRecord::new(upstream.clone(), now(), self.fleet.observer.clone());
                let at = self.records.iter().position(|record| Some(record.upstream().id) == replaces);
                match at {
                    Some(at) => {
                        let before = std::mem::replace(&mut self.records[at], entering);
                        self.depart(before);
                    }
                    None => self.records.push(entering),
                }
                self.start_prober(upstream);
            }
            PreparedChange::Remove { id, force } => self.remove(id, force),
            PreparedChange::Drain { id, drain } => {
                if let Some(record) = self.find(id) {
                    record.drain(drain, now(), &rules);
                }
            }
            PreparedChange::Rules(rules) => {
                self.fleet.rules.store(rules.clone());
                for record in self.all() {
                    record.update_status(&rules);
                    // The old probe interval no longer applies.
                    record.upstream().probe_soon();
                }
            }
            PreparedChange::QueueSize(size) => self.fleet.queue.resize(size),
            PreparedChange::Plan(plan) => drop(self.fleet.plan.send_replace(plan)),
            PreparedChange::AwaitSources(until) => self.awaited = until,
            PreparedChange::Nothing => {}
        }
    }

    fn remove(&mut self, id: usize, force: bool) {
        let Some(at) = self.records.iter().position(|record| record.upstream().id == id) else { return };
        if force {
            let record = self.records.remove(at);
            self.fleet.observer.upstream_removed(record.upstream().name());
            self.depart(record);
            return;
        }
        let record = &mut self.records[at];
        record.entry.removing = true;
        let upstream = record.upstream().clone();
        self.fleet.observer.upstream_removing(upstream.name(), upstream.load().active);
        self.report_when_idle(upstream);
    }

    /// Removes an upstream from the fleet at once; it is probed until its last request has ended.
    fn depart(&mut self, mut record: UpstreamRecord) {
        record.entry.removing = true;
        self.report_when_idle(record.upstream().clone());
        self.departed.push(record);
    }

    /// Starts a task that sends `KeeperMessage::Idle` when the upstream has no requests in flight.
    fn report_when_idle(&mut self, upstream: Arc<Upstream>) {
        let id = upstream.id;
        let keeper = self.fleet.keeper.clone();
        self.tasks.spawn(async move {
            upstream.idle().await;
            // Sending fails only when the keeper has stopped.
            drop(keeper.send(KeeperMessage::Idle { id }).await);
        });
    }
}

/// A change whose fallible steps are done.
enum PreparedChange {
    /// The upstream has these settings already; its removal is cancelled.
    Keep(usize),
    /// The upstream gets other settings; with `stays` its removal is cancelled.
    Renew {
        upstream: Arc<Upstream>,
        stays: bool,
    },
    Enter {
        upstream: Arc<Upstream>,
        replaces: Option<usize>,
    },
    Remove {
        id: usize,
        force: bool,
    },
    Drain {
        id: usize,
        drain: bool,
    },
    Rules(Arc<BreakerRules>),
    QueueSize(usize),
    AwaitSources(Option<Instant>),
    Plan(Arc<DiscoveryPlan>),
    /// No change: the operator's settings take precedence.
    Nothing,
}

/// Probes one upstream and reads its metrics, until it is no longer watched.
async fn watch_upstream(fleet: Arc<Fleet>, upstream: Arc<Upstream>) {
    tokio::select! {
        () = probe_forever(&fleet, upstream.clone()) => {}
        () = metrics_reader::read_metrics_forever(&fleet, &upstream) => {}
    }
}

/// Probes one upstream until it is no longer watched.
async fn probe_forever(fleet: &Fleet, first: Arc<Upstream>) {
    let id = first.id;
    let mut upstream = first;
    let mut fetch_version = true;
    loop {
        let rules = fleet.rules.load_full();
        let found = probe::probe(fleet.client(), &upstream, &rules.health, fetch_version).await;
        let well = found.is_ok();
        if fleet.keeper.send(KeeperMessage::Probed { id, found }).await.is_err() {
            return;
        }
        if well {
            upstream.live.well.notify_one();
        }
        tokio::time::sleep(MIN_PROBE_INTERVAL).await;
        let pause = {
            let snapshot = fleet.snapshot();
            let Some(entry) = snapshot.watched(id) else { return };
            upstream = entry.upstream.clone();
            fetch_version = !entry.is_ready() || entry.version.is_none();
            let interval = rules.health.interval;
            if entry.calm { interval } else { interval.min(UNREADY_PROBE_INTERVAL) }
        };
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(MIN_PROBE_INTERVAL)) => {}
            () = upstream.live.probe_soon.notified() => {}
        }
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
mod tests;
