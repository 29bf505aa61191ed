//! An open loop: requests are due at a fixed rate, whether or not earlier requests are answered, so that the
//! wait counts against a proxy that falls behind. Each request asks for a short stream; the upstream sends
//! its first event at once; the client counts the time from when the request was due to that event.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::JoinSet;

use super::load::{Connection, collect, in_time};
use super::meter::{Meter, Sample};
use super::prompt::{self, Answer};

/// Events of a stream.
const EVENTS: usize = 4;

/// Connections that are open before the first request is due.
const CONNECTIONS: usize = 64;

/// Seconds of requests before those that count.
const WARM_UP: f64 = 0.5;

/// A proxy that gets fewer of the requests that were due was not measured at that rate.
const LEAST_SHARE: f64 = 0.98;

/// Seconds for the answers of the last requests, which are no part of that share.
const DRAIN_SECONDS: f64 = 0.1;

/// Microseconds from when a request was due to the first event of its answer.
pub struct FirstEventTimes {
    pub median: f64,
    pub p99: f64,
}

/// Connections on which no request is open.
struct Idle {
    port: u16,
    connections: Vec<Connection>,
}

impl Idle {
    async fn take(&mut self) -> Result<Connection, String> {
        match self.connections.pop() {
            Some(connection) => Ok(connection),
            None => Connection::open(self.port).await,
        }
    }
}

/// Requests at a rate for so many seconds, and what they took of the processes.
pub async fn run(
    port: u16,
    bytes: usize,
    (rate, seconds): (f64, f64),
    meter: &Meter,
) -> Result<(Sample, FirstEventTimes), String> {
    let requests = Arc::new(prompt::requests(bytes, "sim", Answer::Burst(EVENTS)));
    let mut idle = Idle { port, connections: Vec::new() };
    while idle.connections.len() < CONNECTIONS {
        idle.connections.push(Connection::open(port).await?);
    }
    round(&mut idle, &requests, (rate, WARM_UP)).await?;
    let before = meter.read()?;
    let mut times = round(&mut idle, &requests, (rate, seconds)).await?;
    let sample = meter.sample(&before, times.len())?;
    if times.len() as f64 / sample.rate > seconds / LEAST_SHARE + DRAIN_SECONDS {
        return Err(format!("{:.0} requests a second where {rate} were due", sample.rate));
    }
    times.sort_unstable();
    let at = |share: f64| times[(times.len() as f64 * share) as usize].as_secs_f64() * 1e6;
    Ok((sample, FirstEventTimes { median: at(0.5), p99: at(0.99) }))
}

/// Each request's time to its first event. All are answered when this returns.
async fn round(
    idle: &mut Idle,
    requests: &Arc<Vec<Vec<u8>>>,
    (rate, seconds): (f64, f64),
) -> Result<Vec<Duration>, String> {
    let count = ((rate * seconds) as usize).max(1);
    let gap = Duration::from_secs_f64(1.0 / rate);
    let (due, mut requested) = mpsc::channel(count);
    let clock = thread::spawn(move || keep_time(due, count, gap));
    let (done, mut answered) = mpsc::channel(count);
    let mut tasks = JoinSet::new();
    let mut number = 0;
    while let Some(due) = requested.recv().await {
        take_back(idle, &mut answered);
        let mut connection = idle.take().await?;
        let (requests, done) = (requests.clone(), done.clone());
        tasks.spawn(async move {
            let first = connection.stream(&requests[number % requests.len()]).await?;
            // There is room for all of them, and the receiver outlives this task.
            done.try_send(connection).ok();
            Ok(first.saturating_duration_since(due))
        });
        number += 1;
    }
    let times = in_time(collect(tasks)).await?;
    clock.join().map_err(|_| "the clock stopped".to_string())?;
    take_back(idle, &mut answered);
    Ok(times)
}

fn take_back(idle: &mut Idle, answered: &mut Receiver<Connection>) {
    while let Ok(connection) = answered.try_recv() {
        idle.connections.push(connection);
    }
}

/// Says when a request is due. A thread sleeps by the kernel's clock; tokio's has steps of a millisecond.
#[allow(clippy::disallowed_methods, reason = "this thread does nothing but sleep")]
fn keep_time(due: Sender<Instant>, count: usize, gap: Duration) {
    let start = Instant::now();
    for number in 0..count {
        let at = start + gap * number as u32;
        thread::sleep(at.saturating_duration_since(Instant::now()));
        // What this thread overslept by is its own, and no fault of the proxy.
        if due.try_send(Instant::now()).is_err() {
            return;
        }
    }
}
