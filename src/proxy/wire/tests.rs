//! Wires over transports that take what a script says, and over real ones.

use std::collections::VecDeque;
use std::sync::Mutex;

use pingora::protocols::Stream;
use tokio::io::{AsyncReadExt, DuplexStream, duplex};

use super::*;

impl Carrier for DuplexStream {
    fn id(&self) -> UniqueIDType {
        -1
    }
}

/// Takes as many bytes at a time as the script allows, 0 for "not now", and keeps what each write brought.
#[derive(Clone, Debug, Default)]
struct Scripted(Arc<Mutex<Script>>);

#[derive(Debug, Default)]
struct Script {
    takes: VecDeque<usize>,
    writes: Vec<Vec<u8>>,
    flushes: usize,
}

impl Scripted {
    fn new(takes: &[usize]) -> Self {
        let script = Script { takes: takes.iter().copied().collect(), ..Script::default() };
        Scripted(Arc::new(Mutex::new(script)))
    }

    fn writes(&self) -> Vec<Vec<u8>> {
        self.0.lock().unwrap().writes.clone()
    }

    fn scripted(&self, mut data: Vec<u8>) -> Poll<io::Result<usize>> {
        let mut script = self.0.lock().unwrap();
        let most = script.takes.pop_front().unwrap_or(usize::MAX);
        if most == 0 {
            return Poll::Pending;
        }
        data.truncate(most);
        let taken = data.len();
        script.writes.push(data);
        Poll::Ready(Ok(taken))
    }
}

impl Carrier for Scripted {
    fn id(&self) -> UniqueIDType {
        -1
    }
}

impl AsyncRead for Scripted {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.scripted(data.to_vec())
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.scripted(slices.iter().flat_map(|slice| slice.iter().copied()).collect())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().unwrap().flushes += 1;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn polled<T>(poll: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    poll(&mut Context::from_waker(Waker::noop()))
}

fn bytes(from: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| from.wrapping_add(at as u8)).collect()
}

#[tokio::test]
async fn head_and_short_body_leave_in_one_write_and_the_buffer_is_released() {
    let script = Scripted::default();
    let mut wire = ClientWire::new(script.clone(), None);
    wire.write_all(b"head ").await.unwrap();
    wire.write_all(b"body").await.unwrap();
    assert!(script.writes().is_empty());
    wire.flush().await.unwrap();
    assert_eq!(script.writes(), [b"head body".to_vec()]);
    assert_eq!((wire.gathered.capacity(), wire.sent), (0, 0));
    // A second flush has nothing to write.
    wire.flush().await.unwrap();
    assert_eq!((script.writes().len(), script.0.lock().unwrap().flushes), (1, 2));
}

#[tokio::test]
async fn a_large_body_is_not_copied_and_leaves_with_its_head() {
    let script = Scripted::default();
    let mut wire = ClientWire::new(script.clone(), None);
    let body = bytes(7, MAX_GATHERED_BYTES);
    wire.write_all(b"head").await.unwrap();
    wire.write_all(&body).await.unwrap();
    assert_eq!(script.writes(), [[b"head".as_slice(), &body].concat()]);
    assert_eq!(wire.gathered.capacity(), 0);
}

#[tokio::test]
async fn partial_writes_lose_and_repeat_nothing() {
    // Within the head, at its end, within the body, and refusals between.
    for takes in [vec![2, 0, 1, 0], vec![4, 0, 3], vec![6, 0, 0, 1], vec![1; 30], vec![0, 5, 0, 16 << 10]] {
        let script = Scripted::new(&takes);
        let mut wire = ClientWire::new(script.clone(), None);
        let body = bytes(9, MAX_GATHERED_BYTES + 9);
        assert!(matches!(polled(|cx| Pin::new(&mut wire).poll_write(cx, b"head")), Poll::Ready(Ok(4))));
        let mut rest = body.as_slice();
        while !rest.is_empty() {
            match polled(|cx| Pin::new(&mut wire).poll_write(cx, rest)) {
                Poll::Ready(taken) => rest = &rest[taken.unwrap()..],
                Poll::Pending => {}
            }
        }
        while polled(|cx| Pin::new(&mut wire).poll_flush(cx)).is_pending() {}
        assert_eq!(script.writes().concat(), [b"head".as_slice(), &body].concat(), "{takes:?}");
    }
}

#[tokio::test]
async fn writes_after_a_partial_flush_follow_what_is_left() {
    let script = Scripted::new(&[3, 0, 1]);
    let mut wire = ClientWire::new(script.clone(), None);
    assert!(polled(|cx| Pin::new(&mut wire).poll_write(cx, b"0123456789")).is_ready());
    assert!(polled(|cx| Pin::new(&mut wire).poll_flush(cx)).is_pending());
    assert!(polled(|cx| Pin::new(&mut wire).poll_write(cx, b"abc")).is_ready());
    assert!(polled(|cx| Pin::new(&mut wire).poll_flush(cx)).is_ready());
    assert_eq!(script.writes(), [b"012".to_vec(), b"3".to_vec(), b"456789abc".to_vec()]);
}

#[tokio::test]
async fn a_corked_wire_ignores_one_flush() {
    let script = Scripted::default();
    let mut wire = ClientWire::new(script.clone(), None);
    wire.cork();
    wire.write_all(b"head ").await.unwrap();
    wire.flush().await.unwrap();
    assert!(script.writes().is_empty());
    wire.write_all(b"body").await.unwrap();
    wire.flush().await.unwrap();
    assert_eq!(script.writes(), [b"head body".to_vec()]);
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_an_error() {
    #[derive(Debug)]
    struct Full;
    impl AsyncRead for Full {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }
    impl AsyncWrite for Full {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(0))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }
    impl Carrier for Full {
        fn id(&self) -> UniqueIDType {
            -1
        }
    }
    let mut wire = ClientWire::new(Full, None);
    wire.write_all(b"head").await.unwrap();
    assert_eq!(wire.flush().await.unwrap_err().kind(), io::ErrorKind::WriteZero);
}

