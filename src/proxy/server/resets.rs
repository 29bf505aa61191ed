//! Counts the streams that a client of HTTP/2 opens and resets at once.
//!
//! A stream that is reset costs the client one frame and the balancer a request, and it does not count
//! among the concurrent ones. Clients that cancel requests are normal; a connection on which two of three
//! requests are cancelled within a second of their beginning, hundreds of them, is an attack.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::head::H2_PREFACE;

/// A stream reset at a greater age was a request that its client no longer needs.
const PREMATURE_RESET_AGE: Duration = Duration::from_secs(1);

/// The number of premature resets that a connection may have, whatever their share.
const MAX_PREMATURE_RESETS: u32 = 500;

/// When so many streams have been counted, all counts are halved: what was long ago weighs less.
const MAX_COUNTED_STREAMS: u32 = 4000;

/// The number of streams whose age is remembered. More cannot be open at once.
const MAX_REMEMBERED_STREAMS: usize = 1024;

const FRAME_HEAD_BYTES: usize = 9;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;

/// Follows the frames that a client sends.
#[derive(Debug)]
pub(super) struct ResetWatch {
    /// Bytes of the preface or of a payload that are still to come.
    skip: usize,
    head: [u8; FRAME_HEAD_BYTES],
    filled: usize,
    /// Streams opened within `PREMATURE_RESET_AGE`, the oldest first; their numbers grow.
    recent: VecDeque<(u32, Instant)>,
    last: u32,
    opened: u32,
    premature: u32,
}

impl ResetWatch {
    pub(super) fn new() -> Self {
        ResetWatch {
            skip: H2_PREFACE.len(),
            head: [0; FRAME_HEAD_BYTES],
            filled: 0,
            recent: VecDeque::new(),
            last: 0,
            opened: 0,
            premature: 0,
        }
    }

    /// Takes the next bytes of the connection. Returns whether the client abuses it.
    pub(super) fn is_abused(&mut self, mut bytes: &[u8], now: Instant) -> bool {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = bytes.len().min(FRAME_HEAD_BYTES - self.filled);
            if taken == 0 {
                break;
            }
            self.head[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled == FRAME_HEAD_BYTES {
                self.frame(now);
                self.filled = 0;
            }
        }
        self.premature > MAX_PREMATURE_RESETS && self.premature * 3 > self.opened * 2
    }

    fn frame(&mut self, now: Instant) {
        let [a, b, c, kind, _, d, e, f, g] = self.head;
        self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
        let stream = u32::from_be_bytes([d & 0x7f, e, f, g]);
        match kind {
            // Behind a body, they are its trailers.
            HEADERS if stream > self.last => self.open(stream, now),
            RST_STREAM => self.reset(stream, now),
            _ => {}
        }
    }

    fn open(&mut self, stream: u32, now: Instant) {
        let is_old = |since: &Instant| now.duration_since(*since) > PREMATURE_RESET_AGE;
        while self.recent.front().is_some_and(|(_, since)| is_old(since))
            || self.recent.len() == MAX_REMEMBERED_STREAMS
        {
            self.recent.pop_front();
        }
        self.recent.push_back((stream, now));
        self.last = stream;
        self.opened += 1;
        if self.opened == MAX_COUNTED_STREAMS {
            self.opened /= 2;
            self.premature /= 2;
        }
    }

    fn reset(&mut self, stream: u32, now: Instant) {
        if let Ok(place) = self.recent.binary_search_by_key(&stream, |(stream, _)| *stream)
            && let Some((_, since)) = self.recent.remove(place)
            && now.duration_since(since) <= PREMATURE_RESET_AGE
        {
            self.premature += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u32, payload: usize) -> Vec<u8> {
        let mut frame = vec![0, (payload >> 8) as u8, payload as u8, kind, 0];
        frame.extend(stream.to_be_bytes());
        // What looks like frames within a payload is none.
        frame.extend(std::iter::repeat_n(RST_STREAM, payload));
        frame
    }

    /// Sends, for each of `count` streams, whether it is reset and how long after it was opened; from one
    /// stream to the next, `between` goes by. Returns after how many the connection counts as abused.
    fn abused_after(count: u32, between: Duration, reset: impl Fn(u32) -> Option<Duration>) -> Option<u32> {
        let (mut watch, mut now) = (ResetWatch::new(), Instant::now());
        assert!(!watch.is_abused(&H2_PREFACE, now));
        (0..count).find(|nth| {
            let stream = 2 * nth + 1;
            let mut abused = watch.is_abused(&frame(HEADERS, stream, 40), now);
            abused |= watch.is_abused(&frame(0, stream, 300), now);
            if let Some(age) = reset(*nth) {
                abused |= watch.is_abused(&frame(RST_STREAM, stream, 4), now + age);
            }
            now += between;
            abused
        })
    }

    const QUICK: Duration = Duration::from_millis(5);

    #[test]
    fn a_client_that_resets_all_it_opens_is_found_out() {
        assert_eq!(abused_after(10_000, QUICK, |_| Some(Duration::ZERO)), Some(500));
        // Also if it does so slowly, and lets some of them live.
        assert_eq!(abused_after(10_000, PREMATURE_RESET_AGE * 2, |_| Some(QUICK)), Some(500));
        assert!(abused_after(10_000, QUICK, |nth| (nth % 5 > 0).then_some(QUICK)).is_some());
    }

    #[test]
    fn a_client_that_cancels_requests_is_not() {
        // One of two that are raced; all of them after a while; a burst at the end of much work.
        assert_eq!(abused_after(20_000, QUICK, |nth| (nth % 2 == 0).then_some(QUICK)), None);
        assert_eq!(abused_after(20_000, QUICK * 4, |_| Some(PREMATURE_RESET_AGE + QUICK)), None);
        assert_eq!(abused_after(2_000, QUICK, |nth| (nth > 1_100).then_some(QUICK)), None);
        assert_eq!(abused_after(256, QUICK, |_| Some(QUICK)), None);
    }

    #[test]
    fn frames_are_followed_through_any_pieces() {
        let mut bytes = H2_PREFACE.to_vec();
        for stream in (1..=1_001).step_by(2) {
            bytes.extend(frame(HEADERS, stream, 300));
            bytes.extend(frame(RST_STREAM, stream, 4));
        }
        for size in [1, 2, 7, 10, 4096, bytes.len()] {
            let (mut watch, now) = (ResetWatch::new(), Instant::now());
            let mut abused = false;
            bytes.chunks(size).for_each(|piece| abused = watch.is_abused(piece, now));
            assert_eq!((watch.opened, watch.premature, abused), (501, 501, true), "{size}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let (mut watch, now) = (ResetWatch::new(), Instant::now());
        watch.is_abused(&H2_PREFACE, now);
        for nth in 0..100_000 {
            watch.is_abused(&frame(HEADERS, 2 * nth + 1, 0), now);
            // Trailers, and resets of what is not remembered.
            watch.is_abused(&frame(HEADERS, 2 * nth + 1, 0), now);
            watch.is_abused(&frame(RST_STREAM, 0x7fff_ffff, 4), now);
        }
        assert!(watch.recent.len() <= MAX_REMEMBERED_STREAMS);
        assert_eq!(watch.premature, 0);
    }
}
