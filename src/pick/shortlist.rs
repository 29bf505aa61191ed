//! The few of many candidates that can win. A candidate that holds nothing of the prompt can only win by its
//! load, so the least loaded ones stand for all of these:
//!
//! ```text
//! shortlist = the 32 holders of some of the prompt with the least costs
//!           + the 32 candidates with the least costs if they held nothing
//!           + the upstream that had the session last
//! ```
//!
//! The candidate with the least cost of all is always on it. For were it a holder, it would be the first of
//! the holders; if it holds nothing and 32 others cost less if they held nothing, then each of these costs
//! less than that still with what it holds, so it was not the least. So a choice from the list costs at most
//! 1 % more than the least of all candidates, as without the list. Which of more than 32 equal candidates
//! are on the list is drawn at random.

use super::{Candidate, DrawSeed, mix};
use crate::config::types::{Balance, Preset};

/// The number of candidates up to which `shortlist` keeps all.
const MAX_COMPARED: usize = 128;

/// The number of candidates of one kind that `shortlist` keeps of more.
const MAX_LISTED: usize = 32;

/// Removes the candidates that cannot win from a list of many; keeps the order of the others. `last`: the
/// index of the upstream that had the session last. Where candidates take turns, all of them stay.
pub fn shortlist(candidates: &mut Vec<Candidate>, knobs: &Balance, seed: DrawSeed, last: Option<usize>) {
    if candidates.len() <= MAX_COMPARED || knobs.preset == Preset::RoundRobin {
        return;
    }
    let (mut holders, mut loads) = (LeastCosts::new(), LeastCosts::new());
    let mut listed: Vec<usize> = Vec::with_capacity(2 * MAX_LISTED + 1);
    for (place, candidate) in candidates.iter().enumerate() {
        // The sum of `cost`, in another order: what both costs have in common is computed once.
        let active = float(candidate.active);
        let load = knobs.backlog * float(candidate.backlog)
            + knobs.active * active
            + knobs.context * float(candidate.context)
            + float(candidate.session_penalty);
        let each = knobs.missing + knobs.stall * active;
        let scale = seed.raise(candidate.index) / candidate.weight;
        let draw = || mix(!seed.random, candidate.index);
        loads.offer((load + each * float(candidate.cold)) * scale, place, draw);
        if candidate.missing < candidate.cold {
            holders.offer((load + each * float(candidate.missing)) * scale, place, draw);
        }
        if Some(candidate.index) == last {
            listed.push(place);
        }
    }
    listed.extend(holders.places().chain(loads.places()));
    listed.sort_unstable();
    listed.dedup();
    for (at, place) in listed.iter().enumerate() {
        candidates[at] = candidates[*place];
    }
    candidates.truncate(listed.len());
}

/// Converts a number of tokens or requests. From a signed number this takes one instruction.
fn float(number: u64) -> f64 {
    i64::try_from(number).unwrap_or(i64::MAX) as f64
}

/// The least of many costs.
struct LeastCosts {
    /// In ascending order.
    kept: [ListedCost; MAX_LISTED],
    count: usize,
}

#[derive(Clone, Copy)]
struct ListedCost {
    cost: f64,
    /// Decides between equal costs.
    draw: u64,
    place: usize,
}

// === impl LeastCosts ===

impl LeastCosts {
    fn new() -> Self {
        let none = ListedCost { cost: f64::INFINITY, draw: u64::MAX, place: 0 };
        LeastCosts { kept: [none; MAX_LISTED], count: 0 }
    }

    /// Keeps the cost if it is one of the least so far.
    fn offer(&mut self, cost: f64, place: usize, draw: impl Fn() -> u64) {
        let most = &self.kept[MAX_LISTED - 1];
        if cost > most.cost {
            return;
        }
        let draw = draw();
        let precedes = |other: &ListedCost| (other.cost, other.draw) < (cost, draw);
        let at = self.kept.partition_point(precedes);
        if at < MAX_LISTED {
            self.kept.copy_within(at..MAX_LISTED - 1, at + 1);
            self.kept[at] = ListedCost { cost, draw, place };
            self.count = (self.count + 1).min(MAX_LISTED);
        }
    }

