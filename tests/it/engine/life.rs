//! Connections and requests from their beginning to their end.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use vllm_lb::engine::batch::Timing;
use vllm_lb::engine::http::{EngineServer, Options};

use crate::client::{Client, call, connect, instant, paced, post};

const CHAT: &str = "/v1/chat/completions";

fn long(stream: bool) -> Vec<u8> {
    let messages = json!([{"role": "user", "content": "hi"}]);
    json!({"messages": messages, "max_tokens": 3_000, "stream": stream}).to_string().into_bytes()
}

/// Whether it streams or not, runs or waits: a client that goes away aborts its request.
#[tokio::test]
async fn a_lost_client_aborts() {
    let engine = EngineServer::start(Options { max_num_seqs: 1, ..paced() }).await.unwrap();
    for (path, body) in [
        (CHAT, long(false)),
        (CHAT, long(true)),
        ("/v1/completions", json!({"prompt": ["a", "b"], "max_tokens": 3_000}).to_string().into_bytes()),
        ("/v1/responses", json!({"input": "a", "max_output_tokens": 3_000}).to_string().into_bytes()),
    ] {
        let before = engine.stats().aborted;
        let mut running = connect(&engine).await;
        running.send("POST", path, &[], &body).await;
        engine.wait_until("one runs", |stats| stats.running == 1).await;
        let mut waiting = connect(&engine).await;
        waiting.send("POST", CHAT, &[], &long(true)).await;
        engine.wait_until("one waits", |stats| stats.waiting >= 1).await;
        drop(waiting);
        engine.wait_until("it is gone", |stats| stats.aborted == before + 1).await;
        assert_eq!(engine.stats().running, 1);
        drop(running);
        engine.wait_until("nothing runs", |stats| stats.running + stats.waiting == 0).await;
    }
    assert_eq!((engine.stats().finished, engine.stats().kv_usage), (0, 0.0));
    let metrics = call(engine.address(), "GET", "/metrics").await;
    let line = "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"tiny\"} 0.0";
    assert!(metrics.text().contains(line), "real servers do not count them either");
}

#[tokio::test]
async fn a_half_closed_client_counts_as_gone() {
    let engine = EngineServer::start(paced()).await.unwrap();
    let mut client = connect(&engine).await;
    client.send("POST", CHAT, &[], &long(false)).await;
    engine.wait_until("it runs", |stats| stats.running == 1).await;
    let mut stream = client.into_inner();
    stream.shutdown().await.unwrap();
    engine.wait_until("it is aborted", |stats| stats.aborted == 1).await;
}

/// Headers and first events are out while the rest is still being made.
#[tokio::test]
async fn streams_do_not_wait_for_their_end() {
    let engine = EngineServer::start(paced()).await.unwrap();
    let mut client = connect(&engine).await;
    client.send("POST", CHAT, &[], &long(true)).await;
    assert_eq!(client.head().await.unwrap().status, 200);
    for _ in 0..4 {
        assert!(client.chunk().await.unwrap().unwrap().starts_with("data: {"));
    }
    assert_eq!(engine.stats().running, 1);
    // Also before the prefill is done.
    engine.set_fault(vllm_lb::engine::http::InjectedFault::Slow { factor: 1e6 }).await;
    let mut second = connect(&engine).await;
    second.send("POST", CHAT, &[], &long(true)).await;
    assert_eq!(second.head().await.unwrap().status, 200);
}

