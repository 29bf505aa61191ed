//! The keeper's record of one upstream: the state machine, and the entry of the next snapshot.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::Level;

use super::super::breaker::{Admits, BreakerMachine, BreakerRules, UpstreamSignal};
use super::super::keeper_message::SiblingFacts;
use super::super::probe::{ProbeFailure, ProbeReport};
use super::super::snapshot_entry::SnapshotEntry;
use super::super::upstream::Upstream;
use super::miss;
use crate::aggregate::{EngineMetrics, ModelCard};
use crate::observe::Observer;

/// The largest difference by which an engine's clock is ahead. A start further ahead counts as unknown: every
/// restart until then would count as earlier.
const MAX_CLOCK_LEAD: Duration = Duration::from_secs(24 * 3600);

/// The most errors of probes in a row that are logged above debug level. They come from the upstream.
const MAX_LOGGED_ERRORS: usize = 8;

/// A change of an upstream's capacity that wakes waiting requests.
pub(super) enum CapacityEvent {
    /// The upstream may have room.
    Room,
    /// The upstream takes fewer requests, or serves fewer models, than before.
    Loss,
}

/// The keeper's record of one upstream.
pub(super) struct UpstreamRecord {
    pub entry: SnapshotEntry,
    machine: BreakerMachine,
    /// What the upstream admitted at the last call of `capacity_event`.
    admitted: Admits,
    /// The upstream may have gained room since the last call of `capacity_event`.
    gained: bool,
    /// The upstream has lost a model since the last call of `capacity_event`.
    lost_model: bool,
    /// The start of the process by its metrics, since the cache was last assumed to be empty; Unix seconds.
    started: Option<f64>,
    /// A task waits until it has no requests in flight.
    pub awaits_idle: bool,
    /// The errors of probes since the last good one that were logged.
    logged_errors: Vec<Arc<str>>,
    observer: Observer,
}

impl UpstreamRecord {
    pub(super) fn new(upstream: Arc<Upstream>, now: Instant, observer: Observer) -> Self {
        UpstreamRecord {
            entry: SnapshotEntry::unknown(upstream),
            machine: BreakerMachine::new(now),
            admitted: Admits::None,
            gained: false,
            lost_model: false,
            started: None,
            awaits_idle: false,
            logged_errors: Vec::new(),
            observer,
        }
    }

    pub(super) fn upstream(&self) -> &Arc<Upstream> {
        &self.entry.upstream
    }

    /// Whether an operator has configured the upstream and has not removed it.
    pub(super) fn is_operators(&self) -> bool {
        self.upstream().config.discovered.is_none() && !self.entry.removing
    }

    pub(super) fn is_idle(&self) -> bool {
        self.upstream().load().active == 0
    }

    /// Returns the upstream for a task that waits until it is idle; `None`: one waits already.
    pub(super) fn begin_await_idle(&mut self) -> Option<Arc<Upstream>> {
        let waits = std::mem::replace(&mut self.awaits_idle, true);
        (!waits).then(|| self.upstream().clone())
    }

    /// Replaces the settings of the same server.
    pub(super) fn renew(&mut self, upstream: Arc<Upstream>) {
        upstream.probe_soon();
        upstream.publish_source();
        self.entry.upstream = upstream;
        self.gained = true;
    }

    /// Applies the result of a probe. Returns whether a request could see a difference.
    pub(super) fn probed(
        &mut self,
        found: Result<ProbeReport, ProbeFailure>,
        now: Instant,
        rules: &BreakerRules,
    ) -> bool {
        let answers = self.upstream().live.answers.load(Relaxed);
        self.machine.probed(found.as_ref().map(|_| ()).map_err(miss), answers, now, rules);
        let updated = match found {
            Ok(ProbeReport { models, version }) => {
                self.logged_errors.clear();
                let failed_before = self.entry.probe_error.take().is_some();
                self.update_facts(Some(models), version) || failed_before
            }
            Err(failure) => self.record_failure(&failure, rules),
        };
        self.update_status(rules) || updated
    }

    /// Records a failed probe. Returns whether its error differs from that of the probe before.
    fn record_failure(&mut self, failure: &ProbeFailure, rules: &BreakerRules) -> bool {
        let (why, in_a_row) = (failure.why(), self.machine.missed());
        // A lost probe of an upstream that answers requests is no failure.
        let is_new = in_a_row > 0
            && self.logged_errors.len() < MAX_LOGGED_ERRORS
            && !self.logged_errors.iter().any(|logged| **logged == *why);
        // After this many an upstream that has worked is down, which is logged.
        let is_missed = in_a_row == rules.health.fall && self.machine.status(rules).missing;
        let level = match () {
            () if is_missed || is_new && failure.is_answer() => Level::Warn,
            () if is_new => Level::Info,
            () => Level::Debug,
        };
        self.observer.probe_failed(self.upstream().name(), why, failure.is_answer(), in_a_row, level);
        if in_a_row == 0 || self.entry.probe_error.as_deref() == Some(why) {
            return false;
        }
        let why: Arc<str> = why.into();
        if is_new {
            self.logged_errors.push(why.clone());
        }
        self.entry.probe_error = Some(why);
        true
    }

