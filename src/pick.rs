//! The cost formula: it estimates which candidate gives the first token soonest.
//!
//! Everything is counted in prompt tokens of prefill work, the unit in which an engine's time is spent
//! before the first token. The candidate with the smallest cost wins:
//!
//! ```text
//! cost(u) = (backlog * B(u) + (missing + stall * A(u)) * M(u) + active * A(u) + context * C(u) + S(u))
//!           / weight(u)
//!
//! B  uncached prompt tokens sent to u whose first byte has not come back yet
//! M  prompt tokens of this request that u does not hold; blocks that many conversations share count in part
//! A  requests in flight on u
//! C  prompt tokens of the requests in flight on u
//! S  0 on the upstream that had the request's session last; on all others the prompt tokens that are
//!    held there, times the session's bonus
//! ```
//!
//! A prefill also delays other requests: while it runs, every answer on u pauses. `stall` is the cost for
//! each of them; it is small, since they wait in the middle of an answer rather than for its beginning.
//! Without it, an upstream with hundreds of answers in progress would receive a prefill as soon as it had a
//! few requests fewer than another: in simulated rollouts answers took half as long again.
//!
//! With the default knobs (1, 2, 0.1, 400, 0.05) and a request of 1,000 tokens that no upstream holds: an
//! upstream with 3 requests of 2,000 tokens each, all past their first byte, costs `0 + (2 + 0.3) * 1000 +
//! 400 * 3 + 6000 / 20 = 3800`; an idle one costs `2000`, and wins; one that is idle but for a prefill of
//! 2,000 tokens still to do costs `2000 + (2 + 0.1) * 1000 + 400 + 100 = 4600`.
//!
//! Costs within 1 % of the smallest count as equal and are drawn from at random, never by position;
//! a draw falls in proportion to the weights. Round robin is the preset in which nothing costs
//! anything and the draw is a turn instead of a random number.
//!
//! Among many candidates only those that can win are compared, see `shortlist::shortlist`.
//!
//! Balancers with the same stale numbers would all choose the same upstream. So each cost is raised by a
//! random share of up to `jitter`, which grows with the age of the numbers. These draws follow the prompt's
//! hash: of samples of one prompt that come to several balancers within one exchange, none is known to the
//! others, and on different engines each would be prefilled.
//!
//! Pure: no clock, lock, I/O or state; the same candidates, knobs and seed always give the same choice.

pub mod forecast;
pub mod shortlist;

use crate::config::types::{Balance, Preset};
use forecast::terms::ForecastTerms;

/// An upstream that could take the request, as numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The index in the snapshot, returned in the choice.
    pub index: usize,
    pub backlog: u64,
    pub missing: u64,
    pub active: u64,
    pub context: u64,
    pub weight: f64,
    /// The penalty for moving the request's session to this upstream.
    pub session_penalty: u64,
    /// The value of `missing` if the upstream held nothing of the request.
    pub cold: u64,
    /// The leading blocks that the upstream holds, to explain the choice.
    pub hit: u64,
    /// The prompt tokens that are left to prefill, to explain the choice.
    pub uncached: u64,
    /// The part of the backlog that this balancer has sent, and the milliseconds since the engine began with
    /// the prompt at its head, for the forecast.
    pub own_backlog: u64,
    pub head_millis: u32,
    /// How the upstream's time to a first token depends on the tokens to read, for the forecast.
    pub terms: ForecastTerms,
}

/// Decides between equal candidates: a random number, and a counter for presets that take turns.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DrawSeed {
    pub random: u64,
    pub turn: u64,
    /// The largest random increase of a cost, as a share; 0 while no number is stale.
    pub jitter: f64,
}

/// The chosen candidate and the reason of the choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The winner's index in the snapshot.
    pub index: usize,
    pub cost: f64,
    pub reason: ChoiceReason,
}

/// The reason of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChoiceReason {
    /// The only candidate.
    Only,
    /// The blocks that it holds decided: without them another would have won.
    Prefix,
    /// The session decided: without it another would have won.
    Session,
    /// The least load.
    Load,
    /// The turn of a round-robin policy.
    Turn,
}

impl ChoiceReason {
    /// The name in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            ChoiceReason::Only => "only",
            ChoiceReason::Prefix => "prefix",
            ChoiceReason::Session => "session",
            ChoiceReason::Load => "load",
            ChoiceReason::Turn => "turn",
        }
    }
}

/// The share within which costs count as equal to the smallest.
const TIE_SHARE: f64 = 0.01;

/// The largest share by which a cost is raised at random.
const MAX_JITTER_SHARE: f64 = 0.2;

/// The age of the numbers at which the jitter is largest, in seconds.
const MAX_JITTER_AGE: f64 = 0.5;

