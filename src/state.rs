//! What a balancer remembers between requests: which upstream was sent which prompts and sessions, and made
//! which responses, how long a token of each model is, and how far engines agree with what was predicted of
//! their caches.
//!
//! Decisions read local memory only. It must never wait for anything on a request's path but the short
//! lock of a writer, and never know the fleet: an upstream is a number here, the same for its life.

mod agreement;
pub mod exchange;
mod places;
pub mod prefix_index;
mod prompt_tails;
mod ratios;
pub mod redis;
pub mod responses;
pub mod sessions;
mod siblings;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::config::types::PrefixIndex;
use crate::observe::Observer;
use crate::pick::Candidate;
use crate::prompt::chain::{BlockLayout, PromptFamily};
use crate::prompt::session::{self, Session};
use agreement::Agreement;
use exchange::Outbox;
use places::UpstreamPlaces;
use prefix_index::{Hits, Index, Prompt, Receipt, Size, Slot};
use prompt_tails::PromptTails;
use ratios::{DEFAULT_BYTES_PER_TOKEN, Ratios};
use sessions::{SessionBinding, Sessions};

/// The longest text that is hashed to a chain: as long as the largest bodies.
const MAX_CHAIN_BYTES: usize = 64 << 20;

/// The assumed tokens of a prompt that cannot be read, such as a form with a recording, for its session:
/// another upstream would have to repeat work of unknown size.
const UNREAD_PROMPT_TOKENS: u64 = 1_000;

/// What a request brings of a prompt.
#[derive(Debug, Default)]
pub struct PromptLookup {
    /// Of the model that is to answer.
    pub model: Option<String>,
    /// Empty where nothing is known of the prompt, or nothing is remembered.
    pub chain: Vec<u64>,
    /// See `prefix_index::Index::learn`.
    pub end: Option<u64>,
    pub family: PromptFamily,
    /// Of the prompt, as far as it was seen, and about as many as were not.
    pub seen: u64,
    pub unseen: u64,
    pub session: Option<Session>,
}

/// What was learnt from a sent request, to be taken back when it never arrives.
#[derive(Debug)]
pub struct LearnedChain {
    receipt: Option<Receipt>,
    /// Of all of it, where it was longer than what was known when it was sent.
    rest: Option<Receipt>,
    /// Where its session was before.
    before: Option<SessionBinding>,
}

/// An upstream of the fleet, as passed to `follow`.
#[derive(Clone, Copy, Debug)]
pub struct TrackedUpstream<'a> {
    pub id: usize,
    pub name: &'a str,
    /// Moves whenever its engine's cache must be believed to be empty.
    pub incarnation: u64,
    /// What its engine's cache holds, where that is known.
    pub cache_tokens: Option<u64>,
    /// The model that tells how long a token is.
    pub model: Option<&'a str>,
}

pub struct State {
    index: Index,
    blocks: BlockLayout,
    remembers: bool,
    /// Written under the lock of `upstreams` only.
    places: ArcSwap<UpstreamPlaces>,
    upstreams: Mutex<Vec<IndexedUpstream>>,
    ratios: Ratios,
    beyond: Mutex<PromptTails>,
    sessions: Sessions,
    /// The upstreams of stored responses whose ids do not name them.
    responses: Sessions,
    born: Instant,
    /// The events for siblings; `None`: there are no siblings.
    outbox: Option<Arc<Outbox>>,
    /// The age of the siblings' reports, in microseconds.
    siblings_age: AtomicU64,
    observer: Observer,
}

/// The state of one upstream in the index.
struct IndexedUpstream {
    id: usize,
    /// The name that siblings use; `None` until `follow` passes it.
    name: Option<Arc<str>>,
    slot: Slot,
    incarnation: Option<u64>,
    limit: Option<usize>,
    agreement: Agreement,
}

// === impl Asked ===

