//! Recognises messages that come twice: a publisher that gets no answer from Redis publishes the same message
//! again, and both may be in the stream. A take-back that is applied twice would release one claim too many.

use std::collections::HashSet;

/// The largest number of messages in one generation. Of the two generations the older one is forgotten when
/// the other is full.
const MAX_MESSAGES_PER_GENERATION: usize = 8_192;

/// The recent messages by their senders and sequences.
#[derive(Debug, Default)]
pub struct RecentMessages {
    now: HashSet<(u64, u64)>,
    before: HashSet<(u64, u64)>,
}

impl RecentMessages {
    /// Adds a message. Returns `false` for a message that is known.
    pub fn insert(&mut self, balancer: u64, sequence: u64) -> bool {
        let message = (balancer, sequence);
        if self.now.contains(&message) || self.before.contains(&message) {
            return false;
        }
        if self.now.len() >= MAX_MESSAGES_PER_GENERATION {
            self.before = std::mem::take(&mut self.now);
        }
        self.now.insert(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_recent_messages_and_forgets_old_ones() {
        let mut messages = RecentMessages::default();
        let generation = MAX_MESSAGES_PER_GENERATION as u64;
        for sequence in 0..3 * generation {
            assert!(messages.insert(1, sequence));
            assert!(!messages.insert(1, sequence), "{sequence}");
            let early = sequence.saturating_sub(generation);
            assert!(!messages.insert(1, early), "{early} at {sequence}");
            assert!(messages.now.len() + messages.before.len() <= 2 * MAX_MESSAGES_PER_GENERATION);
        }
        assert!(messages.insert(1, 0) && messages.insert(2, 3 * generation - 1));
    }
}
