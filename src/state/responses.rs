//! The upstreams of stored responses whose ids do not name them, because the client chose the id.
//!
//! An origin is kept for as long as a session and published to siblings. It is also stored in Redis by its
//! key, for a balancer that starts later.
//!
//! The record includes the number of the name that the client gave the model, so that a later request for
//! the response gets that name, and its upstream the key of that name's route. The number bounds the memory;
//! a client could choose a name of any length.

use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

use super::State;
use super::exchange::{Binding, OutboxEvent};

/// The largest number of responses that are kept: few clients choose ids themselves.
pub(crate) const MAX_RESPONSES: usize = 100_000;

/// The upstream that generated a response, and the model name that its client used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseOrigin {
    /// The fleet's id of the upstream.
    pub upstream: usize,
    /// The number of the name that its client gave the model: see `route::stored`.
    pub name: u64,
}

impl State {
    /// Stores the origin of a response, and publishes it to siblings.
    pub fn keep_response(&self, response: &str, origin: ResponseOrigin, now: Instant) {
        self.bind_response(response, origin, now);
        let Some(outbox) = &self.outbox else { return };
        if let Some(upstream) = self.places.load().name(origin.upstream) {
            let (key, upstream) = (response.into(), upstream.into());
            let kind = Binding::Response;
            outbox.put(OutboxEvent::Bound { kind, key, upstream, number: origin.name, keep: true });
        }
    }

    /// Stores the origin of a response. The field for a session's tokens holds the number of the name.
    pub(super) fn bind_response(&self, response: &str, origin: ResponseOrigin, now: Instant) {
        self.responses.bind(xxh3_64(response.as_bytes()), origin.upstream, origin.name, self.millis(now));
    }

    /// Returns the origin of a response, if it is known here.
    pub fn response(&self, response: &str, now: Instant) -> Option<ResponseOrigin> {
        let bound = self.responses.find(xxh3_64(response.as_bytes()), self.millis(now))?;
        Some(ResponseOrigin { upstream: bound.upstream, name: bound.tokens })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::types::PrefixIndex;
    use crate::observe::Observer;

    #[test]
    fn finds_a_response_for_as_long_as_a_session() {
        let config = PrefixIndex { blocks: Some(0), block_bytes: 100 };
        let state = State::new(config, Duration::from_secs(60), 1, None, Observer::default());
        let wait_caught_up = Instant::now();
        let (mine, other) =
            (ResponseOrigin { upstream: 3, name: 7 }, ResponseOrigin { upstream: 4, name: 0 });
        state.keep_response("mine", mine, wait_caught_up);
        state.keep_response("resp_2", other, wait_caught_up);
        let found = |id, seconds| state.response(id, wait_caught_up + Duration::from_secs(seconds));
        assert_eq!((found("mine", 0), found("resp_2", 50), found("x", 0)), (Some(mine), Some(other), None));
        assert_eq!(found("mine", 61), None);
        state.set_ttl(Duration::from_secs(120));
        assert_eq!(found("mine", 61), Some(mine));
    }
}
