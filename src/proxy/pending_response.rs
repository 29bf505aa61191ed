//! A response that is being made and that its upstream keeps: its id, and the place of that id.

use std::time::Instant;

use super::body::BodyInsertion;
use super::random::RandomSource;
use crate::fleet::Upstream;
use crate::route::stored::{ResponseIdStamp, location, number};
use crate::state::State;
use crate::state::responses::ResponseOrigin;

/// The facts of a requested response that the upstream stores.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeptResponse {
    /// The body has the field of the id, if only as null: of equal keys the last one counts.
    pub named: bool,
    pub background: bool,
}

/// A response that is being made.
pub(super) struct PendingResponse {
    stamp: Option<ResponseIdStamp>,
    /// The number of its model's name.
    name: u64,
    /// The answer's id is known.
    learnt: bool,
}

// === impl PendingResponse ===

impl PendingResponse {
    /// `model` as the client called it.
    pub(super) fn new(
        random: &RandomSource,
        kept: KeptResponse,
        body: &[u8],
        model: Option<&str>,
    ) -> Box<Self> {
        let secret = if kept.named { None } else { random.secret() };
        let name = number(model);
        let stamp = secret.and_then(|secret| ResponseIdStamp::new(body, name, secret));
        Box::new(PendingResponse { stamp, name, learnt: false })
    }

    /// The bytes by which the body becomes longer on its way to an upstream.
    pub(super) fn added_length(&self) -> u64 {
        self.stamp.as_ref().map_or(0, |_| ResponseIdStamp::length() as u64)
    }

    /// What is put into the body on its way to this upstream.
    pub(super) fn insertion(&self, upstream: &str) -> Option<BodyInsertion> {
        let (at, text) = self.stamp.as_ref()?.insertion(upstream);
        Some(BodyInsertion { at, text: text.into() })
    }

    /// An answer begins: an id that was learnt came from an earlier attempt, at another upstream.
    pub(super) fn begin(&mut self) {
        self.learnt = false;
    }

    /// Stores the upstream of the answer's id, unless the id itself carries it.
    pub(super) fn record_id(&mut self, state: &State, upstream: &Upstream, id: &str) {
        if std::mem::replace(&mut self.learnt, true) {
            return;
        }
        let own = self.stamp.as_ref().map(|stamp| stamp.id(upstream.name()));
        if location::is_learnt(own.as_deref(), id) {
            let made = ResponseOrigin { upstream: upstream.id, name: self.name };
            state.keep_response(id, made, Instant::now());
        }
    }
}
