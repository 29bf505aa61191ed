//! What follows from pages, without a wire.

use std::sync::Arc;

use super::super::breaker::{BreakerRules, Machine};
use super::super::lease::{Lease, Work};
use super::super::queue::Queue;
use super::super::snapshot::SnapshotEntry;
use super::*;
use crate::config::types::{Breaker, UpstreamConfig};
use crate::config::url;
use crate::observe::Observer;

fn upstream() -> Upstream {
    let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
    Upstream::new(0, config, Queue::new(9, Observer::default())).expect("it needs no file")
}

fn reader() -> MetricsReader {
    MetricsReader { due: now(), pause: Duration::ZERO, before: 0 }
}

fn page(running: u64, waiting: u64) -> EngineMetrics {
    EngineMetrics { running: Some(running), waiting: Some(waiting), ..EngineMetrics::default() }
}

const LATER: Duration = Duration::from_secs(6);

/// Pages of running and waiting, with ours, and the foreign requests and tokens that follow from the last.
#[test]
fn foreign_is_what_two_pages_count_and_nobody_sent() {
    type Page = (u64, u64, u64);
    let table: [(&[Page], u64, u64); 10] = [
        (&[(5, 0, 0)], 0, 0),
        (&[(5, 0, 0), (5, 0, 0)], 5, 0),
        (&[(5, 0, 5), (5, 0, 5)], 0, 0),
        (&[(5, 0, 9), (5, 0, 9)], 0, 0),
        (&[(5, 0, 3), (5, 0, 3)], 2, 0),
        (&[(5, 0, 0), (2, 0, 0)], 2, 0),
        (&[(5, 0, 5), (5, 0, 0)], 0, 0),
        // Half of all wait, so half of those of others do.
        (&[(6, 6, 4), (6, 6, 4)], 8, 4 * DEFAULT_PROMPT_TOKENS),
        (&[(0, 3, 0), (0, 3, 0)], 3, 3 * DEFAULT_PROMPT_TOKENS),
        (&[(u64::MAX, u64::MAX, 0); 2], u64::MAX, u64::MAX),
    ];
    for (pages, requests, tokens) in table {
        let (upstream, mut reader, now) = (upstream(), reader(), now());
        for (running, waiting, ours) in pages {
            reader.take_in(&page(*running, *waiting), *ours, &upstream.live, now + LATER);
        }
        assert_eq!(upstream.foreign(now), ForeignLoad { requests, tokens }, "{pages:?}");
        let report = upstream.gauge_report(now).expect("it was reported");
        let (running, waiting, _) = pages[pages.len() - 1];
        assert_eq!((report.running, report.waiting), (Some(running), Some(waiting)));
        assert_eq!(report.foreign, Some(requests));
    }
}

#[test]
fn a_page_without_counts_knows_nothing_of_others() {
    let (upstream, mut reader, now) = (upstream(), reader(), now());
    let metrics = EngineMetrics { kv_usage: Some(0.5), ..EngineMetrics::default() };
    reader.take_in(&metrics, 0, &upstream.live, now + LATER);
    let report = upstream.gauge_report(now).expect("it was reported");
    assert_eq!((report.foreign, report.running, report.kv_usage), (None, None, Some(0.5)));
}

#[test]
fn what_was_told_grows_old() {
    let (upstream, mut reader, now) = (upstream(), reader(), now());
    assert_eq!((upstream.foreign(now), upstream.gauge_report(now)), (ForeignLoad::default(), None));
    let tell = |reader: &mut MetricsReader| {
        reader.take_in(&page(7, 0), 0, &upstream.live, now + LATER);
        reader.take_in(&page(7, 0), 0, &upstream.live, now + LATER);
    };
    tell(&mut reader);
    let early = Duration::from_millis(2);
    assert_eq!(upstream.foreign(now + LATER - early).requests, 7);
    assert_eq!(upstream.foreign(now + LATER), ForeignLoad::default());
    assert_eq!(upstream.gauge_report(now + LATER), None);
    tell(&mut reader);
    upstream.live.engine_load.forget();
    assert_eq!((upstream.foreign(now), upstream.gauge_report(now)), (ForeignLoad::default(), None));
}

#[test]
fn prompts_of_others_are_taken_to_be_as_long_as_ours() {
    let load = EngineLoad::new(now());
    assert_eq!(load.estimate(3), 3 * DEFAULT_PROMPT_TOKENS);
    load.took(8000);
    assert_eq!(load.estimate(1), 8000);
    load.took(16_000);
    assert_eq!(load.estimate(1), 9000, "one is a part");
    for _ in 0..200 {
        load.took(100);
    }
    assert!((90..=120).contains(&load.estimate(1)), "{}", load.estimate(1));
    load.took(u64::MAX);
    assert_eq!(load.estimate(u64::MAX), u64::MAX);
}

/// Whatever comes and goes while a page is asked for, the page counts no more of ours than that.
#[test]
fn ours_are_those_in_flight_and_those_that_came_since() {
    let now = now();
    let rules = BreakerRules { health: Health::default(), breaker: Breaker::default() };
    let mut machine = Machine::new(now);
    machine.probed(Ok(()), 0, now, &rules);
    let mut entry = SnapshotEntry::unknown(Arc::new(upstream()));
    entry.status = machine.status(&rules);
    let live = &entry.upstream.live;
    let take = || Lease::take(&entry, Work::default(), now).expect("there is room");
    let before = [take(), take()];
    let mark = OwnCounts::now(live);
    assert_eq!(mark.ours(live), 2);
    let during = take();
    drop(take());
    drop(before);
    assert_eq!(mark.ours(live), 4, "each may have been counted");
    assert_eq!(OwnCounts::now(live).ours(live), 1);
    drop(during);
    assert_eq!(OwnCounts::now(live).ours(live), 0);
}
