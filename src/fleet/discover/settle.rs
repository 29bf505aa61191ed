//! Who an engine belongs to, and what has to change. Pure: what sources name and what there is go in, changes
//! come out, and a second look at the same finds nothing to do.
//!
//! ```text
//! named by       the operator too         theirs: it is left alone
//!                nobody else              ours: it enters, and has what its source says of it
//! taken out      by the operator          out, for as long as some source goes on naming it
//! not named      any more                 leaving: when the upstreams that are named are ready, and at the
//!                                         latest after `LONGEST`; its requests in flight end
//! ```
//!
//! The operator is the file, the command line, and whoever calls the admin interface, here or at a sibling.
//! An engine is known by its URL. What the file once named and names no longer was not taken out of the
//! fleet, it was left to its source. A weight that was given at run time stays until the source's changes.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use crate::config::types::{UpstreamConfig, UpstreamUrl};
use crate::fleet::Change;

/// The longest that one which is named no more waits for those that are.
const LONGEST: Duration = Duration::from_secs(30);

/// An upstream of the fleet.
#[derive(Clone, Copy)]
pub struct Present<'a> {
    pub config: &'a UpstreamConfig,
    pub removing: bool,
    pub ready: bool,
}

impl Present<'_> {
    fn is_discovered(&self) -> bool {
        self.config.discovered.is_some()
    }

    /// Of whom there can be only one.
    fn is_as(&self, config: &UpstreamConfig) -> bool {
        self.config.url == config.url || self.config.name == config.name
    }
}

/// What stands now.
pub struct Now<'a> {
    /// Of all sources, the first that names an engine first.
    pub wanted: &'a [UpstreamConfig],
    pub present: &'a [Present<'a>],
    /// Names of the upstreams that the file has.
    pub file: &'a HashSet<String>,
    /// Files that settings name may hold something else than before.
    pub again: bool,
    pub now: Instant,
}

enum Standing {
    /// With what it was last given.
    Ours(Box<UpstreamConfig>),
    Theirs {
        name: String,
        /// It stood in the file.
        filed: bool,
    },
    Out,
    Leaving {
        name: String,
        since: Instant,
    },
}

/// The engines that some source names, or named a moment ago.
#[derive(Default)]
pub struct Standings(BTreeMap<UpstreamUrl, Standing>);

// === impl Standings ===

impl Standings {
    /// What is to be changed, in this order.
    pub fn settle(&mut self, now: &Now<'_>) -> Vec<Change> {
        let mut changes = Vec::new();
        for config in now.wanted {
            let before = self.0.remove(&config.url);
            let standing = stand(before, config, now, &mut changes);
            self.0.insert(config.url.clone(), standing);
        }
        let entering = changes.iter().any(|change| matches!(change, Change::Upsert(_)));
        let settled = !entering && self.all_ready(now);
        let wanted = |url: &UpstreamUrl| now.wanted.iter().any(|config| config.url == *url);
        for (url, standing) in std::mem::take(&mut self.0) {
            if wanted(&url) {
                self.0.insert(url, standing);
                continue;
            }
            let (name, since) = match standing {
                Standing::Ours(config) => (config.name, now.now),
                Standing::Leaving { name, since } => (name, since),
                Standing::Theirs { .. } | Standing::Out => continue,
            };
            let late = !entering && now.now.saturating_duration_since(since) >= LONGEST;
            if ours(&url, now).is_none() {
                continue;
            }
            // The operator has named it since, by another name.
            let twice = present(now).any(|there| !there.is_discovered() && there.config.url == url);
            if settled || late || twice {
                changes.push(Change::Release { name });
            } else {
                self.0.insert(url, Standing::Leaving { name, since });
            }
        }
        changes
    }

    /// It could not be brought into the fleet: another look may try again.
    pub fn forget(&mut self, url: &UpstreamUrl) {
        self.0.remove(url);
    }

    /// When it should be looked at even though nothing has happened.
    pub fn due(&self) -> Option<Instant> {
        let due = |standing: &Standing| match standing {
            Standing::Leaving { since, .. } => Some(*since + LONGEST),
            _ => None,
        };
        self.0.values().filter_map(due).min()
    }

    /// Whether all of ours that are named take requests.
    fn all_ready(&self, now: &Now<'_>) -> bool {
        self.0.iter().all(|(url, standing)| match standing {
            Standing::Ours(_) if now.wanted.iter().any(|config| config.url == *url) => {
                ours(url, now).is_some_and(|there| there.ready)
            }
            _ => true,
        })
    }
}

/// The upstream that was discovered there, unless it is on its way out.
fn ours<'a>(url: &UpstreamUrl, now: &Now<'a>) -> Option<&'a Present<'a>> {
    present(now).find(|there| there.is_discovered() && there.config.url == *url)
}

/// All but those that are on their way out.
fn present<'a>(now: &Now<'a>) -> impl Iterator<Item = &'a Present<'a>> {
    now.present.iter().filter(|there| !there.removing)
}

/// What becomes of an engine that is named.
fn stand(
    before: Option<Standing>,
    config: &UpstreamConfig,
    now: &Now<'_>,
    changes: &mut Vec<Change>,
) -> Standing {
    let ours = ours(&config.url, now);
    let theirs = present(now).find(|there| !there.is_discovered() && there.is_as(config));
    if let Some(theirs) = theirs {
        if let Some(ours) = ours {
            changes.push(Change::Release { name: ours.config.name.clone() });
        }
        let was = matches!(before, Some(Standing::Theirs { filed: true, .. }));
        let filed = was || now.file.contains(&theirs.config.name);
        return Standing::Theirs { name: theirs.config.name.clone(), filed };
    }
    match (before, ours) {
        (Some(Standing::Out), _) | (Some(Standing::Ours(_)), None) => return Standing::Out,
        (Some(Standing::Theirs { name, filed }), _) if !filed || now.file.contains(&name) => {
            return Standing::Out;
        }
        (Some(Standing::Ours(given)), Some(there)) => {
            if *given != *config || now.again {
                let weight = if given.weight == config.weight { there.config.weight } else { config.weight };
                changes.push(Change::Upsert(UpstreamConfig { weight, ..config.clone() }));
            }
        }
        _ => changes.push(Change::Upsert(config.clone())),
    }
    Standing::Ours(Box::new(config.clone()))
}

#[cfg(test)]
mod tests;
