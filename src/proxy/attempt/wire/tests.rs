//! Tests of the connection to an upstream that reads or answers at odd times.

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

use super::*;

async fn pair() -> (TcpStream, Box<UpstreamWire>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (listener.accept().await.unwrap().0, UpstreamWire::new(Transport::Tcp(here), None))
}

#[tokio::test]
async fn sends_queued_bytes_while_the_answer_is_awaited() {
    let (mut upstream, mut wire) = pair().await;
    let (outgoing, large) = (wire.outgoing(), vec![b'x'; 4 << 20]);
    outgoing.push(Bytes::from_static(b"head "));
    wire.write_all(b"the session's head").await.unwrap();
    wire.flush().await.unwrap();
    outgoing.push(large.clone().into());
    assert!(!outgoing.is_sent() && !outgoing.has_room(), "nothing has been sent yet");
    let server = tokio::spawn(async move {
        let mut got = vec![0; 5 + (4 << 20)];
        upstream.read_exact(&mut got).await.unwrap();
        upstream.write_all(b"answer").await.unwrap();
        got
    });
    let mut answer = [0; 6];
    wire.read_exact(&mut answer).await.unwrap();
    assert_eq!((&answer, outgoing.is_sent()), (b"answer", true));
    let got = server.await.unwrap();
    assert!(got.starts_with(b"head xxx") && got[5..] == large[..]);
}

/// Regression: an upload stalled for ever once the queue was full, since its task was not woken.
#[tokio::test]
async fn wakes_for_room_while_the_answer_is_awaited() {
    let (mut upstream, mut wire) = pair().await;
    let outgoing = wire.outgoing();
    outgoing.push(vec![b'x'; 4 << 20].into());
    let server = tokio::spawn(async move {
        let mut got = vec![0; 4 << 20];
        upstream.read_exact(&mut got).await.unwrap();
        upstream
    });
    let mut byte = [0];
    tokio::select! {
        _ = wire.read_exact(&mut byte) => panic!("nothing was answered"),
        () = outgoing.room() => {}
    }
    let kept = async { wire.read_exact(&mut byte).await };
    tokio::select! {
        _ = kept => panic!("nothing was answered"),
        upstream = server => drop(upstream.unwrap()),
    }
    assert!(outgoing.is_sent());
}

#[tokio::test]
async fn reads_an_answer_from_an_upstream_that_does_not_read() {
    let (mut upstream, mut wire) = pair().await;
    let outgoing = wire.outgoing();
    outgoing.push(vec![b'x'; 64 << 20].into());
    upstream.write_all(b"413").await.unwrap();
    let mut answer = [0; 3];
    wire.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"413");
    assert!(!outgoing.has_room() && outgoing.stuck_since().is_some());
}

#[tokio::test]
async fn idle_connection_is_quiet_until_bytes_arrive() {
    let (mut upstream, mut wire) = pair().await;
    assert!(wire.is_quiet());
    upstream.write_all(b"x").await.unwrap();
    wire.transport_readable().await;
    assert!(!wire.is_quiet());
    let (upstream, mut wire) = pair().await;
    drop(upstream);
    wire.transport_readable().await;
    assert!(!wire.is_quiet(), "its end came");
}

impl UpstreamWire {
    async fn transport_readable(&self) {
        if let Transport::Tcp(socket) = &self.transport {
            socket.readable().await.unwrap();
        }
    }
}
