//! The connections of probes.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::common::ports::reserved_address;
use crate::common::wire::get;
use crate::common::{Balancer, Options, config, engine, eventually, logs, upstream, upstreams};

/// One connection carries the probes, another one the readings of metrics.
const PROBE_CONNECTIONS: u64 = 2;

#[tokio::test(flavor = "multi_thread")]
async fn many_probes_use_one_connection() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    eventually("it was probed 20 times", async || (engine.stats().polled >= 60).then_some(())).await;
    assert_eq!(engine.stats().accepted, PROBE_CONNECTIONS);
    assert_eq!((engine.stats().connections, engine.stats().used), (2, 0));
    let health = |path: &str| engine.polls().iter().filter(|poll| poll.path == path).count();
    assert!(health("/health") >= 10 && health("/metrics") >= 10);
    // After a restart both are opened again.
    engine.restart().await;
    let before = engine.stats();
    let more = before.polled + 30;
    eventually("it was probed 10 times more", async || (engine.stats().polled >= more).then_some(())).await;
    assert!(engine.stats().accepted <= before.accepted + 2 * PROBE_CONNECTIONS, "{:?}", engine.stats());
    balancer.until_ready(1).await;
}

/// Servers close idle connections: a probe that finds that is no failed probe.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_the_server_closed_is_no_failure() {
    let keep_alive = Duration::from_millis(20);
    let engines = [
        engine(Options { keep_alive, ..Options::default() }).await,
        // Closed at about the time of the next probe.
        engine(Options { keep_alive: Duration::from_millis(95), ..Options::default() }).await,
    ];
    let mut settings = config(upstreams(&engines));
    settings.health.interval = Duration::from_millis(100);
    let balancer = Balancer::ready(settings).await;
    let enough = engines.each_ref().map(|engine| (engine, engine.stats().polled + 60));
    for (engine, more) in enough {
        eventually("it was probed 20 times more", async || (engine.stats().polled >= more).then_some(()))
            .await;
    }
    assert!(engines[0].stats().accepted > 20, "{:?}", engines[0].stats());
    assert_eq!(balancer.metric("vllm_lb_probe_failures_total").await, 0.0);
    assert_eq!(balancer.metric("vllm_lb_upstream_changes_total").await, 2.0, "each became ready once");
}

/// A probe of an upstream in doubt shows whether it accepts connections.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_accepts_no_connections_is_found_after_a_failed_request() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let before = engine.stats().accepted;
    let upstream = balancer.running.fleet.snapshot().entries[0].upstream.clone();
    let signal =
        vllm_lb::fleet::UpstreamSignal::Unreached { refused: false, placed: std::time::Instant::now() };
    balancer.running.fleet.report(&upstream, signal);
    eventually("a new connection is opened", async || (engine.stats().accepted > before).then_some(())).await;
    balancer.until_ready(1).await;
}

/// Answers every request on the listener with this status, and closes the connection.
async fn answer_all(listener: TcpListener, status: &str) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        let mut head = [0; 4096];
        // A probe that has gone is asked for no more.
        if stream.read(&mut head).await.is_ok() {
            drop(stream.write_all(answer.as_bytes()).await);
        }
    }
}

/// The first error alone was logged, at a level that `-q` hides, and the reason of the state named none.
#[tokio::test(flavor = "multi_thread")]
async fn each_new_error_of_a_probe_is_logged_once_and_is_in_the_reason() {
    new_errors(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_failed_probe_that_counts_is_a_warning() {
    new_errors(1).await;
}

async fn new_errors(fall: u32) {
    let address = reserved_address();
    let mut config = config(vec![upstream(&format!("http://{address}"))]);
    config.health.interval = Duration::from_millis(50);
    config.health.fall = fall;
    let balancer = Balancer::start(config).await;
    let reason_with = async |text: &str| {
        eventually("the reason names the error", async || {
            let reason = balancer.admin(get("/admin/upstreams")).await.json()[0]["reason"].to_string();
            reason.contains(text).then_some(())
        })
        .await;
    };
    reason_with("refused").await;
    let warned = |text: &str| {
        logs::all().iter().filter(|line| line.starts_with("WARN upstream") && line.contains(text)).count()
    };
    eventually("a warning", async || (warned("upstream does not answer") == 1).then_some(())).await;
    for status in ["401 Unauthorized", "500 Internal Server Error"] {
        let listener = TcpListener::bind(&address).await.expect("the port is reserved");
        let server = tokio::spawn(answer_all(listener, status));
        let code = format!("status {}", &status[..3]);
        reason_with(&code).await;
        let failures = balancer.metric("vllm_lb_probe_failures_total").await;
        eventually("more probes", async || {
            (balancer.metric("vllm_lb_probe_failures_total").await >= failures + 5.0).then_some(())
        })
        .await;
        assert_eq!(warned(&code), 1, "{:?}", logs::all());
        server.abort();
        reason_with("refused").await;
    }
    assert_eq!(warned("upstream does not answer"), 1);
}
