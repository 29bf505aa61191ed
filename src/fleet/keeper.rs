//! The keeper: one prober for each upstream, with a reader of its metrics beside it, and one task that turns
//! the reports of probes and requests, and the operator's changes, into snapshots. This task is the only
//! writer of the snapshot.
//!
//! An upstream that was removed by force is probed for as long as requests are in flight on it: these
//! requests have no other way to learn that it is gone.
//!
//! An upstream that is not ready is probed more often, so that it is found soon after it comes up. An
//! upstream that a request could not reach is probed at once.

mod upstream_record;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::breaker::{BreakerRules, ProbeMiss, Sign};
use super::change::{Change, ChangeError};
use super::discover::{DiscoveryPlan, NO_SOURCE, PolledSource};
use super::probe::{self, ProbeFailure, ProbeReport};
use super::snapshot::{DISCOVERY_GRACE, Snapshot};
use super::{Fleet, Upstream, engine_load, now};
use crate::aggregate::EngineMetrics;
use crate::config::types::{Config, Discovered, DiscoverySource, UpstreamConfig};
use upstream_record::{CapacityEvent, UpstreamRecord};

/// The interval between two probes while an upstream is not ready.
const UNREADY_PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// The least interval between two probes, however many requests report failures of the upstream.
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(50);

/// A message to the keeper.
pub(super) enum KeeperMessage {
    /// From a prober.
    Probed {
        id: usize,
        found: Result<ProbeReport, ProbeFailure>,
    },
    /// From a reader of metrics.
    Metrics {
        id: usize,
        metrics: EngineMetrics,
    },
    /// From a request.
    Seen {
        id: usize,
        sign: Sign,
    },
    /// An upstream that is being removed, or has departed, became idle.
    Emptied {
        id: usize,
    },
    Apply {
        changes: Vec<Change>,
        answer: oneshot::Sender<Result<(), ChangeError>>,
    },
}

pub struct Keeper {
    fleet: Arc<Fleet>,
    inbox: mpsc::Receiver<KeeperMessage>,
    kept: Vec<UpstreamRecord>,
    /// Upstreams that have left the fleet and still have requests in flight.
    departed: Vec<UpstreamRecord>,
    /// Probers, and tasks that wait until an upstream is idle.
    tasks: JoinSet<()>,
    next_id: usize,
    /// Until then upstreams may be discovered that serve any model.
    awaited: Option<Instant>,
}

impl Keeper {
    pub(super) fn new(
        fleet: Arc<Fleet>,
        inbox: mpsc::Receiver<KeeperMessage>,
        config: &Config,
    ) -> Result<Self, String> {
        let (kept, departed) = (Vec::new(), Vec::new());
        let awaited = (!config.sources.is_empty()).then(|| now() + DISCOVERY_GRACE);
        let tasks = JoinSet::new();
        let mut keeper = Keeper { fleet, inbox, kept, departed, tasks, next_id: 0, awaited };
        for config in &config.upstreams {
            let upstream = keeper.make(config)?;
            keeper.kept.push(UpstreamRecord::new(upstream, now(), keeper.fleet.observer.clone()));
        }
        let plan = keeper.plan(config.sources.clone())?;
        keeper.fleet.plan.send_replace(plan);
        keeper.publish();
        Ok(keeper)
    }