#[tokio::test]
async fn requests_are_remembered() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let body = json!({"prompt": "x".repeat(100_000), "max_tokens": 1}).to_string();
    let mut client = connect(&engine).await;
    client.send("POST", "/v1/completions?a=b", &[("x-marker", "yes")], body.as_bytes()).await;
    client.answer().await.unwrap();
    call(engine.address(), "GET", "/health").await;
    let requests = engine.requests();
    assert_eq!(requests.len(), 1, "polls are kept apart");
    let recorded = &requests[0];
    assert_eq!((recorded.method.as_str(), recorded.path.as_str()), ("POST", "/v1/completions?a=b"));
    assert_eq!((recorded.header("x-marker"), recorded.body_length), (Some("yes"), body.len()));
    assert_eq!(recorded.body_hash, xxhash_rust::xxh3::xxh3_64(body.as_bytes()));
    assert_eq!(recorded.body, body.as_bytes()[..65_536]);
    assert_eq!((engine.polls().len(), engine.polls()[0].path.as_str()), (1, "/health"));
    let stats = engine.stats();
    assert_eq!((stats.received, stats.polled), (1, 1));
}

#[tokio::test]
async fn old_requests_are_forgotten() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let mut client = connect(&engine).await;
    for number in 0..1_010 {
        client.send("GET", &format!("/nope/{number}"), &[], b"").await;
        client.answer().await.unwrap();
    }
    let requests = engine.requests();
    assert_eq!((requests.len(), requests[0].path.as_str()), (1_000, "/nope/10"));
    assert_eq!((engine.stats().received, engine.stats().accepted), (1_010, 1));
}

#[tokio::test]
async fn idle_connections_end() {
    let engine =
        EngineServer::start(Options { keep_alive: Duration::from_millis(50), ..instant() }).await.unwrap();
    let fresh = connect(&engine).await;
    let mut used = connect(&engine).await;
    used.send("GET", "/health", &[], b"").await;
    used.answer().await.unwrap();
    used.closed().await.unwrap();
    engine.wait_until("only the fresh one is left", |stats| stats.connections == 1).await;
    drop(fresh);
}

#[tokio::test]
async fn unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("engine.sock");
    let engine = EngineServer::start_unix(&path, instant()).unwrap();
    assert_eq!(engine.url(), format!("unix:{}", path.display()));
    let mut client = Client::new(UnixStream::connect(&path).await.unwrap());
    client.send("GET", "/v1/models", &[], b"").await;
    assert_eq!(client.answer().await.unwrap().json()["data"][0]["id"], "tiny");
    engine.set_fault(vllm_lb::engine::http::InjectedFault::Refuse).await;
    assert!(UnixStream::connect(&path).await.is_err());
    engine.clear_fault().await;
    assert!(UnixStream::connect(&path).await.is_ok());
    engine.stop().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn tls() {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (pair.cert.pem(), pair.signing_key.serialize_pem());
    let engine = EngineServer::start_tls(instant(), &cert, &key).await.unwrap();
    assert!(engine.url().starts_with("https://127.0.0.1:"));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(pair.cert.der().clone()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let stream = connect(&engine).await.into_inner();
    let stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
    let mut client = Client::new(stream);
    client.send("GET", "/version", &[], b"").await;
    assert_eq!(client.answer().await.unwrap().text(), "{\"version\":\"0.32.0\"}");
    let wrong = EngineServer::start_tls(instant(), "nothing", &key).await;
    assert!(wrong.err().unwrap().to_string().contains("certificate"));
}

#[tokio::test]
async fn stopping_frees_the_port() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let engine = EngineServer::start_on(listener, paced()).unwrap();
    let at = engine.address();
    let mut client = connect(&engine).await;
    client.send("POST", CHAT, &[], &long(true)).await;
    client.head().await.unwrap();
    engine.stop().await;
    while let Ok(chunk) = client.chunk().await {
        assert!(chunk.is_some(), "the stream broke off, it did not end");
    }
    let again = EngineServer::start_on(TcpListener::bind(at).await.unwrap(), instant()).unwrap();
    assert_eq!(call(again.address(), "GET", "/health").await.status, 200);
}

