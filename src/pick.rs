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
mod tests;
