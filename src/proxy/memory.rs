//! Limits the memory of all requests' held bodies, and of answers that a route holds (`peek.memory`).
//!
//! A reservation fails rather than waits: a request that waits for memory may hold some already, and such
//! waits could deadlock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pingora::{Error, ErrorType, Result};

use crate::observe::Observer;
use crate::reject::Reject;

/// The error of an answer for which there is no room.
pub(super) const NO_ROOM: ErrorType = ErrorType::Custom("no room in peek.memory");

/// Counts the bytes of bodies that are held, and limits them (`peek.memory`).
pub(super) struct PeekMemory {
    taken: AtomicU64,
    most: AtomicU64,
    observer: Observer,
}

impl PeekMemory {
    pub(super) fn new(most: u64, observer: Observer) -> Arc<Self> {
        Arc::new(PeekMemory { taken: AtomicU64::new(0), most: AtomicU64::new(most), observer })
    }

    /// Changes the limit. Reservations above a lower limit stay.
    pub(super) fn set_limit(&self, most: u64) {
        self.most.store(most, Relaxed);
    }

    /// An empty reservation.
    pub(super) fn reservation(self: &Arc<Self>) -> MemoryReservation {
        MemoryReservation { memory: self.clone(), bytes: 0 }
    }

    #[cfg(test)]
    fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }
}

/// Memory that is reserved until it is dropped.
pub(super) struct MemoryReservation {
    memory: Arc<PeekMemory>,
    bytes: u64,
}

impl MemoryReservation {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// An empty reservation of the same memory.
    pub(super) fn reservation_beside(&self) -> MemoryReservation {
        self.memory.reservation()
    }

    /// Grows the reservation to at least `bytes`; false when the limit does not allow it.
    pub(super) fn grow_to(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let most = self.memory.most.load(Relaxed);
        let take = |taken: u64| taken.checked_add(more).filter(|sum| *sum <= most);
        if more > 0 && self.memory.taken.fetch_update(Relaxed, Relaxed, take).is_err() {
            return false;
        }
        self.memory.observer.body_memory_reserved(more);
        self.bytes += more;
        true
    }

    /// As `grow_to`, for the edit of a body that is held. One that would not fit without any other request is
    /// too large for the edit.
    pub(super) fn reserve_edit(&mut self, needed: u64, body: usize) -> Result<(), Reject> {
        if self.grow_to(needed) {
            return Ok(());
        }
        let most = u128::from(self.memory.most.load(Relaxed));
        let (body, together) = (body as u128, u128::from(needed) + body as u128);
        if together <= most {
            return Err(Reject::Memory);
        }
        // The edits' need is proportional to the body.
        Err(Reject::TooLarge { limit: u64::try_from(body * most / together).unwrap_or(u64::MAX) })
    }

    /// As `grow_to`, for an answer.
    pub(super) fn hold_answer(&mut self, bytes: usize) -> Result<()> {
        if self.grow_to(bytes as u64) { Ok(()) } else { Error::e_explain(NO_ROOM, "for an answer") }
    }

    /// Returns the reserved memory.
    pub(super) fn release(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes > 0 {
            self.memory.taken.fetch_sub(bytes, Relaxed);
            self.memory.observer.body_memory_released(bytes);
        }
    }
}

impl Drop for MemoryReservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Such a body was refused with 503 and `retry-after`, for ever.
    #[test]
    fn an_edit_that_never_fits_is_too_large() {
        let memory = PeekMemory::new(1000, Observer::default());
        let mut other = memory.reservation();
        assert!(other.grow_to(500));
        let refusal = |needed, body| memory.reservation().reserve_edit(needed, body).err();
        assert!(refusal(500, 10).is_none());
        assert!(matches!(refusal(900, 100), Some(Reject::Memory)), "it fits once the other has gone");
        assert!(matches!(refusal(1900, 100), Some(Reject::TooLarge { limit: 50 })));
        assert!(matches!(refusal(u64::MAX, 100), Some(Reject::TooLarge { limit: 0 })));
    }

    #[test]
    fn stays_within_the_limit_and_returns_everything() {
        let memory = PeekMemory::new(100, Observer::default());
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
