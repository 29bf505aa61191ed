//! Accepts connections and hands them to pingora's HTTP engine.
//!
//! The accept loop is our own rather than pingora's service: a listener can be handed in (tests use
//! port 0), a connection costs a third less memory, and a stop ends exactly when the last request has
//! ended instead of after a fixed sleep.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora::protocols::http::ServerSession;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream as Socket;
use pingora::protocols::{GetSocketDigest, SocketDigest, Stream};
use pingora::proxy::HttpProxy;
use pingora::server::configuration::ServerConf;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Balancer;
use super::certificate::Certificate;
use super::connections::{Connections, Seat};
use super::leave::{self, Leave, Phase};
use crate::config::types::{Address, Listen};
use crate::observe;
use crate::observe::metrics::METRICS;

/// A client that starts a TLS handshake and does not finish it holds a socket no longer than this.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A client that connects and says nothing holds a socket no longer than this.
const SILENCE: Duration = Duration::from_secs(60);

/// While serving ends, one that has said nothing yet gets so long to begin.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Seconds for which a connection waits for its next request.
const KEEP_ALIVE: u64 = 60;

/// How a client begins that knows without asking that we speak HTTP/2.
const H2_PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// After a failure to accept, which is mostly a lack of file descriptors, others get time to end.
const BREATHER: Duration = Duration::from_millis(50);

/// Idle connections kept to upstreams, for all upstreams together.
const POOL: usize = 4096;

/// A bound socket, with what it takes to talk on it.
pub struct Listener {
    socket: Bound,
    tls: Option<Arc<Certificate>>,
    /// For records: the address with the port that was really taken.
    address: String,
}

enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds, and loads the certificate where there is one.
    pub async fn bind(listen: &Listen) -> Result<Self, String> {
        let tls = listen.tls.as_ref().map(Certificate::new).transpose()?;
        let say = |address: &dyn std::fmt::Display, error: io::Error| {
            format!("cannot listen on {address}: {error}")
        };
        match &listen.address {
            Address::Tcp(address) => {
                let socket = TcpListener::bind(address).await.map_err(|error| say(address, error))?;
                Self::tcp(socket, tls).map_err(|error| say(address, error))
            }
            Address::Unix(path) => {
                let shown = path.display();
                remove_stale(path).map_err(|error| say(&shown, error))?;
                let socket = UnixListener::bind(path).map_err(|error| say(&shown, error))?;
                Ok(Listener { socket: Bound::Unix(socket), tls, address: format!("unix:{shown}") })
            }
        }
    }

    /// Goes on with a socket that another process has bound to this address and listens on.
    pub fn from_inherited(socket: OwnedFd, listen: &Listen) -> Result<Self, String> {
        let tls = listen.tls.as_ref().map(Certificate::new).transpose()?;
        Self::inherit(socket, listen, tls)
            .map_err(|error| format!("cannot go on listening on {}: {error}", listen.address))
    }

    fn inherit(socket: OwnedFd, listen: &Listen, tls: Option<Arc<Certificate>>) -> io::Result<Self> {
        match &listen.address {
            Address::Tcp(_) => {
                let socket = std::net::TcpListener::from(socket);
                socket.set_nonblocking(true)?;
                Self::tcp(TcpListener::from_std(socket)?, tls)
            }
            Address::Unix(path) => {
                let socket = std::os::unix::net::UnixListener::from(socket);
                socket.set_nonblocking(true)?;
                let socket = UnixListener::from_std(socket)?;
                Ok(Listener { socket: Bound::Unix(socket), tls, address: format!("unix:{}", path.display()) })
            }
        }
    }

    /// Removes the file of a unix socket.
    pub fn unlink(&self) {
        if let Some(path) = self.address.strip_prefix("unix:") {
            std::fs::remove_file(path).ok();
        }
    }

    fn tcp(socket: TcpListener, tls: Option<Arc<Certificate>>) -> io::Result<Self> {
        let address = socket.local_addr()?.to_string();
        Ok(Listener { socket: Bound::Tcp(socket), tls, address })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn certificate(&self) -> Option<&Arc<Certificate>> {
        self.tls.as_ref()
    }

    async fn accept(&self) -> io::Result<Socket> {
        match &self.socket {
            Bound::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
                // A second look at the peer's address would be a system call; accept has told it.
                digest.peer_addr.set(Some(SocketAddr::Inet(peer))).ok();
                let mut socket = Socket::from(stream);
                socket.set_socket_digest(digest);
                Ok(socket)
            }
            Bound::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok(Socket::from(stream))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Bound::Tcp(socket) => socket.as_fd(),
            Bound::Unix(socket) => socket.as_fd(),
        }
    }
}

