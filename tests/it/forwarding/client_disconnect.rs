//! How soon a client that leaves frees the engine, by the engine's own count, in every phase of a request.
//! Prints its figures; what is held is the median, since a single try is at the mercy of the machine. So is
//! the median where other processes take most of it: beside each try another client leaves an engine without
//! a balancer between them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::common::body::{Place, chat, padded, stream};
use crate::common::h2::{self, H2};
use crate::common::wire::{JSON, Wire, head, post, tcp};
use crate::common::{
    Balancer, EngineServer, Options, PATIENCE, Timing, config, direct, eventually, upstream, upstreams,
};
use ::h2::RecvStream;
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

const CHAT: &str = "/v1/chat/completions";

/// Tries for each phase and each way to leave.
const TRIES: usize = 17;

/// What may pass until the engine is free, on a machine without other work.
const SOON: Duration = Duration::from_millis(50);

/// What may pass beyond that, in times of what passes without a balancer. Through it, the end of a client is
/// seen by one more process, which then ends another connection.
const DIRECT_TIMES: u32 = 4;

/// Longer than any test: the generation goes on until a side disconnects.
const LONG: usize = 30_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Fin,
    Reset,
    /// A stream is taken back, and its connection stays.
    Http2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Queue,
    Prefill,
    Stream,
    Whole,
    Upload,
}

/// A client that has sent something; dropping it is how it leaves.
enum Client {
    Http1(Wire),
    Http2 { asked: Option<h2::Asked>, events: Option<RecvStream>, _connection: H2 },
}

/// An engine whose prefill takes so long a token, with 20 ms between two tokens of an answer.
async fn engine(prefill: f64) -> EngineServer {
    let timing = Timing { per_step: 0.02, per_prefill_token: prefill, ..Timing::instant() };
    EngineServer::start(Options { timing, ..Options::default() }).await.expect("a free port is there")
}

/// Over an engine that is asked once how it is and then left alone, so that every connection to it is a
/// request's.
async fn over(engine: &EngineServer) -> Balancer {
    let mut config = config(upstreams([engine]));
    config.upstreams[0].max_active = Some(1);
    config.health.interval = Duration::from_secs(3600);
    config.peek.bytes = 64 << 10;
    Balancer::ready(config).await
}

// === impl Client ===

impl Client {
    /// Sends a request, or, where the phase is that of sending, half of it.
    async fn asks(balancer: &Balancer, phase: Phase, way: Way) -> Self {
        let body = match phase {
            Phase::Upload => padded(1 << 20, "sim", Place::First),
            Phase::Whole => Bytes::from(chat("sim").replace("\"max_tokens\":3", "\"max_tokens\":30000")),
            Phase::Queue | Phase::Prefill | Phase::Stream => Bytes::from(stream("sim", LONG)),
        };
        let sent = if phase == Phase::Upload { body.slice(..body.len() / 2) } else { body.clone() };
        if way == Way::Http2 {
            let mut connection = H2::connect(balancer.address()).await;
            let mut asked = connection.begin(h2::post(CHAT), false).await;
            asked.body.send_data(sent, phase != Phase::Upload).expect("the stream is open");
            return Client::Http2 { asked: Some(asked), events: None, _connection: connection };
        }
        let stream = tcp(balancer.address()).await;
        if way == Way::Reset {
            stream.set_zero_linger().expect("an open socket takes options");
        }
        let mut wire = Wire::over(stream);
        let length = body.len().to_string();
        wire.send(head("POST", CHAT, &[JSON, ("content-length", &length)])).await;
        wire.send(sent).await;
        Client::Http1(wire)
    }

    /// Reads a few events.
    async fn reads(&mut self) {
        match self {
            Client::Http1(wire) => {
                let mut framing = wire.head().await.framing;
                for _ in 0..3 {
                    wire.piece(&mut framing).await.expect("it goes on").expect("and has not ended");
                }
            }
            Client::Http2 { asked, events, .. } => {
                let h2::Asked { answer, body: _sent } = asked.take().expect("it has asked");
                let mut body = answer.await.expect("an answer comes").into_body();
                for _ in 0..3 {
                    body.data().await.expect("it goes on").expect("and is not broken");
                }
                *events = Some(body);
            }
        }
    }

    fn leave(&mut self) {
        match self {
            Client::Http1(wire) => *wire = Wire::over(tokio::io::duplex(1).0),
            Client::Http2 { asked, events, .. } => drop((asked.take(), events.take())),
        }
    }
}

/// How long it takes from a client's leave until `free`.
async fn timed(client: &mut Client, free: impl Fn() -> bool) -> Duration {
    let left = Instant::now();
    client.leave();
    while !free() {
        assert!(left.elapsed() < PATIENCE, "it is never free");
        sleep(Duration::from_micros(200)).await;
    }
    left.elapsed()
}

/// One try: brings a client into a phase and lets it leave.
async fn one(engine: &EngineServer, balancer: &Balancer, phase: Phase, way: Way) -> Duration {
    let mut client = Client::asks(balancer, phase, way).await;
    match phase {
        Phase::Queue => {
            let queue = balancer.running.fleet.queue();
            eventually("it waits", async || (queue.len() == 1).then_some(())).await;
            return timed(&mut client, || queue.is_empty()).await;
        }
        Phase::Prefill | Phase::Whole => engine.wait_until("it runs", |stats| stats.running == 1).await,
        Phase::Stream => client.reads().await,
        Phase::Upload => engine.wait_until("it is connected", |stats| stats.used == 1).await,
    }
    let took = timed(&mut client, || {
        let stats = engine.stats();
        stats.running + stats.waiting + stats.used == 0
    });
    let took = took.await;
    balancer.until_idle().await;
    took
}

