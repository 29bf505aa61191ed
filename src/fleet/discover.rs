//! Finds upstreams: asks each source which there are, again and again, and brings the fleet to it.
//!
//! A source that does not answer, or answers what cannot be used, keeps what it gave: engines live longer
//! than whoever launched them. Each balancer asks for itself; what it finds is no change of an operator's,
//! and siblings are not told. Who an engine belongs to when several name it stands in `settle`.
//!
//! Another way of asking is another `Discover` and another module beside `gym`.

mod gym;
mod settle;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::change::{Change, Refusal};
use super::snapshot::MAY_STILL_COME;
use super::upstream::Upstream;
use super::{Fleet, now};
use crate::config::secret::Secret;
use crate::config::types::{Discover, Discovered, Source, UpstreamConfig, UpstreamTls, UpstreamUrl};
use crate::observe::discovery;
use settle::{Now, Present, Standings};

/// The longest that a question takes.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two questions, at the most, to a source that has not answered yet.
const IMPATIENT: Duration = Duration::from_secs(1);

/// The source of an upstream that the file names no more.
pub(super) const NOBODY: &str = "none";

/// Answers on their way.
const INBOX: usize = 16;

/// The engines that a source names, and what it says of all of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    urls: Vec<UpstreamUrl>,
    api_key: Option<Secret>,
    model: Option<String>,
}

/// A source that can be asked.
pub(super) struct Asked {
    source: Source,
    label: String,
    server: Arc<Upstream>,
}

/// Who is asked, as the configuration says now.
#[derive(Default)]
pub(super) struct Plan {
    pub sources: Vec<Arc<Asked>>,
}

