//! What a client's connection may cost while it brings no request: idle ones end, slow or endless heads are
//! refused, and a client that abuses HTTP/2 is disconnected.

use std::future::poll_fn;
use std::time::Duration;

use crate::common::body::{chat, events, stream};
use crate::common::certs::Certs;
use crate::common::h2::{self, H2};
use crate::common::wire::{Answer, Wire, get, head, post, tcp};
use crate::common::{
    Balancer, EngineServer, Options, PATIENCE, config, engine, listen, paced, upstream, upstreams,
};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use vllm_lb::config::types::{Config, ConnectionLimits, Listen, UpstreamConfig};

const CHAT: &str = "/v1/chat/completions";

/// Long enough for a busy machine to do within it what the test does at once.
const LIMIT: Duration = Duration::from_secs(2);

/// Where a limit must not be what ends a connection.
const FAR: Duration = Duration::from_secs(600);

/// A balancer over one engine, with the limits that a test shortens.
async fn stand(limits: ConnectionLimits, change: impl FnOnce(&mut Config)) -> (EngineServer, Balancer) {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.limits.connection = limits;
    change(&mut config);
    let balancer = Balancer::ready(config).await;
    (engine, balancer)
}

fn far() -> ConnectionLimits {
    ConnectionLimits { idle: FAR, head: FAR, handshake: FAR }
}

/// Whether an end came with the limit: the balancer may have begun to count well before a slow test did.
fn is_in_time(since: Instant) -> bool {
    since.elapsed() > LIMIT / 4
}

/// Waits for the end of a connection, which must not send anything more, nor end before the limit.
async fn ends_idle(client: &mut Wire, since: Instant) {
    assert_eq!(client.rest().await, b""[..]);
    assert!(is_in_time(since), "it ended after {:?}", since.elapsed());
}

// === HTTP/1 ===

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_ends_before_its_first_request_and_after_any() {
    let certs = Certs::new();
    let secure = Listen { tls: Some(certs.listen()), ..listen("127.0.0.1:0") };
    let (_engine, balancer) =
        stand(ConnectionLimits { idle: LIMIT, ..far() }, |config| config.listen.push(secure)).await;
    let address = &balancer.running.addresses[1];
    let plain = async |requests: usize| {
        let mut client = balancer.client().await;
        for _ in 0..requests {
            client.ask(get("/version")).await.expect(200);
        }
        ends_idle(&mut client, Instant::now()).await;
    };
    let secure = async {
        let mut client = Wire::over(certs.connect(address, &["http/1.1"]).await);
        client.ask(get("/version")).await.expect(200);
        ends_idle(&mut client, Instant::now()).await;
    };
    tokio::join!(plain(0), plain(1), plain(3), secure);
}

/// The time of a request does not count, nor do the pauses within one.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_idle_from_the_end_of_an_answer_on() {
    let engine = paced(Duration::from_millis(30)).await;
    let mut config = config(upstreams([&engine]));
    config.limits.connection = ConnectionLimits { idle: LIMIT, ..far() };
    let balancer = Balancer::ready(config).await;
    let mut client = balancer.client().await;
    let begun = Instant::now();
    let answer = client.ask(post(CHAT, stream("sim", 150))).await.expect(200);
    assert_eq!(events(&answer.body).last().map(String::as_str), Some("data: [DONE]"));
    assert!(begun.elapsed() > LIMIT, "a stream longer than the limit");
    let head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n";
    client.send(head).await;
    sleep(LIMIT + LIMIT / 2).await;
    client.send([b' '; 900]).await;
    client.send(&chat("sim").into_bytes()[..]).await;
    drop(client);
    let mut client = balancer.client().await;
    client.ask(post(CHAT, chat("sim"))).await.expect(200);
    ends_idle(&mut client, Instant::now()).await;
}

