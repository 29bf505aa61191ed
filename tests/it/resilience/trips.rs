//! What trips the breaker of an upstream, and what ends a trip.

use std::time::Duration;

use crate::common::body::stream;
use crate::common::wire::post;
use crate::common::{Balancer, InjectedFault, config, engines, eventually, upstreams};
use vllm_lb::config::types::Breaker;
use vllm_lb::fleet::UpstreamState;

const CHAT: &str = "/v1/chat/completions";

/// The state of the first upstream.
fn state(balancer: &Balancer) -> UpstreamState {
    balancer.running.fleet.snapshot().entries[0].state()
}

/// vLLM sends the head of a stream before it reads the prompt: such a head had ended trips, and counted as an
/// answer beside its own failure, so that an engine that failed three streams of four never tripped.
#[tokio::test(flavor = "multi_thread")]
async fn the_head_of_a_stream_that_fails_at_once_is_no_answer() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.breaker = Breaker { open: Duration::from_millis(300), failures: 5, ..Breaker::default() };
    config.upstreams[0].weight = 1000.0;
    let balancer = Balancer::ready(config).await;
    let fails = InjectedFault::ErrorEvent { status: 500 };
    let mut asked = 0;
    eventually("it has tripped", async || {
        // One stream in three is good.
        match asked % 3 {
            0 => engines[0].clear_fault().await,
            _ => engines[0].set_fault(fails.clone()).await,
        }
        asked += 1;
        balancer.ask(post(CHAT, stream("sim", 2))).await.expect(200);
        (state(&balancer) == UpstreamState::Tripped).then_some(())
    })
    .await;
    assert!(asked < 30, "{asked}");
    engines[0].set_fault(fails).await;
    let before = engines[0].requests().len();
    eventually("two trials have failed", async || {
        balancer.ask(post(CHAT, stream("sim", 2))).await.expect(200);
        assert_eq!(state(&balancer), UpstreamState::Tripped);
        (engines[0].requests().len() >= before + 2).then_some(())
    })
    .await;
    // An error of the client is no trial that passed.
    engines[0].set_fault(InjectedFault::Status { status: 400, body: "{}".into() }).await;
    let before = engines[0].requests().len();
    eventually("a trial had an error of the client", async || {
        balancer.ask(post(CHAT, stream("sim", 2))).await;
        (engines[0].requests().len() > before).then_some(())
    })
    .await;
    assert_eq!(state(&balancer), UpstreamState::Tripped);
    engines[0].clear_fault().await;
    eventually("a trial was answered", async || {
        balancer.ask(post(CHAT, stream("sim", 2))).await.expect(200);
        (state(&balancer) == UpstreamState::Ready).then_some(())
    })
    .await;
}
