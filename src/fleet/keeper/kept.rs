//! One upstream as the keeper keeps it: its machine, and its entry in the next snapshot.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::super::breaker::{Admits, Machine, Rules, Sign};
use super::super::probe::{Facts, Failure};
use super::super::snapshot::Entry;
use super::super::upstream::Upstream;
use super::miss;
use crate::aggregate::{ModelCard, Truth};
use crate::observe;

/// What became of an upstream for those who wait.
pub(super) enum News {
    /// There may be room on it.
    Room,
    /// It takes less than before.
    Loss,
}

pub(super) struct Kept {
    pub entry: Entry,
    machine: Machine,
    /// What it admitted when it was last looked at.
    admitted: Admits,
    /// It may have room that it did not have before.
    roomier: bool,
    /// It does not serve what it served before.
    poorer: bool,
    /// When its process began, as it said since it was last taken for a new one.
    started: Option<f64>,
}

impl Kept {
    pub fn new(upstream: Arc<Upstream>, now: Instant) -> Self {
        Kept {
            entry: Entry::unknown(upstream),
            machine: Machine::new(now),
            admitted: Admits::None,
            roomier: false,
            poorer: false,
            started: None,
        }
    }

    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.entry.upstream
    }

    /// Named by an operator, and not taken out again.
    pub fn is_operators(&self) -> bool {
        self.upstream().config.discovered.is_none() && !self.entry.removing
    }

    pub fn is_idle(&self) -> bool {
        self.upstream().load().active == 0
    }

    /// The same server with other settings.
    pub fn renew(&mut self, upstream: Arc<Upstream>) {
        upstream.doubt();
        upstream.enters();
        self.entry.upstream = upstream;
        self.roomier = true;
    }

    /// Takes in a round of probing. Returns whether a request could see a difference.
    pub fn probed(&mut self, found: Result<Facts, Failure>, now: Instant, rules: &Rules) -> bool {
        let answers = self.upstream().live.answers.load(Relaxed);
        self.machine.probed(found.as_ref().map(|_| ()).map_err(miss), answers, now, rules);
        let learnt = match found {
            Ok(facts) => self.learn(facts),
            Err(failure) => {
                observe::probe_failed(self.upstream().name(), failure.why(), self.machine.missed());
                false
            }
        };
        self.look_again(rules) || learnt
    }

    /// Takes in what its metrics said. Returns whether anybody but a candidate's load could see a difference.
    pub fn told(&mut self, truth: &Truth) -> bool {
        let mut learnt = false;
        // Only forward: behind an address that several processes share, each page may be another's.
        match (self.started, truth.started) {
            (Some(before), Some(started)) if started > before => {
                self.begin_anew("restarted");
                self.machine.restarted();
                self.started = Some(started);
                learnt = true;
            }
            (None, started) => self.started = started,
            _ => {}
        }
        if truth.cache_tokens.is_some() && truth.cache_tokens != self.entry.cache_tokens {
            self.entry.cache_tokens = truth.cache_tokens;
            learnt = true;
        }
        learnt
    }

    /// Its cache is taken for empty.
    fn begin_anew(&mut self, why: &'static str) {
        self.entry.incarnation += 1;
        self.started = None;
        observe::upstream_began_anew(self.upstream().name(), why);
    }

    /// Takes in what a request saw.
    pub fn seen(&mut self, sign: Sign, now: Instant, rules: &Rules) -> bool {
        let answers = self.upstream().live.answers.load(Relaxed);
        self.machine.seen(sign, answers, now, rules);
        self.look_again(rules)
    }

    pub fn drain(&mut self, drain: bool, now: Instant, rules: &Rules) {
        self.machine.drain(drain, now);
        self.look_again(rules);
    }

    /// Brings the entry up to date with the machine.
    pub fn look_again(&mut self, rules: &Rules) -> bool {
        let (before, standing) = (self.entry.standing, self.machine.standing(rules));
        let live = &self.upstream().live;
        live.wants_answers.store(self.machine.wants_answers(), Relaxed);
        if before.state != standing.state {
            observe::upstream_changed(self.upstream().name(), before.state.label(), standing.state.label());
        }
        self.entry.calm = !self.machine.is_uncertain();
        if before.state != standing.state && !self.entry.calm {
            self.upstream().doubt();
        }
        self.entry.standing = standing;
        if before.gone && !standing.gone {
            // Whether or not it restarted: nobody knows, and what it lost must not be believed in. When its
            // process began is learnt again, so that one restart counts once.
            self.begin_anew("came back");
        }
        before != standing
    }

    fn learn(&mut self, facts: Facts) -> bool {
        let Facts { models, version } = facts;
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

    /// When it admits more by itself.
    pub fn opens(&self, now: Instant) -> Option<Instant> {
        self.machine.opens().filter(|opens| *opens > now)
    }

    /// What those who wait should know, if anything, since this was last asked.
    pub fn news(&mut self, now: Instant) -> Option<News> {
        let admits = self.entry.admits(now);
        let before = std::mem::replace(&mut self.admitted, admits);
        let roomier = std::mem::take(&mut self.roomier);
        if std::mem::take(&mut self.poorer) || admits < before {
            return Some(News::Loss);
        }
        (roomier || admits > before).then_some(News::Room)
    }
}

/// Cards carry a fresh time and fresh permission ids with every answer; what counts is the rest.
fn same_models(one: &[ModelCard], other: &[ModelCard]) -> bool {
    let key = |card: &ModelCard| (card.id.clone(), card.max_model_len, card.parent.clone());
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| key(a) == key(b))
}
