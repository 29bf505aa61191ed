//! Where stored responses are, as far as their ids do not say it themselves: the client has given its own.
//!
//! What was learnt of an answer is remembered for as long as a session, and said to siblings; over Redis it
//! is also found by its key, by a balancer that was not there when it was said.
//!
//! The record includes the number of the name that the client gave the model, so that a later request for
//! the response gets that name, and its upstream the key of that name's route. The name itself would take as
//! much memory as a client likes.

use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

use super::State;
use super::exchange::{Binding, OutboxEvent};

/// The most responses that are remembered: few clients choose ids themselves.
pub const MAX_RESPONSES: usize = 100_000;

/// Where a response was generated, and under which name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseOrigin {
    /// The fleet's id of the upstream that did.
    pub upstream: usize,
    /// The number of the name that its client gave the model: see `route::stored`.
    pub name: u64,
}

impl State {
    /// Stores the origin of a response, and publishes it.
    pub fn keep_response(&self, response: &str, made: ResponseOrigin, now: Instant) {
        self.bind_response(response, made, now);
        let Some(outbox) = &self.outbox else { return };
        if let Some(upstream) = self.places.load().name(made.upstream) {
            let (key, upstream) = (response.into(), upstream.into());
            let kind = Binding::Response;
            outbox.put(OutboxEvent::Bound { kind, key, upstream, number: made.name, keep: true });
        }
    }

    /// A response has the number of its name in the field where a session has its tokens.
    pub(super) fn bind_response(&self, response: &str, made: ResponseOrigin, now: Instant) {
        self.responses.bind(xxh3_64(response.as_bytes()), made.upstream, made.name, self.millis(now));
    }

    /// The origin of a response, if it is known here.
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
    fn a_response_is_where_it_was_made_for_as_long_as_a_session() {
        let config = PrefixIndex { blocks: 0, block_bytes: 100 };
        let state = State::new(config, Duration::from_secs(60), 1, None, Observer::default());
        let begun = Instant::now();
        let (mine, other) =
            (ResponseOrigin { upstream: 3, name: 7 }, ResponseOrigin { upstream: 4, name: 0 });
        state.keep_response("mine", mine, begun);
        state.keep_response("resp_2", other, begun);
        let found = |id, seconds| state.response(id, begun + Duration::from_secs(seconds));
        assert_eq!((found("mine", 0), found("resp_2", 50), found("x", 0)), (Some(mine), Some(other), None));
        assert_eq!(found("mine", 61), None);
        state.set_ttl(Duration::from_secs(120));
        assert_eq!(found("mine", 61), Some(mine));
    }
}
