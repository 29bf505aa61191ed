//! The policies that a replay can compare: the product's own, and others for reference.
//!
//! A reference policy computes the cost of each upstream, as the product's formula does; the least wins, and
//! one of equals is drawn at random. The reference policies follow the documentation of their projects, as
//! far as the choice of an upstream is concerned.

use super::scene::Scene;
use crate::config::setting::NamedChoice;
use crate::config::types::Preset;
use crate::engine::dice::mix;

/// A policy of choice that the replay compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayPolicy {
    /// The product's formula with the weights of a preset.
    Preset(Preset),
    /// The formula of `work` with the real cache and the real queue of every engine.
    Oracle,
    Rival(Rival),
}

/// The policies of other projects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// The threshold switch of SGLang's gateway and vLLM's router, with the default thresholds of both:
    /// while requests are spread evenly, the upstream that holds the most of the prompt gets it, if that is
    /// more than 0.3 of it, or else the one that was sent least; where one has 64 requests and half as many
    /// again more than another, the shortest queue.
    Switch,
    /// The scorers of llm-d: the share of the prompt that is held, twice, with how short the queue and how
    /// empty the cache is, by metrics that are read once a second.
    Scorers,
    /// Consistent hashing with bounded load, of KubeAI: the first block says where on a ring the search
    /// begins; the first with less than 1.25 times its share of the requests gets it.
    Ring,
    /// The blocks of Dynamo: those still to prefill there, this prompt's among them, and those that are in
    /// use while others are answered.
    Blocks,
    /// Requests in flight, less the share of the prompt that is held.
    ActiveHits,
}

impl ReplayPolicy {
    /// All policies, in the order of the report.
    pub const ALL: [ReplayPolicy; 10] = [
        ReplayPolicy::Preset(Preset::RoundRobin),
        ReplayPolicy::Preset(Preset::LeastRequests),
        ReplayPolicy::Rival(Rival::Ring),
        ReplayPolicy::Rival(Rival::Switch),
        ReplayPolicy::Rival(Rival::Scorers),
        ReplayPolicy::Rival(Rival::ActiveHits),
        ReplayPolicy::Rival(Rival::Blocks),
        ReplayPolicy::Preset(Preset::Prefix),
        ReplayPolicy::Preset(Preset::Work),
        ReplayPolicy::Oracle,
    ];

    /// The name on the command line and in the report.
    pub fn name(self) -> &'static str {
        match self {
            ReplayPolicy::Preset(preset) => preset.name(),
            ReplayPolicy::Oracle => "oracle",
            ReplayPolicy::Rival(Rival::Switch) => "threshold-switch",
            ReplayPolicy::Rival(Rival::Scorers) => "scorers",
            ReplayPolicy::Rival(Rival::Ring) => "bounded-hash",
            ReplayPolicy::Rival(Rival::Blocks) => "prefill-decode",
            ReplayPolicy::Rival(Rival::ActiveHits) => "active-hits",
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
    if most - least > 64.0 && most > 1.5 * least {
        return scene.candidates[at].active as f64;
    }
    let best = (0..scene.candidates.len()).map(|at| scene.share_held(at)).fold(0.0, f64::max);
    if best > 0.3 { -scene.share_held(at) } else { scene.sent[at] as f64 }
}

fn score(scene: &Scene<'_>, at: usize) -> f64 {
    let waiting = || scene.metrics.iter().map(|metrics| metrics.waiting as f64);
    let (least, most) = waiting().fold((f64::MAX, 0.0), |(low, high), one| (one.min(low), one.max(high)));
    let here = scene.metrics[at];
    let queue = if most > least { (most - here.waiting as f64) / (most - least) } else { 1.0 };
    2.0 * scene.share_held(at) + queue + (1.0 - here.usage)
}

/// How far on the ring it is from where the prompt's first block falls; behind all others when it has its
/// share already. Each upstream stands on the ring many times, so every block sees another order.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pick::Candidate;
    use crate::pick::forecast::terms::ForecastTerms;
    use crate::simulate::scene::ScrapedMetrics;

    const BLOCK: usize = 10;

