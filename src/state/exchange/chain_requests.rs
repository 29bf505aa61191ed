//! The requests for whole chains, and the answers: each chain is published about once, however many siblings
//! lack it.
//!
//! A balancer that receives the tail of a chain and does not know its beginning waits for a random time of at
//! most `MAX_REQUEST_DELAY`, then requests the chain from the sender. All siblings read the request and the
//! answer: a balancer that has seen either meanwhile does not send a request of its own. A balancer answers
//! requests for the same chain at most once in `REPEAT_TIME`.
//!
//! A chain is identified by its upstream and its last hash. The siblings that lack the same chain have
//! received the same tail, so their requests have the same hash.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{ChainRequest, ChainUpdate};

/// The longest time between a tail that cannot be placed and the request for its chain.
const MAX_REQUEST_DELAY: Duration = Duration::from_millis(100);

/// The least time between two requests for the same chain, and between two answers.
const REPEAT_TIME: Duration = Duration::from_secs(1);

/// The largest number of chains in one `REPEAT_TIME`; no more are requested or answered.
const MAX_RECENT_CHAINS: usize = 1024;

/// The requests that wait, and the recent requests and answers.
#[derive(Debug, Default)]
pub struct ChainRequests {
    waiting: HashMap<u64, WaitingRequest>,
    /// The chains that this balancer or a sibling has requested.
    requested: RecentChains,
    /// The chains that this balancer has published as answers.
    answered: RecentChains,
}

/// A request to a sibling that waits for its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingRequest {
    pub balancer: u64,
    pub upstream: Box<str>,
    pub hash: u64,
    due: Instant,
}

/// The chains of the last `REPEAT_TIME`, and some of the time before.
#[derive(Debug, Default)]
struct RecentChains {
    now: HashSet<u64>,
    before: HashSet<u64>,
    /// When `now` was begun.
    since: Option<Instant>,
}

/// Returns the number of a chain; two chains have the same number only by an unlikely accident, which delays
/// one request.
fn chain_number(upstream: &str, hash: u64) -> u64 {
    xxh3_64_with_seed(upstream.as_bytes(), hash)
}

// === impl ChainRequests ===

impl ChainRequests {
    /// Notes that a chain of the sibling `balancer` cannot be placed here; `draw` is a random number.
    pub fn miss(&mut self, balancer: u64, chain: &ChainUpdate<'_>, now: Instant, draw: u64) {
        let Some(hash) = chain.hashes.last().copied().or(chain.parent) else { return };
        let number = chain_number(chain.upstream, hash);
        if self.waiting.contains_key(&number) || self.requested.contains(number, now) {
            return;
        }
        // The answer for a chain includes the chain that it continues.
        let parent = chain.parent.map(|parent| chain_number(chain.upstream, parent));
        let continued = parent.and_then(|parent| self.waiting.remove(&parent));
        if self.waiting.len() < MAX_RECENT_CHAINS {
            let micros = draw % MAX_REQUEST_DELAY.as_micros() as u64;
            let due = continued.map_or(now + Duration::from_micros(micros), |request| request.due);
            let upstream = chain.upstream.into();
            self.waiting.insert(number, WaitingRequest { balancer, upstream, hash, due });
        }
    }

    /// Notes a chain of a sibling that was placed: a whole one answers the requests for it.
    pub fn see_chain(&mut self, chain: &ChainUpdate<'_>) {
        if let (None, Some(last), false) = (chain.parent, chain.hashes.last(), self.waiting.is_empty()) {
            self.waiting.remove(&chain_number(chain.upstream, *last));
        }
    }

    /// Notes the request of a sibling, to whichever balancer.
    pub fn see_request(&mut self, request: &ChainRequest<'_>, now: Instant) {
        let number = chain_number(request.upstream, request.hash);
        self.waiting.remove(&number);
        self.requested.insert(number, now);
    }

