//! Anything that happens to Redis while two balancers serve: no request fails, and each balancer knows what
//! the other has in flight within a second after it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until, timeout};

use crate::common::body::stream;
use crate::common::clients::{Clients, none};
use crate::common::redis::Redis;
use crate::common::sentinel::SentinelSet;
use crate::common::slow_link::SlowLink;
use crate::common::wire::{Wire, post};
use crate::common::{
    Balancer, EngineServer, Options, Timing, admin, config, engines, eventually, names, upstreams,
};
use vllm_lb::config::redis;

const CHAT: &str = "/v1/chat/completions";

/// Gauges are right a second after Redis is well. This machine may run other tests beside: three times that.
const RIGHT_AGAIN: Duration = Duration::from_secs(3);

/// Requests of each balancer's clients while the trouble lasts.
const REQUESTS: u64 = 25;

/// How long answers of a slow Redis take.
const SLOW: Duration = Duration::from_millis(200);

/// Two balancers under load, and streams that last.
struct Stage {
    engines: Vec<EngineServer>,
    slow: EngineServer,
    balancers: [Balancer; 2],
    clients: [Clients; 2],
    held: [Vec<Wire>; 2],
}

// === impl Stage ===

impl Stage {
    async fn new(url: &str) -> Self {
        let engines = engines(3).await;
        let timing = Timing { per_step: 0.02, ..Timing::instant() };
        let options = Options { models: names(&["slow"]), timing, ..Options::default() };
        let slow = EngineServer::start(options).await.expect("a free port is there");
        let mut config = config(upstreams(engines.iter().chain([&slow])));
        config.redis = Some(redis::url(url).expect("is a URL"));
        config.redis_options.gauge_ttl = Duration::from_millis(1500);
        let balancers = [Balancer::ready(config.clone()).await, Balancer::ready(config).await];
        let clients = [Clients::start(&balancers[0], 2), Clients::start(&balancers[1], 2)];
        let mut stage = Stage { engines, slow, balancers, clients, held: Default::default() };
        stage.hold(0, 2).await;
        stage.hold(1, 1).await;
        eventually("each knows the other", async || stage.is_right().then_some(())).await;
        stage
    }

    /// Streams through one of the balancers, which last until they are dropped.
    async fn hold(&mut self, balancer: usize, count: usize) {
        for _ in 0..count {
            let mut client = self.balancers[balancer].client().await;
            client.send(post(CHAT, stream("slow", 4000))).await;
            client.head().await;
            self.held[balancer].push(client);
        }
    }

    /// Whether each balancer counts what the other holds.
    fn is_right(&self) -> bool {
        let name = self.slow.address().to_string();
        let counted = self.balancers.each_ref().map(|balancer| {
            let snapshot = balancer.running.fleet.snapshot();
            snapshot.by_name(&name).expect("is there").upstream.siblings().active
        });
        counted == [self.held[1].len() as u64, self.held[0].len() as u64]
    }

    /// So many requests more are answered by each balancer.
    async fn serve(&self) {
        for clients in &self.clients {
            clients.until_more(REQUESTS).await;
        }
    }

    /// What is in flight changes, in both directions, unknown to the other balancer.
    async fn change(&mut self) {
        self.held[0].truncate(1);
        self.hold(1, 2).await;
        self.serve().await;
    }

    /// Waits until each balancer counts what the other holds, for as long as the requirement allows.
    async fn right_again(&self) {
        let start = Instant::now();
        let right = eventually("each is right", async || self.is_right().then_some(()));
        let in_time = timeout(RIGHT_AGAIN, right).await;
        assert!(in_time.is_ok(), "gauges are wrong {:?} after the end", start.elapsed());
    }

