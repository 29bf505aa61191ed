//! An upstream that says what it is told, byte for byte: for answers that no vLLM gives, and for breaking
//! off where the simulated one cannot.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use vllm_lb::config::types::UpstreamConfig;

use super::{names, upstream};

/// Heads of the requests it got, other than probes.
type Seen = Arc<Mutex<Vec<String>>>;

/// Bodies as far as they came of requests that broke off.
type CutOff = Arc<Mutex<Vec<Vec<u8>>>>;

pub struct Raw {
    address: String,
    seen: Seen,
    cut_off: CutOff,
    ending: watch::Sender<bool>,
    task: JoinHandle<()>,
}

// === impl Raw ===

impl Raw {
    /// Answers each request with `answer` and closes; probes are answered well.
    pub async fn start(answer: &str) -> Self {
        let raw = Self::holding(answer).await;
        raw.close();
        raw
    }

    /// Answers each request with `answer`, and keeps the connection open until `close`.
    pub async fn holding(answer: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
        let address = listener.local_addr().expect("a listener has an address").to_string();
        let (seen, cut_off, answer) = (Seen::default(), CutOff::default(), answer.to_string());
        let noted = (seen.clone(), cut_off.clone());
        let (ending, end) = watch::channel(false);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, answer.clone(), noted.clone(), end.clone()));
            }
        });
        Raw { address, seen, cut_off, ending, task }
    }

    /// Ends the connections that wait for it, and from now on all after their answer.
    pub fn close(&self) {
        self.ending.send_replace(true);
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// It as an upstream that serves `sim`.
    pub fn upstream(&self) -> UpstreamConfig {
        self.upstream_below("")
    }

    /// It as an upstream whose paths begin with a prefix.
    pub fn upstream_below(&self, prefix: &str) -> UpstreamConfig {
        let mut config = upstream(&format!("http://{}{prefix}", self.address));
        config.models = Some(names(&["sim"]));
        config
    }

    pub fn heads(&self) -> Vec<String> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The heads of requests of clients: the prober's are all GET, and come at any time.
    pub fn posts(&self) -> Vec<String> {
        self.heads().into_iter().filter(|head| head.starts_with("POST ")).collect()
    }

    /// The bodies, as far as they came, of requests whose connection ended before they were whole.
    pub fn cut_off(&self) -> Vec<Vec<u8>> {
        self.cut_off.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    answer: String,
    (seen, cut_off): (Seen, CutOff),
    mut ending: watch::Receiver<bool>,
) {
    let mut read = Vec::new();
    let end = loop {
        if let Some(end) = memchr::memmem::find(&read, b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
            return;
        }
    };
    let head = String::from_utf8_lossy(&read[..end]).into_owned();
    let probe = |path: &str| head.lines().next().is_some_and(|line| line.contains(path));
    if probe("/health ") || probe("/version ") {
        // The client may have disconnected.
        drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await);
        return;
    }
    let field = |wanted: &str| {
        let fields = head.lines().filter_map(|line| line.split_once(':'));
        fields.filter(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim()).next()
    };
    let length = field("content-length").and_then(|length| length.parse::<usize>().ok()).unwrap_or(0);
    let chunked = field("transfer-encoding").is_some();
    // What is left unread would turn the end of the connection into a reset.
    while read.len() < end + length || chunked && !read.ends_with(b"0\r\n\r\n") {
        if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
            cut_off.lock().unwrap_or_else(PoisonError::into_inner).push(read.split_off(end));
            return;
        }
    }
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(head);
    drop(stream.write_all(answer.as_bytes()).await);
    // That the sender is gone ends it too.
    drop(ending.wait_for(|ending| *ending).await);
}
