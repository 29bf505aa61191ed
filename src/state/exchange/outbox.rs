//! The events of requests that wait for the next message to siblings.
//!
//! Adding an event takes a short lock and never waits. The pending events are bounded in bytes; beyond that
//! the oldest is dropped and counted. Siblings request the chains whose beginning they missed.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::{Binding, BindingUpdate, ChainRequest, ChainUpdate, Message, TakeBack};

/// The largest size of the pending events, in bytes; one interval's events take about a thousandth of it.
const MAX_PENDING_BYTES: usize = 4 << 20;

/// An event for the siblings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutboxEvent {
    /// An upstream was sent a chain: the blocks up to `parent`, and these behind it.
    Chain {
        upstream: Box<str>,
        parent: Option<u64>,
        depth: u64,
        hashes: Box<[u64]>,
        end: Option<u64>,
        /// The first block of the whole chain.
        opening: u64,
    },
    /// A request with a published chain never reached the engine: undoes its new part.
    TakeBack {
        upstream: Box<str>,
        parent: Option<u64>,
        hashes: Box<[u64]>,
        end: Option<u64>,
        /// The first block of the whole chain.
        opening: u64,
    },
    /// The upstream of a session or of a stored response; with `keep` it is also stored by its key.
    Bound { kind: Binding, key: Box<str>, upstream: Box<str>, number: u64, keep: bool },
    /// A request to a sibling for this whole chain.
    Ask { balancer: u64, upstream: Box<str>, hash: u64 },
    /// The list of members has changed.
    Members,
}

/// The bounded queue of events for siblings.
pub struct Outbox {
    max_bytes: usize,
    pending: Mutex<PendingEvents>,
    dropped: AtomicU64,
    /// Requests were sent to upstreams since the publisher last looked, and the waker of the publisher.
    has_sent: AtomicBool,
    publisher: Mutex<Option<Waker>>,
}

#[derive(Default)]
struct PendingEvents {
    events: VecDeque<OutboxEvent>,
    bytes: usize,
}

// === impl OutboxEvent ===

impl OutboxEvent {
    /// Builds the event of a chain; `depth` is the number of the blocks of the prompt up to `parent`.
    pub fn chain(upstream: &str, parent: Option<u64>, depth: u64, hashes: &[u64], end: Option<u64>) -> Self {
        let opening = parent.or(hashes.first().copied()).unwrap_or(0);
        OutboxEvent::Chain { upstream: upstream.into(), parent, depth, hashes: hashes.into(), end, opening }
    }

    /// Builds the event of a chain that never reached the engine.
    pub fn take_back(upstream: &str, parent: Option<u64>, hashes: &[u64], end: Option<u64>) -> Self {
        let opening = parent.or(hashes.first().copied()).unwrap_or(0);
        OutboxEvent::TakeBack { upstream: upstream.into(), parent, hashes: hashes.into(), end, opening }
    }

    /// Sets the first block of the event's whole chain, for an event that begins behind it.
    pub fn with_opening(mut self, first: u64) -> Self {
        if let OutboxEvent::Chain { opening, .. } | OutboxEvent::TakeBack { opening, .. } = &mut self {
            *opening = first;
        }
        self
    }

    /// Returns the first block of the event's chain, which selects its stream; `None`: not about a chain.
    pub fn opening(&self) -> Option<u64> {
        match self {
            OutboxEvent::Chain { opening, .. } | OutboxEvent::TakeBack { opening, .. } => Some(*opening),
            _ => None,
        }
    }

    /// Returns the bytes of memory; the encoded event is smaller.
    fn weight(&self) -> usize {
        let own = match self {
            OutboxEvent::Chain { upstream, hashes, .. } | OutboxEvent::TakeBack { upstream, hashes, .. } => {
                upstream.len() + size_of_val(&**hashes)
            }
            OutboxEvent::Bound { key, upstream, .. } => key.len() + upstream.len(),
            OutboxEvent::Ask { upstream, .. } => upstream.len(),
            OutboxEvent::Members => 0,
        };
        size_of::<OutboxEvent>() + own
    }

