//! The stream of overviews: its viewers come, read slowly, leave, and are disconnected by a shutdown.

use std::time::{Duration, Instant};

use http::Request;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::common::h2::H2;
use crate::common::wire::{self, Framing, Head, Wire};
use crate::common::{Balancer, PATIENCE, config, eventually, gauge_of, paced, serving, upstream, upstreams};
use vllm_lb::config::types::UpstreamConfig;

/// The limits of the product.
const MAX_VIEWERS: usize = 64;
const MAX_STREAM_STALL: Duration = Duration::from_secs(10);

const LIVE: &str = "/admin/live?interval=0.5";

async fn connect(balancer: &Balancer) -> (Wire, Head) {
    let mut wire = Wire::connect(&balancer.running.admin).await;
    wire.send(wire::with_host(&wire::get(LIVE), &balancer.running.admin)).await;
    let head = wire.head().await;
    (wire, head)
}

fn parsed(event: &[u8]) -> Value {
    let text = std::str::from_utf8(event).expect("events are text");
    let data = text.strip_prefix("event: overview\ndata: ").and_then(|rest| rest.strip_suffix("\n\n"));
    serde_json::from_str(data.unwrap_or_else(|| panic!("{text:?} is no event"))).expect("the data are JSON")
}

async fn next_event(wire: &mut Wire) -> Value {
    let piece = wire.piece(&mut Framing::Chunked).await.expect("the stream goes on");
    parsed(&piece.expect("the stream goes on"))
}

