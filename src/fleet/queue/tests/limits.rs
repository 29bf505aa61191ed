//! The queue of requests with a limit of the time to the first token, before one engine that reads one prompt
//! after the other, on a virtual clock.

use std::sync::atomic::AtomicUsize;

use tokio::task::JoinSet;

use super::super::line::MAX_PATIENCE;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MILLI: Duration = Duration::from_millis(1);

/// An engine that reads prompts in the order in which they were sent.
struct SerialEngine {
    queue: Arc<Queue>,
    /// When the engine has read all prompts that were sent.
    idle_at: Mutex<Instant>,
    looks: AtomicUsize,
    /// The requests that were sent, in order, with the time since the start.
    sent: Mutex<Vec<(usize, Duration)>>,
    start: Instant,
}

/// One request: the longest delay with which it meets its limit, and the time of its prompt.
#[derive(Clone, Copy, Debug)]
struct LimitedRequest {
    name: usize,
    tolerated: Duration,
    time: Duration,
}

impl SerialEngine {
    fn new(size: usize, busy: Duration) -> Arc<Self> {
        let (queue, start) = (Queue::new(size, Observer::default()), super::super::super::now());
        let (looks, sent) = (AtomicUsize::new(0), Mutex::default());
        Arc::new(SerialEngine { queue, idle_at: Mutex::new(start + busy), looks, sent, start })
    }

    /// Sends the request, or returns why it has to wait.
    fn look(&self, request: LimitedRequest, may_take: bool) -> Option<MissedLook> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let now = super::super::super::now();
        let mut idle_at = self.idle_at.lock().expect("no test fails within");
        let present = idle_at.saturating_duration_since(now);
        let tolerated = request.tolerated;
        if present > tolerated || !may_take {
            let present = if present > tolerated { present } else { Duration::ZERO };
            return Some(MissedLook { until: None, delay: Some(StartDelay { present, tolerated }) });
        }
        *idle_at = (*idle_at).max(now) + request.time;
        self.sent.lock().expect("no test fails within").push((request.name, now - self.start));
        None
    }

    fn sent(&self) -> Vec<(usize, Duration)> {
        self.sent.lock().expect("no test fails within").clone()
    }

    fn names(&self) -> Vec<usize> {
        self.sent().into_iter().map(|(name, _)| name).collect()
    }
}

fn limited_key() -> QueueKey {
    QueueKey::new(&UpstreamQuery { model: Some("m"), slo: Some(SECOND), ..UpstreamQuery::default() })
}

/// Looks and waits as the proxy does, until the request is sent.
async fn send(engine: Arc<SerialEngine>, request: LimitedRequest) -> Result<(), QueueRefusal> {
    let (key, deadline) = (limited_key(), after(LONG));
    let may_take = !engine.queue.is_waiting(&key);
    let Some(mut missed) = engine.look(request, may_take) else { return Ok(()) };
    if !may_take && engine.queue.lets_pass(&key, &missed) {
        match engine.look(request, true) {
            Some(late) => missed = late,
            None => return Ok(()),
        }
    }
    let mut turn = engine.queue.wait(key, missed, deadline).await?;
    while let Some(missed) = engine.look(request, true) {
        turn = turn.wait_on(missed, deadline).await?;
    }
    turn.taken();
    Ok(())
}

