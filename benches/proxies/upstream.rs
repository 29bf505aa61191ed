//! A server that costs little: it reads whole requests and answers with constants.
//!
//! It answers a request with `x-request-id-events: N` with a stream: a chunk with one event at a fixed
//! pace, N times, then silence until the client leaves. It answers one with `x-request-id-burst: N` with a
//! stream of N events at once, which ends. sglang-router forwards no other field that a client can make up.
//! Without them the answer is a chat completion of 1 KiB in one piece. Bodies are not read; one without a
//! length, which no proxy here should send, is refused.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{MissedTickBehavior, interval};

/// Milliseconds between two tokens of one answer, unless the script sets another pace.
pub const PACE_MILLIS: u64 = 20;

const BUFFER: usize = 64 << 10;

/// `event`: the one that streams repeat, with `pace` between two of a stream.
pub async fn serve(port: u16, event: &'static str, pace: Duration) -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let completion: &'static [u8] = completion().leak();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        // A connection that breaks is its proxy's affair; the load sees it as a failed request.
        tokio::spawn(async move { connection(stream, completion, event, pace).await.ok() });
    }
}

async fn connection(mut stream: TcpStream, completion: &[u8], event: &str, pace: Duration) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut filled = 0;
    loop {
        let end = loop {
            if let Some(end) = memchr::memmem::find(&buffer[..filled], b"\r\n\r\n") {
                break end + 4;
            }
            match stream.read(&mut buffer[filled..]).await? {
                0 => return Ok(()),
                read => filled += read,
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
        if head.starts_with("get ") {
            stream.write_all(&get(&head)).await?;
            buffer.copy_within(end..filled, 0);
            filled -= end;
            continue;
        }
        let Some(length) = number(&head, "content-length:") else {
            return stream.write_all(b"HTTP/1.1 411 Length Required\r\ncontent-length: 0\r\n\r\n").await;
        };
        let mut left = length.saturating_sub(filled - end);
        while left > 0 {
            let room = left.min(BUFFER);
            match stream.read(&mut buffer[..room]).await? {
                0 => return Ok(()),
                read => left -= read,
            }
        }
        filled = 0;
        if !head.starts_with("post /v1/chat/completions ") {
            // vllm-router asks for the tokens of each prompt, and does without them.
            stream.write_all(&not_found()).await?;
        } else if let Some(count) = number(&head, "x-request-id-events:") {
            return events_of(stream, count, event, pace).await;
        } else if let Some(count) = number(&head, "x-request-id-burst:") {
            stream.write_all(&burst(count, event)).await?;
        } else {
            stream.write_all(completion).await?;
        }
    }
}

/// The number that a field of a head in lower case has.
fn number(head: &str, name: &str) -> Option<usize> {
    head.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

/// Answers what balancers ask of a vLLM, and what sglang-router asks of an SGLang.
fn get(head: &str) -> Vec<u8> {
    let path = head.split(' ').nth(1).unwrap_or("");
    match path {
        "/health" => json("200 OK", ""),
        "/version" => json("200 OK", r#"{"version":"0.32.0"}"#),
        "/v1/models" => {
            let card = r#"{"id":"sim","object":"model","created":1,"owned_by":"vllm","root":"sim"}"#;
            json("200 OK", &format!(r#"{{"object":"list","data":[{card}]}}"#))
        }
        "/server_info" | "/get_server_info" => {
            json("200 OK", r#"{"model_path":"sim","served_model_name":"sim","tp_size":1,"dp_size":1}"#)
        }
        "/model_info" | "/get_model_info" => {
            json("200 OK", r#"{"model_path":"sim","tokenizer_path":"sim","is_generation":true}"#)
        }
        _ => not_found(),
    }
}

fn not_found() -> Vec<u8> {
    json("404 Not Found", r#"{"detail":"Not Found"}"#)
}

fn json(status: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n\
         content-length: {length}\r\ncontent-type: application/json\r\n\r\n"
    );
    [head.as_bytes(), body.as_bytes()].concat()
}

fn completion() -> Vec<u8> {
    let text = "The answer has been made of words that mean nothing. ".repeat(12);
    let body = format!(
        r#"{{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1767225600,
        "model":"sim","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},
        "logprobs":null,"finish_reason":"stop"}}],"usage":{{"prompt_tokens":400,"total_tokens":528,
        "completion_tokens":128}}}}"#
    );
    json("200 OK", &format!("{body:<1024}"))
}

const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n\
    content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

pub const EVENT: &str = "data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\
    \"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"sim\",\"choices\":\
    [{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":null,\
    \"finish_reason\":null,\"token_ids\":null}]}\n\n";

/// The same with a token's id and its log-probability, as an engine sends them where they are requested.
pub const EVENT_WITH_IDS: &str = "data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\
    \"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"sim\",\"choices\":\
    [{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":{\"content\":[{\"token\":\" word\",\
    \"logprob\":-0.12345678901234567,\"bytes\":[32,119,111,114,100],\"top_logprobs\":[]}]},\
    \"finish_reason\":null,\"token_ids\":[12345]}]}\n\n";

fn chunk(event: &str) -> String {
    format!("{:x}\r\n{event}\r\n", event.len())
}

/// A whole stream.
fn burst(count: usize, event: &str) -> Vec<u8> {
    let (events, done) = (chunk(event).repeat(count), chunk("data: [DONE]\n\n"));
    [STREAM_HEAD, &events, &done, "0\r\n\r\n"].concat().into_bytes()
}

async fn events_of(mut stream: TcpStream, count: usize, event: &str, pace: Duration) -> io::Result<()> {
    let chunk = chunk(event);
    stream.write_all(STREAM_HEAD.as_bytes()).await?;
    let mut pace = interval(pace);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for _ in 0..count {
        pace.tick().await;
        stream.write_all(chunk.as_bytes()).await?;
    }
    let mut rest = [0; 64];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}
