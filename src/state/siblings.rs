//! Publishes the memory's updates to siblings, and applies theirs. Messages identify an upstream by its
//! name, and a session by its key in hexadecimal digits.
//!
//! A request that never arrives is undone here and, approximately, at the siblings: each removes one claim of
//! the blocks that were new here, and releases those without further claims. A sibling that has learned a
//! block from another request, and missed the message of this one, releases the block although the engine
//! has it; one that missed the take-back overestimates the upstream. Either error is about one prompt, costs
//! at most one prefill, and ends when the blocks are learned again or evicted.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::State;
use super::exchange::{self, Binding, OutboxEvent};
use super::prefix_index::{ChainTail, Receipt};
use super::responses::ResponseOrigin;
use super::sessions::SessionBinding;
use crate::pick;

/// The upstream name in the binding of a session that has ended.
const NO_UPSTREAM: &str = "";

impl State {
    // === publishing ===

    /// Publishes the new part of a chain to siblings.
    pub(super) fn publish_chain(&self, chain: &[u64], receipt: &Receipt, id: usize) {
        let Some(outbox) = &self.outbox else { return };
        let ChainTail { parent, depth, hashes, end } = receipt.new_part(chain);
        if parent.is_none() && hashes.is_empty() {
            return;
        }
        if let Some(name) = self.places.load().name(id) {
            let event = OutboxEvent::chain(name, parent, depth, &hashes, end);
            outbox.put(event.with_opening(chain.first().copied().unwrap_or(0)));
        }
    }

    /// Publishes that the new part of a chain never reached the engine.
    pub(super) fn publish_take_back(&self, chain: &[u64], receipt: &Receipt, id: usize) {
        let Some(outbox) = &self.outbox else { return };
        let ChainTail { parent, hashes, end, .. } = receipt.new_part(chain);
        if hashes.is_empty() && end.is_none() {
            return;
        }
        if let Some(name) = self.places.load().name(id) {
            let event = OutboxEvent::take_back(name, parent, &hashes, end);
            outbox.put(event.with_opening(chain.first().copied().unwrap_or(0)));
        }
    }

    /// Publishes a session's binding to the stream only. A balancer that starts reads the tail of the
    /// stream, and no request waits for Redis to find a session; keys without readers would only fill Redis.
    pub(super) fn publish_binding(&self, key: u64, bound: SessionBinding) {
        let Some(outbox) = &self.outbox else { return };
        if let Some(name) = self.places.load().name(bound.upstream) {
            let (key, upstream) = (format!("{key:x}").into(), name.into());
            outbox.put(OutboxEvent::Bound {
                kind: Binding::Session,
                key,
                upstream,
                number: bound.tokens,
                keep: false,
            });
        }
    }

    /// Publishes the end of a session, as a binding without an upstream. Older balancers ignore it as they
    /// ignore an unknown upstream.
    pub(super) fn publish_session_end(&self, key: u64) {
        let Some(outbox) = &self.outbox else { return };
        let key = format!("{key:x}").into();
        outbox.put(OutboxEvent::Bound {
            kind: Binding::Session,
            key,
            upstream: NO_UPSTREAM.into(),
            number: 0,
            keep: false,
        });
    }

    // === receiving ===

    /// Applies a chain that a sibling sent to an upstream; returns `false` when no upstream here holds the
    /// block that it follows. Chains of unknown upstreams are ignored.
    pub fn apply_chain(&self, chain: &exchange::ChainUpdate<'_>) -> bool {
        let places = self.places.load();
        let slot = places.id(chain.upstream).and_then(|id| places.slot(id));
        let Some(slot) = slot.filter(|_| self.enabled) else { return true };
        match chain.parent {
            Some(parent) => self.index.learn_after(parent, &chain.hashes, chain.end, slot).is_some(),
            None => {
                self.index.learn_stored(&chain.hashes, chain.end, slot);
                true
            }
        }
    }

    /// Undoes a chain of a sibling that never reached the engine.
    pub fn apply_take_back(&self, chain: &exchange::TakeBack<'_>) {
        let places = self.places.load();
        if let Some(slot) = places.id(chain.upstream).and_then(|id| places.slot(id)) {
            self.index.release(&chain.hashes, chain.end, slot);
        }
    }

    /// Returns the stored blocks of the chain up to one that the upstream holds.
    pub fn chain_to(&self, name: &str, hash: u64) -> Option<Vec<u64>> {
        let places = self.places.load();
        self.index.chain_to(hash, places.slot(places.id(name)?)?)
    }

    /// Applies a sibling's binding of a session or a response.
    pub fn apply_binding(&self, bound: &exchange::BindingUpdate<'_>, now: Instant) {
        let ended = bound.kind == Binding::Session && bound.upstream == NO_UPSTREAM;
        if let (true, Ok(key)) = (ended, u64::from_str_radix(bound.key, 16)) {
            self.sessions.forget(key);
        }
        let Some(id) = self.places.load().id(bound.upstream) else { return };
        match (bound.kind, u64::from_str_radix(bound.key, 16)) {
            (Binding::Session, Ok(key)) => self.sessions.bind(key, id, bound.number, self.millis(now)),
            (Binding::Session, Err(_)) => {}
            (Binding::Response, _) => {
                self.bind_response(bound.key, ResponseOrigin { upstream: id, name: bound.number }, now);
            }
        }
    }

    /// Sets the age of the oldest sibling's report, in seconds.
    pub fn set_siblings_age(&self, seconds: f64) {
        self.siblings_age.store((seconds * 1e6) as u64, Relaxed);
    }

    /// Returns the largest share by which a cost is raised at random: see `pick::DrawSeed`.
    pub fn jitter(&self) -> f64 {
        let age = self.siblings_age.load(Relaxed) as f64 / 1e6;
        pick::jitter(age)
    }
}

#[cfg(test)]
mod tests;
