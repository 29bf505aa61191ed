//! A client's connection that gathers writes until it is flushed, or read.
//!
//! Head and body of a short answer leave in one write. Writes that do not fit are not copied: they leave
//! together with what was gathered, in one vectored write. A corked connection ignores the next flush:
//! pingora flushes behind a head, and the first bytes of the body are to leave with it. A connection with
//! nothing to send holds no buffer.

use std::fmt::Debug;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::SslDigest;
use pingora::protocols::{ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, Ssl};
use pingora::protocols::{SocketDigest, TimingDigest, UniqueID, UniqueIDType};
use rustix::io::ioctl_fionread;
use rustls::CommonState;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;

use self::sized_body::SizedBody;

pub(super) mod sized_body;
#[cfg(test)]
mod tests;

/// The number of bytes that are gathered. A write that would exceed it goes to the transport uncopied.
const MAX_GATHERED_BYTES: usize = 16 << 10;

/// The first allocation of the buffer: most heads with a short body fit.
const GATHERED_CAPACITY: usize = 2 << 10;

/// How long a peer that does not read may delay the orderly end of its connection.
const MAX_SHUTDOWN_TIME: Duration = Duration::from_secs(5);

/// A transport under a wire.
pub(super) trait Carrier: AsyncRead + AsyncWrite + Unpin + Debug + Send + Sync + 'static {
    /// The file descriptor of the socket.
    fn id(&self) -> UniqueIDType;

    /// Whether the peer has closed its side, or the connection is broken, as far as the kernel has told.
    fn is_read_closed(&self) -> bool {
        false
    }

    /// Whether it can be read while it is lent: pingora lends its stream, and never for writing.
    fn is_read_shared(&self) -> bool {
        false
    }

    /// Waits until something was received. Returns the number of bytes, or 1 where only reading tells.
    /// At most one task waits.
    fn poll_received(&self, _cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// Reads up to `most` bytes into the room that `buffer` has.
    fn try_read_shared(&self, _buffer: &mut BytesMut, _most: usize) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Lets the connection end with a reset.
    fn end_with_reset(&self) {}

    /// The TLS session, once its handshake is over.
    fn tls(&self) -> Option<&CommonState> {
        None
    }
}

/// The transports that clients and upstreams are reached by. TLS is boxed: its state is large, and most
/// connections are plain.
#[derive(Debug)]
pub(super) enum Transport {
    Tcp(TcpStream),
    Unix(UnixStream),
    TlsTcp(Box<TlsStream<TcpStream>>),
    TlsUnix(Box<TlsStream<UnixStream>>),
}

