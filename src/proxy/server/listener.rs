//! Bound sockets, and the connections that are accepted on them.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use pingora::protocols::SocketDigest;
use pingora::protocols::l4::socket::SocketAddr;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::certificate::ListenerCertificate;
use crate::config::types::{Listen, ListenAddress};
use crate::proxy::wire::Transport;

/// The most connections of a backlog that may fail before a listener closes.
const MAX_ACCEPT_FAILURES: usize = 16;

/// A bound socket with its certificate, if it serves TLS.
pub(crate) struct Listener {
    socket: BoundSocket,
    tls: Option<Arc<ListenerCertificate>>,
    /// For records: the address with the port that was really taken.
    address: String,
}

enum BoundSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection that was accepted.
pub(super) enum AcceptedSocket {
    Tcp(TcpStream, Arc<SocketDigest>),
    Unix(UnixStream),
}

impl Listener {
    /// Binds, and loads the certificate where there is one.
    pub(crate) async fn bind(listen: &Listen) -> Result<Self, String> {
        let tls = Self::read_certificate(listen)?;
        let say = |address: &dyn Display, error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => format!(
                "cannot listen on {address}: {error}: another process has it, perhaps a vLLM; choose another \
                 address by listen (--listen) or admin.address (--admin)"
            ),
            io::ErrorKind::PermissionDenied => format!(
                "cannot listen on {address}: {error}: ports below 1024 need CAP_NET_BIND_SERVICE; give it, \
                 or choose a port above by listen (--listen)"
            ),
            io::ErrorKind::AddrNotAvailable => format!(
                "cannot listen on {address}: {error}: this machine does not have the address; 0.0.0.0 or \
                 [::] stand for all that it has"
            ),
            _ => format!("cannot listen on {address}: {error}"),
        };
        match &listen.address {
            ListenAddress::Tcp(address) => {
                let socket = TcpListener::bind(address).await.map_err(|error| say(address, error))?;
                Self::tcp(socket, tls).map_err(|error| say(address, error))
            }
            ListenAddress::Unix(path) => {
                let shown = path.display();
                remove_stale(path).map_err(|error| say(&shown, error))?;
                let socket = UnixListener::bind(path).map_err(|error| say(&shown, error))?;
                Ok(Listener { socket: BoundSocket::Unix(socket), tls, address: format!("unix:{shown}") })
            }
        }
    }

    fn read_certificate(listen: &Listen) -> Result<Option<Arc<ListenerCertificate>>, String> {
        let tls = listen.tls.as_ref().map(ListenerCertificate::new).transpose();
        tls.map_err(|problem| format!("listen: tls of {}: {problem}", listen.address))
    }

    /// Takes over a listening socket that another process has bound to this address.
    pub(crate) fn from_inherited(socket: OwnedFd, listen: &Listen) -> Result<Self, String> {
        let tls = Self::read_certificate(listen)?;
        Self::inherit(socket, listen, tls)
            .map_err(|error| format!("cannot go on listening on {}: {error}", listen.address))
    }

    fn inherit(socket: OwnedFd, listen: &Listen, tls: Option<Arc<ListenerCertificate>>) -> io::Result<Self> {
        match &listen.address {
            ListenAddress::Tcp(_) => {
                let socket = std::net::TcpListener::from(socket);
                socket.set_nonblocking(true)?;
                Self::tcp(TcpListener::from_std(socket)?, tls)
            }
            ListenAddress::Unix(path) => {
                let socket = std::os::unix::net::UnixListener::from(socket);
                socket.set_nonblocking(true)?;
                let socket = UnixListener::from_std(socket)?;
                Ok(Listener {
                    socket: BoundSocket::Unix(socket),
                    tls,
                    address: format!("unix:{}", path.display()),
                })
            }
        }
    }

    /// Removes the file of a unix socket.
    pub(crate) fn unlink(&self) {
        if let Some(path) = self.address.strip_prefix("unix:") {
            std::fs::remove_file(path).ok();
        }
    }

    fn tcp(socket: TcpListener, tls: Option<Arc<ListenerCertificate>>) -> io::Result<Self> {
        let address = socket.local_addr()?.to_string();
        Ok(Listener { socket: BoundSocket::Tcp(socket), tls, address })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn certificate(&self) -> Option<&Arc<ListenerCertificate>> {
        self.tls.as_ref()
    }

    /// Accepts one connection, with the addresses that pingora records of it.
    pub(super) async fn accept(&self) -> io::Result<AcceptedSocket> {
        match &self.socket {
            BoundSocket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                AcceptedSocket::tcp(stream, peer)
            }
            BoundSocket::Unix(listener) => Ok(AcceptedSocket::Unix(listener.accept().await?.0)),
        }
    }

    /// The connections that the kernel has established and no accept has returned, without a wait for more.
    /// The listener closes with the iterator. Closing resets what is still in the backlog, and a client may
    /// have sent its request by then.
    pub(super) fn into_backlog(self) -> Box<dyn Iterator<Item = AcceptedSocket> + Send> {
        match self.socket {
            BoundSocket::Tcp(listener) => Box::new(backlog(listener.into_std(), |listener| {
                let (stream, peer) = listener.accept()?;
                stream.set_nonblocking(true)?;
                AcceptedSocket::tcp(TcpStream::from_std(stream)?, peer)
            })),
            BoundSocket::Unix(listener) => Box::new(backlog(listener.into_std(), |listener| {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(AcceptedSocket::Unix(UnixStream::from_std(stream)?))
            })),
        }
    }
}

/// What `accept` returns until it would block. A connection that has failed meanwhile is skipped.
fn backlog<L>(
    listener: io::Result<L>,
    accept: impl Fn(&L) -> io::Result<AcceptedSocket>,
) -> impl Iterator<Item = AcceptedSocket> {
    let (listener, mut failures) = (listener.ok(), 0);
    std::iter::from_fn(move || {
        while failures < MAX_ACCEPT_FAILURES {
            match accept(listener.as_ref()?) {
                Ok(socket) => return Some(socket),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                // That of the connection, or a limit of open files, which stays.
                Err(_) => failures += 1,
            }
        }
        None
    })
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            BoundSocket::Tcp(socket) => socket.as_fd(),
            BoundSocket::Unix(socket) => socket.as_fd(),
        }
    }
}

impl AcceptedSocket {
    fn tcp(stream: TcpStream, peer: std::net::SocketAddr) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
        // A second look at the peer's address would be a system call; accept has told it.
        digest.peer_addr.set(Some(SocketAddr::Inet(peer))).ok();
        Ok(AcceptedSocket::Tcp(stream, Arc::new(digest)))
    }

    /// The connection without TLS, and its addresses; a client on a unix socket has none.
    pub(super) fn plain(self) -> (Transport, Option<Arc<SocketDigest>>) {
        match self {
            AcceptedSocket::Tcp(stream, digest) => (Transport::Tcp(stream), Some(digest)),
            AcceptedSocket::Unix(stream) => (Transport::Unix(stream), None),
        }
    }

    /// The connection with TLS, after its handshake.
    pub(super) async fn secure(
        self,
        certificate: &ListenerCertificate,
    ) -> io::Result<(Transport, Option<Arc<SocketDigest>>)> {
        match self {
            AcceptedSocket::Tcp(stream, digest) => {
                let stream = certificate.acceptor.accept(stream).await?;
                Ok((Transport::TlsTcp(Box::new(stream.into())), Some(digest)))
            }
            AcceptedSocket::Unix(stream) => {
                let stream = certificate.acceptor.accept(stream).await?;
                Ok((Transport::TlsUnix(Box::new(stream.into())), None))
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
