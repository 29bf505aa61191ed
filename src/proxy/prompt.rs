//! A request's prompt on its way: read before the choice, followed to its end while the body streams past,
//! learnt when it is sent, taken back when it never arrived.
//!
//! Never: an await. Buffers for reading and looking up are the thread's, used and left within one call.

use std::cell::RefCell;
use std::time::Instant;

use super::Shared;
use super::context::Context;
use crate::fleet::{Snapshot, Upstream, Work};
use crate::pick::Candidate;
use crate::prompt::canon::{Dialect, Reader, Request};
use crate::prompt::chain::Blocks;
use crate::prompt::scan::{Facts, Field, Progress, Scanner};
use crate::reply::usage::Usage;
use crate::route::paths::Api;
use crate::state::Asked;
use crate::state::local::Hits;

thread_local! {
    static READER: RefCell<Reader> = RefCell::default();
    static HITS: RefCell<Hits> = RefCell::default();
}

/// What follows the prompt behind the peek.
pub struct Rest {
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
) -> (Asked, Option<Box<Rest>>) {
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
        return (Asked { model, seen: facts.prompt_bytes, unseen, ..Asked::default() }, None);
    };
    READER.with_borrow_mut(|reader| {
        let request = Request { dialect, model: model.as_deref().unwrap_or_default(), body, scanner };
        let chain = reader.read(&request, blocks);
        // The chain is of the first prompt; the others have to be read as well.
        let others = if is_batch(&request) { facts.prompt_bytes.saturating_sub(chain.bytes) } else { 0 };
        let asked = Asked {
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
        let rest = at.map(|at| Box::new(Rest { reader: std::mem::take(reader), at: at as u64, known }));
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

/// Puts on each candidate what it holds of the prompt.
pub fn weigh(
    shared: &Shared,
    context: &Context,
    snapshot: &Snapshot,
    now: Instant,
    candidates: &mut [Candidate],
) {
    let share = context.settings.knobs.share;
    let id = |candidate: &Candidate| snapshot.entries[candidate.index].upstream.id;
    HITS.with_borrow_mut(|hits| shared.state.weigh(&context.asked, share, hits, candidates, id));
    // Where what is missing costs nothing, losing it costs nothing either.
    let knobs = &context.settings.knobs;
    let bonus = if knobs.missing > 0.0 { context.settings.peeker.sessions.bonus } else { 0.0 };
    shared.state.stray(&context.asked, bonus, now, candidates, id);
}

/// What the chosen upstream is given to do.
pub fn work(context: &Context, chosen: Option<&Candidate>) -> Work {
    let uncached = chosen.map_or(context.tokens, |chosen| chosen.uncached);
    Work { tokens: context.tokens, uncached, streams: context.streams }
}

/// The request goes to the upstream of its lease: siblings of a burst must find it at once.
pub fn learn(shared: &Shared, context: &mut Context, uncached: u64, now: Instant) {
    let Some(lease) = &context.lease else { return };
    context.predicted = context.tokens.saturating_sub(uncached);
    context.sent = false;
    context.learnt = Some(shared.state.learn(&context.asked, lease.upstream().id, now));
}

/// The attempt is over. When it never reached the engine, the engine has learnt nothing.
pub fn forget(shared: &Shared, context: &mut Context, upstream: usize, reached: bool) {
    if let (Some(learnt), false) = (context.learnt.take(), reached) {
        shared.state.take_back(&context.asked, upstream, learnt);
    }
}

/// What the answer says that it took corrects what was estimated.
pub fn told(shared: &Shared, context: &Context, upstream: &Upstream, usage: &Usage) {
    let is_known = context.model.name().is_some_and(|model| shared.fleet.snapshot().knows(model));
    if let (Some(tokens), true) = (usage.prompt_tokens, is_known) {
        shared.state.counted(&context.asked, tokens);
    }
    if let (Some(cached), Some(_)) = (usage.cached_tokens, context.settings.peeker.blocks) {
        shared.state.compared(upstream.id, upstream.name(), context.predicted, cached);
    }
}

/// A piece of the body goes to the upstream, `before` others.
pub fn follow(shared: &Shared, context: &mut Context, before: u64, piece: &[u8], end: bool) {
    let Some(rest) = &mut context.rest else { return };
    let skip = rest.at.saturating_sub(before);
    if let Some(fresh) = usize::try_from(skip).ok().and_then(|skip| piece.get(skip..)) {
        rest.at = before + piece.len() as u64;
        rest.reader.go_on(fresh);
    }
    if !end {
        return;
    }
    let chain = rest.reader.chain();
    let asked = &mut context.asked;
    (asked.chain, asked.end) = (chain.blocks.clone(), chain.end());
    (asked.seen, asked.unseen) = (chain.bytes, 0);
    if let Some(lease) = &context.lease {
        shared.state.learn_rest(asked, rest.known, lease.upstream().id, context.learnt.as_mut());
    }
    context.rest = None;
}