/// Returns `DrawSeed::jitter` for numbers of this age in seconds.
pub fn jitter(age: f64) -> f64 {
    MAX_JITTER_SHARE * (age / MAX_JITTER_AGE).min(1.0)
}

/// Returns the cost of sending the request to `candidate`, in prompt tokens.
pub fn cost(candidate: &Candidate, knobs: &Balance) -> f64 {
    let work = knobs.backlog * candidate.backlog as f64
        + (knobs.missing + knobs.stall * candidate.active as f64) * candidate.missing as f64
        + knobs.active * candidate.active as f64
        + knobs.context * candidate.context as f64
        + candidate.session_penalty as f64;
    work / candidate.weight
}

// === impl DrawSeed ===

impl DrawSeed {
    /// Builds the seed of a choice for a prompt with this hash. While numbers are stale, the prompt decides
    /// in place of `random`: balancers that receive samples of one prompt at one time then choose alike, and
    /// one engine prefills it. Different prompts are spread as by random numbers.
    pub fn for_prompt(prompt: Option<u64>, random: u64, turn: u64, jitter: f64) -> Self {
        let random = prompt.filter(|_| jitter > 0.0).unwrap_or(random);
        DrawSeed { random, turn, jitter }
    }

    /// Returns the factor by which a candidate's cost is raised.
    fn raise(&self, index: usize) -> f64 {
        match self.jitter > 0.0 {
            true => 1.0 + self.jitter * unit_interval(mix(self.random, index)),
            false => 1.0,
        }
    }
}

/// Chooses the candidate for the request; `None` only without candidates.
pub fn pick(candidates: &[Candidate], knobs: &Balance, seed: DrawSeed) -> Option<Choice> {
    if let [only] = candidates {
        return Some(Choice { index: only.index, cost: cost(only, knobs), reason: ChoiceReason::Only });
    }
    let seen = |c: &Candidate| cost(c, knobs) * seed.raise(c.index);
    let least = candidates.iter().map(seen).min_by(f64::total_cmp)?;
    let bound = least * (1.0 + TIE_SHARE);
    let equals = || candidates.iter().filter(|c| seen(c) <= bound);
    let total: f64 = equals().map(|c| c.weight).sum();
    let (draw, reason) = match knobs.preset {
        Preset::RoundRobin => (turn_point(seed.turn, total), ChoiceReason::Turn),
        Preset::Work | Preset::Prefix | Preset::LeastRequests => {
            (unit_interval(seed.random) * total, ChoiceReason::Load)
        }
    };
    let mut passed = 0.0;
    let winner = equals().find(|c| {
        passed += c.weight;
        draw < passed
    });
    // Rounding may leave the draw slightly above the sum: then the last of the equals wins.
    let winner = winner.or_else(|| equals().next_back())?;
    let reason =
        if reason == ChoiceReason::Load { winning_reason(winner, candidates, knobs) } else { reason };
    Some(Choice { index: winner.index, cost: cost(winner, knobs), reason })
}

/// Returns the reason for the winner, by comparing its cost with the costs if no candidate held any of the
/// prompt, and if no candidate had the session.
fn winning_reason(winner: &Candidate, candidates: &[Candidate], knobs: &Balance) -> ChoiceReason {
    let beats = |winner: &Candidate, as_if: fn(&Candidate) -> Candidate| {
        let others = candidates.iter().filter(|other| other.index != winner.index);
        let least = others.map(|other| cost(&as_if(other), knobs)).fold(f64::MAX, f64::min);
        cost(&as_if(winner), knobs) * (1.0 + TIE_SHARE) < least
    };
    let sessionless = |candidate: &Candidate| Candidate { session_penalty: 0, ..*candidate };
    let cold =
        |candidate: &Candidate| Candidate { session_penalty: 0, missing: candidate.cold, ..*candidate };
    let drawn = candidates.iter().any(|candidate| candidate.session_penalty > winner.session_penalty);
    match winner.hit > 0 || drawn {
        true if beats(winner, cold) => ChoiceReason::Load,
        true if winner.hit > 0 && (!drawn || beats(winner, sessionless)) => ChoiceReason::Prefix,
        true if drawn => ChoiceReason::Session,
        _ => ChoiceReason::Load,
    }
}

