//! Defects of the request path that were found by review, each with the test that shows it.

use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::body::{chat, stream};
use crate::common::raw::Raw;
use crate::common::wire::{self, JSON, post, upgrade};
use crate::common::{Balancer, config, engine, eventually, upstreams};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use vllm_lb::config::types::{RetryOn, UpstreamConfig};
use vllm_lb::fleet::FleetChange;

const CHAT: &str = "/v1/chat/completions";

/// What vLLM's API server answers once its engine has died, with status 500.
const DEAD: &str = concat!(
    r#"{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.","#,
    r#""type":"InternalServerError","param":null,"code":500}}"#
);

fn answer(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}")
}

/// Before this, killing the engine behind an API server gave clients its 500 where they had not asked for a
/// stream, although another upstream was ready.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_engine_is_failed_over_and_not_chosen_again() {
    for body in [chat("sim"), stream("sim", 3)] {
        let dead = Raw::start(&answer("500 Internal Server Error", "application/json", DEAD)).await;
        let alive = engine(Default::default()).await;
        let mut config = config(vec![dead.upstream(), upstreams([&alive]).remove(0)]);
        config.upstreams[0].weight = 1000.0;
        config.upstreams[1].weight = 0.001;
        let balancer = Balancer::ready(config).await;
        balancer.ask(post(CHAT, &body)).await.expect(200);
        assert_eq!(dead.posts().len(), 1, "it was asked first");
        // Its API server goes on answering health checks well.
        eventually("it is down", async || {
            let snapshot = balancer.running.fleet.snapshot();
            snapshot.entries.iter().any(|entry| !entry.is_ready()).then_some(())
        })
        .await;
        for _ in 0..20 {
            balancer.ask(post(CHAT, &body)).await.expect(200);
        }
        assert_eq!(dead.posts().len(), 1, "nothing more was sent to it");
        balancer.until_idle().await;
    }
}

/// A small answer was held until it was whole: a client saw not even its status while the upstream stalled.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_stalls_is_not_held_back() {
    let stalled =
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"half\":";
    let raw = Raw::holding(stalled).await;
    let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, chat("sim"))).await;
    let head = timeout(Duration::from_secs(10), client.head()).await.expect("the head is not held back");
    assert_eq!(head.status, 200);
    let mut framing = head.framing;
    assert_eq!(client.piece(&mut framing).await.unwrap().unwrap(), "{\"half\":");
    raw.close();
    assert!(client.piece(&mut framing).await.is_err());
    balancer.until_idle().await;
}

/// In HTTP/1.0 the end of the connection is the end of the answer: an answer that was cut looked whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_answer_is_not_complete_in_http_1_0() {
    let begun = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let raw = Raw::holding(&format!("{begun}8\r\n{{\"half\":\r\n")).await;
    let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
    let mut client = TcpStream::connect(balancer.address()).await.expect("it listens");
    let body = chat("sim");
    let fields = format!("content-type: application/json\r\ncontent-length: {}", body.len());
    let request = format!("POST {CHAT} HTTP/1.0\r\n{fields}\r\n\r\n{body}");
    client.write_all(request.as_bytes()).await.expect("it is sent");
    let mut answer = vec![0; 4096];
    let mut received = 0;
    while !answer[..received].ends_with(b"{\"half\":") {
        let read = timeout(Duration::from_secs(10), client.read(&mut answer[received..])).await;
        let read = read.expect("it is not held back").expect("it is connected");
        assert!(read > 0, "{}", String::from_utf8_lossy(&answer[..received]));
        received += read;
    }
    raw.close();
    let end = timeout(Duration::from_secs(10), client.read(&mut answer)).await.expect("it ends");
    assert_eq!(end.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    balancer.until_idle().await;
}

/// `response.created` comes before the prompt is read, so what follows it is the first event: `timeouts.idle`
/// ended responses whose prompts took longer than that.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_prelude_is_not_the_first_token() {
    let created = "event: response.created\ndata: {\"type\":\"response.created\"}\n\n";
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
    let raw = Raw::holding(&format!("{head}{created}")).await;
    let mut config = config(vec![raw.upstream()]);
    config.timeouts.idle = Some(Duration::from_millis(100));
    config.timeouts.first_byte = Some(Duration::from_millis(900));
    let balancer = Balancer::ready(config).await;
    let asked = Instant::now();
    let body = r#"{"model":"sim","input":"a","stream":true}"#;
    balancer.ask(post("/v1/responses", body)).await.expect(504);
    assert!(asked.elapsed() >= Duration::from_millis(900), "{:?}", asked.elapsed());
    balancer.until_idle().await;
}

