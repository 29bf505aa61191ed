//! The process as a whole: one takes over from another without a request lost, and a stop waits for what is
//! in flight and for nothing else.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::body::{chat, events, stream};
use crate::common::h2::{self, H2};
use crate::common::model_server::{ModelServer, document};
use crate::common::process::{Process, Setup};
use crate::common::wire::{Answer, Wire, get, post};
use crate::common::{engine, eventually, paced};
use bytes::Bytes;
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

const CHAT: &str = "/v1/chat/completions";

/// Between two tokens, so that a stream lasts as long as its test needs.
const STEP: Duration = Duration::from_millis(10);

/// A stream that is longer than what a test does meanwhile.
const LONG: usize = 300;

/// What the running process says of a new one that failed.
const FAILED: &str = "no hand-over, this process goes on";

// === under load ===

/// What clients saw.
#[derive(Default)]
struct Seen {
    over: AtomicBool,
    answers: AtomicU64,
}

impl Seen {
    fn count(&self, answer: Answer, streamed: bool) -> bool {
        let answer = answer.expect(200);
        assert!(!streamed || answer.text().ends_with("data: [DONE]\n\n"), "{}", answer.text());
        self.answers.fetch_add(1, Ordering::Relaxed);
        answer.header("connection") == "close"
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    async fn until_more(&self, count: u64) {
        let wanted = self.answers.load(Ordering::Relaxed) + count;
        let more = async || (self.answers.load(Ordering::Relaxed) >= wanted).then_some(());
        eventually("more requests are answered", more).await;
    }
}

fn ask(turn: u64) -> (Vec<u8>, bool) {
    let streamed = turn.is_multiple_of(2);
    (post(CHAT, if streamed { stream("sim", 5) } else { chat("sim") }), streamed)
}

/// Keeps its connection as long as it is told to, and asks again at once, or after a pause.
async fn kept(address: String, seen: Arc<Seen>, pause: Duration) {
    let mut turn = 0;
    while !seen.is_over() {
        let mut client = Wire::connect(&address).await;
        while !seen.is_over() {
            let (request, streamed) = ask(turn);
            turn += 1;
            if seen.count(client.ask(request).await, streamed) {
                break;
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// A connection for each request.
async fn anew(address: String, seen: Arc<Seen>) {
    let mut turn = 0;
    while !seen.is_over() {
        let (request, streamed) = ask(turn);
        turn += 1;
        seen.count(Wire::connect(&address).await.ask(request).await, streamed);
    }
}

/// Clients of all kinds, on all listeners.
fn load(process: &Process, seen: &Arc<Seen>) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for address in &process.addresses {
        for pause in [0, 0, 5, 50] {
            clients.spawn(kept(address.clone(), seen.clone(), Duration::from_millis(pause)));
        }
        clients.spawn(anew(address.clone(), seen.clone()));
        clients.spawn(anew(address.clone(), seen.clone()));
    }
    clients
}

async fn begin_stream(process: &Process, tokens: usize) -> (Wire, crate::common::wire::Head) {
    let mut client = Wire::connect(&process.addresses[0]).await;
    client.send(post(CHAT, stream("sim", tokens))).await;
    let head = client.head().await;
    assert_eq!(head.status, 200);
    (client, head)
}

#[tokio::test(flavor = "multi_thread")]
async fn three_upgrades_in_a_row_lose_no_request() {
    let engines = [paced(STEP).await, paced(STEP).await];
    let setup = Setup::over(&engines, "shutdown: {grace: 20s}");
    let mut running = setup.start().await;
    let seen = Arc::new(Seen::default());
    let clients = load(&running, &seen);
    let mut former = Vec::new();
    for _ in 0..3 {
        seen.until_more(30).await;
        let (mut client, head) = begin_stream(&running, LONG).await;
        let next = setup.upgrade().await;
        assert_eq!((&next.addresses, &next.admin), (&running.addresses, &running.admin));
        let whole = tokio::spawn(async move { client.body(head).await });
        former.push((std::mem::replace(&mut running, next), whole));
    }
    seen.until_more(30).await;
    for (mut process, whole) in former {
        let answer = whole.await.expect("the stream is read").expect(200);
        assert_eq!(answer.text().matches("\"content\":").count(), LONG + 1, "{}", answer.text());
        assert_eq!(process.ended().await, Some(0));
        assert!(!process.has_said("stopped with requests still in flight"));
    }
    seen.over.store(true, Ordering::Relaxed);
    clients.join_all().await;
    assert!(running.has_ended().is_none());
    let path = setup.path("upgrade.sock");
    let mode = std::fs::metadata(&path).expect("the last one can be followed").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    running.signal(Signal::TERM);
    assert_eq!(running.ended().await, Some(0));
    assert!(!std::fs::exists(path).expect("can be looked for"));
    assert!(!std::fs::exists(setup.path("api.sock")).expect("can be looked for"));
}

/// An idle connection does not keep the former process, and HTTP/2 clients reconnect after GOAWAY.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_do_not_keep_the_former_process() {
    let engine = paced(STEP).await;
    let setup = Setup::over([&engine], "");
    let mut former = setup.start().await;
    let mut silent = TcpStream::connect(&former.addresses[0]).await.expect("it listens");
    let mut kept = Wire::connect(&former.addresses[0]).await;
    kept.ask(post(CHAT, chat("sim"))).await.expect(200);
    let mut by_h2 = H2::connect(&former.addresses[0]).await;
    let mut asked = by_h2.begin(h2::post(CHAT), false).await;
    asked.body.send_data(Bytes::from(stream("sim", 100)), true).expect("the stream is open");
    eventually("the stream runs", async || (engine.stats().running > 0).then_some(())).await;
    let _running = setup.upgrade().await;
    let answer = asked.answer().await.expect(200);
    assert_eq!(events(&answer.body).last().map(String::as_str), Some("data: [DONE]"));
    by_h2.closed().await;
    assert_eq!(former.ended().await, Some(0));
    assert!(kept.rest().await.is_empty());
    assert_eq!(silent.read(&mut [0]).await.expect("ends without an error"), 0);
}

// === that come to nothing ===

#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_that_fails_leaves_the_running_one_as_it_was() {
    let engine = engine(Default::default()).await;
    let url = format!("{:?}", engine.url());
    let setup = Setup::over([&engine], "");
    let running = setup.start().await;
    let ask = async || {
        for address in &running.addresses {
            Wire::connect(address).await.ask(post(CHAT, chat("sim"))).await.expect(200);
        }
    };
    setup.write(&url, "nonsense: 1");
    assert_eq!(setup.spawn(&["-u"]).ended().await, Some(64));
    ask().await;

    // It gets the sockets, and then cannot have one more that it wants.
    setup.write(&url, "");
    let text = std::fs::read_to_string(setup.path("lb.yaml")).expect("was written");
    let blocker = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = blocker.local_addr().expect("is bound");
    let more = format!("listen: ['127.0.0.1:0', '{taken}', ");
    std::fs::write(setup.path("lb.yaml"), text.replace("listen: ['127.0.0.1:0', ", &more)).expect("written");
    let mut failing = setup.spawn(&["-u"]);
    assert_eq!(failing.ended().await, Some(1));
    let records = failing.records();
    let error = records.last().expect("says why")["error"].to_string();
    assert!(error.contains(&format!("cannot listen on {taken}")), "{error}");
    running.says(FAILED).await;
    ask().await;

    // Killed while it has the sockets, and waits for an upstream that the running one knows to be ready.
    let name = engine.address().to_string();
    setup.write(&format!("{{url: 'http://127.0.0.1:9', name: '{name}'}}"), "");
    let failures = || running.records().iter().filter(|record| record["message"] == FAILED).count();
    let (records, failed) = (running.records().len(), failures());
    let killed = setup.spawn(&["-u"]);
    eventually("it asks for the sockets", async || (running.records().len() > records).then_some(())).await;
    killed.signal(Signal::KILL);
    eventually("the running one sees it", async || (failures() > failed).then_some(())).await;
    ask().await;
    setup.write(&url, "");
    let next = setup.upgrade().await;
    assert_eq!(next.addresses, running.addresses);
}

/// What a source named outlives the source, and must outlive the process that asked it.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_waits_for_what_is_discovered_and_does_not_lose_it() {
    let (listed, found) = (engine(Default::default()).await, engine(Default::default()).await);
    let server = ModelServer::start(document([&found])).await;
    let upstreams = format!("{:?}, {{gym: 'http://{}', every: 100ms}}", listed.url(), server.address);
    let setup = Setup::over([], "");
    setup.write(&upstreams, "");
    let running = setup.start().await;
    let ready = async |of: &Process| of.admin("/ready").await.json()["upstreams"] == 2;
    eventually("both are ready", async || ready(&running).await.then_some(())).await;
    server.answer(503, "");
    let next = setup.spawn(&["-u"]);
    next.says("source does not name upstreams, those it named stay").await;
    next.says("upstream changed").await;
    server.say(&document([&found]));
    next.says("took over from the running process").await;
    let records = next.records();
    let at = |message: &str| records.iter().position(|record| record["message"] == message);
    assert!(at("source names upstreams") < at("took over from the running process"), "{records:?}");

    // The source never comes: the one that has its engines goes on.
    drop(server);
    let mut blind = setup.spawn(&["-u"]);
    assert_eq!(blind.ended().await, Some(1));
    let error = blind.records().last().expect("says why")["error"].to_string();
    assert!(error.contains("a source of upstreams does not answer, and 1 that"), "{error}");
    next.says(FAILED).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_without_a_running_process_fails() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "");
    let mut alone = setup.spawn(&["-u"]);
    assert_eq!(alone.ended().await, Some(1));
    let error = alone.records().last().expect("says why")["error"].to_string();
    assert!(error.contains("upgrade.sock") && error.contains("start without --upgrade"), "{error}");
}