    /// An upstream with so many requests in flight that holds so many blocks of a prompt of ten.
    fn upstream(index: usize, active: u64, hit: u64) -> Candidate {
        let (uncached, cold) = (100 - 10 * hit, 100);
        Candidate {
            index,
            backlog: 0,
            missing: uncached,
            active,
            context: 50 * active,
            weight: 1.0,
            session_penalty: 0,
            cold,
            hit,
            uncached,
            own_backlog: 0,
            head_millis: 0,
            terms: ForecastTerms::default(),
        }
    }

    /// Those that cost least, of upstreams with requests and hits, what they were sent, and their queues.
    fn best(rival: Rival, all: &[(u64, u64)], sent: &[usize], waiting: &[usize]) -> Vec<usize> {
        let candidates: Vec<Candidate> =
            (0..).zip(all).map(|(index, (active, hit))| upstream(index, *active, *hit)).collect();
        let metrics: Vec<ScrapedMetrics> =
            waiting.iter().map(|waiting| ScrapedMetrics { waiting: *waiting, usage: 0.0 }).collect();
        let prompt = [7; 10];
        let (candidates, metrics) = (&candidates[..], &metrics[..]);
        let scene = Scene { prompt: &prompt, tokens: 100, block: BLOCK, candidates, sent, metrics };
        let mut costs = Vec::new();
        rival.costs(&scene, &mut costs);
        let least = costs.iter().copied().fold(f64::MAX, f64::min);
        (0..costs.len()).filter(|at| costs[*at] == least).collect()
    }

    #[test]
    fn names_lead_back() {
        for policy in ReplayPolicy::ALL {
            assert_eq!(ReplayPolicy::parse(policy.name()), Some(policy));
        }
        assert_eq!(ReplayPolicy::parse("works"), None);
    }

    #[test]
    fn the_switch_goes_by_hits_until_load_is_uneven() {
        let best = |all: &[(u64, u64)]| best(Rival::Switch, all, &[9, 5, 7], &[0; 3]);
        assert_eq!(best(&[(3, 6), (0, 0), (1, 8)]), [2], "who holds most of it");
        assert_eq!(best(&[(3, 3), (0, 0), (1, 2)]), [1], "nobody holds more than 0.3: who was sent least");
        assert_eq!(best(&[(72, 9), (7, 0), (8, 0)]), [1], "65 more than the least");
        assert_eq!(best(&[(71, 9), (7, 0), (8, 0)]), [0], "64 more");
        assert_eq!(best(&[(200, 9), (134, 0), (140, 0)]), [0], "less than half as many again");
    }

    #[test]
    fn the_scorers_add_up_what_is_held_and_short_queues() {
        let best = |all: &[(u64, u64)], waiting: &[usize]| best(Rival::Scorers, all, &[0; 2], waiting);
        assert_eq!(best(&[(0, 4), (9, 5)], &[0, 0]), [1]);
        // One queue is the longest: that costs as much as half of the prompt.
        assert_eq!(best(&[(0, 0), (0, 6)], &[0, 3]), [1]);
        assert_eq!(best(&[(0, 0), (0, 4)], &[0, 3]), [0]);
    }

    #[test]
    fn the_ring_has_one_first_place_and_a_bound() {
        let best = |all: &[(u64, u64)]| best(Rival::Ring, all, &[0; 4], &[0; 4]);
        let first = best(&[(0, 0); 4]);
        assert_eq!((first.len(), best(&[(5, 0); 4])), (1, first.clone()));
        let mut full = [(1, 0); 4];
        full[first[0]] = (9, 0);
        assert_ne!(best(&full), first);
    }

    #[test]
    fn blocks_and_hits_are_weighed_with_what_is_in_flight() {
        let blocks = |all: &[(u64, u64)]| best(Rival::Blocks, all, &[0; 2], &[0; 2]);
        assert_eq!(blocks(&[(1, 6), (0, 0)]), [0]);
        assert_eq!(blocks(&[(1, 4), (0, 0)]), [1]);
        let hits = |all: &[(u64, u64)]| best(Rival::ActiveHits, all, &[0; 2], &[0; 2]);
        assert_eq!(hits(&[(1, 9), (0, 0)]), [1]);
        assert_eq!(hits(&[(1, 9), (1, 0)]), [0]);
    }
}