/// Derives a random number for one candidate.
fn mix(random: u64, index: usize) -> u64 {
    let mixed =
        (random ^ (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (mixed ^ (mixed >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

/// Returns a number in 0..1 from 64 random bits.
fn unit_interval(random: u64) -> f64 {
    (random >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns the place of the turn in `0..total`. Each turn advances by one and wraps, so that a candidate of
/// weight 2 gets two turns for one of weight 1.
fn turn_point(turn: u64, total: f64) -> f64 {
    (turn as f64 + 0.5) % total
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

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

    fn seed(random: u64) -> DrawSeed {
        DrawSeed { random: random.wrapping_mul(0x9E37_79B9_7F4A_7C15), turn: random, jitter: 0.0 }
    }

    #[test]
    fn costs_match_the_example_of_the_module() {
        let knobs = Balance::default();
        let busy = Candidate { active: 3, context: 6000, ..idle(0) };
        let prefilling = Candidate { backlog: 2000, active: 1, context: 2000, ..idle(1) };
        assert_eq!(cost(&busy, &knobs), 3800.0);
        assert_eq!(cost(&idle(2), &knobs), 2000.0);
        assert_eq!(cost(&prefilling, &knobs), 4600.0);
        let choice = pick(&[busy, prefilling, idle(2)], &knobs, seed(1)).unwrap();
        assert_eq!((choice.index, choice.reason), (2, ChoiceReason::Load));
    }

    #[test]
    fn no_candidate_gives_no_choice() {
        assert_eq!(pick(&[], &Balance::default(), seed(1)), None);
    }

    #[test]
    fn draws_equals_by_weight() {
        let heavy = Candidate { weight: 3.0, missing: 3000, ..idle(1) };
        let mut wins = [0u32; 2];
        for random in 0..8000 {
            wins[pick(&[idle(0), heavy], &Balance::default(), seed(random)).unwrap().index] += 1;
        }
        assert!((1800..2200).contains(&wins[0]), "{wins:?}");
    }

    #[test]
    fn round_robin_takes_turns_by_weight_and_ignores_load() {
        let knobs = Preset::RoundRobin.balance();
        let loaded = Candidate { active: 99, backlog: 1 << 40, ..idle(0) };
        let double = Candidate { weight: 2.0, ..idle(1) };
        let order: Vec<usize> = (0..6)
            .map(|turn| {
                pick(&[loaded, double], &knobs, DrawSeed { turn, ..DrawSeed::default() }).unwrap().index
            })
            .collect();
        assert_eq!(order, [0, 1, 1, 0, 1, 1]);
    }

    #[test]
    fn least_requests_considers_requests_only() {
        let knobs = Preset::LeastRequests.balance();
        let deep = Candidate { backlog: 1 << 30, context: 1 << 30, active: 1, ..idle(0) };
        let wide = Candidate { active: 2, ..idle(1) };
        assert_eq!(pick(&[wide, deep], &knobs, seed(7)).unwrap().index, 0);
    }

    #[test]
    fn reports_the_prefix_as_reason_only_where_it_decided() {
        let knobs = Balance::default();
        let warm = Candidate { missing: 200, hit: 6, uncached: 200, ..idle(0) };
        let busy = Candidate { active: 2, context: 2000, ..warm };
        let table = [
            (vec![warm, idle(1)], 0, ChoiceReason::Prefix),
            (vec![warm, Candidate { index: 1, active: 9, ..warm }], 0, ChoiceReason::Load),
            (vec![idle(0), Candidate { index: 1, active: 9, ..warm }], 0, ChoiceReason::Load),
            (vec![warm, Candidate { session_penalty: 800, ..idle(1) }], 0, ChoiceReason::Prefix),
            // 1340 against 2000 of the idle one; without its hits the first would cost 3100.
            (vec![busy, idle(1)], 0, ChoiceReason::Prefix),
            (vec![Candidate { active: 6, ..busy }, idle(1)], 1, ChoiceReason::Load),
            (vec![busy, Candidate { active: 9, ..idle(1) }], 0, ChoiceReason::Load),
            (vec![busy], 0, ChoiceReason::Only),
        ];
        for (candidates, index, reason) in table {
            let choice = pick(&candidates, &knobs, seed(3)).unwrap();
            assert_eq!((choice.index, choice.reason), (index, reason), "{candidates:?}");
        }
    }

    #[test]
    fn prefers_the_sessions_last_upstream_without_pinning() {
        let session_penalty = |index| Candidate { session_penalty: 900, ..idle(index) };
        let last = Candidate { active: 1, ..idle(0) };
        let choice = pick(&[last, session_penalty(1)], &Balance::default(), seed(3)).unwrap();
        assert_eq!((choice.index, choice.reason), (0, ChoiceReason::Session));
        let saturated = Candidate { active: 9, ..idle(0) };
        let choice = pick(&[saturated, session_penalty(1)], &Balance::default(), seed(3)).unwrap();
        assert_eq!((choice.index, choice.reason), (1, ChoiceReason::Load));
    }

    #[test]
    fn balancers_with_stale_numbers_choose_alike_for_one_prompt() {
        let idle: Vec<Candidate> = (0..16).map(idle).collect();
        let chosen = |prompt: Option<u64>, jitter: f64| -> BTreeSet<usize> {
            let seeds = (0..200).map(|number| DrawSeed::for_prompt(prompt, seed(number).random, 0, jitter));
            seeds.map(|seed| pick(&idle, &Balance::default(), seed).unwrap().index).collect()
        };
        let prompt = |number: u64| Some(seed(number).random);
        assert_eq!(chosen(prompt(1), 0.01).len(), 1);
        assert!(chosen(prompt(1), 0.0).len() > 8, "one balancer draws");
        assert!(chosen(None, 0.01).len() > 8, "there is no prompt");
        let prompts: BTreeSet<usize> = (0..200).flat_map(|number| chosen(prompt(number), 0.01)).collect();
        assert_eq!(prompts.len(), 16, "different prompts are spread");
    }

    #[test]
    fn jitter_spreads_equal_balancers() {
        let second = Candidate { missing: 1080, ..idle(1) };
        let far = Candidate { missing: 1300, ..idle(2) };
        let mut wins = [0; 3];
        for random in 0..1000 {
            let seed = DrawSeed { jitter: 0.2, ..seed(random) };
            wins[pick(&[idle(0), second, far], &Balance::default(), seed).unwrap().index] += 1;
        }
        assert!(wins[0] > wins[1] && wins[1] > 100 && wins[2] == 0, "{wins:?}");
    }

    /// Returns how often each candidate wins when the draws are spread evenly.
    fn wins(candidates: &[Candidate]) -> Vec<u64> {
        let mut wins = vec![0; candidates.len()];
        for draw in 0..DRAWS {
            let seed = DrawSeed { random: draw * (u64::MAX / DRAWS), ..DrawSeed::default() };
            wins[pick(candidates, &Balance::default(), seed).unwrap().index] += 1;
        }
        wins
    }

    const DRAWS: u64 = 64;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (0u64..200_000, 0u64..200_000, 0u64..300, 0u64..2_000_000, 1u32..80);
        prop::collection::vec(one, 1..40).prop_map(|all| {
            let make = |(index, (backlog, missing, active, context, weight)): (usize, _)| Candidate {
                index,
                backlog,
                missing,
                active,
                context,
                weight: f64::from(weight) / 8.0,
                ..idle(index)
            };
            all.into_iter().enumerate().map(make).collect()
        })
    }

    proptest! {
        #[test]
        fn the_choice_is_a_candidate_near_the_least_cost_and_repeatable(all in candidates(), random: u64) {
            let knobs = Balance::default();
            let choice = pick(&all, &knobs, seed(random)).unwrap();
            let least = all.iter().map(|c| cost(c, &knobs)).fold(f64::MAX, f64::min);
            prop_assert!(choice.cost <= least * 1.01 + 1e-9);
            prop_assert_eq!(choice, pick(&all, &knobs, seed(random)).unwrap());
        }

        #[test]
        fn more_load_or_less_cache_never_wins_more(
            all in prop_oneof![candidates(), alike()],
            which: prop::sample::Index,
            kind in 0..5,
            more in prop_oneof![1u64..40, 1u64..100_000],
        ) {
            let index = which.index(all.len());
            let mut loaded = all.clone();
            let place = &mut loaded[index];
            match kind {
                0 => place.backlog += more,
                1 => place.missing += more,
                2 => place.active += more,
                3 => place.session_penalty += more,
                _ => place.context += more,
            }
            // Draws at the border of two shares may fall to either.
            prop_assert!(wins(&loaded)[index] <= wins(&all)[index] + 1);
        }

        #[test]
        fn equals_win_evenly_in_any_order(others in candidates(), equals in 1usize..20) {
            let best = |index| Candidate { missing: 0, ..idle(index) };
            let worse = |other: &Candidate| Candidate { backlog: other.backlog + 1, ..*other };
            let mut all: Vec<Candidate> = others.iter().map(worse).collect();
            (0..equals).for_each(|place| all.insert((place * 7) % (all.len() + 1), best(0)));
            (0..).zip(&mut all).for_each(|(index, candidate)| candidate.index = index);
            for (candidate, won) in all.iter().zip(wins(&all)) {
                let best = candidate.missing + candidate.backlog == 0;
                let share = if best { DRAWS / equals as u64 } else { 0 };
                prop_assert!(won.abs_diff(share) <= 1, "{won} of {DRAWS}");
            }
        }
    }

    /// Candidates whose costs are close together.
    fn alike() -> impl Strategy<Value = Vec<Candidate>> {
        let make = |(index, missing)| Candidate { missing, ..idle(index) };
        prop::collection::vec(1000u64..1020, 1..20)
            .prop_map(move |all| all.into_iter().enumerate().map(make).collect())
    }
}
