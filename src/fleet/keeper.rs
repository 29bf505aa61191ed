//! The keeper: one prober a upstream, with a reader of its metrics beside it, and one task that turns what
//! probes and requests saw, and what the operator wants, into snapshots. It is their only writer.
//!
//! One that was taken out at once is asked on for as long as requests are in flight on it: those have no
//! other way to learn that it is gone.
//!
//! An upstream that is not ready is asked more often, so that it is found soon after it comes up; one that
//! a request could not reach is asked at once.

mod kept;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::breaker::{Miss, Rules, Sign};
use super::change::{Change, Refusal};
use super::discover::{Asked, NOBODY, Plan};
use super::probe::{self, Facts, Failure};
use super::snapshot::{MAY_STILL_COME, Snapshot};
use super::{Fleet, Upstream, now, told};
use crate::aggregate::Truth;
use crate::config::types::{Config, Discovered, Source, UpstreamConfig};
use crate::observe;
use kept::{Kept, News};

/// Between two rounds while an upstream is not ready.
const IMPATIENT: Duration = Duration::from_millis(250);

/// Between two rounds at the least, however many requests doubt the upstream.
const LEAST: Duration = Duration::from_millis(50);

/// What the keeper is told.
pub(super) enum Word {
    /// By a prober.
    Probed {
        id: usize,
        found: Result<Facts, Failure>,
    },
    /// By an upstream, in its metrics.
    Told {
        id: usize,
        truth: Truth,
    },
    /// By a request.
    Seen {
        id: usize,
        sign: Sign,
    },
    /// Nothing was in flight on one that is to be removed, or departed.
    Emptied {
        id: usize,
    },
    Apply {
        changes: Vec<Change>,
        answer: oneshot::Sender<Result<(), Refusal>>,
    },
}

pub struct Keeper {
    fleet: Arc<Fleet>,
    inbox: mpsc::Receiver<Word>,
    kept: Vec<Kept>,
    /// Not of the fleet any more, with requests in flight.
    departed: Vec<Kept>,
    /// Probers, and those who wait for an upstream to be empty.
    tasks: JoinSet<()>,
    next_id: usize,
    /// Until then upstreams may be discovered that serve any model.
    awaited: Option<Instant>,
}

impl Keeper {
    pub(super) fn new(
        fleet: Arc<Fleet>,
        inbox: mpsc::Receiver<Word>,
        config: &Config,
    ) -> Result<Self, String> {
        let (kept, departed) = (Vec::new(), Vec::new());
        let awaited = (!config.sources.is_empty()).then(|| now() + MAY_STILL_COME);
        let tasks = JoinSet::new();
        let mut keeper = Keeper { fleet, inbox, kept, departed, tasks, next_id: 0, awaited };
        for config in &config.upstreams {
            let upstream = keeper.make(config)?;
            keeper.kept.push(Kept::new(upstream, now()));
        }
        let plan = keeper.plan(config.sources.clone())?;
        keeper.fleet.plan.send_replace(plan);
        keeper.publish();
        Ok(keeper)
    }

    /// Asks every upstream, again and again, and publishes what it learns. Ends with `stop`.
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
                // A trip is over: one request may go.
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

    fn plan(&mut self, sources: Vec<Source>) -> Result<Arc<Plan>, String> {
        let mut plan = Plan::default();
        for source in sources {
            let server = self.make(&Asked::server(&source))?;
            plan.sources.push(Arc::new(Asked::new(source, server)));
        }
        Ok(Arc::new(plan))
    }

    fn probe(&mut self, upstream: Arc<Upstream>) {
        self.tasks.spawn(look_after(self.fleet.clone(), upstream));
    }

    /// All that are asked, of the fleet or not.
    fn all(&mut self) -> impl Iterator<Item = &mut Kept> {
        self.kept.iter_mut().chain(&mut self.departed)
    }

    fn asked(&mut self, id: usize) -> Option<&mut Kept> {
        self.all().find(|kept| kept.upstream().id == id)
    }

    /// One of the fleet.
    fn find(&mut self, id: usize) -> Option<&mut Kept> {
        self.kept.iter_mut().find(|kept| kept.upstream().id == id)
    }

    fn publish(&self) {
        let entries = |all: &[Kept]| all.iter().map(|kept| kept.entry.clone()).collect();
        let snapshot = Snapshot::new(entries(&self.kept), entries(&self.departed));
        let max_ejected = self.fleet.rules.load().breaker.max_ejected;
        self.fleet.publish(snapshot.awaiting(self.awaited).ejecting(max_ejected));
    }

