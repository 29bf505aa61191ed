//! What is to be said with the next message: events of requests, kept for a tick.
//!
//! Adding an event takes a short lock and never waits. The pending events are bounded in bytes; when they
//! are not taken out for long, the oldest is dropped and counted: siblings request chains whose beginning
//! they missed.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::{Binding, BindingUpdate, ChainRequest, ChainUpdate, Message};

/// What may be left unsaid, in bytes; a tick's worth is a thousandth of it.
const MAX_PENDING_BYTES: usize = 4 << 20;

/// An event for the siblings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutboxEvent {
    /// An upstream was sent a chain: all up to `parent`, and these behind it.
    Learnt { upstream: Box<str>, parent: Option<u64>, hashes: Box<[u64]>, end: Option<u64> },
    /// A session, or a stored response, is at this upstream; with `keep` it is to be found by its key.
    Bound { kind: Binding, key: Box<str>, upstream: Box<str>, number: u64, keep: bool },
    /// A request to a sibling to send this chain whole.
    Ask { balancer: u64, upstream: Box<str>, hash: u64 },
    /// The list of members has changed.
    Members,
}

pub struct Outbox {
    /// In bytes.
    limit: usize,
    pending: Mutex<PendingEvents>,
    dropped: AtomicU64,
}

#[derive(Default)]
struct PendingEvents {
    events: VecDeque<OutboxEvent>,
    bytes: usize,
}

// === impl Event ===

impl OutboxEvent {
    pub fn learnt(upstream: &str, parent: Option<u64>, hashes: &[u64], end: Option<u64>) -> Self {
        OutboxEvent::Learnt { upstream: upstream.into(), parent, hashes: hashes.into(), end }
    }

    /// Bytes of memory, and more than it takes on the wire.
    fn weight(&self) -> usize {
        let own = match self {
            OutboxEvent::Learnt { upstream, hashes, .. } => upstream.len() + size_of_val(&**hashes),
            OutboxEvent::Bound { key, upstream, .. } => key.len() + upstream.len(),
            OutboxEvent::Ask { upstream, .. } => upstream.len(),
            OutboxEvent::Members => 0,
        };
        size_of::<OutboxEvent>() + own
    }

    /// Puts it into a message.
    pub fn fill<'a>(&'a self, message: &mut Message<'a>) {
        match self {
            OutboxEvent::Learnt { upstream, parent, hashes, end } => {
                let hashes = Cow::Borrowed(&**hashes);
                message.learnt.push(ChainUpdate { upstream, parent: *parent, hashes, end: *end });
            }
            OutboxEvent::Bound { kind, key, upstream, number, .. } => {
                message.bound.push(BindingUpdate { kind: *kind, key, upstream, number: *number });
            }
            OutboxEvent::Ask { balancer, upstream, hash } => {
                message.asks.push(ChainRequest { balancer: *balancer, upstream, hash: *hash });
            }
            OutboxEvent::Members => message.members = true,
        }
    }
}

// === impl Outbox ===

impl Default for Outbox {
    fn default() -> Self {
        Outbox::new(MAX_PENDING_BYTES)
    }
}

impl Outbox {
    /// Keeps at most so many bytes.
    pub fn new(limit: usize) -> Self {
        Outbox { limit, pending: Mutex::default(), dropped: AtomicU64::new(0) }
    }

    /// Keeps an event for the next message.
    pub fn put(&self, event: OutboxEvent) {
        let weight = event.weight();
        if weight > self.limit {
            self.dropped.fetch_add(1, Relaxed);
            return;
        }
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.bytes += weight;
        pending.events.push_back(event);
        while pending.bytes > self.limit && pending.pop().is_some() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Whether less than half of the room is taken.
    pub fn has_room(&self) -> bool {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).bytes < self.limit / 2
    }

    /// Takes the oldest events out, of so many bytes; one at the least, when there is one.
    pub fn take(&self, most: usize) -> Vec<OutboxEvent> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(next) = pending.events.front() {
            bytes += next.weight();
            if bytes > most && !taken.is_empty() {
                break;
            }
            taken.extend(pending.pop());
        }
        taken
    }

    /// The number of dropped events since the last call.
    pub fn dropped(&self) -> u64 {
        self.dropped.swap(0, Relaxed)
    }
}

impl PendingEvents {
    fn pop(&mut self) -> Option<OutboxEvent> {
        let event = self.events.pop_front()?;
        self.bytes -= event.weight();
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chain(upstream: &str, hashes: usize) -> OutboxEvent {
        OutboxEvent::Learnt {
            upstream: upstream.into(),
            parent: None,
            hashes: vec![1; hashes].into(),
            end: None,
        }
    }

    #[test]
    fn the_oldest_goes_when_there_is_no_room() {
        let outbox = Outbox::new(3 * chain("a", 4).weight());
        for name in ["a", "b", "c", "d", "e"] {
            outbox.put(chain(name, 4));
        }
        assert_eq!((outbox.dropped(), outbox.dropped()), (2, 0));
        assert_eq!(outbox.take(usize::MAX), ["c", "d", "e"].map(|name| chain(name, 4)));
        outbox.put(chain("huge", 100));
        assert_eq!((outbox.dropped(), outbox.take(usize::MAX)), (1, vec![]));
    }

    #[test]
    fn what_is_taken_is_bounded_and_never_nothing() {
        let outbox = Outbox::new(10_000);
        [1, 50, 1].into_iter().for_each(|length| outbox.put(chain("a", length)));
        let most = 2 * chain("a", 1).weight();
        let lengths = std::iter::from_fn(|| Some(outbox.take(most).len()).filter(|taken| *taken > 0));
        assert_eq!(lengths.collect::<Vec<_>>(), [1, 1, 1]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_that_there_is_room_for(
            sizes in prop::collection::vec(0usize..30, 0..40),
            limit in 100usize..5000,
            most in 0usize..2000,
        ) {
            let outbox = Outbox::new(limit);
            sizes.iter().for_each(|size| outbox.put(chain("a", *size)));
            let mut taken = Vec::new();
            loop {
                let some = outbox.take(most);
                prop_assert!(some.len() <= 1 || some.iter().map(OutboxEvent::weight).sum::<usize>() <= most);
                if some.is_empty() {
                    break;
                }
                taken.extend(some);
            }
            prop_assert!(taken.iter().map(OutboxEvent::weight).sum::<usize>() <= limit);
            prop_assert_eq!(taken.len() as u64 + outbox.dropped(), sizes.len() as u64);
        }
    }
}
