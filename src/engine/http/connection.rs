//! One accepted connection: what it is doing, and how it may end.
//!
//! It must never outlive the wish to close it: the connection task looks at `Control` beside its own work.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::route;
use super::shared::EngineShared;

/// What the server wants of its connections; the numbers count wishes, so that each is seen once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Control {
    pub listening: bool,
    pub close_idle: u64,
    pub close_all: u64,
}

/// What one connection is doing.
#[derive(Debug, Default)]
pub struct ConnectionState {
    /// Requests whose answer is not all out.
    busy: AtomicUsize,
    served: AtomicUsize,
    /// Whether it shall end with a reset.
    reset: AtomicBool,
}

/// Marks a connection busy while it lives.
#[derive(Debug)]
pub struct BusyGuard(Arc<ConnectionState>);

/// Counts a connection while it lives, as one of the process that accepted it.
pub struct AcceptedConnection {
    pub shared: Arc<EngineShared>,
    /// Wishes that come after the connection was accepted, however late it begins to look at them.
    pub control: watch::Receiver<Control>,
    accepted: Control,
    _process: Arc<()>,
}

/// A stream that can end with a reset instead of a goodbye.
pub struct ResettableSocket {
    stream: SocketStream,
    connection: Arc<ConnectionState>,
}

enum SocketStream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

// === impl Connection ===

impl ConnectionState {
    pub fn busy(self: &Arc<Self>) -> BusyGuard {
        self.busy.fetch_add(1, Ordering::SeqCst);
        self.served.fetch_add(1, Ordering::SeqCst);
        BusyGuard(Arc::clone(self))
    }

    pub fn end_with_reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
    }

    fn is_idle(&self) -> bool {
        self.busy.load(Ordering::SeqCst) == 0
    }
}

impl BusyGuard {
    pub fn connection(&self) -> &Arc<ConnectionState> {
        &self.0
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

impl AcceptedConnection {
    pub fn new(shared: Arc<EngineShared>) -> Self {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let control = shared.control.subscribe();
        let accepted = *control.borrow();
        let process = shared.process();
        Self { shared, control, accepted, _process: process }
    }

    /// Waits until all connections of its time shall end.
    pub async fn ends(&mut self) {
        let before = self.accepted.close_all;
        // An error means that the server is gone, which is an end too.
        let _ = self.control.wait_for(|now| now.close_all != before).await;
    }
}

impl Drop for AcceptedConnection {
    fn drop(&mut self) {
        self.shared.connections.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Serves requests until the client, the idle limit or the server's wish ends it.
pub async fn serve<S>(io: S, connection: Arc<ConnectionState>, open: &mut AcceptedConnection)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let keep_alive = open.shared.options.keep_alive;
    let service = {
        let (connection, shared) = (Arc::clone(&connection), Arc::clone(&open.shared));
        service_fn(move |request: Request<Incoming>| {
            route::answer(Arc::clone(&shared), connection.busy(), request)
        })
    };
    let mut http = http1::Builder::new();
    let serving = http.auto_date_header(false).serve_connection(TokioIo::new(io), service).with_upgrades();
    let mut serving = pin!(serving);
    let mut idle = IdleTimer::new(keep_alive);
    let AcceptedConnection { control, accepted: seen, .. } = open;
    loop {
        tokio::select! {
            // A broken connection is its client's business; all that was held is dropped with it.
            _ = serving.as_mut() => return,
            changed = control.changed() => {
                if changed.is_err() {
                    return;
                }
                let wish = *control.borrow_and_update();
                if wish.close_all != seen.close_all {
                    return;
                }
                if wish.close_idle != seen.close_idle && connection.is_idle() {
                    return;
                }
                *seen = wish;
            }
            () = idle.over(&connection) => serving.as_mut().graceful_shutdown(),
        }
    }
}

/// Tells when a used connection has been idle for long enough; a fresh one may wait as it likes.
struct IdleTimer {
    limit: Duration,
    since: Instant,
    /// Requests seen so far: one may come and go between two looks.
    served: usize,
    fired: bool,
}

impl IdleTimer {
    fn new(limit: Duration) -> Self {
        Self { limit, since: Instant::now(), served: 0, fired: false }
    }

    /// Looks ten times per limit, so that it ends at most a tenth too late.
    async fn over(&mut self, connection: &ConnectionState) {
        while !self.fired {
            let served = connection.served.load(Ordering::SeqCst);
            if !connection.is_idle() || served == 0 || served != self.served {
                self.served = served;
                self.since = Instant::now();
            }
            if self.since.elapsed() >= self.limit {
                self.fired = true;
                return;
            }
            sleep_until(Instant::now() + self.limit / 10).await;
        }
        std::future::pending().await
    }
}

// === impl Socket ===

impl ResettableSocket {
    pub fn tcp(stream: TcpStream, connection: Arc<ConnectionState>) -> Self {
        Self { stream: SocketStream::Tcp(stream), connection }
    }

    pub fn unix(stream: UnixStream, connection: Arc<ConnectionState>) -> Self {
        Self { stream: SocketStream::Unix(stream), connection }
    }
}

impl Drop for ResettableSocket {
    fn drop(&mut self) {
        if self.connection.reset.load(Ordering::SeqCst)
            && let SocketStream::Tcp(stream) = &self.stream
        {
            // Without a lingering second the kernel says RST; if it refuses, the client sees a plain close.
            let _ = stream.set_zero_linger();
        }
    }
}

impl AsyncRead for ResettableSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            SocketStream::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            SocketStream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for ResettableSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            SocketStream::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            SocketStream::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            SocketStream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            SocketStream::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            SocketStream::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            SocketStream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
