//! Discovers upstreams: polls each source for its list, and reconciles the fleet with it.
//!
//! A source that does not answer, or whose answer is invalid, keeps its last list: engines outlive the
//! process that launched them. Each balancer polls for itself and does not share the lists with its
//! siblings. `reconcile` decides the owner of an engine that several sources, or the operator, name.
//!
//! A new kind of source needs a new variant of `Discover` and a module beside `gym`.

mod gym;
mod reconcile;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::change::{FleetChange, FleetChangeError};
use super::client::UpstreamClient;
use super::snapshot::DISCOVERY_GRACE;
use super::upstream::Upstream;
use super::{Fleet, now};
use crate::config::secret::Secret;
use crate::config::types::{
    DiscoveryMethod, DiscoveryOrigin, DiscoverySource, UpstreamConfig, UpstreamTls, UpstreamUrl,
};
use reconcile::{FleetView, Ownerships, PresentUpstream};

/// The time limit of one poll.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest interval between two polls of a source that has not answered yet.
const UNANSWERED_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The least interval between two rounds after changes of the fleet: each round takes time in proportion to
/// the number of upstreams.
const MIN_ROUND_INTERVAL: Duration = Duration::from_millis(20);

/// The source name of upstreams that were removed from the file.
pub(super) const NO_SOURCE: &str = "none";

/// The largest number of polled lists that the discoverer has not handled yet.
const MAX_QUEUED_ANSWERS: usize = 16;

/// The engines that a source lists, and the settings it gives for all of them.
#[derive(Clone, Debug, PartialEq)]
pub struct DiscoveredServers {
    urls: Vec<UpstreamUrl>,
    api_key: Option<Secret>,
    model: Option<String>,
}

/// A discovery source, and the connection settings for it.
pub(super) struct PolledSource {
    source: DiscoverySource,
    label: String,
    server: Arc<Upstream>,
}

/// The sources of the present configuration.
#[derive(Default)]
pub(super) struct DiscoveryPlan {
    pub sources: Vec<Arc<PolledSource>>,
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
            Some((label, found)) = answers.recv() => discoverer.store_list(label, found),
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
    /// The last answer of each source, by the source's label.
    found: HashMap<String, DiscoveredServers>,
    ownerships: Ownerships,
    /// The upstreams of the lists; `None` after a list or the plan has changed.
    listed: Option<Vec<UpstreamConfig>>,
    /// The next round sends all settings again, since the files that they name may have changed.
    resend: bool,
    /// The polling tasks by the source's label.
    polling: HashMap<String, PollTask>,
    /// The last value that was sent to the keeper.
    awaited: Option<Instant>,
    answers: mpsc::Sender<(String, DiscoveredServers)>,
}

/// The task that polls one source; it ends when this is dropped.
struct PollTask {
    source: Arc<PolledSource>,
    since: Instant,
    _task: JoinSet<()>,
}

// === impl PolledSource ===

impl PolledSource {
    /// Builds the polled form of `source`; `server` holds the connection settings.
    pub(super) fn new(source: DiscoverySource, server: Arc<Upstream>) -> Self {
        PolledSource { label: source.ask.label(), source, server }
    }

    /// Describes the source as an upstream, so that `UpstreamClient` can connect to it.
    pub(super) fn server(source: &DiscoverySource) -> UpstreamConfig {
        let url = source.ask.url().clone();
        UpstreamConfig {
            name: source.ask.label(),
            tls: if url.https { source.tls.clone() } else { UpstreamTls::default() },
            ..UpstreamConfig::new(url)
        }
    }

    fn has_settings_of(&self, other: &PolledSource) -> bool {
        self.source == other.source && self.server.authorities == other.server.authorities
    }

    /// Requests the list of engines once.
    pub(super) async fn poll(
        &self,
        client: &UpstreamClient,
        limit: Duration,
    ) -> Result<DiscoveredServers, String> {
        let path = match self.source.ask {
            DiscoveryMethod::Gym(_) => gym::PATH,
        };
        let answer = client.small(&self.server, path, limit).await;
        let answer = answer.map_err(|error| format!("GET {path}: {error}"))?;
        if answer.status() != StatusCode::OK {
            return Err(format!("GET {path}: status {}", answer.status().as_u16()));
        }
        gym::parse(answer.body()).map_err(|why| format!("GET {path}: {why}"))
    }

