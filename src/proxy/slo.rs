//! The limit that a client sets on the time to the first token, by `x-slo-ttft-ms` (`balance.slo`).
//!
//! With `queue` the limit applies to the forecast at the moment of the choice: the client accepts the wait
//! before it. With `reject` the time since the request's head counts as well, since the client gives up a
//! request that is late. The field goes on to the upstream unchanged: a proxy on the way may use it too.

use std::time::{Duration, Instant};

use http::HeaderMap;

use super::attempts::Attempts;
use super::request::{ClientRequest, RequestScope};
use crate::config::types::SloRule;
use crate::fleet::Snapshot;
use crate::names::X_SLO_TTFT;
use crate::pick::Candidate;
use crate::pick::forecast::keep_within;
use crate::reject::Reject;

/// The shortest and the longest time between two looks of a request that waits for a forecast.
const LOOK_INTERVAL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Returns the limit of a request; 0 is none, and so is a limit beyond what a clock can express.
pub(super) fn limit_of(headers: &HeaderMap, rule: SloRule) -> Result<Option<Duration>, Reject> {
    let Some(value) = headers.get(X_SLO_TTFT).filter(|_| rule != SloRule::Ignore) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
    match number {
        Some(millis) if millis >= 0.0 => {
            let limit = Duration::try_from_secs_f64(millis / 1e3).ok();
            Ok(limit.filter(|limit| !limit.is_zero()))
        }
        _ => {
            let message = format!("{X_SLO_TTFT} is not a number of milliseconds.");
            Err(Reject::Field { param: X_SLO_TTFT.into(), message })
        }
    }
}

/// Removes the candidates whose forecast does not meet the request's limit. Where none does, keeps them all
/// and returns by how much the best forecast is late.
pub(super) fn keep_punctual(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    attempt: u32,
    snapshot: &Snapshot,
    now: Instant,
    candidates: &mut Vec<Candidate>,
) -> Option<Duration> {
    // Another attempt is late already, and a late answer is better than an error.
    let slo = request.slo.filter(|_| attempt == 1)?;
    let waited = match scope.settings.slo {
        SloRule::Reject => now.saturating_duration_since(scope.begun),
        SloRule::Queue | SloRule::Ignore => Duration::ZERO,
    };
    let trust = |index: usize| snapshot.entries[index].upstream.forecast_trust(now);
    keep_within(candidates, slo.saturating_sub(waited), trust)
}

/// Returns the time of the next look of a request whose best forecast is late by `excess`: an engine reads on
/// meanwhile, so that the forecast falls about as fast as time passes.
pub(super) fn next_look(excess: Duration, now: Instant) -> Instant {
    now + excess.clamp(LOOK_INTERVAL.0, LOOK_INTERVAL.1)
}

/// Returns the end of the wait for room, `deadline` or earlier: from then on the request is late on any
/// upstream.
pub(super) fn wait_end(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    attempts: &Attempts,
    deadline: Instant,
) -> Instant {
    let is_limited = scope.settings.slo == SloRule::Reject && attempts.count == 0;
    let end = request.slo.filter(|_| is_limited).and_then(|slo| scope.begun.checked_add(slo));
    end.map_or(deadline, |end| end.min(deadline))
}

/// Returns the reject of a request whose limit no upstream meets.
pub(super) fn refusal(request: &ClientRequest, retry_after: Duration) -> Reject {
    let limit = request.slo.unwrap_or_default();
    Reject::Slo { limit, retry_after: retry_after.as_secs_f64().ceil().clamp(1.0, 60.0) as u64 }
}

/// Returns the reject of a request that waited in vain. `late`: by how much the best forecast was late when
/// the request last looked; `None`: the request found no room.
pub(super) fn wait_refusal(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    late: Option<Duration>,
    retry_after: Duration,
) -> Reject {
    let is_late = request.slo.is_some_and(|slo| scope.begun.elapsed() >= slo);
    match late {
        Some(excess) => refusal(request, excess),
        None if is_late => refusal(request, retry_after),
        None => Reject::Full { retry_after: retry_after.as_secs().max(1) },
    }
}
