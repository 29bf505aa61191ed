//! Replaces a running process by a new one without a failed connection: `vllm-lb -u`.
//!
//! ```text
//! running process                         new process
//!   listens on upgrade_socket  <--------    take       (its version)
//!   offer, then the sockets    -------->    builds its listeners from them
//!   continues to serve                      waits until its upstreams are ready
//!   run-time changes, index    -------->    takes them over (see `state_transfer`)
//!                                           accepts, on the same sockets
//!   accepts no more            <--------    go
//!   gone                       -------->    is the running process, listens on upgrade_socket
//!   lets its requests end, ends
//! ```
//!
//! Both processes hold the same sockets in the kernel, so that no connection is refused or reset meanwhile.
//! A failure before `go` leaves the running process unchanged: it never ends without a successor.

mod handover_socket;
mod state_transfer;
mod wire;

use std::os::fd::OwnedFd;
use std::os::unix::net;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;

pub(super) use handover_socket::{HandoverSocket, Successor, handle};
pub(super) use state_transfer::{ReceivedState, StateSource};
use wire::{HandoverMessage, OfferedListener};

use crate::config::types::Listen;
use crate::fleet::Fleet;
use crate::proxy::server::Listener;

/// The time limit of an answer: a process of this program answers at once unless it hangs.
const OFFER_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest time that a new process waits for its upstreams before it takes over.
const MAX_READY_WAIT: Duration = Duration::from_secs(10);

/// The purpose of a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SocketPurpose {
    Api,
    Admin,
    Upgrade,
    /// No listener: the connection over which the state is handed over.
    State,
}

impl SocketPurpose {
    /// The name of the purpose in messages and logs.
    pub(super) fn label(self) -> &'static str {
        match self {
            SocketPurpose::Api => "api",
            SocketPurpose::Admin => "admin",
            SocketPurpose::Upgrade => "upgrade",
            SocketPurpose::State => "state",
        }
    }
}

/// A listening socket with its configured address, which may differ from the bound one (`localhost:8000`,
/// port 0).
#[derive(Debug)]
pub(super) struct ListeningSocket {
    pub serves: SocketPurpose,
    pub address: String,
    pub socket: OwnedFd,
}

/// The inherited sockets that are not in use yet.
#[derive(Default)]
pub(super) struct InheritedSockets(Vec<ListeningSocket>);

/// The process that handed over its sockets and waits for `Go`.
pub(super) struct Predecessor {
    stream: UnixStream,
    pub pid: u32,
    /// The names of the upstreams that are ready in that process.
    ready: Vec<String>,
    /// The connection for the state; `None` when that process hands none over.
    state: Option<OwnedFd>,
}

/// Requests the sockets of the process that listens at `path`.
pub(super) async fn take_over(path: &Path) -> Result<(InheritedSockets, Predecessor), String> {
    let shown = path.display();
    let stream = UnixStream::connect(path).await.map_err(|error| {
        format!(
            "no running process hands its sockets over at {shown}: {error}; if one runs, its log says \
             \"no socket for upgrades\" and why, or its upgrade_socket is another: set one that it can \
             create, and restart it once; if none runs, start without --upgrade"
        )
    })?;
    if !wire::same_user(&stream) {
        return Err(format!("the process at {shown} is another user's"));
    }
    match timeout(OFFER_TIMEOUT, take(stream)).await {
        Ok(Ok(taken)) => Ok(taken),
        Ok(Err(error)) => Err(format!("cannot take the sockets over at {shown}: {error}")),
        Err(_) => Err(format!("the process at {shown} does not answer")),
    }
}

async fn take(mut stream: UnixStream) -> Result<(InheritedSockets, Predecessor), String> {
    let said = |error: std::io::Error| error.to_string();
    let version = env!("CARGO_PKG_VERSION").to_string();
    wire::send(&mut stream, &HandoverMessage::Take { version, pid: std::process::id(), state: true })
        .await
        .map_err(said)?;
    let (pid, listeners, ready) = match wire::receive(&mut stream).await.map_err(said)? {
        HandoverMessage::Offer { pid, listeners, ready } => (pid, listeners, ready),
        HandoverMessage::Refused(why) => return Err(why),
        _ => return Err("the answer is not an offer".into()),
    };
    let (mut sockets, mut state) = (Vec::new(), None);
    for OfferedListener { serves, address } in listeners {
        let socket = wire::receive_socket(&stream).await.map_err(said)?;
        match serves {
            SocketPurpose::State => state = Some(socket),
            _ => sockets.push(ListeningSocket { serves, address, socket }),
        }
    }
    Ok((InheritedSockets(sockets), Predecessor { stream, pid, ready, state }))
}

// === impl InheritedSockets ===

impl InheritedSockets {
    /// Returns a listener over the inherited socket for this address, or over a new one.
    pub(super) async fn listener(
        &mut self,
        serves: SocketPurpose,
        listen: &Listen,
    ) -> Result<Listener, String> {
        match self.take(serves, &listen.address.to_string()) {
            Some(socket) => Listener::from_inherited(socket, listen),
            None => Listener::bind(listen).await,
        }
    }