impl PromptLookup {
    /// Whether there is something to look up.
    pub fn has_chain(&self) -> bool {
        !self.chain.is_empty() || self.end.is_some()
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

// === impl State ===

impl State {
    /// `ttl` is how long a session is known; `seed` is random: see `prefix_index::Index::new`.
    /// One of several balancers publishes what it learns through `outbox`.
    pub fn new(
        config: PrefixIndex,
        ttl: Duration,
        seed: u64,
        outbox: Option<Arc<Outbox>>,
        observer: Observer,
    ) -> Arc<Self> {
        Arc::new(State {
            sessions: Sessions::new(Sessions::LIMIT, millis(ttl)),
            responses: Sessions::new(responses::MAX_RESPONSES, millis(ttl)),
            born: Instant::now(),
            index: Index::new(config.blocks, seed),
            blocks: BlockLayout {
                bytes: config.block_bytes,
                max_blocks: MAX_CHAIN_BYTES / config.block_bytes.max(1),
            },
            remembers: config.blocks > 0,
            places: ArcSwap::default(),
            upstreams: Mutex::default(),
            ratios: Ratios::default(),
            beyond: Mutex::default(),
            outbox,
            siblings_age: AtomicU64::new(0),
            observer,
        })
    }

    /// Another time to live of sessions.
    pub fn set_ttl(&self, ttl: Duration) {
        self.sessions.set_ttl(millis(ttl));
        self.responses.set_ttl(millis(ttl));
    }

    fn millis(&self, now: Instant) -> u64 {
        millis(now.saturating_duration_since(self.born))
    }

    /// How prompts are cut; `None` when nothing is remembered.
    pub fn blocks(&self) -> Option<BlockLayout> {
        self.remembers.then_some(self.blocks)
    }

    pub fn size(&self) -> Size {
        self.index.size()
    }

    fn upstreams(&self) -> MutexGuard<'_, Vec<IndexedUpstream>> {
        self.upstreams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a token of this prompt.
    fn ratio(&self, asked: &PromptLookup) -> f64 {
        match asked.family {
            PromptFamily::Tokens => DEFAULT_BYTES_PER_TOKEN,
            PromptFamily::Chat | PromptFamily::Text => self.ratios.of(asked.model.as_deref()),
        }
    }

    /// The prompt in tokens, as the formula counts it.
    pub fn prompt(&self, asked: &PromptLookup) -> Prompt {
        let ratio = self.ratio(asked);
        let tokens = ((asked.seen + asked.unseen) as f64 / ratio).round() as u64;
        Prompt { tokens, block_tokens: self.blocks.bytes as f64 / ratio }
    }

    /// Puts on each candidate what it holds of the prompt. `id` says which upstream a candidate is.
    pub fn weigh(
        &self,
        asked: &PromptLookup,
        share: f64,
        hits: &mut Hits,
        candidates: &mut [Candidate],
        id: impl Fn(&Candidate) -> usize,
    ) {
        if asked.chain.is_empty() {
            return;
        }
        let prompt = self.prompt(asked);
        self.index.lookup(&asked.chain, hits);
        hits.charge(share, candidates.len());
        let places = self.places.load();
        for candidate in candidates {
            let slot = places.slot(id(candidate));
            hits.weigh(slot, prompt, candidate);
            let all = slot.filter(|_| asked.unseen > 0 && candidate.hit as usize == asked.chain.len());
            if let (Some(slot), Some(last)) = (all, asked.chain.last()) {
                // It holds all that was seen: then also what it was sent behind that, as far as is known.
                let behind = self.beyond().find(*last, slot).min(candidate.uncached);
                candidate.uncached -= behind;
                candidate.missing = candidate.missing.saturating_sub(behind);
            }
        }
    }

    /// Puts on each candidate what the request's session loses by going there, after `weigh`: `bonus` times
    /// what is held where it was last, and not there. Where that upstream is no candidate, all are the same
    /// to it.
    pub fn add_session_penalty(
        &self,
        asked: &PromptLookup,
        bonus: f64,
        now: Instant,
        candidates: &mut [Candidate],
        id: impl Fn(&Candidate) -> usize,
    ) {
        let Some(session) = asked.session else { return };
        let Some(bound) = self.sessions.find(session.key, self.millis(now)) else { return };
        let Some(last) = candidates.iter().find(|candidate| id(candidate) == bound.upstream) else { return };
        let tokens = self.session_tokens(asked);
        // Without a chain the cached part is unknown; the session's last request is the estimate.
        let (guess, uncached) = (bound.tokens.min(tokens), last.uncached);
        for candidate in candidates.iter_mut().filter(|candidate| id(candidate) != bound.upstream) {
            // An upstream that holds as much loses nothing, for example by a system prompt that all hold.
            let more = candidate.uncached.saturating_sub(uncached);
            let lost = if asked.chain.is_empty() { guess } else { more };
            candidate.session_penalty = (lost as f64 * bonus) as u64;
        }
    }

    fn beyond(&self) -> MutexGuard<'_, PromptTails> {
        self.beyond.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a request of a session weighs for it.
    fn session_tokens(&self, asked: &PromptLookup) -> u64 {
        match self.prompt(asked).tokens {
            0 => UNREAD_PROMPT_TOKENS,
            tokens => tokens,
        }
    }

    /// The request goes to this upstream.
    pub fn learn(&self, asked: &PromptLookup, id: usize, now: Instant) -> LearnedChain {
        let before = asked.session.and_then(|session| {
            let (now, tokens) = (self.millis(now), self.session_tokens(asked));
            let before = self.sessions.find(session.key, now);
            self.sessions.bind(session.key, id, tokens, now);
            self.publish_binding(session.key, SessionBinding { upstream: id, tokens });
            before
        });
        let slot = if asked.has_chain() { self.slot(id) } else { None };
        let receipt = slot.map(|slot| self.index.learn(&asked.chain, asked.end, slot));
        if let Some(receipt) = &receipt {
            self.publish_chain(&asked.chain, receipt, id);
        }
        LearnedChain { receipt, rest: None, before }
    }

    /// All of a prompt of which only `seen` blocks were known when it was sent: what was behind them.
    pub fn learn_rest(
        &self,
        asked: &PromptLookup,
        seen: usize,
        id: usize,
        learnt: Option<&mut LearnedChain>,
    ) {
        let Some(slot) = self.slot(id) else { return };
        let receipt = self.index.learn(&asked.chain, asked.end, slot);
        self.publish_chain(&asked.chain, &receipt, id);
        if let Some(learnt) = learnt {
            learnt.rest = Some(receipt);
        }
        let behind = asked.chain.len().saturating_sub(seen) as f64 * self.prompt(asked).block_tokens;
        if let Some(last) = seen.checked_sub(1).and_then(|last| asked.chain.get(last)) {
            self.beyond().learn(*last, slot, behind as u64);
        }
    }

    /// The request never reached the engine.
    pub fn take_back(&self, asked: &PromptLookup, id: usize, learnt: LearnedChain) {
        if let Some(session) = asked.session {
            self.sessions.unbind(session.key, id, learnt.before);
        }
        let slot = self.places.load().slot(id);
        let Some(slot) = slot else { return };
        for receipt in [learnt.rest, learnt.receipt].into_iter().flatten() {
            self.index.take_back(&asked.chain, slot, receipt);
        }
    }

    /// The session of this name has ended: nothing draws its next request to the upstream that it used last,
    /// here and at siblings. `models`: those that it may have used, as upstreams know them.
    pub fn forget_session<'m>(&self, name: &str, models: impl IntoIterator<Item = &'m str>) {
        for model in models {
            let key = session::key_of(name.as_bytes(), model);
            // Siblings know the sessions that are known here, and no others.
            if self.sessions.forget(key) {
                self.publish_session_end(key);
            }
        }
    }

    /// The slot of an upstream, which may be sent a request before it is told of here.
    fn slot(&self, id: usize) -> Option<Slot> {
        let known = self.places.load().slot(id);
        known.or_else(|| self.enter(&mut self.upstreams(), id))
    }

    fn enter(&self, upstreams: &mut Vec<IndexedUpstream>, id: usize) -> Option<Slot> {
        if let Some(known) = upstreams.iter().find(|upstream| upstream.id == id) {
            return Some(known.slot);
        }
        let slot = self.index.enter()?;
        upstreams.push(IndexedUpstream {
            id,
            name: None,
            slot,
            incarnation: None,
            limit: None,
            agreement: Agreement::default(),
        });
        self.publish(upstreams);
        Some(slot)
    }

    fn publish(&self, upstreams: &[IndexedUpstream]) {
        let places = upstreams.iter().map(|upstream| (upstream.id, upstream.slot, upstream.name.clone()));
        self.places.store(Arc::new(UpstreamPlaces::new(places)));
    }

    /// The upstreams that there are: others are forgotten, and so is what a restart has emptied.
    pub fn follow(&self, present: &[TrackedUpstream<'_>]) {
        let mut upstreams = self.upstreams();
        let is_there = |id: usize| present.iter().any(|present| present.id == id);
        let gone: Vec<Slot> = upstreams.iter().filter(|one| !is_there(one.id)).map(|one| one.slot).collect();
        upstreams.retain(|upstream| is_there(upstream.id));
        for one in present {
            self.enter(&mut upstreams, one.id);
            if let Some(upstream) = upstreams.iter_mut().find(|upstream| upstream.id == one.id) {
                upstream.name.get_or_insert_with(|| one.name.into());
            }
        }
        self.publish(&upstreams);
        for slot in gone {
            self.beyond().forget(slot);
            self.index.leave(slot);
        }
        for one in present {
            let Some(slot) = self.enter(&mut upstreams, one.id) else { continue };
            let Some(upstream) = upstreams.iter_mut().find(|upstream| upstream.id == one.id) else {
                continue;
            };
            let before = upstream.incarnation.replace(one.incarnation);
            if before.is_some_and(|before| before != one.incarnation) {
                self.index.forget(slot);
                self.beyond().forget(slot);
                upstream.agreement = Agreement::default();
                self.observer.cache_forgotten(one.name);
            }
            let bytes = |tokens: u64| tokens as f64 * self.ratios.of(one.model);
            let limit = one.cache_tokens.map(|tokens| (bytes(tokens) / self.blocks.bytes as f64) as usize);
            if limit != upstream.limit {
                upstream.limit = limit;
                self.index.limit(slot, limit);
            }
        }
    }

    /// An answer says how many tokens the prompt had.
    pub fn counted(&self, asked: &PromptLookup, tokens: u64) {
        if let (Some(model), true) = (&asked.model, asked.family != PromptFamily::Tokens && asked.unseen == 0)
        {
            self.ratios.learn(model, asked.seen, tokens);
        }
    }

    /// Whether a prompt can have as many tokens as its answer says. True where its bytes are unknown.
    pub fn can_have(&self, asked: &PromptLookup, tokens: u64) -> bool {
        asked.family == PromptFamily::Tokens || asked.unseen > 0 || ratios::fits(asked.seen, tokens)
    }

    /// An answer says how many of the prompt's tokens came from the engine's cache. An engine that holds far
    /// less than is believed has forgotten what is oldest.
    pub fn compared(&self, id: usize, name: &str, predicted: u64, reported: u64) {
        let mut upstreams = self.upstreams();
        let Some(upstream) = upstreams.iter_mut().find(|upstream| upstream.id == id) else { return };
        let Some(keep) = upstream.agreement.seen(predicted, reported) else { return };
        let (slot, limit) = (upstream.slot, upstream.limit);
        // Letting go takes its time, and others need the list.
        drop(upstreams);
        let most = (self.index.held(slot) as f64 * keep) as usize;
        self.index.limit(slot, Some(most));
        self.index.limit(slot, limit);
        self.observer.cache_trimmed(name, keep);
    }
}

#[cfg(test)]
mod tests;
