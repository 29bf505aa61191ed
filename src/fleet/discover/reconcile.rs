//! Decides the owner of each discovered engine, and the changes that follow. Pure: the lists of the sources
//! and the fleet go in, changes come out, and a second call with the same input returns no changes.
//!
//! ```text
//! named by    the operator too     owner: the operator; the entry is left alone
//!             sources only         owner: discovery; it enters the fleet with the source's settings
//! removed     by the operator      stays out for as long as some source goes on naming it
//! not named   any more             released when the named upstreams are ready, at the latest after
//!                                  `MAX_RELEASE_WAIT`; its requests in flight end
//! ```
//!
//! The operator acts through the file, the command line and the admin interface, here or at a sibling. An
//! upstream that a reload removes from the file has no owner but stays in the fleet like a discovered one: a
//! source may name it. An engine is identified by its URL. A weight that was given at run time stays until
//! the source's changes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::config::types::{UpstreamConfig, UpstreamUrl};
use crate::fleet::Change;

/// The longest that an upstream which is no longer named is kept while its replacements start.
const MAX_RELEASE_WAIT: Duration = Duration::from_secs(30);

/// An upstream of the fleet.
#[derive(Clone, Copy)]
pub struct PresentUpstream<'a> {
    pub config: &'a UpstreamConfig,
    pub removing: bool,
    pub ready: bool,
}

/// The fleet, and what the sources name.
pub struct FleetView<'a> {
    /// The upstreams of all sources; of several entries for one engine the first counts.
    pub wanted: &'a [UpstreamConfig],
    pub present: &'a [PresentUpstream<'a>],
    /// Some source has not answered yet.
    pub silent: bool,
    /// Files that settings name may hold something else than before.
    pub again: bool,
    pub now: Instant,
}

enum Ownership {
    /// Discovered, with the configuration that it was last given.
    Discovery(Box<UpstreamConfig>),
    Operator,
    Departed,
    /// It could not be brought into the fleet.
    Unusable,
}

#[derive(Default)]
pub struct Ownerships {
    /// The engines that some source names.
    known: BTreeMap<UpstreamUrl, Ownership>,
    /// Names of the upstreams that were discovered and are named no more, and since when.
    leaving: BTreeMap<String, Instant>,
}

// === impl Now ===

impl<'a> FleetView<'a> {
    /// The upstreams that are not being removed: the discovered ones, or the operator's.
    fn present(&self, discovered: bool) -> impl Iterator<Item = &'a PresentUpstream<'a>> {
        let is = move |there: &&PresentUpstream<'_>| there.config.discovered.is_some() == discovered;
        self.present.iter().filter(|there| !there.removing).filter(is)
    }

    fn ours(&self, config: &UpstreamConfig) -> Option<&'a PresentUpstream<'a>> {
        self.present(true).find(|there| there.config.url == config.url && there.config.name == config.name)
    }

    /// Whether the operator has an upstream with this URL or this name.
    fn belongs_to_operator(&self, config: &UpstreamConfig) -> bool {
        self.present(false).any(|there| there.config.url == config.url || there.config.name == config.name)
    }
}

// === impl Standings ===

impl Ownerships {
    /// Returns the changes, in the order to apply them.
    pub fn reconcile(&mut self, now: &FleetView<'_>) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut before = std::mem::take(&mut self.known);
        let mut entering = false;
        for config in now.wanted {
            let (before, count) = (before.remove(&config.url), changes.len());
            // An upstream that could not be used before delays no release.
            let may_enter = !matches!(before, Some(Ownership::Unusable));
            let standing = reconcile_one(before, config, now, &mut changes);
            entering |= may_enter && changes.len() > count;
            self.known.insert(config.url.clone(), standing);
        }
        self.leave(now, entering, &mut changes);
        changes
    }

    /// Marks an upstream that could not be added; the next round tries again.
    pub fn unusable(&mut self, url: &UpstreamUrl) {
        self.known.insert(url.clone(), Ownership::Unusable);
    }

    /// When the next round is due even though nothing has changed.
    pub fn due(&self) -> Option<Instant> {
        self.leaving.values().min().map(|since| *since + MAX_RELEASE_WAIT)
    }

    /// Releases upstreams that are no longer named, or that the operator has under another name. Upstreams
    /// are released only when none that enters is still missing.
    fn leave(&mut self, now: &FleetView<'_>, entering: bool, changes: &mut Vec<Change>) {
        let settled = !entering && !now.silent && self.all_ready(now);
        let mut before = std::mem::take(&mut self.leaving);
        for there in now.present(true) {
            let config = there.config;
            if self.given(&config.url).is_some_and(|ours| ours.name == config.name) {
                continue;
            }
            let since = before.remove(&config.name).unwrap_or(now.now);
            let late = !entering && now.now.saturating_duration_since(since) >= MAX_RELEASE_WAIT;
            let twice = now.present(false).any(|theirs| theirs.config.url == config.url);
            if settled || late || twice {
                changes.push(Change::Release { name: config.name.clone() });
            } else {
                self.leaving.insert(config.name.clone(), since);
            }
        }
    }

    /// The configuration that a discovered upstream was last given.
    fn given(&self, url: &UpstreamUrl) -> Option<&UpstreamConfig> {
        match self.known.get(url) {
            Some(Ownership::Discovery(given)) => Some(given),
            _ => None,
        }
    }

    /// Whether all discovered upstreams are ready.
    fn all_ready(&self, now: &FleetView<'_>) -> bool {
        let ready = |config: &UpstreamConfig| now.ours(config).is_some_and(|there| there.ready);
        self.known.keys().filter_map(|url| self.given(url)).all(ready)
    }
}

/// Decides the owner of one engine that a source names.
fn reconcile_one(
    before: Option<Ownership>,
    config: &UpstreamConfig,
    now: &FleetView<'_>,
    changes: &mut Vec<Change>,
) -> Ownership {
    if now.belongs_to_operator(config) {
        return Ownership::Operator;
    }
    match (before, now.ours(config)) {
        (None | Some(Ownership::Unusable), _) | (Some(Ownership::Operator), Some(_)) => {
            changes.push(Change::Upsert(config.clone()));
        }
        (Some(_), None) | (Some(Ownership::Departed), _) => return Ownership::Departed,
        (Some(Ownership::Discovery(given)), Some(there)) => {
            if *given != *config || now.again {
                let weight = if given.weight == config.weight { there.config.weight } else { config.weight };
                changes.push(Change::Upsert(UpstreamConfig { weight, ..config.clone() }));
            }
        }
    }
    Ownership::Discovery(Box::new(config.clone()))
}

#[cfg(test)]
mod tests;
