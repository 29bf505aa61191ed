//! The rules that compare upstreams: those with the same model should be alike.
//!
//! Of several values the most frequent one is the norm, and of equally frequent ones the first. Each upstream
//! with another value gives a finding.

use std::collections::HashMap;
use std::hash::Hash;

use super::facts::UpstreamFacts;
use super::finding::{Finding, Severity};
use crate::aggregate::ModelCard;

/// An upstream that differs from the norm.
struct OddOne<'a, V> {
    upstream: &'a UpstreamFacts,
    value: V,
    norm: V,
    /// The upstreams with the norm.
    others: Vec<&'a UpstreamFacts>,
}

/// Adds the findings of all comparisons.
pub(super) fn add(upstreams: &[UpstreamFacts], found: &mut Vec<Finding>) {
    let mut by_base: HashMap<&str, Vec<&UpstreamFacts>> = HashMap::new();
    let mut bases = Vec::new();
    for upstream in upstreams {
        let Some(base) = upstream.base() else { continue };
        let group = by_base.entry(base).or_default();
        if group.is_empty() {
            bases.push(base);
        }
        group.push(upstream);
    }
    models(upstreams, found);
    for base in bases {
        let group = by_base.get(base).map(Vec::as_slice).unwrap_or_default();
        settings(base, group, found);
    }
    same_engines(upstreams, found);
}

/// Compares the cards of each model. Of several models that differ in the same way the first one counts.
fn models(upstreams: &[UpstreamFacts], found: &mut Vec<Finding>) {
    let mut by_id: HashMap<&str, Vec<(&UpstreamFacts, &ModelCard)>> = HashMap::new();
    let mut ids = Vec::new();
    for upstream in upstreams {
        for card in upstream.cards() {
            let group = by_id.entry(&card.id).or_default();
            if group.is_empty() {
                ids.push(card.id.as_str());
            }
            group.push((upstream, card));
        }
    }
    let first = found.len();
    for id in ids {
        let group = by_id.get(id).map(Vec::as_slice).unwrap_or_default();
        let mut new = Vec::new();
        different_models(id, group, &mut new);
        different_lengths(id, group, &mut new);
        for finding in new {
            let is_same = |other: &Finding| other.code == finding.code && other.subject == finding.subject;
            if !found[first..].iter().any(is_same) {
                found.push(finding);
            }
        }
    }
}

fn different_models(id: &str, group: &[(&UpstreamFacts, &ModelCard)], found: &mut Vec<Finding>) {
    let values = group.iter().map(|(upstream, card)| (*upstream, (root(card), card.parent.clone())));
    for odd in odd_ones(values.collect()) {
        let ((root, parent), (norm_root, norm_parent)) = (&odd.value, &odd.norm);
        let (what, here, there) = match parent == norm_parent {
            true => ("root", root, norm_root),
            false => ("parent", parent, norm_parent),
        };
        let show = |value: &Option<String>| value.as_ref().map_or("none".into(), |text| format!("{text:?}"));
        let seen = format!("model {id:?} has {what} {}, and {} {}", show(here), show(there), odd.among());
        // The same model may lie at another path on another machine.
        let last = |value: &Option<String>| {
            value.as_deref().and_then(|text| text.trim_end_matches('/').rsplit('/').next().map(String::from))
        };
        let severity =
            if what == "root" && last(here) == last(there) { Severity::Note } else { Severity::Error };
        let remedy = "serve one model under one name: see vLLM's --model and --served-model-name";
        found.push(Finding::new(severity, "different_models", odd.upstream.name(), seen, remedy));
    }
}

/// Returns the path or the repository of a model, from its card.
fn root(card: &ModelCard) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct RootOfCard {
        root: Option<String>,
    }
    let parsed: Result<RootOfCard, _> = serde_json::from_str(&card.raw);
    parsed.ok().and_then(|card| card.root)
}

fn different_lengths(id: &str, group: &[(&UpstreamFacts, &ModelCard)], found: &mut Vec<Finding>) {
    let values = group.iter().filter_map(|(upstream, card)| Some((*upstream, card.max_model_len?)));
    for odd in odd_ones(values.collect()) {
        let seen = format!("model {id:?} has max_model_len {}, and {} {}", odd.value, odd.norm, odd.among());
        let remedy = "start all vLLM of a model with the same --max-model-len";
        found.push(Finding::warning("max_model_len", odd.upstream.name(), seen, remedy));
    }
}

