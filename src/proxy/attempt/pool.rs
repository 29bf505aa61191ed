//! Connections to upstreams: new ones, and idle ones for later requests.
//!
//! vLLM's server closes a connection that was idle for five seconds; one that is reused later would race
//! with that. So a connection is idle for `MAX_IDLE_TIME` at most, is checked before it is used, and is
//! closed by a sweep that runs while connections are idle.
//!
//! Never: give a connection of other settings to an upstream, wait for a resolver.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};

use super::wire::UpstreamWire;
use crate::fleet::Upstream;
use crate::proxy::wire::Transport;
use crate::retry::ConnectFault;

/// How long an idle connection may be used.
const MAX_IDLE_TIME: Duration = Duration::from_secs(4);

/// The idle connections that are kept for one upstream.
const MAX_IDLE_CONNECTIONS: usize = 1024;

/// TCP keepalive: a vanished peer is detected after the sum of these.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
const MAX_UNACKNOWLEDGED_MILLIS: u32 = 60_000;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("its name is not resolved yet")]
    Unresolved,
    #[error("not connected within {0:?}")]
    TimedOut(Duration),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl ConnectError {
    /// The fault for the retry rule and for the fleet.
    pub(crate) fn fault(&self) -> ConnectFault {
        let ConnectError::Io(error) = self else { return ConnectFault::Unreached };
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::CONNREFUSED) => ConnectFault::Refused,
            Some(Errno::MFILE | Errno::NFILE | Errno::ADDRNOTAVAIL | Errno::NOBUFS | Errno::NOMEM) => {
                ConnectFault::NoSocket
            }
            _ => ConnectFault::Unreached,
        }
    }
}

/// Idle connections of all upstreams.
///
/// The lock is a plain mutex: it is held for a push or a pop, never across an await.
#[derive(Default)]
pub(crate) struct ConnectionPool(Arc<Mutex<PoolState>>);

#[derive(Default)]
struct PoolState {
    by_upstream: HashMap<usize, IdleConnections>,
    sweeping: bool,
}

/// The idle connections of one upstream, the longest idle first.
struct IdleConnections {
    /// The settings of these connections: a server keeps its id when its settings change.
    upstream: Arc<Upstream>,
    waiting: VecDeque<(Box<UpstreamWire>, Instant)>,
}

// === impl ConnectionPool ===

impl ConnectionPool {
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection, within `limit`.
    pub(crate) async fn dial(
        &self,
        upstream: &Upstream,
        limit: Duration,
    ) -> Result<Box<UpstreamWire>, ConnectError> {
        let dialed = timeout(limit, dial(upstream)).await;
        let (transport, peer) = dialed.map_err(|_| ConnectError::TimedOut(limit))??;
        Ok(UpstreamWire::new(transport, peer))
    }

    /// An idle connection, if there is a usable one.
    pub(crate) fn idle(&self, upstream: &Arc<Upstream>) -> Option<Box<UpstreamWire>> {
        loop {
            // The lock is not held while a connection is looked at, or closed.
            let (mut wire, since) = {
                let mut state = self.lock();
                let idle = state.by_upstream.get_mut(&upstream.id)?;
                if !idle.is_of(upstream) {
                    // New requests come with the present settings, and old ones only end.
                    let old = std::mem::replace(idle, IdleConnections::new(upstream));
                    drop(state);
                    drop(old);
                    return None;
                }
                idle.waiting.pop_back()?
            };
            // The server's name may have another address by now.
            if wire.peer() == upstream.address() && since.elapsed() < MAX_IDLE_TIME && wire.is_quiet() {
                return Some(wire);
            }
        }
    }

    /// Closes the idle connections of an upstream: one of them had ended, so the others may have ended too.
    pub(crate) fn forget(&self, upstream: &Upstream) {
        let closed = self.lock().by_upstream.remove(&upstream.id);
        // Closed outside of the lock.
        drop(closed);
    }

    /// Keeps a connection whose answer was read to its end and whose send queue is empty, unless newer
    /// requests have come with other settings or with another address.
    pub(crate) fn keep(&self, upstream: &Arc<Upstream>, wire: Box<UpstreamWire>) {
        if wire.peer() != upstream.address() {
            return;
        }
        let mut state = self.lock();
        let idle = state.by_upstream.entry(upstream.id).or_insert_with(|| IdleConnections::new(upstream));
        if idle.waiting.len() >= MAX_IDLE_CONNECTIONS || !idle.is_of(upstream) {
            // Closed outside of the lock.
            drop(state);
            drop(wire);
            return;
        }
        idle.waiting.push_back((wire, Instant::now()));
        if !std::mem::replace(&mut state.sweeping, true) {
            tokio::spawn(sweep(Arc::downgrade(&self.0)));
        }
    }
}

/// Closes connections that were idle for too long, until none is left.
async fn sweep(pool: Weak<Mutex<PoolState>>) {
    loop {
        sleep(MAX_IDLE_TIME / 2).await;
        let Some(pool) = pool.upgrade() else { return };
        let mut state = pool.lock().unwrap_or_else(PoisonError::into_inner);
        let mut closed = Vec::new();
        state.by_upstream.retain(|_, idle| {
            while idle.waiting.front().is_some_and(|(_, since)| since.elapsed() >= MAX_IDLE_TIME) {
                closed.extend(idle.waiting.pop_front());
            }
            !idle.waiting.is_empty()
        });
        state.sweeping = !state.by_upstream.is_empty();
        let over = !state.sweeping;
        drop(state);
        drop(closed);
        if over {
            return;
        }
    }
}

impl IdleConnections {
    fn new(upstream: &Arc<Upstream>) -> Self {
        IdleConnections { upstream: upstream.clone(), waiting: VecDeque::new() }
    }

    fn is_of(&self, upstream: &Arc<Upstream>) -> bool {
        Arc::ptr_eq(&self.upstream, upstream) || self.upstream.connects_as(upstream)
    }
}

/// Connects. Returns the address too, which a path has none of.
async fn dial(upstream: &Upstream) -> Result<(Transport, Option<SocketAddr>), ConnectError> {
    if let Some(path) = &upstream.config.url.unix {
        return Ok((Transport::Unix(UnixStream::connect(path).await?), None));
    }
    let address = upstream.address().ok_or(ConnectError::Unresolved)?;
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    watch_peer(&socket)?;
    let transport = match upstream.tls() {
        None => Transport::Tcp(socket),
        // Boxed: inlined, the handshake would take some KiB of every request's task.
        Some((connector, name)) => {
            let secured = Box::pin(connector.connect(name.clone(), socket)).await?;
            Transport::TlsTcp(Box::new(secured.into()))
        }
    };
    Ok((transport, Some(address)))
}

/// Enables TCP keepalive, which detects a vanished peer.
fn watch_peer(socket: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(socket, MAX_UNACKNOWLEDGED_MILLIS)?;
    Ok(())
}

#[cfg(test)]
mod tests;
