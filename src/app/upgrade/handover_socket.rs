//! The running process's side of an upgrade: the socket at which a new process requests the listening
//! sockets.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

use super::wire::{self, HandoverMessage, OfferedListener};
use super::{InheritedSockets, ListeningSocket, SocketPurpose, StateSource};
use crate::fleet::Fleet;
use crate::observe::process;

/// The longest time in which a new process starts to serve after it got the sockets.
const SUCCESSOR_START_TIMEOUT: Duration = Duration::from_secs(60);

/// The time limit of the first message of a process that connects.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause after a failure to accept.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The handover socket, and the listening sockets that it hands over.
pub(crate) struct HandoverSocket {
    path: PathBuf,
    listener: UnixListener,
    /// The identity of the socket's file, to recognise it later.
    file: Option<FileIdentity>,
    sockets: Vec<ListeningSocket>,
}

/// The inode and the modification time of a file; an inode alone may be reused.
type FileIdentity = (u64, i64, i64);

/// The process that accepts in place of this one, and waits for `Gone`.
pub(crate) struct Successor {
    stream: UnixStream,
    pub pid: u32,
}

impl HandoverSocket {
    /// Opens the socket at `path`, or uses the inherited one. `sockets` are the listening sockets to hand
    /// over.
    pub(crate) fn open(
        path: &Path,
        taken: &mut InheritedSockets,
        sockets: Vec<ListeningSocket>,
    ) -> io::Result<Self> {
        let listener = match taken.take(SocketPurpose::Upgrade, &path.display().to_string()) {
            Some(socket) => net::UnixListener::from(socket),
            None => bind(path)?,
        };
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(HandoverSocket { path: path.into(), listener, file: file(path), sockets })
    }

    /// Waits until another process serves in place of this one. A failed attempt changes nothing.
    pub(crate) async fn relieved(&self, fleet: &Fleet, state: impl Fn() -> StateSource) -> Successor {
        loop {
            let Ok((mut stream, _)) = self.listener.accept().await else {
                sleep(ACCEPT_RETRY_PAUSE).await;
                continue;
            };
            let handed = timeout(SUCCESSOR_START_TIMEOUT, self.hand(&mut stream, fleet, &state)).await;
            let why = match handed {
                Ok(Ok(Some(pid))) => return Successor { stream, pid },
                // Another balancer with the same path has looked whether a process listens.
                Ok(Ok(None)) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it took too long".into(),
            };
            process::upgrade_failed(&why);
            // Sending fails when the new process has ended.
            timeout(FIRST_MESSAGE_TIMEOUT, wire::send(&mut stream, &HandoverMessage::Refused(why)))
                .await
                .ok();
        }
    }