#[tokio::test]
async fn a_viewer_sees_changes_and_is_no_request_in_flight() {
    let engines = [serving(&["m"]).await, serving(&["m"]).await];
    let balancer = Balancer::over(&engines).await;
    let (mut viewer, head) = connect(&balancer).await;
    assert_eq!((head.status, head.framing), (200, Framing::Chunked));
    assert!(head.headers["content-type"].to_str().expect("is text").starts_with("text/event-stream"));
    let first = next_event(&mut viewer).await;
    assert_eq!((&first["totals"]["requests"], &first["totals"]["in_flight"]), (&0.into(), &0.into()));
    assert_eq!(balancer.gauge("vllm_lb_in_flight"), 0, "a viewer is no request of a client");
    balancer.ask(wire::post("/v1/completions", r#"{"model": "m", "prompt": "a"}"#)).await.expect(200);
    let (mut decisions, mut later) = (0, 0);
    // Events from before the request may still be on the way.
    while later < 3 {
        let seen = next_event(&mut viewer).await;
        decisions += seen["decisions"].as_array().expect("is a list").len();
        later += usize::from(seen["totals"]["requests"] == 1);
    }
    assert_eq!(decisions, 1, "a choice is shown once");
    drop(viewer);
    balancer.stop().await;
}

#[tokio::test]
async fn a_viewer_over_http2_leaves_with_a_reset_and_gives_its_place_to_another() {
    let engine = serving(&["m"]).await;
    let balancer = Balancer::over([&engine]).await;
    let mut connection = H2::connect(&balancer.running.admin).await;
    let uri = format!("http://{}{LIVE}", balancer.running.admin);
    let request = || Request::get(&uri).body(()).expect("is a request");
    let mut viewers = Vec::new();
    for _ in 0..MAX_VIEWERS {
        let asked = connection.begin(request(), true).await;
        let answer = asked.answer.await.expect("an answer comes");
        assert_eq!(answer.status(), 200);
        viewers.push((answer.into_body(), asked.body));
    }
    for (body, _) in &mut viewers {
        let event = body.data().await.expect("the stream goes on").expect("the stream goes on");
        body.flow_control().release_capacity(event.len()).expect("it came");
        assert_eq!(parsed(&event)["balancer"]["ready"], true);
    }
    let refused = connection.begin(request(), true).await.answer().await;
    assert_eq!(refused.status, 503, "{}", refused.text());
    let refused = balancer.admin(wire::get(LIVE)).await.expect(503);
    assert!(refused.text().contains("viewers"), "also over HTTP/1.1: {}", refused.text());
    drop(viewers.pop());
    eventually("a place is free", async || {
        let answer = connection.begin(request(), true).await.answer.await.expect("an answer comes");
        (answer.status() == 200).then_some(())
    })
    .await;
    drop((viewers, connection));
    balancer.stop().await;
}

#[tokio::test]
async fn a_viewer_that_leaves_is_noticed() {
    let engine = serving(&["m"]).await;
    let balancer = Balancer::over([&engine]).await;
    let (mut viewer, _) = connect(&balancer).await;
    next_event(&mut viewer).await;
    assert_eq!(balancer.gauge("vllm_lb_connections"), 1);
    drop(viewer);
    until_unconnected(&balancer).await;
    let (mut half, _) = connect(&balancer).await;
    half.finish().await;
    until_unconnected(&balancer).await;
    balancer.stop().await;
}

async fn until_unconnected(balancer: &Balancer) {
    let connections = async || (balancer.gauge("vllm_lb_connections") == 0).then_some(());
    eventually("the connection has ended", connections).await;
}

/// A page of upstreams fills the buffers of a connection in seconds.
#[tokio::test]
async fn a_viewer_that_does_not_read_is_disconnected() {
    let engine = serving(&["m"]).await;
    let mut config = config(upstreams([&engine]));
    for number in 0..60 {
        let name = format!("unreachable-{number}-{}", "x".repeat(4000));
        let item = UpstreamConfig { name, ..upstream("http://127.0.0.1:9") };
        config.upstreams.push(item);
    }
    let balancer = Balancer::start(config).await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a fresh socket takes options");
    let address = balancer.running.admin.parse().expect("is an address");
    let mut viewer = socket.connect(address).await.expect("the listener takes connections");
    let request = wire::with_host(&wire::get(LIVE), &balancer.running.admin);
    viewer.write_all(&request).await.expect("it is sent");
    let start = Instant::now();
    eventually("it is connected", async || (balancer.gauge("vllm_lb_connections") == 1).then_some(())).await;
    until_unconnected(&balancer).await;
    assert!(start.elapsed() > MAX_STREAM_STALL, "{:?}: it had its time", start.elapsed());
    let mut rest = Vec::new();
    // The connection is reset where the viewer has left something unread.
    let read = viewer.read_to_end(&mut rest).await;
    assert!(read.is_err() || !rest.ends_with(b"0\r\n\r\n"), "the cut stream does not look whole");
    balancer.stop().await;
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_viewers() {
    let engine = serving(&["m"]).await;
    let balancer = Balancer::over([&engine]).await;
    let (mut viewer, head) = connect(&balancer).await;
    next_event(&mut viewer).await;
    let start = Instant::now();
    let stopped = tokio::spawn(balancer.running.stop(PATIENCE));
    let rest = viewer.body(head).await;
    assert!(rest.whole, "the stream ends in order");
    assert_eq!(stopped.await.expect("it stops"), 0, "no connection is cut");
    assert!(start.elapsed() < PATIENCE / 4, "{:?}", start.elapsed());
}

/// Regression: the admin listener closed with the public ones, so that monitoring reported a balancer as lost
/// while it served its last requests.
#[tokio::test]
async fn a_stop_serves_the_admin_listener_until_the_last_request_ends() {
    let engine = paced(Duration::from_millis(20)).await;
    let balancer = Balancer::over([&engine]).await;
    let (address, admin) = (balancer.address().to_string(), balancer.running.admin.clone());
    let (mut viewer, head) = connect(&balancer).await;
    assert_eq!(head.status, 200);
    let mut client = balancer.client().await;
    let body = r#"{"model": "sim", "prompt": "a", "max_tokens": 200, "ignore_eos": true, "stream": true}"#;
    client.send(wire::post("/v1/completions", body)).await;
    let stream = client.head().await;
    let stopped = tokio::spawn(balancer.running.stop(PATIENCE));
    let refused = async || TcpStream::connect(&address).await.is_err().then_some(());
    eventually("the public listener closes", refused).await;
    let page = Wire::connect(&admin).await.ask(wire::get("/metrics")).await.expect(200);
    assert_eq!(gauge_of(page.text(), "vllm_lb_in_flight"), 1, "the request still runs");
    next_event(&mut viewer).await;
    assert!(client.body(stream).await.whole, "the request ends in order");
    assert!(stopped.await.expect("it stops") == 0 && TcpStream::connect(&admin).await.is_err());
}