#[tokio::test]
async fn sleep_and_pause() {
    let timing = Timing::faster(100.0);
    let engine = EngineServer::start(Options { dev_mode: true, timing, ..instant() }).await.unwrap();
    let at = engine.address();
    let short = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let sleeping = || async { call(at, "GET", "/is_sleeping").await.json()["is_sleeping"].clone() };
    assert_eq!(sleeping().await, json!(false));
    assert_eq!(call(at, "POST", "/sleep?level=2").await.text(), "{\"status\":\"sleeping\",\"level\":2}");
    assert_eq!(sleeping().await, json!(true));
    let state = |name: &str, value: &str| {
        format!("vllm:engine_sleep_state{{engine=\"0\",model_name=\"tiny\",sleep_state=\"{name}\"}} {value}")
    };
    let metrics = call(at, "GET", "/metrics").await;
    assert!(metrics.text().contains(&state("awake", "0.0")));
    assert!(metrics.text().contains(&state("discard_all", "1.0")));
    assert_eq!(call(at, "GET", "/health").await.status, 200, "also while asleep");
    let mut client = connect(&engine).await;
    client.send("POST", CHAT, &[], short.to_string().as_bytes()).await;
    engine.wait_until("it waits", |stats| stats.waiting == 1).await;
    assert_eq!(call(at, "POST", "/wake_up").await.status, 200);
    assert_eq!(client.answer().await.unwrap().status, 200);
    assert_eq!(call(at, "POST", "/pause").await.status, 200);
    assert_eq!(call(at, "GET", "/is_paused").await.json()["is_paused"], true);
    assert_eq!(call(at, "POST", "/resume").await.status, 200);
    assert_eq!(post(at, CHAT, &short).await.status, 200);
    assert_eq!(call(at, "POST", "/reset_prefix_cache").await.text(), "{\"success\":true}");
}

/// Several servers in one process: a line with its URL for each, and an orderly end.
#[test]
fn command_line() {
    let mut process = Command::new(env!("CARGO_BIN_EXE_vllm-lb"))
        .args(["engine", "--port", "0,0", "--model", "tiny", "--speed", "50"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let urls = [lines.next().unwrap().unwrap(), lines.next().unwrap().unwrap()];
    assert_ne!(urls[0], urls[1]);
    for url in urls {
        let mut stream = std::net::TcpStream::connect(url.strip_prefix("http://").unwrap()).unwrap();
        stream.write_all(b"GET /v1/models HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("\"id\":\"tiny\""), "{answer}");
    }
    let kill = Command::new("kill").arg(process.id().to_string()).status().unwrap();
    assert!(kill.success());
    assert!(process.wait().unwrap().success());
}

/// Puts one masked frame of text on the wire.
async fn say(stream: &mut (impl AsyncWriteExt + Unpin), text: &str) {
    let mut frame = vec![0x81, 0x80 | text.len() as u8, 1, 2, 3, 4];
    frame.extend(text.bytes().enumerate().map(|(at, byte)| byte ^ [1, 2, 3, 4][at % 4]));
    stream.write_all(&frame).await.unwrap();
}

async fn hear(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await.unwrap();
    let mut text = vec![0; usize::from(head[1])];
    stream.read_exact(&mut text).await.unwrap();
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn websocket() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let mut client = connect(&engine).await;
    let headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    client.send("GET", "/v1/realtime?model=tiny", &headers, b"").await;
    let answer = client.head().await.unwrap();
    assert_eq!((answer.status, answer.header("upgrade")), (101, Some("websocket")));
    assert_eq!(answer.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    let mut stream = client.into_stream();
    let created: Value = serde_json::from_str(&hear(&mut stream).await).unwrap();
    assert_eq!(created["type"], "session.created");
    say(&mut stream, "hello").await;
    assert_eq!(hear(&mut stream).await, "hello");
    say(&mut stream, "{\"type\":\"session.update\",\"model\":\"nope\"}").await;
    let error =
        json!({"type": "error", "error": "The model `nope` does not exist.", "code": "model_not_found"});
    assert_eq!(hear(&mut stream).await, error.to_string());
    assert_eq!(engine.stats().connections, 1);
    engine.restart().await;
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0);
}
