//! The messages between the two processes of an upgrade: JSON behind its length, and sockets.
//!
//! A socket is sent with one byte of its own, so that reading a message never consumes a socket's byte: the
//! kernel would close the socket. Versions may differ: fields may be added, none may change.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::SocketPurpose;

/// The largest message in bytes, enough for some thousand listeners and upstreams.
const MAX_MESSAGE_BYTES: u32 = 1 << 20;

/// A message between the running and the new process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum HandoverMessage {
    /// The new process requests the sockets.
    Take {
        version: String,
        pid: u32,
        /// The new process takes the state over a socket of its own.
        #[serde(default)]
        state: bool,
    },
    /// The running process offers these; their sockets follow in this order.
    Offer { pid: u32, listeners: Vec<OfferedListener>, ready: Vec<String> },
    /// The new process accepts connections.
    Go,
    /// The running process accepts no more connections.
    Gone,
    /// The running process continues.
    Refused(String),
}

/// A listening socket that the running process offers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct OfferedListener {
    pub serves: SocketPurpose,
    pub address: String,
}

/// Whether the process at the other end runs as the same user.
pub(super) fn same_user(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own)
}

/// Sends one message, behind its length.
pub(super) async fn send(stream: &mut UnixStream, message: &HandoverMessage) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= MAX_MESSAGE_BYTES);
    let length = length.ok_or_else(|| io::Error::other("too much to say in one message"))?;
    stream.write_u32(length).await?;
    stream.write_all(&text).await
}

/// Receives one message of a limited length.
pub(super) async fn receive(stream: &mut UnixStream) -> io::Result<HandoverMessage> {
    let length = stream.read_u32().await?;
    if length > MAX_MESSAGE_BYTES {
        return Err(io::Error::other("a message is too long"));
    }
    let mut text = vec![0; length as usize];
    stream.read_exact(&mut text).await?;
    Ok(serde_json::from_slice(&text)?)
}

/// Sends a socket beside one byte.
pub(super) async fn send_socket(stream: &UnixStream, socket: BorrowedFd<'_>) -> io::Result<()> {
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let sockets = [socket];
        if !control.push(SendAncillaryMessage::ScmRights(&sockets)) {
            return Err(io::Error::other("no room for a socket in a message"));
        }
        let sent = sendmsg(stream.as_fd(), &[IoSlice::new(b"s")], &mut control, SendFlags::empty())?;
        if sent == 1 { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    };
    stream.async_io(Interest::WRITABLE, send).await
}

/// Receives the next socket; child processes do not inherit it.
pub(super) async fn receive_socket(stream: &UnixStream) -> io::Result<OwnedFd> {
    let receive = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut pieces = [IoSliceMut::new(&mut byte)];
        let received = recvmsg(stream.as_fd(), &mut pieces, &mut control, RecvFlags::empty())?;
        let sockets = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
            _ => None,
        });
        match sockets.flatten().last() {
            Some(socket) => Ok(socket),
            None if received.bytes == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            None => Err(io::Error::other("a socket is missing: is the limit of open files reached?")),
        }
    };
    let socket = stream.async_io(Interest::READABLE, receive).await?;
    fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[tokio::test]
    async fn receives_messages_and_sockets_in_order() {
        let (mut here, mut there) = UnixStream::pair().expect("a pair");
        assert!(same_user(&here));
        let sockets: Vec<TcpListener> =
            (0..3).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
        let named = |at: usize| OfferedListener { serves: SocketPurpose::Api, address: at.to_string() };
        let offer = HandoverMessage::Offer { pid: 7, listeners: (0..3).map(named).collect(), ready: vec![] };
        send(&mut here, &offer).await.expect("sent");
        for socket in &sockets {
            send_socket(&here, socket.as_fd()).await.expect("sent");
        }
        send(&mut here, &HandoverMessage::Gone).await.expect("sent");
        let HandoverMessage::Offer { listeners, .. } = receive(&mut there).await.expect("received") else {
            panic!("is no offer")
        };
        assert_eq!(listeners.len(), 3);
        for socket in sockets {
            let address = socket.local_addr().expect("is bound");
            drop(socket);
            let taken = TcpListener::from(receive_socket(&there).await.expect("received"));
            assert_eq!(taken.local_addr().expect("is bound"), address);
            TcpStream::connect(address).expect("still listens");
        }
        assert!(matches!(receive(&mut there).await.expect("received"), HandoverMessage::Gone));
        drop(here);
        assert!(receive(&mut there).await.is_err());
        assert!(receive_socket(&there).await.is_err());
    }

    #[tokio::test]
    async fn rejects_invalid_messages() {
        for bytes in
            [&b"\0\0\0\x02{}"[..], b"\xff\xff\xff\xff", b"\0\0\0\x09{\"take\":", b"GET / HTTP/1.1\r\n\r\n"]
        {
            let (mut here, mut there) = UnixStream::pair().expect("a pair");
            here.write_all(bytes).await.expect("written");
            drop(here);
            assert!(receive(&mut there).await.is_err(), "{bytes:?}");
        }
    }
}
