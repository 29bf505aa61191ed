//! Clients of a trace gateway: each turn of a session repeats the conversation so far, as an agent does.
//!
//! Writes one line of JSON: requests, failures, seconds, latencies in milliseconds, bytes of bodies.
//! `benches/sessions.sh` runs it.

use std::env;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};

/// The length of a generated word with its blank, in bytes: a token of the simulated engine is about as long.
const WORD_BYTES: usize = 4;

struct Load {
    host: String,
    prefix: String,
    turns: usize,
    prompt_tokens: usize,
    answer_tokens: usize,
    streams: bool,
    /// Without sessions in the path: straight to an engine.
    plain: bool,
}

/// One turn as it went.
struct TurnResult {
    latency: Duration,
    sent: usize,
    received: usize,
    failed: bool,
}

fn number(name: &str, default: usize) -> usize {
    let mut arguments = env::args().skip_while(|argument| argument != name);
    arguments.nth(1).and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn text(name: &str, default: &str) -> String {
    let mut arguments = env::args().skip_while(|argument| argument != name);
    arguments.nth(1).unwrap_or_else(|| default.into())
}

/// Words that are the same for a seed.
fn words(seed: u64, count: usize) -> String {
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = String::with_capacity(count * WORD_BYTES);
    for _ in 0..count {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        for shift in [0, 8, 16] {
            out.push(char::from(b'a' + (random >> shift) as u8 % 26));
        }
        out.push(' ');
    }
    out
}

async fn session(
    load: Arc<Load>,
    id: usize,
    results: mpsc::Sender<TurnResult>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let stream = TcpStream::connect(&load.host).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut messages = vec![
        json!({"role": "system", "content": words(id as u64 + 1, load.prompt_tokens)}),
        json!({"role": "user", "content": "begin"}),
    ];
    for turn in 0..load.turns {
        let body = json!({"model": "sim", "messages": messages, "max_tokens": load.answer_tokens,
            "stream": load.streams});
        let body = Bytes::from(body.to_string());
        let sent = body.len();
        let session = if load.plain { String::new() } else { format!("/sessions/load-{id}") };
        let request = Request::post(format!("{}{session}/v1/chat/completions", load.prefix))
            .header(header::HOST, &load.host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let begun = Instant::now();
        sender.ready().await?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        let latency = begun.elapsed();
        let reply = if load.streams {
            body.ends_with(b"[DONE]\n\n").then(|| words(turn as u64, load.answer_tokens))
        } else {
            let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
            answer["choices"][0]["message"]["content"].as_str().map(str::to_string)
        };
        let failed = !status.is_success() || reply.is_none();
        results.send(TurnResult { latency, sent, received: body.len(), failed }).await?;
        messages.push(json!({"role": "assistant", "content": reply.unwrap_or_default()}));
        messages.push(json!({"role": "user", "content": words((id + turn) as u64, 50)}));
    }
    Ok(())
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let at = ((sorted.len() as f64 - 1.0) * share).round();
    sorted.get(at as usize).copied().unwrap_or(f64::NAN)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let url = text("--url", "http://127.0.0.1:8000");
    let rest = url.strip_prefix("http://").ok_or("the URL is no http:// one")?;
    let (host, prefix) =
        rest.split_once('/').map_or((rest, String::new()), |(host, path)| (host, format!("/{path}")));
    let (sessions, concurrent) = (number("--sessions", 100), number("--concurrent", 100));
    let load = Arc::new(Load {
        host: host.into(),
        prefix,
        turns: number("--turns", 20),
        prompt_tokens: number("--prompt-tokens", 8_000),
        answer_tokens: number("--answer-tokens", 32),
        streams: number("--stream", 0) == 1,
        plain: number("--plain", 0) == 1,
    });
    let (results, mut received) = mpsc::channel(1_000);
    let (room, begun) = (Arc::new(Semaphore::new(concurrent)), Instant::now());
    for id in 0..sessions {
        let (load, results, room) = (load.clone(), results.clone(), room.clone());
        tokio::spawn(async move {
            let Ok(_permit) = room.acquire().await else { return };
            if let Err(error) = session(load, id, results.clone()).await {
                eprintln!("session {id}: {error}");
                let lost = TurnResult { latency: Duration::ZERO, sent: 0, received: 0, failed: true };
                results.send(lost).await.ok();
            }
        });
    }
    drop(results);
    let (mut latencies, mut failed, mut sent, mut back) = (Vec::new(), 0, 0, 0);
    while let Some(result) = received.recv().await {
        latencies.push(result.latency.as_secs_f64() * 1e3);
        failed += usize::from(result.failed);
        sent += result.sent;
        back += result.received;
    }
    let seconds = begun.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    let line = json!({"requests": latencies.len(), "failed": failed, "seconds": seconds,
        "per_second": latencies.len() as f64 / seconds, "p50_ms": percentile(&latencies, 0.5),
        "p99_ms": percentile(&latencies, 0.99), "sent_bytes": sent, "received_bytes": back});
    println!("{line}");
    Ok(())
}