    /// Removes and returns the requests to publish now.
    pub fn take_due(&mut self, now: Instant) -> Vec<WaitingRequest> {
        let due: Vec<_> = self.waiting.extract_if(|_, request| request.due <= now).collect();
        let due = due.into_iter().filter(|(number, _)| self.requested.insert(*number, now));
        due.map(|(_, request)| request).collect()
    }

    /// Whether this balancer has answered a request for the chain within `REPEAT_TIME`.
    pub fn has_answered(&mut self, upstream: &str, hash: u64, now: Instant) -> bool {
        self.answered.contains(chain_number(upstream, hash), now)
    }

    /// Whether to answer a sibling's request to this balancer; `true` once for each chain in `REPEAT_TIME`.
    pub fn begin_answer(&mut self, upstream: &str, hash: u64, now: Instant) -> bool {
        self.answered.insert(chain_number(upstream, hash), now)
    }
}

// === impl RecentChains ===

impl RecentChains {
    fn renew(&mut self, now: Instant) {
        let Some(age) = self.since.map(|since| now.saturating_duration_since(since)) else {
            self.since = Some(now);
            return;
        };
        if age >= REPEAT_TIME {
            self.before = std::mem::take(&mut self.now);
            self.since = Some(now);
        }
        if age >= 2 * REPEAT_TIME {
            self.before.clear();
        }
    }

    fn contains(&mut self, number: u64, now: Instant) -> bool {
        self.renew(now);
        self.now.contains(&number) || self.before.contains(&number)
    }

    /// Adds a chain. Returns `false` for a known one, and when there are too many.
    fn insert(&mut self, number: u64, now: Instant) -> bool {
        !self.contains(number, now) && self.now.len() < MAX_RECENT_CHAINS && self.now.insert(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENTH: Duration = Duration::from_millis(10);

    fn tail(upstream: &str, parent: u64, last: u64) -> ChainUpdate<'_> {
        ChainUpdate { upstream, parent: Some(parent), depth: 9, hashes: vec![last].into(), end: None }
    }

    fn whole(upstream: &str, last: u64) -> ChainUpdate<'_> {
        ChainUpdate { upstream, parent: None, depth: 0, hashes: vec![1, 2, last].into(), end: None }
    }

