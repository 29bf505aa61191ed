//! The immutable view of the fleet that one decision is made from.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::upstream::Upstream;
use crate::aggregate::ModelCard;
use crate::pick::Candidate;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not reached since the start.
    Unknown,
    Ready,
    /// Was ready, and does not answer.
    Down,
}

impl State {
    pub fn label(self) -> &'static str {
        match self {
            State::Unknown => "unknown",
            State::Ready => "ready",
            State::Down => "down",
        }
    }
}

/// One upstream as the keeper last saw it.
#[derive(Clone)]
pub struct Entry {
    pub upstream: Arc<Upstream>,
    pub state: State,
    /// When `state` began.
    pub since: Instant,
    /// What it serves; remembered while it is down.
    pub models: Arc<Vec<ModelCard>>,
    pub version: Option<Arc<str>>,
}

impl Entry {
    /// The model that it serves when none is named.
    fn base(&self) -> Option<&str> {
        self.models.iter().find(|card| card.parent.is_none()).map(|card| card.id.as_str())
    }

    pub fn serves(&self, model: &str) -> bool {
        self.models.iter().any(|card| card.id == model)
    }
}

/// Who may take a request for a model.
#[derive(Debug, PartialEq, Eq)]
pub enum Routing {
    /// These entries, none of them full.
    Candidates,
    /// Every ready upstream that serves it is at its `max_active`.
    Full,
    /// It is known, or may yet be learnt, and nobody who serves it is ready.
    NotReady,
    /// Nobody serves it.
    NoSuchModel,
}

/// For this long an upstream that was never reached counts as one that may serve any model; after that
/// an unknown name is unknown. Loading the largest models takes about as long.
const MAY_STILL_COME: std::time::Duration = std::time::Duration::from_secs(600);

pub struct Snapshot {
    pub entries: Vec<Entry>,
    /// Entries that know the model, ready or not.
    by_model: HashMap<String, Vec<usize>>,
    /// Ready upstreams all serve the same names and nobody else may come with others, so that the model
    /// does not decide where a request goes and any upstream gives the true answer for an unknown one.
    uniform: bool,
    /// Names that ready upstreams serve, in the order of the union.
    aliases: Vec<String>,
}

impl Snapshot {
    pub(super) fn unknown(upstreams: impl Iterator<Item = Arc<Upstream>>) -> Self {
        let entry = |upstream| Entry {
            upstream,
            state: State::Unknown,
            since: Instant::now(),
            models: Arc::default(),
            version: None,
        };
        Snapshot::new(upstreams.map(entry).collect())
    }

    pub(super) fn new(entries: Vec<Entry>) -> Self {
        let mut by_model: HashMap<String, Vec<usize>> = HashMap::new();
        let mut aliases: Vec<String> = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            for card in entry.models.iter() {
                let known = by_model.entry(card.id.clone()).or_default();
                if known.last() != Some(&index) {
                    known.push(index);
                }
                if entry.state == State::Ready && !aliases.contains(&card.id) {
                    aliases.push(card.id.clone());
                }
            }
        }
        let serves_all = |entry: &Entry| aliases.iter().all(|alias| entry.serves(alias));
        let uniform = entries.iter().all(|entry| entry.state != State::Unknown && serves_all(entry))
            && by_model.len() == aliases.len();
        Snapshot { entries, by_model, uniform, aliases }
    }

    pub fn any_ready(&self) -> bool {
        self.ready().next().is_some()
    }

    pub fn ready(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.state == State::Ready)
    }

    /// Whether an upstream, by its id, is known to be gone.
    pub fn is_down(&self, id: u64) -> bool {
        let entry = self.entries.iter().find(|entry| entry.upstream.id as u64 == id);
        entry.is_none_or(|entry| entry.state == State::Down)
    }

    /// Names for vLLM's "Valid aliases".
    pub fn aliases(&self) -> &[String] {
        &self.aliases
    }

    /// Whether the name of the model can change where a request goes.
    pub fn model_decides(&self) -> bool {
        !self.uniform
    }

    /// Whether a request that names no model has one to take: every ready upstream has the same base.
    pub fn serves_one_base(&self) -> bool {
        let mut bases = self.ready().map(Entry::base);
        let first = bases.next().flatten();
        bases.all(|other| other == first)
    }

    /// Whether a name is one that some upstream serves, so that it may label a metric.
    pub fn knows(&self, model: &str) -> bool {
        self.by_model.contains_key(model)
    }

    /// Fills `out` with those who may take a request for `model` of `tokens` prompt tokens. `None` is a
    /// request that names no model, or whose model does not matter.
    pub fn candidates(&self, model: Option<&str>, tokens: u64, out: &mut Vec<Candidate>) -> Routing {
        out.clear();
        let known = model.and_then(|name| self.by_model.get(name));
        if model.is_some() && known.is_none() && self.model_decides() {
            return if self.may_still_come() || !self.any_ready() {
                Routing::NotReady
            } else {
                Routing::NoSuchModel
            };
        }
        let mut full = false;
        let mut consider = |index: usize| {
            let entry = &self.entries[index];
            if entry.state != State::Ready {
                return;
            }
            let load = entry.upstream.load();
            if entry.upstream.config.max_active.is_some_and(|most| load.active >= u64::from(most)) {
                full = true;
                return;
            }
            out.push(Candidate {
                index,
                backlog: load.backlog,
                missing: tokens,
                active: load.active,
                context: load.context,
                weight: entry.upstream.config.weight,
            });
        };
        match known {
            Some(indices) => indices.iter().copied().for_each(&mut consider),
            None => (0..self.entries.len()).for_each(&mut consider),
        }
        match (out.is_empty(), full) {
            (false, _) => Routing::Candidates,
            (true, true) => Routing::Full,
            (true, false) => Routing::NotReady,
        }
    }

    fn may_still_come(&self) -> bool {
        let waited = |entry: &Entry| entry.since.elapsed() < MAY_STILL_COME;
        self.entries.iter().any(|entry| entry.state == State::Unknown && waited(entry))
    }
}
