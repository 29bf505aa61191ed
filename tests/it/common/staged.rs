//! An upstream that goes on with its answer when it is told to, a piece at a time.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use vllm_lb::config::types::UpstreamConfig;

use super::{names, upstream};

pub struct Staged {
    address: String,
    pieces: mpsc::Sender<String>,
    task: JoinHandle<()>,
}

type Pieces = Arc<Mutex<mpsc::Receiver<String>>>;

/// More than any test says at once.
const PIECES: usize = 64;

impl Staged {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
        let address = listener.local_addr().expect("a listener has an address").to_string();
        let (pieces, coming) = mpsc::channel(PIECES);
        let coming: Pieces = Arc::new(Mutex::new(coming));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, coming.clone()));
            }
        });
        Staged { address, pieces, task }
    }

    pub fn upstream(&self) -> UpstreamConfig {
        let mut config = upstream(&format!("http://{}", self.address));
        config.models = Some(names(&["sim"]));
        config
    }

    /// Says the head of a stream.
    pub fn begins(&self) {
        self.says("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n");
    }

    /// Says a piece of a chunked answer; an empty one ends it.
    pub fn chunk(&self, text: &str) {
        self.says(&format!("{:x}\r\n{text}\r\n", text.len()));
    }

    pub fn says(&self, bytes: &str) {
        self.pieces.try_send(bytes.to_string()).expect("there is room, and the receiver lives as long");
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers probes, and any other request with the pieces as they come.
async fn serve(mut stream: TcpStream, pieces: Pieces) {
    loop {
        let mut read = Vec::new();
        let end = loop {
            if let Some(end) = memchr::memmem::find(&read, b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                return;
            }
        };
        let head = String::from_utf8_lossy(&read[..end]).to_ascii_lowercase();
        if head.starts_with("get ") {
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
            if stream.write_all(answer).await.is_err() {
                return;
            }
            continue;
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.and_then(|length| length.trim().parse().ok()).unwrap_or(0);
        while read.len() < end + length {
            if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let mut pieces = pieces.lock().await;
        while let Some(piece) = pieces.recv().await {
            if stream.write_all(piece.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}
