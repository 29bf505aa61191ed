//! The connections of probes.

use std::time::Duration;

use crate::common::{Balancer, Options, config, engine, eventually, upstreams};

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
