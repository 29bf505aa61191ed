//! An HTTP/2 connection: its streams and its limits.
//!
//! Pingora's own loop ends an idle connection without GOAWAY and does not count resets.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::{H2Accept, H2Options, HttpSession, handshake};
use pingora::protocols::{Digest, SocketDigest, Stream, UniqueIDType};
use rustls::CommonState;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use super::connection_server::SharedServer;
use super::resets::ResetWatch;
use crate::proxy::wire::{Carrier, ClientWire, Transport};

/// The number of streams that a client may have open at once.
const MAX_STREAMS: u32 = 256;

/// The number of streams reset by the client that wait to be accepted: these cost no request yet.
const MAX_UNACCEPTED_RESETS: usize = 100;

/// The number of malformed requests after which a connection ends.
const MAX_MALFORMED: u32 = 32;

/// The list of header fields may exceed `limits.header_bytes` by this before the protocol refuses it: up
/// to there, the refusal is the balancer's own.
const HEADER_LIST_MARGIN: u64 = 8 << 10;

/// A client that was sent GOAWAY and has no stream is disconnected after this.
const MAX_GOAWAY_TIME: Duration = Duration::from_secs(5);

/// The error codes of the protocol (RFC 9113, section 7).
const ENHANCE_YOUR_CALM: u32 = 0xb;

/// A transport that counts the client's resets.
#[derive(Debug)]
struct ResetWatchedTransport {
    transport: Transport,
    /// Received before it was known to be HTTP/2.
    ahead: BytesMut,
    resets: ResetWatch,
    abused: Arc<Notify>,
}

impl Carrier for ResetWatchedTransport {
    fn id(&self) -> UniqueIDType {
        self.transport.id()
    }

    fn tls(&self) -> Option<&CommonState> {
        self.transport.tls()
    }
}

impl AsyncRead for ResetWatchedTransport {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        if this.ahead.is_empty() {
            ready!(Pin::new(&mut this.transport).poll_read(cx, buf))?;
        } else {
            let length = this.ahead.len().min(buf.remaining());
            buf.put_slice(&this.ahead.split_to(length));
        }
        if this.resets.is_abused(&buf.filled()[before..], Instant::now()) {
            this.abused.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ResetWatchedTransport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write_vectored(cx, slices)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }
}

/// The streams of a connection that are being served.
#[derive(Default)]
struct OpenStreams {
    count: AtomicUsize,
    ended: Notify,
}

/// One stream, while it is served.
struct StreamGuard(Arc<OpenStreams>);

impl OpenStreams {
    fn begin(self: &Arc<Self>) -> StreamGuard {
        self.count.fetch_add(1, Ordering::SeqCst);
        StreamGuard(self.clone())
    }

    /// Waits until there has been no stream for so long.
    async fn idle(&self, time: Duration) {
        while self.count.load(Ordering::SeqCst) > 0 {
            self.ended.notified().await;
        }
        sleep(time).await;
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.ended.notify_one();
        }
    }
}

fn options(header_bytes: u64) -> H2Options {
    let mut options = H2Options::default();
    options
        .max_header_list_size(u32::try_from(header_bytes + HEADER_LIST_MARGIN).unwrap_or(u32::MAX))
        .max_concurrent_streams(MAX_STREAMS)
        .max_pending_accept_reset_streams(MAX_UNACCEPTED_RESETS);
    options
}

/// Serves the streams of a connection until it ends. `ahead` was received already.
pub(super) async fn serve(
    transport: Transport,
    socket: Option<Arc<SocketDigest>>,
    ahead: BytesMut,
    server: SharedServer,
    mut closing: watch::Receiver<bool>,
) {
    let abused = Arc::new(Notify::new());
    let watched =
        ResetWatchedTransport { transport, ahead, resets: ResetWatch::new(), abused: abused.clone() };
    let stream: Stream = Box::new(ClientWire::new(watched, socket));
    let digest = Arc::new(Digest {
        ssl_digest: stream.get_ssl_digest(),
        timing_digest: stream.get_timing_digest(),
        proxy_digest: stream.get_proxy_digest(),
        socket_digest: stream.get_socket_digest(),
    });
    let handshake = handshake(stream, Some(options(server.header_bytes())));
    let Ok(Ok(mut connection)) = timeout(server.limits.head, handshake).await else { return };
    let streams = Arc::new(OpenStreams::default());
    let (for_streams, mut malformed, mut patience) = (closing.clone(), 0, server.limits.idle);
    let mut is_ending = false;
    let why = loop {
        let accepted = tokio::select! {
            biased;
            () = async { drop(closing.wait_for(|closing| *closing).await) }, if !is_ending => None,
            () = abused.notified() => break "resets",
            accepted = HttpSession::from_h2_conn(&mut connection, digest.clone()) => Some(accepted),
            () = streams.idle(patience) => {
                // The client has not closed after GOAWAY: it is gone.
                if is_ending {
                    return;
                }
                None
            }
        };
        match accepted {
            None => {
                connection.graceful_shutdown();
                (is_ending, patience) = (true, MAX_GOAWAY_TIME);
            }
            Some(Ok(Some(H2Accept::Session(session)))) => {
                let (server, is_closing, guard) = (server.clone(), *for_streams.borrow(), streams.begin());
                tokio::spawn(async move {
                    let _guard = guard;
                    server.balancer.serve(ServerSession::new_http2(session), is_closing).await;
                });
            }
            Some(Ok(Some(H2Accept::Rejected))) => {
                malformed += 1;
                if malformed == MAX_MALFORMED {
                    break "malformed";
                }
            }
            // The connection is over, by itself or by an error of it.
            Some(Ok(None) | Err(_)) => return,
        }
    };
    server.observer().connection_ended(why);
    connection.abrupt_shutdown(ENHANCE_YOUR_CALM.into());
    let farewell = async { while connection.accept().await.is_some_and(|accepted| accepted.is_ok()) {} };
    drop(timeout(MAX_GOAWAY_TIME, farewell).await);
}
