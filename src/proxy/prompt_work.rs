//! A request's prompt: read before the choice, continued while the body streams past, added to the prefix
//! index when it is sent, and removed again if the engine did not read it.
//!
//! Never: an await. Buffers for reading and looking up are the thread's, used and left within one call.

use std::cell::RefCell;
use std::time::Instant;

use super::request::{ClientRequest, RequestScope};
use crate::fleet::{Lease, RequestWork, Snapshot, Upstream};
use crate::json;
use crate::pick::Candidate;
use crate::prompt::canon::{PromptDialect, PromptReader, PromptSource};
use crate::prompt::chain::BlockLayout;
use crate::prompt::scan::{BodyField, ScanFacts, ScanProgress, Scanner};
use crate::reply::usage::Usage;
use crate::route::paths::Api;
use crate::state::prefix_index::Hits;
use crate::state::{LearnedChain, PromptLookup};

thread_local! {
    static READER: RefCell<PromptReader> = RefCell::default();
    static HITS: RefCell<Hits> = RefCell::default();
}

/// Continues reading the prompt behind the peek.
pub struct PromptTail {
    reader: PromptReader,
    /// The offset in the body from which it continues.
    at: u64,
    /// Blocks that were known before the choice.
    known: usize,
}

/// The form of the interface's prompt; `None` where no cache holds it.
pub fn dialect(api: Api, facts: &ScanFacts<'_>) -> Option<PromptDialect> {
    match api {
        Api::Chat | Api::ChatBatch => Some(PromptDialect::Chat),
        Api::Responses => Some(PromptDialect::Responses),
        Api::Messages => Some(PromptDialect::Messages),
        Api::Completions => Some(PromptDialect::Completions),
        Api::Generate => Some(PromptDialect::Generate),
        Api::Invocations if facts.has(BodyField::Messages) => Some(PromptDialect::Chat),
        Api::Invocations if facts.has(BodyField::Prompt) => Some(PromptDialect::Completions),
        _ => None,
    }
}

/// Reads the prompt in the peeked bytes. `unread`: bytes of the body that are declared beyond them.
pub fn read(
    dialect: Option<PromptDialect>,
    blocks: Option<BlockLayout>,
    facts: &ScanFacts<'_>,
    (body, scanner): (&[u8], &Scanner),
    unread: u64,
) -> (PromptLookup, Option<Box<PromptTail>>) {
    let model = facts.model.name().map(str::to_string);
    let is_cut = facts.state == ScanProgress::Cut;
    let unseen = match &facts.previous_response_id {
        // The bytes after the peek count as prompt.
        _ if is_cut => unread.max(1),
        // The prompt begins with the previous response, which only the engine has.
        Some(id) if !id.is_empty() => 1,
        _ => 0,
    };
    let (Some(dialect), Some(blocks)) = (dialect, blocks) else {
        return (PromptLookup { model, seen: facts.prompt_bytes, unseen, ..PromptLookup::default() }, None);
    };
    READER.with_borrow_mut(|reader| {
        let request = PromptSource { dialect, model: model.as_deref().unwrap_or_default(), body, scanner };
        let chain = reader.read(&request, blocks);
        // The chain is of the first prompt; the others have to be read as well.
        let others = if is_batch(&request) { facts.prompt_bytes.saturating_sub(chain.bytes) } else { 0 };
        let asked = PromptLookup {
            chain: chain.blocks.clone(),
            end: if is_cut { None } else { chain.end() },
            family: chain.family,
            seen: chain.bytes,
            unseen: unseen.max(others),
            model,
            session: None,
        };
        let at = reader.resume_offset().filter(|_| is_cut);
        let known = asked.chain.len();
        let rest = at.map(|at| Box::new(PromptTail { reader: std::mem::take(reader), at: at as u64, known }));
        (asked, rest)
    })
}

/// Whether the body asks for several prompts at once.
fn is_batch(request: &PromptSource<'_>) -> bool {
    let field = match request.dialect {
        PromptDialect::Completions => BodyField::Prompt,
        PromptDialect::Chat => BodyField::Messages,
        PromptDialect::Responses | PromptDialect::Messages | PromptDialect::Generate => return false,
    };
    let list = request.scanner.span(field).and_then(|span| request.body.get(span)?.strip_prefix(b"["));
    let first = list.and_then(|list| list.get(json::skip_space(list, 0)));
    match request.dialect {
        PromptDialect::Completions => matches!(first, Some(b'"' | b'[')),
        _ => first == Some(&b'['),
    }
}

/// The choice of an upstream for one attempt, with its lease.
pub struct Placement {
    pub lease: Lease,
    /// The reason of the choice.
    pub reason: &'static str,
    /// The leading blocks that it is believed to hold, the prompt's blocks, and the tokens of the hit.
    pub hit: u64,
    pub blocks: usize,
    pub predicted: u64,
    /// The learnt blocks, to be removed if the engine turns out not to have read the prompt.
    learnt: Option<LearnedChain>,
    /// Whether a part of the request may have reached the upstream.
    sent: bool,
}

