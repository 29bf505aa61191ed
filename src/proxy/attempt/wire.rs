//! A connection to an upstream that sends while it is read.
//!
//! Bytes for the upstream are queued and sent in vectored writes, head and body together, whenever the
//! connection is read or flushed. So one task carries both directions, and an answer that begins before the
//! upstream has read the whole request is read in time. Pingora's client session, which parses the answer,
//! uses this connection for reading only.
//!
//! Never: block a reader on a writer, copy a body, hold more than the caller queued.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest,
    UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Instant;

use crate::proxy::wire::{Carrier, Transport};

/// How long an upstream that does not read may delay the end of its connection.
const MAX_SHUTDOWN_TIME: Duration = Duration::from_secs(1);

/// The most pieces in one vectored write.
const MAX_SLICES: usize = 16;

/// The queue takes further pieces only while it holds less than this.
const MAX_WAITING_BYTES: usize = 256 << 10;

/// The limit where `peek.memory` has no room: a piece is queued once the previous one was sent.
const MIN_WAITING_BYTES: usize = 1;

/// The memory of a queued piece besides its bytes.
const PIECE_OVERHEAD: usize = 64;

/// The send queue of an upstream connection. The request queues pieces, the connection sends them.
///
/// The lock is a plain mutex: one task holds both handles, so that it is never waited for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outgoing(Arc<Mutex<SendQueue>>);

#[derive(Debug)]
struct SendQueue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    /// The queue takes further pieces only while it holds less than this.
    limit: usize,
    /// The time at which the upstream last took bytes, or the queue was last empty.
    moved: Option<Instant>,
    /// The upstream accepts no more bytes. Its answer can still be read.
    broken: bool,
    /// Wakes the task that waits for room.
    wants_room: Option<Waker>,
}

/// The socket with its queue.
#[derive(Debug)]
pub(crate) struct UpstreamWire {
    transport: Transport,
    /// The address that was dialled; `None` for a path.
    peer: Option<SocketAddr>,
    outgoing: Outgoing,
}

// === impl Outgoing ===

impl Outgoing {
    fn lock(&self) -> MutexGuard<'_, SendQueue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a piece of the body for the upstream; an empty one, or one behind an error, is dropped.
    pub(crate) fn push(&self, piece: Bytes) {
        let mut queue = self.lock();
        if piece.is_empty() || queue.broken {
            return;
        }
        if queue.pieces.is_empty() {
            queue.moved = Some(Instant::now());
        }
        queue.bytes += piece.len() + PIECE_OVERHEAD;
        queue.pieces.push_back(piece);
    }

