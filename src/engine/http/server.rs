//! The listener of a simulated server: TCP, TLS or a unix socket, which can close and reopen. All
//! connections belong to the accepting task, so that they end with the server.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::accepted::AcceptedConnection;
use super::connection::{self, ResettableSocket};
use super::connection_state::ConnectionState;
use super::fault::InjectedFault;
use super::shared::EngineShared;

/// The largest number of connections that wait to be accepted, as in uvicorn.
const ACCEPT_BACKLOG: u32 = 2_048;
/// The pause between two attempts to bind a port again.
const REBIND_PAUSE: Duration = Duration::from_millis(5);

/// The address of the server.
#[derive(Debug, Clone)]
pub(super) enum EngineAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A socket that the engine listens on.
pub(super) enum EngineListener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A listener that can close and reopen.
///
/// While it is closed, its port stays bound without listening, as with a vLLM that is still loading:
/// connections are refused, and no other process can take the port.
struct ReopeningListener {
    address: EngineAddress,
    listener: Option<EngineListener>,
    held: Option<TcpSocket>,
}

// === impl ReopeningListener ===

impl ReopeningListener {
    async fn close(&mut self) {
        if self.listener.take().is_none() {
            return;
        }
        if let EngineAddress::Tcp(address) = self.address {
            self.held = Some(retried(|| bound(address)).await);
        }
    }

    async fn open(&mut self) {
        if self.listener.is_some() {
            return;
        }
        self.listener = Some(match (&self.address, self.held.take()) {
            (EngineAddress::Tcp(address), held) => {
                let mut held = held;
                let listen = || held.take().map_or_else(|| bound(*address), Ok)?.listen(ACCEPT_BACKLOG);
                EngineListener::Tcp(retried(listen).await)
            }
            (EngineAddress::Unix(path), _) => {
                remove_socket(path);
                EngineListener::Unix(retried(|| UnixListener::bind(path)).await)
            }
        });
    }

    async fn accept(&self, connection: &Arc<ConnectionState>) -> io::Result<ResettableSocket> {
        match &self.listener {
            Some(listener) => listener.accept(connection).await,
            None => std::future::pending().await,
        }
    }
}

/// Returns a socket that is bound to a port without listening.
fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Earlier connections may still use the port.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Tries until it succeeds: connections that are just ending may still block the port.
async fn retried<T>(mut attempt: impl FnMut() -> io::Result<T>) -> T {
    loop {
        if let Ok(done) = attempt() {
            return done;
        }
        tokio::time::sleep(REBIND_PAUSE).await;
    }
}

// === impl EngineListener ===

impl EngineListener {
    async fn accept(&self, connection: &Arc<ConnectionState>) -> io::Result<ResettableSocket> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Each event of a stream is sent at once.
                stream.set_nodelay(true)?;
                Ok(ResettableSocket::tcp(stream, Arc::clone(connection)))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok(ResettableSocket::unix(stream, Arc::clone(connection)))
            }
        }
    }
}

/// Removes the file of a unix socket, if any.
pub(super) fn remove_socket(path: &PathBuf) {
    let _ = std::fs::remove_file(path);
}

/// Builds a TLS acceptor for HTTP/1.1, as for `--ssl-certfile` and `--ssl-keyfile`.
pub(super) fn tls(cert_pem: &str, key_pem: &str) -> io::Result<TlsAcceptor> {
    let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidInput, error);
    let chain = CertificateDer::pem_slice_iter(cert_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| invalid(format!("certificate is not readable as PEM: {error}")))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|error| invalid(format!("key is not readable as PEM: {error}")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| invalid(format!("certificate and key do not fit: {error}")))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts connections while `Control::listening` is set, until dropped.
pub(super) async fn run(
    listener: EngineListener,
    address: EngineAddress,
    acceptor: Option<TlsAcceptor>,
    shared: Arc<EngineShared>,
) {
    let mut control = shared.control.subscribe();
    // A change from before this task started counts too.
    control.mark_changed();
    let mut listener = ReopeningListener { address, listener: Some(listener), held: None };
    let mut connections = JoinSet::new();
    loop {
        let connection = Arc::new(ConnectionState::default());
        tokio::select! {
            accepted = listener.accept(&connection) => {
                let Ok(socket) = accepted else { continue };
                shared.accepted.fetch_add(1, Ordering::SeqCst);
                if shared.faults.strike(|fault| *fault == InjectedFault::CloseAfterAccept).is_some() {
                    continue;
                }
                let open = AcceptedConnection::new(Arc::clone(&shared), Arc::clone(&connection));
                connections.spawn(attend(socket, connection, acceptor.clone(), open));
            }
            changed = control.changed() => {
                if changed.is_err() {
                    return;
                }
                let listening = control.borrow_and_update().listening;
                if listening {
                    listener.open().await;
                } else {
                    listener.close().await;
                }
                shared.listening.send_replace(listening);
            }
            // Collects ended connections, so that the set does not grow.
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn attend(
    socket: ResettableSocket,
    connection: Arc<ConnectionState>,
    acceptor: Option<TlsAcceptor>,
    mut open: AcceptedConnection,
) {
    match acceptor {
        // A failed handshake ends the connection.
        Some(acceptor) => {
            if let Ok(stream) = acceptor.accept(socket).await {
                connection::serve(stream, connection, &mut open).await;
            }
        }
        None => connection::serve(socket, connection, &mut open).await,
    }
}
