//! Where stored responses are, as far as their ids do not say it themselves: the client has given its own.
//!
//! What was learnt of an answer is remembered for as long as a session, and said to siblings; over Redis it
//! is also found by its key, by a balancer that was not there when it was said.
//!
//! With it goes the number of the name that its client gave the model, so that whoever asks for it again is
//! shown that name, and its upstream the key of that name's route. A name's
//! letters would take as much memory as their owner likes.

use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

use super::State;
use super::exchange::{Binding, Event};

/// The most that are remembered: few clients name their own.
pub const LIMIT: usize = 100_000;

/// How a response was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// The fleet's id of the upstream that did.
    pub upstream: usize,
    /// The number of the name that its client gave the model: see `route::stored`.
    pub name: u64,
}

impl State {
    /// This response was made so.
    pub fn keep_response(&self, response: &str, made: Made, now: Instant) {
        self.bind_response(response, made, now);
        let Some(outbox) = &self.outbox else { return };
        if let Some(upstream) = self.places.load().name(made.upstream) {
            let (key, upstream) = (response.into(), upstream.into());
            let kind = Binding::Response;
            outbox.put(Event::Bound { kind, key, upstream, number: made.name, keep: true });
        }
    }

    /// Where a session has its tokens, a response has its name.
    pub(super) fn bind_response(&self, response: &str, made: Made, now: Instant) {
        self.responses.bind(xxh3_64(response.as_bytes()), made.upstream, made.name, self.millis(now));
    }

    /// How it was made, as far as is known here.
    pub fn response(&self, response: &str, now: Instant) -> Option<Made> {
        let bound = self.responses.find(xxh3_64(response.as_bytes()), self.millis(now))?;
        Some(Made { upstream: bound.upstream, name: bound.tokens })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::types::PrefixIndex;

    #[test]
    fn a_response_is_where_it_was_made_for_as_long_as_a_session() {
        let config = PrefixIndex { blocks: 0, block_bytes: 100 };
        let state = State::new(config, Duration::from_secs(60), 1);
        let begun = Instant::now();
        let (mine, other) = (Made { upstream: 3, name: 7 }, Made { upstream: 4, name: 0 });
        state.keep_response("mine", mine, begun);
        state.keep_response("resp_2", other, begun);
        let found = |id, seconds| state.response(id, begun + Duration::from_secs(seconds));
        assert_eq!((found("mine", 0), found("resp_2", 50), found("x", 0)), (Some(mine), Some(other), None));
        assert_eq!(found("mine", 61), None);
        state.set_ttl(Duration::from_secs(120));
        assert_eq!(found("mine", 61), Some(mine));
    }
}
