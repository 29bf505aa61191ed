//! The balancer's memory between requests: the prompts and sessions that each upstream was sent, the
//! upstreams of stored responses, the bytes of a token for each model, and how far engines agree with the
//! predictions of their caches.
//!
//! Routing decisions read local memory only. On a request's path the module waits for nothing but the short
//! lock of a writer. It does not depend on the fleet: an upstream is identified by its id.

mod agreement;
pub mod exchange;
mod handover;
mod index_limit;
pub mod members;
mod places;
pub mod prefix_index;
mod prompt_tails;
mod ratios;
pub mod redis;
pub(crate) mod responses;
pub(crate) mod sessions;
mod siblings;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::config::types::PrefixIndex;
use crate::observe::Observer;
use crate::pick::Candidate;
use crate::prompt::chain::thinning::last_stored;
use crate::prompt::chain::{BlockLayout, PromptFamily};
use crate::prompt::session::{self, Session};
use agreement::Agreement;
use exchange::Outbox;
use index_limit::{DEFAULT_INDEX_BLOCKS, MAX_INDEX_BLOCKS, index_limit};
use places::UpstreamPlaces;
use prefix_index::{Hits, Index, PromptSize, Receipt, Size, Slot};
use prompt_tails::PromptTails;
use ratios::{DEFAULT_BYTES_PER_TOKEN, Ratios};
use sessions::{SessionBinding, Sessions};

/// The longest text that is hashed to a chain, in bytes: as long as the largest bodies.
const MAX_CHAIN_BYTES: usize = 64 << 20;

/// The assumed tokens of a prompt that cannot be parsed, such as a form with a recording. The session penalty
/// uses it: another upstream would have to repeat work of unknown size.
const UNREAD_PROMPT_TOKENS: u64 = 1_000;

/// The prompt and the session of a request, as far as the memory needs them.
#[derive(Debug, Default)]
pub struct PromptLookup {
    /// The model that is to answer.
    pub model: Option<String>,
    /// The hashes of the prompt's blocks; empty when the prompt cannot be parsed or the index is off.
    pub chain: Vec<u64>,
    /// See `prefix_index::Index::learn`.
    pub end: Option<u64>,
    /// The form of the prompt.
    pub family: PromptFamily,
    /// The bytes of the prompt that were read.
    pub seen: u64,
    /// The estimated bytes of the prompt behind them.
    pub unseen: u64,
    /// The session of the request.
    pub session: Option<Session>,
}

/// What the memory learned from a sent request, to be undone when the request never reaches the engine.
#[derive(Debug)]
pub struct LearnedChain {
    receipt: Option<Receipt>,
    /// The receipt for the whole prompt, if it was longer than the part that was read before the choice.
    rest: Option<Receipt>,
    /// The previous binding of the session.
    before: Option<SessionBinding>,
}

/// An upstream of the fleet, as passed to `follow_fleet`.
#[derive(Clone, Copy, Debug)]
pub struct TrackedUpstream<'a> {
    pub id: usize,
    pub name: &'a str,
    /// Increases when the engine's cache is assumed to be empty.
    pub incarnation: u64,
    /// The capacity of the engine's cache in tokens, if known.
    pub cache_tokens: Option<u64>,
    /// The model whose bytes per token convert the capacity to blocks.
    pub model: Option<&'a str>,
}

/// The memory of one balancer.
pub struct State {
    index: Index,
    blocks: BlockLayout,
    /// The index has room for blocks.
    enabled: bool,
    /// The limit of the index follows the engines' caches.
    derives_limit: bool,
    /// Written under the lock of `upstreams` only.
    places: ArcSwap<UpstreamPlaces>,
    upstreams: Mutex<IndexedUpstreams>,
    ratios: Ratios,
    tails: Mutex<PromptTails>,
    sessions: Sessions,
    /// The upstreams of stored responses whose ids do not name them.
    responses: Sessions,
    born: Instant,
    /// The events for siblings; `None`: there are no siblings.
    outbox: Option<Arc<Outbox>>,
    /// The age of the oldest sibling's report, in microseconds.
    siblings_age: AtomicU64,
    observer: Observer,
}

