//! What was read of a request's body, held for as long as it may have to be sent again.
//!
//! It begins with the peeked bytes and grows with what is read later, up to `peek.max_body` and as far as
//! `peek.memory` has room; a body that cannot be held is sent once. It goes as soon as no attempt can
//! follow: with prompts of 100 KB this is most of what an idle stream would cost.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

use super::memory::Reservation;

/// The lock is a plain mutex: it is taken for a copy or a handle, never across an await.
pub struct Replay(Mutex<State>);

enum State {
    /// Everything that was read so far.
    Whole { body: Bytes, later: BytesMut, reservation: Reservation, most: u64 },
    /// Something that was read is not held.
    Gone,
}

impl Replay {
    /// `most`: the largest body that is held.
    pub fn new(body: Bytes, reservation: Reservation, most: u64) -> Arc<Self> {
        Arc::new(Replay(Mutex::new(State::Whole { body, later: BytesMut::new(), reservation, most })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No attempt can follow: the bytes and their reservation go.
    pub fn release(&self) {
        *self.state() = State::Gone;
    }

    /// Whether another attempt can be given all that was read.
    pub fn is_whole(&self) -> bool {
        matches!(*self.state(), State::Whole { .. })
    }

    /// A piece was read after the peek.
    pub fn push(&self, piece: &Bytes) {
        let mut state = self.state();
        let State::Whole { body, later, reservation, most } = &mut *state else { return };
        let total = (body.len() + later.len() + piece.len()) as u64;
        if total > *most || !reservation.grow_to(total) {
            *state = State::Gone;
            return;
        }
        later.extend_from_slice(piece);
    }

    /// What an attempt begins with.
    pub fn body(&self) -> Option<Bytes> {
        match &mut *self.state() {
            State::Whole { body, later, .. } => {
                if !later.is_empty() {
                    let mut all = BytesMut::with_capacity(body.len() + later.len());
                    all.extend_from_slice(body);
                    all.extend_from_slice(&later.split());
                    *body = all.freeze();
                }
                Some(body.clone())
            }
            State::Gone => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Memory;
    use super::*;

    fn replay(memory: u64, most: u64) -> Arc<Replay> {
        let mut reservation = Memory::new(memory).reservation();
        assert!(reservation.grow_to(4));
        Replay::new(Bytes::from_static(b"peek"), reservation, most)
    }

    #[test]
    fn a_later_attempt_begins_with_all_that_was_read() {
        let replay = replay(1000, 1000);
        assert_eq!(replay.body().unwrap(), "peek");
        replay.push(&Bytes::from_static(b"ed "));
        replay.push(&Bytes::from_static(b"body"));
        assert_eq!(replay.body().unwrap(), "peeked body");
        replay.push(&Bytes::from_static(b"!"));
        assert_eq!(replay.body().unwrap(), "peeked body!");
        replay.release();
        assert!(replay.body().is_none() && !replay.is_whole());
    }

    #[test]
    fn a_body_that_cannot_be_held_is_sent_once() {
        for (memory, most) in [(1000, 6), (6, 1000)] {
            let replay = replay(memory, most);
            replay.push(&Bytes::from_static(b"123"));
            assert!(!replay.is_whole(), "memory {memory}, most {most}");
        }
    }
}
