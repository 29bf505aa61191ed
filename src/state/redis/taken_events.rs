//! Events that were taken for a message: put back unless Redis has accepted it, also when the task that
//! publishes it ends, as after the loss of the other connection.

use crate::state::exchange::{Message, Outbox, OutboxEvent};

/// The events of one message.
pub(super) struct TakenEvents<'a> {
    from: &'a Outbox,
    events: Vec<OutboxEvent>,
}

// === impl TakenEvents ===

impl<'a> TakenEvents<'a> {
    /// Takes the oldest events, of at most `max_bytes` together, but at least one event if there is any.
    pub(super) fn take(from: &'a Outbox, max_bytes: usize) -> Self {
        TakenEvents { from, events: from.take(max_bytes) }
    }

    /// Returns the events.
    pub(super) fn events(&self) -> &[OutboxEvent] {
        &self.events
    }

    /// Adds the events to a message.
    pub(super) fn fill<'e>(&'e self, message: &mut Message<'e>) {
        self.events.iter().for_each(|event| event.fill(message));
    }

    /// Forgets the events: their message was accepted.
    pub(super) fn published(mut self) {
        self.events.clear();
    }
}

impl Drop for TakenEvents<'_> {
    fn drop(&mut self) {
        if !self.events.is_empty() {
            self.from.put_back(std::mem::take(&mut self.events));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(hash: u64) -> OutboxEvent {
        OutboxEvent::chain("a", None, 0, &[hash], None)
    }

    #[test]
    fn puts_back_what_was_not_published_in_its_order() {
        let outbox = Outbox::default();
        (0..6).for_each(|hash| outbox.put(event(hash)));
        let one = TakenEvents::take(&outbox, 1);
        assert_eq!(one.events(), [event(0)]);
        one.published();
        drop(TakenEvents::take(&outbox, usize::MAX));
        assert_eq!(outbox.take(usize::MAX), [1, 2, 3, 4, 5].map(event));
        outbox.put(event(7));
        TakenEvents::take(&outbox, 1).published();
        assert_eq!(outbox.take(usize::MAX), []);
    }
}
