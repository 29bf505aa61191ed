//! Chooses an upstream for the next attempt, and takes a lease on it.
//!
//! While every possible upstream is full, the request waits in the queue; the client's disconnect ends the
//! wait. Never: compute costs (`pick`), filter upstreams (`fleet::Snapshot`).

use std::time::{Duration, Instant};

use super::attempts::Attempts;
use super::client::Client;
use super::placement::{self, Placement};
use super::request::{ClientRequest, RequestScope};
use super::request_end::RequestEnd;
use super::slo::{self, LimitCheck, LimitVerdict, Punctuality};
use super::watch::RequestWatch;
use super::watched::watched;
use crate::fleet::{FilterResult, MissedLook, QueueRefusal, QueueTurn, Snapshot, UpstreamQuery};
use crate::observe::decisions::Decision;
use crate::pick::shortlist::shortlist;
use crate::pick::{self, Candidate, DrawSeed};
use crate::reject::Reject;

/// The result of one check for room.
#[allow(clippy::large_enum_variant, reason = "it is taken apart at once, and a box would cost each request")]
enum RoomCheck {
    Placed(Placement),
    /// Every possible upstream is full, or no forecast meets the request's limit.
    Missed(MissedLook),
    /// No upstream can be chosen or waited for.
    Nothing(Reject),
}

/// Chooses an upstream that has not been tried.
pub(super) async fn choose(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    attempts: &mut Attempts,
    watch: &mut RequestWatch,
) -> Result<Placement, RequestEnd> {
    let fleet = &scope.shared.fleet;
    // One wait limit for all attempts together.
    let deadline = *attempts.wait_until.get_or_insert_with(|| Instant::now() + scope.settings.wait);
    let deadline = slo::wait_end(scope, request, attempts, deadline);
    let mut turn: Option<QueueTurn> = None;
    loop {
        let snapshot = fleet.snapshot_owned();
        let among = request.among(&snapshot);
        let query = attempts.query(request, scope.settings, among.as_deref());
        let look = look(scope, request, &snapshot, &query, attempts.count + 1, turn.is_some());
        let slo = query.slo;
        drop(snapshot);
        let missed = match look {
            RoomCheck::Placed(placement) => {
                turn.into_iter().for_each(QueueTurn::taken);
                attempts.begin(placement.upstream().id);
                watch.record_choice();
                return Ok(placement);
            }
            RoomCheck::Nothing(reject) => return Err(attempts.failed.take().unwrap_or(reject).into()),
            RoomCheck::Missed(missed) => missed,
        };
        let model = request.model.name().map(str::to_string);
        let names = request.upstream_names().cloned();
        let query = UpstreamQuery {
            model: model.as_deref(),
            tokens: request.tokens,
            tried: &attempts.tried,
            again: attempts.count > 0,
            declined: &attempts.declined,
            only: request.only,
            among: among.as_deref(),
            names: names.as_ref(),
            has_aliases: !scope.settings.peeker.routes.is_empty(),
            slo,
            even_full: false,
        };
        let waiting = async {
            match turn.take() {
                Some(turn) => turn.wait_on(missed, deadline).await,
                None => fleet.wait(&query, missed, deadline).await,
            }
        };
        // Boxed: few requests wait, and the others should not hold its memory.
        let joined = Instant::now();
        let waited = watched(client, request, watch, true, Box::pin(waiting)).await;
        if !matches!(waited, Ok(Err(QueueRefusal::Full { .. }))) {
            watch.add_queued(joined.elapsed());
        }
        match waited? {
            Ok(mine) => turn = Some(mine),
            Err(QueueRefusal::Full { retry_after } | QueueRefusal::WaitedOut { retry_after }) => {
                return Err(slo::wait_refusal(scope, request, &missed, retry_after).into());
            }
        }
    }
}

/// Looks for room. A request that finds others waiting takes only what these leave.
fn look(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    snapshot: &Snapshot,
    query: &UpstreamQuery<'_>,
    attempt: u32,
    has_turn: bool,
) -> RoomCheck {
    let is_first = has_turn || !scope.shared.fleet.must_wait(query);
    if !is_first && query.slo.is_none() {
        return RoomCheck::Missed(MissedLook::default());
    }
    // A request with a limit does not wait to learn that no upstream can meet it.
    check_room(scope, request, snapshot, query, attempt, is_first)
}