/// Finds upstreams until `stop`. The keeper must run.
pub async fn run(fleet: Arc<Fleet>, mut stop: watch::Receiver<bool>) {
    let mut changes = fleet.changes();
    let (sender, mut answers) = mpsc::channel(INBOX);
    let mut finder = Finder::new(fleet, sender);
    finder.follow();
    loop {
        finder.settle().await;
        let due = finder.standings.due();
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

struct Finder {
    fleet: Arc<Fleet>,
    plans: watch::Receiver<Arc<Plan>>,
    plan: Arc<Plan>,
    /// What each source said last, by its label.
    found: HashMap<String, Found>,
    standings: Standings,
    /// The next look is at everything, since files may have changed.
    again: bool,
    /// Who asks, by the source's label.
    asking: HashMap<String, Asking>,
    /// As the keeper was told last.
    awaited: Option<Instant>,
    answers: mpsc::Sender<(String, Found)>,
}

/// One who asks a source, and ends with this.
struct Asking {
    asked: Arc<Asked>,
    since: Instant,
    _task: JoinSet<()>,
}

// === impl Asked ===

impl Asked {
    /// Fails when the source's `tls` cannot be used.
    pub fn new(source: Source, server: Arc<Upstream>) -> Self {
        Asked { label: source.ask.label(), source, server }
    }

    /// Who is asked, as one of those whom our client can ask.
    pub fn server(source: &Source) -> UpstreamConfig {
        let url = source.ask.url().clone();
        UpstreamConfig {
            name: source.ask.label(),
            tls: if url.https { source.tls.clone() } else { UpstreamTls::default() },
            ..UpstreamConfig::new(url)
        }
    }

    fn is_as(&self, other: &Asked) -> bool {
        self.source == other.source && self.server.authorities == other.server.authorities
    }

    async fn ask(&self, fleet: &Fleet) -> Result<Found, String> {
        let path = match self.source.ask {
            Discover::Gym(_) => gym::PATH,
        };
        let answer = fleet.client().small(&self.server, path, PATIENCE).await;
        let answer = answer.map_err(|error| format!("GET {path}: {error}"))?;
        if answer.status() != StatusCode::OK {
            return Err(format!("GET {path}: status {}", answer.status().as_u16()));
        }
        gym::parse(answer.body()).map_err(|why| format!("GET {path}: {why}"))
    }

    /// An upstream for each engine that was found.
    fn upstreams(&self, found: &Found) -> impl Iterator<Item = UpstreamConfig> {
        let Source { weight, max_active, ref tls, .. } = self.source;
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

/// Asks one source for ever, and tells what it says. Of a row of failures only the first is news.
async fn ask_forever(fleet: Arc<Fleet>, asked: Arc<Asked>, answers: mpsc::Sender<(String, Found)>) {
    let (mut answered, mut works) = (false, None);
    loop {
        match asked.ask(&fleet).await {
            Ok(found) => {
                if works.replace(true) != Some(true) {
                    discovery::answers(&asked.label, found.urls.len(), found.model.as_deref());
                }
                answered = true;
                if answers.send((asked.label.clone(), found)).await.is_err() {
                    return;
                }
            }
            Err(why) => {
                discovery::failed(&asked.label, &why, works.replace(false) != Some(false));
            }
        }
        let every = asked.source.every;
        tokio::time::sleep(if answered { every } else { every.min(IMPATIENT) }).await;
    }
}

// === impl Finder ===

impl Finder {
    fn new(fleet: Arc<Fleet>, answers: mpsc::Sender<(String, Found)>) -> Self {
        Finder {
            plans: fleet.plan.subscribe(),
            fleet,
            plan: Arc::default(),
            found: HashMap::new(),
            standings: Standings::default(),
            again: false,
            asking: HashMap::new(),
            awaited: None,
            answers,
        }
    }

    /// Asks those of the plan, and nobody else. What a source said counts until it says something else.
    fn follow(&mut self) {
        let plan = self.plans.borrow_and_update().clone();
        let mut before = std::mem::take(&mut self.asking);
        for asked in &plan.sources {
            let going = before.remove(&asked.label).filter(|going| going.asked.is_as(asked));
            let going = going.unwrap_or_else(|| {
                let mut task = JoinSet::new();
                task.spawn(ask_forever(self.fleet.clone(), asked.clone(), self.answers.clone()));
                Asking { asked: asked.clone(), since: now(), _task: task }
            });
            self.asking.insert(asked.label.clone(), going);
        }
        self.found.retain(|label, _| self.asking.contains_key(label));
        (self.plan, self.again) = (plan, true);
    }

    fn take_in(&mut self, label: String, found: Found) {
        // One that was asked may not be in the plan any more.
        if self.asking.contains_key(&label) {
            self.found.insert(label, found);
        }
    }

    /// The upstreams of all sources. Of several with one URL, or one name, the first is meant.
    fn wanted(&self) -> Vec<UpstreamConfig> {
        let mut wanted: Vec<UpstreamConfig> = Vec::new();
        let said = |asked: &Arc<Asked>| Some((asked.clone(), self.found.get(&asked.label)?));
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
        silent.map(|(_, asking)| asking.since + MAY_STILL_COME).max()
    }

    /// Brings the fleet to what the sources name.
    async fn settle(&mut self) {
        let snapshot = self.fleet.snapshot_owned();
        // In this order: what the file has left was left with a plan for who may have it.
        if self.plans.has_changed().is_ok_and(|changed| changed) {
            self.follow();
        }
        let present: Vec<Present<'_>> = snapshot
            .entries
            .iter()
            .map(|entry| Present {
                config: &entry.upstream.config,
                removing: entry.removing,
                ready: entry.is_ready(),
            })
            .collect();
        let wanted = self.wanted();
        let (again, awaits) = (std::mem::take(&mut self.again), self.awaits());
        let mut changes = self.standings.settle(&Now {
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
        // All of a source enter at once, or the first to come would get everything. One that cannot be used
        // keeps nobody else out, of whatever source.
        if let Err(Refusal::Unusable(_)) = self.fleet.apply(changes.clone()).await {
            for change in changes {
                if let Err(Refusal::Unusable(why)) = self.fleet.apply(vec![change.clone()]).await {
                    self.refused(&change, &why);
                }
            }
        }
    }

    fn refused(&mut self, change: &Change, why: &str) {
        if let Change::Upsert(config) = change {
            self.standings.unusable(&config.url);
            let source = config.discovered.as_ref().map_or("", |found| found.source.as_str());
            discovery::unusable(source, &config.name, why);
        }
    }
}

#[cfg(test)]
mod tests;