/// The target went upstream as it came, with the host in it.
#[tokio::test(flavor = "multi_thread")]
async fn an_absolute_target_goes_upstream_as_a_path() {
    let engine = engine(Default::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let request = String::from_utf8(post("/v1/chat/completions?a=b", chat("sim"))).unwrap();
    let absolute = request.replacen("POST /", "POST http://balancer.test/", 1);
    balancer.ask(absolute).await.expect(200);
    assert_eq!(engine.requests().pop().expect("it arrived").path, "/v1/chat/completions?a=b");
}

/// An upstream that takes a WebSocket, and then never sends or reads anything.
async fn silent_socket() -> (UpstreamConfig, tokio::task::JoinHandle<()>) {
    let (listener, upstream) = listening().await;
    let task = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.unwrap_or(0) > 0 {}
            let answer: &[u8] = if head.starts_with(b"GET /v1/realtime") {
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
            } else {
                b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
            };
            stream.write_all(answer).await.ok();
            kept.push(stream);
        }
    });
    (upstream, task)
}

/// WebSockets had no deadline: a silent one held its place on the upstream for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_websocket_ends_at_its_deadline_and_frees_its_lease() {
    let (upstream, _task) = silent_socket().await;
    let mut config = config(vec![upstream]);
    config.timeouts.idle = Some(Duration::from_secs(1));
    let balancer = Balancer::ready(config).await;
    let mut client = balancer.client().await;
    client.send(upgrade("/v1/realtime?model=sim")).await;
    assert_eq!(client.head().await.status, 101);
    balancer.until_active(1).await;
    timeout(Duration::from_secs(10), client.rest()).await.expect("the connection ends");
    balancer.until_idle().await;
}

/// A 101 was passed on with an `upgrade` that the upstream had not sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_101_without_upgrade_is_a_bad_gateway() {
    for upgrades in ["connection: upgrade\r\n", "connection: upgrade\r\nupgrade: h2c\r\n", ""] {
        let bad = Raw::holding(&format!("HTTP/1.1 101 Switching Protocols\r\n{upgrades}\r\n")).await;
        let good = engine(Default::default()).await;
        for attempts in [0, 1] {
            let mut config = config(vec![bad.upstream(), upstreams([&good]).remove(0)]);
            (config.upstreams[0].weight, config.upstreams[1].weight) = (1000.0, 0.001);
            config.retry.attempts = attempts;
            let balancer = Balancer::ready(config).await;
            let mut client = balancer.client().await;
            client.send(upgrade("/v1/realtime?model=sim")).await;
            let head = client.head().await;
            assert_eq!(head.status, if attempts == 0 { 502 } else { 101 }, "{upgrades}");
        }
    }
}

/// Upgrades are retried where other requests are.
#[tokio::test(flavor = "multi_thread")]
async fn upgrades_follow_the_retry_rule() {
    let status = |status: &str| answer(status, "application/json", "{}");
    for (failure, on) in [
        (String::new(), true),
        (String::new(), false),
        (status("503 Service Unavailable"), true),
        (status("503 Service Unavailable"), false),
        (status("504 Gateway Timeout"), false),
        (status("500 Internal Server Error"), true),
        (status("429 Too Many Requests"), true),
    ] {
        let bad = Raw::start(&failure).await;
        let good = engine(Default::default()).await;
        let mut config = config(vec![bad.upstream(), upstreams([&good]).remove(0)]);
        (config.upstreams[0].weight, config.upstreams[1].weight) = (1000.0, 0.001);
        if !on {
            config.retry.on = RetryOn::NOTHING;
        }
        let mut fares = Vec::new();
        for request in [post(CHAT, chat("sim")), upgrade("/v1/realtime?model=sim")] {
            let balancer = Balancer::ready(config.clone()).await;
            let before = good.requests().len();
            let mut client = balancer.client().await;
            client.send(request).await;
            let status = client.head().await.status;
            fares.push((good.requests().len() - before, if status == 101 { 200 } else { status }));
        }
        assert_eq!(fares[0], fares[1], "{failure:?} {on}");
    }
}