fn poll_once<T>(waiting: &mut Pin<Box<impl Future<Output = T>>>) -> Poll<T> {
    waiting.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn request(name: usize, tolerated: Duration, time: Duration) -> LimitedRequest {
    LimitedRequest { name, tolerated, time }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_would_be_late_gives_way_to_requests_that_would_not() {
    let engine = SerialEngine::new(9, 4 * SECOND);
    let mut tasks = JoinSet::new();
    let table = [(0, SECOND), (1, 20 * SECOND), (2, 2 * SECOND), (3, 20 * SECOND), (4, 2 * SECOND)];
    for (name, tolerated) in table {
        tasks.spawn(send(engine.clone(), request(name, tolerated, SECOND / 10)));
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(MILLI).await;
    assert_eq!(engine.names(), [1, 3], "the others keep waiting");
    assert_eq!(engine.queue.lock().by_key.len(), 1);
    while let Some(ended) = tasks.join_next().await {
        assert_eq!(ended.expect("no task panics"), Ok(()));
    }
    assert_eq!(engine.names(), [1, 3, 2, 4, 0], "equal ones in order of arrival");
    let last = engine.sent()[4].1;
    assert!((3 * SECOND..MAX_PATIENCE).contains(&last), "{last:?}");
    assert_eq!(engine.queue.len(), 0);
    assert!(engine.queue.lock().by_key.is_empty());
}

/// A place that is freed for both lines goes to the older request without a limit, although the oldest one of
/// all gives way.
#[tokio::test(start_paused = true)]
async fn a_request_that_gives_way_lets_no_younger_one_pass_those_without_a_limit() {
    let (queue, deadline) = (Queue::new(9, Observer::default()), after(LONG));
    let delay = |tolerated| {
        let delay = StartDelay { present: 10 * SECOND, tolerated };
        MissedLook { until: None, delay: Some(delay) }
    };
    let (late, full) = (delay(SECOND), MissedLook::default());
    let turn = queue.wait(limited_key(), late, deadline).await.expect("the first of its line looks");
    let mut first = Box::pin(turn.wait_on(late, deadline));
    assert!(poll_once(&mut first).is_pending());
    let turn = queue.wait(key("m"), full, deadline).await.expect("the first of its line looks");
    let mut unlimited = Box::pin(turn.wait_on(full, deadline));
    assert!(poll_once(&mut unlimited).is_pending());
    let mut young = Box::pin(queue.wait(limited_key(), delay(20 * SECOND), deadline));
    assert!(poll_once(&mut young).is_pending());
    let Poll::Ready(Ok(turn)) = poll_once(&mut first) else { panic!("the oldest looks") };
    let mut first = Box::pin(turn.wait_on(late, deadline));
    assert!(poll_once(&mut first).is_pending());
    let Poll::Ready(Ok(turn)) = poll_once(&mut young) else { panic!("it gives way") };
    let mut young = Box::pin(turn.wait_on(full, deadline));
    assert!(poll_once(&mut young).is_pending());
    queue.lost();
    let Poll::Ready(Ok(turn)) = poll_once(&mut first) else { panic!("the oldest looks") };
    let mut first = Box::pin(turn.wait_on(late, deadline));
    assert!(poll_once(&mut first).is_pending());
    assert!(poll_once(&mut young).is_pending(), "the other line has waited longer");
    let Poll::Ready(Ok(turn)) = poll_once(&mut unlimited) else { panic!("it is its turn") };
    turn.taken();
    assert!(poll_once(&mut young).is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_passes_only_requests_that_tolerate_less() {
    let (queue, deadline, key) = (Queue::new(9, Observer::default()), after(LONG), limited_key());
    let found = |present, tolerated| {
        let delay = StartDelay { present, tolerated };
        MissedLook { until: None, delay: Some(delay) }
    };
    let passes = |tolerated| queue.lets_pass(&key, &found(Duration::ZERO, tolerated));
    assert!(passes(SECOND), "none waits");
    let late = found(10 * SECOND, 2 * SECOND);
    let turn = queue.wait(key.clone(), late, deadline).await.expect("the first of its line looks");
    assert_eq!((passes(3 * SECOND), passes(2 * SECOND), passes(SECOND)), (true, false, false));
    assert!(!queue.lets_pass(&key, &found(4 * SECOND, 3 * SECOND)), "it would be late itself");
    assert!(!queue.lets_pass(&key, &MissedLook::default()), "it found no room");
    let mut waiting = Box::pin(turn.wait_on(MissedLook::default(), deadline));
    assert!(poll_once(&mut waiting).is_pending());
    assert!(passes(3 * SECOND), "a look without room shows nothing of the forecasts");
    tokio::time::advance(MAX_PATIENCE).await;
    assert!(!passes(3 * SECOND), "the oldest goes first");
    tokio::time::advance(MAX_PATIENCE).await;
    assert!(passes(3 * SECOND), "it gives way again");
}

/// Requests that tolerate much keep the engine busy for longer than the first request tolerates.
#[tokio::test(start_paused = true)]
async fn a_request_that_was_passed_over_for_long_goes_first_again() {
    let engine = SerialEngine::new(99, 4 * SECOND);
    let mut tasks = JoinSet::new();
    let mut send_later = |seconds: f64, request| {
        let engine = engine.clone();
        tasks.spawn(async move {
            time::sleep(Duration::from_secs_f64(seconds)).await;
            send(engine, request).await
        });
    };
    send_later(0.1, request(0, SECOND / 2, SECOND));
    for name in 1..=60 {
        send_later(0.2 + name as f64 / 2.0, request(name, 4 * SECOND, SECOND / 2));
    }
    while let Some(ended) = tasks.join_next().await {
        assert_eq!(ended.expect("no task panics"), Ok(()));
    }
    let at = engine.names().iter().position(|name| *name == 0).expect("all were sent");
    let (_, time) = engine.sent()[at];
    assert!((MAX_PATIENCE..MAX_PATIENCE + 5 * SECOND).contains(&time), "{time:?}");
    let others: Vec<usize> = engine.names().into_iter().filter(|name| *name > 0).collect();
    assert!(others.is_sorted(), "{others:?}");
}

/// Requests without a limit keep the engine busy, so that the oldest request can never be sent: those behind
/// it are sent half of the time.
#[tokio::test(start_paused = true)]
async fn a_request_that_cannot_be_sent_holds_the_others_up_for_a_while_only() {
    let engine = SerialEngine::new(99, 3 * SECOND);
    let stuck = tokio::spawn(send(engine.clone(), request(0, SECOND, SECOND)));
    tokio::task::yield_now().await;
    let mut times = Vec::new();
    for name in 1..=30 {
        *engine.idle_at.lock().expect("no test fails within") = after(3 * SECOND);
        let other = tokio::spawn(send(engine.clone(), request(name, 4 * SECOND, MILLI)));
        for _ in 0..10 {
            tokio::time::sleep(SECOND / 10).await;
            *engine.idle_at.lock().expect("no test fails within") = after(3 * SECOND);
        }
        times.push(engine.names().len());
        drop(other);
    }
    assert!(!engine.names().contains(&0));
    assert_eq!(times[2], 3, "the first ones pass at once: {times:?}");
    let longest = times.windows(8).filter(|window| window[0] == window[7]).count();
    assert_eq!(longest, 0, "none was sent for too long: {times:?}");
    assert!(engine.queue.len() <= 7, "{}", engine.queue.len());
    stuck.abort();
    assert!(stuck.await.is_err());
    assert!(engine.queue.len() <= 6, "a request that leaves is not counted");
}

/// Keyed by the limit, each request would be a line of its own, and each event would make all of them look.
#[tokio::test(start_paused = true)]
async fn a_thousand_limits_cost_a_few_looks_for_each_request() {
    let engine = SerialEngine::new(1_000, 10 * SECOND);
    let mut tasks = JoinSet::new();
    for name in 0..1_000 {
        let place = name * 7_919 % 1_000;
        tasks.spawn(send(engine.clone(), request(name, (place + 1) as u32 * 3 * MILLI, 2 * MILLI)));
    }
    tokio::time::sleep(MILLI).await;
    assert_eq!(engine.queue.len(), 1_000);
    assert_eq!(engine.queue.lock().by_key.len(), 1, "one line");
    assert!(
        engine.looks.load(Ordering::Relaxed) < 2_100,
        "{engine_looks}",
        engine_looks = engine.looks.load(Ordering::Relaxed)
    );
    for _ in 0..1_000 {
        engine.queue.lost();
        tokio::task::yield_now().await;
    }
    let looks = engine.looks.load(Ordering::Relaxed);
    assert!(looks < 7_000, "{looks} after a thousand events");
    while let Some(ended) = tasks.join_next().await {
        assert_eq!(ended.expect("no task panics"), Ok(()));
    }
    let more = engine.looks.load(Ordering::Relaxed) - looks;
    println!("{looks} looks before the first request, {more} until the last");
    assert!(more < 6_000, "{more} for a thousand requests");
    assert_eq!(engine.queue.len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever the requests tolerate and whenever they come or give up, each one that stays is sent, and
    /// the line is empty in the end.
    #[test]
    fn sends_every_request_that_stays(
        requests in prop::collection::vec((0u32..4_000, 1u32..900, 0u32..600, 0u32..8), 1..40),
    ) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime without sockets");
        runtime.block_on(async {
            let engine = SerialEngine::new(99, 2 * SECOND);
            let (mut tasks, mut stay) = (JoinSet::new(), 0);
            for (name, (tolerated, time, pause, leaves)) in requests.into_iter().enumerate() {
                let sending = send(engine.clone(), request(name, tolerated * MILLI, time * MILLI));
                if leaves == 0 {
                    tasks.spawn(async move { time::timeout(700 * MILLI, sending).await.unwrap_or(Ok(())) });
                } else {
                    stay += 1;
                    tasks.spawn(sending);
                }
                tokio::time::sleep(pause * MILLI).await;
            }
            while let Some(ended) = tasks.join_next().await {
                assert_eq!(ended.expect("no task panics"), Ok(()));
            }
            assert!(engine.names().len() >= stay);
            assert_eq!(engine.queue.len(), 0);
            assert!(engine.queue.lock().by_key.is_empty());
        });
    }
}