    /// Returns an upstream for each listed engine.
    pub(super) fn upstreams(&self, found: &DiscoveredServers) -> impl Iterator<Item = UpstreamConfig> {
        let DiscoverySource { weight, max_active, ref tls, .. } = self.source;
        found.urls.iter().map(move |url| UpstreamConfig {
            // Several engines may share an address, below paths of their own.
            name: format!("{}{}", url.authority(), url.prefix),
            weight,
            max_active,
            api_key: found.api_key.clone(),
            tls: if url.https { tls.clone() } else { UpstreamTls::default() },
            discovered: Some(DiscoveryOrigin { source: self.label.clone(), model: found.model.clone() }),
            ..UpstreamConfig::new(url.clone())
        })
    }
}

/// Polls one source until dropped, and sends its answers. Of successive failures only the first is logged as
/// a warning.
async fn poll_forever(
    fleet: Arc<Fleet>,
    source: Arc<PolledSource>,
    answers: mpsc::Sender<(String, DiscoveredServers)>,
) {
    let (mut answered, mut works) = (false, None);
    loop {
        match source.poll(fleet.client(), POLL_TIMEOUT).await {
            Ok(found) => {
                if works.replace(true) != Some(true) {
                    fleet.observer.source_answers(&source.label, found.urls.len(), found.model.as_deref());
                }
                answered = true;
                if answers.send((source.label.clone(), found)).await.is_err() {
                    return;
                }
            }
            Err(why) => {
                fleet.observer.source_failed(&source.label, &why, works.replace(false) != Some(false));
            }
        }
        let every = source.source.every;
        tokio::time::sleep(if answered { every } else { every.min(UNANSWERED_POLL_INTERVAL) }).await;
    }
}

// === impl Discoverer ===

impl Discoverer {
    fn new(fleet: Arc<Fleet>, answers: mpsc::Sender<(String, DiscoveredServers)>) -> Self {
        Discoverer {
            plans: fleet.plan.subscribe(),
            fleet,
            plan: Arc::default(),
            found: HashMap::new(),
            ownerships: Ownerships::default(),
            listed: None,
            resend: false,
            polling: HashMap::new(),
            awaited: None,
            answers,
        }
    }

    /// Polls exactly the sources of the current plan. The last list of a source that stays is kept.
    fn follow_plan(&mut self) {
        let plan = self.plans.borrow_and_update().clone();
        let mut before = std::mem::take(&mut self.polling);
        for source in &plan.sources {
            let going = before.remove(&source.label).filter(|going| going.source.has_settings_of(source));
            let going = going.unwrap_or_else(|| {
                let mut task = JoinSet::new();
                task.spawn(poll_forever(self.fleet.clone(), source.clone(), self.answers.clone()));
                PollTask { source: source.clone(), since: now(), _task: task }
            });
            self.polling.insert(source.label.clone(), going);
        }
        self.found.retain(|label, _| self.polling.contains_key(label));
        self.listed = None;
        (self.plan, self.resend) = (plan, true);
    }

    /// Stores the list that a poll returned.
    fn store_list(&mut self, label: String, found: DiscoveredServers) {
        // The source may have left the plan meanwhile.
        if self.polling.contains_key(&label) && self.found.get(&label) != Some(&found) {
            self.found.insert(label, found);
            self.listed = None;
        }
    }

    /// Returns the upstreams that the sources list. Of several with the same URL or name the first counts.
    fn listed_upstreams(&self) -> Vec<UpstreamConfig> {
        let (mut listed, mut urls, mut names) = (Vec::new(), BTreeSet::new(), HashSet::new());
        let answered = |source: &Arc<PolledSource>| Some((source.clone(), self.found.get(&source.label)?));
        for (source, found) in self.plan.sources.iter().filter_map(answered) {
            for config in source.upstreams(found) {
                if !urls.contains(&config.url) && !names.contains(&config.name) {
                    urls.insert(config.url.clone());
                    names.insert(config.name.clone());
                    listed.push(config);
                }
            }
        }
        listed
    }

    /// Returns until when a source that has not answered may still list upstreams with any model.
    fn awaited_until(&self) -> Option<Instant> {
        let unanswered = self.polling.iter().filter(|(label, _)| !self.found.contains_key(*label));
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
        let present: Vec<PresentUpstream<'_>> = snapshot
            .entries
            .iter()
            .map(|entry| PresentUpstream {
                config: &entry.upstream.config,
                removing: entry.removing,
                ready: entry.is_ready(),
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
            self.ownerships.mark_unusable(&config.url);
            let source = config.discovered.as_ref().map_or("", |found| found.source.as_str());
            self.fleet.observer.discovered_unusable(source, &config.name, why);
        }
    }
}

#[cfg(test)]
mod tests;