    /// Hands over the sockets and waits for `Go`. Returns the process id of the successor; `None` where the
    /// other process only connected.
    async fn hand(
        &self,
        stream: &mut UnixStream,
        fleet: &Fleet,
        state: &impl Fn() -> StateSource,
    ) -> io::Result<Option<u32>> {
        if !wire::same_user(stream) {
            return Err(io::Error::other("it is another user's"));
        }
        let hello = timeout(FIRST_MESSAGE_TIMEOUT, wire::receive(stream)).await;
        let (version, pid, takes_state) = match hello.map_err(|_| io::ErrorKind::TimedOut)? {
            Ok(HandoverMessage::Take { version, pid, state }) => (version, pid, state),
            Ok(_) => return Err(io::Error::other("it does not ask for sockets")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        };
        process::upgrade_requested(pid, &version, self.sockets.len());
        let own =
            OfferedListener { serves: SocketPurpose::Upgrade, address: self.path.display().to_string() };
        let others = self.sockets.iter();
        let others = others.map(|ListeningSocket { serves, address, .. }| OfferedListener {
            serves: *serves,
            address: address.clone(),
        });
        let offered_state = if takes_state { offer_state(state()) } else { None };
        let connection = offered_state
            .as_ref()
            .map(|_| OfferedListener { serves: SocketPurpose::State, address: String::new() });
        let listeners = others.chain([own]).chain(connection).collect();
        let ready = fleet.snapshot_owned().ready().map(|entry| entry.upstream.name().to_string()).collect();
        wire::send(stream, &HandoverMessage::Offer { pid: std::process::id(), listeners, ready }).await?;
        for ListeningSocket { socket, .. } in &self.sockets {
            wire::send_socket(stream, socket.as_fd()).await?;
        }
        wire::send_socket(stream, self.listener.as_fd()).await?;
        if let Some(connection) = offered_state {
            wire::send_socket(stream, connection.as_fd()).await?;
        }
        match wire::receive(stream).await {
            Ok(HandoverMessage::Go) => Ok(Some(pid)),
            Ok(_) => Err(io::Error::other("it said something else than that it serves")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(io::Error::other("it ended before it served"))
            }
            Err(error) => Err(error),
        }
    }

    /// Removes the file, unless another process has replaced it.
    pub(crate) fn close(self) {
        if self.file.is_some() && file(&self.path) == self.file {
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Opens a connection on which the state is served until the other end closes; returns the other end.
/// Without it the successor starts without the state.
fn offer_state(source: StateSource) -> Option<OwnedFd> {
    let (here, there) = net::UnixStream::pair().ok()?;
    here.set_nonblocking(true).ok()?;
    let here = UnixStream::from_std(here).ok()?;
    tokio::spawn(async move {
        match source.serve(here).await {
            // The new process has failed, or takes no state.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => process::state_not_sent(&error.to_string()),
            Ok(()) => {}
        }
    });
    Some(there.into())
}

impl Successor {
    /// Reports that this process accepts no more connections.
    pub(crate) async fn gone(mut self) {
        timeout(FIRST_MESSAGE_TIMEOUT, wire::send(&mut self.stream, &HandoverMessage::Gone)).await.ok();
    }
}

fn file(path: &Path) -> Option<FileIdentity> {
    fs::metadata(path).map(|found| (found.ino(), found.mtime(), found.mtime_nsec())).ok()
}

/// Binds the socket for this user alone. The file is renamed once its mode is set, and replaces the file of
/// a crashed process; a socket with a listener stays.
fn bind(path: &Path) -> io::Result<net::UnixListener> {
    if net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::other(
            "another process has it: give each balancer an upgrade_socket of its own",
        ));
    }
    if fs::symlink_metadata(path).is_ok_and(|found| !is_socket(&found)) {
        return Err(io::Error::other("a file that is no socket stands there"));
    }
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}", std::process::id()));
    let draft = PathBuf::from(draft);
    fs::remove_file(&draft).ok();
    let listener = net::UnixListener::bind(&draft)?;
    let named =
        fs::set_permissions(&draft, Permissions::from_mode(0o600)).and_then(|()| fs::rename(&draft, path));
    if let Err(error) = named {
        fs::remove_file(&draft).ok();
        return Err(error);
    }
    Ok(listener)
}

fn is_socket(found: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    found.file_type().is_socket()
}

/// Returns a second handle on a socket, which keeps it open in the kernel.
pub(crate) fn handle(serves: SocketPurpose, address: String, of: &impl AsFd) -> io::Result<ListeningSocket> {
    let socket: OwnedFd = of.as_fd().try_clone_to_owned()?;
    Ok(ListeningSocket { serves, address, socket })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn creates_a_private_file_and_replaces_a_stale_one() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("upgrade.sock");
        drop(net::UnixListener::bind(&path).expect("a free path"));
        let open = || HandoverSocket::open(&path, &mut InheritedSockets::default(), Vec::new());
        let handover = open().expect("the stale file goes");
        assert_eq!(fs::metadata(&path).expect("is there").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).expect("is there").count(), 1);
        assert!(open().is_err(), "another process listens there");
        handover.close();
        assert!(!path.exists());
        fs::write(&path, "precious").expect("written");
        assert!(open().is_err());
        assert_eq!(fs::read_to_string(&path).expect("is there"), "precious");
    }

    #[tokio::test]
    async fn keeps_the_file_of_another_process() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("upgrade.sock");
        let first =
            HandoverSocket::open(&path, &mut InheritedSockets::default(), Vec::new()).expect("a free path");
        fs::remove_file(&path).expect("is there");
        let second =
            HandoverSocket::open(&path, &mut InheritedSockets::default(), Vec::new()).expect("a free path");
        first.close();
        assert!(path.exists());
        second.close();
        assert!(!path.exists());
    }
}