    fn places(&self) -> impl Iterator<Item = usize> {
        self.kept[..self.count].iter().map(|kept| kept.place)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pick::forecast::terms::ForecastTerms;
    use crate::pick::{TIE_SHARE, cost, jitter, pick};

    fn idle(index: usize) -> Candidate {
        Candidate {
            index,
            backlog: 0,
            missing: 1000,
            active: 0,
            context: 0,
            weight: 1.0,
            session_penalty: 0,
            cold: 1000,
            hit: 0,
            uncached: 1000,
            own_backlog: 0,
            head_millis: 0,
            terms: ForecastTerms::default(),
        }
    }

    /// Candidates of which some hold a part of the prompt, many alike.
    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let load = prop_oneof![Just((0, 0, 0)), (0u64..40, 0u64..60_000, 0u64..200_000)];
        let weight = prop_oneof![4 => Just(1.0), 1 => 0.1f64..8.0];
        let one = (load, weight, prop_oneof![3 => Just(0u64), 1 => 1u64..=10], 0u64..2);
        (prop::collection::vec(one, 1..700), 0u64..5_000).prop_map(|(all, penalty)| {
            let make = |(index, ((active, backlog, context), weight, hit, other)): (usize, _)| {
                let missing = 10_000 - 1_000 * hit;
                Candidate {
                    backlog,
                    missing,
                    active,
                    context,
                    weight,
                    session_penalty: penalty * other,
                    cold: 10_000,
                    hit,
                    uncached: missing,
                    ..idle(index)
                }
            };
            all.into_iter().enumerate().map(make).collect()
        })
    }

    fn listed(all: &[Candidate], knobs: &Balance, seed: DrawSeed, last: Option<usize>) -> Vec<Candidate> {
        let mut some = all.to_vec();
        shortlist(&mut some, knobs, seed, last);
        some
    }

    proptest! {
        #[test]
        fn the_choice_costs_as_little_as_among_all(
            all in candidates(),
            random: u64,
            age in prop_oneof![Just(0.0), 0.0f64..1.0],
            preset in prop::sample::select(vec![Preset::Work, Preset::Prefix, Preset::LeastRequests]),
            last: prop::sample::Index,
        ) {
            let (knobs, seed) = (preset.balance(), DrawSeed { random, turn: 0, jitter: jitter(age) });
            let last = last.index(all.len());
            let some = listed(&all, &knobs, seed, Some(last));
            let seen = |candidate: &Candidate| cost(candidate, &knobs) * seed.raise(candidate.index);
            let least = all.iter().map(seen).fold(f64::MAX, f64::min);
            let choice = pick(&some, &knobs, seed).unwrap();
            prop_assert!(seen(&all[choice.index]) <= least * (1.0 + TIE_SHARE) * (1.0 + 1e-12));
            // But for the last bits: the list adds up in another order.
            prop_assert!(some.iter().map(seen).fold(f64::MAX, f64::min) <= least * (1.0 + 1e-12));
            prop_assert!(some.iter().any(|candidate| candidate.index == last), "it had the session");
            if all.len() <= MAX_COMPARED {
                prop_assert_eq!(some, all);
            } else {
                prop_assert!(some.len() <= 2 * MAX_LISTED + 1);
                prop_assert!(some.is_sorted_by_key(|candidate| candidate.index));
            }
        }
    }

    #[test]
    fn keeps_all_candidates_that_take_turns() {
        let all: Vec<Candidate> = (0..600).map(idle).collect();
        let knobs = Preset::RoundRobin.balance();
        assert_eq!(listed(&all, &knobs, DrawSeed::default(), None).len(), 600);
    }

    #[test]
    fn keeps_the_cheapest_holders_and_the_least_loaded() {
        let holder = |index| Candidate { missing: 100, hit: 9, active: 50 + index as u64, ..idle(index) };
        let loaded = |index| Candidate { active: index as u64, ..idle(index) };
        let all: Vec<Candidate> =
            (0..600).map(|index| if index < 300 { loaded(index) } else { holder(index) }).collect();
        let some = listed(&all, &Balance::default(), DrawSeed::default(), Some(500));
        let indices: Vec<usize> = some.iter().map(|candidate| candidate.index).collect();
        assert_eq!(indices, (0..32).chain(300..332).chain([500]).collect::<Vec<_>>());
    }

    /// Each of a thousand idle candidates wins about as often as any other.
    #[test]
    fn equal_candidates_win_evenly() {
        let all: Vec<Candidate> = (0..1000).map(idle).collect();
        let mut wins = vec![0u32; all.len()];
        for turn in 0..20_000u64 {
            let random = mix(turn.wrapping_mul(0x9E37_79B9_7F4A_7C15), 7);
            let seed = DrawSeed { random, turn, jitter: 0.0 };
            wins[pick(&listed(&all, &Balance::default(), seed, None), &Balance::default(), seed)
                .unwrap()
                .index] += 1;
        }
        // 20 each are expected; chi-square of 999 degrees of freedom is 999 on average, and 45 its deviation.
        let spread: f64 = wins.iter().map(|wins| (f64::from(*wins) - 20.0).powi(2) / 20.0).sum();
        assert!((800.0..1_200.0).contains(&spread), "{spread}");
        assert!(wins.iter().all(|wins| *wins > 0));
    }
}