/// A listener, and it as an upstream that serves `sim`.
async fn listening() -> (TcpListener, UpstreamConfig) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
    let mut upstream =
        crate::common::upstream(&format!("http://{}", listener.local_addr().expect("it listens")));
    upstream.models = Some(crate::common::names(&["sim"]));
    (listener, upstream)
}

/// Nothing was read from an upstream while it did not take what was sent.
#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_is_read_while_the_upload_is_blocked() {
    let (listener, upstream) = listening().await;
    let task = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 5];
            stream.read_exact(&mut head).await.ok();
            let answer = if &head == b"POST " {
                answer("413 Payload Too Large", "application/json", "{}")
            } else {
                answer("200 OK", "application/json", "{}")
            };
            stream.write_all(answer.as_bytes()).await.ok();
            kept.push(stream);
        }
    });
    let balancer = Balancer::ready(config(vec![upstream])).await;
    let body = crate::common::body::padded(30 << 20, "sim", crate::common::body::Place::First);
    let mut client = balancer.client().await;
    let length = body.len().to_string();
    client.send(wire::head("POST", CHAT, &[JSON, ("content-length", &length)])).await;
    // More than the sockets on the way can hold.
    drop(timeout(Duration::from_secs(5), client.try_send(&body[..8 << 20])).await);
    let head = timeout(Duration::from_secs(10), client.head()).await.expect("the answer is passed on");
    assert_eq!(head.status, 413);
    drop(client);
    balancer.until_idle().await;
    task.abort();
}

/// What waits for an upstream was not counted once the body could not be held.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_upload_counts_as_memory_until_its_request_ends() {
    let (listener, upstream) = listening().await;
    let task = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 5];
            stream.read_exact(&mut head).await.ok();
            if &head != b"POST " {
                stream.write_all(answer("200 OK", "application/json", "{}").as_bytes()).await.ok();
            }
            kept.push(stream);
        }
    });
    let mut config = config(vec![upstream]);
    (config.peek.bytes, config.peek.memory) = (1000, 1 << 20);
    let balancer = Balancer::ready(config).await;
    let body = crate::common::body::padded(30 << 20, "sim", crate::common::body::Place::First);
    let length = body.len().to_string();
    let mut client = balancer.client().await;
    client.send(wire::head("POST", CHAT, &[JSON, ("content-length", &length)])).await;
    // More than the sockets on the way can hold.
    drop(timeout(Duration::from_secs(5), client.try_send(&body[..20 << 20])).await);
    let counted = balancer.metric("vllm_lb_peeked_bytes").await;
    assert!((200_000.0..400_000.0).contains(&counted), "{counted}");
    // The upstream ends, and with it the request.
    task.abort();
    balancer.until_idle().await;
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_proceeds_piecewise_without_spare_memory() {
    let engine = engine(Default::default()).await;
    let mut config = config(upstreams([&engine]));
    (config.peek.bytes, config.peek.memory) = (1000, 80_000);
    let balancer = Balancer::ready(config).await;
    let body = crate::common::body::padded(4 << 20, "sim", crate::common::body::Place::First);
    let uploads = (0..4).map(async |_| {
        let mut client = balancer.client().await;
        let length = body.len().to_string();
        client.send(wire::head("POST", CHAT, &[JSON, ("content-length", &length)])).await;
        for piece in body.chunks(16 << 10) {
            client.send(piece).await;
        }
        client.answer().await
    });
    let answers = futures_util::future::join_all(uploads).await;
    assert!(answers.iter().all(|answer| [200, 503].contains(&answer.status)), "{answers:?}");
    let arrived: Vec<_> = engine.requests().into_iter().filter(|one| one.path == CHAT).collect();
    assert!(!arrived.is_empty() && arrived.iter().all(|one| one.body_length == body.len()));
    balancer.until_idle().await;
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
}

