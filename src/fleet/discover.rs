//! Discovers upstreams: follows each source, and reconciles the fleet with its list.
//!
//! Each source has a task, which reports whole lists. It polls (`gym`, `file`, `dns`), or it watches and
//! reports a list after each change. The task keeps the last list of a source that does not answer, or
//! answers with an invalid list: engines outlive the program that launched them, and an engine that is gone
//! fails its probes. Each balancer follows its sources for itself and does not share the lists with its
//! siblings. `reconcile` decides the owner of an engine that several sources, or the operator, name.
//!
//! A new kind of source needs a variant of `DiscoveryMethod`, its keys in `config::types`, and a module
//! beside `gym` that `task` calls.

mod dns;
mod engine;
mod file;
mod gym;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod reconcile;
mod source;
mod task;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::change::{FleetChange, FleetChangeError};
use super::snapshot::DISCOVERY_GRACE;
use super::{Fleet, now};
use crate::config::types::{DiscoveryMethod, UpstreamConfig};
use engine::DiscoveredEngine;
use reconcile::{FleetView, Ownerships, PresentUpstream};
pub(super) use source::PlannedSource;
use source::{SourceList, SourceReporter};
pub(super) use task::poll;

/// The time limit of one poll.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest interval between two polls of a source that has not answered yet.
const UNANSWERED_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The least interval between two rounds after changes of the fleet: each round takes time in proportion to
/// the number of upstreams.
const MIN_ROUND_INTERVAL: Duration = Duration::from_millis(20);

/// The source name of upstreams that were removed from the file.
pub(super) const NO_SOURCE: &str = "none";

/// The largest number of lists that the discoverer has not handled yet.
const MAX_QUEUED_ANSWERS: usize = 16;

/// The sources of the present configuration.
#[derive(Default)]
pub(super) struct DiscoveryPlan {
    pub sources: Vec<Arc<PlannedSource>>,
}

/// Discovers upstreams until `stop`. Requires a running keeper.
pub async fn run(fleet: Arc<Fleet>, mut stop: watch::Receiver<bool>) {
    let mut changes = fleet.changes();
    let (sender, mut answers) = mpsc::channel(MAX_QUEUED_ANSWERS);
    let mut discoverer = Discoverer::new(fleet, sender);
    discoverer.follow_plan();
    loop {
        discoverer.reconcile().await;
        let next_round = now() + MIN_ROUND_INTERVAL;
        let changed = async {
            tokio::time::sleep_until(next_round.into()).await;
            changes.changed().await
        };
        let due = discoverer.ownerships.due();
        let waited = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = stop.wait_for(|stopping| *stopping) => return,
            Some(answer) = answers.recv() => discoverer.store_list(answer),
            Ok(()) = discoverer.plans.changed() => discoverer.follow_plan(),
            Ok(()) = changed => {}
            () = waited => {}
        }
    }
}

struct Discoverer {
    fleet: Arc<Fleet>,
    plans: watch::Receiver<Arc<DiscoveryPlan>>,
    plan: Arc<DiscoveryPlan>,
    /// The last list of each source, by the source's label.
    found: HashMap<String, Vec<DiscoveredEngine>>,
    ownerships: Ownerships,
    /// The upstreams of the lists; `None` after a list or the plan has changed.
    listed: Option<Vec<UpstreamConfig>>,
    /// The next round sends all settings again, since the files that they name may have changed.
    resend: bool,
    /// The tasks of the sources, by the source's label.
    following: HashMap<String, SourceTask>,
    /// The last value that was sent to the keeper.
    awaited: Option<Instant>,
    answers: mpsc::Sender<SourceList>,
}

/// The task that follows one source; it ends when this is dropped.
struct SourceTask {
    source: Arc<PlannedSource>,
    since: Instant,
    _task: JoinSet<()>,
}

// === impl Discoverer ===

impl Discoverer {
    fn new(fleet: Arc<Fleet>, answers: mpsc::Sender<SourceList>) -> Self {
        Discoverer {
            plans: fleet.plan.subscribe(),
            fleet,
            plan: Arc::default(),
            found: HashMap::new(),
            ownerships: Ownerships::default(),
            listed: None,
            resend: false,
            following: HashMap::new(),
            awaited: None,
            answers,
        }
    }

    /// Follows exactly the sources of the current plan. The last list of a source that stays is kept.
    fn follow_plan(&mut self) {
        let plan = self.plans.borrow_and_update().clone();
        let mut before = std::mem::take(&mut self.following);
        for source in &plan.sources {
            let going = before.remove(&source.label).filter(|going| going.source.has_settings_of(source));
            let going = going.unwrap_or_else(|| {
                let reporter = SourceReporter::new(self.fleet.clone(), source.clone(), self.answers.clone());
                let mut tasks = JoinSet::new();
                tasks.spawn(task::follow(source.clone(), reporter));
                SourceTask { source: source.clone(), since: now(), _task: tasks }
            });
            self.following.insert(source.label.clone(), going);
        }
        self.found.retain(|label, _| self.following.contains_key(label));
        self.fleet.observer.keep_sources(|label| self.following.contains_key(label));
        self.listed = None;
        (self.plan, self.resend) = (plan, true);
    }

