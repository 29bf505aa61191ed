//! `peek.memory`: how much of all requests' bodies may be held at once.
//!
//! Taking is a try, never a wait: a request that would have to wait for memory holds some already, and
//! such waits can wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::observe::metrics::METRICS;

pub struct Memory {
    taken: AtomicU64,
    most: AtomicU64,
}

impl Memory {
    pub fn new(most: u64) -> Arc<Self> {
        Arc::new(Memory { taken: AtomicU64::new(0), most: AtomicU64::new(most) })
    }

    /// Sets another limit. What is taken stays taken, also when it is more.
    pub fn limit(&self, most: u64) {
        self.most.store(most, Relaxed);
    }

    /// A reservation of nothing yet.
    pub fn reservation(self: &Arc<Self>) -> Reservation {
        Reservation { memory: self.clone(), bytes: 0 }
    }

    #[cfg(test)]
    fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }
}

/// Gives back what it holds when it is dropped.
pub struct Reservation {
    memory: Arc<Memory>,
    bytes: u64,
}

impl Reservation {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Another one of the same memory, of nothing yet.
    pub fn beside(&self) -> Reservation {
        self.memory.reservation()
    }

    /// Makes the reservation at least `bytes` large; false when there is not so much.
    pub fn grow_to(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let most = self.memory.most.load(Relaxed);
        let take = |taken: u64| taken.checked_add(more).filter(|sum| *sum <= most);
        if more > 0 && self.memory.taken.fetch_update(Relaxed, Relaxed, take).is_err() {
            return false;
        }
        METRICS.peeked_bytes.add(more.cast_signed());
        self.bytes += more;
        true
    }

    /// Gives back what it holds.
    pub fn release(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes > 0 {
            self.memory.taken.fetch_sub(bytes, Relaxed);
            METRICS.peeked_bytes.sub(bytes.cast_signed());
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_limit_is_taken_and_all_comes_back() {
        let memory = Memory::new(100);
        let (mut one, mut two) = (memory.reservation(), memory.reservation());
        assert!(one.grow_to(60) && one.grow_to(40), "growing never shrinks");
        assert!(!two.grow_to(41) && two.grow_to(40));
        assert_eq!(memory.taken(), 100);
        assert!(!one.grow_to(u64::MAX), "a huge length is refused, not wrapped");
        drop(one);
        assert_eq!(memory.taken(), 40);
        drop(two);
        assert_eq!(memory.taken(), 0);
    }
}