/// An upstream that keeps its connections; `posts` has the number of the connection for each request.
async fn keeping(posts: Arc<Mutex<Vec<usize>>>) -> (UpstreamConfig, tokio::task::JoinHandle<()>) {
    let (listener, upstream) = listening().await;
    let task = tokio::spawn(async move {
        for number in 0.. {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let posts = posts.clone();
            tokio::spawn(async move {
                let mut read = Vec::new();
                while stream.read_buf(&mut read).await.unwrap_or(0) > 0 {
                    // The body comes with its head, and ends in a brace.
                    if !read.ends_with(b"\r\n\r\n") && !read.ends_with(b"}") {
                        continue;
                    }
                    if read.starts_with(b"POST ") {
                        posts.lock().expect("no test panics with it").push(number);
                    }
                    read.clear();
                    stream.write_all(answer("200 OK", "application/json", "{}").as_bytes()).await.ok();
                }
            });
        }
    });
    (upstream, task)
}

/// Idle connections were of no use any more once any setting of their upstream had changed.
#[tokio::test(flavor = "multi_thread")]
async fn idle_upstream_connections_survive_unrelated_reloads() {
    let posts = Arc::default();
    let (upstream, _task) = keeping(Arc::clone(&posts)).await;
    let name = upstream.name.clone();
    let balancer = Balancer::ready(config(vec![upstream])).await;
    let mut client = balancer.client().await;
    for weight in [2.0, 3.0, 4.0] {
        client.ask(post(CHAT, chat("sim"))).await.expect(200);
        let change = FleetChange::Weight { name: name.clone(), weight };
        balancer.running.fleet.apply(vec![change]).await.expect("it is there");
    }
    let posts = posts.lock().expect("no test panics with it").clone();
    assert_eq!(posts, [posts[0]; 3]);
}

/// Regression: the judge waited for lines of events in compressed bytes, until the stream ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_stream_is_not_held_back() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n\r\n";
    let raw = Raw::holding(&format!("{head}compressed")).await;
    let mut config = config(vec![raw.upstream()]);
    config.timeouts.first_byte = Some(Duration::from_secs(5));
    let balancer = Balancer::ready(config).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 3))).await;
    let head = client.head().await;
    let mut framing = head.framing;
    assert_eq!(head.status, 200);
    assert_eq!(client.piece(&mut framing).await.unwrap().unwrap(), "compressed");
    raw.close();
    balancer.until_idle().await;
}

/// Regression: the error event was cut at the length that the upstream had declared, so that the stream
/// looked whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_of_declared_length_ends_with_a_whole_error_event() {
    let event = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n";
    for kind in ["text/event-stream", "Text/Event-Stream; charset=utf-8"] {
        for missing in [1, 60, 500] {
            let length = event.len() + missing;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n");
            let raw = Raw::holding(&format!("{head}{event}")).await;
            let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
            let mut client = balancer.client().await;
            client.send(post(CHAT, stream("sim", 3))).await;
            let head = client.head().await;
            assert_eq!(head.status, 200);
            // An upstream that breaks before the client has anything is another case.
            raw.close();
            let answer = client.body(head).await;
            let last = answer.text().trim_end().rsplit("\n\n").nth(1).unwrap_or_default();
            let error: serde_json::Value =
                serde_json::from_str(last.strip_prefix("data: ").unwrap_or_default()).unwrap_or_default();
            assert!(error["error"]["message"].is_string(), "{kind}, {missing}: {}", answer.text());
        }
    }
}

/// Regression: an idle WebSocket counted as a failure of its upstream, and a few clients tripped it.
#[tokio::test(flavor = "multi_thread")]
async fn idle_websockets_do_not_trip_their_upstream() {
    let (upstream, _task) = silent_socket().await;
    let mut config = config(vec![upstream]);
    config.timeouts.idle = Some(Duration::from_millis(100));
    let balancer = Balancer::ready(config).await;
    for _ in 0..8 {
        let mut client = balancer.client().await;
        client.send(upgrade("/v1/realtime?model=sim")).await;
        assert_eq!(client.head().await.status, 101);
        timeout(Duration::from_secs(10), client.rest()).await.expect("the connection ends");
    }
    balancer.until_idle().await;
    assert!(balancer.running.fleet.snapshot().entries[0].is_ready());
    assert!(!balancer.metrics().contains("outcome=\"failed\""));
}
