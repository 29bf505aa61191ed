//! The upstream of one attempt. Its prompt is added to the prefix index when it is sent, continued while the
//! body streams past, and removed again if the engine did not read it.
//!
//! Never: an await. The buffer for looking up is the thread's, used and left within one call.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use super::request::{ClientRequest, RequestScope};
use crate::fleet::{AwaitedToken, Lease, RequestWork, Snapshot, Upstream};
use crate::pick::Candidate;
use crate::pick::forecast::{forecast, tokens_before};
use crate::reply::usage::Usage;
use crate::state::LearnedChain;
use crate::state::prefix_index::Hits;

thread_local! {
    static HITS: RefCell<Hits> = RefCell::default();
    static CANDIDATES: RefCell<Vec<Candidate>> = RefCell::default();
    static IDLE_CANDIDATES: RefCell<Vec<Candidate>> = RefCell::default();
}

/// The choice of an upstream for one attempt, with its lease.
pub(super) struct Placement {
    pub lease: Lease,
    /// The reason of the choice.
    pub reason: &'static str,
    /// The leading blocks that it is believed to hold, the prompt's blocks, and the tokens of the hit.
    pub hit: u32,
    pub blocks: u32,
    pub predicted: u64,
    /// The forecast of the time from the choice to the first token.
    pub forecast: Duration,
    /// The tokens before the first token by the forecast.
    tokens_before: u32,
    chosen_at: Instant,
    /// The first token that is to correct the forecasts.
    awaited: Option<AwaitedToken>,
    /// The learnt blocks, to be removed if the engine turns out not to have read the prompt.
    learnt: Option<LearnedChain>,
    /// Whether a part of the request may have reached the upstream.
    sent: bool,
}

