//! A client that shows what is on the wire: headers in order, every chunk of a body apart.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use vllm_lb::engine::batch::Timing;
use vllm_lb::engine::http::{EngineServer, Options};

/// One connection.
pub struct Client<S> {
    stream: BufReader<S>,
}

/// An answer.
#[derive(Debug, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The chunks of a body that came in chunks.
    pub chunks: Vec<String>,
}

/// The engine of most tests: no time passes.
pub fn instant() -> Options {
    Options {
        models: vec!["tiny".to_owned()],
        max_model_len: 4_096,
        timing: Timing::instant(),
        ..Options::default()
    }
}

/// An engine slow enough to be caught at work: a token every 10 ms.
pub fn paced() -> Options {
    Options { timing: Timing::default(), ..instant() }
}

pub async fn connect(engine: &EngineServer) -> Client<TcpStream> {
    Client::new(TcpStream::connect(engine.address()).await.expect("the engine listens"))
}

/// One POST on a connection of its own.
pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    let mut client = Client::new(TcpStream::connect(address).await.expect("the engine listens"));
    client.send("POST", path, &[], body.to_string().as_bytes()).await;
    client.answer().await.expect("an answer")
}

/// One request without a body on a connection of its own.
pub async fn call(address: SocketAddr, method: &str, path: &str) -> Answer {
    let mut client = Client::new(TcpStream::connect(address).await.expect("the engine listens"));
    client.send(method, path, &[], b"").await;
    if method == "HEAD" {
        return client.head().await.expect("a head");
    }
    client.answer().await.expect("an answer")
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub fn new(stream: S) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    /// Sends a request; a body is called JSON unless `headers` say otherwise.
    pub async fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head =
            format!("{method} {path} HTTP/1.1\r\nhost: sim.test\r\ncontent-length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| *name == "content-type") && !body.is_empty() {
            head.push_str("content-type: application/json\r\n");
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend(body);
        self.stream.write_all(&bytes).await.expect("the request can be sent");
    }

    /// The whole answer; an error if the connection ends before it does.
    pub async fn answer(&mut self) -> std::io::Result<Answer> {
        let mut answer = self.head().await?;
        if answer.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk().await? {
                answer.body.extend(chunk.as_bytes());
                answer.chunks.push(chunk);
            }
        } else if let Some(length) = answer.header("content-length") {
            answer.body = vec![0; length.parse().expect("a length")];
            self.stream.read_exact(&mut answer.body).await?;
        }
        Ok(answer)
    }

    /// Status and headers.
    pub async fn head(&mut self) -> std::io::Result<Answer> {
        let status = self.line().await?;
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        let mut answer = Answer { status, ..Answer::default() };
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(answer);
            }
            let (name, value) = line.split_once(": ").expect("a header");
            answer.headers.push((name.to_owned(), value.to_owned()));
        }
    }

    /// One chunk of the body; `None` at its regular end.
    pub async fn chunk(&mut self) -> std::io::Result<Option<String>> {
        let length = self.line().await?;
        let length = usize::from_str_radix(&length, 16).expect("the length of a chunk");
        let mut chunk = vec![0; length + 2];
        self.stream.read_exact(&mut chunk).await?;
        chunk.truncate(length);
        Ok((length > 0).then(|| String::from_utf8(chunk).expect("text")))
    }

    /// Waits for the other side to close; the error if it does so with a reset.
    pub async fn closed(&mut self) -> std::io::Result<()> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await.map(|_| ())
    }

    /// The connection with what was read ahead, for another protocol.
    pub fn into_stream(self) -> BufReader<S> {
        self.stream
    }

    pub fn into_inner(self) -> S {
        self.stream.into_inner()
    }

    async fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    /// The events of a stream: name, if it has one, and data.
    pub fn events(&self) -> Vec<(Option<String>, Value)> {
        events(self.text())
    }
}

/// Parses server-sent events; `[DONE]` becomes a string.
pub fn events(text: &str) -> Vec<(Option<String>, Value)> {
    let blocks = text.split("\n\n").filter(|block| !block.is_empty());
    blocks
        .map(|block| {
            let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
            let data = field("data: ").expect("data");
            let data = serde_json::from_str(data).unwrap_or_else(|_| Value::String(data.to_owned()));
            (field("event: ").map(str::to_owned), data)
        })
        .collect()
}