/// The upstreams in the index.
#[derive(Default)]
struct IndexedUpstreams {
    by_id: HashMap<usize, IndexedUpstream>,
    /// The groups of the index by model; see `prefix_index::Index::set_group`.
    groups: HashMap<Box<str>, usize>,
}

/// The state of one upstream in the index.
struct IndexedUpstream {
    /// The name that siblings use; `None` until `follow_fleet` passes it.
    name: Option<Arc<str>>,
    slot: Slot,
    incarnation: Option<u64>,
    limit: Option<usize>,
    group: usize,
    agreement: Agreement,
}

// === impl PromptLookup ===

impl PromptLookup {
    /// Whether the prompt has blocks or an opening to look up.
    pub fn has_chain(&self) -> bool {
        !self.chain.is_empty() || self.end.is_some()
    }

    /// The hash of the whole prompt, as far as it was read.
    pub fn last_hash(&self) -> Option<u64> {
        self.end.or(self.chain.last().copied())
    }
}

// === impl IndexedUpstreams ===

impl IndexedUpstreams {
    /// Returns the slot of an upstream, and whether it is new; `None` when the index has no slot left.
    fn enter(&mut self, index: &Index, id: usize) -> Option<(Slot, bool)> {
        if let Some(known) = self.by_id.get(&id) {
            return Some((known.slot, false));
        }
        let slot = index.enter()?;
        let (incarnation, agreement) = (None, Agreement::default());
        let upstream = IndexedUpstream { name: None, slot, incarnation, limit: None, group: 0, agreement };
        self.by_id.insert(id, upstream);
        Some((slot, true))
    }

