//! A request's body: the held part, and the facts of the rest.
//!
//! The held part begins with the peeked bytes and grows with later reads, up to `peek.max_body` and as far as
//! `peek.memory` has room; a body that cannot be held is sent once. The held bytes are freed as soon as no
//! attempt can follow: with prompts of 100 KB they are most of the memory of an idle stream.
//!
//! Never: hold a byte that is not reserved first.

use bytes::{Bytes, BytesMut};

use super::body_tail::BodyTail;
use super::memory::MemoryReservation;
use crate::reject::Reject;

/// The smallest reservation of a growing body, in bytes.
const MIN_RESERVED: u64 = 1 << 10;

/// From this size on, a body with a declared length reserves four times its received bytes: each growth
/// copies the body.
const FAST_GROWTH_BYTES: u64 = 64 << 10;

/// The held bytes of a body. Most bodies arrive in one piece, which is never copied.
#[derive(Debug)]
enum HeldBytes {
    Nothing,
    Piece(Bytes),
    Many(BytesMut),
    /// Some of the read bytes are no longer held.
    Released,
}

/// A text that is inserted into a body on its way to an upstream.
#[derive(Clone, Debug)]
pub(super) struct BodyInsertion {
    /// The offset in the body.
    pub at: usize,
    pub text: Bytes,
}

/// A complete body as every upstream gets it.
pub(super) struct SentBody {
    bytes: Bytes,
    insertion: Option<BodyInsertion>,
}

/// The body of one request.
pub(super) struct RequestBody {
    held: HeldBytes,
    reservation: MemoryReservation,
    /// The largest body that is held.
    max_held: u64,
    /// The length that the head declares.
    declared: Option<u64>,
    /// The body has no more bytes than were read.
    complete: bool,
    /// The text that is inserted for every upstream.
    insertion: Option<BodyInsertion>,
    /// The reservation for bytes after the held part that wait for the upstream.
    waiting: Option<MemoryReservation>,
    /// Reads the rest of the body, if the route depends on the model in the peeked part.
    tail: Option<Box<BodyTail>>,
}

// === impl HeldBytes ===

impl HeldBytes {
    fn bytes(&self) -> &[u8] {
        match self {
            HeldBytes::Nothing | HeldBytes::Released => &[],
            HeldBytes::Piece(piece) => piece,
            HeldBytes::Many(bytes) => bytes,
        }
    }

    fn push(&mut self, piece: Bytes, room: usize) {
        match self {
            HeldBytes::Released => {}
            _ if piece.is_empty() => {}
            HeldBytes::Nothing => *self = HeldBytes::Piece(piece),
            HeldBytes::Piece(first) => {
                let mut bytes = BytesMut::with_capacity(room.max(first.len() + piece.len()));
                bytes.extend_from_slice(first);
                bytes.extend_from_slice(&piece);
                *self = HeldBytes::Many(bytes);
            }
            HeldBytes::Many(bytes) => bytes.extend_from_slice(&piece),
        }
    }
}

// === impl SentBody ===

impl SentBody {
    pub(super) fn new(bytes: Bytes) -> Self {
        SentBody { bytes, insertion: None }
    }
}

// === impl RequestBody ===

impl RequestBody {
    pub(super) fn new(reservation: MemoryReservation, max_held: u64, declared: Option<u64>) -> Self {
        RequestBody {
            held: HeldBytes::Nothing,
            reservation,
            max_held,
            declared,
            complete: false,
            insertion: None,
            waiting: None,
            tail: None,
        }
    }

    /// The body of a request that has none.
    pub(super) fn empty(reservation: MemoryReservation) -> Self {
        RequestBody { complete: true, ..RequestBody::new(reservation, 0, Some(0)) }
    }

