//! The keeper's record of one upstream: its state machine, and its entry in the next snapshot.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::super::breaker::{Admits, BreakerRules, Machine, Sign};
use super::super::probe::{ProbeFailure, ProbeReport};
use super::super::snapshot::SnapshotEntry;
use super::super::upstream::Upstream;
use super::miss;
use crate::aggregate::{EngineMetrics, ModelCard};
use crate::observe::Observer;

/// A change of an upstream's capacity that waiting requests must learn of.
pub(super) enum CapacityEvent {
    /// The upstream may have room.
    Room,
    /// The upstream takes fewer requests, or serves fewer models, than before.
    Loss,
}

pub(super) struct UpstreamRecord {
    pub entry: SnapshotEntry,
    machine: Machine,
    /// What it admitted at the last call of `news`.
    admitted: Admits,
    /// It may have more room since the last call of `news`.
    roomier: bool,
    /// It has lost a model since the last call of `news`.
    poorer: bool,
    /// When its process began by its metrics, since its cache was last taken for empty.
    started: Option<f64>,
    observer: Observer,
}

impl UpstreamRecord {
    pub fn new(upstream: Arc<Upstream>, now: Instant, observer: Observer) -> Self {
        UpstreamRecord {
            entry: SnapshotEntry::unknown(upstream),
            machine: Machine::new(now),
            admitted: Admits::None,
            roomier: false,
            poorer: false,
            started: None,
            observer,
        }
    }

    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.entry.upstream
    }

    /// Whether an operator named it, and has not removed it.
    pub fn is_operators(&self) -> bool {
        self.upstream().config.discovered.is_none() && !self.entry.removing
    }

    pub fn is_idle(&self) -> bool {
        self.upstream().load().active == 0
    }

    /// Replaces the settings of the same server.
    pub fn renew(&mut self, upstream: Arc<Upstream>) {
        upstream.doubt();
        upstream.enters();
        self.entry.upstream = upstream;
        self.roomier = true;
    }

    /// Applies the result of a probe. Returns whether a request could see a difference.
    pub fn probed(
        &mut self,
        found: Result<ProbeReport, ProbeFailure>,
        now: Instant,
        rules: &BreakerRules,
    ) -> bool {
        let answers = self.upstream().live.answers.load(Relaxed);
        self.machine.probed(found.as_ref().map(|_| ()).map_err(miss), answers, now, rules);
        let learnt = match found {
            Ok(facts) => self.learn(facts),
            Err(failure) => {
                self.observer.probe_failed(self.upstream().name(), failure.why(), self.machine.missed());
                false
            }
        };
        self.look_again(rules) || learnt
    }

    /// Applies a page of metrics. Returns whether the snapshot changed in more than the candidates' load.
    pub fn read_metrics(&mut self, metrics: &EngineMetrics) -> bool {
        let mut learnt = false;
        // Only forward: behind an address that several processes share, each page may be another's.
        match (self.started, metrics.started) {
            (Some(before), Some(started)) if started > before => {
                self.begin_anew("restarted");
                self.machine.restarted();
                self.started = Some(started);
                learnt = true;
            }
            (None, started) => self.started = started,
            _ => {}
        }
        if metrics.cache_tokens.is_some() && metrics.cache_tokens != self.entry.cache_tokens {
            self.entry.cache_tokens = metrics.cache_tokens;
            learnt = true;
        }
        learnt
    }

    /// Takes the cache of the upstream for empty.
    fn begin_anew(&mut self, why: &'static str) {
        self.entry.incarnation += 1;
        self.started = None;
        self.observer.upstream_began_anew(self.upstream().name(), why);
    }

    /// Applies what a request saw.
    pub fn signalled(&mut self, sign: Sign, now: Instant, rules: &BreakerRules) -> bool {
        let answers = self.upstream().live.answers.load(Relaxed);
        self.machine.seen(sign, answers, now, rules);
        self.look_again(rules)
    }

    pub fn drain(&mut self, drain: bool, now: Instant, rules: &BreakerRules) {
        self.machine.drain(drain, now);
        self.look_again(rules);
    }

    /// Brings the entry up to date with the machine.
    pub fn look_again(&mut self, rules: &BreakerRules) -> bool {
        let (before, standing) = (self.entry.status, self.machine.status(rules));
        let live = &self.upstream().live;
        live.wants_answers.store(self.machine.counts_answers(), Relaxed);
        if before.state != standing.state {
            self.observer.upstream_changed(
                self.upstream().name(),
                before.state.label(),
                standing.state.label(),
            );
        }
        self.entry.calm = !self.machine.is_uncertain();
        if before.state != standing.state && !self.entry.calm {
            self.upstream().doubt();
        }
        self.entry.status = standing;
        if before.gone && !standing.gone {
            // Whether it restarted is unknown, so its cache must not be relied on. The start of its process
            // is learnt again, so that one restart counts once.
            self.begin_anew("came back");
        }
        before != standing
    }

    fn learn(&mut self, facts: ProbeReport) -> bool {
        let ProbeReport { models, version } = facts;
        let entry = &mut self.entry;
        let mut learnt = false;
        if !same_models(&models, &entry.models) {
            self.poorer = entry.models.iter().any(|card| !models.iter().any(|other| other.id == card.id));
            entry.models = Arc::new(models);
            entry.upstream.live.serves.store(entry.models.clone());
            self.roomier = true;
            learnt = true;
        }
        if version.is_some() && version.as_deref() != entry.version.as_deref() {
            entry.version = version.map(Arc::from);
            learnt = true;
        }
        learnt
    }

    /// When it will admit more without another event.
    pub fn opens(&self, now: Instant) -> Option<Instant> {
        self.machine.opens().filter(|opens| *opens > now)
    }

    /// The change of capacity since the last call, if there was one.
    pub fn news(&mut self, now: Instant) -> Option<CapacityEvent> {
        let admits = self.entry.admits(now);
        let before = std::mem::replace(&mut self.admitted, admits);
        let roomier = std::mem::take(&mut self.roomier);
        if std::mem::take(&mut self.poorer) || admits < before {
            return Some(CapacityEvent::Loss);
        }
        (roomier || admits > before).then_some(CapacityEvent::Room)
    }
}

/// Whether two lists name the same models. Cards carry a fresh time and fresh permission ids with every
/// answer, which are ignored.
fn same_models(one: &[ModelCard], other: &[ModelCard]) -> bool {
    let key = |card: &ModelCard| (card.id.clone(), card.max_model_len, card.parent.clone());
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| key(a) == key(b))
}