/// A socket file that a crashed process left behind refuses connections, and may go; a live one may not.
fn remove_stale(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let stale = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path).is_err();
    if stale { std::fs::remove_file(path) } else { Ok(()) }
}

/// Pingora's engine around a balancer.
pub type Engine = Arc<HttpProxy<Balancer>>;

pub fn engine(balancer: Balancer, threads: usize) -> Engine {
    let conf = ServerConf {
        threads,
        upstream_keepalive_pool_size: POOL,
        // Pingora's own bound; how often a request really goes out, `attempt` decides.
        max_retries: 16,
        ..ServerConf::default()
    };
    let mut proxy = HttpProxy::new(balancer, Arc::new(conf));
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    proxy.server_options = Some(options);
    proxy.handle_init_modules();
    Arc::new(proxy)
}

/// Serves `listener` until `told` of a later phase, then lets what is in flight end; when the cut comes
/// first, what is left is dropped. Returns how many connections with requests that were. While there is no
/// seat for it one connection is held, and the rest waits with the kernel.
pub async fn serve(
    listener: Listener,
    proxy: Engine,
    seats: Arc<Connections>,
    leave: Arc<Leave>,
    mut told: watch::Receiver<Phase>,
) -> usize {
    let mut connections = JoinSet::new();
    let mut held = None;
    let (close, closing) = watch::channel(false);
    let phases = told.clone();
    let talk = |socket, seat| {
        let serving = connection(socket, seat, listener.tls.clone(), proxy.clone(), closing.clone());
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
                    observe::accept_failed(&listener.address, &error.to_string());
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

async fn connection(
    socket: Socket,
    _seat: Seat,
    tls: Option<Arc<Certificate>>,
    proxy: Engine,
    closing: watch::Receiver<bool>,
) {
    let _open = Open::new();
    let stream: Stream = match tls {
        None => return plain(socket, proxy, closing).await,
        Some(certificate) => {
            // Boxed: inlined, the handshake would take 6 KiB of every plain connection's task too.
            let handshake = Box::pin(async move { certificate.acceptor.tls_handshake(socket).await });
            match tokio::time::timeout(HANDSHAKE, handshake).await {
                Ok(Ok(stream)) => Box::new(stream),
                Ok(Err(error)) => return observe::handshake_failed(&error.to_string()),
                Err(_) => return observe::handshake_failed("not finished in time"),
            }
        }
    };
    proxy.process_new(stream, &closing).await;
}

/// HTTP/2 by prior knowledge begins with its greeting, anything else is HTTP/1.1. Pingora would wait for as
/// many bytes as the greeting has, without end: a shorter request would never be answered.
async fn plain(mut socket: Socket, proxy: Engine, mut closing: watch::Receiver<bool>) {
    let patience = async {
        let closed = async { drop(closing.wait_for(|closing| *closing).await) };
        tokio::select! {
            () = tokio::time::sleep(SILENCE) => {}
            () = closed => tokio::time::sleep(LAST_WORD).await,
        }
    };
    let greeted = tokio::select! {
        biased;
        greeted = greeting(&mut socket) => Ok(greeted),
        () = patience => Err(()),
    };
    match greeted {
        Ok(Ok(true)) => {
            proxy.process_new(Box::new(socket), &closing).await;
        }
        Ok(Ok(false)) => http1(Box::new(socket), proxy, closing).await,
        // Whoever leaves without a word, or says none for so long, gets none.
        Ok(Err(_)) | Err(_) => {}
    }
}

/// Whether a connection begins with HTTP/2's greeting. What was read is put back.
async fn greeting(socket: &mut Socket) -> io::Result<bool> {
    let mut read = [0; H2_PREFACE.len()];
    let mut length = 0;
    while H2_PREFACE.starts_with(&read[..length]) && length < read.len() {
        match socket.read(&mut read[length..]).await? {
            0 if length == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            0 => break,
            more => length += more,
        }
    }
    socket.rewind(&read[..length]);
    Ok(read == H2_PREFACE)
}

/// One request after another on a connection.
async fn http1(stream: Stream, proxy: Engine, closing: watch::Receiver<bool>) {
    let mut session = ServerSession::new_http1(stream);
    session.set_keepalive((!*closing.borrow()).then_some(KEEP_ALIVE));
    let mut next = proxy.process_new_http(session, &closing).await;
    while let Some((stream, settings)) = next.map(ReusedHttpStream::consume) {
        let mut session = ServerSession::new_http1(stream);
        if let Some(settings) = settings {
            settings.apply_to_session(&mut session);
        }
        next = proxy.process_new_http(session, &closing).await;
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
