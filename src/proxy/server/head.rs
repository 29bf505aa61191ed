//! Reads the heads of a connection's HTTP/1 requests, each within a time and a size limit.
//!
//! Pingora's own reader has a deadline for the first head only, none for a head that is under way, and
//! holds up to 1 MiB of it. It parses what is read here as if it had been pipelined. An idle connection
//! holds no buffer.

use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::Poll;

use bytes::BytesMut;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::config::types::ConnectionLimits;
use crate::reject::Reject;

/// The bytes read at a time. Most heads with the beginning of their body fit.
const READ_CHUNK_BYTES: usize = 4 << 10;

/// A head above `limits.header_bytes` is refused like any other request if it exceeds the limit by no
/// more than this. Of a longer one nothing more is read.
const MAX_HEAD_EXCESS_BYTES: u64 = 8 << 10;

/// The connection preface of a client that uses HTTP/2 by prior knowledge.
pub(super) const H2_PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the bytes of a head are read from.
pub(super) type HeadSource<'a> = dyn AsyncRead + Unpin + Send + 'a;

/// What a client sent where a request may begin.
#[derive(Debug)]
pub(super) enum IncomingRequest {
    Request(ReceivedHead),
    /// The preface of HTTP/2, and what was received with it.
    Http2(BytesMut),
    Refused(Reject),
    /// The client closed the connection, or sent nothing in time.
    Gone,
}

/// A request's head, with what was received behind it.
#[derive(Debug)]
pub(super) struct ReceivedHead {
    pub bytes: BytesMut,
    /// The length of the head alone.
    pub length: usize,
}

/// Reads one head after another.
pub(super) struct HeadReader {
    limits: ConnectionLimits,
    /// The one timer of the connection between its requests.
    timer: Pin<Box<Sleep>>,
    held: BytesMut,
}

enum ReceiveResult {
    Bytes,
    End,
    Late,
}

impl HeadReader {
    pub(super) fn new(limits: ConnectionLimits) -> Self {
        let timer = Box::pin(sleep_until(Instant::now() + limits.idle));
        HeadReader { limits, timer, held: BytesMut::new() }
    }

    /// Reads the head of the next request; `header_bytes` is the limit that applies to it.
    pub(super) async fn next(&mut self, source: &mut HeadSource<'_>, header_bytes: u64) -> IncomingRequest {
        if self.begin(source).await {
            self.finish(source, header_bytes, false).await
        } else {
            IncomingRequest::Gone
        }
    }

    /// Waits for the first bytes of a request. Returns whether they came.
    pub(super) async fn begin(&mut self, source: &mut HeadSource<'_>) -> bool {
        self.timer.as_mut().reset(Instant::now() + self.limits.idle);
        matches!(self.receive(source).await, ReceiveResult::Bytes)
    }

    /// Reads the head that has begun. `preface`: it may turn out to be HTTP/2's preface.
    pub(super) async fn finish(
        &mut self,
        source: &mut HeadSource<'_>,
        header_bytes: u64,
        preface: bool,
    ) -> IncomingRequest {
        let most = usize::try_from(header_bytes + MAX_HEAD_EXCESS_BYTES).unwrap_or(usize::MAX);
        let mut scan = HeadScan::default();
        let mut is_timed = false;
        loop {
            let known = self.held.len().min(H2_PREFACE.len());
            let undecided = preface && self.held[..known] == H2_PREFACE[..known];
            if undecided && known == H2_PREFACE.len() {
                return IncomingRequest::Http2(std::mem::take(&mut self.held));
            }
            let end = if undecided { None } else { scan.end(&self.held) };
            if end.unwrap_or(self.held.len()) > most {
                return IncomingRequest::Refused(Reject::HeadTooLarge { limit: header_bytes });
            }
            if let Some(end) = end {
                return match malformed(&self.held[..end]) {
                    Some(why) => IncomingRequest::Refused(Reject::Malformed { why }),
                    None => {
                        let bytes = std::mem::take(&mut self.held);
                        IncomingRequest::Request(ReceivedHead { bytes, length: end })
                    }
                };
            }
            if is_hopeless(&self.held) {
                return IncomingRequest::Refused(Reject::Malformed { why: "it does not begin as HTTP does" });
            }
            // Empty lines before a request are no part of it.
            let has_begun = undecided || scan.has_begun;
            if has_begun && !is_timed {
                self.timer.as_mut().reset(Instant::now() + self.limits.head);
                is_timed = true;
            }
            match self.receive(source).await {
                ReceiveResult::Bytes => {}
                ReceiveResult::Late if has_begun => return IncomingRequest::Refused(Reject::Slow),
                ReceiveResult::Late | ReceiveResult::End => return IncomingRequest::Gone,
            }
        }
    }

    /// Receives what there is. Where there is nothing, no memory is held while waiting.
    async fn receive(&mut self, source: &mut HeadSource<'_>) -> ReceiveResult {
        poll_fn(|cx| {
            let mut space = [const { MaybeUninit::uninit() }; READ_CHUNK_BYTES];
            let mut chunk = ReadBuf::uninit(&mut space);
            match Pin::new(&mut *source).poll_read(cx, &mut chunk) {
                Poll::Ready(Ok(())) if !chunk.filled().is_empty() => {
                    self.held.extend_from_slice(chunk.filled());
                    Poll::Ready(ReceiveResult::Bytes)
                }
                Poll::Ready(_) => Poll::Ready(ReceiveResult::End),
                Poll::Pending => self.timer.as_mut().poll(cx).map(|()| ReceiveResult::Late),
            }
        })
        .await
    }
}

/// Finds the end of a head that arrives in pieces; each byte is looked at once.
#[derive(Default)]
struct HeadScan {
    at: usize,
    /// The empty lines before the request are over.
    has_begun: bool,
}

impl HeadScan {
    /// The length of the head, once it is whole: it ends with the first empty line behind its first line.
    fn end(&mut self, head: &[u8]) -> Option<usize> {
        while !self.has_begun {
            match &head[self.at..] {
                [] | [b'\r'] => return None,
                [b'\n', ..] => self.at += 1,
                [b'\r', b'\n', ..] => self.at += 2,
                _ => self.has_begun = true,
            }
        }
        while let Some(length) = memchr::memchr(b'\n', &head[self.at..]) {
            let next = self.at + length + 1;
            match &head[next..] {
                [] | [b'\r'] => {
                    // The line's end is looked at again with what follows.
                    self.at = next - 1;
                    return None;
                }
                [b'\n', ..] => return Some(next + 1),
                [b'\r', b'\n', ..] => return Some(next + 2),
                _ => self.at = next,
            }
        }
        self.at = head.len();
        None
    }
}

/// Whether the bytes are no HTTP, such as a TLS handshake: no end of a head would come.
fn is_hopeless(head: &[u8]) -> bool {
    let first = head.iter().find(|byte| !matches!(byte, b'\r' | b'\n'));
    first.is_some_and(|byte| !byte.is_ascii_graphic())
}

/// What is wrong with a request line. Pingora escapes spaces and control characters in a target where a
/// reader with other rules sees another target; what else is wrong with a head, it refuses.
fn malformed(head: &[u8]) -> Option<&'static str> {
    let line = head.split(|byte| *byte == b'\n').find(|line| !matches!(line, [] | [b'\r']))?;
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let spaces = line.iter().filter(|byte| **byte == b' ').count();
    let is_plain = spaces == 2 && !line.iter().any(u8::is_ascii_control);
    (!is_plain).then_some("a request line other than a method, a target and a version")
}

#[cfg(test)]
mod tests;