/// Sets the blocks of the prompt that each candidate holds.
pub fn weigh(
    scope: &RequestScope<'_>,
    request: &ClientRequest,
    snapshot: &Snapshot,
    now: Instant,
    candidates: &mut [Candidate],
) {
    let (knobs, state) = (&scope.settings.knobs, &scope.shared.state);
    let id = |candidate: &Candidate| snapshot.entries[candidate.index].upstream.id;
    HITS.with_borrow_mut(|hits| state.weigh(&request.prompt, knobs.share, hits, candidates, id));
    // Where missing tokens cost nothing, leaving the session's upstream costs nothing either.
    let bonus = if knobs.missing > 0.0 { scope.settings.peeker.session_bonus } else { 0.0 };
    state.add_session_penalty(&request.prompt, bonus, now, candidates, id);
}

/// The work of the request for the lease.
pub fn lease_work(request: &ClientRequest, chosen: Option<&Candidate>) -> RequestWork {
    let uncached = chosen.map_or(request.tokens, |chosen| chosen.uncached);
    RequestWork { tokens: request.tokens, uncached, streams: request.streams }
}

// === impl Placement ===

impl Placement {
    /// Records the request at the upstream of this lease: other requests of a burst must find it at once.
    pub fn new(
        scope: &RequestScope<'_>,
        request: &ClientRequest,
        lease: Lease,
        chosen: Option<&Candidate>,
        reason: &'static str,
        now: Instant,
    ) -> Self {
        let learnt = Some(scope.shared.state.learn(&request.prompt, lease.upstream().id, now));
        let uncached = chosen.map_or(request.tokens, |chosen| chosen.uncached);
        Placement {
            reason,
            hit: chosen.map_or(0, |chosen| chosen.hit),
            blocks: request.prompt.chain.len(),
            predicted: request.tokens.saturating_sub(uncached),
            learnt,
            sent: false,
            lease,
        }
    }

    pub fn upstream(&self) -> &std::sync::Arc<Upstream> {
        self.lease.upstream()
    }

    /// Records that the request is being sent.
    pub fn send(&mut self) {
        self.sent = true;
    }

    /// Removes the learnt blocks unless the engine may have read the prompt (`read`).
    pub fn conclude(&mut self, scope: &RequestScope<'_>, request: &ClientRequest, read: bool) {
        if let (Some(learnt), false) = (self.learnt.take(), read && self.sent) {
            scope.shared.state.take_back(&request.prompt, self.lease.upstream().id, learnt);
        }
    }

    /// Ends the prefill at the first event, or byte, of the model's output. A refusal does not measure the
    /// engine's pace (`teaches`).
    pub fn end_prefill(&mut self, teaches: bool) {
        if teaches {
            self.lease.first_byte(Instant::now());
        } else {
            self.lease.end_prefill();
        }
    }

    /// Corrects the estimates by the usage that the answer reports, where its counts fit the prompt.
    pub fn correct(&self, scope: &RequestScope<'_>, request: &ClientRequest, usage: &Usage) {
        let shared = scope.shared;
        if let (Some(cached), Some(_)) = (usage.cached_tokens, scope.settings.peeker.blocks) {
            shared.observer.cache_compared(self.upstream().name(), self.predicted, cached);
        }
        if usage.prompt_tokens.is_some_and(|tokens| !shared.state.is_plausible_count(&request.prompt, tokens))
        {
            return;
        }
        let is_known = request.model.name().is_some_and(|model| shared.fleet.snapshot().serves_model(model));
        if let (Some(tokens), true) = (usage.prompt_tokens, is_known) {
            shared.state.learn_token_count(&request.prompt, tokens);
        }
        if let (Some(cached), Some(_)) = (usage.cached_tokens, scope.settings.peeker.blocks) {
            let upstream = self.upstream();
            shared.state.compare_cached_tokens(upstream.id, upstream.name(), self.predicted, cached);
        }
    }

    /// Continues the prompt with a piece of the body that follows `before` bytes.
    pub fn follow(
        &mut self,
        scope: &RequestScope<'_>,
        request: &mut ClientRequest,
        before: u64,
        piece: &[u8],
        end: bool,
    ) {
        let Some(tail) = &mut request.prompt_tail else { return };
        let skip = tail.at.saturating_sub(before);
        if let Some(fresh) = usize::try_from(skip).ok().and_then(|skip| piece.get(skip..)) {
            tail.at = before + piece.len() as u64;
            tail.reader.resume(fresh);
        }
        if !end {
            return;
        }
        let (chain, prompt) = (tail.reader.chain(), &mut request.prompt);
        (prompt.chain, prompt.end) = (chain.blocks.clone(), chain.end());
        (prompt.seen, prompt.unseen) = (chain.bytes, 0);
        let upstream = self.lease.upstream().id;
        scope.shared.state.learn_rest(prompt, tail.known, upstream, self.learnt.as_mut());
        request.prompt_tail = None;
    }
}
