//! A request's prompt on its way: read before the choice, followed to its end while the body streams past,
//! learnt when it is sent, taken back when it never arrived.
//!
//! Never: an await. Buffers for reading and looking up are the thread's, used and left within one call.

use std::cell::RefCell;
use std::time::Instant;

use super::request::{ClientRequest, Scope};
use crate::fleet::{Lease, Snapshot, Upstream, Work};
use crate::pick::Candidate;
use crate::prompt::canon::{Dialect, Reader, Request};
use crate::prompt::chain::Blocks;
use crate::prompt::scan::{Facts, Field, Progress, Scanner};
use crate::reply::usage::Usage;
use crate::route::paths::Api;
use crate::state::prefix_index::Hits;
use crate::state::{LearnedChain, PromptLookup};

thread_local! {
    static READER: RefCell<Reader> = RefCell::default();
    static HITS: RefCell<Hits> = RefCell::default();
}

/// What follows the prompt behind the peek.
pub struct PromptTail {
    reader: Reader,
    /// Where in the body it wants to go on.
    at: u64,
    /// Blocks that were known before the choice.
    known: usize,
}

/// How the interface says its prompt; `None` where there is none that a cache holds.
pub fn dialect(api: Api, facts: &Facts<'_>) -> Option<Dialect> {
    match api {
        Api::Chat | Api::ChatBatch => Some(Dialect::Chat),
        Api::Responses => Some(Dialect::Responses),
        Api::Messages => Some(Dialect::Messages),
        Api::Completions => Some(Dialect::Completions),
        Api::Generate => Some(Dialect::Generate),
        Api::Invocations if facts.has(Field::Messages) => Some(Dialect::Chat),
        Api::Invocations if facts.has(Field::Prompt) => Some(Dialect::Completions),
        _ => None,
    }
}

/// Reads what the peeked bytes say of the prompt. `unread`: bytes of the body that are announced beyond.
pub fn read(
    dialect: Option<Dialect>,
    blocks: Option<Blocks>,
    facts: &Facts<'_>,
    (body, scanner): (&[u8], &Scanner),
    unread: u64,
) -> (PromptLookup, Option<Box<PromptTail>>) {
    let model = facts.model.name().map(str::to_string);
    let is_cut = facts.state == Progress::Cut;
    let unseen = match &facts.previous_response_id {
        // What lies behind the peek is taken for prompt.
        _ if is_cut => unread.max(1),
        // The prompt begins with what the engine has kept, which nobody here has seen.
        Some(id) if !id.is_empty() => 1,
        _ => 0,
    };
    let (Some(dialect), Some(blocks)) = (dialect, blocks) else {
        return (PromptLookup { model, seen: facts.prompt_bytes, unseen, ..PromptLookup::default() }, None);
    };
    READER.with_borrow_mut(|reader| {
        let request = Request { dialect, model: model.as_deref().unwrap_or_default(), body, scanner };
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
        let at = reader.resume_at().filter(|_| is_cut);
        let known = asked.chain.len();
        let rest = at.map(|at| Box::new(PromptTail { reader: std::mem::take(reader), at: at as u64, known }));
        (asked, rest)
    })
}

/// Whether the body asks for several prompts at once.
fn is_batch(request: &Request<'_>) -> bool {
    let field = match request.dialect {
        Dialect::Completions => Field::Prompt,
        Dialect::Chat => Field::Messages,
        Dialect::Responses | Dialect::Messages | Dialect::Generate => return false,
    };
    let list = request.scanner.span(field).and_then(|span| request.body.get(span)?.strip_prefix(b"["));
    let first = list.and_then(|list| list.trim_ascii_start().first());
    match request.dialect {
        Dialect::Completions => matches!(first, Some(b'"' | b'[')),
        _ => first == Some(&b'['),
    }
}

/// A request's place at the upstream that was chosen for one attempt.
pub struct Placement {
    pub lease: Lease,
    /// Why this upstream was chosen.
    pub reason: &'static str,
    /// The leading blocks that it is believed to hold, of so many, and their tokens.
    pub hit: u64,
    pub blocks: usize,
    pub predicted: u64,
    /// To take back what was learnt, while it may turn out that the engine has not read the prompt.
    learnt: Option<LearnedChain>,
    /// Some of the request may have reached the upstream.
    sent: bool,
}

/// Puts on each candidate what it holds of the prompt.
pub fn weigh(
    scope: &Scope<'_>,
    request: &ClientRequest,
    snapshot: &Snapshot,
    now: Instant,
    candidates: &mut [Candidate],
) {
    let (knobs, state) = (&scope.settings.knobs, &scope.shared.state);
    let id = |candidate: &Candidate| snapshot.entries[candidate.index].upstream.id;
    HITS.with_borrow_mut(|hits| state.weigh(&request.prompt, knobs.share, hits, candidates, id));
    // Where what is missing costs nothing, losing it costs nothing either.
    let bonus = if knobs.missing > 0.0 { scope.settings.peeker.sessions.bonus } else { 0.0 };
    state.add_session_penalty(&request.prompt, bonus, now, candidates, id);
}

/// What the chosen upstream is given to do.
pub fn work(request: &ClientRequest, chosen: Option<&Candidate>) -> Work {
    let uncached = chosen.map_or(request.tokens, |chosen| chosen.uncached);
    Work { tokens: request.tokens, uncached, streams: request.streams }
}

// === impl Placement ===

impl Placement {
    /// The request goes to the upstream of this lease: siblings of a burst must find it at once.
    pub fn new(
        scope: &Scope<'_>,
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

    /// The request goes out.
    pub fn send(&mut self) {
        self.sent = true;
    }

    /// It is known whether the engine may have read the prompt. Where it has not, it has learnt nothing.
    pub fn conclude(&mut self, scope: &Scope<'_>, request: &ClientRequest, read: bool) {
        if let (Some(learnt), false) = (self.learnt.take(), read && self.sent) {
            scope.shared.state.take_back(&request.prompt, self.lease.upstream().id, learnt);
        }
    }

    /// The prompt has been read: the first event, or byte, of what the model says is there. An answer that
    /// refuses the request teaches nothing of the engine's pace.
    pub fn end_prefill(&mut self, teaches: bool) {
        if teaches {
            self.lease.first_byte(Instant::now());
        } else {
            self.lease.end_prefill();
        }
    }

    /// What the answer reports of tokens corrects what was estimated.
    pub fn correct(&self, scope: &Scope<'_>, request: &ClientRequest, usage: &Usage) {
        let shared = scope.shared;
        let is_known = request.model.name().is_some_and(|model| shared.fleet.snapshot().serves_model(model));
        if let (Some(tokens), true) = (usage.prompt_tokens, is_known) {
            shared.state.counted(&request.prompt, tokens);
        }
        if let (Some(cached), Some(_)) = (usage.cached_tokens, scope.settings.peeker.blocks) {
            let upstream = self.upstream();
            shared.state.compared(upstream.id, upstream.name(), self.predicted, cached);
        }
    }

    /// A piece of the body goes to the upstream, behind so many bytes.
    pub fn follow(
        &mut self,
        scope: &Scope<'_>,
        request: &mut ClientRequest,
        before: u64,
        piece: &[u8],
        end: bool,
    ) {
        let Some(tail) = &mut request.prompt_tail else { return };
        let skip = tail.at.saturating_sub(before);
        if let Some(fresh) = usize::try_from(skip).ok().and_then(|skip| piece.get(skip..)) {
            tail.at = before + piece.len() as u64;
            tail.reader.go_on(fresh);
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
