//! The policies that a replay can compare: the product's own, and others for reference.
//!
//! A reference policy says what each upstream costs, as the product's formula does; the least wins, and
//! equals are drawn from at random. They are written from their projects' documentation, without what is
//! beside the choice of an upstream.

use super::scene::Scene;
use crate::config::types::Preset;
use crate::sim::dice::mix;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The product's formula with the weights of a preset.
    Preset(Preset),
    /// The formula of `work` with sight of every engine's real cache and real queue.
    Oracle,
    Rival(Rival),
}

/// What others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// The threshold switch of SGLang's gateway and vLLM's router: while requests are spread evenly, who holds
    /// more than half of the prompt gets it, or else who was sent least; when they are not, the shortest queue.
    Switch,
    /// The scorers of llm-d: the share of the prompt that is held, twice, with how short the queue and how
    /// empty the cache is, by metrics that are read once a second.
    Scorers,
    /// Consistent hashing with bounded load, of KubeAI: the first block says where on a ring the search
    /// begins; the first with less than 1.25 times its share of the requests gets it.
    Ring,
    /// The blocks of Dynamo: those still to prefill there, this prompt's among them, and those that are in use
    /// while others are answered.
    Blocks,
    /// Requests in flight, less the share of the prompt that is held.
    ActiveHits,
}

impl Policy {
    pub const ALL: [Policy; 10] = [
        Policy::Preset(Preset::RoundRobin),
        Policy::Preset(Preset::LeastRequests),
        Policy::Rival(Rival::Ring),
        Policy::Rival(Rival::Switch),
        Policy::Rival(Rival::Scorers),
        Policy::Rival(Rival::ActiveHits),
        Policy::Rival(Rival::Blocks),
        Policy::Preset(Preset::Prefix),
        Policy::Preset(Preset::Work),
        Policy::Oracle,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Policy::Preset(preset) => preset.name(),
            Policy::Oracle => "oracle",
            Policy::Rival(Rival::Switch) => "threshold-switch",
            Policy::Rival(Rival::Scorers) => "scorers",
            Policy::Rival(Rival::Ring) => "bounded-hash",
            Policy::Rival(Rival::Blocks) => "prefill-decode",
            Policy::Rival(Rival::ActiveHits) => "active-hits",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

// === impl Rival ===

impl Rival {
    /// What each upstream costs.
    pub fn costs(self, scene: &Scene<'_>, costs: &mut Vec<f64>) {
        costs.clear();
        let places = 0..scene.candidates.len();
        match self {
            Rival::Switch => costs.extend(places.map(|at| switch(scene, at))),
            Rival::Scorers => costs.extend(places.map(|at| -score(scene, at))),
            Rival::Ring => costs.extend(places.map(|at| steps(scene, at))),
            Rival::Blocks => costs.extend(places.map(|at| blocks(scene, at))),
            Rival::ActiveHits => {
                costs.extend(places.map(|at| scene.candidates[at].active as f64 - scene.share_held(at)));
            }
        }
    }
}

fn switch(scene: &Scene<'_>, at: usize) -> f64 {
    let active = || scene.candidates.iter().map(|candidate| candidate.active as f64);
    let (least, most) = active().fold((f64::MAX, 0.0), |(low, high), one| (one.min(low), one.max(high)));
    if most - least > 32.0 && most > 1.1 * least {
        return scene.candidates[at].active as f64;
    }
    let best = (0..scene.candidates.len()).map(|at| scene.share_held(at)).fold(0.0, f64::max);
    if best > 0.5 { -scene.share_held(at) } else { scene.sent[at] as f64 }
}

fn score(scene: &Scene<'_>, at: usize) -> f64 {
    let waiting = || scene.metrics.iter().map(|metrics| metrics.waiting as f64);
    let (least, most) = waiting().fold((f64::MAX, 0.0), |(low, high), one| (one.min(low), one.max(high)));
    let here = scene.metrics[at];
    let queue = if most > least { (most - here.waiting as f64) / (most - least) } else { 1.0 };
    2.0 * scene.share_held(at) + queue + (1.0 - here.usage)
}

/// How many steps on the ring lead to it from where the prompt's first block falls; after all others when it
/// has its share already. Each upstream stands on the ring many times, so that every block sees another order.
fn steps(scene: &Scene<'_>, at: usize) -> f64 {
    let all: u64 = scene.candidates.iter().map(|candidate| candidate.active).sum();
    let most = ((all + 1) as f64 * 1.25 / scene.candidates.len() as f64).ceil();
    let key = scene.prompt.first().copied().unwrap_or(0);
    let place = mix(key ^ mix(at as u64 + 1)) as f64 / u64::MAX as f64;
    let full = scene.candidates[at].active as f64 + 1.0 > most;
    if full { 1.0 + place } else { place }
}

fn blocks(scene: &Scene<'_>, at: usize) -> f64 {
    let candidate = &scene.candidates[at];
    (candidate.backlog + candidate.uncached + candidate.context + scene.tokens) as f64 / scene.block as f64
}
