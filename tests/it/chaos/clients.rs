//! The clients: each asks one thing after another, in its own ways, and judges what it gets.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpSocket;
use tokio::time::{Instant, sleep};

use crate::common::dice::Dice;
use crate::common::h2::{self, H2};
use crate::common::shapes::{Got, Shape};
use crate::common::wire::{Answer, CHUNKED, JSON, Wire, chunk, head, request, tcp};
use crate::common::{logs, wire};
use crate::trouble::Chronicle;

/// What all clients share.
pub struct World {
    /// Where the balancer listens.
    pub address: String,
    pub shapes: Vec<Shape>,
    /// Numbers of the engines by the names of their upstreams.
    pub engines: HashMap<String, usize>,
    pub chronicle: Arc<Chronicle>,
    pub over: Arc<AtomicBool>,
    pub tally: Tally,
}

/// How requests ended.
#[derive(Debug, Default)]
pub struct Tally {
    pub whole: AtomicU64,
    pub broken: AtomicU64,
    pub left: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

impl Tally {
    pub fn wrong(&self) -> Vec<String> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub struct Client {
    world: Arc<World>,
    number: u64,
    dice: Dice,
    asked: u64,
    /// Connections that may be used again.
    http1: Option<Wire>,
    http2: Option<H2>,
}

// === impl Client ===

impl Client {
    pub fn new(world: Arc<World>, number: u64, dice: Dice) -> Self {
        Client { world, number, dice, asked: 0, http1: None, http2: None }
    }

    /// Asks until it is over.
    pub async fn run(mut self) {
        let world = self.world.clone();
        while !world.over.load(Relaxed) {
            self.asked += 1;
            let shape = self.dice.one_of(&world.shapes);
            let begun = Instant::now();
            let answer = match self.dice.between(0, 11) {
                0..=4 => self.plain(shape).await,
                5 => self.piecewise(shape).await,
                6 => self.slow(shape).await,
                7..=9 => self.by_http2(shape).await,
                10 => {
                    self.leave(shape).await;
                    continue;
                }
                _ => {
                    self.leave_http2(shape).await;
                    continue;
                }
            };
            self.judge(shape, begun, &answer);
        }
    }

    fn id(&self) -> String {
        format!("chaos-{}-{}", self.number, self.asked)
    }

    fn request(&self, shape: &Shape) -> Vec<u8> {
        request("POST", shape.path, &[JSON, ("x-request-id", &self.id())], &shape.body)
    }

    fn judge(&self, shape: &Shape, begun: Instant, answer: &Answer) {
        let tally = &self.world.tally;
        let why = match shape.judge(answer) {
            Got::Whole => {
                tally.whole.fetch_add(1, Relaxed);
                return;
            }
            Got::Broken => {
                tally.broken.fetch_add(1, Relaxed);
                let name = answer.header("x-vllm-lb-upstream");
                let engine = self.world.engines.get(name);
                let explained = |engine| self.world.chronicle.explains(engine, begun, Instant::now());
                if engine.is_some_and(|engine| explained(*engine)) {
                    return;
                }
                format!("a stream of {name} broke, and nothing had happened to it: {}", answer.text())
            }
            Got::Wrong(why) => why,
        };
        let (id, path) = (self.id(), shape.path);
        let all = logs::of_all_runtimes().into_iter();
        let log: Vec<String> = all.filter(|line| line.contains(&id)).collect();
        let what = format!("{id} {path} stream {} after {:?}: {why}", shape.stream, begun.elapsed());
        let wrong = format!("{what}\n{:?}\n  {}", answer.headers, log.join("\n  "));
        tally.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(wrong);
    }

    async fn pause(&mut self, least: u64, most: u64) {
        sleep(Duration::from_millis(self.dice.between(least, most))).await;
    }

    // === ways to ask ===

    /// On a connection that is kept for as long as both sides like.
    async fn plain(&mut self, shape: &Shape) -> Answer {
        let mut wire = match self.http1.take() {
            Some(wire) => wire,
            None => Wire::connect(&self.world.address).await,
        };
        let answer = wire.ask(self.request(shape)).await;
        if answer.header("connection") != "close" && answer.whole && !is_broken(&answer) {
            self.http1 = Some(wire);
        }
        answer
    }

