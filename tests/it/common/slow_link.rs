//! A TCP proxy that delays what the server answers, as a long or crowded way to it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// Pieces that are on their way at most; a connection with more waits.
const MAX_PIECES: usize = 10_000;

/// Bytes of a piece at most.
const PIECE_BYTES: usize = 64 << 10;

pub struct SlowLink {
    pub port: u16,
    /// In milliseconds.
    delay: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

// === impl SlowLink ===

impl SlowLink {
    /// Forwards to a port on this machine, at first without delay.
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
        let own = listener.local_addr().expect("it is bound").port();
        let delay = Arc::<AtomicU64>::default();
        let task = tokio::spawn(serve(listener, port, delay.clone()));
        SlowLink { port: own, delay, task }
    }

    /// Delays all answers from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.delay.store(delay.as_millis() as u64, Relaxed);
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, port: u16, delay: Arc<AtomicU64>) {
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
        // Pieces are sent as they come, so that the delay is the only one.
        client.set_nodelay(true).and(server.set_nodelay(true)).expect("sockets have the option");
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        tokio::spawn(forward(from_client, to_server, Arc::default()));
        tokio::spawn(forward(from_server, to_client, delay.clone()));
    }
}

/// Each piece leaves so long after it came; both ends are closed with the first one.
async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: Arc<AtomicU64>) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Bytes)>(MAX_PIECES);
    let write = async {
        while let Some((due, piece)) = pieces.recv().await {
            sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                break;
            }
        }
        // The other side may be closed already.
        to.shutdown().await.ok();
    };
    let read = async move {
        let mut piece = vec![0; PIECE_BYTES];
        while let Ok(length @ 1..) = from.read(&mut piece).await {
            let due = Instant::now() + Duration::from_millis(delay.load(Relaxed));
            if sender.send((due, Bytes::copy_from_slice(&piece[..length]))).await.is_err() {
                break;
            }
        }
    };
    tokio::join!(read, write);
}