    fn request(upstream: &str, hash: u64) -> ChainRequest<'_> {
        ChainRequest { balancer: 7, upstream, hash }
    }

    /// Returns the due requests, sorted: balancer, upstream and hash.
    fn due(requests: &mut ChainRequests, now: Instant) -> Vec<(u64, String, u64)> {
        let due = requests.take_due(now).into_iter();
        let mut due: Vec<_> =
            due.map(|request| (request.balancer, request.upstream.to_string(), request.hash)).collect();
        due.sort();
        due
    }

    /// What happens to a chain with the hash 5 on `a` that cannot be placed, while its request waits for 50
    /// ms.
    enum Event<'a> {
        Nothing,
        Miss(ChainUpdate<'a>),
        Chain(ChainUpdate<'a>),
        Request(ChainRequest<'a>),
    }

    #[test]
    fn waits_and_leaves_the_request_to_a_sibling_that_was_quicker() {
        let own = || (2, "a".to_string(), 5);
        let table = [
            ("nothing", Event::Nothing, vec![own()]),
            ("the tail again", Event::Miss(tail("a", 4, 5)), vec![own()]),
            ("the tail at another upstream", Event::Miss(tail("b", 4, 5)), vec![own(), (3, "b".into(), 5)]),
            ("a longer tail", Event::Miss(tail("a", 5, 6)), vec![(3, "a".into(), 6)]),
            ("an answer", Event::Chain(whole("a", 5)), vec![]),
            ("another upstream's answer", Event::Chain(whole("b", 5)), vec![own()]),
            ("another chain's answer", Event::Chain(whole("a", 6)), vec![own()]),
            ("a tail that was placed", Event::Chain(tail("a", 4, 5)), vec![own()]),
            ("a request", Event::Request(request("a", 5)), vec![]),
            ("another upstream's request", Event::Request(request("b", 5)), vec![own()]),
            ("another chain's request", Event::Request(request("a", 6)), vec![own()]),
        ];
        for (name, event, wanted) in table {
            let start = Instant::now();
            let mut requests = ChainRequests::default();
            requests.miss(2, &tail("a", 4, 5), start, 50_000);
            assert_eq!(due(&mut requests, start + 4 * TENTH), [], "{name}");
            match event {
                Event::Nothing => {}
                Event::Miss(chain) => requests.miss(3, &chain, start + 4 * TENTH, 0),
                Event::Chain(chain) => requests.see_chain(&chain),
                Event::Request(request) => requests.see_request(&request, start + 4 * TENTH),
            }
            assert_eq!(due(&mut requests, start + 5 * TENTH), wanted, "{name}");
            assert_eq!(due(&mut requests, start + 50 * TENTH), [], "{name}");
        }
    }

    #[test]
    fn waits_at_most_a_tenth_of_a_second() {
        let start = Instant::now();
        for draw in [0, 1, 99_999, 100_000, 12_345_678, u64::MAX] {
            let mut requests = ChainRequests::default();
            requests.miss(2, &tail("a", 4, 5), start, draw);
            let wait = Duration::from_micros(draw % 100_000);
            assert!(wait.is_zero() || due(&mut requests, start + wait - Duration::from_nanos(1)).is_empty());
            assert_eq!(due(&mut requests, start + wait).len(), 1, "{draw}");
        }
    }

    #[test]
    fn requests_and_answers_a_chain_once_a_second() {
        let start = Instant::now();
        let mut requests = ChainRequests::default();
        let (mut sent, mut answered) = (Vec::new(), Vec::new());
        for step in 0..60 {
            let now = start + 10 * TENTH * step;
            requests.miss(2, &tail("a", 4, 5), now, 0);
            sent.extend((!due(&mut requests, now).is_empty()).then_some(step));
            answered.extend(requests.begin_answer("a", 5, now).then_some(step));
        }
        for steps in [sent, answered] {
            assert!(steps.windows(2).all(|pair| (10..=20).contains(&(pair[1] - pair[0]))), "{steps:?}");
            assert!(steps.len() >= 3, "{steps:?}");
        }
        assert!(requests.begin_answer("b", 5, start) && requests.begin_answer("a", 6, start));
    }

    #[test]
    fn limits_what_is_remembered() {
        let start = Instant::now();
        let mut requests = ChainRequests::default();
        for hash in 0..5000 {
            requests.miss(2, &tail("a", 10_000 + hash, hash), start, hash);
        }
        assert_eq!(due(&mut requests, start + MAX_REQUEST_DELAY).len(), MAX_RECENT_CHAINS);
        (0..5000).for_each(|hash| requests.see_request(&request("b", hash), start));
        let answers = (0..5000).filter(|hash| requests.begin_answer("a", *hash, start)).count();
        assert_eq!(answers, MAX_RECENT_CHAINS);
        assert!(requests.requested.now.len() <= MAX_RECENT_CHAINS && requests.waiting.is_empty());
        let later = start + 3 * REPEAT_TIME;
        assert!(requests.begin_answer("a", 1, later) && requests.answered.before.is_empty());
    }

    #[test]
    fn many_siblings_that_lack_a_chain_send_few_requests() {
        let start = Instant::now();
        let mut siblings: Vec<ChainRequests> = (0..100).map(|_| ChainRequests::default()).collect();
        for (number, requests) in (0u64..).zip(&mut siblings) {
            requests.miss(2, &tail("a", 4, 5), start, number * 1_000);
        }
        let mut sent = 0;
        // Each reads what the others have published with a delay of one step.
        for step in 0..20 {
            let now = start + Duration::from_millis(5) * step;
            let published: usize = siblings.iter_mut().map(|requests| requests.take_due(now).len()).sum();
            sent += published;
            if published > 0 {
                siblings.iter_mut().for_each(|requests| requests.see_request(&request("a", 5), now));
            }
        }
        assert_eq!(sent, 1);
    }
}
