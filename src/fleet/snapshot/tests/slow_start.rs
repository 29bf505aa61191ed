//! The share of requests for an upstream that came back, by simulation: the real candidates and the real
//! choice on a virtual clock.

use super::*;
use crate::config::types::Balance;
use crate::fleet::lease::{Lease, RequestWork};
use crate::pick::{self, DrawSeed};

const TOKENS: u64 = 1000;

/// Requests that arrive at an even pace.
struct SlowStartTraffic {
    siblings: usize,
    gap: Duration,
    lasts: Duration,
}

struct SlowStartScene {
    snapshot: Snapshot,
    start: Instant,
    leases: Vec<(Instant, Lease)>,
    count: u64,
}

impl SlowStartScene {
    /// Builds a fleet whose last upstream is down.
    fn new(siblings: usize, start: Instant) -> Self {
        let mut scripts = vec!["ready"; siblings];
        scripts.push("ready missed missed missed");
        let mut snapshot = snapshot(&of(&scripts), start);
        for entry in &mut snapshot.entries {
            let config = UpstreamConfig { max_active: None, ..entry.upstream.config.clone() };
            entry.upstream = Arc::new(entry.upstream.renewed(config).expect("it needs no file"));
        }
        let snapshot = Snapshot::new(snapshot.entries, Vec::new(), None);
        SlowStartScene { snapshot, start, leases: Vec::new(), count: 0 }
    }

    fn last_comes_back(&mut self, now: Instant) {
        let mut machine = BreakerMachine::new(self.start);
        let missed = || Err(ProbeMiss::Silent);
        for found in [Ok(()), missed(), missed(), missed(), Ok(())] {
            machine.probed(found, 0, now, &rules());
        }
        let mut entries = std::mem::take(&mut self.snapshot.entries);
        let entry = entries.last_mut().expect("there is one");
        entry.status = machine.status(&rules());
        assert_eq!(entry.state(), UpstreamState::Ready);
        self.snapshot = Snapshot::new(entries, Vec::new(), Some(&self.snapshot));
    }

    /// Returns the share of the requests that the last upstream gets in `seconds` from `now` on.
    fn share(&mut self, traffic: &SlowStartTraffic, now: Instant, seconds: u64) -> f64 {
        let (mut all, mut its) = (0, 0);
        let mut at = now;
        let mut candidates = Vec::new();
        while at < now + Duration::from_secs(seconds) {
            self.leases.retain(|(end, _)| *end > at);
            let half = traffic.lasts / 2;
            for (end, lease) in &mut self.leases {
                if *end <= at + half {
                    lease.first_byte(at);
                }
            }
            let query = UpstreamQuery { model: Some("m"), tokens: TOKENS, ..UpstreamQuery::default() };
            assert_eq!(self.snapshot.candidates(&query, at, &mut candidates), FilterResult::Candidates);
            self.count += 1;
            let random = self.count.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let seed = DrawSeed { random: random ^ (random >> 29), turn: self.count, jitter: 0.0 };
            let choice = pick::pick(&candidates, &Balance::default(), seed).expect("there are candidates");
            let work = RequestWork { tokens: TOKENS, uncached: TOKENS, streams: true };
            let lease = self.snapshot.take(&query, choice.index, work, at).expect("there is room");
            self.leases.push((at + traffic.lasts, lease));
            all += 1;
            its += u32::from(choice.index == traffic.siblings);
            at += traffic.gap;
        }
        f64::from(its) / f64::from(all)
    }
}

/// An upstream that came back got no requests beside idle upstreams for ten seconds.
#[test]
fn grows_to_a_fair_share_after_coming_back_and_never_starves() {
    let millis = Duration::from_millis;
    // The requests in flight for each upstream; the range of the share in the first second, relative to a
    // fair one.
    let table = [
        ("idle", SlowStartTraffic { siblings: 3, gap: millis(20), lasts: millis(15) }, 0.5..=1.5),
        (
            "idle, one sibling",
            SlowStartTraffic { siblings: 1, gap: millis(20), lasts: millis(15) },
            0.5..=1.5,
        ),
        ("two each", SlowStartTraffic { siblings: 3, gap: millis(50), lasts: millis(300) }, 0.2..=0.8),
        ("thirty each", SlowStartTraffic { siblings: 3, gap: millis(10), lasts: millis(900) }, 0.04..=0.4),
        ("sixty each", SlowStartTraffic { siblings: 7, gap: millis(4), lasts: millis(1700) }, 0.02..=0.8),
    ];
    for (name, traffic, at_first) in table {
        let start = Instant::now();
        let mut scene = SlowStartScene::new(traffic.siblings, start);
        assert_eq!(scene.share(&traffic, start, 5), 0.0, "{name}: still down");
        let back = start + Duration::from_secs(5);
        scene.last_comes_back(back);
        let fair = 1.0 / (traffic.siblings + 1) as f64;
        let shares: Vec<f64> = (0..15)
            .map(|second| scene.share(&traffic, back + Duration::from_secs(second), 1) / fair)
            .collect();
        println!("{name}: {shares:.2?}");
        assert!(at_first.contains(&shares[0]), "{name}: {shares:.2?}");
        let last = shares[10..].iter().sum::<f64>() / 5.0;
        assert!((0.8..=1.25).contains(&last), "{name}: {shares:.2?}");
    }
}
