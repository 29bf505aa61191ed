//! Where stored responses are, as far as their ids do not say it themselves: the client has given its own.
//!
//! What was learnt of an answer is remembered for as long as a session, and said to siblings; over Redis it
//! is also found by its key, by a balancer that was not there when it was said.

use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

use super::State;
use super::exchange::{Binding, Event};

/// The most that are remembered: few clients name their own.
pub const LIMIT: usize = 100_000;

impl State {
    /// This upstream has made this response.
    pub fn keep_response(&self, response: &str, id: usize, now: Instant) {
        self.bind_response(response, id, now);
        let Some(outbox) = &self.outbox else { return };
        if let Some(name) = self.places.load().name(id) {
            let (key, upstream) = (response.into(), name.into());
            outbox.put(Event::Bound { kind: Binding::Response, key, upstream, tokens: 0, keep: true });
        }
    }

    pub(super) fn bind_response(&self, response: &str, id: usize, now: Instant) {
        self.responses.bind(xxh3_64(response.as_bytes()), id, 0, self.millis(now));
    }

    /// The upstream that has made it, as far as is known here.
    pub fn response(&self, response: &str, now: Instant) -> Option<usize> {
        Some(self.responses.find(xxh3_64(response.as_bytes()), self.millis(now))?.upstream)
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
        state.keep_response("mine", 3, begun);
        state.keep_response("resp_2", 4, begun);
        let found = |id, seconds| state.response(id, begun + Duration::from_secs(seconds));
        assert_eq!((found("mine", 0), found("resp_2", 50), found("other", 0)), (Some(3), Some(4), None));
        assert_eq!(found("mine", 61), None);
        state.set_ttl(Duration::from_secs(120));
        assert_eq!(found("mine", 61), Some(3));
    }
}