    /// Adds the event to a message.
    pub fn fill<'a>(&'a self, message: &mut Message<'a>) {
        match self {
            OutboxEvent::Chain { upstream, parent, depth, hashes, end, .. } => {
                let hashes = Cow::Borrowed(&**hashes);
                let (parent, depth, end) = (*parent, *depth, *end);
                message.chains.push(ChainUpdate { upstream, parent, depth, hashes, end });
            }
            OutboxEvent::TakeBack { upstream, parent, hashes, end, .. } => {
                let hashes = Cow::Borrowed(&**hashes);
                message.take_backs.push(TakeBack { upstream, parent: *parent, hashes, end: *end });
            }
            OutboxEvent::Bound { kind, key, upstream, number, .. } => {
                message.bound.push(BindingUpdate { kind: *kind, key, upstream, number: *number });
            }
            OutboxEvent::Ask { balancer, upstream, hash } => {
                message.chain_requests.push(ChainRequest { balancer: *balancer, upstream, hash: *hash });
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
    /// Builds an outbox of at most `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Outbox {
            max_bytes,
            pending: Mutex::default(),
            dropped: AtomicU64::new(0),
            has_sent: AtomicBool::new(false),
            publisher: Mutex::default(),
        }
    }

    /// Adds an event for the next message.
    pub fn put(&self, event: OutboxEvent) {
        let weight = event.weight();
        if weight > self.max_bytes {
            self.dropped.fetch_add(1, Relaxed);
            return;
        }
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.bytes += weight;
        pending.events.push_back(event);
        while pending.bytes > self.max_bytes && pending.pop().is_some() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Records that a request was sent, which raised the load of its upstream.
    pub fn request_sent(&self) {
        // Most requests find that the publisher has been woken already, and take no lock.
        if !self.has_sent.swap(true, AcqRel)
            && let Some(publisher) = self.publisher().take()
        {
            publisher.wake();
        }
    }

    /// Waits for a request that was sent since the last call. One task may wait.
    pub async fn wait_for_request(&self) {
        poll_fn(|context| self.poll_request(context)).await;
    }

    fn poll_request(&self, context: &Context<'_>) -> Poll<()> {
        // Before the look: a request that is sent in between finds the waker.
        *self.publisher() = Some(context.waker().clone());
        if self.has_sent.swap(false, AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }

    fn publisher(&self) -> MutexGuard<'_, Option<Waker>> {
        self.publisher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether less than half of the bytes are in use.
    pub fn has_room(&self) -> bool {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).bytes < self.max_bytes / 2
    }

    /// Removes and returns the oldest events, of at most `max_bytes` together, but at least one event.
    pub fn take(&self, max_bytes: usize) -> Vec<OutboxEvent> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(next) = pending.events.front() {
            bytes += next.weight();
            if bytes > max_bytes && !taken.is_empty() {
                break;
            }
            taken.extend(pending.pop());
        }
        taken
    }

    /// Puts taken events back to the front, since their message was not accepted; drops the oldest of them
    /// where newer events have taken their room.
    pub fn put_back(&self, events: Vec<OutboxEvent>) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = events.len();
        for event in events.into_iter().rev() {
            let weight = event.weight();
            if pending.bytes + weight > self.max_bytes {
                break;
            }
            pending.bytes += weight;
            pending.events.push_front(event);
            left -= 1;
        }
        self.dropped.fetch_add(left as u64, Relaxed);
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
        OutboxEvent::chain(upstream, None, 0, &vec![1; hashes], None)
    }

    #[test]
    fn drops_the_oldest_event_when_full() {
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
    fn takes_a_bounded_size_and_at_least_one_event() {
        let outbox = Outbox::new(10_000);
        [1, 50, 1].into_iter().for_each(|length| outbox.put(chain("a", length)));
        let most = 2 * chain("a", 1).weight();
        let lengths = std::iter::from_fn(|| Some(outbox.take(most).len()).filter(|taken| *taken > 0));
        assert_eq!(lengths.collect::<Vec<_>>(), [1, 1, 1]);
    }

    #[test]
    fn puts_events_back_in_their_order_as_far_as_there_is_room() {
        let outbox = Outbox::new(4 * chain("a", 4).weight());
        ["a", "b", "c"].into_iter().for_each(|name| outbox.put(chain(name, 4)));
        let taken = outbox.take(usize::MAX);
        outbox.put(chain("d", 4));
        outbox.put_back(taken);
        assert_eq!(outbox.dropped(), 0);
        let taken = outbox.take(usize::MAX);
        assert_eq!(taken, ["a", "b", "c", "d"].map(|name| chain(name, 4)));
        ["e", "f"].into_iter().for_each(|name| outbox.put(chain(name, 4)));
        outbox.put_back(taken);
        assert_eq!(outbox.dropped(), 2, "the oldest two");
        assert_eq!(outbox.take(usize::MAX), ["c", "d", "e", "f"].map(|name| chain(name, 4)));
    }

    proptest! {
        #[test]
        fn loses_no_event_that_fits(
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