/// A refusal of a head that is not whole, in the shape of all refusals, with which the connection ends.
async fn refused(client: &mut Wire, status: u16) -> Answer {
    let answer = client.answer().await.expect(status);
    assert_eq!(answer.json()["error"]["code"], status);
    assert_eq!((answer.header("connection"), answer.header("content-type")), ("close", "application/json"));
    assert_eq!(client.rest().await, b""[..]);
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_end_in_time_is_refused() {
    let (_engine, balancer) = stand(ConnectionLimits { head: LIMIT, ..far() }, |_| {}).await;
    let half = b"GET /version HTTP/1.1\r\nhost: a\r\nx-";
    let at_once = async |requests: usize| {
        let mut client = balancer.client().await;
        for _ in 0..requests {
            client.ask(get("/version")).await.expect(200);
        }
        client.send(half).await;
        refused(&mut client, 408).await;
    };
    // Each byte comes well before the limit: it is the limit of the whole head.
    let trickling = async {
        let mut client = balancer.client().await;
        let begun = Instant::now();
        for byte in half.iter().cycle() {
            if client.try_send([*byte]).await.is_err() || begun.elapsed() > 3 * LIMIT {
                break;
            }
            sleep(LIMIT / 10).await;
        }
        assert!(begun.elapsed() < 3 * LIMIT, "it goes on");
        let seen = String::from_utf8_lossy(&client.rest().await).into_owned();
        assert!(seen.is_empty() || seen.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{seen}");
    };
    tokio::join!(at_once(0), at_once(2), trickling);
    balancer.until_metric("vllm_lb_rejects_total{reason=\"slow\"}", 3.0).await;
    let mut in_time = balancer.client().await;
    in_time.send(half).await;
    sleep(LIMIT / 4).await;
    in_time.ask("a: b\r\n\r\n").await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_head_is_read_up_to_its_limit() {
    let (_engine, balancer) = stand(far(), |config| config.limits.header_bytes = 8 << 10).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(4 << 10).unwrap();
    let client = socket.connect(balancer.address().parse().unwrap()).await.unwrap();
    let (mut reading, mut writing) = client.into_split();
    let answer = async {
        let mut answer = Vec::new();
        // A reset may follow the answer.
        drop(timeout(PATIENCE, reading.read_to_end(&mut answer)).await.expect("the connection ends"));
        String::from_utf8_lossy(&answer).into_owned()
    };
    let sent = async {
        let mut sent = 0;
        writing.write_all(b"GET /version HTTP/1.1\r\nx: ").await.unwrap();
        while sent < 1000 << 10 && writing.write_all(&[b'a'; 1 << 10]).await.is_ok() {
            sent += 1 << 10;
        }
        sent
    };
    let (answer, sent) = tokio::join!(answer, sent);
    assert!(answer.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{answer}");
    assert!(answer.contains("limit of 8192 bytes") && answer.contains("connection: close\r\n"), "{answer}");
    // What was read, what was discarded, and what the kernel holds for both.
    assert!(sent < 600 << 10, "{sent} bytes were taken");
    // A little too long, and whole: refused as any request is.
    let mut client = balancer.client().await;
    client.send(format!("GET /version HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(9 << 10))).await;
    refused(&mut client, 431).await;
}

// === TLS ===

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stalls_within_tls_or_before_http2_is_disconnected() {
    let certs = Certs::new();
    let secure = Listen { tls: Some(certs.listen()), ..listen("127.0.0.1:0") };
    let limits = ConnectionLimits { idle: FAR, head: LIMIT, handshake: LIMIT };
    let (_engine, balancer) = stand(limits, |config| config.listen = vec![secure]).await;
    let mut silent = Wire::over(tcp(balancer.address()).await);
    let mut halfway = Wire::over(tcp(balancer.address()).await);
    halfway.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await;
    let mut no_preface = Wire::over(certs.connect(balancer.address(), &["h2"]).await);
    let mut half_preface = Wire::over(certs.connect(balancer.address(), &["h2"]).await);
    half_preface.send("PRI * HTTP/2.0\r\n").await;
    let mut no_head = Wire::over(certs.connect(balancer.address(), &["http/1.1"]).await);
    no_head.send("GET / HTTP/1.1\r\n").await;
    tokio::join!(silent.rest(), halfway.rest(), no_preface.rest(), half_preface.rest());
    refused(&mut no_head, 408).await;
    balancer.until_metric("vllm_lb_handshake_failures_total", 2.0).await;
}

// === HTTP/2 ===

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

/// A frame's type and payload.
async fn frame(client: &mut Wire) -> (u8, Bytes) {
    let head = client.exactly(9).await;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    (head[3], client.exactly(length).await)
}

async fn frame_of(client: &mut Wire, kind: u8) -> Bytes {
    loop {
        let (found, payload) = frame(client).await;
        if found == kind {
            return payload;
        }
    }
}

/// A connection whose client has said that it speaks HTTP/2 and nothing more.
async fn greeted(balancer: &Balancer) -> Wire {
    let mut client = balancer.client().await;
    client.send([PREFACE, &[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]].concat()).await;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_of_http2_is_sent_goaway_and_ends() {
    let (_engine, balancer) = stand(ConnectionLimits { idle: LIMIT, ..far() }, |_| {}).await;
    // This client does not even acknowledge.
    let silent = async {
        let begun = Instant::now();
        let mut client = greeted(&balancer).await;
        let goaway = frame_of(&mut client, GOAWAY).await;
        assert_eq!(goaway[4..8], [0; 4], "no error");
        assert!(is_in_time(begun));
        client.rest().await;
    };
    let after_requests = async {
        let mut client = H2::connect(balancer.address()).await;
        for _ in 0..2 {
            client.ask(h2::post(CHAT), &[chat("sim").into()]).await.expect(200);
        }
        let idle = Instant::now();
        client.closed().await;
        assert!(is_in_time(idle));
    };
    tokio::join!(silent, after_requests);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_of_http2_with_a_stream_is_not_idle() {
    let engine = paced(Duration::from_millis(30)).await;
    let mut config = config(upstreams([&engine]));
    config.limits.connection = ConnectionLimits { idle: LIMIT / 2, ..far() };
    let balancer = Balancer::ready(config).await;
    let mut client = H2::connect(balancer.address()).await;
    let answer = client.ask(h2::post(CHAT), &[stream("sim", 100).into()]).await.expect(200);
    assert_eq!(events(&answer.body).last().map(String::as_str), Some("data: [DONE]"));
    client.ask(h2::post(CHAT), &[chat("sim").into()]).await.expect(200);
    client.closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_http2_are_announced_and_kept() {
    let (_engine, balancer) = stand(far(), |config| config.limits.header_bytes = 10 << 10).await;
    let mut client = greeted(&balancer).await;
    let (kind, settings) = frame(&mut client).await;
    assert_eq!(kind, SETTINGS);
    let setting = |number: u8| settings.chunks(6).find(|entry| entry[..2] == [0, number]);
    assert_eq!(setting(3).unwrap()[2..], 256u32.to_be_bytes(), "concurrent streams");
    assert_eq!(setting(6).unwrap()[2..], (18u32 << 10).to_be_bytes(), "the header list");
    // Above the limit the refusal is ours, far above it the protocol's; other streams go on.
    let mut client = H2::connect(balancer.address()).await;
    for (size, is_ours) in [(12 << 10, true), (15 << 10, true), (40 << 10, false)] {
        let mut request = h2::post(CHAT);
        request.headers_mut().insert("x", "a".repeat(size).try_into().unwrap());
        let answer = client.begin(request, true).await.answer().await.expect(431);
        assert_eq!(!answer.body.is_empty(), is_ours, "{size}");
        client.ask(h2::post(CHAT), &[chat("sim").into()]).await.expect(200);
    }
}

/// Opens streams and resets them, some at a time. Returns after how many the connection ended, and why.
async fn reset_streams(balancer: &Balancer, most: usize) -> Option<(usize, Option<::h2::Reason>)> {
    let stream = tcp(balancer.address()).await;
    let (mut sender, connection) = ::h2::client::handshake(stream).await.expect("it speaks HTTP/2");
    let connection = tokio::spawn(connection);
    let mut opened = 0;
    'all: while opened < most {
        let mut asked = Vec::new();
        for _ in 0..50 {
            let ready = timeout(PATIENCE, poll_fn(|context| sender.poll_ready(context))).await;
            let Ok(Ok(())) = ready else { break 'all };
            let Ok(one) = sender.send_request(h2::post(CHAT), false) else { break 'all };
            asked.push(one);
            opened += 1;
        }
        // The balancer has accepted them: what it never sees is not counted.
        sleep(Duration::from_millis(30)).await;
        drop(asked);
        sleep(Duration::from_millis(5)).await;
    }
    if opened >= most {
        let mut client = h2::post(CHAT);
        client.headers_mut().insert("content-length", "2".parse().expect("a number is a value"));
        let (answer, mut body) = sender.send_request(client, false).expect("the connection lives");
        body.send_data("{}".into(), true).expect("the stream is open");
        timeout(PATIENCE, answer).await.expect("an answer comes").expect("it is one");
        return None;
    }
    let ended = timeout(PATIENCE, connection).await.expect("it ends").expect("without a panic");
    Some((opened, ended.err().and_then(|error| error.reason())))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_resets_what_it_opens_is_disconnected() {
    let (engine, balancer) = stand(far(), |_| {}).await;
    let mut connections = 0.0;
    // A write of the client may meet the closed connection before the client has read why.
    let why = loop {
        let (opened, why) = reset_streams(&balancer, 10_000).await.expect("the connection ends");
        assert!((500..1_500).contains(&opened), "{opened}");
        connections += 1.0;
        if why.is_some() || connections >= 5.0 {
            break why;
        }
    };
    assert_eq!(why, Some(::h2::Reason::ENHANCE_YOUR_CALM));
    assert_eq!(engine.stats().received, 0);
    balancer.until_metric("vllm_lb_rejects_total{reason=\"resets\"}", connections).await;
    // Others, and the same client on another connection, are served.
    let mut client = H2::connect(balancer.address()).await;
    client.ask(h2::post(CHAT), &[chat("sim").into()]).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_cancels_requests_is_not_disconnected() {
    let (_engine, balancer) = stand(far(), |_| {}).await;
    assert_eq!(reset_streams(&balancer, 350).await, None);
}

// === what a client sends beside its request ===

/// An upstream that has one request and answers when it is told to, with a large body.
async fn answering_late(length: usize) -> (UpstreamConfig, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("the upstream of the test works");
    let mut upstream =
        upstream(&format!("http://{}", listener.local_addr().expect("the upstream of the test works")));
    upstream.models = Some(vec!["sim".into()]);
    let (has_come, come) = mpsc::channel(1);
    let (answer, mut answers) = mpsc::channel::<()>(1);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("the upstream of the test works");
            let mut got = Vec::new();
            // Unread bytes would reset its connection, too.
            while !got.ends_with(b"\r\n\r\n") && !got.ends_with(b"}") {
                if stream.read_buf(&mut got).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            if !got.starts_with(b"POST ") {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
                continue;
            }
            has_come.send(()).await.expect("the upstream of the test works");
            answers.recv().await;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
            let _ = stream.write_all(head.as_bytes()).await;
            let _ = stream.write_all(&vec![b'x'; length]).await;
        }
    });
    (upstream, come, answer)
}

/// The connection was closed while bytes of its client stood unread, which resets it: the end of the answer
/// was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_beyond_its_body_receives_its_whole_answer() {
    const LENGTH: usize = 4 << 20;
    let (upstream, mut come, answer) = answering_late(LENGTH).await;
    let balancer = Balancer::ready(config(vec![upstream])).await;
    let mut was_seen = false;
    for _ in 0..20 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 << 10).unwrap();
        let mut client = Wire::over(socket.connect(balancer.address().parse().unwrap()).await.unwrap());
        client.send(post(CHAT, chat("sim"))).await;
        come.recv().await.unwrap();
        client.send(b"\r\nGET /version HTTP/1.1\r\nhost: a\r\n\r\n").await;
        sleep(Duration::from_millis(20)).await;
        answer.send(()).await.unwrap();
        let head = client.head().await;
        // Else the balancer had the answer before it looked at the client.
        was_seen |= head.headers.get("connection").is_some_and(|value| value == "close");
        let whole = client.body(head).await.expect(200);
        assert_eq!(whole.body.len(), LENGTH);
        if was_seen {
            break;
        }
    }
    assert!(was_seen, "no client was seen to send on");
}

/// A client that omits a body for which it was given no permission had its next request taken for that body.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_a_body_without_permission_ends_the_connection() {
    let (_engine, balancer) = stand(far(), |_| {}).await;
    let mut client = balancer.client().await;
    let fields = [("content-length", "27"), ("expect", "100-continue")];
    client.send(head("POST", "/nope", &fields)).await;
    let refused = client.answer().await.expect(404);
    assert_eq!(refused.header("connection"), "close");
    assert_eq!(client.rest().await, b""[..]);
}
