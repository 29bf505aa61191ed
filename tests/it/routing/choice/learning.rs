//! What is learnt when a request is sent, and taken back, or forgotten, when it is no longer true.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{BLOCK, CHAT, all, ask, change, chat_of, known, next_turn, only, pending, telling, words};
use crate::common::wire::{JSON, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, Timing, config, direct, engine, engines, eventually,
    names, upstream, upstreams,
};

const PROMPTS: u64 = 12;

/// Prompts of about a thousand tokens that have nothing in common.
fn prompts() -> Vec<String> {
    (0..PROMPTS).map(|number| words(50 + number, 1_000)).collect()
}

/// A balancer over engines of which the first was sent all prompts, and no other any.
async fn warm(engines: &[EngineServer]) -> Balancer {
    let balancer = telling(config(upstreams(engines))).await;
    only(&balancer, engines, 0).await;
    for text in prompts() {
        assert_eq!(ask(&balancer, engines, &chat_of(&text)).await, 0);
    }
    all(&balancer, engines).await;
    balancer
}

/// How many of the prompts' next turns go to the first engine.
async fn still_there(balancer: &Balancer, engines: &[EngineServer]) -> usize {
    let mut there = 0;
    for text in prompts() {
        there += usize::from(ask(balancer, engines, &next_turn(&text)).await == 0);
    }
    there
}

// === what never arrived ===

#[tokio::test(flavor = "multi_thread")]
async fn an_unanswered_request_leaves_nothing_in_the_index() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.health.fall = 1_000;
    config.breaker.failures = 1_000;
    let balancer = telling(config).await;
    // Little, as it may be forgotten with an engine that is gone for a while.
    ask(&balancer, &engines, &chat_of(&words(1, 200))).await;
    let before = known(&balancer).await.1;
    let refusals = [
        InjectedFault::Refuse,
        InjectedFault::Status { status: 503, body: "{}".into() },
        InjectedFault::Status { status: 429, body: "{}".into() },
        InjectedFault::Status { status: 400, body: "{}".into() },
        InjectedFault::ShuttingDown,
    ];
    for (seed, fault) in (10..).zip(refusals) {
        for engine in &engines {
            engine.set_fault(fault.clone()).await;
        }
        for stream in [true, false] {
            let mut body = chat_of(&words(seed, 1_000));
            body["stream"] = stream.into();
            let answer = balancer.ask(post(CHAT, body.to_string())).await;
            assert!(answer.status >= 400, "{fault:?}: {answer:?}");
            let left = known(&balancer).await.1;
            assert!(left <= before, "{fault:?} stream {stream}: {left}, and {before} before");
        }
        for engine in &engines {
            engine.clear_fault().await;
        }
        balancer.until_ready(2).await;
    }
    let left = known(&balancer).await.1;
    balancer.until_metric("vllm_lb_index_pairs", left as f64).await;
}

/// A prompt that is longer than the model reads is refused, and no part of it is computed.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_prompt_is_not_in_the_index() {
    let engines = engines(2).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let before = known(&balancer).await;
    balancer.ask(post(CHAT, chat_of(&words(2, 40_000)).to_string())).await.expect(400);
    assert_eq!(known(&balancer).await.1, before.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_in_the_queue_leaves_nothing_in_the_index() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.upstreams[0].max_active = Some(1);
    let balancer = telling(config).await;
    engines[0].set_fault(InjectedFault::StallHeaders).await;
    let first = pending(&balancer, CHAT, &chat_of("hi")).await;
    let before = balancer.running.state.size().pairs;
    let mut waiting = balancer.client().await;
    waiting.send(post(CHAT, chat_of(&words(3, 2_000)).to_string())).await;
    balancer.until_metric("vllm_lb_queued", 1.0).await;
    drop(waiting);
    balancer.until_metric("vllm_lb_queued", 0.0).await;
    drop(first);
    assert_eq!(known(&balancer).await.1, before);
}

/// A listener that answers probes until it is closed; later connections stay in its backlog.
struct Crowded {
    listener: Arc<TcpListener>,
    answering: JoinHandle<()>,
}

impl Crowded {
    fn start() -> Self {
        let socket = TcpSocket::new_v4().expect("there is a socket");
        socket.bind("127.0.0.1:0".parse().expect("it is an address")).expect("a free port is there");
        let listener = Arc::new(socket.listen(1).expect("it can listen"));
        let accepting = listener.clone();
        let answering = tokio::spawn(async move {
            while let Ok((mut stream, _)) = accepting.accept().await {
                let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
                // The client may have disconnected; the request does not matter.
                drop(stream.read(&mut [0; 4_096]).await);
                drop(stream.write_all(answer).await);
            }
        });
        Crowded { listener, answering }
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("a listener has an address")
    }