    /// The held bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.held.bytes()
    }

    pub(super) fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(super) fn complete(&mut self) {
        self.complete = true;
    }

    /// The body's length, as far as it is known before its end.
    pub(super) fn declared(&self) -> Option<u64> {
        self.declared
    }

    /// The largest body that is held.
    pub(super) fn max_held(&self) -> u64 {
        self.max_held
    }

    /// Whether every byte that was read is still held, so that an attempt can send all of them.
    pub(super) fn is_replayable(&self) -> bool {
        !matches!(self.held, HeldBytes::Released)
    }

    /// Reserves memory for a piece and holds it. False when memory is lacking.
    pub(super) fn hold(&mut self, piece: Bytes) -> bool {
        let total = self.len() + piece.len() as u64;
        if !self.reserve(total) {
            return false;
        }
        self.held.push(piece, usize::try_from(self.reservation.bytes()).unwrap_or(0));
        true
    }

    /// The buffer with room for `more` received bytes, which are reserved; `None` when there is no memory.
    pub(super) fn buffer_for(&mut self, more: usize) -> Option<&mut BytesMut> {
        if !matches!(&self.held, HeldBytes::Many(bytes) if bytes.capacity() - bytes.len() >= more) {
            if !self.reserve(self.len() + more as u64) {
                return None;
            }
            let mut bytes = BytesMut::with_capacity(usize::try_from(self.reservation.bytes()).ok()?);
            bytes.extend_from_slice(self.bytes());
            self.held = HeldBytes::Many(bytes);
        }
        match &mut self.held {
            HeldBytes::Many(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// Reserves for the received bytes, not for the declared length: a client can declare much and send
    /// nothing. Reservations double, so that a large body needs a few of them and a small one needs one.
    fn reserve(&mut self, total: u64) -> bool {
        let grows_fast = self.declared.is_some() && total >= FAST_GROWTH_BYTES;
        let goal = if grows_fast { total.saturating_mul(4) } else { total.next_power_of_two() };
        let ahead = goal.max(MIN_RESERVED).min(self.max_held.max(total));
        let enough = ahead.min(self.declared.unwrap_or(u64::MAX)).max(total);
        self.reservation.grow_to(enough)
    }

    /// Reserves for the bytes that wait for the upstream. False when memory is lacking.
    pub(super) fn reserve_waiting(&mut self, bytes: usize) -> bool {
        let waiting = self.waiting.get_or_insert_with(|| self.reservation.reservation_beside());
        waiting.grow_to(bytes as u64)
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Returns the reservation for waiting bytes: none wait any more.
    pub(super) fn release_waiting(&mut self) {
        self.waiting = None;
    }

    /// Sets the reader of the rest of the body.
    pub(super) fn watch(&mut self, tail: BodyTail) {
        self.tail = Some(Box::new(tail));
    }

    /// Reads a piece after the peek, before it is held or sent. Fails if the piece makes the body one of
    /// another route.
    pub(super) fn read_on(&mut self, piece: &[u8]) -> Result<(), Reject> {
        self.tail.as_mut().map_or(Ok(()), |tail| tail.read(piece))
    }

    /// Holds a piece after the peek, as long as the body can be held; otherwise the body is sent once.
    pub(super) fn hold_if_possible(&mut self, piece: &Bytes) {
        let total = self.len() + piece.len() as u64;
        if !self.is_replayable() {
            return;
        }
        if total > self.max_held || !self.hold(piece.clone()) {
            self.release();
        }
    }

    /// An empty reservation of the same memory, for a copy of the body.
    pub(super) fn reservation_beside(&self) -> MemoryReservation {
        self.reservation.reservation_beside()
    }

    /// Replaces the received body by an edited one. False when memory is lacking.
    pub(super) fn replace(&mut self, edited: Bytes) -> bool {
        let length = edited.len() as u64;
        if !self.reservation.grow_to(length) {
            return false;
        }
        (self.held, self.declared) = (HeldBytes::Piece(edited), Some(length));
        true
    }

    /// Replaces a complete body and returns it. `None`: memory is lacking.
    pub(super) fn exchange(&mut self, other: SentBody) -> Option<SentBody> {
        if !self.reservation.grow_to(other.bytes.len() as u64) {
            return None;
        }
        let own = SentBody { bytes: self.replay(), insertion: self.insertion.take() };
        self.declared = Some(other.bytes.len() as u64);
        (self.held, self.insertion) = (HeldBytes::Piece(other.bytes), other.insertion);
        Some(own)
    }

    /// A complete body as every upstream gets it, in one piece.
    pub(super) fn whole(&mut self) -> Bytes {
        let held = self.replay();
        if self.insertion.is_none() { held } else { self.pieces(held, None).concat().into() }
    }

    /// Inserts a text into a complete body on its way to an upstream, without a copy of the body. A second
    /// text at the same offset follows the first.
    pub(super) fn insert(&mut self, at: usize, text: &'static [u8]) {
        let text = match &self.insertion {
            Some(first) => [&first.text[..], text].concat().into(),
            None => Bytes::from_static(text),
        };
        self.insertion = Some(BodyInsertion { at, text });
    }

    /// The length of a complete body on its way to an upstream.
    pub(super) fn sent_length(&self) -> u64 {
        self.len() + self.insertion.as_ref().map_or(0, |insertion| insertion.text.len() as u64)
    }

    /// The pieces of the held bytes as they are sent, with the insertion for the upstream of this attempt.
    /// Each insertion is placed between two slices of the held bytes, so that none is copied; pieces may be
    /// empty.
    pub(super) fn pieces(&self, mut held: Bytes, own: Option<BodyInsertion>) -> [Bytes; 5] {
        let mut insertions = [own, self.insertion.clone()];
        insertions.sort_by_key(|insertion| insertion.as_ref().map_or(usize::MAX, |insertion| insertion.at));
        let mut pieces = <[Bytes; 5]>::default();
        let (mut last, mut sent) = (0, 0);
        for insertion in insertions.into_iter().flatten() {
            if insertion.at - sent > held.len() {
                break;
            }
            pieces[last] = held.split_to(insertion.at - sent);
            pieces[last + 1] = insertion.text;
            (last, sent) = (last + 2, insertion.at);
        }
        pieces[last] = held;
        pieces
    }

    /// The held bytes, for the beginning of an attempt.
    pub(super) fn replay(&mut self) -> Bytes {
        match std::mem::replace(&mut self.held, HeldBytes::Nothing) {
            HeldBytes::Nothing => Bytes::new(),
            HeldBytes::Piece(piece) => {
                self.held = HeldBytes::Piece(piece.clone());
                piece
            }
            HeldBytes::Many(bytes) => {
                let piece = bytes.freeze();
                self.held = HeldBytes::Piece(piece.clone());
                piece
            }
            HeldBytes::Released => {
                self.held = HeldBytes::Released;
                Bytes::new()
            }
        }
    }

    /// Drops the held bytes, since no attempt can follow. The reservation stays: bytes in the send queue are
    /// still held.
    pub(super) fn stop_holding(&mut self) {
        self.held = HeldBytes::Released;
    }

    /// Drops the held bytes and their reservation, since no attempt can follow.
    pub(super) fn release(&mut self) {
        self.held = HeldBytes::Released;
        self.reservation.release();
        self.waiting = None;
    }
}

#[cfg(test)]
mod tests;
