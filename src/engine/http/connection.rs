//! One accepted connection. Its task follows `Control` beside its own work, so that it ends on request.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep_until};

use super::accepted::AcceptedConnection;
use super::connection_state::ConnectionState;
use super::route;

/// A stream that can end with a reset instead of a close.
pub(super) struct ResettableSocket {
    stream: SocketStream,
    connection: Arc<ConnectionState>,
}

enum SocketStream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Serves requests until the client, the idle limit or the server ends the connection.
pub(super) async fn serve<S>(io: S, connection: Arc<ConnectionState>, open: &mut AcceptedConnection)
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
            // A broken connection drops its requests.
            _ = serving.as_mut() => return,
            changed = control.changed() => {
                if changed.is_err() {
                    return;
                }
                let command = *control.borrow_and_update();
                if command.close_all != seen.close_all {
                    return;
                }
                if command.close_idle != seen.close_idle && connection.is_idle() {
                    return;
                }
                *seen = command;
            }
            () = idle.over(&connection) => serving.as_mut().graceful_shutdown(),
        }
    }
}

/// Measures how long a used connection has been idle; an unused one has no limit.
struct IdleTimer {
    limit: Duration,
    since: Instant,
    /// The served requests at the last check: one may begin and end between two checks.
    served: usize,
    fired: bool,
}

impl IdleTimer {
    fn new(limit: Duration) -> Self {
        Self { limit, since: Instant::now(), served: 0, fired: false }
    }

    /// Waits until the connection was idle for the limit. Checks ten times a limit, so it ends at most a
    /// tenth late.
    async fn over(&mut self, connection: &ConnectionState) {
        while !self.fired {
            let served = connection.served();
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

// === impl ResettableSocket ===

impl ResettableSocket {
    pub(super) fn tcp(stream: TcpStream, connection: Arc<ConnectionState>) -> Self {
        Self { stream: SocketStream::Tcp(stream), connection }
    }

    pub(super) fn unix(stream: UnixStream, connection: Arc<ConnectionState>) -> Self {
        Self { stream: SocketStream::Unix(stream), connection }
    }
}

impl Drop for ResettableSocket {
    fn drop(&mut self) {
        if self.connection.ends_with_reset()
            && let SocketStream::Tcp(stream) = &self.stream
        {
            // With a zero linger time the kernel sends RST; if setting it fails, the client sees a plain
            // close.
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