    /// Stores the list that a source reported.
    fn store_list(&mut self, SourceList { source, engines }: SourceList) {
        // The source may have left the plan meanwhile.
        if self.following.contains_key(&source) && self.found.get(&source) != Some(&engines) {
            self.found.insert(source, engines);
            self.listed = None;
        }
    }

    /// Returns the upstreams that the sources list. Of several with the same URL or name the first counts.
    fn listed_upstreams(&self) -> Vec<UpstreamConfig> {
        let (mut listed, mut urls, mut names) = (Vec::new(), BTreeSet::new(), HashSet::new());
        let first_place = self.plan.sources.iter().find_map(|source| source.pods_place());
        for source in &self.plan.sources {
            let engines = self.found.get(&source.label).map(Vec::as_slice).unwrap_or_default();
            for mut config in source.upstreams(engines) {
                // Two namespaces may have pods of one name. The place decides, and not which of the pods is
                // ready: sessions follow the name.
                let place = source.pods_place();
                if place.is_some() && (place != first_place || names.contains(&config.name)) {
                    config.name = config.url.authority();
                }
                if !urls.contains(&config.url) && !names.contains(&config.name) {
                    urls.insert(config.url.clone());
                    names.insert(config.name.clone());
                    listed.push(config);
                }
            }
        }
        listed
    }

    /// Returns the labels of the sources that have answered, and whether each lists engines only while they
    /// are ready.
    fn answered_sources(&self) -> HashMap<String, bool> {
        let answered = self.plan.sources.iter().filter(|source| self.found.contains_key(&source.label));
        let is_watched = |source: &PlannedSource| matches!(source.source.ask, DiscoveryMethod::Kubernetes(_));
        answered.map(|source| (source.label.clone(), is_watched(source))).collect()
    }

    /// Returns until when a source that has not answered may still list upstreams with any model.
    fn awaited_until(&self) -> Option<Instant> {
        let unanswered = self.following.iter().filter(|(label, _)| !self.found.contains_key(*label));
        unanswered.map(|(_, task)| task.since + DISCOVERY_GRACE).max()
    }

    /// Reconciles the fleet with the lists of the sources.
    async fn reconcile(&mut self) {
        let snapshot = self.fleet.snapshot_owned();
        // After the snapshot: a reload removes an upstream and changes the plan together, so that this plan
        // includes the sources that may list the upstreams of the snapshot.
        if self.plans.has_changed().is_ok_and(|changed| changed) {
            self.follow_plan();
        }
        let answered = self.answered_sources();
        let answer = |config: &UpstreamConfig| answered.get(config.discovered.as_ref()?.source.as_str());
        let present: Vec<PresentUpstream<'_>> = snapshot
            .entries
            .iter()
            .map(|entry| PresentUpstream {
                config: &entry.upstream.config,
                removing: entry.removing,
                ready: entry.is_ready(),
                leaves_at_once: answer(&entry.upstream.config) == Some(&true),
                has_answer: answer(&entry.upstream.config).is_some(),
            })
            .collect();
        let listed = self.listed.take().unwrap_or_else(|| self.listed_upstreams());
        let (resend, awaited) = (std::mem::take(&mut self.resend), self.awaited_until());
        let mut changes = self.ownerships.reconcile(&FleetView {
            listed: &listed,
            present: &present,
            unanswered: awaited.is_some(),
            resend,
            now: now(),
        });
        if std::mem::replace(&mut self.awaited, awaited) != awaited {
            changes.push(FleetChange::AwaitSources(awaited));
        }
        self.listed = Some(listed);
        if changes.is_empty() {
            return;
        }
        // All upstreams of a source enter at once; otherwise the first would get all the traffic. If one is
        // unusable, the changes are applied one by one, so that the others still enter.
        if let Err(FleetChangeError::Unusable(_)) = self.fleet.apply(changes.clone()).await {
            for change in changes {
                if let Err(FleetChangeError::Unusable(why)) = self.fleet.apply(vec![change.clone()]).await {
                    self.mark_unusable(&change, &why);
                }
            }
        }
    }

    fn mark_unusable(&mut self, change: &FleetChange, why: &str) {
        if let FleetChange::Upsert(config) = change {
            let is_first = self.ownerships.mark_unusable(&config.url, now());
            let source = config.discovered.as_ref().map_or("", |found| found.source.as_str());
            self.fleet.observer.discovered_unusable(source, &config.name, why, is_first);
        }
    }
}

#[cfg(test)]
mod tests;