/// A peer that sends nonsense or nothing is disconnected; SIGQUIT alone changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_peer_on_the_upgrade_socket_changes_nothing() {
    use tokio::io::AsyncWriteExt;
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "");
    let mut running = setup.start().await;
    running.signal(Signal::QUIT);
    running.says("SIGQUIT: a process started with --upgrade takes over without it").await;
    let mut stranger = UnixStream::connect(setup.path("upgrade.sock")).await.expect("it listens");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("taken");
    let mut said = Vec::new();
    // The rest of what it sent was not read, so that its end may be a reset.
    stranger.read_to_end(&mut said).await.ok();
    drop(UnixStream::connect(setup.path("upgrade.sock")).await.expect("it listens"));
    let _next = setup.upgrade().await;
    running.signal(Signal::QUIT);
    assert_eq!(running.ended().await, Some(0));
    // Another balancer with the same path looks whether a process listens, and is no failed upgrade.
    let failed = running.records().iter().filter(|record| record["message"] == FAILED).count();
    assert_eq!(failed, 1, "{:?}", running.records());
}

/// The sockets go to the listeners that have their addresses; the others are closed, files and all.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_list_of_listeners_is_followed() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "");
    let mut former = setup.start().await;
    let text = std::fs::read_to_string(setup.path("lb.yaml")).expect("was written");
    let text = text.replace("api.sock", "other.sock");
    std::fs::write(setup.path("lb.yaml"), text).expect("written");
    let next = setup.upgrade().await;
    assert_eq!(next.addresses[0], former.addresses[0]);
    assert_eq!(former.ended().await, Some(0));
    for address in &next.addresses {
        Wire::connect(address).await.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert!(next.addresses[1].ends_with("/other.sock"));
    assert!(!std::fs::exists(setup.path("api.sock")).expect("can be looked for"));
}