/// Checks once whether an upstream has room. `is_first`: no older request waits for the same upstreams.
fn check_room(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    snapshot: &Snapshot,
    query: &UpstreamQuery<'_>,
    attempt: u32,
    is_first: bool,
) -> RoomCheck {
    let shared = scope.shared;
    placement::with_candidates(|candidates| {
        loop {
            let now = Instant::now();
            let routing = snapshot.candidates(query, now, candidates);
            let of = candidates.len();
            let last = placement::weigh(scope, request, snapshot, now, candidates);
            let check = LimitCheck { scope, request, query, attempt, snapshot, now };
            if let Some(result) = check_limit(&check, &routing, is_first, candidates) {
                return result;
            }
            let (random, turn) = (shared.random.next(), shared.fleet.next_turn());
            let seed = DrawSeed::for_prompt(request.prompt.last_hash(), random, turn, shared.state.jitter());
            shortlist(candidates, &scope.settings.knobs, seed, last);
            let choice = match (routing, pick::pick(candidates, &scope.settings.knobs, seed)) {
                (FilterResult::Candidates, Some(choice)) => choice,
                (FilterResult::Full { until }, _) => {
                    return RoomCheck::Missed(MissedLook { until, delay: None });
                }
                (routing, _) => return RoomCheck::Nothing(no_candidate(&routing, scope, request, snapshot)),
            };
            // Another request may have taken the last place meanwhile.
            let chosen = candidates.iter().find(|candidate| candidate.index == choice.index);
            let work = placement::lease_work(request, chosen);
            let Some(lease) = snapshot.take(query, choice.index, work, now) else { continue };
            let decision = Decision {
                id: scope.id,
                client_model: request.client_model(),
                model: request.model.name(),
                route: request.route_name(),
                attempt,
                session: request.prompt.session.map(|session| session.source.label()),
                tokens: request.tokens,
                blocks: request.prompt.chain.len(),
                choice,
                of,
                candidates,
                knobs: &scope.settings.knobs,
                name: &|index| snapshot.entries[index].upstream.name(),
            };
            scope.shared.observer.chosen(&decision);
            let reason = decision.reason();
            return RoomCheck::Placed(Placement::new(scope, request, lease, chosen, reason, now));
        }
    })
}

/// Compares the candidates with the request's limit, and removes those that do not meet it. Returns `None`
/// where the choice goes on: no older request waits, or each of them would be late on the candidates.
fn check_limit(
    check: &LimitCheck<'_>,
    routing: &FilterResult,
    is_first: bool,
    candidates: &mut Vec<Candidate>,
) -> Option<RoomCheck> {
    let limit = check.limit()?;
    let (until, mut punctuality) = match routing {
        FilterResult::Candidates => (None, check.keep_punctual(limit, candidates)),
        FilterResult::Full { until } => (*until, check.when_idle(limit, Duration::ZERO)),
        _ => return None,
    };
    let may_pass = matches!(punctuality, Punctuality::Punctual) && !is_first;
    if may_pass {
        punctuality = check.when_idle(limit, Duration::ZERO);
    }
    let is_full = *routing != FilterResult::Candidates;
    match punctuality.verdict(is_full, check.scope.settings.slo) {
        LimitVerdict::Choose => None,
        LimitVerdict::Wait(delay) => {
            let missed = MissedLook { until, delay };
            let passes = may_pass && check.scope.shared.fleet.may_pass(check.query, &missed);
            (!passes).then_some(RoomCheck::Missed(missed))
        }
        LimitVerdict::Refuse(excess) => Some(RoomCheck::Nothing(slo::refusal(check.request, excess))),
    }
}

/// The rejection where no upstream can be chosen.
fn no_candidate(
    routing: &FilterResult,
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    snapshot: &Snapshot,
) -> Reject {
    let model = request.client_model().map(str::to_string);
    // The model of this request is no longer served: a later request is routed to the model that is.
    let is_late = request.edits.as_ref().is_some_and(|edits| edits.plan.found_model);
    match (routing, model) {
        (FilterResult::Full { .. }, _) => Reject::Full { retry_after: 1 },
        (FilterResult::NoSuchModel, model) if is_late => Reject::NotReady { model },
        (FilterResult::NoSuchModel, Some(model)) => {
            Reject::Model { model, aliases: scope.settings.peeker.routes.aliases(snapshot) }
        }
        (_, model) => Reject::NotReady { model },
    }
}