    /// The upstream of the next sign in the inbox.
    #[cfg(test)]
    pub(super) fn next_sign(&mut self) -> Option<usize> {
        match self.inbox.try_recv() {
            Ok(Word::Seen { id, .. }) => Some(id),
            _ => None,
        }
    }

    fn take_in(&mut self, word: Word) {
        let rules = self.fleet.rules.load_full();
        let changed = match word {
            Word::Probed { id, found } => {
                self.asked(id).is_some_and(|kept| kept.probed(found, now(), &rules))
            }
            Word::Told { id, truth } => self.asked(id).is_some_and(|kept| kept.told(&truth)),
            Word::Seen { id, sign } => self.asked(id).is_some_and(|kept| kept.seen(sign, now(), &rules)),
            Word::Emptied { id } => self.emptied(id),
            Word::Apply { changes, answer } => {
                // Whoever asked may have left; what it asked for is done all the same.
                drop(answer.send(self.apply(changes)));
                false
            }
        };
        if changed {
            self.publish();
            self.welcome();
        }
    }

    /// Those who wait get to look at whoever may have room now. When one that they may have waited for takes
    /// nothing any more they all look, since there may be nobody left.
    fn welcome(&mut self) {
        let queue = self.fleet.queue.clone();
        for kept in self.all() {
            match kept.news(now()) {
                Some(News::Room) => queue.freed(&kept.upstream().live),
                Some(News::Loss) => queue.lost(),
                None => {}
            }
        }
    }

    fn emptied(&mut self, id: usize) -> bool {
        let goes = |kept: &Kept| kept.upstream().id == id && kept.entry.removing && kept.is_idle();
        let busy = |kept: &&Kept| kept.upstream().id == id && kept.entry.removing && !kept.is_idle();
        let busy = self.kept.iter().chain(&self.departed).find(busy).map(|kept| kept.upstream().clone());
        if let Some(upstream) = busy {
            // A request that chose it by an older snapshot has come after all.
            self.tell_when_idle(upstream);
            return false;
        }
        let before = self.kept.len() + self.departed.len();
        self.departed.retain(|kept| !goes(kept));
        self.kept.retain(|kept| {
            let goes = goes(kept);
            if goes {
                observe::upstream_removed(kept.upstream().name());
            }
            !goes
        });
        self.kept.len() + self.departed.len() != before
    }

    // === changes ===

