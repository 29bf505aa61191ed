//! The deadlines of a request, and the times that its watch records.

use super::*;
use crate::config::types::{Config, UpstreamConfig, UpstreamUrl};
use crate::observe::Observer;

/// Watches a request to an upstream that was never probed; its id is 0.
pub(crate) fn watch(timeouts: Timeouts) -> RequestWatch {
    let url = UpstreamUrl { https: false, host: "gpu".into(), port: 1, unix: None, prefix: String::new() };
    let config = Config { upstreams: vec![UpstreamConfig::new(url)], ..Config::default() };
    let (fleet, _keeper) = Fleet::new(&config, Observer::default()).unwrap();
    RequestWatch::new(fleet, timeouts, Instant::now().into_std())
}

fn seconds(first_byte: u64, idle: u64, total: u64) -> Timeouts {
    let some = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
    Timeouts { first_byte: some(first_byte), idle: some(idle), total: some(total), ..Timeouts::default() }
}

async fn ends(watch: &mut RequestWatch) -> (EndReason, u64) {
    let begun = Instant::now();
    let reason = watch.end().await;
    (reason, begun.elapsed().as_secs())
}

const DAY: Duration = Duration::from_secs(24 * 3600);

#[tokio::test(start_paused = true)]
async fn each_deadline_counts_from_its_own_beginning() {
    let mut waiting = watch(seconds(5, 1, 60));
    waiting.begin_attempt(0);
    assert_eq!(ends(&mut waiting).await, (EndReason::FirstByte, 5));

    let mut streaming = watch(seconds(5, 10, 0));
    streaming.begin_attempt(0);
    streaming.record_answer_piece();
    assert_eq!(ends(&mut streaming).await, (EndReason::Idle, 10));

    let mut long = watch(seconds(0, 30, 7));
    long.begin_attempt(0);
    long.record_answer_piece();
    assert_eq!(ends(&mut long).await, (EndReason::Total, 7));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_becomes_earlier_is_kept() {
    let mut watch = watch(seconds(60, 1, 0));
    watch.begin_attempt(0);
    assert!(tokio::time::timeout(Duration::from_millis(100), watch.end()).await.is_err());
    watch.record_answer_piece();
    assert_eq!(ends(&mut watch).await, (EndReason::Idle, 1));
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_never_cut_by_a_limit_that_was_not_asked_for() {
    let mut watch = watch(seconds(0, 0, 0));
    watch.begin_attempt(0);
    assert!(tokio::time::timeout(DAY, watch.end()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_job_is_not_waited_for_without_end() {
    let mut silent = watch(seconds(0, 0, 0));
    silent.begin_attempt(0);
    silent.abandon();
    assert_eq!(ends(&mut silent).await, (EndReason::Abandoned, 600));

    // From what came last; and what was configured goes before.
    let mut streaming = watch(seconds(0, 0, 0));
    streaming.begin_attempt(0);
    tokio::time::sleep(Duration::from_secs(50)).await;
    streaming.record_answer_piece();
    streaming.abandon();
    assert_eq!(ends(&mut streaming).await, (EndReason::Abandoned, 600));
    let mut limited = watch(seconds(0, 10, 0));
    limited.begin_attempt(0);
    limited.record_answer_piece();
    limited.abandon();
    assert_eq!(ends(&mut limited).await, (EndReason::Idle, 10));

    // The wait for room has its own end.
    let mut waiting = watch(seconds(0, 0, 0));
    waiting.abandon();
    assert!(tokio::time::timeout(DAY, waiting.end()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_moves_is_not_idle() {
    let mut watch = watch(seconds(0, 3, 0));
    watch.begin_attempt(0);
    for _ in 0..10 {
        watch.record_answer_piece();
        let two = Duration::from_secs(2);
        assert!(tokio::time::timeout(two, watch.end()).await.is_err());
    }
    assert_eq!(ends(&mut watch).await.0, EndReason::Idle);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_trickles_ends_and_one_that_waits_for_its_upstream_does_not() {
    let mut slow = watch(seconds(0, 0, 0));
    slow.begin_attempt(0);
    slow.set_upload(Some(UploadPace::new(Instant::now())));
    let begun = Instant::now();
    let trickle = async {
        loop {
            let second = tokio::time::timeout(Duration::from_secs(1), slow.end()).await;
            match second {
                Ok(reason) => return reason,
                Err(_) => slow.record_upload(100),
            }
        }
    };
    assert_eq!(trickle.await, EndReason::SlowUpload);
    assert_eq!(begun.elapsed().as_secs(), 30);

    let mut paused = watch(seconds(0, 0, 0));
    let mut pace = UploadPace::new(Instant::now());
    pace.pause();
    paused.set_upload(Some(pace));
    assert!(tokio::time::timeout(DAY, paused.end()).await.is_err());
    paused.upload().unwrap().resume();
    assert_eq!(ends(&mut paused).await, (EndReason::SlowUpload, 30));
}

#[tokio::test(start_paused = true)]
async fn an_upstream_that_does_not_read_is_given_up() {
    let mut watch = watch(seconds(0, 0, 0));
    watch.begin_attempt(0);
    let outgoing = Outgoing::default();
    outgoing.push(bytes::Bytes::from_static(b"body"));
    watch.set_outgoing(outgoing);
    assert_eq!(ends(&mut watch).await, (EndReason::Unread, 60));
}

#[tokio::test(start_paused = true)]
async fn phases_of_the_last_attempt_count_from_the_head() {
    let mut watch = watch(seconds(0, 0, 0));
    let pause = |millis| tokio::time::sleep(Duration::from_millis(millis));
    watch.add_body_wait(Duration::from_millis(2));
    watch.add_queued(Duration::from_millis(3));
    pause(10).await;
    watch.record_choice();
    watch.begin_attempt(0);
    watch.record_verdict();
    watch.end_attempt();
    watch.add_queued(Duration::from_millis(4));
    pause(10).await;
    watch.record_choice();
    let outgoing = Outgoing::default();
    outgoing.push(bytes::Bytes::from_static(b"body"));
    pause(10).await;
    watch.begin_attempt(0);
    watch.set_outgoing(outgoing);
    watch.record_sent();
    assert_eq!(watch.times().sent, None, "no byte has been taken");
    pause(10).await;
    watch.record_verdict();
    watch.record_first_byte(Instant::now().into_std());
    pause(10).await;
    watch.record_forwarded(None);
    for gap in [5, 20, 7] {
        pause(gap).await;
        watch.record_next_piece(true);
        pause(50).await;
        watch.record_answer_piece();
    }
    pause(90).await;
    watch.record_next_piece(false);
    watch.record_answer_piece();
    let millis = Duration::from_millis;
    let times = RequestTimes {
        queued: millis(7),
        body_wait: millis(2),
        chosen: Some(millis(20)),
        connected: Some(millis(30)),
        sent: None,
        first_byte: Some(millis(40)),
        accepted: Some(millis(40)),
        forwarded: Some(millis(50)),
        last_piece: Some(millis(322)),
        max_gap: Some(millis(20)),
    };
    assert_eq!(watch.times(), times, "a slow client makes no gap");
}

/// Regression: a client that paused its upload was blamed on the upstream, which was still waiting for the
/// body.
#[tokio::test(start_paused = true)]
async fn the_upstream_is_not_late_while_the_client_owes_its_body() {
    let mut watch = watch(seconds(2, 1, 0));
    watch.set_upload(Some(UploadPace::new(Instant::now())));
    watch.begin_attempt(0);
    assert_eq!(ends(&mut watch).await, (EndReason::SlowUpload, 30));

    watch.set_upload(None);
    watch.begin_attempt(0);
    assert_eq!(ends(&mut watch).await, (EndReason::FirstByte, 2));
}