    /// Applies a page of metrics. Returns whether the snapshot changed in more than the candidates' load.
    pub(super) fn read_metrics(&mut self, metrics: &EngineMetrics) -> bool {
        let mut updated = false;
        // Only a later start counts: when several processes share an address, the pages alternate.
        let latest = unix_now() + MAX_CLOCK_LEAD.as_secs_f64();
        let started = metrics.started.filter(|started| *started <= latest);
        match (self.started, started) {
            (Some(before), Some(started)) if started > before => {
                self.start_incarnation("restarted");
                self.machine.restarted();
                self.started = Some(started);
                updated = true;
            }
            (None, started) => self.started = started,
            _ => {}
        }
        if let Some(caches) = metrics.prefix_caching {
            self.upstream().observe_prefix_caching(caches, &self.observer);
        }
        if metrics.cache_tokens.is_some() && metrics.cache_tokens != self.entry.cache_tokens {
            self.entry.cache_tokens = metrics.cache_tokens;
            updated = true;
        }
        updated
    }

    /// Applies what a sibling found. Returns whether the snapshot changed.
    pub(super) fn apply_facts(&mut self, facts: SiblingFacts) -> bool {
        let SiblingFacts { models, version, metrics, tripped_until } = facts;
        if let Some(until) = tripped_until {
            self.machine.sibling_tripped(until);
        }
        let updated = metrics.is_some_and(|metrics| self.read_metrics(&metrics));
        self.update_facts(models, version) || updated
    }

    /// Assumes from now on that the cache of the upstream is empty.
    fn start_incarnation(&mut self, why: &'static str) {
        self.entry.incarnation += 1;
        self.started = None;
        self.upstream().reset_sight(&self.observer);
        self.upstream().reset_forecast();
        self.observer.upstream_began_anew(self.upstream().name(), why);
    }

    /// Applies the signal of a request. Returns whether the status changed.
    pub(super) fn signalled(&mut self, signal: UpstreamSignal, now: Instant, rules: &BreakerRules) -> bool {
        let good = self.upstream().live.good_answers.load(Relaxed);
        self.machine.signalled(signal, good, now, rules);
        self.update_status(rules)
    }

    /// Starts or ends an operator's drain.
    pub(super) fn drain(&mut self, drain: bool, now: Instant, rules: &BreakerRules) {
        self.machine.drain(drain, now);
        self.update_status(rules);
    }

    /// Copies the status of the machine into the entry. Returns whether the status changed.
    pub(super) fn update_status(&mut self, rules: &BreakerRules) -> bool {
        let (before, status) = (self.entry.status, self.machine.status(rules));
        let live = &self.upstream().live;
        live.reports_answers.store(self.machine.counts_answers(), Relaxed);
        if before.state != status.state {
            self.observer.upstream_changed(
                self.upstream().name(),
                before.state.label(),
                status.state.label(),
            );
        }
        self.entry.calm = !self.machine.is_uncertain();
        if before.state != status.state && !self.entry.calm {
            self.upstream().probe_soon();
        }
        self.entry.status = status;
        if before.gone && !status.gone {
            // Whether the process restarted is unknown, so its cache must not be relied on. The next page
            // sets `started` again, so that one restart counts once.
            self.start_incarnation("came back");
        }
        before != status
    }

    /// Copies the models and the version into the entry. Returns whether one of them changed.
    fn update_facts(&mut self, models: Option<Vec<ModelCard>>, version: Option<String>) -> bool {
        let entry = &mut self.entry;
        let mut updated = false;
        if let Some(models) = models.filter(|models| !same_models(models, &entry.models)) {
            self.lost_model = entry.models.iter().any(|card| !models.iter().any(|other| other.id == card.id));
            entry.models = Arc::new(models);
            entry.upstream.live.identity.serves.store(entry.models.clone());
            self.gained = true;
            updated = true;
        }
        if version.is_some() && version.as_deref() != entry.version.as_deref() {
            entry.version = version.map(Arc::from);
            updated = true;
        }
        updated
    }

    /// Returns the end of the upstream's trip, past or future; `None` when it is not tripped.
    pub(super) fn trip_end(&self) -> Option<Instant> {
        self.machine.opens()
    }

    /// Returns the change of capacity since the last call, if any.
    pub(super) fn capacity_event(&mut self, now: Instant) -> Option<CapacityEvent> {
        let admits = self.entry.admits(now);
        let before = std::mem::replace(&mut self.admitted, admits);
        let gained = std::mem::take(&mut self.gained);
        if std::mem::take(&mut self.lost_model) || admits < before {
            return Some(CapacityEvent::Loss);
        }
        (gained || admits > before).then_some(CapacityEvent::Room)
    }
}

/// Returns the present time in Unix seconds.
fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Whether two lists have the same models. The creation times and permission ids of the cards are ignored:
/// vLLM writes new ones into every answer.
fn same_models(one: &[ModelCard], other: &[ModelCard]) -> bool {
    let key = |card: &ModelCard| (card.id.clone(), card.max_model_len, card.parent.clone());
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| key(a) == key(b))
}