    /// All or none: what can fail is done before anything is changed.
    fn apply(&mut self, changes: Vec<Change>) -> Result<(), Refusal> {
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

    fn named(&self, name: &str) -> Result<usize, Refusal> {
        let found = self.kept.iter().position(|kept| kept.upstream().name() == name);
        found.ok_or_else(|| Refusal::Unknown(name.to_string()))
    }

    fn prepare(&mut self, change: Change) -> Result<Ready, Refusal> {
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
            (Change::Upsert(config), Some(_)) if operators && config.discovered.is_some() => Ready::Nothing,
            (Change::Release { .. }, _) if operators => Ready::Nothing,
            (Change::Release { .. }, Some(there)) => Ready::Remove { id: there.id, force: false },
            (Change::Leave { .. }, Some(there)) => {
                let discovered = Some(Discovered { source: NOBODY.into(), model: None });
                let config = UpstreamConfig { discovered, ..there.config.clone() };
                let upstream = Arc::new(there.renewed(config).map_err(Refusal::Unusable)?);
                Ready::Renew { upstream, stays: false }
            }
            (Change::Sources(sources), _) => Ready::Plan(self.plan(sources).map_err(Refusal::Unusable)?),
            (Change::Upsert(config), Some(there)) if there.is_as(&config) => Ready::Keep(there.id),
            (Change::Upsert(config), Some(there)) if there.config.url == config.url => {
                let upstream = Arc::new(there.renewed(config).map_err(Refusal::Unusable)?);
                Ready::Renew { upstream, stays: true }
            }
            (Change::Upsert(config), there) => {
                let upstream = self.make(&config).map_err(Refusal::Unusable)?;
                Ready::Enter { upstream, replaces: there.map(|there| there.id) }
            }
            (Change::Weight { weight, .. }, Some(there)) => {
                let config = UpstreamConfig { weight, ..there.config.clone() };
                let upstream = Arc::new(there.renewed(config).map_err(Refusal::Unusable)?);
                Ready::Renew { upstream, stays: false }
            }
            (Change::Remove { force, .. }, Some(there)) => Ready::Remove { id: there.id, force },
            (Change::Drain { drain, .. }, Some(there)) => Ready::Drain { id: there.id, drain },
            (Change::Rules(rules), _) => Ready::Rules(Arc::new(rules)),
            (Change::QueueSize(size), _) => Ready::QueueSize(size),
            (Change::Awaits(until), _) => Ready::Awaits(until),
            // Those of one upstream are refused where there is none.
            (_, None) => Ready::Nothing,
        })
    }

    fn carry_out(&mut self, ready: Ready) {
        let rules = self.fleet.rules.load_full();
        match ready {
            Ready::Keep(id) => {
                if let Some(kept) = self.find(id) {
                    kept.entry.removing = false;
                }
            }
            Ready::Renew { upstream, stays } => {
                observe::upstream_altered(upstream.name());
                if let Some(kept) = self.find(upstream.id) {
                    kept.renew(upstream);
                    kept.entry.removing &= !stays;
                }
            }
            Ready::Enter { upstream, replaces } => {
                observe::upstream_added(upstream.name(), &upstream.config.url.display());
                let kept = Kept::new(upstream.clone(), now());
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
            Ready::Remove { id, force } => self.remove(id, force),
            Ready::Drain { id, drain } => {
                if let Some(kept) = self.find(id) {
                    kept.drain(drain, now(), &rules);
                }
            }
            Ready::Rules(rules) => {
                self.fleet.rules.store(rules.clone());
                for kept in self.all() {
                    kept.look_again(&rules);
                    // Nobody waits for the end of an interval that is no longer meant.
                    kept.upstream().doubt();
                }
            }
            Ready::QueueSize(size) => self.fleet.queue.resize(size),
            Ready::Plan(plan) => drop(self.fleet.plan.send_replace(plan)),
            Ready::Awaits(until) => self.awaited = until,
            Ready::Nothing => {}
        }
    }

    fn remove(&mut self, id: usize, force: bool) {
        let Some(at) = self.kept.iter().position(|kept| kept.upstream().id == id) else { return };
        if force {
            let kept = self.kept.remove(at);
            observe::upstream_removed(kept.upstream().name());
            self.depart(kept);
            return;
        }
        let kept = &mut self.kept[at];
        kept.entry.removing = true;
        let upstream = kept.upstream().clone();
        observe::upstream_removing(upstream.name(), upstream.load().active);
        self.tell_when_idle(upstream);
    }

    /// Out of the fleet at once; asked on until its last request has ended.
    fn depart(&mut self, mut kept: Kept) {
        kept.entry.removing = true;
        self.tell_when_idle(kept.upstream().clone());
        self.departed.push(kept);
    }

    fn tell_when_idle(&mut self, upstream: Arc<Upstream>) {
        let id = upstream.id;
        let keeper = self.fleet.keeper.clone();
        self.tasks.spawn(async move {
            upstream.idle().await;
            // The keeper that is gone removes nothing any more.
            drop(keeper.send(Word::Emptied { id }).await);
        });
    }
}

/// A change that cannot fail any more.
enum Ready {
    /// It is as it should be, and stays.
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
    Rules(Arc<Rules>),
    QueueSize(usize),
    Awaits(Option<Instant>),
    Plan(Arc<Plan>),
    /// An operator's word goes before it.
    Nothing,
}

/// Probes one upstream, and reads its metrics, until nobody wants to know of it any more.
async fn look_after(fleet: Arc<Fleet>, upstream: Arc<Upstream>) {
    tokio::select! {
        () = probe_forever(&fleet, upstream.clone()) => {}
        () = told::listen_forever(&fleet, &upstream) => {}
    }
}

/// Asks one upstream until nobody wants to know of it any more.
async fn probe_forever(fleet: &Fleet, first: Arc<Upstream>) {
    let id = first.id;
    let mut upstream = first;
    let mut introduce = true;
    loop {
        let rules = fleet.rules.load_full();
        let found = probe::ask(fleet.client(), &upstream, &rules.health, introduce).await;
        let well = found.is_ok();
        if fleet.keeper.send(Word::Probed { id, found }).await.is_err() {
            return;
        }
        if well {
            upstream.live.well.notify_one();
        }
        tokio::time::sleep(LEAST).await;
        let pause = {
            let snapshot = fleet.snapshot();
            let Some(entry) = snapshot.watched(id) else { return };
            upstream = entry.upstream.clone();
            introduce = !entry.is_ready() || entry.version.is_none();
            let interval = rules.health.interval;
            if entry.calm { interval } else { interval.min(IMPATIENT) }
        };
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(LEAST)) => {}
            () = upstream.live.doubt.notified() => {}
        }
    }
}

/// How the machine takes a failed round.
fn miss(failure: &Failure) -> Miss {
    match failure {
        Failure::Refused(_) => Miss::Refused,
        Failure::Silent(_) => Miss::Silent,
        Failure::Wrong(_) => Miss::Wrong,
    }
}

#[cfg(test)]
mod tests;
