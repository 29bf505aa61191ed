//! Changes of the fleet: prepared as a whole, then carried out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::authorities::ReadAuthorities;
use super::super::breaker::BreakerRules;
use super::super::change::{FleetChange, FleetChangeError};
use super::super::discover::{DiscoveryPlan, NO_SOURCE};
use super::super::probe_duty::ProbeDuty;
use super::super::prober::watch_upstream;
use super::super::{Upstream, now};
use super::Keeper;
use super::upstream_record::UpstreamRecord;
use crate::config::types::{DiscoveryOrigin, UpstreamConfig};

/// The time that each upstream adds to the span over which the first probes are spread.
const FIRST_PROBE_SPACING: Duration = Duration::from_millis(2);

impl Keeper {
    /// Applies all changes or none: every step that can fail runs before the first change is made.
    /// `read` has the files that the changes name.
    pub(super) fn apply(
        &mut self,
        changes: Vec<FleetChange>,
        read: &ReadAuthorities,
    ) -> Result<(), FleetChangeError> {
        let mut prepared = Vec::new();
        for change in changes {
            prepared.push(self.prepare(change, read)?);
        }
        let enters = |change: &&PreparedChange| matches!(change, PreparedChange::Enter { .. });
        let entering = prepared.iter().filter(enters).count();
        for change in prepared {
            self.carry_out(change, entering);
        }
        self.publish();
        self.touched = self.records.all().map(|record| record.upstream().id).collect();
        self.wake_waiters();
        Ok(())
    }

    /// Returns the record of the upstream with this name.
    fn named(&self, name: &str) -> Result<&UpstreamRecord, FleetChangeError> {
        self.records.named(name).ok_or_else(|| FleetChangeError::Unknown(name.to_string()))
    }

    fn prepare(
        &mut self,
        change: FleetChange,
        read: &ReadAuthorities,
    ) -> Result<PreparedChange, FleetChangeError> {
        let record = match &change {
            FleetChange::Upsert(config) => self.named(&config.name).ok(),
            FleetChange::Remove { name, .. }
            | FleetChange::Drain { name, .. }
            | FleetChange::Weight { name, .. } => Some(self.named(name)?),
            FleetChange::Release { name } | FleetChange::HandToDiscovery { name } => self.named(name).ok(),
            _ => None,
        };
        let is_operators = record.is_some_and(UpstreamRecord::is_operators);
        let present = record.map(|record| record.upstream().clone());
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
                PreparedChange::Plan(self.plan(sources, read).map_err(FleetChangeError::Unusable)?)
            }
            (FleetChange::Upsert(config), Some(present)) if present.has_settings(&config, read) => {
                PreparedChange::Keep(present.id)
            }
            (FleetChange::Upsert(config), Some(present)) if present.config.url == config.url => {
                let upstream = Arc::new(present.replaced(config, read).map_err(FleetChangeError::Unusable)?);
                PreparedChange::Renew { upstream, stays: true }
            }
            (FleetChange::Upsert(config), present) => {
                let upstream = self.new_upstream(&config, read).map_err(FleetChangeError::Unusable)?;
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

    /// Carries out one of several changes, of which `entering` add an upstream.
    fn carry_out(&mut self, change: PreparedChange, entering: usize) {
        let rules = self.fleet.rules.load_full();
        match change {
            PreparedChange::Keep(id) => {
                if let Some(record) = self.records.find(id) {
                    record.entry.removing = false;
                }
            }
            PreparedChange::Renew { upstream, stays } => {
                if let Some(record) = self.records.find(upstream.id) {
                    let changed = record.upstream().config.changed_keys(&upstream.config);
                    self.fleet.observer.upstream_altered(upstream.name(), &changed);
                    record.renew(upstream);
                    record.entry.removing &= !stays;
                }
            }
            PreparedChange::Enter { upstream, replaces } => {
                self.fleet.observer.upstream_added(upstream.name(), &upstream.config.url.display());
                let record = UpstreamRecord::new(upstream.clone(), now(), self.fleet.observer.clone());
                match replaces {
                    Some(before) => {
                        let before = self.records.replace(before, record);
                        before.into_iter().for_each(|before| self.depart(before));
                    }
                    None => self.records.push(record),
                }
                self.start_prober(upstream, entering);
            }
            PreparedChange::Remove { id, force } => self.remove(id, force),
            PreparedChange::Drain { id, drain } => {
                if let Some(record) = self.records.find(id) {
                    record.drain(drain, now(), &rules);
                }
            }
            PreparedChange::Rules(rules) => {
                self.fleet.rules.store(rules.clone());
                for record in self.records.all() {
                    record.update_status(&rules);
                    // The old probe interval no longer applies.
                    record.upstream().live.wake.notify_one();
                }
            }
            PreparedChange::QueueSize(size) => self.fleet.queue.resize(size),
            PreparedChange::Plan(plan) => drop(self.fleet.plan.send_replace(plan)),
            PreparedChange::AwaitSources(until) => self.awaited = until,
            PreparedChange::Nothing => {}
        }
    }

    fn remove(&mut self, id: usize, force: bool) {
        if force {
            if let Some(record) = self.records.remove(id) {
                self.fleet.observer.upstream_removed(record.upstream().name());
                self.depart(record);
            }
            return;
        }
        let Some(record) = self.records.find(id) else { return };
        record.entry.removing = true;
        let upstream = record.upstream().clone();
        let awaited = record.begin_await_idle();
        self.fleet.observer.upstream_removing(upstream.name(), upstream.load().active);
        self.report_when_idle(awaited);
    }

    /// Removes an upstream from the fleet at once; it is probed until its last request has ended.
    fn depart(&mut self, mut record: UpstreamRecord) {
        record.entry.removing = true;
        self.records.set_trip(record.upstream().id, None);
        let awaited = record.begin_await_idle();
        self.report_when_idle(awaited);
        self.records.depart(record);
    }

    /// Starts to probe one of `count` upstreams that enter together. Their first probes are spread over a
    /// time that grows with their number, up to an interval.
    pub(super) fn start_prober(&mut self, upstream: Arc<Upstream>, count: usize) {
        let spacing = FIRST_PROBE_SPACING.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX));
        let span = spacing.min(self.fleet.rules.load().health.interval);
        let delay = span.mul_f64(self.fleet.draw());
        *upstream.live.duty() = ProbeDuty::new(now() + delay, self.fleet.draw());
        self.tasks.spawn(watch_upstream(self.fleet.clone(), upstream));
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
