//! The load that follows from pages of metrics, without a network.

use std::sync::Arc;

use super::super::breaker::{BreakerMachine, BreakerRules};
use super::super::engine_load::{DEFAULT_PROMPT_TOKENS, EngineLoad};
use super::super::lease::{Lease, RequestWork};
use super::super::queue::Queue;
use super::super::snapshot_entry::SnapshotEntry;
use super::*;
use crate::config::types::{Breaker, UpstreamConfig};
use crate::config::url;
use crate::observe::Observer;

fn upstream() -> Upstream {
    let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
    Upstream::new(0, config, Queue::new(9, Observer::default()), &Default::default())
        .expect("it needs no file")
}

fn reader() -> MetricsReader {
    MetricsReader::new()
}

fn page(running: u64, waiting: u64) -> EngineMetrics {
    EngineMetrics { running: Some(running), waiting: Some(waiting), ..EngineMetrics::default() }
}

const LATER: Duration = Duration::from_secs(6);

/// Pages of running, waiting and own requests, and the foreign requests and tokens that follow from the last.
#[test]
fn counts_as_foreign_what_two_pages_show_and_no_balancer_sent() {
    type Page = (u64, u64, u64);
    let table: [(&[Page], u64, u64); 10] = [
        (&[(5, 0, 0)], 0, 0),
        (&[(5, 0, 0), (5, 0, 0)], 5, 0),
        (&[(5, 0, 5), (5, 0, 5)], 0, 0),
        (&[(5, 0, 9), (5, 0, 9)], 0, 0),
        (&[(5, 0, 3), (5, 0, 3)], 2, 0),
        (&[(5, 0, 0), (2, 0, 0)], 2, 0),
        (&[(5, 0, 5), (5, 0, 0)], 0, 0),
        // Half of all requests wait, so half of the foreign ones do.
        (&[(6, 6, 4), (6, 6, 4)], 8, 4 * DEFAULT_PROMPT_TOKENS),
        (&[(0, 3, 0), (0, 3, 0)], 3, 3 * DEFAULT_PROMPT_TOKENS),
        (&[(u64::MAX, u64::MAX, 0); 2], u64::MAX, u64::MAX),
    ];
    for (pages, requests, tokens) in table {
        let (upstream, mut reader, now) = (upstream(), reader(), now());
        for (running, waiting, own) in pages {
            reader.store(&page(*running, *waiting), *own, &upstream.live, now + LATER);
        }
        assert_eq!(upstream.foreign(now), ForeignLoad { requests, tokens }, "{pages:?}");
        let report = upstream.gauge_report(now).expect("a page was read");
        let (running, waiting, _) = pages[pages.len() - 1];
        assert_eq!((report.running, report.waiting), (Some(running), Some(waiting)));
        assert_eq!(report.foreign, Some(requests));
    }
}

#[test]
fn reports_no_foreign_requests_for_a_page_without_counts() {
    let (upstream, mut reader, now) = (upstream(), reader(), now());
    let metrics = EngineMetrics { kv_usage: Some(0.5), ..EngineMetrics::default() };
    reader.store(&metrics, 0, &upstream.live, now + LATER);
    let report = upstream.gauge_report(now).expect("a page was read");
    assert_eq!((report.foreign, report.running, report.kv_usage), (None, None, Some(0.5)));
}

#[test]
fn a_reading_expires() {
    let (upstream, mut reader, now) = (upstream(), reader(), now());
    assert_eq!((upstream.foreign(now), upstream.gauge_report(now)), (ForeignLoad::default(), None));
    let read_twice = |reader: &mut MetricsReader| {
        reader.store(&page(7, 0), 0, &upstream.live, now + LATER);
        reader.store(&page(7, 0), 0, &upstream.live, now + LATER);
    };
    read_twice(&mut reader);
    let early = Duration::from_millis(2);
    assert_eq!(upstream.foreign(now + LATER - early).requests, 7);
    assert_eq!(upstream.foreign(now + LATER), ForeignLoad::default());
    assert_eq!(upstream.gauge_report(now + LATER), None);
    read_twice(&mut reader);
    upstream.live.engine_load.invalidate();
    assert_eq!((upstream.foreign(now), upstream.gauge_report(now)), (ForeignLoad::default(), None));
}

#[test]
fn estimates_foreign_prompts_by_the_average_of_own_prompts() {
    let load = EngineLoad::new();
    assert_eq!(load.estimate(3), 3 * DEFAULT_PROMPT_TOKENS);
    load.count_sent(8000);
    assert_eq!(load.estimate(1), 8000);
    load.count_sent(16_000);
    assert_eq!(load.estimate(1), 9000, "one prompt moves the average by a part");
    for _ in 0..200 {
        load.count_sent(100);
    }
    assert!((90..=120).contains(&load.estimate(1)), "{}", load.estimate(1));
    load.count_sent(u64::MAX);
    assert_eq!(load.estimate(u64::MAX), u64::MAX);
}

/// Requests that begin or end while a page is read stay within the upper bound.
#[test]
fn bounds_own_requests_by_those_in_flight_and_those_sent_since() {
    let now = now();
    let rules = BreakerRules { health: Health::default(), breaker: Breaker::default() };
    let mut machine = BreakerMachine::new(now);
    machine.probed(Ok(()), 0, now, &rules);
    let mut entry = SnapshotEntry::unknown(Arc::new(upstream()));
    entry.status = machine.status(&rules);
    let live = &entry.upstream.live;
    let take = || Lease::take(&entry, RequestWork::default(), now).expect("there is room");
    let before = [take(), take()];
    let mark = OwnCounts::now(live);
    assert_eq!(mark.upper_bound(live), 2);
    let during = take();
    drop(take());
    drop(before);
    assert_eq!(mark.upper_bound(live), 4, "the page may count each of them");
    assert_eq!(OwnCounts::now(live).upper_bound(live), 1);
    drop(during);
    assert_eq!(OwnCounts::now(live).upper_bound(live), 0);
}