    /// Stops accepting; the returned connections fill the backlog.
    async fn close(&self) -> Vec<TcpStream> {
        self.answering.abort();
        let mut waiting = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(200), TcpStream::connect(self.address())).await {
            waiting.push(stream.expect("there is room for some"));
        }
        waiting
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_during_connect_leaves_nothing_in_the_index() {
    let crowded = Crowded::start();
    let mut config = config(vec![upstream(&format!("http://{}", crowded.address()))]);
    config.upstreams[0].models = Some(names(&["sim"]));
    config.health.fall = 1_000;
    config.health.metrics = false;
    config.timeouts.connect = Duration::from_secs(3);
    let balancer = telling(config).await;
    let waiting = crowded.close().await;
    let before = known(&balancer).await.1;
    let client = pending(&balancer, CHAT, &chat_of(&words(4, 1_000))).await;
    let size = || balancer.running.state.size().pairs;
    eventually("siblings of a burst would find it", async || (size() >= before + 7).then_some(())).await;
    drop(client);
    assert_eq!(known(&balancer).await.1, before);
    drop(waiting);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_request_is_indexed_at_the_answering_upstream() {
    let faults = [
        InjectedFault::Refuse,
        InjectedFault::ShuttingDown,
        InjectedFault::Status { status: 503, body: "{}".into() },
    ];
    for fault in faults {
        let engines = engines(2).await;
        let mut config = config(upstreams(&engines));
        config.health.fall = 1_000;
        config.breaker.failures = 1_000;
        config.breaker.open = Duration::from_millis(200);
        let balancer = telling(config).await;
        let before = known(&balancer).await;
        engines[0].set_fault(fault.clone()).await;
        for text in prompts() {
            assert_eq!(ask(&balancer, &engines, &chat_of(&text)).await, 1, "{fault:?}");
        }
        let after = known(&balancer).await;
        assert_eq!(after.0 - before.0, after.1 - before.1, "{fault:?}: one holder for each block");
        engines[0].clear_fault().await;
        balancer.until_ready(2).await;
        eventually("the first is let in again", async || {
            super::row(&balancer, &engines[0]).await["full"].as_bool().is_some_and(|full| !full).then_some(())
        })
        .await;
        assert_eq!(still_there(&balancer, &engines).await, 0, "{fault:?}: all are with the second");
    }
}

// === what is no longer true ===

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_follows_its_cache_until_the_engine_restarts() {
    let engines = engines(3).await;
    let balancer = warm(&engines).await;
    assert_eq!(still_there(&balancer, &engines).await, PROMPTS as usize);
    eventually("it has told when it began", async || {
        super::row(&balancer, &engines[0]).await.get("running").map(drop)
    })
    .await;
    engines[0].restart().await;
    eventually("it is taken for a new one", async || {
        (super::row(&balancer, &engines[0]).await["incarnation"] == 1).then_some(())
    })
    .await;
    balancer.until_ready(3).await;
    let there = still_there(&balancer, &engines).await;
    // All of them by chance would be one case in half a million.
    assert!(there < PROMPTS as usize, "{there} of {PROMPTS} still go where nothing is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_was_down_returns_cold() {
    let engines = engines(3).await;
    let balancer = warm(&engines).await;
    engines[0].set_health(Some(503));
    balancer.until_ready(2).await;
    engines[0].set_health(None);
    balancer.until_ready(3).await;
    let there = still_there(&balancer, &engines).await;
    assert!(there < PROMPTS as usize, "{there} of {PROMPTS} still go where nothing is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_upstream_frees_its_blocks_and_returns_cold() {
    let engines = engines(3).await;
    let balancer = warm(&engines).await;
    let held = known(&balancer).await.1;
    assert!(held >= PROMPTS as usize * 4_000 / BLOCK, "{held}");
    let path = format!("/admin/upstreams/{}?wait=20s", direct(&engines[0]));
    balancer.admin(request("DELETE", &path, &[], b"")).await.expect(200);
    balancer.until_ready(2).await;
    // What it held goes with what is learnt afterwards.
    let mut asked = 0;
    eventually("its entries are gone", async || {
        asked += 1;
        ask(&balancer, &engines, &chat_of(&words(10_000 + asked, 20))).await;
        (known(&balancer).await.1 < BLOCK.min(held / 2)).then_some(())
    })
    .await;
    let body = json!({"url": engines[0].url()}).to_string();
    let added = request("POST", "/admin/upstreams?wait=20s", &[JSON], body.as_bytes());
    balancer.admin(added).await.expect(201);
    balancer.until_ready(3).await;
    let there = still_there(&balancer, &engines).await;
    assert!(there < PROMPTS as usize, "{there} of {PROMPTS} still go where nothing is known");
}

/// Weights and drains are no reasons to forget.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_by_an_operator_keeps_the_index() {
    let engines = engines(3).await;
    let balancer = warm(&engines).await;
    change(&balancer, &engines[0], json!({"drain": true})).await;
    change(&balancer, &engines[0], json!({"drain": false, "weight": 2})).await;
    change(&balancer, &engines[0], json!({"weight": 1})).await;
    balancer.until_ready(3).await;
    assert_eq!(still_there(&balancer, &engines).await, PROMPTS as usize);
}

/// The engine's cache is full after a few of the prompts, and its metrics say how large it is.
#[tokio::test(flavor = "multi_thread")]
async fn the_index_of_an_upstream_is_bounded_by_its_cache() {
    let options = Options { timing: Timing::instant(), cache_tokens: 4_096, ..Options::default() };
    let engines = [engine(Options { max_model_len: 4_096, ..options }).await];
    let balancer = telling(config(upstreams(&engines))).await;
    eventually("its cache's size is known", async || {
        (super::row(&balancer, &engines[0]).await["cache_tokens"] == 4_096).then_some(())
    })
    .await;
    for text in prompts() {
        ask(&balancer, &engines, &chat_of(&text)).await;
    }
    let most = 4_096 * 4 / BLOCK;
    eventually("the rest is forgotten", async || {
        let held = known(&balancer).await.1;
        // How long a token is has been learnt of these prompts, and their template takes tokens too.
        (held <= most * 5 / 4).then_some(())
    })
    .await;
}