    /// A body of unknown length, a bit at a time.
    async fn piecewise(&mut self, shape: &Shape) -> Answer {
        let mut wire = Wire::connect(&self.world.address).await;
        let id = self.id();
        wire.send(head("POST", shape.path, &[JSON, CHUNKED, ("x-request-id", &id)])).await;
        let size = shape.body.len() / self.dice.between(1, 8) as usize + 1;
        for piece in shape.body.chunks(size) {
            wire.send(chunk(piece)).await;
            self.pause(0, 10).await;
        }
        wire.send(chunk(b"")).await;
        wire.answer().await
    }

    /// Reads a bit at a time, from a socket that holds little.
    async fn slow(&mut self, shape: &Shape) -> Answer {
        let socket = TcpSocket::new_v4().expect("sockets can be made");
        socket.set_recv_buffer_size(4 << 10).expect("a fresh socket takes options");
        let address = self.world.address.parse().expect("the balancer listens on an address");
        let mut wire = Wire::over(socket.connect(address).await.expect("the listener takes connections"));
        wire.send(self.request(shape)).await;
        let wire::Head { status, headers, mut framing } = wire.head().await;
        let (mut body, mut pieces, mut whole) = (Vec::new(), Vec::new(), true);
        loop {
            self.pause(0, 10).await;
            match wire.piece(&mut framing).await {
                Ok(Some(piece)) => {
                    pieces.push(piece.len());
                    body.extend_from_slice(&piece);
                }
                Ok(None) => break,
                Err(_) => {
                    whole = false;
                    break;
                }
            }
        }
        Answer { status, headers, body: Bytes::from(body), pieces, whole }
    }

    async fn by_http2(&mut self, shape: &Shape) -> Answer {
        let mut connection = match self.http2.take() {
            Some(connection) if !self.dice.once_in(5) => connection,
            _ => H2::connect(&self.world.address).await,
        };
        let answer = connection.ask(self.request2(shape), std::slice::from_ref(&shape.body)).await;
        if !is_broken(&answer) {
            self.http2 = Some(connection);
        }
        answer
    }

    fn request2(&self, shape: &Shape) -> http::Request<()> {
        let mut request = h2::post(shape.path);
        let id = self.id().parse().expect("an id is a header value");
        request.headers_mut().insert("x-request-id", id);
        request
    }

    // === ways to leave ===

    /// Leaves in any phase, by an orderly end or a reset.
    async fn leave(&mut self, shape: &Shape) {
        let stream = tcp(&self.world.address).await;
        if self.dice.once_in(2) {
            stream.set_zero_linger().expect("an open socket takes options");
        }
        let mut wire = Wire::over(stream);
        let request = self.request(shape);
        self.world.tally.left.fetch_add(1, Relaxed);
        if self.dice.once_in(3) {
            let most = request.len() as u64 - 1;
            wire.send(&request[..self.dice.between(1, most) as usize]).await;
            return self.pause(0, 20).await;
        }
        wire.send(request).await;
        if self.dice.once_in(2) {
            return self.pause(0, 200).await;
        }
        let Some(head) = wire.any_head().await else { return };
        let mut framing = head.framing;
        for _ in 0..self.dice.between(0, 10) {
            if !matches!(wire.piece(&mut framing).await, Ok(Some(_))) {
                return;
            }
        }
    }

    /// Takes back a stream, or ends the connection.
    async fn leave_http2(&mut self, shape: &Shape) {
        let mut connection = H2::connect(&self.world.address).await;
        self.world.tally.left.fetch_add(1, Relaxed);
        let mut asked = connection.begin(self.request2(shape), false).await;
        let most = shape.body.len() as u64;
        let upload = if self.dice.once_in(3) { self.dice.between(0, most - 1) } else { most };
        let piece = shape.body.slice(..upload as usize);
        // The balancer may be quicker to end it than the client.
        drop(asked.body.send_data(piece, upload == most));
        self.pause(0, 100).await;
        if upload == most && self.dice.once_in(2) {
            let Ok(answer) = asked.answer.await else { return };
            let mut body = answer.into_body();
            for _ in 0..self.dice.between(0, 10) {
                let Some(Ok(_)) = body.data().await else { break };
            }
        }
        if self.dice.once_in(2) {
            connection.cut();
        }
    }
}

/// Whether the balancer ends the connection behind an answer.
fn is_broken(answer: &Answer) -> bool {
    String::from_utf8_lossy(&answer.body).contains("\"error\":{")
}
