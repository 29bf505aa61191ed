//! The listener of a simulated server: TCP, TLS or a unix socket, which can close and come back.
//!
//! It must never keep a connection beyond the server: all of them belong to the accepting task.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::connection::{self, Connection, Control, Open, Socket};
use super::fault::Fault;
use super::shared::Shared;

/// Where it listens, so that it can do so again.
#[derive(Debug, Clone)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

// === impl Listener ===

impl Listener {
    async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
            Address::Unix(path) => {
                remove_socket(path);
                Ok(Self::Unix(UnixListener::bind(path)?))
            }
        }
    }

    async fn accept(&self, connection: &Arc<Connection>) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Each event of a stream shall leave at once.
                stream.set_nodelay(true)?;
                Ok(Socket::tcp(stream, Arc::clone(connection)))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok(Socket::unix(stream, Arc::clone(connection)))
            }
        }
    }
}

/// Takes away the file of a unix socket; there may be none.
pub fn remove_socket(path: &PathBuf) {
    let _ = std::fs::remove_file(path);
}

/// A TLS acceptor for HTTP/1.1, as `--ssl-certfile` and `--ssl-keyfile` make one.
pub fn tls(cert_pem: &str, key_pem: &str) -> io::Result<TlsAcceptor> {
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

/// Accepts until it is dropped, while `Control` says so.
pub async fn run(listener: Listener, address: Address, acceptor: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let mut control = shared.control.subscribe();
    // What was wished before this task began to run is a change too.
    control.mark_changed();
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        let connection = Arc::new(Connection::default());
        tokio::select! {
            accepted = accept(listener.as_ref(), &connection) => {
                let Ok(socket) = accepted else { continue };
                shared.accepted.fetch_add(1, Ordering::SeqCst);
                if shared.faults.strike(|fault| *fault == Fault::CloseAfterAccept).is_some() {
                    continue;
                }
                // Subscribed here, so that no wish is missed between accepting and serving.
                let control = shared.control.subscribe();
                connections.spawn(attend(socket, connection, acceptor.clone(), Arc::clone(&shared), control));
            }
            changed = control.changed() => {
                if changed.is_err() {
                    return;
                }
                let wish = control.borrow_and_update().listening;
                if !wish {
                    listener = None;
                } else if listener.is_none() {
                    // The port may be taken for a moment by a connection that is just ending.
                    listener = Listener::bind(&address).await.ok();
                    if listener.is_none() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                        control.mark_changed();
                    }
                }
                shared.listening.send_replace(listener.is_some());
            }
            // Ended connections are collected, or the set would grow.
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn accept(listener: Option<&Listener>, connection: &Arc<Connection>) -> io::Result<Socket> {
    match listener {
        Some(listener) => listener.accept(connection).await,
        None => std::future::pending().await,
    }
}

async fn attend(
    socket: Socket,
    connection: Arc<Connection>,
    acceptor: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    control: watch::Receiver<Control>,
) {
    let _open = Open::new(Arc::clone(&shared));
    match acceptor {
        // A handshake that fails is the client's loss.
        Some(acceptor) => {
            if let Ok(stream) = acceptor.accept(socket).await {
                connection::serve(stream, connection, shared, control).await;
            }
        }
        None => connection::serve(socket, connection, shared, control).await,
    }
}
