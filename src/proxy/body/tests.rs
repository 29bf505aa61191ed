//! Tests of the held body: replay, limits, insertions, and reserved memory.

use super::super::memory::PeekMemory;
use super::*;
use crate::observe::Observer;

fn body(memory: u64, max_held: u64) -> RequestBody {
    let mut body =
        RequestBody::new(PeekMemory::new(memory, Observer::default()).reservation(), max_held, None);
    assert!(body.hold(Bytes::from_static(b"peek")));
    body
}

#[test]
fn replays_every_byte_that_was_read() {
    let mut body = body(10_000, 1000);
    assert_eq!(body.replay(), "peek");
    body.hold_if_possible(&Bytes::from_static(b"ed "));
    body.hold_if_possible(&Bytes::from_static(b"body"));
    assert_eq!(body.replay(), "peeked body");
    body.hold_if_possible(&Bytes::from_static(b"!"));
    assert_eq!(body.replay(), "peeked body!");
    body.release();
    assert!(!body.is_replayable() && body.replay().is_empty());
}

#[test]
fn sends_a_body_that_cannot_be_held_once() {
    for (memory, max_held) in [(10_000, 6), (1 << 10, 1 << 20)] {
        let mut body = body(memory, max_held);
        body.hold_if_possible(&Bytes::from(vec![b'x'; 1 << 10]));
        assert!(!body.is_replayable(), "memory {memory}, at most {max_held}");
    }
}

#[test]
fn sends_an_insertion_without_holding_it() {
    let mut body = body(10_000, 1000);
    body.insert(2, b"**");
    let held = body.replay();
    assert_eq!((body.bytes(), body.sent_length()), (&b"peek"[..], 6));
    assert_eq!(body.pieces(held, None).concat(), b"pe**ek");
    body.insert(2, b"++");
    let held = body.replay();
    assert_eq!((body.bytes(), body.sent_length()), (&b"peek"[..], 8));
    assert_eq!(body.pieces(held, None).concat(), b"pe**++ek");
}

#[test]
fn places_insertions_without_copying_the_body() {
    let own = |at, text: &'static str| Some(BodyInsertion { at, text: text.into() });
    for (both, own, sent) in [
        (None, None, "peek"),
        (None, own(1, "own"), "powneek"),
        (None, own(4, "own"), "peekown"),
        (None, own(5, "own"), "peek"),
        (Some(3), own(1, "own"), "powneeboth-k"),
        (Some(1), own(3, "own"), "pboth-eeownk"),
        (Some(2), own(2, "own"), "peownboth-ek"),
        (Some(0), None, "both-peek"),
    ] {
        let mut body = body(10_000, 1000);
        both.into_iter().for_each(|at| body.insert(at, b"both-"));
        let held = body.replay();
        let start = held.as_ptr();
        let pieces = body.pieces(held, own.clone());
        assert_eq!(pieces.concat(), sent.as_bytes(), "{both:?} {own:?}");
        let mut slices = pieces.iter().filter(|piece| piece.first() == Some(&b'p'));
        assert!(slices.all(|slice| slice.as_ptr() == start), "it is the held body itself");
    }
}

#[test]
fn reserves_for_received_bytes() {
    let memory = PeekMemory::new(400 << 10, Observer::default());
    let mut body = RequestBody::new(memory.reservation(), 1 << 20, Some(300 << 10));
    let take = |body: &mut RequestBody, more: usize| {
        body.buffer_for(more).unwrap().extend_from_slice(&vec![b'x'; more]);
        (body.len(), body.reservation.bytes())
    };
    assert_eq!(take(&mut body, 1), (1, 1 << 10));
    assert_eq!(take(&mut body, 999), (1000, 1 << 10), "there is room left");
    assert_eq!(take(&mut body, 3000), (4000, 4 << 10));
    assert_eq!(take(&mut body, 61_536), (64 << 10, 256 << 10));
    assert_eq!(take(&mut body, 200 << 10), (264 << 10, 300 << 10), "no more than is declared");
    assert_eq!(body.replay().len(), 264 << 10);
    assert!(body.buffer_for(1).unwrap().len() == 264 << 10, "what was sent is still held");

    let mut other = RequestBody::new(memory.reservation(), 1 << 20, Some(300 << 10));
    assert!(other.buffer_for(101 << 10).is_none(), "the memory is in use");
    body.release();
    assert!(other.buffer_for(101 << 10).is_some());
}

/// Regression: one byte reserved 64 KiB of `peek.memory`, so that 32,768 idle uploads used all of 2 GiB.
#[test]
fn a_small_body_reserves_little() {
    let memory = PeekMemory::new(1 << 20, Observer::default());
    let mut bodies = Vec::new();
    for _ in 0..1000 {
        let mut body = RequestBody::new(memory.reservation(), 1 << 20, None);
        assert!(body.hold(Bytes::from_static(b"{")));
        bodies.push(body);
    }
}
