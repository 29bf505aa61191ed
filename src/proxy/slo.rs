//! The limit that a client sets on the time to the first token, by `x-slo-ttft-ms` (`balance.slo`).
//!
//! With `queue` the limit applies to the forecast at the moment of the choice: the client accepts the wait
//! before it. With `reject` the time since the request's head counts as well, since the client gives up a
//! request that is late. The field goes on to the upstream unchanged: a proxy on the way may use it too.

use std::time::{Duration, Instant};

use http::HeaderMap;

use super::attempts::Attempts;
use super::placement;
use super::request::{ClientRequest, RequestScope};
use crate::config::types::SloRule;
use crate::fleet::{MissedLook, Snapshot, StartDelay, UpstreamQuery};
use crate::names::X_SLO_TTFT;
use crate::pick::Candidate;
use crate::pick::forecast::{keep_within, least_idle};
use crate::reject::Reject;

/// One comparison of the forecasts with a request's limit.
pub(super) struct LimitCheck<'a> {
    pub scope: &'a RequestScope<'a>,
    pub request: &'a ClientRequest,
    pub query: &'a UpstreamQuery<'a>,
    /// The number of the request's attempt.
    pub attempt: u32,
    pub snapshot: &'a Snapshot,
    pub now: Instant,
}

/// How the forecasts compare with a request's limit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Punctuality {
    /// The candidates that are left meet it.
    Punctual,
    /// No candidate meets it now, or older requests go first; an idle engine would meet it.
    Late(StartDelay),
    /// No upstream would meet it even if its engine were idle: the best one would be late by this much.
    Hopeless(Duration),
}

/// What a request with a limit does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LimitVerdict {
    /// It is sent to one of the candidates.
    Choose,
    /// It waits for room, or for a forecast that meets its limit.
    Wait(Option<StartDelay>),
    /// It is refused: it would be late by this much.
    Refuse(Duration),
}

/// Returns the limit of a request; 0 is none, and so is a limit beyond what a clock can express. Of several
/// limits the shortest counts: each proxy on the way may have added its own, as a line or to the list.
pub(super) fn limit_of(headers: &HeaderMap, rule: SloRule) -> Result<Option<Duration>, Reject> {
    let mut shortest: Option<Duration> = None;
    for value in headers.get_all(X_SLO_TTFT).iter().filter(|_| rule != SloRule::Ignore) {
        let Ok(list) = value.to_str() else { return Err(not_a_number()) };
        for text in list.split(',') {
            let limit = parse_limit(text)?;
            shortest = shortest.into_iter().chain(limit).min();
        }
    }
    Ok(shortest)
}

fn parse_limit(text: &str) -> Result<Option<Duration>, Reject> {
    match text.trim().parse::<f64>() {
        Ok(0.0) => Ok(None),
        // A limit too short for the clock is still one.
        Ok(millis) if millis > 0.0 => {
            Ok(Duration::try_from_secs_f64(millis / 1e3).ok().map(|limit| limit.max(Duration::from_nanos(1))))
        }
        _ => Err(not_a_number()),
    }
}

fn not_a_number() -> Reject {
    let message = format!("{X_SLO_TTFT} is not a number of milliseconds.");
    Reject::Field { param: X_SLO_TTFT.into(), message }
}

// === impl Punctuality ===

impl Punctuality {
    /// `is_full`: no suitable upstream has room.
    pub(super) fn verdict(self, is_full: bool, rule: SloRule) -> LimitVerdict {
        match self {
            Punctuality::Punctual => LimitVerdict::Choose,
            Punctuality::Hopeless(excess) => LimitVerdict::Refuse(excess),
            Punctuality::Late(_) if is_full => LimitVerdict::Wait(None),
            // Without an excess it is not late: older requests go first.
            Punctuality::Late(delay) if rule == SloRule::Reject && !delay.excess().is_zero() => {
                LimitVerdict::Refuse(delay.excess())
            }
            Punctuality::Late(delay) => LimitVerdict::Wait(Some(delay)),
        }
    }
}

// === impl LimitCheck ===

impl LimitCheck<'_> {
    /// Returns what is left of the limit at `now`. Another attempt is late already, and a late answer is
    /// better than an error.
    pub(super) fn limit(&self) -> Option<Duration> {
        let slo = self.request.slo.filter(|_| self.attempt == 1)?;
        let waited = match self.scope.settings.slo {
            SloRule::Reject => self.now.saturating_duration_since(self.scope.begun),
            SloRule::Queue | SloRule::Ignore => Duration::ZERO,
        };
        Some(slo.saturating_sub(waited))
    }

    /// Removes the candidates whose forecast is above `limit`; where all are, keeps them.
    pub(super) fn keep_punctual(&self, limit: Duration, candidates: &mut Vec<Candidate>) -> Punctuality {
        match keep_within(candidates, limit, |index| self.trust(index)) {
            None => Punctuality::Punctual,
            Some(excess) => self.when_idle(limit, excess),
        }
    }

    /// Compares the limit with the forecasts of all suitable upstreams, full ones included, as if their
    /// engines were idle. `excess`: by how much the best forecast is late now.
    pub(super) fn when_idle(&self, limit: Duration, excess: Duration) -> Punctuality {
        let query = UpstreamQuery { even_full: true, ..*self.query };
        let idle = placement::with_idle_candidates(|candidates| {
            self.snapshot.candidates(&query, self.now, candidates);
            placement::weigh(self.scope, self.request, self.snapshot, self.now, candidates);
            least_idle(candidates, |index| self.trust(index)).unwrap_or_default()
        });
        match limit.checked_sub(idle) {
            Some(tolerated) => {
                let present = if excess.is_zero() { excess } else { tolerated.saturating_add(excess) };
                Punctuality::Late(StartDelay { present, tolerated })
            }
            None => Punctuality::Hopeless(idle - limit),
        }
    }

    fn trust(&self, index: usize) -> f64 {
        self.snapshot.entries[index].upstream.forecast_trust(self.now)
    }
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

