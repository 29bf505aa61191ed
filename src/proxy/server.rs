//! Accepts connections and hands their requests to the balancer.
//!
//! The accept loop is our own rather than pingora's service: a listener can be handed in (tests use
//! port 0), a connection costs a third less memory, and a stop ends exactly when the last request has
//! ended instead of after a fixed sleep. So are the loops over the requests of a connection, for their
//! deadlines and limits.

pub(crate) mod certificate;
pub(crate) mod connection_limit;
mod connection_server;
mod head;
mod http1;
mod http2;
mod listener;
mod resets;
pub(crate) mod shutdown;

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use pingora::protocols::{SocketDigest, Stream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::wire::{ClientWire, Transport};
use certificate::ListenerCertificate;
use connection_limit::{ConnectionLimiter, ConnectionPermit};
pub(crate) use connection_server::{SharedServer, shared_server};
use head::{HeadReader, IncomingRequest};
use listener::AcceptedSocket;
pub(crate) use listener::Listener;
use shutdown::{Shutdown, ShutdownPhase};

/// How long a new connection may take to send its first bytes once the listener closes.
const FIRST_REQUEST_GRACE: Duration = Duration::from_secs(1);

/// The pause after a failed accept, mostly for lack of file descriptors: connections get time to end.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The most connections that are accepted when a listener closes: as many as the kernel queues for it.
const MAX_BACKLOG: usize = 1024;

/// Serves `listener` until the shutdown begins, then waits for requests in flight; at `ShutdownPhase::Cut`
/// the remaining ones are dropped. Returns the number of connections that were cut. At the connection limit
/// one accepted connection waits for its permit, and further ones wait in the kernel's backlog.
pub(crate) async fn serve(
    listener: Listener,
    server: SharedServer,
    limiter: Arc<ConnectionLimiter>,
    shutdown: Arc<Shutdown>,
    mut phases: watch::Receiver<ShutdownPhase>,
) -> usize {
    let mut connections = JoinSet::new();
    let mut held = None;
    let (close, closing) = watch::channel(false);
    let connection_phases = phases.clone();
    let certificate = listener.certificate().cloned();
    let serve_one = |socket, permit| {
        let serving = connection(socket, permit, certificate.clone(), server.clone(), closing.clone());
        shutdown::end_when_unused(serving, connection_phases.clone())
    };
    let phase = loop {
        tokio::select! {
            biased;
            phase = shutdown::reached(&mut phases, ShutdownPhase::HandedOver) => break phase,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            permit = limiter.acquire(), if held.is_some() => {
                if let Some(socket) = held.take() {
                    connections.spawn(serve_one(socket, permit));
                }
            }
            accepted = listener.accept(), if held.is_none() => match accepted {
                Ok(socket) => match limiter.try_acquire() {
                    Some(permit) => drop(connections.spawn(serve_one(socket, permit))),
                    None => held = Some(socket),
                },
                Err(error) => {
                    server.observer().accept_failed(listener.address(), &error.to_string());
                    tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
                }
            },
        }
    };
    if let Some(socket) = held {
        // Already accepted: no other process can serve it.
        connections.spawn(serve_one(socket, limiter.acquire_beyond_limit()));
    }
    // After a hand-over the successor owns the socket file, and accepts the backlog.
    if phase == ShutdownPhase::HandedOver {
        drop(listener);
    } else {
        listener.unlink();
        // Clients may connect as fast as this accepts.
        for socket in listener.into_backlog().take(MAX_BACKLOG) {
            let Some(permit) = limiter.try_acquire() else { break };
            connections.spawn(serve_one(socket, permit));
        }
    }
    shutdown.announce_close();
    close.send_replace(true);
    end(&mut connections, &shutdown, phases).await
}

/// Waits for the last request, then closes the connections that are still open. Returns the number of
/// connections that `ShutdownPhase::Cut` ended.
async fn end(
    connections: &mut JoinSet<()>,
    shutdown: &Shutdown,
    mut phases: watch::Receiver<ShutdownPhase>,
) -> usize {
    let stopping = phases.clone();
    let quiet = async |phase: ShutdownPhase| {
        let phase = shutdown::reached(&mut stopping.clone(), phase).await;
        shutdown.requests.wait_until_idle(phase).await;
    };
    let ended = async { while connections.join_next().await.is_some() {} };
    let left = tokio::select! {
        biased;
        () = ended => 0,
        () = quiet(ShutdownPhase::HandedOver) => 0,
        () = quiet(ShutdownPhase::Stopping) => 0,
        _ = shutdown::reached(&mut phases, ShutdownPhase::Cut) => connections.len(),
    };
    connections.shutdown().await;
    left
}

/// Serves a connection until it ends.
async fn connection(
    accepted: AcceptedSocket,
    _permit: ConnectionPermit,
    tls: Option<Arc<ListenerCertificate>>,
    server: SharedServer,
    closing: watch::Receiver<bool>,
) {
    let _open = server.observer().connection_open();
    match tls {
        None => {
            let (transport, addresses) = accepted.plain();
            requests(transport, addresses, true, server, closing).await;
        }
        // Boxed, like HTTP/2: inlined, the futures of both would enlarge every plain connection's task.
        Some(certificate) => Box::pin(secure(accepted, certificate, server, closing)).await,
    }
}

async fn secure(
    accepted: AcceptedSocket,
    certificate: Arc<ListenerCertificate>,
    server: SharedServer,
    closing: watch::Receiver<bool>,
) {
    let (transport, addresses) = match timeout(server.limits.handshake, accepted.secure(&certificate)).await {
        Ok(Ok(secured)) => secured,
        Ok(Err(error)) => return server.observer().handshake_failed(&error.to_string()),
        Err(_) => return server.observer().handshake_failed("not finished in time"),
    };
    if transport.is_http2() {
        http2::serve(transport, addresses, BytesMut::new(), server, closing).await;
    } else {
        requests(transport, addresses, false, server, closing).await;
    }
}

/// Serves HTTP/1, or HTTP/2 where the connection begins with the HTTP/2 preface and `preface` is set.
async fn requests(
    mut transport: Transport,
    addresses: Option<Arc<SocketDigest>>,
    preface: bool,
    server: SharedServer,
    mut closing: watch::Receiver<bool>,
) {
    let mut reader = HeadReader::new(server.limits);
    let closed = async {
        drop(closing.wait_for(|closing| *closing).await);
        tokio::time::sleep(FIRST_REQUEST_GRACE).await;
    };
    let has_begun = tokio::select! {
        biased;
        has_begun = reader.begin(&mut transport) => has_begun,
        () = closed => false,
    };
    if !has_begun {
        return;
    }
    let incoming = reader.finish(&mut transport, server.header_bytes(), preface).await;
    match incoming {
        IncomingRequest::Request(head) => {
            let stream: Stream = Box::new(ClientWire::new(transport, addresses));
            http1::serve(stream, head, reader, server, closing).await;
        }
        IncomingRequest::Http2(ahead) => {
            Box::pin(http2::serve(transport, addresses, ahead, server, closing)).await;
        }
        IncomingRequest::Refused(reject) => {
            Box::pin(http1::refuse(
                Box::new(ClientWire::new(transport, addresses)),
                reject,
                server.observer(),
            ))
            .await;
        }
        IncomingRequest::Gone => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn future_size<A, B, C, D, E, F>(_: impl Fn(A, B, C, D, E) -> F) -> usize {
        size_of::<F>()
    }

    /// Each connection has one of these for as long as it lives, also while it is idle.
    #[test]
    fn a_connections_task_is_small() {
        let size = future_size(connection);
        assert!(size <= 1100, "{size} bytes");
    }
}