/// A count in the fewest bytes: each open stream holds its placement.
fn small(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Lends the thread's buffer for candidates, so that a choice among many upstreams allocates none.
pub(super) fn with_candidates<T>(choose: impl FnOnce(&mut Vec<Candidate>) -> T) -> T {
    CANDIDATES.with_borrow_mut(choose)
}

/// Lends the thread's buffer for candidates as if they were idle, beside the one of `with_candidates`.
pub(super) fn with_idle_candidates<T>(compare: impl FnOnce(&mut Vec<Candidate>) -> T) -> T {
    IDLE_CANDIDATES.with_borrow_mut(compare)
}

/// Sets the blocks of the prompt that each candidate holds. Returns the index of the upstream that had the
/// session last, if it is a candidate.
pub(super) fn weigh(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    snapshot: &Snapshot,
    now: Instant,
    candidates: &mut [Candidate],
) -> Option<usize> {
    let (knobs, state) = (&scope.settings.knobs, &scope.shared.state);
    let id = |candidate: &Candidate| snapshot.id_at(candidate.index);
    HITS.with_borrow_mut(|hits| state.weigh(&request.prompt, knobs.share, hits, candidates, id));
    // Where missing tokens cost nothing, leaving the session's upstream costs nothing either.
    let bonus = if knobs.missing > 0.0 { scope.settings.peeker.session_bonus } else { 0.0 };
    state.add_session_penalty(&request.prompt, bonus, now, candidates, id)
}

/// The work of the request for the lease.
pub(super) fn lease_work(request: &ClientRequest, chosen: Option<&Candidate>) -> RequestWork {
    let uncached = chosen.map_or(request.tokens, |chosen| chosen.uncached);
    RequestWork { tokens: request.tokens, uncached, streams: request.streams }
}

// === impl Placement ===

impl Placement {
    /// Records the request at the upstream of this lease: other requests of a burst must find it at once.
    pub(super) fn new(
        scope: &RequestScope<'_>,
        request: &ClientRequest,
        lease: Lease,
        chosen: Option<&Candidate>,
        reason: &'static str,
        now: Instant,
    ) -> Self {
        let learnt = Some(scope.shared.state.learn(&request.prompt, lease.upstream().id, now));
        let uncached = chosen.map_or(request.tokens, |chosen| chosen.uncached);
        // The first byte shows the first token if the answer is to come as a stream, and the engine need not
        // wait for the rest of the request.
        let shows_first_token = request.streams && request.body.is_complete();
        Placement {
            reason,
            hit: chosen.map_or(0, |chosen| small(chosen.hit)),
            blocks: small(request.prompt.chain.len() as u64),
            predicted: request.tokens.saturating_sub(uncached),
            forecast: chosen.map_or(Duration::ZERO, forecast),
            tokens_before: small(chosen.map_or(uncached, tokens_before)),
            chosen_at: now,
            awaited: shows_first_token.then(|| AwaitedToken::new(lease.upstream().clone(), now)),
            learnt,
            sent: false,
            lease,
        }
    }

    pub(super) fn upstream(&self) -> &std::sync::Arc<Upstream> {
        self.lease.upstream()
    }

    /// Records that the request is being sent.
    pub(super) fn send(&mut self) {
        self.sent = true;
    }

    /// Removes the learnt blocks unless the engine may have read the prompt (`read`).
    pub(super) fn conclude(&mut self, scope: &RequestScope<'_>, request: &ClientRequest, read: bool) {
        if let (Some(learnt), false) = (self.learnt.take(), read && self.sent) {
            scope.shared.state.take_back(&request.prompt, self.lease.upstream().id, learnt);
        }
    }

    /// Ends the prefill at the first event, or byte, of the model's output. A refusal does not measure the
    /// engine's pace (`teaches`).
    pub(super) fn end_prefill(&mut self, teaches: bool, now: Instant) {
        if teaches {
            self.lease.first_byte(now);
        } else {
            self.lease.end_prefill();
            self.awaited = None;
        }
    }

    /// Compares the forecast with the first token of a stream, which came at `now`, and corrects it.
    pub(super) fn compare_forecast(&mut self, scope: &RequestScope<'_>, now: Instant) {
        let Some(_awaited) = self.awaited.take() else { return };
        let upstream = self.upstream();
        let actual = now.saturating_duration_since(self.chosen_at);
        upstream.correct_forecast(self.tokens_before.into(), self.forecast, actual, now);
        scope.shared.observer.forecast_compared(upstream.name(), self.forecast, actual);
    }

    /// Corrects the estimates by the usage that the answer reports, where its counts fit the prompt.
    /// `cached`: its cached tokens.
    pub(super) fn correct(
        &self,
        scope: &RequestScope<'_>,
        request: &ClientRequest,
        usage: &Usage,
        cached: Option<u64>,
    ) {
        let shared = scope.shared;
        if let (Some(cached), Some(_)) = (cached, scope.settings.peeker.blocks) {
            let prompt = usage.prompt_tokens.unwrap_or(0);
            shared.observer.cache_compared(self.upstream().name(), prompt, self.predicted, cached);
        }
        if usage.prompt_tokens.is_some_and(|tokens| !shared.state.is_plausible_count(&request.prompt, tokens))
        {
            return;
        }
        let is_known = request.model.name().is_some_and(|model| shared.fleet.snapshot().serves_model(model));
        if usage.prompt_tokens.is_some() && self.blocks > 0 && scope.settings.peeker.blocks.is_some() {
            let max_error = scope.settings.knobs.sight_error;
            self.upstream().observe_cached_tokens(self.predicted, cached, max_error, &shared.observer);
        }
        if let (Some(tokens), true) = (usage.prompt_tokens, is_known) {
            shared.state.learn_token_count(&request.prompt, tokens);
        }
        if let (Some(cached), Some(_)) = (cached, scope.settings.peeker.blocks) {
            let upstream = self.upstream();
            shared.state.compare_cached_tokens(upstream.id, upstream.name(), self.predicted, cached);
        }
    }

    /// Continues the prompt with a piece of the body that follows `before` bytes.
    pub(super) fn follow(
        &mut self,
        scope: &RequestScope<'_>,
        request: &mut ClientRequest,
        before: u64,
        piece: &[u8],
        end: bool,
    ) {
        let Some(tail) = &mut request.prompt_tail else { return };
        tail.read(before, piece);
        if !end {
            return;
        }
        tail.complete(&mut request.prompt);
        let upstream = self.lease.upstream().id;
        scope.shared.state.learn_rest(&request.prompt, tail.known_blocks(), upstream, self.learnt.as_mut());
        request.prompt_tail = None;
    }
}
