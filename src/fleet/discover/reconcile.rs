//! Decides the owner of each discovered engine, and the resulting changes of the fleet. Pure: the lists of
//! the sources and the fleet go in, changes come out, and a second call with the same input returns no
//! changes.
//!
//! ```text
//! listed by   sources and operator owner: the operator; the upstream is unchanged
//!             sources only         owner: discovery; it enters the fleet with the source's settings
//! removed     by the operator      stays out for as long as some source lists it
//! no longer   listed               released when the listed upstreams are ready, at the latest after
//!                                  `MAX_RELEASE_WAIT`; its requests in flight end
//! ```
//!
//! The operator acts through the file, the command line and the admin interface, here or at a sibling. An
//! upstream that a reload removes from the file stays in the fleet like a discovered one without an owner: a
//! source may list it. An engine is identified by its URL. A weight that was set at run time stays until the
//! source's weight changes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::config::types::{UpstreamConfig, UpstreamUrl};
use crate::fleet::FleetChange;

/// The longest time that an upstream which is no longer listed is kept while its replacements start.
const MAX_RELEASE_WAIT: Duration = Duration::from_secs(30);

/// An upstream that is in the fleet.
#[derive(Clone, Copy)]
pub(super) struct PresentUpstream<'a> {
    pub config: &'a UpstreamConfig,
    pub removing: bool,
    pub ready: bool,
}

/// The fleet, and the lists of the sources.
pub(super) struct FleetView<'a> {
    /// The upstreams of all sources, one for each engine.
    pub listed: &'a [UpstreamConfig],
    pub present: &'a [PresentUpstream<'a>],
    /// Some source has not answered yet.
    pub unanswered: bool,
    /// The files that settings name may have changed: send all settings again.
    pub resend: bool,
    pub now: Instant,
}

/// The owner of an engine that some source lists.
enum Ownership {
    /// Discovered, with the configuration that it was last given.
    Discovery(Box<UpstreamConfig>),
    Operator,
    /// The operator removed the upstream.
    Removed,
    /// The upstream could not be added to the fleet.
    Unusable,
}

/// The owners of all listed engines, and the upstreams that wait for their release.
#[derive(Default)]
pub(super) struct Ownerships {
    /// The owners by the URLs of the engines.
    known: BTreeMap<UpstreamUrl, Ownership>,
    /// The names of discovered upstreams that are no longer listed, and since when.
    releasing: BTreeMap<String, Instant>,
}

// === impl FleetView ===

impl<'a> FleetView<'a> {
    /// Returns the upstreams that are not being removed: the discovered ones, or the operator's.
    fn present(&self, discovered: bool) -> impl Iterator<Item = &'a PresentUpstream<'a>> {
        let is = move |there: &&PresentUpstream<'_>| there.config.discovered.is_some() == discovered;
        self.present.iter().filter(|there| !there.removing).filter(is)
    }
}

/// The upstreams of the fleet that are not being removed, found without a search.
struct FleetIndex<'a> {
    /// The discovered upstreams by name.
    discovered: HashMap<&'a str, &'a PresentUpstream<'a>>,
    operator_urls: BTreeSet<&'a UpstreamUrl>,
    operator_names: HashSet<&'a str>,
}

// === impl FleetIndex ===

impl<'a> FleetIndex<'a> {
    fn new(now: &FleetView<'a>) -> Self {
        let name = |there: &'a PresentUpstream<'a>| there.config.name.as_str();
        FleetIndex {
            discovered: now.present(true).map(|there| (name(there), there)).collect(),
            operator_urls: now.present(false).map(|there| &there.config.url).collect(),
            operator_names: now.present(false).map(name).collect(),
        }
    }

    /// Returns the discovered upstream with this URL and name.
    fn discovered(&self, config: &UpstreamConfig) -> Option<&'a PresentUpstream<'a>> {
        let there = self.discovered.get(config.name.as_str()).copied();
        there.filter(|there| there.config.url == config.url)
    }

