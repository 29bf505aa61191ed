//! A reader that lags: reports are as old as they are, and gauges come before all that waits.

use std::time::{Duration, Instant};

use redis::Pipeline;
use redis::aio::MultiplexedConnection;

use super::board::{Board, gauges, settings};
use crate::common::eventually;
use crate::common::redis::Redis;
use vllm_lb::state::exchange::{Binding, BindingUpdate, GaugeUpdate, Message};
use vllm_lb::state::redis::ExchangeSettings;

/// A sibling that publishes whatever a test wants, as many messages at once as it wants.
struct FakeSibling {
    link: MultiplexedConnection,
    sequence: u64,
    commands: Pipeline,
}

impl FakeSibling {
    async fn connect(redis: &Redis) -> Self {
        let client = redis::Client::open(redis.url()).expect("is a URL");
        let link = client.get_multiplexed_async_connection().await.expect("redis answers");
        FakeSibling { link, sequence: 0, commands: Pipeline::new() }
    }

    fn add(&mut self, active: Option<u64>, keys: &[String]) {
        self.sequence += 1;
        let mut message = Message::new(42, self.sequence);
        message.gauges = active.map(|active| GaugeUpdate { whole: true, rows: vec![("u1", gauges(active))] });
        let bound = |key| BindingUpdate { kind: Binding::Session, key, upstream: "u1", number: 7 };
        message.bound = keys.iter().map(|key| bound(key.as_str())).collect();
        let add = self.commands.cmd("XADD").arg("vllm-lb:{lb}:stream");
        add.arg("*").arg("d").arg(message.encode()).ignore();
    }

    async fn publish(&mut self) {
        let commands = std::mem::take(&mut self.commands);
        commands.query_async::<()>(&mut self.link).await.expect("redis accepts it");
    }
}

/// A balancer that takes a millisecond for each binding.
async fn slow(redis: &Redis) -> Board {
    let mut settings: ExchangeSettings = settings(&redis.url(), "slow");
    settings.options.gauge_ttl = Duration::from_secs(20);
    let board = Board::with(settings);
    board.exchange.wait_caught_up(crate::common::PATIENCE).await;
    board.slow_down(Duration::from_millis(1));
    board
}

fn keys(from: usize, to: usize) -> Vec<String> {
    (from..to).map(|number| format!("session {number}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_was_read_late_is_as_old_as_it_is() {
    let redis = Redis::start(&[]).await;
    let (board, mut sibling) = (slow(&redis).await, FakeSibling::connect(&redis).await);
    sibling.add(None, &keys(0, 1_000));
    sibling.publish().await;
    eventually("the balancer is busy", async || (!board.bound().is_empty()).then_some(())).await;
    sibling.add(Some(3), &[]);
    let begun = Instant::now();
    sibling.publish().await;
    // The report was published after `begun` and before this, and was read between two looks.
    let (published, mut least) = (Instant::now(), 0.0);
    let most = eventually("the report is read", async || {
        let now = published.elapsed().as_secs_f64();
        if board.others("u1") == gauges(3) {
            return Some(begun.elapsed().as_secs_f64());
        }
        least = now;
        None
    })
    .await;
    let age = board.age();
    assert!(least > 0.3, "it was read late: {least}");
    assert!((least - 0.15..most + 0.15).contains(&age), "{age} is not between {least} and {most}");
    let row = board.exchange.rows().into_iter().find(|row| row.balancer == 42).expect("is known");
    assert!(row.age.as_secs_f64() >= age);
}

#[tokio::test(flavor = "multi_thread")]
async fn gauges_are_right_long_before_a_backlog_is_applied() {
    const MESSAGES: usize = 1_500;
    let redis = Redis::start(&[]).await;
    let (board, mut sibling) = (slow(&redis).await, FakeSibling::connect(&redis).await);
    let wanted = keys(0, MESSAGES);
    for (number, key) in wanted.iter().enumerate() {
        sibling.add((number % 10 == 0).then_some(5), std::slice::from_ref(key));
    }
    sibling.publish().await;
    sibling.add(Some(9), &[]);
    sibling.publish().await;
    let start = Instant::now();
    board.until_others("u1", 9).await;
    let (took, applied) = (start.elapsed(), board.bound().len());
    assert!(applied < MESSAGES / 2, "{applied} bindings came first");
    assert!(took < Duration::from_millis(1_500), "{took:?}");
    // Later gauges do not wait either, and outdated ones do not come back.
    sibling.add(Some(11), &[]);
    sibling.publish().await;
    board.until_others("u1", 11).await;
    assert!(board.bound().len() < MESSAGES);
    eventually("all is applied", async || (board.bound().len() == MESSAGES).then_some(())).await;
    assert_eq!(board.others("u1"), gauges(11));
    assert!(board.bound().iter().map(|(key, _)| key).eq(&wanted), "bindings keep their order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_chains_does_not_delay_gauges() {
    const CHAINS: u64 = 800;
    let redis = Redis::start(&[]).await;
    let a = Board::begun(&redis.url(), "a").await;
    let b = slow(&redis).await;
    for number in 1..=CHAINS {
        a.send("u1", &super::chain(number, 3));
    }
    let held = || (1..=CHAINS).filter(|number| b.held("u1", &super::chain(*number, 3)) == 3).count();
    eventually("the first chain is there", async || (held() > 0).then_some(())).await;
    a.set("u1", 4);
    b.until_others("u1", 4).await;
    assert!(held() < CHAINS as usize / 2, "{} chains came first", held());
    eventually("all chains are there", async || (held() == CHAINS as usize).then_some(())).await;
}

/// Regression: what was read before the connection was lost, and not yet applied, was not read again.
#[tokio::test(flavor = "multi_thread")]
async fn chains_that_were_read_before_a_loss_of_the_connection_are_applied() {
    const CHAINS: u64 = 800;
    let redis = Redis::start(&[]).await;
    let a = Board::begun(&redis.url(), "a").await;
    let b = slow(&redis).await;
    for number in 1..=CHAINS {
        a.send("u1", &super::chain(number, 3));
    }
    let held = || (1..=CHAINS).filter(|number| b.held("u1", &super::chain(*number, 3)) == 3).count();
    for _ in 0..2 {
        let before = held();
        eventually("some chains are applied", async || (held() > before).then_some(())).await;
        redis.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    }
    assert!(held() < CHAINS as usize, "the connection was lost too late");
    eventually("all chains are there", async || (held() == CHAINS as usize).then_some(())).await;
}
