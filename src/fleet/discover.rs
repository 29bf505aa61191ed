//! Discovers upstreams: polls each source for its list, and reconciles the fleet with it.
//!
//! A source that does not answer, or gives an answer that cannot be used, keeps its last list: engines
//! outlive the process that launched them. Each balancer polls for itself; siblings are not told of what it
//! finds. `reconcile` decides which source, or the operator, owns an engine that several name.
//!
//! A further kind of source is a further `Discover` and a module beside `gym`.

mod gym;
mod reconcile;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::change::{Change, ChangeError};
use super::snapshot::DISCOVERY_GRACE;
use super::upstream::Upstream;
use super::{Fleet, now};
use crate::config::secret::Secret;
use crate::config::types::{Discover, Discovered, DiscoverySource, UpstreamConfig, UpstreamTls, UpstreamUrl};
use reconcile::{FleetView, Ownerships, PresentUpstream};

/// The time limit of one poll.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest interval between two polls of a source that has not answered yet.
const UNANSWERED_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The source name of upstreams that were removed from the file.
pub(super) const NO_SOURCE: &str = "none";

/// Answers of sources that the discoverer has not handled yet.
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

/// Finds upstreams until `stop`. The keeper must run.
pub async fn run(fleet: Arc<Fleet>, mut stop: watch::Receiver<bool>) {
    let mut changes = fleet.changes();
    let (sender, mut answers) = mpsc::channel(MAX_QUEUED_ANSWERS);
    let mut finder = Discoverer::new(fleet, sender);
    finder.follow();
    loop {
        finder.reconcile().await;
        let due = finder.ownerships.due();
        let waited = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = stop.wait_for(|stopping| *stopping) => return,
            Some((label, found)) = answers.recv() => finder.take_in(label, found),
            Ok(()) = finder.plans.changed() => finder.follow(),
            Ok(()) = changes.changed() => {}
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
    /// The next round compares everything, since files may have changed.
    again: bool,
    /// The polling tasks by the source's label.
    asking: HashMap<String, PollTask>,
    /// The last value that was sent to the keeper.
    awaited: Option<Instant>,
    answers: mpsc::Sender<(String, DiscoveredServers)>,
}

/// The task that polls one source; it ends when this is dropped.
struct PollTask {
    asked: Arc<PolledSource>,
    since: Instant,
    _task: JoinSet<()>,
}

// === impl Asked ===

impl PolledSource {
    /// Fails when the source's `tls` cannot be used.
    pub fn new(source: DiscoverySource, server: Arc<Upstream>) -> Self {
        PolledSource { label: source.ask.label(), source, server }
    }

    /// Describes the source as an upstream, so that `UpstreamClient` can connect to it.
    pub fn server(source: &DiscoverySource) -> UpstreamConfig {
        let url = source.ask.url().clone();
        UpstreamConfig {
            name: source.ask.label(),
            tls: if url.https { source.tls.clone() } else { UpstreamTls::default() },
            ..UpstreamConfig::new(url)
        }
    }

    fn is_as(&self, other: &PolledSource) -> bool {
        self.source == other.source && self.server.authorities == other.server.authorities
    }

    async fn poll(&self, fleet: &Fleet) -> Result<DiscoveredServers, String> {
        let path = match self.source.ask {
            Discover::Gym(_) => gym::PATH,
        };
        let answer = fleet.client().small(&self.server, path, POLL_TIMEOUT).await;
        let answer = answer.map_err(|error| format!("GET {path}: {error}"))?;
        if answer.status() != StatusCode::OK {
            return Err(format!("GET {path}: status {}", answer.status().as_u16()));
        }
        gym::parse(answer.body()).map_err(|why| format!("GET {path}: {why}"))
    }

    /// An upstream for each engine that was found.
    fn upstreams(&self, found: &DiscoveredServers) -> impl Iterator<Item = UpstreamConfig> {
        let DiscoverySource { weight, max_active, ref tls, .. } = self.source;
        found.urls.iter().map(move |url| UpstreamConfig {
            // Several engines may share an address, below paths of their own.
            name: format!("{}{}", url.authority(), url.prefix),
            weight,
            max_active,
            api_key: found.api_key.clone(),
            tls: if url.https { tls.clone() } else { UpstreamTls::default() },
            discovered: Some(Discovered { source: self.label.clone(), model: found.model.clone() }),
            ..UpstreamConfig::new(url.clone())
        })
    }
}

/// Polls one source until dropped, and sends its answers. Of successive failures only the first is logged as
/// a warning.
async fn poll_forever(
    fleet: Arc<Fleet>,
    asked: Arc<PolledSource>,
    answers: mpsc::Sender<(String, DiscoveredServers)>,
) {
    let (mut answered, mut works) = (false, None);
    loop {
        match asked.poll(&fleet).await {
            Ok(found) => {
                if works.replace(true) != Some(true) {
                    fleet.observer.source_answers(&asked.label, found.urls.len(), found.model.as_deref());
                }
                answered = true;
                if answers.send((asked.label.clone(), found)).await.is_err() {
                    return;
                }
            }
            Err(why) => {
                fleet.observer.source_failed(&asked.label, &why, works.replace(false) != Some(false));
            }
        }
        let every = asked.source.every;
        tokio::time::sleep(if answered { every } else { every.min(UNANSWERED_POLL_INTERVAL) }).await;
    }
}

// === impl Finder ===

impl Discoverer {
    fn new(fleet: Arc<Fleet>, answers: mpsc::Sender<(String, DiscoveredServers)>) -> Self {
        Discoverer {
            plans: fleet.plan.subscribe(),
            fleet,
            plan: Arc::default(),
            found: HashMap::new(),
            ownerships: Ownerships::default(),
            again: false,
            asking: HashMap::new(),
            awaited: None,
            answers,
        }
    }

    /// Polls exactly the sources of the plan. An answer of a source counts until the next one.
    fn follow(&mut self) {
        let plan = self.plans.borrow_and_update().clone();
        let mut before = std::mem::take(&mut self.asking);
        for asked in &plan.sources {
            let going = before.remove(&asked.label).filter(|going| going.asked.is_as(asked));
            let going = going.unwrap_or_else(|| {
                let mut task = JoinSet::new();
                task.spawn(poll_forever(self.fleet.clone(), asked.clone(), self.answers.clone()));
                PollTask { asked: asked.clone(), since: now(), _task: task }
            });
            self.asking.insert(asked.label.clone(), going);
        }
        self.found.retain(|label, _| self.asking.contains_key(label));
        (self.plan, self.again) = (plan, true);
    }

    fn take_in(&mut self, label: String, found: DiscoveredServers) {
        // The source may have left the plan meanwhile.
        if self.asking.contains_key(&label) {
            self.found.insert(label, found);
        }
    }

    /// The upstreams of all sources. Of several with one URL, or one name, the first is meant.
    fn named_upstreams(&self) -> Vec<UpstreamConfig> {
        let mut wanted: Vec<UpstreamConfig> = Vec::new();
        let said = |asked: &Arc<PolledSource>| Some((asked.clone(), self.found.get(&asked.label)?));
        for (asked, found) in self.plan.sources.iter().filter_map(said) {
            for config in asked.upstreams(found) {
                if !wanted.iter().any(|first| first.url == config.url || first.name == config.name) {
                    wanted.push(config);
                }
            }
        }
        wanted
    }

    /// Until when a source that has not answered may name upstreams that serve any model.
    fn awaits(&self) -> Option<Instant> {
        let silent = self.asking.iter().filter(|(label, _)| !self.found.contains_key(*label));
        silent.map(|(_, asking)| asking.since + DISCOVERY_GRACE).max()
    }

    /// Reconciles the fleet with the lists of the sources.
    async fn reconcile(&mut self) {
        let snapshot = self.fleet.snapshot_owned();
        // In this order: an upstream leaves the file together with the plan of the sources that may name it.
        if self.plans.has_changed().is_ok_and(|changed| changed) {
            self.follow();
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
        let wanted = self.named_upstreams();
        let (again, awaits) = (std::mem::take(&mut self.again), self.awaits());
        let mut changes = self.ownerships.reconcile(&FleetView {
            wanted: &wanted,
            present: &present,
            silent: awaits.is_some(),
            again,
            now: now(),
        });
        if std::mem::replace(&mut self.awaited, awaits) != awaits {
            changes.push(Change::Awaits(awaits));
        }
        if changes.is_empty() {
            return;
        }
        // All upstreams of a source enter at once; otherwise the first would get all the traffic. An
        // upstream that cannot be used must not keep the others out.
        if let Err(ChangeError::Unusable(_)) = self.fleet.apply(changes.clone()).await {
            for change in changes {
                if let Err(ChangeError::Unusable(why)) = self.fleet.apply(vec![change.clone()]).await {
                    self.refused(&change, &why);
                }
            }
        }
    }

    fn refused(&mut self, change: &Change, why: &str) {
        if let Change::Upsert(config) = change {
            self.ownerships.unusable(&config.url);
            let source = config.discovered.as_ref().map_or("", |found| found.source.as_str());
            self.fleet.observer.discovered_unusable(source, &config.name, why);
        }
    }
}

#[cfg(test)]
mod tests;