/// The same without a balancer.
async fn one_directly(engine: &EngineServer) -> Duration {
    let mut wire = Wire::connect(&direct(engine)).await;
    wire.send(post(CHAT, stream("sim", LONG))).await;
    let mut client = Client::Http1(wire);
    client.reads().await;
    timed(&mut client, || {
        let stats = engine.stats();
        stats.running + stats.waiting + stats.used == 0
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_frees_the_engine_soon() {
    println!("{:8} {:6} {:>10} {:>10} {:>10} {:>10}", "phase", "way", "median", "90 %", "most", "direct");
    let yardstick = engine(0.0).await;
    for phase in [Phase::Queue, Phase::Prefill, Phase::Stream, Phase::Whole, Phase::Upload] {
        // No request leaves the phase of prefill by itself.
        let engine = engine(if phase == Phase::Prefill { 1000.0 } else { 0.0 }).await;
        let balancer = over(&engine).await;
        let mut running = None;
        if phase == Phase::Queue {
            running = Some(Client::asks(&balancer, Phase::Stream, Way::Fin).await);
            engine.wait_until("it runs", |stats| stats.running == 1).await;
        }
        for way in [Way::Fin, Way::Reset, Way::Http2] {
            let (mut took, mut directly) = (Vec::new(), Vec::new());
            for _ in 0..TRIES {
                took.push(one(&engine, &balancer, phase, way).await);
                directly.push(one_directly(&yardstick).await);
            }
            took.sort_unstable();
            directly.sort_unstable();
            let [median, tenth, most] = [TRIES / 2, TRIES * 9 / 10, TRIES - 1].map(|at| took[at]);
            let (names, direct) =
                (format!("{:8} {:6}", format!("{phase:?}"), format!("{way:?}")), directly[TRIES / 2]);
            println!("{names} {median:10.1?} {tenth:10.1?} {most:10.1?} {direct:10.1?}");
            assert!(median <= SOON + DIRECT_TIMES * direct, "{phase:?} by {way:?}: {took:?}, {directly:?}");
        }
        if phase == Phase::Queue {
            assert_eq!(engine.stats().received, 1, "nobody who left the queue was sent");
        }
        drop(running);
        balancer.until_idle().await;
    }
}

/// An upstream that answers probes, and then accepts no connection and refuses none: a listener without a
/// task.
struct Swallower {
    listener: Arc<TcpListener>,
    address: SocketAddr,
    answering: JoinHandle<()>,
}

impl Swallower {
    fn start() -> Self {
        let socket = TcpSocket::new_v4().expect("sockets can be made");
        socket.bind(([127, 0, 0, 1], 0).into()).expect("a free port is there");
        let listener = Arc::new(socket.listen(1).expect("a bound socket can listen"));
        let address = listener.local_addr().expect("a listener has an address");
        let own = listener.clone();
        let answering = tokio::spawn(async move {
            while let Ok((mut stream, _)) = own.accept().await {
                // A small request arrives whole; the client may have disconnected.
                drop(stream.read(&mut [0; 4096]).await);
                drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await);
            }
        });
        Swallower { listener, address, answering }
    }

    /// Fills the backlog of the listener; the caller keeps the connections.
    async fn swallow(&self) -> Vec<TcpStream> {
        self.answering.abort();
        let mut line = Vec::new();
        while let Ok(taken) = timeout(Duration::from_millis(300), TcpStream::connect(self.address)).await {
            line.push(taken.expect("a line that is not full takes one more"));
        }
        line
    }
}

/// While the balancer connects, it cannot watch the client. The lease ends when the connection is made or
/// given up, and no other engine receives the request.
#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_during_connect_reaches_no_engine() {
    let (swallower, engine) = (Swallower::start(), engine(0.0).await);
    let mut first = upstream(&format!("http://{}", swallower.address));
    first.models = Some(vec!["sim".into()]);
    first.weight = 1000.0;
    let mut config = config(vec![first, upstreams([&engine]).remove(0)]);
    config.upstreams[1].weight = 0.001;
    config.timeouts.connect = Duration::from_millis(500);
    config.health.interval = Duration::from_secs(3600);
    let balancer = Balancer::ready(config).await;
    let line = swallower.swallow().await;
    let accepted = engine.stats().accepted;
    let mut took = Vec::new();
    for way in [Way::Fin, Way::Reset, Way::Http2] {
        let mut client = Client::asks(&balancer, Phase::Stream, way).await;
        balancer.until_active(1).await;
        let fleet = &balancer.running.fleet;
        let idle = || fleet.snapshot().entries.iter().all(|entry| entry.upstream.load().active == 0);
        took.push(timed(&mut client, idle).await);
    }
    println!("leaving while we connect, with a limit of 500 ms: free after {took:.1?}");
    let stats = engine.stats();
    assert_eq!((stats.received, stats.accepted), (0, accepted), "an attempt followed for nobody");
    drop((line, swallower.listener));
}
