//! Decides the owner of each discovered engine, and the resulting changes of the fleet. Pure: the lists of
//! the sources and the fleet go in, changes come out, and a second call with the same input returns no
//! changes.
//!
//! ```text
//! listed by   sources and operator owner: the operator; the upstream is unchanged
//!             sources only         owner: discovery; it enters the fleet with the source's settings
//! removed     by the operator      stays out for as long as some source lists it
//! refused     by the fleet         tried again after a pause, which doubles; what the fleet has of it stays
//! no longer   listed               released when the listed upstreams are ready, at the latest after
//!                                  `MAX_RELEASE_WAIT`; its requests in flight end. One that
//!                                  `leaves_at_once` does not wait
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

/// The pause after the first refusal of an upstream; it doubles with each further one.
const MIN_REFUSAL_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause before an upstream that was refused is tried again.
const MAX_REFUSAL_PAUSE: Duration = Duration::from_secs(30);

/// An upstream that is in the fleet.
#[derive(Clone, Copy)]
pub(super) struct PresentUpstream<'a> {
    pub config: &'a UpstreamConfig,
    pub removing: bool,
    pub ready: bool,
    /// The source lists engines that are ready, and none that are to get no more requests.
    pub leaves_at_once: bool,
    /// The source of the upstream is configured, and has answered.
    pub has_answer: bool,
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
}

/// An upstream that could not be added to the fleet, or not with these settings.
struct Refusal {
    config: Box<UpstreamConfig>,
    /// The weight in the settings that the fleet accepted before, if there were any.
    given_weight: Option<f64>,
    pause: Duration,
    retry_at: Instant,
    /// The fleet had the upstream with earlier settings in the last round.
    is_present: bool,
}

/// The owners of all listed engines, and the upstreams that wait for their release.
#[derive(Default)]
pub(super) struct Ownerships {
    /// The owners by the URLs of the engines.
    known: BTreeMap<UpstreamUrl, Ownership>,
    /// The last refusals of listed upstreams by the URLs of the engines.
    refusals: BTreeMap<UpstreamUrl, Refusal>,
    /// The weights in the accepted settings that the changes of the last round replace, by URL.
    replaced: BTreeMap<UpstreamUrl, f64>,
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

// === impl Refusal ===

impl Refusal {
    /// Whether these settings were refused, and nothing tells that they are others now.
    fn still_applies(&self, config: &UpstreamConfig, now: &FleetView<'_>) -> bool {
        *self.config == *config && !now.resend
    }
}

// === impl Ownerships ===

impl Ownerships {
    /// Returns the changes, in the order to apply them.
    pub(super) fn reconcile(&mut self, now: &FleetView<'_>) -> Vec<FleetChange> {
        let index = FleetIndex::new(now);
        let mut changes = Vec::new();
        let mut before = std::mem::take(&mut self.known);
        let mut refusals = std::mem::take(&mut self.refusals);
        let mut entering = false;
        self.replaced.clear();
        for config in now.listed {
            let (mut before, count) = (before.remove(&config.url), changes.len());
            // An upstream that has an owner was accepted since.
            let refusal = refusals.remove(&config.url).filter(|_| before.is_none());
            let given_weight = match &before {
                Some(Ownership::Discovery(given)) => Some(given.weight),
                _ => refusal.as_ref().and_then(|refusal| refusal.given_weight),
            };
            let refusal = refusal.filter(|refusal| refusal.still_applies(config, now));
            let is_refused = refusal.is_some();
            if let Some(mut refusal) = refusal {
                let is_present = index.discovered(config).is_some();
                if std::mem::replace(&mut refusal.is_present, is_present) && !is_present {
                    before = Some(Ownership::Removed);
                } else {
                    let waits = now.now < refusal.retry_at && !index.belongs_to_operator(config);
                    self.refusals.insert(config.url.clone(), refusal);
                    if waits {
                        continue;
                    }
                }
            }
            let ownership = reconcile_one(before, given_weight, config, now, &index, &mut changes);
            if let Some(weight) = given_weight.filter(|_| changes.len() > count) {
                self.replaced.insert(config.url.clone(), weight);
            }
            // An upstream that was refused before delays no release.
            entering |= !is_refused && changes.len() > count;
            self.known.insert(config.url.clone(), ownership);
        }
        self.release(now, &index, entering, &mut changes);
        changes
    }

    /// Marks an upstream that could not be added, or not with its settings. Returns whether that is news.
    pub(super) fn mark_unusable(&mut self, url: &UpstreamUrl, now: Instant) -> bool {
        let Some(Ownership::Discovery(config)) = self.known.remove(url) else { return false };
        let before = self.refusals.remove(url);
        let is_first = before.is_none();
        let pause = before.map_or(MIN_REFUSAL_PAUSE, |before| (before.pause * 2).min(MAX_REFUSAL_PAUSE));
        let given_weight = self.replaced.remove(url);
        let refusal = Refusal { config, given_weight, pause, retry_at: now + pause, is_present: false };
        self.refusals.insert(url.clone(), refusal);
        is_first
    }

    /// Returns when the next round is due although nothing has changed.
    pub(super) fn due(&self) -> Option<Instant> {
        let releases = self.releasing.values().map(|since| *since + MAX_RELEASE_WAIT);
        releases.chain(self.refusals.values().map(|refusal| refusal.retry_at)).min()
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
        let settled = !entering && self.all_ready(index);
        let mut before = std::mem::take(&mut self.releasing);
        for there in now.present(true) {
            let config = there.config;
            let refused = self.refusals.get(&config.url).map(|refusal| &*refusal.config);
            let listed = self.given(&config.url).or(refused);
            if listed.is_some_and(|listed| listed.name == config.name) {
                continue;
            }
            let since = before.remove(&config.name).unwrap_or(now.now);
            let late = !entering && now.now.saturating_duration_since(since) >= MAX_RELEASE_WAIT;
            let twice = index.operator_urls.contains(&config.url);
            // Another engine that has its name has to enter first.
            let at_once = !entering && there.leaves_at_once;
            // Without its source any other may list it.
            let settled = settled && (there.has_answer || !now.unanswered);
            if settled || late || twice || at_once {
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

/// Decides the owner of one listed engine. `given_weight`: of the settings that were accepted last.
fn reconcile_one(
    before: Option<Ownership>,
    given_weight: Option<f64>,
    config: &UpstreamConfig,
    now: &FleetView<'_>,
    index: &FleetIndex<'_>,
    changes: &mut Vec<FleetChange>,
) -> Ownership {
    if index.belongs_to_operator(config) {
        return Ownership::Operator;
    }
    let there = index.discovered(config);
    // An operator's weight stays until the source gives another one than before.
    let kept = there.filter(|_| given_weight == Some(config.weight)).map(|there| there.config.weight);
    let change =
        || FleetChange::Upsert(UpstreamConfig { weight: kept.unwrap_or(config.weight), ..config.clone() });
    match (before, there) {
        (None, _) | (Some(Ownership::Operator), Some(_)) => changes.push(change()),
        (Some(Ownership::Discovery(given)), None) if given.name != config.name => {
            // The source has renamed the engine, unless the operator had removed it.
            if index.discovered(&given).is_none() {
                return Ownership::Removed;
            }
            changes.push(change());
        }
        (Some(_), None) | (Some(Ownership::Removed), _) => return Ownership::Removed,
        (Some(Ownership::Discovery(given)), Some(_)) => {
            if *given == *config && !now.resend {
                return Ownership::Discovery(given);
            }
            changes.push(change());
        }
    }
    Ownership::Discovery(Box::new(config.clone()))
}

#[cfg(test)]
mod tests;
