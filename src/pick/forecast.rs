//! The forecast of the time to a request's first token on a candidate, from the moment of the choice.
//!
//! ```text
//! forecast(u) = base(u) + (ahead(u) + uncached(u)) * per_token(u)
//! ahead(u)    = backlog(u) - min(own backlog(u), time(u) / per_token(u))
//!
//! ahead      the prompt tokens that the engine reads before this prompt
//! time       since the engine began with the prompt at the head of its backlog: since its latest first
//!            token, since that prompt was given up, or since the backlog began. How far it is cannot be
//!            seen; its pace estimates it
//! uncached   the prompt tokens of this request that u does not hold
//! base       what every first token takes: the connection, the step that runs, the step of the first token
//! per_token  the engine's pace of reading, as seconds for a token
//! ```
//!
//! `base` and `per_token` are learnt for each upstream, see `terms`.
//!
//! The forecast does not affect which candidate `pick` chooses. Pure: no clock, lock, I/O or state.

pub(crate) mod terms;

use std::time::Duration;

use super::Candidate;
use terms::MAX_SECONDS;

/// Returns the forecast of the time to the first token on `candidate`.
pub fn forecast(candidate: &Candidate) -> Duration {
    candidate.terms.forecast(tokens_before(candidate))
}

/// Returns the tokens that the engine of `candidate` reads before the first token, the prompt's own included.
pub fn tokens_before(candidate: &Candidate) -> u64 {
    let read = match candidate.own_backlog {
        0 => 0,
        own => own.min(candidate.terms.tokens_in(candidate.head_millis)),
    };
    candidate.backlog.saturating_sub(read).saturating_add(candidate.uncached)
}

/// Returns the least forecast on any candidate as if the engines were idle: of the tokens before the first
/// token only the prompt's own count. `trust` as for `keep_within`.
pub fn least_idle(candidates: &[Candidate], trust: impl Fn(usize) -> f64) -> Option<Duration> {
    let idle = |candidate: &Candidate| {
        candidate.terms.seconds(candidate.uncached).min(MAX_SECONDS) * trust(candidate.index).clamp(0.0, 1.0)
    };
    candidates.iter().map(idle).min_by(f64::total_cmp).map(Duration::from_secs_f64)
}

/// Removes the candidates whose forecast is above `limit`. Where none would be left, keeps them all and
/// returns by how much the least forecast is above it. `trust`: the share, 0 to 1, of the forecast of the
/// candidate with this index that counts; see `fleet::forecast`.
pub fn keep_within(
    candidates: &mut Vec<Candidate>,
    limit: Duration,
    trust: impl Fn(usize) -> f64,
) -> Option<Duration> {
    let limit = limit.as_secs_f64();
    let excess = |candidate: &Candidate| {
        let seconds = candidate.terms.seconds(tokens_before(candidate)).min(MAX_SECONDS);
        seconds * trust(candidate.index).clamp(0.0, 1.0) - limit
    };
    let least = candidates.iter().map(excess).min_by(f64::total_cmp)?;
    if least > 0.0 {
        // What is late is late by more than nothing.
        return Some(Duration::from_secs_f64(least).max(Duration::from_nanos(1)));
    }
    candidates.retain(|candidate| excess(candidate) <= 0.0);
    None
}

#[cfg(test)]
mod tests;
