//! Accepts connections and hands them to pingora's HTTP engine.
//!
//! The accept loop is our own rather than pingora's service: a listener can be handed in (tests use
//! port 0), a connection costs a third less memory, and a stop ends exactly when the last request has
//! ended instead of after a fixed sleep.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pingora::apps::{HttpServerOptions, ServerApp};
use pingora::listeners::tls::Acceptor;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream as Socket;
use pingora::protocols::{GetSocketDigest, SocketDigest, Stream};
use pingora::proxy::HttpProxy;
use pingora::server::configuration::ServerConf;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::os::fd::AsRawFd;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Balancer;
use super::connections::{Connections, Seat};
use crate::config::types::{Address, Listen, ListenTls};
use crate::observe;
use crate::observe::metrics::METRICS;

/// A client that starts a TLS handshake and does not finish it holds a socket no longer than this.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// After a failure to accept, which is mostly a lack of file descriptors, others get time to end.
const BREATHER: Duration = Duration::from_millis(50);

/// Idle connections kept to upstreams, for all upstreams together.
const POOL: usize = 4096;

/// A bound socket, with what it takes to talk on it.
pub struct Listener {
    socket: Bound,
    tls: Option<Arc<Acceptor>>,
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
        let tls = listen.tls.as_ref().map(acceptor).transpose()?;
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

    fn tcp(socket: TcpListener, tls: Option<Arc<Acceptor>>) -> io::Result<Self> {
        let address = socket.local_addr()?.to_string();
        Ok(Listener { socket: Bound::Tcp(socket), tls, address })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
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

/// A socket file that a crashed process left behind refuses connections, and may go; a live one may not.
fn remove_stale(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let stale = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path).is_err();
    if stale { std::fs::remove_file(path) } else { Ok(()) }
}

fn acceptor(tls: &ListenTls) -> Result<Arc<Acceptor>, String> {
    let say = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let chain = CertificateDer::pem_file_iter(&tls.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| say(&tls.certificate, &error))?;
    if chain.is_empty() {
        return Err(say(&tls.certificate, &"no certificate in the file"));
    }
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| say(&tls.key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| say(&tls.certificate, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(Acceptor::from_server_config(Arc::new(config))))
}

/// Pingora's engine around a balancer.
pub fn engine(balancer: Balancer, threads: usize) -> Arc<HttpProxy<Balancer>> {
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

/// Serves `listener` until `stop`, then lets what is in flight end. When `cut` comes first, what is left
/// is dropped. Returns how many connections that were. While there is no seat for it one connection is
/// held, and the rest waits with the kernel.
pub async fn serve(
    listener: Listener,
    proxy: Arc<HttpProxy<Balancer>>,
    seats: Arc<Connections>,
    mut stop: watch::Receiver<bool>,
    mut cut: watch::Receiver<bool>,
) -> usize {
    let mut connections = JoinSet::new();
    let mut held = None;
    let shutdown = stop.clone();
    let talk = |socket, seat| {
        let (proxy, tls, shutdown) = (proxy.clone(), listener.tls.clone(), shutdown.clone());
        connection(socket, seat, tls, proxy, shutdown)
    };
    loop {
        tokio::select! {
            biased;
            () = told(&mut stop) => break,
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
    }
    if let Bound::Unix(socket) = &listener.socket {
        unlink(socket);
    }
    drop(listener);
    proxy.cleanup().await;
    let ended = async { while connections.join_next().await.is_some() {} };
    tokio::select! {
        () = ended => 0,
        () = told(&mut cut) => {
            let left = connections.len();
            connections.shutdown().await;
            left
        }
    }
}

/// Waits for the word; that the sender is gone is the word too.
async fn told(word: &mut watch::Receiver<bool>) {
    drop(word.wait_for(|said| *said).await);
}

fn unlink(socket: &UnixListener) {
    let path = socket.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_path_buf));
    if let Some(path) = path {
        std::fs::remove_file(path).ok();
    }
}

async fn connection(
    socket: Socket,
    _seat: Seat,
    tls: Option<Arc<Acceptor>>,
    proxy: Arc<HttpProxy<Balancer>>,
    shutdown: watch::Receiver<bool>,
) {
    let _open = Open::new();
    let stream: Stream = match tls {
        None => Box::new(socket),
        Some(acceptor) => match tokio::time::timeout(HANDSHAKE, acceptor.tls_handshake(socket)).await {
            Ok(Ok(stream)) => Box::new(stream),
            Ok(Err(error)) => return observe::handshake_failed(&error.to_string()),
            Err(_) => return observe::handshake_failed("not finished in time"),
        },
    };
    proxy.process_new(stream, &shutdown).await;
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