// === stops ===

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_process_stops_at_once_despite_open_connections() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "");
    let mut running = setup.start().await;
    let silent = TcpStream::connect(&running.addresses[0]).await.expect("it listens");
    let mut kept = Wire::connect(&running.addresses[0]).await;
    kept.ask(post(CHAT, chat("sim"))).await.expect(200);
    let mut by_h2 = H2::connect(&running.addresses[0]).await;
    by_h2.ask(h2::post(CHAT), &[Bytes::from(chat("sim"))]).await.expect(200);
    let before = Instant::now();
    running.signal(Signal::TERM);
    assert_eq!(running.ended().await, Some(0));
    let took = before.elapsed();
    assert!(took < Duration::from_secs(10), "grace is 180 s, and it took {took:?}");
    assert!(kept.rest().await.is_empty());
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_with_the_last_request() {
    let engine = paced(STEP).await;
    let setup = Setup::over([&engine], "");
    let mut running = setup.start().await;
    let (mut client, head) = begin_stream(&running, 100).await;
    let mut by_h2 = H2::connect(&running.addresses[0]).await;
    let mut asked = by_h2.begin(h2::post(CHAT), false).await;
    asked.body.send_data(Bytes::from(stream("sim", 100)), true).expect("the stream is open");
    eventually("both run", async || (engine.stats().running == 2).then_some(())).await;
    running.signal(Signal::TERM);
    running.says("stopping").await;
    let refused = async || TcpStream::connect(&running.addresses[0]).await.is_err().then_some(());
    eventually("nobody is let in", refused).await;
    assert!(client.body(head).await.expect(200).text().ends_with("data: [DONE]\n\n"));
    let answer = asked.answer().await.expect(200);
    assert_eq!(events(&answer.body).last().map(String::as_str), Some("data: [DONE]"));
    by_h2.closed().await;
    assert_eq!(running.ended().await, Some(0));
    running.says("stopped").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_cut_after_grace_or_at_a_second_signal() {
    let engine = paced(Duration::from_millis(200)).await;
    for (grace, second) in [("500ms", false), ("10m", true)] {
        let setup = Setup::over([&engine], &format!("shutdown: {{grace: {grace}}}"));
        let mut running = setup.start().await;
        let (mut client, head) = begin_stream(&running, 1_000).await;
        let upgraded = realtime(&running).await;
        running.signal(Signal::TERM);
        running.says("stopping").await;
        if second {
            running.signal(Signal::TERM);
        }
        assert_eq!(running.ended().await, Some(0));
        running.says("stopped with requests still in flight").await;
        assert!(!client.body(head).await.whole);
        drop(upgraded);
        engine.wait_until("the engine is free", |stats| stats.running == 0).await;
    }
}

/// An upgraded connection.
async fn realtime(process: &Process) -> Wire {
    let mut client = Wire::connect(&process.addresses[0]).await;
    let headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    client.send(crate::common::wire::request("GET", "/v1/realtime?model=sim", &headers, b"")).await;
    assert_eq!(client.any_head().await.expect("an answer comes").status, 101);
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_process_serves_and_announces_close() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "shutdown: {drain: 1m}");
    let mut running = setup.start().await;
    let mut kept = Wire::connect(&running.addresses[0]).await;
    kept.ask(get("/health")).await.expect(200);
    running.signal(Signal::TERM);
    running.says("draining, health says no").await;
    let health = kept.ask(get("/health")).await.expect(503);
    assert_eq!(health.header("connection"), "close");
    let mut client = Wire::connect(&running.addresses[0]).await;
    let answer = client.ask(post(CHAT, chat("sim"))).await.expect(200);
    assert_eq!(answer.header("connection"), "close");
    assert!(client.rest().await.is_empty());
    let ready = running.admin("/ready").await.expect(503);
    assert_eq!(ready.json()["ready"], false);
    running.admin("/live").await.expect(200);
    assert!(running.has_ended().is_none());
    running.signal(Signal::INT);
    assert_eq!(running.ended().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_process_exits() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "shutdown: {drain: 200ms}");
    let mut running = setup.start().await;
    running.signal(Signal::TERM);
    assert_eq!(running.ended().await, Some(0));
}