    fn take(&mut self, serves: SocketPurpose, address: &str) -> Option<OwnedFd> {
        let exactly = |socket: &ListeningSocket| socket.serves == serves && socket.address == address;
        // An address may have changed its purpose. With port 0 an address means several sockets.
        let similarly = |socket: &ListeningSocket| socket.address == address && !address.ends_with(":0");
        let found = self.0.iter().position(exactly).or_else(|| self.0.iter().position(similarly))?;
        Some(self.0.remove(found).socket)
    }

    /// Closes the sockets that were not used, and removes the files of unix sockets among them: these files
    /// were handed over with their sockets.
    pub(super) fn close(self) {
        for ListeningSocket { address, .. } in self.0 {
            if let Some(path) = address.strip_prefix("unix:") {
                std::fs::remove_file(path).ok();
            }
        }
    }
}

// === impl Predecessor ===

impl Predecessor {
    /// Waits until every upstream that is ready in the old process is ready here too. The wait is short,
    /// since an upstream may go down meanwhile. Fails when this process lacks some of these upstreams
    /// because their source does not answer: the old process still has them.
    pub(super) async fn caught_up(&self, fleet: &Fleet) -> Result<(), String> {
        let mut changes = fleet.changes();
        let known = || {
            let snapshot = fleet.snapshot();
            let unready = |name: &String| match snapshot.by_name(name) {
                Some(_) => !snapshot.ready().any(|entry| entry.upstream.name() == name),
                None => snapshot.awaits(),
            };
            snapshot.any_ready() && !self.ready.iter().any(unready)
        };
        let waiting = async {
            while !known() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        // Upstreams that are not ready by then are handled as any that are down.
        drop(timeout(MAX_READY_WAIT, waiting).await);
        let snapshot = fleet.snapshot();
        let missing = self.ready.iter().filter(|name| snapshot.by_name(name).is_none()).count();
        if snapshot.awaits() && missing > 0 {
            return Err(format!(
                "a source of upstreams does not answer, and {missing} that the running process has would be \
                 lost: it goes on"
            ));
        }
        Ok(())
    }

    /// Requests the state of that process; fails with the reason when there is none to take over.
    pub(super) async fn state(&mut self) -> Result<ReceivedState, String> {
        let socket = self.state.take().ok_or("the running process is of a release that hands none over")?;
        let stream = net::UnixStream::from(socket);
        let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
        let received = async { state_transfer::receive(stream?).await };
        received.await.map_err(|error| error.to_string())
    }

    /// Reports that this process accepts, so that the old one may end. Fails when the old process continues.
    pub(super) async fn go(mut self) -> Result<(), String> {
        let asked = async {
            wire::send(&mut self.stream, &HandoverMessage::Go).await?;
            wire::receive(&mut self.stream).await
        };
        match timeout(OFFER_TIMEOUT, asked).await {
            Ok(Ok(HandoverMessage::Refused(why))) => Err(format!("the running process goes on: {why}")),
            // The old process has ended, with or without its last message: this process has to serve.
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets(of: &[(SocketPurpose, &str)]) -> InheritedSockets {
        let socket = || OwnedFd::from(std::fs::File::open("/dev/null").expect("is there"));
        let made = |(serves, address): &(SocketPurpose, &str)| ListeningSocket {
            serves: *serves,
            address: address.to_string(),
            socket: socket(),
        };
        InheritedSockets(of.iter().map(made).collect())
    }

    fn left(sockets: &InheritedSockets) -> Vec<(SocketPurpose, &str)> {
        sockets.0.iter().map(|socket| (socket.serves, socket.address.as_str())).collect()
    }

    #[test]
    fn finds_a_socket_by_purpose_and_address() {
        let zero = "127.0.0.1:0";
        let mut had =
            sockets(&[(SocketPurpose::Admin, zero), (SocketPurpose::Api, zero), (SocketPurpose::Api, "a:1")]);
        assert!(had.take(SocketPurpose::Api, zero).is_some());
        assert!(
            had.take(SocketPurpose::Api, zero).is_none(),
            "the admin listener must not become a public one"
        );
        assert!(had.take(SocketPurpose::Admin, "a:1").is_some(), "a port that changed its purpose");
        assert!(had.take(SocketPurpose::Api, "b:1").is_none());
        assert_eq!(left(&had), [(SocketPurpose::Admin, zero)]);
    }

    #[test]
    fn closes_unused_sockets_and_removes_their_files() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("old.sock");
        std::fs::write(&path, "").expect("written");
        let had = sockets(&[
            (SocketPurpose::Api, &format!("unix:{}", path.display())),
            (SocketPurpose::Api, "a:1"),
        ]);
        had.close();
        assert!(!path.exists());
    }
}