#[tokio::test]
async fn a_dropped_wire_sends_what_was_gathered() {
    let script = Scripted::new(&[2]);
    let mut wire = ClientWire::new(script.clone(), None);
    wire.write_all(b"answer").await.unwrap();
    drop(wire);
    assert_eq!(script.writes().concat(), b"answer");
}

/// The head of an answer with a length stayed here until its body was whole.
#[tokio::test]
async fn what_was_gathered_is_sent_when_the_client_is_read() {
    let (near, mut far) = duplex(64);
    let mut wire = ClientWire::new(near, None);
    wire.cork();
    wire.write_all(b"head").await.unwrap();
    wire.flush().await.unwrap();
    let mut byte = [0];
    assert!(polled(|cx| Pin::new(&mut wire).poll_read(cx, &mut ReadBuf::new(&mut byte))).is_pending());
    let mut read = [0; 4];
    far.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"head");
}

/// It stayed here once more, where the connection read the body itself.
#[tokio::test]
async fn nothing_is_gathered_while_the_client_uploads() {
    let (near, mut far) = duplex(64);
    let mut wire = ClientWire::new(near, None);
    wire.take_body(Some(SizedBody { length: 10, received: Bytes::new(), left: 10 }));
    wire.cork();
    wire.write_all(b"head").await.unwrap();
    wire.flush().await.unwrap();
    let mut read = [0; 4];
    far.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"head");
}

#[tokio::test]
async fn a_dropped_wire_does_not_wait_for_its_client() {
    let (near, mut far) = duplex(3);
    let mut wire = ClientWire::new(near, None);
    wire.write_all(b"answer").await.unwrap();
    drop(wire);
    let mut read = Vec::new();
    far.read_to_end(&mut read).await.unwrap();
    assert_eq!(read, b"ans");
}

#[tokio::test(start_paused = true)]
async fn the_end_waits_for_a_reading_client_and_not_for_a_stalled_one() {
    let (near, mut far) = duplex(3);
    let mut wire = ClientWire::new(near, None);
    wire.write_all(b"answer").await.unwrap();
    let mut read = Vec::new();
    let ((), length) = tokio::join!(Shutdown::shutdown(&mut wire), far.read_to_end(&mut read));
    assert_eq!((length.unwrap(), read.as_slice()), (6, b"answer".as_slice()));

    let (near, _stalled) = duplex(3);
    let mut wire = ClientWire::new(near, None);
    wire.write_all(b"answer").await.unwrap();
    let begun = tokio::time::Instant::now();
    Shutdown::shutdown(&mut wire).await;
    assert_eq!(begun.elapsed().as_secs(), MAX_SHUTDOWN_TIME.as_secs());
}

#[tokio::test]
async fn pingora_takes_it_for_a_stream_and_gives_it_back() {
    let (near, mut far) = tokio::net::UnixStream::pair().unwrap();
    let fd = near.as_raw_fd();
    let mut stream: Stream = Box::new(ClientWire::new(Transport::Unix(near), None));
    assert_eq!(stream.id(), fd);
    assert!(stream.get_ssl_digest().is_none() && stream.selected_alpn_proto().is_none());
    stream.write_all(b"through the trait").await.unwrap();
    stream.flush().await.unwrap();
    let mut read = [0; 17];
    far.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"through the trait");
    assert!(stream.into_any().downcast::<ClientWire>().is_ok());
}

/// A wake-up for bytes that had been read was taken for another byte, for which memory was reserved.
#[tokio::test]
async fn a_body_is_read_as_it_comes_and_its_cut_is_an_error() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let here = Transport::Tcp(listener.accept().await.unwrap().0);
    let wire = ClientWire::new(here, None);
    let head = b"POST / HTTP/1.1\r\ncontent-length: 3000\r\n\r\nfirst";
    let mut bytes = BytesMut::from(&head[..]);
    wire.take_body(SizedBody::split(&mut bytes, head.len() - 5));
    assert_eq!((wire.body_length(), wire.take_received()), (Some(3000), Bytes::from_static(b"first")));

    client.write_all(&[b'x'; 1000]).await.unwrap();
    let mut body = BytesMut::with_capacity(4096);
    while body.len() < 1000 {
        let received = wire.received().await.unwrap();
        assert!(received <= 1000 - body.len(), "no more than came");
        assert_eq!(wire.try_read_body(&mut body, received).unwrap(), received);
    }
    assert!(wire.received().now_or_never().is_none(), "nothing else has come");
    assert_eq!(wire.try_read_body(&mut body, 1).unwrap(), 0);

    // The beginning of another request is none of this body.
    client.write_all(&[b'x'; 1995]).await.unwrap();
    client.write_all(b"GET").await.unwrap();
    while body.len() < 2995 {
        let received = wire.received().await.unwrap();
        wire.try_read_body(&mut body, received).unwrap();
    }
    assert!(wire.is_body_done() && wire.received().await.unwrap() == 0);

    wire.take_body(SizedBody::split(&mut BytesMut::from(&head[..]), head.len() - 5));
    let _ = wire.take_received();
    drop(client);
    let mut rest = BytesMut::with_capacity(16);
    let end = loop {
        let received = wire.received().await.unwrap();
        match wire.try_read_body(&mut rest, received) {
            Ok(_) => assert!(rest.len() <= 3),
            Err(error) => break error,
        }
    };
    assert_eq!((end.kind(), &rest[..]), (io::ErrorKind::UnexpectedEof, &b"GET"[..]));
}