    /// The number of queued bytes.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().bytes
    }

    /// Allows many queued bytes, or one piece only.
    pub(crate) fn set_ample(&self, ample: bool) {
        self.lock().limit = if ample { MAX_WAITING_BYTES } else { MIN_WAITING_BYTES };
    }

    /// Whether more may be queued.
    pub(crate) fn has_room(&self) -> bool {
        self.lock().has_room()
    }

    /// Waits until more may be queued, while the same task reads the connection and so sends.
    pub(crate) async fn room(&self) {
        poll_fn(|cx| {
            let mut queue = self.lock();
            if queue.has_room() {
                return Poll::Ready(());
            }
            queue.wants_room = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Whether everything that was queued has been taken.
    pub(crate) fn is_sent(&self) -> bool {
        let queue = self.lock();
        queue.pieces.is_empty() && !queue.broken
    }

    /// The time at which the last queued byte was handed to the operating system; `None` while some wait.
    pub(crate) fn sent_at(&self) -> Option<Instant> {
        let queue = self.lock();
        queue.moved.filter(|_| queue.pieces.is_empty() && !queue.broken)
    }

    /// The time since which the upstream has taken none of the queued bytes.
    pub(crate) fn stuck_since(&self) -> Option<Instant> {
        let queue = self.lock();
        queue.moved.filter(|_| !queue.pieces.is_empty())
    }
}

// === impl SendQueue ===

impl Default for SendQueue {
    fn default() -> Self {
        SendQueue {
            pieces: VecDeque::new(),
            bytes: 0,
            limit: MAX_WAITING_BYTES,
            moved: None,
            broken: false,
            wants_room: None,
        }
    }
}

impl SendQueue {
    fn has_room(&self) -> bool {
        self.bytes < self.limit
    }

    fn advance(&mut self, mut count: usize) {
        self.bytes = self.bytes.saturating_sub(count);
        self.moved = Some(Instant::now());
        while let Some(piece) = self.pieces.front_mut() {
            if count < piece.len() {
                piece.advance(count);
                break;
            }
            count -= piece.len();
            self.pieces.pop_front();
            self.bytes = self.bytes.saturating_sub(PIECE_OVERHEAD);
        }
        self.wake_for_room();
    }

    fn fail(&mut self) {
        (self.pieces, self.bytes, self.broken) = (VecDeque::new(), 0, true);
        self.wake_for_room();
    }

    fn wake_for_room(&mut self) {
        if self.has_room()
            && let Some(waker) = self.wants_room.take()
        {
            waker.wake();
        }
    }

    /// Sends what the socket takes now; pending while some is left.
    fn poll_send(&mut self, transport: &mut Transport, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pieces.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let filled = slices.iter_mut().zip(&self.pieces);
            let count = filled.map(|(slice, piece)| *slice = IoSlice::new(piece)).count();
            match Pin::new(&mut *transport).poll_write_vectored(cx, &slices[..count]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => self.advance(count),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Pin::new(transport).poll_flush(cx)
    }
}

// === impl UpstreamWire ===

impl UpstreamWire {
    pub(crate) fn new(transport: Transport, peer: Option<SocketAddr>) -> Box<Self> {
        Box::new(UpstreamWire { transport, peer, outgoing: Outgoing::default() })
    }

    /// The address that was dialled; `None` for a path.
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// A handle for queueing what the connection is to send.
    pub(crate) fn outgoing(&self) -> Outgoing {
        self.outgoing.clone()
    }

    /// Whether an idle connection has received nothing, not even its end.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let (mut byte, mut cx) = ([0], Context::from_waker(Waker::noop()));
        Pin::new(&mut self.transport).poll_read(&mut cx, &mut ReadBuf::new(&mut byte)).is_pending()
    }

    /// Sends queued bytes, as far as the socket takes them. Errors are ignored here: an upstream that stopped
    /// reading may have answered, and the read reports the failure.
    fn send(&mut self, cx: &mut Context<'_>) {
        let mut queue = self.outgoing.lock();
        if !queue.broken && matches!(queue.poll_send(&mut self.transport, cx), Poll::Ready(Err(_))) {
            queue.fail();
        }
    }
}

impl AsyncRead for UpstreamWire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.send(cx);
        Pin::new(&mut self.transport).poll_read(cx, buffer)
    }
}

impl AsyncWrite for UpstreamWire {
    /// Drops the bytes that the session writes, a head without fields: `UpstreamHead` has the head that is
    /// sent.
    fn poll_write(self: Pin<&mut Self>, _cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(data.len()))
    }

    /// Does nothing: queued bytes are sent when the answer is read.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for UpstreamWire {
    async fn shutdown(&mut self) {
        // TLS sends a close_notify; an upstream that does not read must not delay the request's end.
        tokio::time::timeout(MAX_SHUTDOWN_TIME, AsyncWriteExt::shutdown(self)).await.ok();
    }
}

impl UniqueID for UpstreamWire {
    fn id(&self) -> UniqueIDType {
        self.transport.id()
    }
}

impl Ssl for UpstreamWire {}

impl Peek for UpstreamWire {}

impl GetTimingDigest for UpstreamWire {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for UpstreamWire {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for UpstreamWire {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        None
    }
}

#[cfg(test)]
mod tests;