/// Applies a poll function to the transport that there is.
macro_rules! poll_transport {
    ($self:ident, $poll:ident, $($argument:expr),*) => {
        match $self.get_mut() {
            Transport::Tcp(stream) => Pin::new(stream).$poll($($argument),*),
            Transport::Unix(stream) => Pin::new(stream).$poll($($argument),*),
            Transport::TlsTcp(stream) => Pin::new(stream.as_mut()).$poll($($argument),*),
            Transport::TlsUnix(stream) => Pin::new(stream.as_mut()).$poll($($argument),*),
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        poll_transport!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        poll_transport!(self, poll_write, cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        poll_transport!(self, poll_write_vectored, cx, slices)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        poll_transport!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        poll_transport!(self, poll_shutdown, cx)
    }
}

impl Carrier for Transport {
    fn id(&self) -> UniqueIDType {
        match self {
            Transport::Tcp(stream) => stream.as_raw_fd(),
            Transport::Unix(stream) => stream.as_raw_fd(),
            Transport::TlsTcp(stream) => stream.as_raw_fd(),
            Transport::TlsUnix(stream) => stream.as_raw_fd(),
        }
    }

    fn is_read_closed(&self) -> bool {
        let ready = match self {
            Transport::Tcp(stream) => stream.ready(Interest::READABLE).now_or_never(),
            Transport::Unix(stream) => stream.ready(Interest::READABLE).now_or_never(),
            Transport::TlsTcp(stream) => stream.get_ref().0.ready(Interest::READABLE).now_or_never(),
            Transport::TlsUnix(stream) => stream.get_ref().0.ready(Interest::READABLE).now_or_never(),
        };
        ready.is_some_and(|ready| ready.map_or(true, |ready| ready.is_read_closed() || ready.is_error()))
    }

    /// TLS has a state that each read changes.
    fn is_read_shared(&self) -> bool {
        matches!(self, Transport::Tcp(_) | Transport::Unix(_))
    }

    fn poll_received(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            let received = match self {
                Transport::Tcp(stream) => {
                    ready!(stream.poll_read_ready(cx))?;
                    stream.try_io(Interest::READABLE, || self.available(stream))
                }
                Transport::Unix(stream) => {
                    ready!(stream.poll_read_ready(cx))?;
                    stream.try_io(Interest::READABLE, || self.available(stream))
                }
                Transport::TlsTcp(_) | Transport::TlsUnix(_) => Err(io::ErrorKind::Unsupported.into()),
            };
            match received {
                // Woken for bytes that were read before. The socket is no longer taken for ready.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return Poll::Ready(received),
            }
        }
    }

    fn try_read_shared(&self, buffer: &mut BytesMut, most: usize) -> io::Result<usize> {
        let mut room = (&mut *buffer).limit(most);
        match self {
            Transport::Tcp(stream) => stream.try_read_buf(&mut room),
            Transport::Unix(stream) => stream.try_read_buf(&mut room),
            Transport::TlsTcp(_) | Transport::TlsUnix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn end_with_reset(&self) {
        let stream = match self {
            Transport::Tcp(stream) => stream,
            Transport::TlsTcp(stream) => stream.get_ref().0,
            // Unix sockets have no reset.
            Transport::Unix(_) | Transport::TlsUnix(_) => return,
        };
        // It fails where there is no connection any more.
        let _ = stream.set_zero_linger();
    }

    fn tls(&self) -> Option<&CommonState> {
        match self {
            Transport::Tcp(_) | Transport::Unix(_) => None,
            Transport::TlsTcp(stream) => Some(stream.get_ref().1),
            Transport::TlsUnix(stream) => Some(stream.get_ref().1),
        }
    }
}

impl Transport {
    /// The number of bytes that were received and not read; 1 where only reading tells.
    fn available(&self, stream: impl AsFd) -> io::Result<usize> {
        match ioctl_fionread(stream)? {
            0 if self.is_read_closed() => Ok(1),
            0 => Err(io::ErrorKind::WouldBlock.into()),
            received => Ok(usize::try_from(received).unwrap_or(usize::MAX)),
        }
    }

    /// Whether HTTP/2 was agreed on in the TLS handshake.
    pub(super) fn is_http2(&self) -> bool {
        self.tls().and_then(CommonState::alpn_protocol) == Some(b"h2")
    }
}

/// A connection that gathers what is written until it is flushed.
#[derive(Debug)]
pub(super) struct ClientWire<T: Carrier = Transport> {
    transport: T,
    /// Written and not yet taken by the transport, from `sent` on.
    gathered: Vec<u8>,
    sent: usize,
    /// Something was written behind the last whole flush.
    unflushed: bool,
    /// Ignore the next flush: more will follow that is to leave with what was written.
    corked: AtomicBool,
    /// The connection ends with a reset: nothing says that an answer is whole.
    broken: AtomicBool,
    /// The body of the present request, where pingora does not read it. One task reads, so that the lock is
    /// never waited for.
    body: Mutex<Option<SizedBody>>,
    socket: Option<Arc<SocketDigest>>,
    tls: Option<Arc<SslDigest>>,
}

impl<T: Carrier> ClientWire<T> {
    /// A connection of a client. `socket` has its addresses.
    pub(super) fn new(transport: T, socket: Option<Arc<SocketDigest>>) -> Self {
        let tls = transport.tls().map(digest).map(Arc::new);
        ClientWire {
            transport,
            gathered: Vec::new(),
            sent: 0,
            unflushed: false,
            corked: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            body: Mutex::new(None),
            socket,
            tls,
        }
    }

    /// Whether the client has closed its side, although what it sent is not read yet.
    pub(super) fn is_read_closed(&self) -> bool {
        self.transport.is_read_closed()
    }

    /// Whether bodies can be read here, and not by pingora.
    pub(super) fn is_read_shared(&self) -> bool {
        self.transport.is_read_shared()
    }

    fn body(&self) -> MutexGuard<'_, Option<SizedBody>> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the body of the next request here; `None`: pingora reads it.
    pub(super) fn take_body(&self, body: Option<SizedBody>) {
        *self.body() = body;
    }

    /// The declared length of the body that is read here.
    pub(super) fn body_length(&self) -> Option<u64> {
        self.body().as_ref().map(|body| body.length)
    }

    /// Whether every byte of the body that is read here has been read.
    pub(super) fn is_body_done(&self) -> bool {
        self.body().as_ref().is_none_or(SizedBody::is_done)
    }

    /// Takes what was received with the head of the body.
    pub(super) fn take_received(&self) -> Bytes {
        self.body().as_mut().map(|body| std::mem::take(&mut body.received)).unwrap_or_default()
    }

    /// Whether nothing is left of what was received with the head of the body.
    pub(super) fn is_received_taken(&self) -> bool {
        self.body().as_ref().is_none_or(|body| body.received.is_empty())
    }

    /// Waits for more of the body. Returns the number of bytes that can be read; 0 is the body's end.
    pub(super) async fn received(&self) -> io::Result<usize> {
        let left = self.body().as_ref().map_or(0, |body| body.left);
        if left == 0 {
            return Ok(0);
        }
        let received = poll_fn(|cx| self.transport.poll_received(cx)).await?;
        Ok(received.min(usize::try_from(left).unwrap_or(usize::MAX)))
    }

    /// Reads up to `most` bytes of the body into the room that `buffer` has. Returns their number, which is 0
    /// where nothing was received.
    pub(super) fn try_read_body(&self, buffer: &mut BytesMut, most: usize) -> io::Result<usize> {
        let mut body = self.body();
        let Some(body) = body.as_mut() else { return Ok(0) };
        let most =
            most.min(usize::try_from(body.left).unwrap_or(usize::MAX)).min(buffer.capacity() - buffer.len());
        match self.transport.try_read_shared(buffer, most) {
            Ok(0) if most > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                body.left -= count as u64;
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Ignores the next flush: more will follow that is to leave with what is written before it.
    pub(super) fn cork(&self) {
        self.corked.store(true, Relaxed);
    }

    /// Ends the connection with a reset, for an answer that was cut and whose end is the connection's.
    pub(super) fn end_with_reset(&self) {
        self.broken.store(true, Relaxed);
        self.transport.end_with_reset();
    }

    /// Sends what was gathered and then `more`. Returns how much of `more` the transport took.
    fn drain(&mut self, cx: &mut Context<'_>, more: &[u8]) -> Poll<io::Result<usize>> {
        let mut transport = Pin::new(&mut self.transport);
        while let left @ [_, ..] = &self.gathered[self.sent..] {
            let taken = match more {
                [] => ready!(transport.as_mut().poll_write(cx, left))?,
                more => {
                    let slices = [IoSlice::new(left), IoSlice::new(more)];
                    ready!(transport.as_mut().poll_write_vectored(cx, &slices))?
                }
            };
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_more = taken.saturating_sub(left.len());
            self.sent += taken - of_more;
            if of_more > 0 {
                (self.gathered, self.sent) = (Vec::new(), 0);
                return Poll::Ready(Ok(of_more));
            }
        }
        (self.gathered, self.sent) = (Vec::new(), 0);
        if more.is_empty() { Poll::Ready(Ok(0)) } else { transport.poll_write(cx, more) }
    }
}

/// What pingora reports of a TLS session. Certificates of clients are not requested.
fn digest(tls: &CommonState) -> SslDigest {
    let cipher = tls.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
    let version = tls.protocol_version().and_then(|version| version.as_str());
    SslDigest::new(cipher.unwrap_or_default(), version.unwrap_or_default(), None, None, Vec::new())
}

/// The client of a request that broke within its answer receives what there is of the answer.
impl<T: Carrier> Drop for ClientWire<T> {
    fn drop(&mut self) {
        if self.sent < self.gathered.len() {
            let mut cx = Context::from_waker(Waker::noop());
            if self.drain(&mut cx, &[]).is_ready() {
                // TLS: the records. For the others there is nothing left to do.
                let _ = Pin::new(&mut self.transport).poll_flush(&mut cx);
            }
        }
    }
}

impl<T: Carrier> AsyncRead for ClientWire<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // The balancer waits for its client, or watches it: what was gathered waits no longer. Whether it
        // could be sent, the next write tells.
        if self.unflushed && matches!(self.drain(cx, &[]), Poll::Ready(Ok(_))) {
            self.unflushed = !matches!(Pin::new(&mut self.transport).poll_flush(cx), Poll::Ready(Ok(())));
        }
        Pin::new(&mut self.transport).poll_read(cx, buf)
    }
}

impl<T: Carrier> AsyncWrite for ClientWire<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.unflushed = true;
        // While the client uploads, nothing that pingora reads sends what is gathered.
        let uploads = self.body.get_mut().unwrap_or_else(PoisonError::into_inner);
        let uploads = uploads.as_ref().is_some_and(|body| !body.is_done());
        if uploads || self.gathered.len() + data.len() > MAX_GATHERED_BYTES {
            return self.drain(cx, data);
        }
        if self.gathered.is_empty() {
            self.gathered.reserve(data.len().max(GATHERED_CAPACITY));
        }
        self.gathered.extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(self.corked.get_mut()) {
            return Poll::Ready(Ok(()));
        }
        ready!(self.drain(cx, &[]))?;
        ready!(Pin::new(&mut self.transport).poll_flush(cx))?;
        self.unflushed = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.drain(cx, &[]))?;
        if *self.broken.get_mut() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }
}

#[async_trait]
impl<T: Carrier> Shutdown for ClientWire<T> {
    async fn shutdown(&mut self) {
        drop(tokio::time::timeout(MAX_SHUTDOWN_TIME, AsyncWriteExt::shutdown(self)).await);
    }
}

impl<T: Carrier> UniqueID for ClientWire<T> {
    fn id(&self) -> UniqueIDType {
        self.transport.id()
    }
}

impl<T: Carrier> Ssl for ClientWire<T> {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.tls.clone()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        match self.transport.tls()?.alpn_protocol()? {
            b"h2" => Some(ALPN::H2),
            b"http/1.1" => Some(ALPN::H1),
            _ => None,
        }
    }
}

impl<T: Carrier> Peek for ClientWire<T> {}

impl<T: Carrier> GetTimingDigest for ClientWire<T> {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl<T: Carrier> GetProxyDigest for ClientWire<T> {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl<T: Carrier> GetSocketDigest for ClientWire<T> {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.socket.clone()
    }

    fn set_socket_digest(&mut self, socket: SocketDigest) {
        self.socket = Some(Arc::new(socket));
    }
}