    /// Probes all upstreams, and publishes what changes. Ends with `stop`.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        for index in 0..self.kept.len() {
            self.probe(self.kept[index].upstream().clone());
        }
        loop {
            let opens = self.kept.iter().filter_map(|kept| kept.opens(now())).min();
            let opening = async {
                match opens {
                    Some(opens) => tokio::time::sleep_until(opens.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                word = self.inbox.recv() => match word {
                    Some(word) => self.take_in(word),
                    None => break,
                },
                // A trip has ended: one request may be sent.
                () = opening => self.welcome(),
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {}
                _ = stop.wait_for(|stopping| *stopping) => break,
            }
        }
        self.tasks.shutdown().await;
    }

    fn make(&mut self, config: &UpstreamConfig) -> Result<Arc<Upstream>, String> {
        let id = self.next_id;
        self.next_id += 1;
        Ok(Arc::new(Upstream::new(id, config.clone(), self.fleet.queue.clone())?))
    }

    fn plan(&mut self, sources: Vec<DiscoverySource>) -> Result<Arc<DiscoveryPlan>, String> {
        let mut plan = DiscoveryPlan::default();
        for source in sources {
            let server = self.make(&PolledSource::server(&source))?;
            plan.sources.push(Arc::new(PolledSource::new(source, server)));
        }
        Ok(Arc::new(plan))
    }

    fn probe(&mut self, upstream: Arc<Upstream>) {
        self.tasks.spawn(look_after(self.fleet.clone(), upstream));
    }

    /// All probed upstreams, in the fleet or departed.
    fn all(&mut self) -> impl Iterator<Item = &mut UpstreamRecord> {
        self.kept.iter_mut().chain(&mut self.departed)
    }

    fn probed(&mut self, id: usize) -> Option<&mut UpstreamRecord> {
        self.all().find(|kept| kept.upstream().id == id)
    }

    /// Finds an upstream of the fleet.
    fn find(&mut self, id: usize) -> Option<&mut UpstreamRecord> {
        self.kept.iter_mut().find(|kept| kept.upstream().id == id)
    }

    fn publish(&self) {
        let entries = |all: &[UpstreamRecord]| all.iter().map(|kept| kept.entry.clone()).collect();
        let snapshot = Snapshot::new(entries(&self.kept), entries(&self.departed));
        let max_ejected = self.fleet.rules.load().breaker.max_ejected;
        self.fleet.publish(snapshot.awaiting(self.awaited).ejecting(max_ejected));
    }

    /// The upstream of the next sign in the inbox.
    #[cfg(test)]
    pub(super) fn next_sign(&mut self) -> Option<usize> {
        match self.inbox.try_recv() {
            Ok(KeeperMessage::Seen { id, .. }) => Some(id),
            _ => None,
        }
    }

    fn take_in(&mut self, word: KeeperMessage) {
        let rules = self.fleet.rules.load_full();
        let changed = match word {
            KeeperMessage::Probed { id, found } => {
                self.probed(id).is_some_and(|kept| kept.probed(found, now(), &rules))
            }
            KeeperMessage::Metrics { id, metrics } => {
                self.probed(id).is_some_and(|kept| kept.read_metrics(&metrics))
            }
            KeeperMessage::Seen { id, sign } => {
                self.probed(id).is_some_and(|kept| kept.signalled(sign, now(), &rules))
            }
            KeeperMessage::Emptied { id } => self.emptied(id),
            KeeperMessage::Apply { changes, answer } => {
                // The caller may have gone; the change is applied all the same.
                drop(answer.send(self.apply(changes)));
                false
            }
        };
        if changed {
            self.publish();
            self.welcome();
        }
    }

    /// Wakes waiting requests where an upstream may have room. When an upstream stops taking requests all
    /// lines look again, since none may be left for them.
    fn welcome(&mut self) {
        let queue = self.fleet.queue.clone();
        for kept in self.all() {
            match kept.news(now()) {
                Some(CapacityEvent::Room) => queue.freed(&kept.upstream().live),
                Some(CapacityEvent::Loss) => queue.lost(),
                None => {}
            }
        }
    }

    fn emptied(&mut self, id: usize) -> bool {
        let goes = |kept: &UpstreamRecord| kept.upstream().id == id && kept.entry.removing && kept.is_idle();
        let busy =
            |kept: &&UpstreamRecord| kept.upstream().id == id && kept.entry.removing && !kept.is_idle();
        let busy = self.kept.iter().chain(&self.departed).find(busy).map(|kept| kept.upstream().clone());
        if let Some(upstream) = busy {
            // A request that used an older snapshot has chosen this upstream after all.
            self.report_when_idle(upstream);
            return false;
        }
        let before = self.kept.len() + self.departed.len();
        self.departed.retain(|kept| !goes(kept));
        self.kept.retain(|kept| {
            let goes = goes(kept);
            if goes {
                self.fleet.observer.upstream_removed(kept.upstream().name());
            }
            !goes
        });
        self.kept.len() + self.departed.len() != before
    }

    // === changes ===

    /// Applies all changes or none: every step that can fail runs before the first change is made.
    fn apply(&mut self, changes: Vec<Change>) -> Result<(), ChangeError> {
        let mut ready = Vec::new();
        for change in changes {
            ready.push(self.prepare(change)?);
        }
        for change in ready {
            self.carry_out(change);
        }
        self.publish();
        self.welcome();
        Ok(())
    }

    fn named(&self, name: &str) -> Result<usize, ChangeError> {
        let found = self.kept.iter().position(|kept| kept.upstream().name() == name);
        found.ok_or_else(|| ChangeError::Unknown(name.to_string()))
    }

    fn prepare(&mut self, change: Change) -> Result<PreparedChange, ChangeError> {
        let at = match &change {
            Change::Upsert(config) => self.named(&config.name).ok(),
            Change::Remove { name, .. } | Change::Drain { name, .. } | Change::Weight { name, .. } => {
                Some(self.named(name)?)
            }
            Change::Release { name } | Change::Leave { name } => self.named(name).ok(),
            _ => None,
        };
        let operators = at.is_some_and(|at| self.kept[at].is_operators());
        let there = at.map(|at| self.kept[at].upstream().clone());
        Ok(match (change, there) {
            (Change::Upsert(config), Some(_)) if operators && config.discovered.is_some() => {
                PreparedChange::Nothing
            }
            (Change::Release { .. }, _) if operators => PreparedChange::Nothing,
            (Change::Release { .. }, Some(there)) => PreparedChange::Remove { id: there.id, force: false },
            (Change::Leave { .. }, Some(there)) => {
                let discovered = Some(Discovered { source: NO_SOURCE.into(), model: None });
                let config = UpstreamConfig { discovered, ..there.config.clone() };
                let upstream = Arc::new(there.renewed(config).map_err(ChangeError::Unusable)?);
                PreparedChange::Renew { upstream, stays: false }
            }
            (Change::Sources(sources), _) => {
                PreparedChange::Plan(self.plan(sources).map_err(ChangeError::Unusable)?)
            }
            (Change::Upsert(config), Some(there)) if there.is_as(&config) => PreparedChange::Keep(there.id),
            (Change::Upsert(config), Some(there)) if there.config.url == config.url => {
                let upstream = Arc::new(there.renewed(config).map_err(ChangeError::Unusable)?);
                PreparedChange::Renew { upstream, stays: true }
            }
            (Change::Upsert(config), there) => {
                let upstream = self.make(&config).map_err(ChangeError::Unusable)?;
                PreparedChange::Enter { upstream, replaces: there.map(|there| there.id) }
            }
            (Change::Weight { weight, .. }, Some(there)) => {
                let config = UpstreamConfig { weight, ..there.config.clone() };
                let upstream = Arc::new(there.renewed(config).map_err(ChangeError::Unusable)?);
                PreparedChange::Renew { upstream, stays: false }
            }
            (Change::Remove { force, .. }, Some(there)) => PreparedChange::Remove { id: there.id, force },
            (Change::Drain { drain, .. }, Some(there)) => PreparedChange::Drain { id: there.id, drain },
            (Change::Rules(rules), _) => PreparedChange::Rules(Arc::new(rules)),
            (Change::QueueSize(size), _) => PreparedChange::QueueSize(size),
            (Change::Awaits(until), _) => PreparedChange::Awaits(until),
            // Changes of one upstream are rejected above where the upstream does not exist.
            (_, None) => PreparedChange::Nothing,
        })
    }

    fn carry_out(&mut self, ready: PreparedChange) {
        let rules = self.fleet.rules.load_full();
        match ready {
            PreparedChange::Keep(id) => {
                if let Some(kept) = self.find(id) {
                    kept.entry.removing = false;
                }
            }
            PreparedChange::Renew { upstream, stays } => {
                self.fleet.observer.upstream_altered(upstream.name());
                if let Some(kept) = self.find(upstream.id) {
                    kept.renew(upstream);
                    kept.entry.removing &= !stays;
                }
            }
            PreparedChange::Enter { upstream, replaces } => {
                self.fleet.observer.upstream_added(upstream.name(), &upstream.config.url.display());
                let kept = UpstreamRecord::new(upstream.clone(), now(), self.fleet.observer.clone());
                let there = self.kept.iter().position(|kept| Some(kept.upstream().id) == replaces);
                match there {
                    Some(at) => {
                        let before = std::mem::replace(&mut self.kept[at], kept);
                        self.depart(before);
                    }
                    None => self.kept.push(kept),
                }
                self.probe(upstream);
            }
            PreparedChange::Remove { id, force } => self.remove(id, force),
            PreparedChange::Drain { id, drain } => {
                if let Some(kept) = self.find(id) {
                    kept.drain(drain, now(), &rules);
                }
            }
            PreparedChange::Rules(rules) => {
                self.fleet.rules.store(rules.clone());
                for kept in self.all() {
                    kept.look_again(&rules);
                    // Probe now: the old interval no longer applies.
                    kept.upstream().doubt();
                }
            }
            PreparedChange::QueueSize(size) => self.fleet.queue.resize(size),
            PreparedChange::Plan(plan) => drop(self.fleet.plan.send_replace(plan)),
            PreparedChange::Awaits(until) => self.awaited = until,
            PreparedChange::Nothing => {}
        }
    }

    fn remove(&mut self, id: usize, force: bool) {
        let Some(at) = self.kept.iter().position(|kept| kept.upstream().id == id) else { return };
        if force {
            let kept = self.kept.remove(at);
            self.fleet.observer.upstream_removed(kept.upstream().name());
            self.depart(kept);
            return;
        }
        let kept = &mut self.kept[at];
        kept.entry.removing = true;
        let upstream = kept.upstream().clone();
        self.fleet.observer.upstream_removing(upstream.name(), upstream.load().active);
        self.report_when_idle(upstream);
    }

    /// Removes an upstream from the fleet at once; it is probed until its last request has ended.
    fn depart(&mut self, mut kept: UpstreamRecord) {
        kept.entry.removing = true;
        self.report_when_idle(kept.upstream().clone());
        self.departed.push(kept);
    }

    fn report_when_idle(&mut self, upstream: Arc<Upstream>) {
        let id = upstream.id;
        let keeper = self.fleet.keeper.clone();
        self.tasks.spawn(async move {
            upstream.idle().await;
            // Sending fails only when the keeper has stopped.
            drop(keeper.send(KeeperMessage::Emptied { id }).await);
        });
    }
}