    /// Ends the load: no request failed, and nothing is left in flight.
    async fn end(self) {
        self.serve().await;
        let [first, second] = self.clients;
        assert_eq!((first.end().await, second.end().await), (none(), none()));
        drop(self.held);
        for balancer in &self.balancers {
            balancer.until_idle().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_redis_that_is_killed() {
    let mut redis = Redis::start(&[]).await;
    let mut stage = Stage::new(&redis.url()).await;
    redis.kill();
    stage.serve().await;
    stage.balancers[0].until_metric("vllm_lb_redis_up", 0.0).await;
    stage.change().await;
    redis.again().await;
    stage.right_again().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_redis_that_is_emptied() {
    let redis = Redis::start(&[]).await;
    let mut stage = Stage::new(&redis.url()).await;
    for _ in 0..3 {
        redis.ask(&["FLUSHALL"]).await;
        stage.serve().await;
    }
    stage.change().await;
    redis.ask(&["FLUSHALL"]).await;
    stage.right_again().await;
    stage.end().await;
}

/// What the snapshot says of requests in flight and of members is past, and must not be believed.
#[tokio::test(flavor = "multi_thread")]
async fn survives_a_redis_that_returns_to_an_old_snapshot() {
    let mut redis = Redis::start(&[]).await;
    let mut stage = Stage::new(&redis.url()).await;
    let member = format!("/admin/upstreams/{}", stage.engines[0].address());
    stage.hold(0, 5).await;
    stage.right_again().await;
    redis.take_snapshot().await;
    stage.held[0].truncate(2);
    admin(&stage.balancers[0], "PATCH", &member, json!({"state": "drain"})).await.expect(200);
    let drained = async |balancer: &Balancer| {
        let row = admin(balancer, "GET", &member, Value::Null).await.json();
        matches!(row["state"].as_str(), Some("draining" | "drained"))
    };
    eventually("the other knows", async || drained(&stage.balancers[1]).await.then_some(())).await;
    stage.change().await;
    redis.return_to_snapshot().await;
    stage.right_again().await;
    stage.serve().await;
    // The whole state was published again meanwhile, more than once.
    let said = async || stage.balancers[1].metric("vllm_lb_exchange_messages_total").await;
    let before = said().await;
    eventually("messages go on", async || (said().await > before + 50.0).then_some(())).await;
    assert!(stage.is_right());
    for balancer in &stage.balancers {
        assert!(drained(balancer).await, "an old list of members took effect");
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_failover_by_sentinel() {
    let mut set = SentinelSet::start().await;
    let mut stage = Stage::new(&set.url()).await;
    set.fail_over().await;
    stage.change().await;
    stage.right_again().await;
    stage.end().await;
}

/// While answers take 200 ms the gauges are late, and right all the same.
#[tokio::test(flavor = "multi_thread")]
async fn survives_a_redis_that_is_slow() {
    let redis = Redis::start(&[]).await;
    let link = SlowLink::to(redis.port).await;
    let mut stage = Stage::new(&format!("redis://127.0.0.1:{}", link.port)).await;
    link.set_delay(SLOW);
    stage.change().await;
    stage.right_again().await;
    // Long enough for a balancer to give up, if it took slow for dead.
    let end = Instant::now() + 10 * SLOW;
    while Instant::now() < end {
        stage.serve().await;
        sleep_until(end.min(Instant::now() + SLOW)).await;
    }
    assert_eq!(stage.balancers[0].metric("vllm_lb_redis_failures_total").await, 0.0);
    stage.hold(0, 1).await;
    link.set_delay(Duration::ZERO);
    stage.right_again().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_redis_that_is_full() {
    let redis = Redis::start(&["--maxmemory-policy", "noeviction"]).await;
    let mut stage = Stage::new(&redis.url()).await;
    redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
    stage.balancers[0].until_metric("vllm_lb_redis_up", 0.0).await;
    stage.change().await;
    redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
    stage.right_again().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_redis_that_is_read_only() {
    let redis = Redis::start(&[]).await;
    let mut stage = Stage::new(&redis.url()).await;
    redis.set_read_only().await;
    stage.balancers[0].until_metric("vllm_lb_redis_up", 0.0).await;
    stage.change().await;
    redis.set_writable().await;
    stage.right_again().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_redis_that_freezes() {
    let redis = Redis::start(&[]).await;
    let mut stage = Stage::new(&redis.url()).await;
    redis.freeze();
    stage.balancers[0].until_metric("vllm_lb_redis_up", 0.0).await;
    stage.change().await;
    redis.thaw();
    stage.right_again().await;
    stage.end().await;
}
