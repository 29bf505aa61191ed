//! Requests over HTTP/1.1 on connections of their own, and answers in chunks, to a length or to the end of
//! the connection.

use std::time::Duration;

use memchr::memmem;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// The longest time that an answer may take.
const MAX_ANSWER_TIME: Duration = Duration::from_secs(300);

/// How much of the end of an answer is kept: the counts of tokens are in its last event but one.
const KEPT_BYTES: usize = 4_096;

/// An answer that came whole.
pub struct StreamedAnswer {
    /// When the first piece of the body arrived.
    pub first: Instant,
    pub end: Instant,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
}

/// How the body of an answer ends.
enum BodyEnd {
    Chunked(ChunkState),
    Length(usize),
    Connection,
}

/// What the next bytes of a body in chunks are.
enum ChunkState {
    /// A line with a size.
    Size,
    /// So many bytes of data.
    Data(usize),
    /// The line's end behind the data.
    Gap,
    /// What follows the last chunk.
    Trailer,
}

/// The undecoded bytes of an answer, and the body as far as it is decoded.
struct AnswerReader {
    stream: TcpStream,
    raw: Vec<u8>,
    body: Vec<u8>,
    received: usize,
}

// === impl AnswerReader ===

impl AnswerReader {
    async fn send(address: &str, request: &[u8]) -> Result<Self, String> {
        let mut stream = TcpStream::connect(address).await.map_err(|error| format!("connecting: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        stream.write_all(request).await.map_err(|error| format!("sending: {error}"))?;
        Ok(AnswerReader { stream, raw: Vec::with_capacity(8_192), body: Vec::new(), received: 0 })
    }

    /// Reads more; `false` is the end of the connection.
    ///
    /// The kernel is asked to acknowledge at once, each time anew: a server that waits for an acknowledgement
    /// between head and body would wait 40 ms, which count as many times as time is faster.
    async fn more(&mut self) -> Result<bool, String> {
        self.stream.set_quickack(true).map_err(|error| error.to_string())?;
        let read = self.stream.read_buf(&mut self.raw).await.map_err(|error| format!("reading: {error}"))?;
        Ok(read > 0)
    }

    /// Reads the head; returns the status and how the body ends.
    async fn head(&mut self) -> Result<(String, BodyEnd), String> {
        let end = loop {
            if let Some(end) = memmem::find(&self.raw, b"\r\n\r\n") {
                break end + 4;
            }
            if !self.more().await? {
                return Err("the connection ended before the answer".into());
            }
        };
        let head = String::from_utf8_lossy(&self.raw[..end]).to_ascii_lowercase();
        self.raw.drain(..end);
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let body_end = match (field("transfer-encoding:"), field("content-length:")) {
            (Some(coding), _) if coding.ends_with("chunked") => BodyEnd::Chunked(ChunkState::Size),
            (_, Some(length)) => BodyEnd::Length(length.parse().map_err(|_| format!("length {length}"))?),
            _ => BodyEnd::Connection,
        };
        Ok((head.lines().next().unwrap_or_default().to_owned(), body_end))
    }

    /// Decodes what was read; returns whether the body is complete.
    fn decode(&mut self, end: &mut BodyEnd) -> Result<bool, String> {
        match end {
            BodyEnd::Chunked(state) => loop {
                if let Some(done) = self.decode_part(state)? {
                    return Ok(done);
                }
            },
            BodyEnd::Length(left) => {
                let here = self.raw.len().min(*left);
                self.keep(here);
                *left -= here;
                Ok(*left == 0)
            }
            BodyEnd::Connection => {
                self.keep(self.raw.len());
                Ok(false)
            }
        }
    }

    /// Leaves the end of the body alone.
    fn forget_beginning(&mut self) {
        if self.body.len() > 2 * KEPT_BYTES {
            self.body.drain(..self.body.len() - KEPT_BYTES);
        }
    }

    /// Takes one part of a chunk; `Some(false)` when more bytes are needed, `Some(true)` at the end.
    fn decode_part(&mut self, state: &mut ChunkState) -> Result<Option<bool>, String> {
        match state {
            ChunkState::Data(left) => {
                let here = self.raw.len().min(*left);
                self.keep(here);
                *left -= here;
                if *left > 0 {
                    return Ok(Some(false));
                }
                *state = ChunkState::Gap;
            }
            ChunkState::Size | ChunkState::Gap | ChunkState::Trailer => {
                let Some(end) = memmem::find(&self.raw, b"\r\n") else { return Ok(Some(false)) };
                let line = String::from_utf8_lossy(&self.raw[..end]).into_owned();
                self.raw.drain(..end + 2);
                match state {
                    ChunkState::Trailer if line.is_empty() => return Ok(Some(true)),
                    ChunkState::Size => {
                        let digits = line.split(';').next().unwrap_or_default().trim();
                        let size =
                            usize::from_str_radix(digits, 16).map_err(|_| format!("chunk of {line}"))?;
                        *state = if size == 0 { ChunkState::Trailer } else { ChunkState::Data(size) };
                    }
                    ChunkState::Gap => *state = ChunkState::Size,
                    ChunkState::Trailer | ChunkState::Data(_) => {}
                }
            }
        }
        Ok(None)
    }

    fn keep(&mut self, bytes: usize) {
        self.received += bytes;
        self.body.extend(self.raw.drain(..bytes));
    }
}

/// The object `usage` of the last events.
fn usage(body: &[u8]) -> Option<Value> {
    let text = String::from_utf8_lossy(body);
    let events = text.rsplit("data: ").filter_map(|event| serde_json::from_str::<Value>(event.trim()).ok());
    events.map(|mut event| event["usage"].take()).find(Value::is_object)
}

async fn exchange_untimed(address: &str, body: &str) -> Result<StreamedAnswer, String> {
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut answer = AnswerReader::send(address, request.as_bytes()).await?;
    let (status, mut end) = answer.head().await?;
    let mut first = None;
    loop {
        let done = answer.decode(&mut end)?;
        if answer.received > 0 {
            first.get_or_insert_with(Instant::now);
        }
        answer.forget_beginning();
        if done {
            break;
        }
        if !answer.more().await? {
            match end {
                BodyEnd::Connection => break,
                BodyEnd::Chunked(_) | BodyEnd::Length(_) => return Err("the answer was cut".into()),
            }
        }
    }
    let end = Instant::now();
    let text = String::from_utf8_lossy(&answer.body);
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("{status}: {}", text.chars().take(300).collect::<String>()));
    }
    let usage = usage(&answer.body).ok_or_else(|| format!("an answer without counts: {text}"))?;
    let count = |value: &Value| value.as_u64().unwrap_or(0) as usize;
    Ok(StreamedAnswer {
        first: first.unwrap_or(end),
        end,
        prompt_tokens: count(&usage["prompt_tokens"]),
        cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]),
    })
}

/// Sends a request for a stream, and reads it to its end.
pub async fn exchange(address: &str, body: &str) -> Result<StreamedAnswer, String> {
    let answer = timeout(MAX_ANSWER_TIME, exchange_untimed(address, body)).await;
    answer.map_err(|_| "an answer did not come in time".to_string())?
}

/// The body of a page.
pub async fn get(address: &str, path: &str) -> Result<String, String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    let mut answer = AnswerReader::send(address, request.as_bytes()).await?;
    let (status, mut end) = answer.head().await?;
    let mut page = Vec::new();
    loop {
        let done = answer.decode(&mut end)?;
        page.append(&mut answer.body);
        if done || !answer.more().await? {
            break;
        }
    }
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("{path}: {status}"));
    }
    Ok(String::from_utf8_lossy(&page).into_owned())
}
