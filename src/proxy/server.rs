//! Accepts connections and hands their requests to the balancer.
//!
//! The accept loop is our own rather than pingora's service: a listener can be handed in (tests use
//! port 0), a connection costs a third less memory, and a stop ends exactly when the last request has
//! ended instead of after a fixed sleep. So are the loops over the requests of a connection, for their
//! deadlines and limits.

mod head;
mod http1;
mod http2;
mod listener;
mod resets;

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use pingora::protocols::{SocketDigest, Stream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Balancer;
use super::certificate::Certificate;
use super::connections::{Connections, Seat};
use super::leave::{self, Leave, Phase};
use super::wire::{ClientWire, Transport};
use crate::config::types::ConnectionLimits;
use crate::observe;
use crate::observe::metrics::METRICS;
use head::{HeadReader, Incoming};
use listener::Accepted;
pub use listener::Listener;

/// While serving ends, a connection that has sent nothing yet gets so long to begin.
const LAST_WORD: Duration = Duration::from_secs(1);

/// After a failure to accept, which is mostly a lack of file descriptors, others get time to end.
const BREATHER: Duration = Duration::from_millis(50);

/// What serves the connections of a listener: a balancer, and their limits.
pub struct ConnectionServer {
    balancer: Balancer,
    limits: ConnectionLimits,
}

pub type Engine = Arc<ConnectionServer>;

pub fn engine(balancer: Balancer, limits: ConnectionLimits) -> Engine {
    Arc::new(ConnectionServer { balancer, limits })
}

impl ConnectionServer {
    /// The limit of a request's head, as it is configured now.
    fn header_bytes(&self) -> u64 {
        self.balancer.shared.settings.load().header_bytes
    }
}

/// Serves `listener` until `told` of a later phase, then lets what is in flight end; when the cut comes
/// first, what is left is dropped. Returns how many connections with requests that were. While there is no
/// seat for it one connection is held, and the rest waits with the kernel.
pub async fn serve(
    listener: Listener,
    engine: Engine,
    seats: Arc<Connections>,
    leave: Arc<Leave>,
    mut told: watch::Receiver<Phase>,
) -> usize {
    let mut connections = JoinSet::new();
    let mut held = None;
    let (close, closing) = watch::channel(false);
    let phases = told.clone();
    let talk = |socket, seat| {
        let serving =
            connection(socket, seat, listener.certificate().cloned(), engine.clone(), closing.clone());
        leave::connection(serving, phases.clone())
    };
    let phase = loop {
        tokio::select! {
            biased;
            phase = leave::reached(&mut told, Phase::HandedOver) => break phase,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            seat = seats.seat(), if held.is_some() => {
                if let Some(socket) = held.take() {
                    connections.spawn(talk(socket, seat));
                }
            }
            accepted = listener.accept(), if held.is_none() => match accepted {
                Ok(socket) => match seats.try_seat() {
                    Some(seat) => drop(connections.spawn(talk(socket, seat))),
                    None => held = Some(socket),
                },
                Err(error) => {
                    observe::accept_failed(listener.address(), &error.to_string());
                    tokio::time::sleep(BREATHER).await;
                }
            },
        }
    };
    if let Some(socket) = held {
        // It was let in, and has no other door to go to.
        connections.spawn(talk(socket, seats.extra_seat()));
    }
    // Who took the sockets over has the file, too.
    if phase != Phase::HandedOver {
        listener.unlink();
    }
    drop(listener);
    leave.close();
    close.send_replace(true);
    end(&mut connections, &leave, told).await
}

/// Waits until nothing is in flight any more. What then still is open brings no request, or is a peer that
/// does not take leave.
async fn end(connections: &mut JoinSet<()>, leave: &Leave, mut told: watch::Receiver<Phase>) -> usize {
    let stopping = told.clone();
    let quiet = async |phase: Phase| {
        let phase = leave::reached(&mut stopping.clone(), phase).await;
        leave.requests.quiet(phase).await;
    };
    let ended = async { while connections.join_next().await.is_some() {} };
    let left = tokio::select! {
        biased;
        () = ended => 0,
        () = quiet(Phase::HandedOver) => 0,
        () = quiet(Phase::Stopping) => 0,
        _ = leave::reached(&mut told, Phase::Cut) => connections.len(),
    };
    connections.shutdown().await;
    left
}

/// Serves a connection until it ends.
async fn connection(
    accepted: Accepted,
    _seat: Seat,
    tls: Option<Arc<Certificate>>,
    engine: Engine,
    closing: watch::Receiver<bool>,
) {
    let _open = Open::new();
    match tls {
        None => {
            let (transport, addresses) = accepted.plain();
            requests(transport, addresses, true, engine, closing).await;
        }
        // Boxed, as HTTP/2 is: inlined, both would take their memory of every plain connection's task too.
        Some(certificate) => Box::pin(secure(accepted, certificate, engine, closing)).await,
    }
}

async fn secure(
    accepted: Accepted,
    certificate: Arc<Certificate>,
    engine: Engine,
    closing: watch::Receiver<bool>,
) {
    let (transport, addresses) = match timeout(engine.limits.handshake, accepted.secure(&certificate)).await {
        Ok(Ok(secured)) => secured,
        Ok(Err(error)) => return observe::handshake_failed(&error.to_string()),
        Err(_) => return observe::handshake_failed("not finished in time"),
    };
    if transport.is_http2() {
        http2::serve(transport, addresses, BytesMut::new(), engine, closing).await;
    } else {
        requests(transport, addresses, false, engine, closing).await;
    }
}

/// Serves HTTP/1, or HTTP/2 where it begins with its preface and `preface` allows that.
async fn requests(
    mut transport: Transport,
    addresses: Option<Arc<SocketDigest>>,
    preface: bool,
    engine: Engine,
    mut closing: watch::Receiver<bool>,
) {
    let mut reader = HeadReader::new(engine.limits);
    let closed = async {
        drop(closing.wait_for(|closing| *closing).await);
        tokio::time::sleep(LAST_WORD).await;
    };
    let has_begun = tokio::select! {
        biased;
        has_begun = reader.begin(&mut transport) => has_begun,
        () = closed => false,
    };
    if !has_begun {
        return;
    }
    let incoming = reader.finish(&mut transport, engine.header_bytes(), preface).await;
    match incoming {
        Incoming::Request(head) => {
            let stream: Stream = Box::new(ClientWire::new(transport, addresses));
            http1::serve(stream, head, reader, engine, closing).await;
        }
        Incoming::Http2(ahead) => {
            Box::pin(http2::serve(transport, addresses, ahead, engine, closing)).await;
        }
        Incoming::Refused(reject) => {
            Box::pin(http1::refuse(Box::new(ClientWire::new(transport, addresses)), reject)).await;
        }
        Incoming::Gone => {}
    }
}

/// Counts a connection while it lives.
struct Open;

impl Open {
    fn new() -> Self {
        METRICS.connections.inc();
        Open
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        METRICS.connections.dec();
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