/// Returns the reject of a request that waited in vain, after its last look.
pub(super) fn wait_refusal(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    missed: &MissedLook,
    retry_after: Duration,
) -> Reject {
    let is_late = request.slo.is_some_and(|slo| scope.begun.elapsed() >= slo);
    match missed.delay.map(|delay| delay.excess()).filter(|excess| !excess.is_zero()) {
        Some(excess) => refusal(request, excess),
        None if is_late => refusal(request, retry_after),
        None => Reject::Full { retry_after: retry_after.as_secs().max(1) },
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn limit(values: &[&[u8]], rule: SloRule) -> Result<Option<Duration>, Reject> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(X_SLO_TTFT, HeaderValue::from_bytes(value).expect("is a value"));
        }
        limit_of(&headers, rule)
    }

    #[test]
    fn reads_the_shortest_of_several_limits() {
        let table: [(&[&[u8]], Option<u64>); 16] = [
            (&[], None),
            (&[b"250"], Some(250_000)),
            (&[b" 0.5 "], Some(500)),
            (&[b"1e3"], Some(1_000_000)),
            (&[b"1000", b"250"], Some(250_000)),
            (&[b"250", b"1000"], Some(250_000)),
            (&[b"1000, 250"], Some(250_000)),
            (&[b"250,1000", b"400"], Some(250_000)),
            (&[b"0"], None),
            (&[b"-0"], None),
            (&[b"0", b"250"], Some(250_000)),
            (&[b"250,0"], Some(250_000)),
            (&[b"inf"], None),
            (&[b"1e300", b"250"], Some(250_000)),
            (&[b"99999999999999999999999999999999999999999"], None),
            (&[b"1e-9"], Some(0)),
        ];
        for (values, micros) in table {
            for rule in [SloRule::Queue, SloRule::Reject] {
                let found = limit(values, rule).map(|limit| limit.map(|limit| limit.as_micros() as u64));
                assert_eq!(found, Ok(micros), "{values:?}");
            }
            assert_eq!(limit(values, SloRule::Ignore), Ok(None));
        }
        assert_eq!(limit(&[b"1e-9"], SloRule::Queue), Ok(Some(Duration::from_nanos(1))));
    }

    /// Regression: with `reject`, a request that came while a freed place was about to be taken by an older
    /// one was refused, although its forecast met the limit.
    #[test]
    fn refuses_only_requests_that_would_be_late() {
        use LimitVerdict::{Choose, Refuse, Wait};
        const SECOND: Duration = Duration::from_secs(1);
        let in_time = StartDelay { present: Duration::ZERO, tolerated: SECOND };
        let late = StartDelay { present: 3 * SECOND, tolerated: SECOND };
        for (punctuality, is_full, queued, rejected) in [
            (Punctuality::Punctual, false, Choose, Choose),
            (Punctuality::Hopeless(SECOND), false, Refuse(SECOND), Refuse(SECOND)),
            (Punctuality::Hopeless(SECOND), true, Refuse(SECOND), Refuse(SECOND)),
            (Punctuality::Late(in_time), true, Wait(None), Wait(None)),
            (Punctuality::Late(late), false, Wait(Some(late)), Refuse(2 * SECOND)),
            (Punctuality::Late(in_time), false, Wait(Some(in_time)), Wait(Some(in_time))),
        ] {
            let found = [SloRule::Queue, SloRule::Reject].map(|rule| punctuality.verdict(is_full, rule));
            assert_eq!(found, [queued, rejected], "{punctuality:?}, full: {is_full}");
        }
    }

    #[test]
    fn rejects_what_is_no_limit_wherever_it_stands() {
        let table: [&[&[u8]]; 12] = [
            &[b""],
            &[b"soon"],
            &[b"-1"],
            &[b"-inf"],
            &[b"NaN"],
            &[b"1s"],
            &[b"1 000"],
            &[b"250,"],
            &[b",250"],
            &[b"250", b"soon"],
            &[b"250", b""],
            &[b"\xff250"],
        ];
        for values in table {
            let rejected = limit(values, SloRule::Queue);
            assert!(matches!(rejected, Err(Reject::Field { .. })), "{values:?}: {rejected:?}");
            assert_eq!(limit(values, SloRule::Ignore), Ok(None));
        }
    }
}
