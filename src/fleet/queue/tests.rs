//! The queue under schedules on a virtual clock: the order of admissions, and that every request is served.

use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;

use super::super::upstream::Upstream;
use super::*;
use crate::aggregate::ModelCard;
use crate::config::types::{DiscoveryOrigin, UpstreamConfig};
use crate::config::url;
use crate::observe::Observer;
use crate::route::upstreams::RouteUpstreams;

mod limits;
mod properties;

const LONG: Duration = Duration::from_secs(1000);

/// A server with a number of free places and the models that it serves.
struct Server {
    upstream: Upstream,
    places: AtomicU64,
}

impl Server {
    fn new(id: usize, queue: &Arc<Queue>, places: u64, models: &[&str]) -> Self {
        let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
        let upstream =
            Upstream::new(id, config, queue.clone(), &Default::default()).expect("it needs no file");
        let card = |id: &&str| ModelCard {
            id: (*id).to_string(),
            raw: String::new(),
            max_model_len: None,
            parent: None,
        };
        upstream.live.identity.serves.store(Arc::new(models.iter().map(card).collect()));
        Server { upstream, places: AtomicU64::new(places) }
    }

    fn take(&self) -> bool {
        let take = |places: u64| places.checked_sub(1);
        self.places.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn free(&self) {
        self.places.fetch_add(1, Ordering::Relaxed);
        self.upstream.live.queue.freed(&self.upstream.live.identity);
    }
}

fn key(model: &str) -> QueueKey {
    QueueKey::new(&UpstreamQuery { model: Some(model), ..UpstreamQuery::default() })
}

fn after(time: Duration) -> Instant {
    super::super::now() + time
}

/// Looks for room and waits as the proxy does. Returns the number of looks, or the refusal.
async fn admitted(
    queue: Arc<Queue>,
    key: QueueKey,
    servers: &[Server],
    deadline: Instant,
) -> Result<u32, QueueRefusal> {
    let mut looks = 1;
    let room = || servers.iter().any(|server| key.served_by(&server.upstream.live.identity) && server.take());
    if !queue.is_waiting(&key) && room() {
        return Ok(looks);
    }
    let mut turn = queue.wait(key.clone(), MissedLook::default(), deadline).await?;
    loop {
        looks += 1;
        if room() {
            turn.taken();
            return Ok(looks);
        }
        turn = turn.wait_on(MissedLook::default(), deadline).await?;
    }
}

type Waiting<'a> = Pin<Box<dyn Future<Output = Result<u32, QueueRefusal>> + 'a>>;

fn poll(waiting: &mut Waiting<'_>) -> Poll<Result<u32, QueueRefusal>> {
    waiting.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[tokio::test(start_paused = true)]
async fn admits_in_order_of_arrival_and_a_newcomer_does_not_overtake() {
    let queue = Queue::new(10, Observer::default());
    let servers = [Server::new(0, &queue, 0, &["m"])];
    let deadline = after(LONG);
    let wait = || -> Waiting<'_> { Box::pin(admitted(queue.clone(), key("m"), &servers, deadline)) };
    let (mut first, mut second) = (wait(), wait());
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    servers[0].free();
    assert!(queue.is_waiting(&key("m")), "the freed place belongs to a waiting request");
    let mut third = wait();
    assert!(poll(&mut third).is_pending());
    assert!(poll(&mut second).is_pending());
    assert_eq!(poll(&mut first), Poll::Ready(Ok(3)));
    assert!(poll(&mut second).is_pending() && poll(&mut third).is_pending());
    servers[0].free();
    servers[0].free();
    assert!(poll(&mut third).is_pending(), "the second request goes first");
    assert!(poll(&mut second).is_ready() && poll(&mut third).is_ready());
    assert_eq!(queue.len(), 0);
    assert!(!queue.is_waiting(&key("m")));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_leaves_passes_its_turn_on_also_to_another_line() {
    let queue = Queue::new(10, Observer::default());
    let servers = [Server::new(0, &queue, 0, &["m", "n"])];
    let deadline = after(LONG);
    let wait = |model| -> Waiting<'_> { Box::pin(admitted(queue.clone(), key(model), &servers, deadline)) };
    let (mut first, mut second, mut other) = (wait("m"), wait("m"), wait("n"));
    for waiting in [&mut first, &mut second, &mut other] {
        assert!(poll(waiting).is_pending());
    }
    servers[0].free();
    drop(first);
    assert!(poll(&mut other).is_pending(), "the second has waited longer");
    drop(second);
    assert!(poll(&mut other).is_ready());
    assert_eq!(queue.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn wakes_only_requests_for_a_model_that_the_upstream_serves() {
    let queue = Queue::new(10, Observer::default());
    let servers = [Server::new(0, &queue, 0, &["m"]), Server::new(1, &queue, 0, &["n"])];
    let deadline = after(LONG);
    let wait = |model| -> Waiting<'_> { Box::pin(admitted(queue.clone(), key(model), &servers, deadline)) };
    let (mut m, mut n) = (wait("m"), wait("n"));
    assert!(poll(&mut m).is_pending() && poll(&mut n).is_pending());
    servers[1].free();
    assert!(poll(&mut m).is_pending());
    assert_eq!(poll(&mut n), Poll::Ready(Ok(3)));
    servers[0].free();
    assert_eq!(
        poll(&mut m),
        Poll::Ready(Ok(3)),
        "looks on arrival, when it begins to wait, and when there is room"
    );
}

/// Keyed by the ids of the names, older requests missed the new upstream, and newer ones went first.
#[tokio::test(start_paused = true)]
async fn an_upstream_that_joins_a_route_serves_the_requests_that_wait_already() {
    let queue = Queue::new(10, Observer::default());
    let names = ["gpu:1".to_string(), "gpu:2".to_string(), "gym http://gym:11000".to_string()];
    let names = Arc::new(RouteNames::new(&names));
    let route = |ids: &[usize]| {
        QueueKey::new(&UpstreamQuery {
            model: Some("m"),
            among: Some(&RouteUpstreams::of(ids)),
            names: Some(&names),
            ..UpstreamQuery::default()
        })
    };
    let named = |id, name: &str, source: Option<&str>| {
        let server = Server::new(id, &queue, 0, &["m"]);
        let discovered = source.map(|source| DiscoveryOrigin { source: source.into(), model: None });
        let config = UpstreamConfig { name: name.into(), discovered, ..server.upstream.config.clone() };
        let upstream =
            Upstream::new(id, config, queue.clone(), &Default::default()).expect("it needs no file");
        upstream.live.identity.serves.store(server.upstream.live.identity.serves.load_full());
        Server { upstream, ..server }
    };
    let servers = [
        named(0, "gpu:1", None),
        named(1, "gpu:2", None),
        named(2, "10.0.0.1:8000", Some("gym http://gym:11000")),
        named(3, "gpu:3", Some("gym http://other:1")),
    ];
    let deadline = after(LONG);
    let wait = |ids| -> Waiting<'_> { Box::pin(admitted(queue.clone(), route(ids), &servers, deadline)) };
    let (mut first, mut second) = (wait(&[0, usize::MAX]), wait(&[0, usize::MAX]));
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    servers[3].free();
    assert!(poll(&mut first).is_pending(), "the upstream is not part of the route");
    // The upstream of the second name has joined.
    servers[1].free();
    let mut late = wait(&[0, 1]);
    assert!(poll(&mut late).is_pending(), "older requests go first");
    assert!(poll(&mut first).is_ready());
    assert!(poll(&mut second).is_pending() && poll(&mut late).is_pending());
    servers[2].free();
    assert!(poll(&mut second).is_ready());
    servers[2].free();
    assert!(poll(&mut late).is_ready());
}

#[tokio::test(start_paused = true)]
async fn offers_a_place_that_the_head_does_not_take_to_the_next_line() {
    let queue = Queue::new(10, Observer::default());
    let servers = [Server::new(0, &queue, 0, &["m"])];
    let deadline = after(LONG);
    let turn = queue.wait(key("m"), MissedLook::default(), deadline).await.expect("there is a place to wait");
    let mut head = Box::pin(turn.wait_on(MissedLook::default(), deadline));
    let mut look = || head.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(look().is_pending());
    let tried = QueueKey { tried: vec![7], ..key("m") };
    let mut other: Waiting<'_> = Box::pin(admitted(queue.clone(), tried, &servers, deadline));
    assert!(poll(&mut other).is_pending());
    servers[0].free();
    assert!(poll(&mut other).is_pending(), "the head looks first: it has waited longer");
    let Poll::Ready(Ok(turn)) = look() else { panic!("there is room") };
    // The head does not take the place.
    let mut head = Box::pin(turn.wait_on(MissedLook::default(), deadline));
    assert!(head.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    assert!(poll(&mut other).is_ready());
}

#[tokio::test(start_paused = true)]
async fn refuses_with_a_measured_retry_after_when_full_or_after_a_long_wait() {
    let queue = Queue::new(2, Observer::default());
    let servers = [Server::new(0, &queue, 0, &["m"])];
    let deadline = after(Duration::from_secs(8));
    let wait = |deadline| -> Waiting<'_> { Box::pin(admitted(queue.clone(), key("m"), &servers, deadline)) };
    let (mut first, mut second) = (wait(deadline), wait(deadline));
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    tokio::time::advance(Duration::from_secs(4)).await;
    let refused = poll(&mut wait(deadline));
    let two_places_of_four_seconds = Duration::from_secs(8);
    assert_eq!(refused, Poll::Ready(Err(QueueRefusal::Full { retry_after: two_places_of_four_seconds })));
    servers[0].free();
    assert_eq!(first.await, Ok(3));
    assert!(
        matches!(second.await, Err(QueueRefusal::WaitedOut { retry_after }) if retry_after.as_secs() == 4)
    );
    assert_eq!(queue.len(), 0);
    queue.resize(0);
    assert!(matches!(poll(&mut wait(after(LONG))), Poll::Ready(Err(QueueRefusal::Full { .. }))));
}

#[tokio::test(start_paused = true)]
async fn the_head_looks_again_when_an_engines_retry_after_ends() {
    let queue = Queue::new(9, Observer::default());
    let start = super::super::now();
    let until = start + Duration::from_secs(3);
    let missed = MissedLook { until: Some(until), delay: None };
    let turn = queue.wait(key("m"), missed, after(LONG)).await.expect("the head looks at once");
    let turn = turn.wait_on(missed, after(LONG)).await.expect("the head looks at the given time");
    assert_eq!(super::super::now(), until);
    // Without a new time it waits for an event.
    let waited_out = turn.wait_on(MissedLook::default(), until + Duration::from_secs(1)).await;
    assert!(matches!(waited_out, Err(QueueRefusal::WaitedOut { .. })));
}