    /// Returns the group of a model's upstreams; beyond `MAX_GROUP` models share one, as unknown models do.
    fn group(&mut self, model: Option<&str>) -> usize {
        let Some(model) = model else { return 0 };
        let next = self.groups.len() + 1;
        match self.groups.get(model) {
            Some(group) => *group,
            None if next > prefix_index::MAX_GROUP => 0,
            None => *self.groups.entry(model.into()).or_insert(next),
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

// === impl State ===

impl State {
    /// Builds the memory of a balancer without siblings. Sessions are kept for `ttl`; `seed` is random, see
    /// `prefix_index::Index::new`. One of several balancers publishes what it learns through `outbox`.
    pub fn new(
        config: PrefixIndex,
        ttl: Duration,
        seed: u64,
        outbox: Option<Arc<Outbox>>,
        observer: Observer,
    ) -> Arc<Self> {
        let index = Index::new(config.blocks.unwrap_or(MAX_INDEX_BLOCKS), seed);
        if config.blocks.is_none() {
            index.set_limit(DEFAULT_INDEX_BLOCKS);
        }
        Arc::new(State {
            sessions: Sessions::new(Sessions::MAX_SESSIONS, millis(ttl)),
            responses: Sessions::new(responses::MAX_RESPONSES, millis(ttl)),
            born: Instant::now(),
            index,
            blocks: BlockLayout {
                bytes: config.block_bytes,
                max_blocks: MAX_CHAIN_BYTES / config.block_bytes.max(1),
            },
            enabled: config.blocks != Some(0),
            derives_limit: config.blocks.is_none(),
            places: ArcSwap::default(),
            upstreams: Mutex::default(),
            ratios: Ratios::default(),
            tails: Mutex::default(),
            outbox,
            siblings_age: AtomicU64::new(0),
            observer,
        })
    }

    /// Sets the time to live of sessions and stored responses.
    pub fn set_ttl(&self, ttl: Duration) {
        self.sessions.set_ttl(millis(ttl));
        self.responses.set_ttl(millis(ttl));
    }

    fn millis(&self, now: Instant) -> u64 {
        millis(now.saturating_duration_since(self.born))
    }

    /// Returns how prompts are cut into blocks; `None` when the index is off.
    pub fn blocks(&self) -> Option<BlockLayout> {
        self.enabled.then_some(self.blocks)
    }

    /// Returns the size of the index.
    pub fn size(&self) -> Size {
        self.index.size()
    }

    fn upstreams(&self) -> MutexGuard<'_, IndexedUpstreams> {
        self.upstreams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the bytes per token of this prompt.
    fn ratio(&self, lookup: &PromptLookup) -> f64 {
        match lookup.family {
            PromptFamily::Tokens => DEFAULT_BYTES_PER_TOKEN,
            PromptFamily::Chat | PromptFamily::Text => self.ratios.of(lookup.model.as_deref()),
        }
    }

    /// Returns the estimated tokens of the prompt and of a block, for the cost formula.
    pub fn prompt(&self, lookup: &PromptLookup) -> PromptSize {
        let ratio = self.ratio(lookup);
        let tokens = ((lookup.seen + lookup.unseen) as f64 / ratio).round() as u64;
        PromptSize { tokens, block_tokens: self.blocks.bytes as f64 / ratio }
    }

    /// Sets on each candidate how much of the prompt the upstream holds. `id` returns the upstream of a
    /// candidate.
    pub fn weigh(
        &self,
        lookup: &PromptLookup,
        share: f64,
        hits: &mut Hits,
        candidates: &mut [Candidate],
        id: impl Fn(&Candidate) -> usize,
    ) {
        if lookup.chain.is_empty() {
            return;
        }
        let prompt = self.prompt(lookup);
        self.index.lookup(&lookup.chain, hits);
        hits.charge(share, candidates.len());
        let terms = hits.terms(prompt);
        let (places, is_held) = (self.places.load(), hits.known() > 0);
        for candidate in candidates {
            let slot = if is_held { places.slot(id(candidate)) } else { None };
            hits.weigh(slot, &terms, candidate);
            let holds_all = slot
                .filter(|_| lookup.unseen > 0 && candidate.hit as usize >= last_stored(lookup.chain.len()));
            if let (Some(slot), Some(last)) = (holds_all, lookup.chain.last()) {
                // The upstream holds the whole part that was read, so also the tail that it was sent behind
                // it.
                let behind = self.tails().find(*last, slot).min(candidate.uncached);
                candidate.uncached -= behind;
                candidate.missing = candidate.missing.saturating_sub(behind);
            }
        }
    }

    /// Sets on each candidate the penalty for moving the session there, after `weigh`: `bonus` times the
    /// tokens that the session's last upstream holds and the candidate does not. No candidate has a penalty
    /// when the last upstream is not among them. Returns the index of the last upstream's candidate.
    pub fn add_session_penalty(
        &self,
        lookup: &PromptLookup,
        bonus: f64,
        now: Instant,
        candidates: &mut [Candidate],
        id: impl Fn(&Candidate) -> usize,
    ) -> Option<usize> {
        let bound = self.sessions.find(lookup.session?.key, self.millis(now))?;
        let last = *candidates.iter().find(|candidate| id(candidate) == bound.upstream)?;
        let tokens = self.session_tokens(lookup);
        // Without a chain the cached part is unknown; the session's last request is the estimate.
        let (guess, uncached) = (bound.tokens.min(tokens), last.uncached);
        for candidate in candidates.iter_mut().filter(|candidate| id(candidate) != bound.upstream) {
            // No penalty for an upstream that holds as much, for example a system prompt that all hold.
            let more = candidate.uncached.saturating_sub(uncached);
            let lost = if lookup.chain.is_empty() { guess } else { more };
            candidate.session_penalty = (lost as f64 * bonus) as u64;
        }
        Some(last.index)
    }

    fn tails(&self) -> MutexGuard<'_, PromptTails> {
        self.tails.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the tokens of a request for its session.
    fn session_tokens(&self, lookup: &PromptLookup) -> u64 {
        match self.prompt(lookup).tokens {
            0 => UNREAD_PROMPT_TOKENS,
            tokens => tokens,
        }
    }

    /// Learns that the request is sent to this upstream. The caller has raised the load of the upstream.
    pub fn learn(&self, lookup: &PromptLookup, id: usize, now: Instant) -> LearnedChain {
        let before = lookup.session.and_then(|session| {
            let (now, tokens) = (self.millis(now), self.session_tokens(lookup));
            let before = self.sessions.find(session.key, now);
            self.sessions.bind(session.key, id, tokens, now);
            self.publish_binding(session.key, SessionBinding { upstream: id, tokens });
            before
        });
        let slot = if lookup.has_chain() { self.slot(id) } else { None };
        let receipt = slot.map(|slot| self.index.learn(&lookup.chain, lookup.end, slot));
        if let Some(receipt) = &receipt {
            self.publish_chain(&lookup.chain, receipt, id);
        }
        if let Some(outbox) = &self.outbox {
            outbox.request_sent();
        }
        LearnedChain { receipt, rest: None, before }
    }

    /// Learns the whole prompt of a request of which only `seen` blocks were read before the choice.
    pub fn learn_rest(
        &self,
        lookup: &PromptLookup,
        seen: usize,
        id: usize,
        learned: Option<&mut LearnedChain>,
    ) {
        let Some(slot) = self.slot(id) else { return };
        let receipt = self.index.learn(&lookup.chain, lookup.end, slot);
        self.publish_chain(&lookup.chain, &receipt, id);
        if let Some(learned) = learned {
            learned.rest = Some(receipt);
        }
        let behind = lookup.chain.len().saturating_sub(seen) as f64 * self.prompt(lookup).block_tokens;
        if let Some(last) = seen.checked_sub(1).and_then(|last| lookup.chain.get(last)) {
            self.tails().learn(*last, slot, behind as u64);
        }
    }

    /// Undoes `learn` for a request that never reached the engine.
    pub fn take_back(&self, lookup: &PromptLookup, id: usize, learned: LearnedChain) {
        if let Some(session) = lookup.session {
            self.sessions.unbind(session.key, id, learned.before);
        }
        let slot = self.places.load().slot(id);
        let Some(slot) = slot else { return };
        for receipt in [learned.rest, learned.receipt].into_iter().flatten() {
            self.publish_take_back(&lookup.chain, &receipt, id);
            self.index.take_back(&lookup.chain, slot, receipt);
        }
    }

    /// Forgets the bindings of a session that has ended, here and at siblings. `models` are the models that
    /// the session may have used, by the names that upstreams use.
    pub fn forget_session<'m>(&self, name: &str, models: impl IntoIterator<Item = &'m str>) {
        for model in models {
            let key = session::key_of(name.as_bytes(), model);
            // Siblings have the same sessions: bindings are published.
            if self.sessions.forget(key) {
                self.publish_session_end(key);
            }
        }
    }

    /// Returns the slot of an upstream; creates it for an upstream that gets a request before `follow_fleet`.
    fn slot(&self, id: usize) -> Option<Slot> {
        let known = self.places.load().slot(id);
        known.or_else(|| self.enter(&mut self.upstreams(), id))
    }

    fn enter(&self, upstreams: &mut IndexedUpstreams, id: usize) -> Option<Slot> {
        let (slot, is_new) = upstreams.enter(&self.index, id)?;
        if is_new {
            self.publish(upstreams);
        }
        Some(slot)
    }

    fn publish(&self, upstreams: &IndexedUpstreams) {
        let places = upstreams.by_id.iter().map(|(id, upstream)| (*id, upstream.slot, upstream.name.clone()));
        self.places.store(Arc::new(UpstreamPlaces::new(places)));
    }

    /// Applies the present upstreams of the fleet: forgets upstreams that have left and caches that a
    /// restart has emptied, and sets the limits of the caches and of the index.
    pub fn follow_fleet(&self, present: &[TrackedUpstream<'_>]) {
        let mut upstreams = self.upstreams();
        let ids: HashSet<usize> = present.iter().map(|one| one.id).collect();
        let gone: HashSet<Slot> =
            upstreams.by_id.extract_if(|id, _| !ids.contains(id)).map(|(_, one)| one.slot).collect();
        let mut is_changed = !gone.is_empty();
        for one in present {
            is_changed |= upstreams.enter(&self.index, one.id).is_some_and(|(_, is_new)| is_new);
            if let Some(upstream) = upstreams.by_id.get_mut(&one.id).filter(|known| known.name.is_none()) {
                upstream.name = Some(one.name.into());
                is_changed = true;
            }
        }
        if is_changed {
            self.publish(&upstreams);
        }
        gone.iter().for_each(|slot| self.index.leave(*slot));
        let mut emptied = gone;
        for one in present {
            let group = upstreams.group(one.model);
            let Some(upstream) = upstreams.by_id.get_mut(&one.id) else { continue };
            let before = upstream.incarnation.replace(one.incarnation);
            if before.is_some_and(|before| before != one.incarnation) {
                self.index.forget(upstream.slot);
                emptied.insert(upstream.slot);
                upstream.agreement = Agreement::default();
                self.observer.cache_forgotten(one.name);
            }
            if group != upstream.group {
                upstream.group = group;
                self.index.set_group(upstream.slot, group);
            }
            let bytes = |tokens: u64| tokens as f64 * self.ratios.of(one.model);
            let limit = one.cache_tokens.map(|tokens| (bytes(tokens) / self.blocks.bytes as f64) as usize);
            if limit != upstream.limit {
                upstream.limit = limit;
                self.index.limit(upstream.slot, limit);
            }
        }
        self.tails().forget(&emptied);
        if self.derives_limit {
            let limit = index_limit(upstreams.by_id.values().map(|upstream| upstream.limit));
            // Evicting takes a while, and requests need the list meanwhile.
            drop(upstreams);
            self.index.set_limit(limit);
        }
    }

    /// Learns the bytes per token from an answer that reports the tokens of its prompt.
    pub fn learn_token_count(&self, lookup: &PromptLookup, tokens: u64) {
        if let (Some(model), true) =
            (&lookup.model, lookup.family != PromptFamily::Tokens && lookup.unseen == 0)
        {
            self.ratios.learn(model, lookup.seen, tokens);
        }
    }

    /// Whether the reported tokens are plausible for the bytes of the prompt. True when the bytes are
    /// unknown.
    pub fn is_plausible_count(&self, lookup: &PromptLookup, tokens: u64) -> bool {
        lookup.family == PromptFamily::Tokens || lookup.unseen > 0 || ratios::fits(lookup.seen, tokens)
    }

    /// Compares the cached tokens that an answer reports with the prediction. When an engine holds far less
    /// than predicted, evicts the oldest blocks of its upstream.
    pub fn compare_cached_tokens(&self, id: usize, name: &str, predicted: u64, reported: u64) {
        let mut upstreams = self.upstreams();
        let Some(upstream) = upstreams.by_id.get_mut(&id) else { return };
        let Some(keep) = upstream.agreement.add(predicted, reported) else { return };
        let (slot, limit) = (upstream.slot, upstream.limit);
        // Evicting takes a while, and requests need the list meanwhile.
        drop(upstreams);
        let kept = (self.index.held(slot) as f64 * keep) as usize;
        self.index.limit(slot, Some(kept));
        self.index.limit(slot, limit);
        self.observer.cache_trimmed(name, keep);
    }
}

#[cfg(test)]
mod tests;