/// Compares the settings of the upstreams of one model.
fn settings(base: &str, group: &[&UpstreamFacts], found: &mut Vec<Finding>) {
    let versions = group.iter().filter_map(|upstream| Some((*upstream, upstream.version.clone()?)));
    for odd in odd_ones(versions.collect()) {
        let seen = format!("its version is {}, and {} {}", odd.value, odd.norm, odd.among());
        let remedy = "run one version of vLLM for a model";
        found.push(Finding::warning("version", odd.upstream.name(), seen, remedy));
    }
    let info = |upstream: &UpstreamFacts| upstream.page().map(|page| page.info.clone());
    let sizes = group.iter().filter_map(|upstream| Some((*upstream, info(upstream)?.block_size?)));
    for odd in odd_ones(sizes.collect()) {
        let seen = format!("blocks of {base:?} have {} tokens, and {} {}", odd.value, odd.norm, odd.among());
        let remedy = "start all vLLM of a model with the same --block-size";
        found.push(Finding::warning("block_size", odd.upstream.name(), seen, remedy));
    }
    let algorithms = group.iter().filter_map(|upstream| Some((*upstream, info(upstream)?.hash_algo?)));
    for odd in odd_ones(algorithms.collect()) {
        let seen = format!("blocks are hashed with {}, and with {} {}", odd.value, odd.norm, odd.among());
        // Older releases, and xxhash, draw a seed at each start unless the variable is set: see the pull
        // request 51875 of vLLM.
        let remedy = "start all vLLM with the same --prefix-caching-hash-algo, and for xxhash or a vLLM \
                      before 0.32 with the same PYTHONHASHSEED; only engines that share blocks need it";
        found.push(Finding::note("hash_algorithm", odd.upstream.name(), seen, remedy));
    }
}

/// Finds upstreams that lead to the same engine.
fn same_engines(upstreams: &[UpstreamFacts], found: &mut Vec<Finding>) {
    let mut by_place: HashMap<String, &UpstreamFacts> = HashMap::new();
    for upstream in upstreams {
        let places = places(upstream);
        let first = places.iter().find_map(|place| by_place.get(place).copied());
        if let Some(first) = first {
            let seen = format!("is the same engine as {:?}: its load is counted twice", first.name());
            let remedy = "remove one of both from upstreams";
            found.push(Finding::warning("same_engine", upstream.name(), seen, remedy));
        }
        for place in places {
            by_place.entry(place).or_insert(upstream);
        }
    }
}

/// What identifies the engine behind an upstream: its URL, and the start of the process at its address.
fn places(upstream: &UpstreamFacts) -> Vec<String> {
    let mut places = vec![upstream.config.url.display()];
    let started = upstream.page().and_then(|page| page.metrics.started);
    if let (Some(address), Some(started)) = (upstream.address, started) {
        let prefix = &upstream.config.url.prefix;
        places.push(format!("{}{prefix} {started}", address.ip()));
    }
    places
}

/// Returns the upstreams whose value is not the most frequent one.
fn odd_ones<V: Clone + Eq + Hash>(values: Vec<(&UpstreamFacts, V)>) -> Vec<OddOne<'_, V>> {
    let Some(norm) = most_frequent(&values) else { return Vec::new() };
    let others: Vec<&UpstreamFacts> =
        values.iter().filter(|(_, value)| *value == norm).map(|(upstream, _)| *upstream).collect();
    let odd = values.into_iter().filter(|(_, value)| *value != norm);
    odd.map(|(upstream, value)| OddOne { upstream, value, norm: norm.clone(), others: others.clone() })
        .collect()
}

/// Returns the most frequent value, and of equally frequent ones the first.
fn most_frequent<V: Clone + Eq + Hash>(values: &[(&UpstreamFacts, V)]) -> Option<V> {
    let mut counts: HashMap<&V, usize> = HashMap::new();
    for (_, value) in values {
        *counts.entry(value).or_default() += 1;
    }
    let most = counts.values().copied().max()?;
    let mut all = values.iter().map(|(_, value)| value);
    all.find(|value| counts.get(value) == Some(&most)).cloned()
}

// === impl OddOne ===

impl<V> OddOne<'_, V> {
    /// The upstreams with the norm, for a text.
    fn among(&self) -> String {
        match self.others.as_slice() {
            [] => String::new(),
            [only] => format!("on {:?}", only.name()),
            [first, rest @ ..] => format!("on {:?} and {} more", first.name(), rest.len()),
        }
    }
}