// === the supervisor ===

/// The words that come to a supervisor's socket, one at a time.
pub struct Supervisor(UnixDatagram);

impl Supervisor {
    /// Makes the socket, and names it to processes that start from now on.
    pub fn of(setup: &mut Setup) -> Self {
        let path = setup.path("notify.sock");
        let socket = UnixDatagram::bind(&path).expect("a free path");
        socket.set_nonblocking(true).expect("a fresh socket takes options");
        setup.variable("NOTIFY_SOCKET", &path);
        setup.variable("WATCHDOG_USEC", "300000");
        Supervisor(socket)
    }

    pub async fn hears(&self, wanted: &str) {
        let next = async || {
            let mut buffer = [0; 256];
            let length = self.0.recv(&mut buffer).ok()?;
            let words = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let words = words.split("\nMONOTONIC_USEC=").next().unwrap_or_default().to_string();
            (words != "WATCHDOG=1").then_some(words)
        };
        assert_eq!(eventually("the supervisor is told", next).await, wanted);
    }

    pub async fn hears_a_sign_of_life(&self) {
        let next = async || {
            let mut buffer = [0; 256];
            let length = self.0.recv(&mut buffer).ok()?;
            (&buffer[..length] == b"WATCHDOG=1").then_some(())
        };
        eventually("there is a sign of life", next).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_supervisor_is_notified_of_start_handover_and_stop() {
    let engine = engine(Default::default()).await;
    let mut setup = Setup::over([&engine], "");
    let supervisor = Supervisor::of(&mut setup);
    let mut former = setup.start().await;
    supervisor.hears("READY=1").await;
    supervisor.hears_a_sign_of_life().await;
    let mut running = setup.upgrade().await;
    supervisor.hears(&format!("MAINPID={}\nREADY=1", running.pid())).await;
    assert_eq!(former.ended().await, Some(0));
    running.signal(Signal::TERM);
    // From the former one, which ended before, came nothing.
    supervisor.hears("STOPPING=1").await;
    assert_eq!(running.ended().await, Some(0));
}
