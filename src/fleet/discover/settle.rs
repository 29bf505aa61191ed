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
//! What a reload takes out of the file is nobody's, and no less there than what was discovered: a source may
//! name it. An engine is known by its URL. A weight that was given at run time stays until the source's
//! changes.

use std::collections::BTreeMap;
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

/// What stands now.
pub struct Now<'a> {
    /// Of all sources, the first that names an engine first.
    pub wanted: &'a [UpstreamConfig],
    pub present: &'a [Present<'a>],
    /// Some source has not answered yet.
    pub silent: bool,
    /// Files that settings name may hold something else than before.
    pub again: bool,
    pub now: Instant,
}

enum Standing {
    /// With what it was last given.
    Ours(Box<UpstreamConfig>),
    Theirs,
    Out,
    /// It could not be brought into the fleet.
    Unusable,
}

#[derive(Default)]
pub struct Standings {
    /// The engines that some source names.
    known: BTreeMap<UpstreamUrl, Standing>,
    /// Names of the upstreams that were discovered and are named no more, and since when.
    leaving: BTreeMap<String, Instant>,
}

// === impl Now ===

impl<'a> Now<'a> {
    /// Those that are not on their way out, discovered or the operator's.
    fn present(&self, discovered: bool) -> impl Iterator<Item = &'a Present<'a>> {
        let is = move |there: &&Present<'_>| there.config.discovered.is_some() == discovered;
        self.present.iter().filter(|there| !there.removing).filter(is)
    }

    fn ours(&self, config: &UpstreamConfig) -> Option<&'a Present<'a>> {
        self.present(true).find(|there| there.config.url == config.url && there.config.name == config.name)
    }

    /// Whether the operator has it, or its name.
    fn is_theirs(&self, config: &UpstreamConfig) -> bool {
        self.present(false).any(|there| there.config.url == config.url || there.config.name == config.name)
    }
}

// === impl Standings ===

impl Standings {
    /// What is to be changed, in this order.
    pub fn settle(&mut self, now: &Now<'_>) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut before = std::mem::take(&mut self.known);
        let mut entering = false;
        for config in now.wanted {
            let (before, count) = (before.remove(&config.url), changes.len());
            // Nobody waits for one that may never come.
            let may_enter = !matches!(before, Some(Standing::Unusable));
            let standing = stand(before, config, now, &mut changes);
            entering |= may_enter && changes.len() > count;
            self.known.insert(config.url.clone(), standing);
        }
        self.leave(now, entering, &mut changes);
        changes
    }

    /// It could not be brought into the fleet: another look tries again.
    pub fn unusable(&mut self, url: &UpstreamUrl) {
        self.known.insert(url.clone(), Standing::Unusable);
    }

    /// When it should be looked at even though nothing has happened.
    pub fn due(&self) -> Option<Instant> {
        self.leaving.values().min().map(|since| *since + LONGEST)
    }

    /// Lets go of those that are named no more, or are the operator's by another name. Nobody goes while
    /// somebody `entering` is not there.
    fn leave(&mut self, now: &Now<'_>, entering: bool, changes: &mut Vec<Change>) {
        let settled = !entering && !now.silent && self.all_ready(now);
        let mut before = std::mem::take(&mut self.leaving);
        for there in now.present(true) {
            let config = there.config;
            if self.given(&config.url).is_some_and(|ours| ours.name == config.name) {
                continue;
            }
            let since = before.remove(&config.name).unwrap_or(now.now);
            let late = !entering && now.now.saturating_duration_since(since) >= LONGEST;
            let twice = now.present(false).any(|theirs| theirs.config.url == config.url);
            if settled || late || twice {
                changes.push(Change::Release { name: config.name.clone() });
            } else {
                self.leaving.insert(config.name.clone(), since);
            }
        }
    }

    /// What one of ours was last given.
    fn given(&self, url: &UpstreamUrl) -> Option<&UpstreamConfig> {
        match self.known.get(url) {
            Some(Standing::Ours(given)) => Some(given),
            _ => None,
        }
    }

    /// Whether all of ours take requests.
    fn all_ready(&self, now: &Now<'_>) -> bool {
        let ready = |config: &UpstreamConfig| now.ours(config).is_some_and(|there| there.ready);
        self.known.keys().filter_map(|url| self.given(url)).all(ready)
    }
}

/// What becomes of an engine that is named.
fn stand(
    before: Option<Standing>,
    config: &UpstreamConfig,
    now: &Now<'_>,
    changes: &mut Vec<Change>,
) -> Standing {
    if now.is_theirs(config) {
        return Standing::Theirs;
    }
    match (before, now.ours(config)) {
        (None | Some(Standing::Unusable), _) | (Some(Standing::Theirs), Some(_)) => {
            changes.push(Change::Upsert(config.clone()));
        }
        (Some(_), None) | (Some(Standing::Out), _) => return Standing::Out,
        (Some(Standing::Ours(given)), Some(there)) => {
            if *given != *config || now.again {
                let weight = if given.weight == config.weight { there.config.weight } else { config.weight };
                changes.push(Change::Upsert(UpstreamConfig { weight, ..config.clone() }));
            }
        }
    }
    Standing::Ours(Box::new(config.clone()))
}

#[cfg(test)]
mod tests;
