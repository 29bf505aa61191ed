//! An HTTP/1.1 client that shows what really is on the wire: it sends any bytes, well formed or not, and
//! tells how an answer's body was framed and whether it came to its end.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::PATIENCE;

pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// One connection.
pub struct Wire {
    stream: Box<dyn Stream>,
    /// What was read and not yet asked for.
    read: BytesMut,
    pub patience: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// So many bytes are still to come.
    Length(u64),
    Chunked,
    /// The connection's end is the body's end.
    Close,
}

#[derive(Clone, Debug)]
pub struct Head {
    pub status: u16,
    pub headers: HeaderMap,
    pub framing: Framing,
}

#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Sizes of the pieces in which it came.
    pub pieces: Vec<usize>,
    /// Whether the body came to the end that its framing promises.
    pub whole: bool,
}

/// A request with a body of known length, if it has one.
pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = head(method, path, headers);
    if !body.is_empty() || matches!(method, "POST" | "PUT") {
        bytes.truncate(bytes.len() - 2);
        bytes.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// A request's head; a host is added unless there is one.
pub fn head(method: &str, path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        text.push_str("host: balancer.test\r\n");
    }
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// The request with another host than the one that is added by `head`.
pub fn with_host(request: &[u8], host: &str) -> Vec<u8> {
    const ADDED: &[u8] = b"\r\nhost: balancer.test\r\n";
    match memchr::memmem::find(request, ADDED) {
        Some(at) => {
            let (before, rest) = (&request[..at], &request[at + ADDED.len()..]);
            [before, b"\r\nhost: ", host.as_bytes(), b"\r\n", rest].concat()
        }
        None => request.to_vec(),
    }
}

pub const JSON: (&str, &str) = ("content-type", "application/json");
pub const CHUNKED: (&str, &str) = ("transfer-encoding", "chunked");

/// A JSON request.
pub fn post(path: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    request("POST", path, &[JSON], body.as_ref())
}

pub fn get(path: &str) -> Vec<u8> {
    request("GET", path, &[], b"")
}

/// Asks for a websocket.
pub fn upgrade(path: &str) -> Vec<u8> {
    let headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    request("GET", path, &headers, b"")
}

/// One chunk of a chunked body; an empty one ends it.
pub fn chunk(bytes: &[u8]) -> Vec<u8> {
    let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
    chunk.extend_from_slice(bytes);
    chunk.extend_from_slice(b"\r\n");
    chunk
}

// === impl Wire ===

impl Wire {
    /// `host:port` or `unix:/path`, as a listener tells its address.
    pub async fn connect(address: &str) -> Self {
        match address.strip_prefix("unix:") {
            Some(path) => Self::over(UnixStream::connect(path).await.expect("the socket takes connections")),
            None => Self::over(tcp(address).await),
        }
    }

    pub fn over(stream: impl Stream + 'static) -> Self {
        Wire { stream: Box::new(stream), read: BytesMut::new(), patience: PATIENCE }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.expect("the balancer takes what is sent");
    }

    /// Sends what may be refused while it is sent.
    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        let sending = async {
            self.stream.write_all(bytes.as_ref()).await?;
            self.stream.flush().await
        };
        timeout(self.patience, sending).await.expect("what is sent is taken in time")
    }

    /// Says that nothing more will be sent.
    pub async fn finish(&mut self) {
        self.stream.shutdown().await.expect("an open connection can be half closed");
    }

    /// Sends a request and reads its answer.
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> Answer {
        self.send(request).await;
        self.answer().await
    }

    /// Sends a request and reads an answer that has a head only, as HEAD's has.
    pub async fn ask_head(&mut self, request: impl AsRef<[u8]>) -> Answer {
        self.send(request).await;
        let Head { status, headers, .. } = self.head().await;
        Answer { status, headers, body: Bytes::new(), pieces: Vec::new(), whole: true }
    }

    pub async fn answer(&mut self) -> Answer {
        let head = self.head().await;
        self.body(head).await
    }

    /// The next head that is no `100 Continue`.
    pub async fn head(&mut self) -> Head {
        loop {
            let head = self.any_head().await.expect("an answer comes");
            if head.status != 100 {
                return head;
            }
        }
    }

    /// The next head, informational ones too; `None` where the connection ends without one.
    pub async fn any_head(&mut self) -> Option<Head> {
        loop {
            if let Some(end) = find(&self.read, b"\r\n\r\n") {
                let text = self.read.split_to(end + 4).freeze();
                return Some(parse_head(&text));
            }
            if !self.more().await.unwrap_or(false) {
                assert!(self.read.is_empty(), "the connection ended within a head: {:?}", self.read);
                return None;
            }
        }
    }

    /// Reads a body to its end, or to where the connection breaks.
    pub async fn body(&mut self, head: Head) -> Answer {
        let Head { status, headers, mut framing } = head;
        let (mut body, mut pieces) = (BytesMut::new(), Vec::new());
        let whole = loop {
            match self.piece(&mut framing).await {
                Ok(Some(piece)) => {
                    pieces.push(piece.len());
                    body.extend_from_slice(&piece);
                }
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        Answer { status, headers, body: body.freeze(), pieces, whole }
    }

    /// The next piece of a body: a whole chunk where it comes in chunks. `None` is its proper end.
    pub async fn piece(&mut self, framing: &mut Framing) -> io::Result<Option<Bytes>> {
        match framing {
            Framing::Length(0) => Ok(None),
            Framing::Length(left) => {
                if self.read.is_empty() && !self.more().await? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let most = usize::try_from(*left).unwrap_or(usize::MAX).min(self.read.len());
                *left -= most as u64;
                Ok(Some(self.read.split_to(most).freeze()))
            }
            Framing::Close => {
                if self.read.is_empty() && !self.more().await? {
                    return Ok(None);
                }
                Ok(Some(self.read.split().freeze()))
            }
            Framing::Chunked => self.chunk().await,
        }
    }

    async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        let line = self.line().await?;
        let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
        let digits = std::str::from_utf8(digits).expect("a chunk's size is text");
        let size = usize::from_str_radix(digits, 16).expect("a chunk's size is a number");
        if size == 0 {
            while !self.line().await?.is_empty() {}
            return Ok(None);
        }
        while self.read.len() < size + 2 {
            self.more_or_cut().await?;
        }
        let piece = self.read.split_to(size).freeze();
        assert_eq!(&self.read[..2], b"\r\n", "a chunk ends with a line's end");
        self.read.advance(2);
        Ok(Some(piece))
    }

    async fn line(&mut self) -> io::Result<Bytes> {
        loop {
            if let Some(end) = find(&self.read, b"\r\n") {
                let line = self.read.split_to(end).freeze();
                self.read.advance(2);
                return Ok(line);
            }
            self.more_or_cut().await?;
        }
    }

    /// Whatever comes until the balancer ends the connection, however it does.
    pub async fn rest(&mut self) -> Bytes {
        while self.more().await.unwrap_or(false) {}
        self.read.split().freeze()
    }

    /// Everything that came so far and was not asked for.
    pub fn left(&self) -> &[u8] {
        &self.read
    }

    /// So many raw bytes, as they are behind an upgrade.
    pub async fn exactly(&mut self, length: usize) -> Bytes {
        while self.read.len() < length {
            self.more_or_cut().await.expect("the bytes come");
        }
        self.read.split_to(length).freeze()
    }

    /// Reads what is there; false at the end of the connection.
    async fn more(&mut self) -> io::Result<bool> {
        let reading = timeout(self.patience, self.stream.read_buf(&mut self.read));
        let read = reading.await.unwrap_or_else(|_| {
            let seen = String::from_utf8_lossy(&self.read);
            panic!("nothing more came in {:?}, after {seen:?}", self.patience)
        });
        Ok(read? > 0)
    }

    async fn more_or_cut(&mut self) -> io::Result<()> {
        if self.more().await? { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// A connection on which small pieces leave at once.
pub async fn tcp(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).await.expect("the listener takes connections");
    stream.set_nodelay(true).expect("a fresh socket takes options");
    stream
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, what)
}

fn parse_head(text: &[u8]) -> Head {
    let text = std::str::from_utf8(text).expect("a head is text");
    let mut lines = text.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("{status_line:?} is no status line"));
    let mut headers = HeaderMap::new();
    for line in lines.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("{line:?} is no header"));
        let name = HeaderName::try_from(name).expect("the balancer sends valid names");
        headers.append(name, HeaderValue::try_from(value.trim()).expect("and valid values"));
    }
    let number = |name: &str| headers.get(name)?.to_str().ok()?.parse().ok();
    let bodiless = matches!(status, 100..200 | 204 | 304);
    let framing = match number("content-length") {
        _ if bodiless => Framing::Length(0),
        Some(length) => Framing::Length(length),
        None if headers.contains_key("transfer-encoding") => Framing::Chunked,
        None => Framing::Close,
    };
    Head { status, headers, framing }
}

// === impl Answer ===

impl Answer {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is text")
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// A header's value, `""` where there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The answer, if it has this status and came whole.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!((self.status, self.whole), (status, true), "{:?} {:?}", self.headers, self.body);
        self
    }
}