/// A change whose fallible steps are done.
enum PreparedChange {
    /// The upstream is unchanged, and stays.
    Keep(usize),
    /// `stays`: also when it was to be removed.
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
    Awaits(Option<Instant>),
    Plan(Arc<DiscoveryPlan>),
    /// No change: the operator's settings take precedence.
    Nothing,
}

/// Probes one upstream and reads its metrics, until it is no longer watched.
async fn look_after(fleet: Arc<Fleet>, upstream: Arc<Upstream>) {
    tokio::select! {
        () = probe_forever(&fleet, upstream.clone()) => {}
        () = engine_load::read_metrics_forever(&fleet, &upstream) => {}
    }
}

/// Probes one upstream until it is no longer watched.
async fn probe_forever(fleet: &Fleet, first: Arc<Upstream>) {
    let id = first.id;
    let mut upstream = first;
    let mut introduce = true;
    loop {
        let rules = fleet.rules.load_full();
        let found = probe::probe(fleet.client(), &upstream, &rules.health, introduce).await;
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
            introduce = !entry.is_ready() || entry.version.is_none();
            let interval = rules.health.interval;
            if entry.calm { interval } else { interval.min(UNREADY_PROBE_INTERVAL) }
        };
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(MIN_PROBE_INTERVAL)) => {}
            () = upstream.live.doubt.notified() => {}
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