    /// Whether the operator has an upstream with this URL or this name.
    fn belongs_to_operator(&self, config: &UpstreamConfig) -> bool {
        self.operator_urls.contains(&config.url) || self.operator_names.contains(config.name.as_str())
    }
}

// === impl Ownerships ===

impl Ownerships {
    /// Returns the changes, in the order to apply them.
    pub(super) fn reconcile(&mut self, now: &FleetView<'_>) -> Vec<FleetChange> {
        let index = FleetIndex::new(now);
        let mut changes = Vec::new();
        let mut before = std::mem::take(&mut self.known);
        let mut entering = false;
        for config in now.listed {
            let (before, count) = (before.remove(&config.url), changes.len());
            // An upstream that could not be used before delays no release.
            let may_enter = !matches!(before, Some(Ownership::Unusable));
            let ownership = reconcile_one(before, config, now, &index, &mut changes);
            entering |= may_enter && changes.len() > count;
            self.known.insert(config.url.clone(), ownership);
        }
        self.release(now, &index, entering, &mut changes);
        changes
    }

    /// Marks an upstream that could not be added; the next round tries again.
    pub(super) fn mark_unusable(&mut self, url: &UpstreamUrl) {
        self.known.insert(url.clone(), Ownership::Unusable);
    }

    /// Returns when the next round is due although nothing has changed.
    pub(super) fn due(&self) -> Option<Instant> {
        self.releasing.values().min().map(|since| *since + MAX_RELEASE_WAIT)
    }

    /// Releases upstreams that are no longer listed, or that the operator has under another name. Upstreams
    /// are released only when all that enter are ready.
    fn release(
        &mut self,
        now: &FleetView<'_>,
        index: &FleetIndex<'_>,
        entering: bool,
        changes: &mut Vec<FleetChange>,
    ) {
        let settled = !entering && !now.unanswered && self.all_ready(index);
        let mut before = std::mem::take(&mut self.releasing);
        for there in now.present(true) {
            let config = there.config;
            if self.given(&config.url).is_some_and(|given| given.name == config.name) {
                continue;
            }
            let since = before.remove(&config.name).unwrap_or(now.now);
            let late = !entering && now.now.saturating_duration_since(since) >= MAX_RELEASE_WAIT;
            let twice = index.operator_urls.contains(&config.url);
            if settled || late || twice {
                changes.push(FleetChange::Release { name: config.name.clone() });
            } else {
                self.releasing.insert(config.name.clone(), since);
            }
        }
    }

    /// Returns the configuration that a discovered upstream was last given.
    fn given(&self, url: &UpstreamUrl) -> Option<&UpstreamConfig> {
        match self.known.get(url) {
            Some(Ownership::Discovery(given)) => Some(given),
            _ => None,
        }
    }

    /// Whether all discovered upstreams are ready.
    fn all_ready(&self, index: &FleetIndex<'_>) -> bool {
        let ready = |config: &UpstreamConfig| index.discovered(config).is_some_and(|there| there.ready);
        self.known.keys().filter_map(|url| self.given(url)).all(ready)
    }
}

/// Decides the owner of one listed engine.
fn reconcile_one(
    before: Option<Ownership>,
    config: &UpstreamConfig,
    now: &FleetView<'_>,
    index: &FleetIndex<'_>,
    changes: &mut Vec<FleetChange>,
) -> Ownership {
    if index.belongs_to_operator(config) {
        return Ownership::Operator;
    }
    match (before, index.discovered(config)) {
        (None | Some(Ownership::Unusable), _) | (Some(Ownership::Operator), Some(_)) => {
            changes.push(FleetChange::Upsert(config.clone()));
        }
        (Some(_), None) | (Some(Ownership::Removed), _) => return Ownership::Removed,
        (Some(Ownership::Discovery(given)), Some(there)) => {
            if *given == *config && !now.resend {
                return Ownership::Discovery(given);
            }
            let weight = if given.weight == config.weight { there.config.weight } else { config.weight };
            changes.push(FleetChange::Upsert(UpstreamConfig { weight, ..config.clone() }));
        }
    }
    Ownership::Discovery(Box::new(config.clone()))
}

#[cfg(test)]
mod tests;
